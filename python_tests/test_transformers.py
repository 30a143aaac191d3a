"""`model.generate` itself made speculative: what the loop gives, or exactly what it gave before, and why."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from generating import NEW, Favour, StopAt, base_model, now, ordinary, sequences_of
from loop_models import CONFIGS, PROMPT, VOCAB, build, byte_tokenizer, config, prompt
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    set_seed,
)

from specprefill_kernels.integrations import transformers as integration
from specprefill_kernels.integrations._transformers_rows import call_problem, plan_problem
from specprefill_kernels.integrations.transformers import disable, enable, last_result
from specprefill_kernels.loop import SpecPrefill
from specprefill_kernels.loop.decoding import prepare


@pytest.fixture
def base():
    return base_model()


@pytest.fixture(scope="module")
def speculator():
    return build("llama", seed=3)


@pytest.fixture
def enabled(base, speculator):
    enable(base, speculator, config())
    return base


def test_generate_gives_what_the_loop_gives(base, speculator):
    ids = prompt()
    expected = SpecPrefill(base, speculator, config()).generate(ids, NEW)
    enable(base, speculator, config())
    sequences = base.generate(ids, max_new_tokens=NEW)
    assert torch.equal(sequences[:, :PROMPT], ids)
    assert tuple(sequences[0, PROMPT:].tolist()) == expected.tokens
    assert expected.tokens != tuple(ordinary(base, ids, max_new_tokens=NEW)[0, PROMPT:].tolist())
    result = last_result(base)
    assert result.mode == "sparse"
    assert result.reason == expected.reason
    assert result.rows[0].spans == expected.spans
    assert result.rows[0].ttft > 0
    assert result.selections == (result.rows[0].selection,)


def test_the_bases_own_layers_will_do(base):
    ids = prompt()
    expected = SpecPrefill(base, None, config(), self_layers=(0, 1)).generate(ids, NEW)
    enable(base, config=config(), self_layers=(0, 1))
    assert tuple(base.generate(ids, max_new_tokens=NEW)[0, PROMPT:].tolist()) == expected.tokens
    assert last_result(base).mode == expected.mode == "sparse"


@pytest.mark.parametrize("keywords", [{}, {"self_layers": (0, 1)}], ids=["speculator", "self"])
def test_keeping_everything_is_the_ordinary_generate(base, speculator, keywords):
    enable(base, None if keywords else speculator, config(keep_ratio=1.0), **keywords)
    ids = prompt()
    for options in ({}, {"do_sample": True, "top_k": 20}, {"num_beams": 2}, {"min_new_tokens": 4}):
        expected = ordinary(base, ids, max_new_tokens=12, **options)
        assert torch.equal(now(base, ids, max_new_tokens=12, **options), expected)
        assert last_result(base).mode == "dense"


def test_keeping_everything_after_scoring_equals_it_too(base, speculator):
    ids = prompt()
    for keywords in ({"speculator": speculator}, {"self_layers": (0, 1)}):
        enable(base, config=config(keep_mass=1.0), **keywords)
        assert torch.equal(base.generate(ids, max_new_tokens=12), ordinary(base, ids, max_new_tokens=12))
        assert last_result(base).mode == "dense"
        assert last_result(base).reason.startswith("the selection kept every token")
        assert len(last_result(base).selections) == 1
        disable(base)


# What the loop is given for the same effect, where that is not the same option.
OPTIONS = {
    "max_length": ({"max_length": PROMPT + 5}, {"max_new_tokens": 5}),
    "max_new_tokens": ({"max_new_tokens": 5}, {"max_new_tokens": 5}),
    "default_length": ({}, {"max_new_tokens": 20}),
    "generation_config": (
        {"generation_config": GenerationConfig(max_new_tokens=5, repetition_penalty=1.7)},
        {"max_new_tokens": 5, "repetition_penalty": 1.7},
    ),
    "min_new_tokens": ({"max_new_tokens": 9, "min_new_tokens": 7}, {"max_new_tokens": 9, "min_new_tokens": 7}),
    "min_length": ({"max_new_tokens": 9, "min_length": PROMPT + 7}, {"max_new_tokens": 9, "min_new_tokens": 7}),
    "sampled": ({"max_new_tokens": 9, "do_sample": True}, {"max_new_tokens": 9, "do_sample": True}),
    "top_p": (
        {"max_new_tokens": 9, "do_sample": True, "top_p": 0.5},
        {"max_new_tokens": 9, "do_sample": True, "top_p": 0.5},
    ),
    "processor": (
        {"max_new_tokens": 9, "logits_processor": [Favour(9)]},
        {"max_new_tokens": 9, "logits_processor": [Favour(9)]},
    ),
    "criterion": ({"stopping_criteria": [StopAt(PROMPT + 3)]}, {"max_new_tokens": 3}),
    "no_repeat": ({"max_new_tokens": 9, "no_repeat_ngram_size": 1}, {"max_new_tokens": 9, "no_repeat_ngram_size": 1}),
    "max_time": ({"max_time": 1e-9}, {"max_new_tokens": 1}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_do_what_they_do_in_generate(base, speculator, name):
    given, alike = OPTIONS[name]
    set_seed(0)
    expected = SpecPrefill(base, speculator, config()).generate(prompt(), **alike)
    enable(base, speculator, config())
    assert tuple(now(base, prompt(), **given)[0, PROMPT:].tolist()) == expected.tokens
    assert last_result(base).mode == "sparse"


def test_eos_ends_the_answer(enabled):
    free = enabled.generate(prompt(), max_new_tokens=12)[0]
    stop = int(free[PROMPT + 4])
    first = free[PROMPT:].tolist().index(stop)
    ended = enabled.generate(prompt(), max_new_tokens=12, eos_token_id=stop)
    assert torch.equal(ended[0], free[: PROMPT + first + 1])


def test_arguments_may_come_by_place_and_by_name(enabled):
    given = GenerationConfig(max_new_tokens=4)
    expected = enabled.generate(prompt(), max_new_tokens=4)
    for arguments in (
        enabled.generate(prompt(), given),
        enabled.generate(inputs=prompt(), generation_config=given),
        enabled.generate(input_ids=prompt(), attention_mask=torch.ones_like(prompt()), max_new_tokens=4),
    ):
        assert torch.equal(arguments, expected)
        assert last_result(enabled).mode == "sparse"


@pytest.mark.parametrize("do_sample", [False, True])
def test_scores_and_logits_come_with_the_sequences(enabled, do_sample):
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "do_sample": do_sample}
    criterion = StopAt(PROMPT + 4)
    output = now(enabled, prompt(), logits_processor=[Favour(9)], stopping_criteria=[criterion], **options)
    plain = now(enabled, prompt(), logits_processor=[Favour(9)], max_new_tokens=4, do_sample=do_sample)
    assert torch.equal(output.sequences, plain)
    assert type(output) is type(ordinary(enabled, prompt(40), max_new_tokens=1, **options))
    assert (len(output.scores), len(output.logits)) == (4, 4)
    assert [tuple(step.shape) for step in output.scores] == [(1, VOCAB)] * 4
    assert torch.equal(output.scores[0][0, 9], output.logits[0][0, 9] + 3)
    if not do_sample:
        assert [int(step.argmax()) for step in output.scores] == output.sequences[0, PROMPT:].tolist()
    assert [len(scores) for scores in criterion.scores] == [1, 2, 3, 4]
    assert output.past_key_values is None
    scored = enabled.compute_transition_scores(output.sequences, output.scores)
    assert tuple(scored.shape) == (1, 4)


def test_processors_see_the_whole_prompt(enabled):
    watch = Favour(9)
    enabled.generate(prompt(), max_new_tokens=3, logits_processor=[watch])
    assert [ids.shape[1] for ids in watch.seen] == [PROMPT, PROMPT + 1, PROMPT + 2]
    assert torch.equal(watch.seen[0], prompt())


CANNOT = {
    "num_beams": {"num_beams": 2},
    "num_return_sequences": {"num_return_sequences": 2, "do_sample": True},
    "use_cache": {"use_cache": False},
    "cache_implementation": {"cache_implementation": "static"},
    "position_ids": {"position_ids": torch.arange(PROMPT)[None]},
    "output_hidden_states": {"return_dict_in_generate": True, "output_hidden_states": True},
    "prefill_chunk_size": {"prefill_chunk_size": 64},
    "prompt_lookup": {"prompt_lookup_num_tokens": 3},
    "guidance_scale": {"guidance_scale": 1.5},
    "right_padding": {"attention_mask": (torch.arange(PROMPT) < PROMPT - 4).long()[None]},
    "custom_generate": {"custom_generate": lambda model, input_ids, **_: input_ids},
}
SAID = {
    "num_beams": "beam search: ",
    "prompt_lookup": "assisted generation: ",
    "right_padding": "attention_mask: padding that is not all on the left",
    "use_cache": "use_cache=False: ",
}


@pytest.mark.parametrize("name", CANNOT)
def test_what_the_loop_cannot_do_runs_dense_and_says_why(enabled, name, caplog):
    integration._said.clear()
    options = {"max_new_tokens": 4, **CANNOT[name]}
    expected = sequences_of(ordinary(enabled, prompt(), **options))
    for _ in range(2):
        assert torch.equal(sequences_of(now(enabled, prompt(), **options)), expected)
    result = last_result(enabled)
    assert (result.mode, result.rows, result.selections) == ("dense", (), ())
    assert result.reason.startswith(SAID.get(name, f"{name}: "))
    assert caplog.text.count(f"generate runs dense: {result.reason}") == 1  # once for both


ARGUMENTS = (
    "assistant_model cache_implementation cache_position custom_generate inputs_embeds negative_prompt_ids "
    "past_key_values position_ids synced_gpus token_healing"
)
FIELDS = (
    "cache_implementation guidance_scale output_attentions output_hidden_states prefill_chunk_size token_healing "
    "num_return_sequences num_beams penalty_alpha prompt_lookup_num_tokens"
)


def test_every_reason_is_found(enabled):
    """Those too for which an ordinary call would need another model, or several processes."""
    for name in ARGUMENTS.split():
        assert call_problem(enabled, {"inputs": prompt(), name: torch.ones(1)}).startswith(f"{name}: ")
        assert call_problem(enabled, {"inputs": prompt(), name: None}) is None
    prepared = prepare(enabled, {"inputs": prompt(), "max_new_tokens": 2})
    assert plan_problem({}, prepared, streamed=True) is None
    for name in FIELDS.split():
        changed = copy.deepcopy(prepared.config)
        changed.top_k = 4  # which a penalty alpha goes with
        setattr(changed, name, 2)
        assert plan_problem({}, replace(prepared, config=changed), streamed=False) is not None, name
    extra = replace(prepared, model_inputs={"token_type_ids": torch.zeros(1, PROMPT)})
    assert plan_problem({}, extra, streamed=False).startswith("token_type_ids: ")


def test_embeddings_a_cache_and_an_assistant_run_dense(enabled, speculator):
    ids = prompt()
    for name, options in {
        "inputs_embeds": {"inputs_embeds": enabled.get_input_embeddings()(ids).detach()},
        "assistant_model": {"inputs": ids, "assistant_model": speculator},
    }.items():
        assert torch.equal(
            enabled.generate(**options, max_new_tokens=4), ordinary(enabled, **options, max_new_tokens=4)
        )
        assert last_result(enabled).reason.startswith(f"{name}: ")
    first = ordinary(enabled, ids, max_new_tokens=2, return_dict_in_generate=True)
    caches = copy.deepcopy(first.past_key_values), first.past_key_values
    outputs = [
        run(first.sequences, past_key_values=cache, max_new_tokens=4)
        for run, cache in zip((enabled.generate, lambda *a, **k: ordinary(enabled, *a, **k)), caches)
    ]
    assert torch.equal(*outputs)
    assert last_result(enabled).reason.startswith("past_key_values: ")


def test_the_generation_config_of_the_model_counts(enabled):
    enabled.generation_config.num_beams = 2
    assert torch.equal(enabled.generate(prompt(), max_new_tokens=4), ordinary(enabled, prompt(), max_new_tokens=4))
    assert last_result(enabled).reason.startswith("beam search: ")


def test_errors_are_generates_own(enabled):
    for options in ({"temprature": 0.5}, {"max_length": 3}, {"streamer": object(), "num_beams": 2}):
        with pytest.raises(Exception) as expected:  # noqa: PT011
            ordinary(enabled, prompt(), **options)
        with pytest.raises(type(expected.value)) as found:
            enabled.generate(prompt(), **options)
        assert str(found.value) == str(expected.value)
    with pytest.raises(TypeError, match="multiple values"):
        enabled.generate(prompt(), inputs=prompt())


def test_a_batch_is_not_streamed(enabled):
    """The text streamers refuse one; another may take it, and gets what generate gives."""
    heard = []
    streamer = SimpleNamespace(put=heard.append, end=lambda: None)
    ids = torch.cat([prompt(), prompt(seed=2)])
    sequences = enabled.generate(ids, max_new_tokens=3, streamer=streamer)
    assert last_result(enabled).reason == "streamer: a batch, which is not streamed"
    assert torch.equal(torch.stack(heard[1:], dim=1), sequences[:, PROMPT:])


def test_a_short_prompt_runs_dense(base, speculator):
    enable(base, speculator, config(min_prompt_tokens=200))
    assert torch.equal(base.generate(prompt(), max_new_tokens=4), ordinary(base, prompt(), max_new_tokens=4))
    assert last_result(base).reason == "prompt too short: 150 tokens, min_prompt_tokens is 200"
    assert last_result(base).selections[0].mode == "dense"
    assert torch.equal(base.generate(max_new_tokens=2, bos_token_id=5)[:, :1], torch.tensor([[5]]))


def test_pad_ids_inside_a_prompt_are_tokens_where_the_mask_says_so(enabled):
    pad = enabled.generation_config.pad_token_id
    ids = torch.cat([prompt(), prompt(seed=2)])
    ids[0, 0] = ids[1, 70] = pad
    for rows in (ids, ids[:1], ids[1:]):
        enabled.generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=2)
        assert [row.prompt_tokens for row in last_result(enabled).rows] == [PROMPT] * len(rows)
    # Without a mask generate takes them for padding, as before.
    enabled.generate(ids[:1], max_new_tokens=2)
    assert last_result(enabled).rows[0].prompt_tokens == PROMPT - 1
    assert torch.equal(enabled.generate(ids[1:], max_new_tokens=2), ordinary(enabled, ids[1:], max_new_tokens=2))
    assert last_result(enabled).reason == "attention_mask: padding that is not all on the left"


def test_a_generate_inside_the_ordinary_one_is_ordinary(enabled, speculator):
    """Token healing is a call of `generate` of its own."""
    tokenizer = byte_tokenizer((("o", "o"),))  # so that "o" at the end may be healed
    tokenizer.pad_token, enabled.generation_config.bos_token_id = "<eos>", 1
    healing = GenerationConfig(token_healing=True, max_new_tokens=4)
    inputs = {
        **tokenizer("The report was signed by the treasurer. " * 8 + "Who", return_tensors="pt"),
        "tokenizer": tokenizer,
    }
    forwards = []
    with speculator.register_forward_pre_hook(lambda *_: forwards.append(1)):
        for options in ({"token_healing": True, "max_new_tokens": 4}, {"generation_config": healing}):
            enabled.generate(**inputs, **options)
            assert last_result(enabled).reason == "token_healing: it changes the prompt"
        assert not forwards
        enabled.generate(**inputs, max_new_tokens=4)
        assert forwards


def multimodal(text):
    """A multimodal model around a text model's weights."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    wrapped = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text.config.to_dict(),
            vision_config={**vision, "image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4,
            image_token_index=VOCAB - 1,
        )
    ).eval()
    weights = text.state_dict()
    with torch.no_grad():
        for name, weight in wrapped.state_dict().items():
            if "vision" not in name and "projector" not in name:
                weight.copy_(weights[name.replace("language_model.", "")])
    wrapped.generation_config = text.generation_config
    return wrapped


def test_a_multimodal_model_reads_text_as_its_text_model_does(speculator):
    text = build("gemma3", seed=7)
    model = multimodal(text)
    ids, options = prompt() % 280 + 3, {"max_new_tokens": 8, "no_repeat_ngram_size": 1}
    answers = []
    for one in (text, model):
        enable(one, speculator, config())
        answers.append(one.generate(ids, **options))
        assert last_result(one).mode == "sparse"
    assert torch.equal(*answers)
    assert not torch.equal(answers[0], ordinary(text, ids, **options))
    images = {"pixel_values": torch.zeros(1, 3, 28, 28)}
    with pytest.raises(ValueError, match="mage"):  # the ordinary one misses the image's tokens
        model.generate(ids, **options, **images)


def test_positions_of_several_axes_run_dense(speculator):
    """Text alone has equal positions on all of them; the loop does not know that."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 4]}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64, "intermediate_size": 32}
    text = {**CONFIGS["qwen2"]().to_dict(), "hidden_size": 64, "rope_parameters": rope}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()
    model.generation_config.pad_token_id = 0
    enable(model, speculator, config())
    expected = ordinary(model, prompt(), max_new_tokens=4)
    assert torch.equal(model.generate(prompt(), max_new_tokens=4), expected)
    assert last_result(model).reason == "position_ids of several axes: the loop gives every token one position"

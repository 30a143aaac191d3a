"""SpecPrefill end to end on tiny models: equal to `generate` when all is kept, honest about what it did."""

from __future__ import annotations

import pytest
import torch
from loop_models import (
    FAMILIES,
    PROMPT,
    SLIDING,
    VOCAB,
    build,
    byte_tokenizer,
    config,
    logits_by_hand,
    ordinary,
    pipeline,
    prompt,
)
from test_loop_continuing import by_hand
from transformers import (
    BartConfig,
    BartForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from specprefill_kernels.loop import SpecPrefill
from specprefill_kernels.loop.costs import CostModel, PrefillCost, identity_of
from specprefill_kernels.loop.decoding import decode, plan_decoding
from specprefill_kernels.loop.prefill import BaseRun

STAGES = {"tokenize", "speculator_prefill", "look_ahead", "score", "select", "base_prefill", "decode"}


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_equals_generate(family):
    sp, ids = pipeline(family, keep_ratio=1.0), prompt()
    result = sp.generate(ids, max_new_tokens=24)
    assert list(result.tokens) == ordinary(sp.base, ids, 24, do_sample=False)
    assert len(set(result.tokens)) > 1
    assert (result.mode, result.kept_tokens, result.spans) == ("dense", PROMPT, ((0, PROMPT),))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sparse_path_with_every_token_equals_generate(family):
    """The same code that runs with gaps, its own cache and masks included."""
    model, ids = build(family, seed=7), prompt()
    plan = plan_decoding(model, ids, max_new_tokens=24, do_sample=False)
    run = BaseRun(model, PROMPT, sparse=True)
    logits = run.prefill(ids, torch.arange(PROMPT))
    assert list(decode(plan, ids, logits, run.step)) == ordinary(model, ids, 24, do_sample=False)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_a_sparse_answer_equals_the_kept_tokens_by_hand(family):
    sp, ids = pipeline(family), prompt()
    result = sp.generate(ids, max_new_tokens=5)
    assert result.mode == "sparse"
    assert 0 < result.kept_tokens < PROMPT
    positions = result.selection.kept_indices
    tokens, answer = ids[:, positions], []
    for step in range(5):
        answer.append(int(logits_by_hand(sp.base, tokens, positions)[-1].argmax()))
        tokens = torch.cat([tokens, torch.tensor([answer[-1:]])], dim=1)
        positions = torch.cat([positions, torch.tensor([PROMPT + step])])
    assert list(result.tokens) == answer


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_list_of_unequal_prompts_equals_its_prompts_alone(family):
    sp = pipeline(family)
    prompts = [prompt(length, seed=length)[0].tolist() for length in (PROMPT, 40, 97)]
    together = sp.generate(prompts, 6)
    assert [r.prompt_tokens for r in together] == [PROMPT, 40, 97]
    for alone, result in zip([sp.generate(p, 6) for p in prompts], together):
        assert (alone.tokens, alone.spans, alone.mode) == (result.tokens, result.spans, result.mode)
        assert torch.equal(alone.selection.importance, result.selection.importance)
    assert [s.spans for s in sp.select(prompts)] == [r.spans for r in together]


def test_two_runs_are_the_same():
    sp, ids = pipeline(), prompt()
    first, second = sp.generate(ids, 6), sp.generate(ids, 6)
    assert first.tokens == second.tokens
    assert torch.equal(first.selection.importance, second.selection.importance)


def test_selection_follows_the_importance():
    sp, ids = pipeline(keep_ratio=0.3), prompt()
    selection = sp.select(ids)
    chunks = selection.importance.split(16)
    best = sorted(range(len(chunks)), key=lambda c: -float(chunks[c].double().mean()))
    budget = -(-len(chunks) * 3 // 10)
    wanted = {len(chunks) - 1} | set([c for c in best if c != len(chunks) - 1][: budget - 1])
    kept = {int(i) // 16 for i in selection.kept_indices}
    assert kept == wanted
    assert selection.kept_tokens == sum(len(chunks[c]) for c in wanted)


@pytest.mark.parametrize("keep_tokens", [1, 16, 33])
def test_the_last_prompt_token_is_always_kept(keep_tokens):
    """The first answer token is read off it."""
    base = build("llama", seed=7)
    for seed in range(8):
        sp = SpecPrefill(base, build("llama", seed=seed), config(keep_tokens=keep_tokens))
        selection = sp.select(prompt(seed=seed))
        assert int(selection.kept_indices[-1]) == PROMPT - 1
        assert selection.kept_tokens <= max(16, keep_tokens + 15)


def test_protected_spans_survive():
    sp, ids = pipeline(keep_tokens=48), prompt()
    free = sp.select(ids)
    dropped = next(i for i in range(PROMPT) if i not in set(free.kept_indices.tolist()))
    selection = sp.select(ids, protect=[(dropped, dropped + 1)])
    assert dropped in selection.kept_indices.tolist()
    assert selection.kept_tokens <= 48
    assert not selection.overflow
    everywhere = sp.select(ids, protect=[(0, PROMPT - 40)])
    assert everywhere.overflow
    assert set(range(PROMPT - 40)) <= set(everywhere.kept_indices.tolist())


def test_sink_and_tail_survive():
    sp, ids = pipeline(keep_tokens=64, sink=3, tail=20), prompt()
    kept = set(sp.select(ids).kept_indices.tolist())
    assert {0, 1, 2} <= kept
    assert set(range(PROMPT - 20, PROMPT)) <= kept
    assert 0 not in pipeline(keep_tokens=16).select(ids).kept_indices.tolist()


def test_protect_for_a_list_is_one_list_per_prompt():
    sp, ids = pipeline(), prompt()[0].tolist()
    first, second = sp.select([ids, ids], protect=[[(3, 5)], None])
    assert {3, 4} <= set(first.kept_indices.tolist())
    assert second.spans == sp.select(ids).spans
    with pytest.raises(ValueError, match=r"^protect: "):
        sp.select([ids, ids], protect=[(3, 5), (7, 9)])


@pytest.mark.parametrize("span", [(5, 5), (-1, 3), (0, PROMPT + 1), (1, 2, 3)])
def test_a_wrong_span_is_named(span):
    with pytest.raises(ValueError, match=r"^protect\[1\]: "):
        pipeline().select(prompt(), protect=[(0, 1), span])


def test_learned_positions_work_too():
    """GPT-2 has no RoPE; its positions are embeddings, and gaps are as good there."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 2, "eos_token_id": None, "bos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=512, initializer_range=0.3)).eval()
    model.generation_config.pad_token_id = 0
    sp, ids = SpecPrefill(model, model, config()), prompt()
    result = sp.generate(ids, 4)
    assert result.mode == "sparse"
    kept = result.selection.kept_indices
    assert int(logits_by_hand(model, ids[:, kept], kept)[-1].argmax()) == result.tokens[0]


def test_every_result_says_what_ran():
    result = pipeline().generate(prompt(), 4)
    assert set(result.seconds) == STAGES
    assert result.ttft == pytest.approx(sum(v for k, v in result.seconds.items() if k != "decode"))
    assert min(result.seconds.values()) >= 0
    assert result.backend in ("reference", "cpu")
    assert result.prompt_tokens == PROMPT
    assert result.kept_tokens == sum(end - start for start, end in result.spans)
    assert result.reason == f"kept {result.kept_tokens} of {PROMPT} tokens"
    selection = result.selection
    assert selection.importance.shape == (PROMPT,)
    assert selection.num_look_ahead == 8
    assert selection.scored_layers == (0, 1, 2, 3)
    assert torch.equal(selection.input_ids, prompt()[0])


def test_a_named_backend_is_the_one_that_runs():
    assert pipeline(backend="reference").generate(prompt(), 2).backend == "reference"


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_self_layers_need_no_second_model(family):
    sp = pipeline(family, self_layers=(1, 2))
    calls = []
    for index, layer in enumerate(sp.base.model.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    selection = sp.select(prompt())
    assert calls == [0, 1, 2]
    assert selection.scored_layers == (1, 2)
    assert "look_ahead" not in selection.seconds
    del calls[:]
    result = sp.generate(prompt(), 2)
    assert result.mode == "sparse"
    assert calls == [0, 1, 2, 3] * 2  # one forward of the prompt, one of the first token: no second pass
    assert set(result.seconds) == {"tokenize", "speculator_prefill", "score", "select", "base_prefill", "decode"}
    assert pipeline(family, self_layers=3).select(prompt()).scored_layers == (0, 1, 2)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_continuing_layers_answer_as_called_by_hand(family):
    """The selection of `select`, and then every layer by hand: the lower two over all tokens, the upper two over it."""
    sp, ids = pipeline(family, self_layers=(0, 1)), prompt()
    result = sp.generate(ids, 4)
    assert torch.equal(result.selection.kept_indices, sp.select(ids).kept_indices)
    assert result.kept_tokens < PROMPT
    kept, answer = result.selection.kept_indices, []
    for step in range(4):
        answer.append(int(by_hand(sp.base, ids, 1, kept).argmax()))
        ids = torch.cat([ids, torch.tensor([answer[-1:]])], dim=1)
        kept = torch.cat([kept, torch.tensor([PROMPT + step])])
    assert list(result.tokens) == answer


def test_continuing_layers_run_dense_where_nothing_can_be_scored():
    sp, ids = pipeline("mistral", self_layers=(0, 1), window="skip"), prompt()
    result = sp.generate(ids, 6)
    assert (result.mode, result.kept_tokens) == ("dense", PROMPT)
    assert "sliding window" in result.reason
    assert list(result.tokens) == ordinary(sp.base, ids, 6, do_sample=False)
    assert sp.generate(prompt(20), 2).mode == "sparse"  # now its window is long enough


def test_costs_decide_between_dense_and_sparse():
    """One model on both sides never pays; a base a hundred times as slow always does. Both times are in the result."""
    base, ids = build("llama", seed=7), prompt()
    speculator, settings = build("llama", seed=3), config()
    identity = identity_of(base, speculator, settings)
    for slower, mode in ((1.0, "dense"), (100.0, "sparse")):
        costs = CostModel(PrefillCost(per_token=slower * 1e-3), PrefillCost(per_token=1e-3), identity=identity)
        result = SpecPrefill(base, speculator, settings, costs=costs).generate(ids, 2)
        assert result.mode == mode
        prediction = result.selection.prediction
        assert prediction.full == pytest.approx(slower * PROMPT * 1e-3)
        assert prediction.pays == (mode == "sparse")
        assert ("would not pay" in result.reason) == (mode == "dense")
    with pytest.raises(ValueError, match=r"^costs: expected costs measured with"):
        SpecPrefill(base, base, settings.replace(look_ahead=2), costs=costs)


def test_costs_decide_for_continuing_layers_too():
    base, ids, settings = build("llama", seed=7), prompt(), config()
    identity = identity_of(base, None, settings.replace(queries="observation_window"), (0, 1))
    each = PrefillCost(per_token=1e-3)
    for lower, mode in ((each.scaled(0.5), "sparse"), (each.scaled(2.0), "dense")):
        costs = CostModel(each, lower=lower, upper=each.scaled(0.5), identity=identity)
        result = SpecPrefill(base, None, settings, self_layers=(0, 1), costs=costs).generate(ids, 2)
        assert result.mode == mode
        assert result.selection.prediction is not None


@pytest.mark.parametrize("self_layers", [(2, 1), (0, 3), (-1, 2), 0, 4, (1,), "12", True])
def test_wrong_self_layers_are_refused(self_layers):
    with pytest.raises(ValueError, match=r"^self_layers: "):
        pipeline(self_layers=self_layers)


def test_a_missing_speculator_is_an_error():
    base = build("llama")
    with pytest.raises(ValueError, match="got neither"):
        SpecPrefill(base)
    with pytest.raises(ValueError, match="got both"):
        SpecPrefill(base, base, self_layers=2)
    with pytest.raises(TypeError, match=r"^config: "):
        SpecPrefill(base, base, {"keep_ratio": 0.2})


def test_a_speculator_with_too_small_a_vocabulary_is_named():
    sp = SpecPrefill(build("llama"), build("llama", vocab_size=100), config())
    with pytest.raises(ValueError, match=r"^speculator: expected a vocabulary"):
        sp.select(prompt())


@pytest.mark.parametrize("max_new_tokens", [0, -1, 1.5, True])
def test_max_new_tokens_is_checked(max_new_tokens):
    with pytest.raises(ValueError, match=r"^max_new_tokens: "):
        pipeline().generate(prompt(), max_new_tokens)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ([], "prompt: expected at least one token"),
        (torch.zeros(2, 5, dtype=torch.int64), "prompt: expected ids"),
        (torch.zeros(5), "prompt: expected integer ids"),
        ("text", "tokenizer: expected one"),
        ([{"role": "user", "content": "x"}], "tokenizer: expected one"),
    ],
    ids=["empty", "rows", "floats", "text", "messages"],
)
def test_wrong_prompts_are_named(wrong, error):
    with pytest.raises(ValueError, match=error):
        pipeline().select(wrong)


def test_forms_of_one_prompt_agree():
    tokenizer = byte_tokenizer()
    sp = pipeline(tokenizer=tokenizer)
    text = "the quick brown fox jumps over the lazy dog, " * 3
    ids = tokenizer(text)["input_ids"]
    spans = {sp.select(form).spans for form in (text, ids, torch.tensor(ids), torch.tensor([ids]))}
    assert len(spans) == 1
    messages = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    chat = sp.select(messages)
    assert tokenizer.decode(chat.input_ids) == rendered
    assert chat.prompt_tokens < len(rendered)  # role markers are single tokens
    assert [s.prompt_tokens for s in sp.select([text, messages])] == [len(ids), chat.prompt_tokens]


def test_encoder_decoders_are_refused():
    sizes = {"vocab_size": 50, "d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
    model = BartForCausalLM(BartConfig(**sizes))
    model.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match=r"^base: expected a decoder-only model"):
        SpecPrefill(model, model)


def test_windows_bind_in_these_models():
    """The sliding families of these tests really have windows shorter than their prompts."""
    for family in SLIDING:
        assert build(family).config.sliding_window < PROMPT // 2


def test_protected_passages_survive():
    tokenizer = byte_tokenizer()
    sp = pipeline(tokenizer=tokenizer, keep_tokens=64)
    text = "alpha beta gamma. " * 4 + "KEEP ME. " + "delta epsilon. " * 4 + "KEEP ME. " + "zeta eta theta. " * 3
    kept = sp.select(text, protect=["KEEP ME."]).kept_indices.tolist()
    for start in (text.find("KEEP"), text.rfind("KEEP")):
        assert set(range(start, start + 8)) <= set(kept)  # one byte, one token
    assert not set(range(text.find("KEEP"), text.find("KEEP") + 8)) <= set(sp.select(text).kept_indices.tolist())
    with pytest.raises(ValueError, match=r"^protect\[0\]: expected a passage"):
        sp.select(text, protect=["not there"])
    ids = tokenizer(text)["input_ids"]
    assert sp.select(ids, protect=["KEEP ME."]).kept_indices.tolist() == kept
    with pytest.raises(ValueError, match=r"^protect\[0\]: expected \(start, end\) token spans"):
        pipeline(keep_tokens=64).select(ids, protect=["KEEP ME."])


def test_template_options_reach_the_chat_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ greeting }} {{ messages[0]['content'] }}"
    sp = pipeline(tokenizer=tokenizer)
    messages, options = [{"role": "user", "content": "hello " * 20}], {"greeting": "well,"}
    assert tokenizer.decode(sp.select(messages, template_options=options).input_ids).startswith("well, hello")
    result = sp.generate(messages, 2, template_options=options)
    assert tokenizer.decode(result.selection.input_ids).startswith("well, hello")

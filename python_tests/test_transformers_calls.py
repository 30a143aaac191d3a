"""An enabled `model.generate` in batches, streams, pipelines and threads; switched on, and off again."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import threading
from pathlib import Path

import pytest
import torch
from generating import NEW, Favour, base_model, left_padded, now, ordinary, sequences_of
from loop_models import PROMPT, VOCAB, build, byte_tokenizer, config, prompt, stand_ins
from pages import blocks
from transformers import GenerationConfig, TextIteratorStreamer, TextStreamer, pipeline

from specprefill_kernels.integrations.transformers import disable, enable, last_result
from specprefill_kernels.loop import SpecPrefill


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


def test_a_batch_gives_what_its_prompts_give_alone(enabled):
    batch, rows = left_padded(150, 120, 133)
    alone = [enabled.generate(row, max_new_tokens=9)[0, row.shape[1] :].tolist() for row in rows]
    stop = alone[1][2]  # so that answers end apart
    alone = [enabled.generate(row, max_new_tokens=9, eos_token_id=stop)[0, row.shape[1] :].tolist() for row in rows]
    assert len({len(answer) for answer in alone}) > 1
    sequences = enabled.generate(**batch, max_new_tokens=9, eos_token_id=stop)
    assert torch.equal(sequences[:, :150], batch["input_ids"])
    pad = enabled.generation_config.pad_token_id
    longest = max(map(len, alone))
    assert sequences[:, 150:].tolist() == [answer + [pad] * (longest - len(answer)) for answer in alone]
    result = last_result(enabled)
    assert [row.prompt_tokens for row in result.rows] == [150, 120, 133]
    assert [row.tokens for row in result.rows] == [tuple(answer) for answer in alone]
    assert result.mode == "sparse"
    assert "prompt 2: kept" in result.reason


def test_lengths_and_processors_count_the_padding_as_generate_does(enabled):
    """In a batch, max_length is that of the padded prompts, and a repetition penalty counts the padding."""
    batch, rows = left_padded(150, 120, pad=7)
    sequences = enabled.generate(**batch, max_length=155)
    assert sequences.shape[1] == 155
    assert [len(row.tokens) for row in last_result(enabled).rows] == [5, 5]
    free = [enabled.generate(row, max_new_tokens=5)[0, row.shape[1] :].tolist() for row in rows]
    assert sequences[:, 150:].tolist() == free


def test_a_batch_that_keeps_everything_is_the_ordinary_one(base, speculator):
    enable(base, speculator, config(min_prompt_tokens=200))
    batch, _ = left_padded(150, 120)
    assert torch.equal(base.generate(**batch, max_new_tokens=9), ordinary(base, **batch, max_new_tokens=9))
    assert last_result(base).mode == "dense"
    assert "prompt 1: prompt too short: 120 tokens" in last_result(base).reason


def test_a_batch_may_mix_both(base, speculator):
    enable(base, speculator, config(min_prompt_tokens=140))
    batch, rows = left_padded(150, 120)
    answers = base.generate(**batch, max_new_tokens=5)[:, 150:].tolist()
    assert answers == [base.generate(row, max_new_tokens=5)[0, row.shape[1] :].tolist() for row in rows]
    base.generate(**batch, max_new_tokens=5)
    assert [row.mode for row in last_result(base).rows] == ["sparse", "dense"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"logits_processor": [Favour(9)]}, "logits_processor of the call's own for a batch"),
        (
            {"prefix_allowed_tokens_fn": lambda row, _: [5 + row]},
            "prefix_allowed_tokens_fn of the call's own for a batch",
        ),
        ({"return_dict_in_generate": True, "output_scores": True}, "output_scores for a batch"),
        ({"max_time": 100.0}, "max_time for a batch"),
    ],
)
def test_what_counts_rows_runs_dense(enabled, options, reason):
    options = {**left_padded(150, 120)[0], "max_new_tokens": 4, **options}
    expected = sequences_of(ordinary(enabled, **options))
    assert torch.equal(sequences_of(now(enabled, **options)), expected)
    assert last_result(enabled).reason.startswith(reason)


def test_a_batch_without_a_padding_token_runs_dense(base, speculator):
    base.generation_config.pad_token_id = base.generation_config.eos_token_id = None
    enable(base, speculator, config())
    ids = torch.cat([prompt(), prompt(seed=2)])
    assert torch.equal(base.generate(ids, max_new_tokens=4), ordinary(base, ids, max_new_tokens=4))
    assert last_result(base).reason.startswith("a batch without pad_token_id")


class Listener:
    def __init__(self):
        self.heard = []

    def put(self, value):
        self.heard.append(value.clone())

    def end(self):
        self.heard.append(None)


def test_a_streamer_hears_what_generate_would_tell_it(enabled):
    sparse, dense = Listener(), Listener()
    sequences = enabled.generate(prompt(), max_new_tokens=NEW, streamer=sparse)
    assert last_result(enabled).mode == "sparse"
    ordinary(enabled, prompt(), max_new_tokens=NEW, streamer=dense)
    assert [None if value is None else (value.shape, value.dtype) for value in sparse.heard] == [
        None if value is None else (value.shape, value.dtype) for value in dense.heard
    ]
    assert torch.equal(torch.cat([value.reshape(-1) for value in sparse.heard[:-1]]), sequences[0])
    again = Listener()  # dense calls tell it once
    enabled.generate(prompt(), max_new_tokens=NEW, streamer=again, use_cache=False)
    assert len(again.heard) == len(dense.heard)


def test_the_first_token_is_streamed_before_anything_is_decoded(enabled):
    forwards, at_first = [], []
    enabled.register_forward_pre_hook(lambda *_: forwards.append(1))

    class Watch(Listener):
        def put(self, value):
            at_first.append(len(forwards))

    enabled.generate(prompt(), max_new_tokens=NEW, streamer=Watch())
    assert at_first[1:] == list(range(1, NEW + 1))


TEXT = "The report was signed by the treasurer. " * 8


@pytest.fixture
def spoken(base, speculator):
    tokenizer = byte_tokenizer()
    enable(base, speculator, config(), tokenizer=tokenizer)
    return base, tokenizer


def test_text_streams(spoken, capsys):
    model, tokenizer = spoken
    inputs = tokenizer(TEXT, return_tensors="pt")
    sequences = model.generate(**inputs, max_new_tokens=NEW, streamer=TextStreamer(tokenizer, skip_prompt=True))
    text = tokenizer.decode(sequences[0, inputs["input_ids"].shape[1] :])
    assert capsys.readouterr().out == text + "\n"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(
        target=model.generate, kwargs={**inputs, "max_new_tokens": NEW, "streamer": streamer}, daemon=True
    )
    thread.start()
    assert "".join(streamer) == text
    thread.join()
    assert last_result(model).rows[0].text == tokenizer.decode(
        sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )


def test_stop_strings(spoken):
    model, tokenizer = spoken
    inputs = tokenizer(TEXT, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    only = [token for token in range(VOCAB) if not 97 - 33 + 4 <= token < 122 - 33 + 4]  # letters, as byte tokens
    free = model.generate(**inputs, max_new_tokens=9, suppress_tokens=only)
    stop = tokenizer.decode(free[0, length + 2 : length + 4])
    assert len(stop) == 2
    given = GenerationConfig(max_new_tokens=9, suppress_tokens=only, stop_strings=[stop])
    for options in ({"max_new_tokens": 9, "suppress_tokens": only, "stop_strings": stop}, {"generation_config": given}):
        stopped = model.generate(**inputs, **options, tokenizer=tokenizer)
        assert length < stopped.shape[1] <= length + 4
        assert torch.equal(stopped[0], free[0, : stopped.shape[1]])
        assert last_result(model).mode == "sparse"
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate(**inputs, stop_strings=stop)


def test_pipelines_run_on_it(spoken):
    model, tokenizer = spoken
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (found,) = pipe(TEXT, max_new_tokens=NEW, do_sample=False, return_full_text=False)
    assert last_result(model).mode == "sparse"
    assert found["generated_text"] == last_result(model).rows[0].text
    kept = last_result(model).selections[0]
    pipe(TEXT, max_new_tokens=NEW, do_sample=False, protect=[(0, 60)])
    protected = last_result(model).selections[0]
    assert protected.kept_indices.tolist()[:60] == list(range(60)) != kept.kept_indices.tolist()[:60]
    tokenizer.pad_token = "<eos>"
    tokenizer.padding_side = "left"
    pair = pipe([TEXT, TEXT + "Who signed it?"], max_new_tokens=NEW, do_sample=False, batch_size=2)
    assert len(pair) == len(last_result(model).rows) == 2


CHAT = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": TEXT + "Who signed it?"},
]


def chat_ids(tokenizer, messages=CHAT):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def test_a_chat_survives_as_it_does_in_the_loop(spoken, speculator):
    model, tokenizer = spoken
    expected = SpecPrefill(model, speculator, config(), tokenizer=tokenizer).select(CHAT)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (found,) = pipe(CHAT, max_new_tokens=NEW, do_sample=False)
    assert found["generated_text"][-1] == {"role": "assistant", "content": last_result(model).rows[0].text}
    assert last_result(model).selections[0].protected_parts == expected.protected_parts
    assert {"system", "markers", "turn end"} <= expected.protected_parts.keys()
    assert last_result(model).selections[0].spans == expected.spans
    for options in ({"messages": CHAT}, {"messages": CHAT, "template_options": {"add_generation_prompt": True}}):
        model.generate(**chat_ids(tokenizer), max_new_tokens=2, **options)
        assert last_result(model).selections[0].spans == expected.spans


def test_messages_have_to_be_those_of_the_ids(spoken):
    model, tokenizer = spoken
    with pytest.raises(ValueError, match=r"^messages: expected the chat that input_ids were made of \(\d+ tokens\)"):
        model.generate(**chat_ids(tokenizer), max_new_tokens=2, messages=CHAT[1:])
    with pytest.raises(ValueError, match=r"^messages: expected the chat that template_options belong to, got None"):
        model.generate(**chat_ids(tokenizer), max_new_tokens=2, template_options={"tools": []})


def test_a_batch_of_chats(spoken):
    model, tokenizer = spoken
    tokenizer.pad_token, tokenizer.padding_side = "<eos>", "left"
    chats = [CHAT, CHAT[1:]]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    parts = []
    for options in ({}, {"messages": chats}, {"messages": [None, CHAT[1:]]}):
        model.generate(**inputs, max_new_tokens=2, **options)
        parts.append([selection.protected_parts for selection in last_result(model).selections])
    assert parts[0] == parts[1] == parts[2]
    assert ["system" in part for part in parts[0]] == [True, False]


def test_passages_survive(spoken):
    model, tokenizer = spoken
    inputs = tokenizer(TEXT + "Who signed it?", return_tensors="pt")
    model.generate(**inputs, max_new_tokens=2, protect=["Who signed it?"])
    assert last_result(model).selections[0].protected == ((len(TEXT), len(TEXT) + 14),)


def test_protected_spans_survive_and_do_not_reach_generate(enabled):
    enabled.generate(prompt(), max_new_tokens=2, protect=[(40, 47)])
    (selection,) = last_result(enabled).selections
    assert set(range(40, 47)) <= set(selection.kept_indices.tolist())
    assert selection.protected == ((40, 47),)
    with pytest.raises(ValueError, match=r"protect\[0\]: expected 0 <= start < end <= 150"):
        enabled.generate(prompt(), max_new_tokens=2, protect=[(140, 151)])
    assert enabled.generate(prompt(), num_beams=2, max_new_tokens=2, protect=[(0, 2)]).shape[1] == PROMPT + 2


def test_spans_of_a_batch_are_each_rows_own(enabled):
    batch, _ = left_padded(150, 120)
    enabled.generate(**batch, max_new_tokens=2, protect=[None, [(40, 47)]])
    assert [selection.protected for selection in last_result(enabled).selections] == [(), ((40, 47),)]
    with pytest.raises(ValueError, match=r"^protect: expected a list with one entry \(or None\) for each of 2 prompts"):
        enabled.generate(**batch, max_new_tokens=2, protect=[(40, 47)])


def test_disable_restores_it_exactly(base, speculator):
    before, attributes = base.generate, dict(vars(base))
    enable(base, speculator, config())
    assert base.generate != before
    base.generate(prompt(), max_new_tokens=2)
    disable(base)
    assert base.generate == before
    assert vars(base) == attributes
    with pytest.raises(ValueError, match="protect"):
        base.generate(prompt(), protect=[(0, 1)])


def test_a_generate_of_the_models_own_comes_back(base, speculator):
    calls = []

    def own(*args, **kwargs):
        calls.append(1)
        return type(base).generate(base, *args, **kwargs)

    base.generate = own
    enable(base, speculator, config())
    assert base.generate(prompt(), max_new_tokens=2).shape[1] == PROMPT + 2
    assert last_result(base).mode == "sparse"
    disable(base)
    assert base.generate is own


def test_enable_and_disable_are_checked(base, speculator):
    with pytest.raises(TypeError, match=r"^model: expected a Transformers model that generates, got Linear"):
        enable(torch.nn.Linear(2, 2), speculator)
    with pytest.raises(ValueError, match=r"^speculator: expected a model or self_layers"):
        enable(base)
    assert "generate" not in vars(base)
    enable(base, speculator)
    with pytest.raises(ValueError, match=r"^model: expected one that is not enabled yet"):
        enable(base, speculator)
    ours, base.generate = base.generate, print
    for function in (disable, last_result):
        with pytest.raises(ValueError, match=r"^model: expected one that is enabled"):
            function(base)
    base.generate = ours
    disable(base)
    with pytest.raises(ValueError, match=r"^model: expected one that is enabled"):
        disable(base)


def test_it_looks_like_generate(enabled):
    assert inspect.signature(enabled.generate) == inspect.signature(type(enabled).generate.__get__(enabled))
    assert enabled.generate.__doc__ == type(enabled).generate.__doc__


def test_copies_have_the_ordinary_generate(enabled):
    for twin in (copy.deepcopy(enabled), pickle.loads(pickle.dumps(enabled))):
        assert twin.generate == type(twin).generate.__get__(twin)
        assert twin is not enabled
        assert torch.equal(twin.generate(prompt(), max_new_tokens=2), ordinary(enabled, prompt(), max_new_tokens=2))
    assert enabled.generate(prompt(), max_new_tokens=2, protect=[(0, 9)]).shape[1] == PROMPT + 2


def test_a_loop_on_an_enabled_model_is_what_it_was(enabled, speculator):
    enabled.generate(prompt(), max_new_tokens=2)
    last = last_result(enabled)
    sp = SpecPrefill(enabled, speculator, config(keep_ratio=1.0))
    expected = ordinary(enabled, prompt(), max_new_tokens=NEW)
    assert list(sp.generate(prompt(), NEW).tokens) == expected[0, PROMPT:].tolist()
    assert last_result(enabled) is last  # asking what generate would do is no call


def test_a_model_that_cannot_runs_as_before(speculator, caplog):
    base = build("llama", seed=7)
    base.config.alibi = True
    enable(base, speculator, config())
    assert torch.equal(base.generate(prompt(), max_new_tokens=4), ordinary(base, prompt(), max_new_tokens=4))
    assert last_result(base).mode == "dense"
    assert "ALiBi" in last_result(base).reason


def test_threads_do_not_disturb_each_other(base, speculator):
    """Sparse calls on two bases with one speculator, dense ones meanwhile: each as alone, and the configs as before."""
    other = build("llama", seed=8)
    for model in (base, other):
        enable(model, speculator, config())
    jobs = [
        (model, prompt(seed=seed), {"max_new_tokens": 8, **options})
        for seed in (1, 2)
        for model in (base, other)
        for options in ({}, {"num_beams": 2})
    ]
    alone = [model.generate(ids, **options) for model, ids, options in jobs]
    found: dict[int, list] = {index: [] for index in range(len(jobs))}

    def work(index):
        model, ids, options = jobs[index]
        for _ in range(4):
            found[index].append(model.generate(ids, **options))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, expected in enumerate(alone):
        assert len(found[index]) == 4
        assert all(torch.equal(one, expected) for one in found[index])
    assert {model.config._attn_implementation for model in (base, other, speculator)} == {"sdpa"}


def test_the_block_of_the_page_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    stand_ins(monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("report.txt").write_text("The report was signed by the treasurer. " * 20)
    (block,) = blocks("docs/integrations.md", "Transformers", "python")
    assert len([line for line in block.splitlines() if line]) <= 13
    values: dict = {}
    exec(block, values)
    *_, told = capsys.readouterr().out.splitlines()
    assert re.match(r"sparse kept \d+ of \d+ tokens, \d+ protected \(markers \d+, turn end \d+\)$", told)
    assert "generate" not in vars(values["model"])

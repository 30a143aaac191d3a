"""Every method on tiny models: the right tokens, the loop's own answers, evidence by hand, and resuming."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from loop_models import build, byte_tokenizer, config
from quality_samples import NEEDLE, sample

from specprefill_kernels.loop import SpecPrefill
from specprefill_kernels.loop.prompts import read_prompt
from specprefill_kernels.quality.longbench import LongBenchSample
from specprefill_kernels.quality.methods import METHODS
from specprefill_kernels.quality.records import RecordFile, read_records
from specprefill_kernels.quality.runner import Planned, Runner, describe, evaluate, evidence_tokens, with_ratio

RATIOS = (0.25, 0.5)


@pytest.fixture(scope="module")
def models():
    return build("llama", seed=7), build("llama", seed=3)


def make_loop(models, **changes) -> SpecPrefill:
    return SpecPrefill(*models, config(**{"protect": "template", **changes}), tokenizer=byte_tokenizer())


@pytest.fixture(scope="module")
def loop(models) -> SpecPrefill:
    return make_loop(models)


def records_of(loop: SpecPrefill, one=None, ratios=RATIOS):
    runner, one = Runner(loop, ratios), one or sample()
    return {(r.method, r.keep_ratio): r for r in runner.run(one, runner.keys(one.task, one.seed))}


def read_tokens(monkeypatch, loop: SpecPrefill, one):
    """What each method let the base read, in the order of `Runner.keys`."""
    from specprefill_kernels.quality import runner

    seen = []
    answer = runner._Reading.answer

    def watched(self, indices, *arguments, **options):
        seen.append(indices)
        return answer(self, indices, *arguments, **options)

    monkeypatch.setattr(runner._Reading, "answer", watched)
    records = records_of(loop, one)
    return dict(zip(records, seen, strict=True))


def test_all_methods_read_equally_many_tokens_and_full_all(loop) -> None:
    records = records_of(loop)
    assert list(records) == [("full", 1.0), *((m, r) for r in RATIOS for m in METHODS if m != "full")]
    assert records["full", 1.0].kept_tokens == records["full", 1.0].prompt_tokens
    for ratio in RATIOS:
        counts = {records[m, ratio].kept_tokens for m in METHODS if m != "full"}
        assert len(counts) == 1
        assert 0 < counts.pop() <= -(-ratio * records["full", 1.0].prompt_tokens // 16) * 16
    assert records["kept", 0.25].kept_tokens < records["kept", 0.5].kept_tokens


def test_kept_is_the_loops_own_selection_and_answer(models, loop, monkeypatch) -> None:
    """One speculation for all ratios must give what the loop gives for each of them alone."""
    one = sample()
    read, records = read_tokens(monkeypatch, loop, one), records_of(loop, one)
    for ratio in RATIOS:
        alone = make_loop(models, keep_ratio=ratio).generate(one.messages, max_new_tokens=one.max_new_tokens)
        assert alone.mode == "sparse"
        assert torch.equal(read["kept", ratio], alone.selection.kept_indices)
        assert records["kept", ratio].answer == alone.text
        assert records["kept", ratio].reason == alone.reason
    dense = make_loop(models, keep_ratio=1.0).generate(one.messages, max_new_tokens=one.max_new_tokens)
    assert records["full", 1.0].answer == dense.text


def test_one_speculation_serves_all_ratios(loop, monkeypatch) -> None:
    calls = []
    speculate = type(loop.selector).speculate
    monkeypatch.setattr(
        type(loop.selector), "speculate", lambda self, *a, **k: calls.append(1) or speculate(self, *a, **k)
    )
    records = records_of(loop)
    assert len(calls) == 1
    stages = [records["kept", ratio].seconds for ratio in RATIOS]
    assert stages[0]["speculator_prefill"] == stages[1]["speculator_prefill"] > 0
    for (method, _), record in records.items():
        assert ("speculator_prefill" in record.seconds) == (method == "kept")
        assert record.ttft == pytest.approx(sum(v for k, v in record.seconds.items() if k != "decode"))
        assert record.seconds["base_prefill"] > 0


def test_with_the_bases_own_layers_the_upper_ones_go_on_as_in_the_loop(models) -> None:
    def own(**changes) -> SpecPrefill:
        changes = {"protect": "template", **changes}
        return SpecPrefill(models[0], None, config(**changes), tokenizer=byte_tokenizer(), self_layers=(0, 1))

    one = sample(max_new_tokens=12)
    records = records_of(own(), one)
    plain = []
    for ratio in RATIOS:
        alone = own(keep_ratio=ratio).generate(one.messages, max_new_tokens=12)
        assert records["kept", ratio].answer == alone.text
        assert records["kept", ratio].kept_tokens == alone.kept_tokens
        plain.append(alone.text)
    assert "speculator_prefill" not in records["kept", 0.25].seconds
    assert plain[0] != records["full", 1.0].answer


def test_baselines_have_what_the_selection_is_forced_to_keep(loop, monkeypatch) -> None:
    one = sample()
    read = read_tokens(monkeypatch, loop, one)
    selection = with_selection(loop, one, 0.25)
    protected = [position for start, end in selection.protected for position in range(start, end)]
    assert len(protected) > 20
    for method in METHODS:
        if method != "full":
            assert set(protected) <= set(read[method, 0.25].tolist()), method
    assert read["last", 0.25].tolist() != read["first_last", 0.25].tolist() != read["random", 0.25].tolist()


def test_baselines_have_sink_and_tail_too(models, monkeypatch) -> None:
    loop = make_loop(models, protect="none", sink=30, tail=40)
    one = sample()
    read = read_tokens(monkeypatch, loop, one)
    length = len(read["full", 1.0])
    forced = {*range(32), *range((length - 40) // 16 * 16, length)}  # in whole chunks
    for method in METHODS[1:]:
        assert forced <= set(read[method, 0.5].tolist()), method


def test_random_chunks_are_drawn_for_each_prompt_and_ratio_anew(loop, monkeypatch) -> None:
    first, second = (read_tokens(monkeypatch, loop, sample(seed))["random", 0.25].tolist() for seed in (0, 1))
    assert len(first) == len(second)
    assert first != second
    again = read_tokens(monkeypatch, loop, sample(0))
    assert again["random", 0.25].tolist() == first
    assert not set(first) <= set(again["random", 0.5].tolist())


def test_baselines_read_from_the_bases_first_layer_on_even_where_the_selection_goes_on_above(models) -> None:
    base = models[0]
    loop = SpecPrefill(base, None, config(protect="template"), tokenizer=byte_tokenizer(), self_layers=(0, 1))
    lengths = []
    hook = base.model.layers[0].register_forward_pre_hook(
        lambda _module, args, kwargs: lengths.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    records = records_of(loop, sample(max_new_tokens=1), ratios=(0.25,))
    hook.remove()
    whole = records["full", 1.0].prompt_tokens
    # Full, the speculation of all ratios, kept (whose lower layers read everything), and the baselines.
    assert lengths == [whole] * 3 + [records["kept", 0.25].kept_tokens] * 3


def with_selection(loop: SpecPrefill, one, ratio: float):
    from specprefill_kernels.loop.clock import StageClock

    clock = StageClock(loop.base.device)
    prompt, protection = loop.read(one.messages, None, None, clock)
    speculation = loop.selector.speculate(prompt, clock)
    return loop.selector.choose(prompt, protection, speculation, clock, config=with_ratio(loop.config, ratio))


def test_evidence_tokens_are_those_that_touch_its_characters() -> None:
    """One byte is one token here, so positions are characters of the rendered text, markers counting one each."""
    tokenizer, one = byte_tokenizer(), sample()
    prompt = read_prompt(one.messages, tokenizer)
    touched = evidence_tokens(prompt, one, tokenizer)
    assert tokenizer.decode(prompt.input_ids[0][touched]) == NEEDLE
    assert int(touched.sum()) == len(NEEDLE)


def test_a_token_that_reaches_into_the_evidence_counts() -> None:
    tokenizer = byte_tokenizer((("\u0120", "T"), ("1", "1")))  # " T" and "11" are one token each
    one = sample()
    start, end = one.evidence[0]
    cut = sample(evidence=((start, end - 2),))  # up to 471: the last 1 is no evidence, but its token is
    prompt = read_prompt(cut.messages, tokenizer)
    text = tokenizer.decode(prompt.input_ids[0][evidence_tokens(prompt, cut, tokenizer)])
    assert text == " " + NEEDLE.removesuffix(".")


def test_evidence_read_is_the_part_of_its_tokens(loop) -> None:
    records = records_of(loop)
    assert records["full", 1.0].evidence == 1.0
    assert records_of(loop, sample(evidence=()))["kept", 0.25].evidence is None
    # The last tokens of a prompt whose needle is in its first line, and in its last.
    assert records_of(loop, sample(place=0))["last", 0.25].evidence == 0.0
    assert records_of(loop, sample(place=12))["last", 0.5].evidence == 1.0


def test_a_template_that_changes_the_message_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(ValueError, match="door: expected the chat template to keep"):
        evidence_tokens(read_prompt(sample().messages, tokenizer), sample(), tokenizer)


def test_a_template_that_strips_the_message_moves_the_evidence() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] | trim }}{% endfor %}"
    one = sample()
    moved = sample(prompt="  \n" + one.prompt, evidence=tuple((a + 3, b + 3) for a, b in one.evidence))
    prompt = read_prompt(moved.messages, tokenizer)
    assert tokenizer.decode(prompt.input_ids[0][evidence_tokens(prompt, moved, tokenizer)]) == NEEDLE


def test_a_prompt_that_runs_dense_says_why_and_all_methods_read_it_all(models) -> None:
    records = records_of(make_loop(models, min_prompt_tokens=5000))
    assert {record.kept_tokens for record in records.values()} == {records["full", 1.0].prompt_tokens}
    assert records["kept", 0.25].mode == "dense"
    assert "prompt too short" in records["kept", 0.25].reason
    assert len({record.answer for record in records.values()}) == 1


def test_longbench_prompts_without_a_template_are_read_as_they_are(loop) -> None:
    one = sample()
    plain = LongBenchSample(**{f.name: getattr(one, f.name) for f in dataclasses.fields(one)}, chat=False, note="cut")
    records = records_of(loop, plain)
    assert records["full", 1.0].prompt_tokens == len(one.prompt)
    assert records["kept", 0.25].note == "cut"
    assert records_of(loop)["full", 1.0].prompt_tokens > len(one.prompt)


# --------------------------------------------------------------------------------------------------------- resuming


def plan(count: int = 3) -> list[Planned]:
    return [Planned("door", seed, lambda seed=seed: sample(seed)) for seed in range(count)]


def without_times(path) -> list[dict]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("seconds", "ttft")} for line in lines]


def test_an_interrupted_evaluation_ends_up_like_an_uninterrupted_one(loop, tmp_path) -> None:
    runner = Runner(loop, (0.5,))
    with RecordFile(tmp_path / "whole.jsonl", {"a": 1}) as file:
        assert evaluate(runner, plan(), file)

    class Stop(Exception):
        pass

    broken = tmp_path / "broken.jsonl"
    for stop_after in (1, 4, 6):
        left = [stop_after]

        def on_record(_, left=left) -> None:
            left[0] -= 1
            if not left[0]:
                raise Stop

        with RecordFile(broken, {"a": 1}) as file, pytest.raises(Stop):
            evaluate(runner, plan(), file, on_record=on_record)
        with broken.open("a") as cut:  # as if the power went while a line was written
            cut.write('{"task": "door", "se')
    with RecordFile(broken, {"a": 1}) as file:
        assert file.dropped_line
        assert len(file.records) == 11
        assert evaluate(runner, plan(), file)
    assert without_times(broken) == without_times(tmp_path / "whole.jsonl")
    _, records = read_records(broken)
    assert len({record.key for record in records}) == len(records) == 15
    before = broken.read_bytes()
    with RecordFile(broken, {"a": 1}) as file:
        assert evaluate(runner, plan(), file)
    assert broken.read_bytes() == before


def test_the_first_prompt_alone_is_read_once_more_to_warm_up(loop, tmp_path, monkeypatch) -> None:
    runs, run = [], Runner.run

    def watched(self, one, wanted):
        runs.append((one.seed, len(wanted)))
        return run(self, one, wanted)

    monkeypatch.setattr(Runner, "run", watched)
    with RecordFile(tmp_path / "r.jsonl", {}) as file:
        evaluate(Runner(loop, (0.5,)), plan(2), file)
    assert runs == [(0, 1), (0, 5), (1, 5)]


def test_no_prompt_is_begun_when_the_time_is_up(loop, tmp_path) -> None:
    with RecordFile(tmp_path / "r.jsonl", {}) as file:
        assert not evaluate(Runner(loop, (0.5,)), plan(), file, seconds=0)
        assert file.records == []


def test_a_runner_refuses_what_it_cannot_do(loop, models) -> None:
    with pytest.raises(ValueError, match=r"keep_ratios: expected fractions in \(0, 1\), got 1.0"):
        Runner(loop, (1.0,))
    with pytest.raises(ValueError, match="methods: expected some of"):
        Runner(loop, (0.5,), ("best",))
    with pytest.raises(ValueError, match="loop: expected one with a tokenizer"):
        Runner(SpecPrefill(*models, config()))


def test_the_setting_names_models_configuration_and_files(loop, tmp_path) -> None:
    (tmp_path / "a.txt").write_text("text")
    setting = describe(
        Runner(loop, RATIOS), base="b", speculator="s", tasks=["door"], seeds=(4, 7), tokens=50, answer_tokens=9,
        files=[tmp_path / "a.txt"], versions={"torch": "1"}, machine="m",
    )  # fmt: skip
    assert setting["config"]["chunk_size"] == 16
    assert "keep_ratio" not in setting["config"]
    assert setting["base"]["parameters"] == sum(p.numel() for p in loop.base.parameters())
    assert setting["files"] == {"a.txt": "982d9e3eb996f559"}
    assert json.loads(json.dumps(setting))["seeds"] == [4, 7]

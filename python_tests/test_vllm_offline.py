"""The vLLM plugin offline as users have it: a script with `vllm.LLM`, an engine process, the speculator."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

from vllm_engine import ENVIRONMENT, MODEL, Answer, loop_answer

from specprefill_kernels import SpecPrefillConfig, models
from specprefill_kernels.loop import SpecPrefill

pytestmark = [pytest.mark.model, pytest.mark.slow]

TOLERANCE = 1e-3
HERE = Path(__file__).parent


@functools.cache
def prompts() -> tuple[str, ...]:
    text = (HERE.parent / "LICENSE").read_text()
    return text[:2200], text[5000:7000]


@functools.cache
def printed(case):
    """What the script prints; it inherits no variable that makes vLLM another than it is for users."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    done = subprocess.run(
        [sys.executable, str(HERE / "vllm_script.py"), case],
        input=json.dumps(prompts()),
        env={**inherited, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def answer(row) -> Answer:
    return Answer(tuple(row["tokens"]), tuple(row["logprobs"]))


@pytest.fixture(scope="module")
def loop():
    model, tokenizer = models.load(MODEL, dtype=torch.float32, device="cpu")
    config = SpecPrefillConfig.preset("default").replace(keep_ratio=0.3)
    return SpecPrefill(model, model, config, tokenizer=tokenizer)


def test_the_engine_runs_in_a_process_of_its_own():
    assert printed("plugin")["client"] == printed("half")["client"] == "SyncMPClient"


@pytest.mark.parametrize("number", range(2))
def test_the_speculators_selection_and_the_answer_are_the_loops(loop, number):
    row, prompt = printed("plugin")["asked"][number], prompts()[number]
    result, report = loop.generate(prompt, max_new_tokens=24), row["report"]
    assert (report["mode"], report["prompt_tokens"]) == ("sparse", row["prompt"])
    assert tuple(map(tuple, report["spans"])) == result.spans
    assert report["kept_tokens"] == result.kept_tokens < 0.6 * result.prompt_tokens
    assert row["tokens"] == list(result.tokens)
    ids = loop.tokenizer(prompt)["input_ids"]
    assert answer(row).distance(loop_answer(ids, result.spans, 24)) < TOLERANCE


def test_pruned_and_ordinary_requests_in_one_batch():
    """With prefix caching, as it is by default: the pruned prompt comes from the cache, the ordinary one too."""
    seen = printed("plugin")
    pruned, ordinary, second = seen["mixed"]
    for row, alone in ((pruned, seen["asked"][0]), (ordinary, seen["ordinary"][0]), (second, seen["asked"][1])):
        assert answer(row).distance(answer(alone)) < TOLERANCE
    assert [row["report"] is None for row in seen["mixed"]] == [False, True, False]
    assert pruned["report"]["cached"]
    first, whole, _ = seen["cached"]  # what is kept of the second prompt fills no block
    assert first > 0
    assert whole > 0


def test_requests_that_do_not_ask_are_what_they_are_without_the_plugin():
    """To the last bit of every log probability."""
    with_plugin, without = printed("plugin")["ordinary"], printed("half")["ordinary"]
    assert [row["report"] for row in with_plugin + without] == [None] * 4
    assert with_plugin == without


def test_an_engine_that_does_not_know_the_plugin_reads_whole_prompts():
    seen = printed("half")
    for row, ordinary in zip(seen["asked"], seen["ordinary"]):
        assert row["report"]["mode"] == "dense"
        assert row["report"]["reason"].startswith("the engine does not know the plugin")
        assert row["report"]["kept_tokens"] == row["prompt"]
        assert answer(row).distance(answer(ordinary)) < TOLERANCE


def test_a_prompt_that_is_kept_whole_or_short_runs_dense_and_says_so():
    seen = printed("plugin")
    whole, short = seen["dense"]
    assert [row["report"]["mode"] for row in seen["dense"]] == ["dense", "dense"]
    assert answer(whole).distance(answer(seen["ordinary"][0])) < TOLERANCE
    assert "keep" in whole["report"]["reason"]
    assert "short" in short["report"]["reason"]

"""The plugin in a real vLLM server, through the real OpenAI client: one server for all, on loopback.

The model is its own speculator, so selections are good and answers right; a gain in time is for other pairs.
"""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")

from pages import blocks  # noqa: E402
from vllm_server import running  # noqa: E402

from specprefill_kernels import SpecPrefillConfig, models  # noqa: E402
from specprefill_kernels.loop import SpecPrefill  # noqa: E402

pytestmark = [pytest.mark.model, pytest.mark.slow]

NAME = "smollm2-135m"
NEEDLE = "The secret number of the harbour is 7319."
QUESTION = "What is the secret number of the harbour? Answer with the number."
KEEP = 0.3


def document(salt: str, words: int = 420) -> str:
    """Plain sentences with a fact in the middle. Another salt, another text from the first word on."""
    things = ["river", "market", "tower", "garden", "letter", "window", "bridge", "winter", "engine", "village"]
    lines = [
        f"In chapter {i} of the {salt} book the {things[(i * 7) % 10]} stands behind the {things[(i * 3 + 1) % 10]}."
        for i in range(words // 13)
    ]
    lines.insert(len(lines) // 2, NEEDLE)
    return "\n".join(lines)


def chat(salt: str, words: int = 420) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": f"You answer questions about the {salt} book."},
        {"role": "user", "content": f"{document(salt, words)}\n\n{QUESTION}"},
    ]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    (command,) = (block for block in blocks("docs/integrations.md", "vLLM", "sh") if "api_server" in block)
    # Everything that the page does not set. Requests that say nothing are pruned.
    environment = {"SPECPREFILL_VLLM_DEFAULT": "on", "SPECPREFILL_VLLM_DTYPE": "float32"}
    options = "--dtype float32 --max-model-len 4096 --enforce-eager --max-num-batched-tokens 512 --max-logprobs 5"
    with running(f"{command.rstrip()} {options}", tmp_path_factory.mktemp("vllm"), environment) as running_server:
        yield running_server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as found:
        yield found


@pytest.fixture(scope="module")
def model(client):
    return client.models.list().data[0].id


@pytest.fixture(scope="module")
def loop():
    base, tokenizer = models.load(NAME, torch.float32)
    config = SpecPrefillConfig.preset("default", keep_ratio=KEEP)
    return SpecPrefill(base, base, config, tokenizer=tokenizer)


def ask(client, model, messages, xargs=None, max_tokens=16, **more):
    body = {"return_token_ids": True, **({} if xargs is None else {"vllm_xargs": xargs})}
    return client.chat.completions.create(
        model=model, messages=messages, max_tokens=max_tokens, temperature=0, extra_body=body, **more
    )


def tokens(response):
    return tuple(response.choices[0].token_ids)


def report(response):
    return getattr(response.usage, "specprefill", None)


# ---- what is answered ----


@pytest.mark.parametrize("salt", ["red", "blue", "old"])
def test_a_chat_has_the_loops_selection_and_the_loops_tokens(client, model, loop, salt):
    result = loop.generate(chat(salt), max_new_tokens=16)
    response = ask(client, model, chat(salt))
    said = report(response)
    assert result.mode == said["mode"] == "sparse"
    assert said["kept_tokens"] == result.kept_tokens < 0.4 * result.prompt_tokens
    assert said["reason"] == result.reason  # what was protected, and how much of it
    assert "system" in said["reason"]
    assert said["backend"] == "cpu"
    assert said["seconds"]["speculator_prefill"] > 0
    assert response.usage.prompt_tokens == result.prompt_tokens
    assert response.usage.completion_tokens == len(tokens(response))
    assert tokens(response) == result.tokens


def test_a_text_has_the_loops_tokens_too(client, model, loop):
    prompt = f"{document('green')}\n\n{NEEDLE[:33]}"
    result = loop.generate(prompt, max_new_tokens=12, protect=["In chapter 3 of"])
    response = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=12,
        temperature=0,
        extra_body={"return_token_ids": True, "vllm_xargs": {"protect": ["In chapter 3 of"]}},
    )
    assert tuple(response.choices[0].token_ids) == result.tokens
    assert report(response)["kept_tokens"] == result.kept_tokens
    assert "user" in report(response)["reason"]


def test_a_request_may_say_no(client, model, loop):
    dense = SpecPrefill(loop.base, loop.base, loop.config.replace(keep_ratio=1.0), tokenizer=loop.tokenizer)
    expected = dense.generate(chat("red"), max_new_tokens=16)
    response = ask(client, model, chat("red"), {"specprefill": False})
    assert report(response) is None
    assert tokens(response) == expected.tokens
    assert response.usage.prompt_tokens == expected.prompt_tokens


def test_a_request_has_its_own_budget_and_protected_tokens(client, model):
    few = report(ask(client, model, chat("tall"), {"keep_ratio": 0.15}, max_tokens=1))
    more = report(ask(client, model, chat("tall"), {"keep_ratio": 0.5}, max_tokens=1))
    spans = report(ask(client, model, chat("tall"), {"keep_ratio": 0.15, "protect_spans": [200, 220]}, max_tokens=1))
    # A budget counts whole chunks of 8.
    assert few["kept_tokens"] <= 0.15 * few["prompt_tokens"] + 8 < 0.45 * few["prompt_tokens"] <= more["kept_tokens"]
    assert spans["kept_tokens"] <= 0.15 * few["prompt_tokens"] + 8  # protected tokens are paid from it
    assert "user 20" in spans["reason"]
    everything = report(ask(client, model, chat("tall"), {"keep_ratio": 1}, max_tokens=1))
    assert everything["mode"] == "dense"
    assert "keeps everything" in everything["reason"]


def test_several_prompts_and_several_answers(client, model):
    prompts = [document("grey"), "short", document("pink")]
    response = client.completions.create(model=model, prompt=prompts, max_tokens=4, n=2, temperature=1, seed=3)
    said = report(response)
    assert [one["mode"] for one in said["prompts"]] == ["sparse", "dense", "sparse"]
    assert "too short" in said["prompts"][1]["reason"]
    assert len(response.choices) == 6
    assert response.usage.prompt_tokens == said["prompt_tokens"] == sum(p["prompt_tokens"] for p in said["prompts"])


# ---- at the same time ----


def test_concurrent_requests_answer_as_alone(client, model, loop):
    """Pruned, ordinary and short ones in one batch, each with the tokens that it has alone."""
    salts = ["one", "two", "three"]
    jobs = [(chat(salt), xargs) for salt in salts for xargs in (None, {"specprefill": False})]
    jobs.append(([{"role": "user", "content": "Count from one to nine."}], None))
    with ThreadPoolExecutor(len(jobs)) as pool:
        together = list(pool.map(lambda job: ask(client, model, *job), jobs))
    for (messages, xargs), response in zip(jobs, together):
        ratio = 1.0 if xargs or len(messages) == 1 else KEEP
        alone = SpecPrefill(loop.base, loop.base, loop.config.replace(keep_ratio=ratio), tokenizer=loop.tokenizer)
        assert tokens(response) == alone.generate(messages, max_new_tokens=16).tokens


def test_the_engine_does_not_wait_for_the_speculator(client, model):
    """While one prompt is read by the speculator, others are answered."""
    events = []

    def long():
        ask(client, model, chat("slow", 1300), max_tokens=1)
        events.append("long")

    thread = threading.Thread(target=long)
    thread.start()
    time.sleep(0.3)
    ask(client, model, [{"role": "user", "content": "Say yes."}], {"specprefill": False}, max_tokens=2)
    events.append("short")
    thread.join()
    assert events == ["short", "long"]


# ---- streams ----


def test_a_stream_begins_early_and_ends_with_the_report(client, model, loop):
    started = time.monotonic()
    first, text, usage = None, "", None
    for event in ask(client, model, chat("wide"), max_tokens=40, stream=True, stream_options={"include_usage": True}):
        if event.choices and event.choices[0].delta.content:
            first = first or time.monotonic() - started
            text += event.choices[0].delta.content
        usage = event.usage or usage
    total = time.monotonic() - started
    assert 0 < first < total
    whole = loop.generate(chat("wide"), max_new_tokens=40)
    assert text.strip() == whole.text.strip()
    assert usage.prompt_tokens == whole.prompt_tokens
    assert usage.specprefill["kept_tokens"] == whole.kept_tokens


def test_every_event_of_a_stream_is_json_as_before(server, model):
    """Usage in every event, answers beyond ASCII: only the last event is written anew."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": document("café") + "\nWrite: é, ü, 漢字."}],
        "max_tokens": 6,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    events = server.events("/v1/chat/completions", body)
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    reports = [chunk["usage"].get("specprefill") for chunk in chunks]
    assert reports[:-1] == [None] * (len(chunks) - 1)
    assert reports[-1]["mode"] == "sparse"


# ---- what goes wrong ----


@pytest.mark.parametrize(
    ("xargs", "message"),
    [
        ({"specprefill": "maybe"}, "specprefill: expected true or false, got 'maybe'"),
        ({"keep_ratio": 0}, "keep_ratio: expected a number in (0, 1], got 0"),
        ({"keep_ratio": "much"}, "keep_ratio: expected a number in (0, 1], got 'much'"),
        ({"protect": ["not in this text"]}, "protect[0]: expected a passage of the prompt's text"),
        ({"protect_spans": [5]}, "protect_spans: expected token positions [start, end, start, end, ...], got [5]"),
        ({"protect_spans": [9, 5]}, "protect_spans[0]: expected 0 <= start < end"),
        ({"specprefill_positions": [9, 0, 5]}, "specprefill_positions: expected no such argument from outside"),
    ],
)
def test_bad_arguments_are_the_clients_error(client, model, xargs, message):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, model, chat("red"), {"specprefill": True, **xargs})
    assert message in str(caught.value)


def test_bad_arguments_leave_nothing_behind(client, server, model):
    with pytest.raises(openai.BadRequestError):
        ask(client, model, chat("red"), {"keep_ratio": 7})
    server.wait_until_idle()
    assert ask(client, model, chat("red"), max_tokens=1).usage.completion_tokens == 1


def left_alone(client, server, model, before, size):
    """The engine has nothing left of a request that nobody waits for, and goes on."""
    server.wait_until_idle()
    assert report(ask(client, model, chat("red"), max_tokens=2))["mode"] == "sparse"
    assert server.answered() - before == 1
    assert not server.said("Traceback", since=size)


def test_a_client_that_goes_away_during_the_selection(client, server, model):
    before, size = server.answered(), server.log.stat().st_size
    prompts = server.metric("vllm:prompt_tokens_total")
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.5), model, chat("gone", 900), max_tokens=2000)
    left_alone(client, server, model, before, size)
    # The engine never saw the prompt of the one that was given up, only the one after it.
    assert server.metric("vllm:prompt_tokens_total") - prompts < 1.5 * len(document("red")) / 4


def test_a_client_that_goes_away_during_the_answer(client, server, model):
    before, size = server.answered(), server.log.stat().st_size
    with ask(client, model, chat("gone too"), max_tokens=2000, stream=True) as stream:
        next(event for event in stream if event.choices and event.choices[0].delta.content)
    left_alone(client, server, model, before, size)


def test_what_cannot_be_pruned_runs_dense_and_says_why(client, server, model):
    response = client.completions.create(
        model=model, prompt=document("loud"), max_tokens=1, temperature=0, echo=True, logprobs=1
    )
    assert report(response)["mode"] == "dense"
    assert "prompt_logprobs" in report(response)["reason"]
    assert server.said("dense prefill: prompt_logprobs")
    assert len(response.choices[0].logprobs.tokens) == response.usage.total_tokens
    short = report(ask(client, model, [{"role": "user", "content": "Hello."}], max_tokens=1))
    assert (short["mode"], short["backend"]) == ("dense", "none")
    assert "too short" in short["reason"]


def test_the_pages_client_runs_as_it_stands(server, capsys):
    (block,) = blocks("docs/integrations.md", "vLLM", "python")
    values = {}
    exec(block, values)
    assert report(values["answer"])["mode"] == "sparse"
    assert "7319" in values["answer"].choices[0].message.content
    assert "'kept_tokens'" in capsys.readouterr().out


def test_the_log_says_what_was_pruned(server):
    assert server.said("speculative prefill: smollm2-135m on cpu, float32, selects for this server")
    assert server.said("sparse prefill: kept ")

"""The vLLM plugin's front end, between a client and an engine that are stand-ins: what is sent on, and what is said."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import EngineCoreRequest

from specprefill_kernels.integrations.vllm import frontend
from specprefill_kernels.integrations.vllm.frontend import FrontEnd
from specprefill_kernels.integrations.vllm.positions import KEY
from specprefill_kernels.integrations.vllm.selection import Chats, Outcome, PromptSelector
from specprefill_kernels.integrations.vllm.settings import (
    SPECULATOR,
    TIMEOUT,
    BadRequest,
    RequestOptions,
    ServerSettings,
)

SPANS = ((0, 8), (30, 40))
SPARSE = Outcome("sparse", "chosen", 40, 18, SPANS)


class Client:
    """An engine's client that notes what comes, with both ways in, as vLLM's have them.

    Attributes:
        answers: what the engine says of its workers, one for each time that it is asked; an error is raised.
    """

    def __init__(self):
        self.requests, self.asked = [], 0
        self.answers = [[None, None]]

    def add_request(self, request):
        self.requests.append(request)

    async def add_request_async(self, request):
        self.requests.append(request)

    def call_utility(self, method):
        assert method == "specprefill_status"
        self.asked += 1
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def call_utility_async(self, method):
        await asyncio.sleep(0.01)
        return self.call_utility(method)


class OutputProcessor:
    def __init__(self):
        self.request_states = {"one": SimpleNamespace(prompt="text")}

    def abort_requests(self, names, internal):
        assert internal
        for name in names:
            self.request_states.pop(name, None)


class Sync:
    """Stands for an `LLMEngine`."""

    def __init__(self, max_model_len=64):
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=max_model_len))
        self.engine_core, self.output_processor = Client(), OutputProcessor()
        self.renderer = SimpleNamespace(tokenizer=object())

    def add_request(self):
        """As its own."""


class Async(Sync):
    async def add_request(self):
        """As AsyncLLM's."""


class Selector:
    """Stands for a `PromptSelector`. `outcome` may be an error; None never comes."""

    def __init__(self, outcome=SPARSE):
        self.outcome, self.asked, self.given = outcome, [], None

    def submit(self, ids, text, options, salt=None):
        self.asked.append((len(ids), text, options, salt))
        self.given = Future()
        if isinstance(self.outcome, Exception):
            self.given.set_exception(self.outcome)
        elif self.outcome is not None:
            self.given.set_result(self.outcome)
        return self.given

    def close(self):
        """Nothing runs."""


def front_of(engine, monkeypatch, selector=None, **environment):
    monkeypatch.setattr(frontend, "engine_problem", lambda *_, **__: None)
    selector = selector or Selector()
    monkeypatch.setattr(frontend, "PromptSelector", lambda *_: selector)
    return FrontEnd(engine, ServerSettings.from_environment({SPECULATOR: "x", **environment}), Chats())


def request(name="one", wanted=True, salt=None, abort=False, resumable=False, **options):
    return EngineCoreRequest(
        request_id=name,
        external_req_id=name,
        prompt_token_ids=list(range(100, 140)),
        mm_features=None,
        sampling_params=SamplingParams(extra_args={"specprefill": wanted, "other": 7}, **options),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=salt,
        data_parallel_rank=None,
        abort_immediately=abort,
        resumable=resumable,
    )


def add(engine, *requests):
    """As vLLM adds them, all at once where it can."""
    if isinstance(engine, Async):

        async def together():
            await asyncio.gather(*map(engine.engine_core.add_request_async, requests))

        asyncio.run(together())
    else:
        for one in requests:
            engine.engine_core.add_request(one)


both = pytest.mark.parametrize("kind", [Sync, Async])


@both
def test_the_engine_gets_what_was_kept_and_the_output_side_keeps_the_whole(kind, monkeypatch):
    engine, selector = kind(), Selector()
    front_of(engine, monkeypatch, selector)
    one = request(salt="s", max_tokens=60)
    add(engine, one)
    (sent,) = engine.engine_core.requests
    assert sent.prompt_token_ids == [*range(100, 108), *range(130, 140)]
    assert sent.sampling_params.extra_args == {"specprefill": True, "other": 7, KEY: [40, 0, 8, 30, 40]}
    assert sent.sampling_params.max_tokens == 24  # positions end at 64
    assert (sent.request_id, sent.cache_salt) == ("one", "s")
    assert one.prompt_token_ids == list(range(100, 140))
    assert (one.sampling_params.max_tokens, KEY in one.sampling_params.extra_args) == (60, False)
    assert engine.output_processor.request_states["one"].specprefill is SPARSE
    assert selector.asked == [(40, "text", RequestOptions(), "s")]


@both
def test_what_was_not_asked_goes_by_untouched(kind, monkeypatch):
    engine, selector = kind(), Selector()
    front_of(engine, monkeypatch, selector)
    one = request(wanted=False)
    add(engine, one)
    assert engine.engine_core.requests == [one]
    assert engine.engine_core.requests[0] is one
    assert not hasattr(engine.output_processor.request_states["one"], "specprefill")
    assert selector.asked == []


@both
@pytest.mark.parametrize("environment", [{}, {"SPECPREFILL_VLLM_DEFAULT": "on"}])
def test_what_vllm_sends_by_itself_goes_by_too(kind, monkeypatch, environment):
    """The end of a prompt that came in pieces, and a transfer that was refused: the output side knows neither."""
    engine, selector = kind(), Selector()
    front_of(engine, monkeypatch, selector, **environment)
    sent = [request("end of pieces"), request("refused", abort=True), request("one", abort=True)]
    add(engine, *sent)
    assert engine.engine_core.requests == sent
    assert selector.asked == []


@both
@pytest.mark.parametrize(
    ("settings", "reason"),
    [({}, "no speculator: SPECPREFILL_VLLM_SPECULATOR names one"), ({SPECULATOR: "x"}, "a model without rotary")],
)
def test_a_server_that_cannot_prune_says_why_for_each_request(kind, monkeypatch, settings, reason):
    engine = kind()
    monkeypatch.setattr(frontend, "engine_problem", lambda *_, **__: "a model without rotary positions")
    front = FrontEnd(engine, ServerSettings.from_environment(settings), Chats())
    one = request()
    add(engine, one)
    front.close()
    assert engine.engine_core.requests == [one]
    outcome = engine.output_processor.request_states["one"].specprefill
    assert (outcome.mode, outcome.prompt_tokens, outcome.kept_tokens) == ("dense", 40, 40)
    assert outcome.reason.startswith(reason)


def test_a_configuration_that_cannot_be_read_does_not_stop_the_server(monkeypatch):
    monkeypatch.setattr(frontend, "engine_problem", lambda *_, **__: 1 / 0)
    engine = Sync()
    FrontEnd(engine, ServerSettings.from_environment({SPECULATOR: "x"}), Chats())
    add(engine, request())
    assert "could not be read: ZeroDivisionError" in engine.output_processor.request_states["one"].specprefill.reason


def test_an_unknown_version_runs_dense(monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.33.0")
    engine = Sync()
    FrontEnd(engine, ServerSettings.from_environment({SPECULATOR: "x"}), Chats())
    add(engine, request())
    reason = engine.output_processor.request_states["one"].specprefill.reason
    assert "vLLM 0.33.0 is not one of the tested versions" in reason


@both
def test_a_selection_that_fails_runs_dense_and_says_so(kind, monkeypatch):
    engine = kind()
    front_of(engine, monkeypatch, Selector(RuntimeError("no memory")))
    one = request()
    add(engine, one)
    assert engine.engine_core.requests == [one]
    reason = engine.output_processor.request_states["one"].specprefill.reason
    assert reason == "the selection failed: RuntimeError: no memory"


@both
def test_a_bad_request_is_the_clients_error_and_leaves_nothing(kind, monkeypatch):
    engine = kind()
    front_of(engine, monkeypatch, Selector(BadRequest("protect[0]: expected x")))
    with pytest.raises(VLLMValidationError, match=r"protect\[0\]: expected x"):
        add(engine, request())
    assert (engine.engine_core.requests, engine.output_processor.request_states) == ([], {})
    engine.output_processor.request_states["one"] = SimpleNamespace(prompt=None)
    with pytest.raises(VLLMValidationError, match="specprefill: expected true or false"):
        add(engine, request(wanted="perhaps"))
    assert (engine.engine_core.requests, engine.output_processor.request_states) == ([], {})


def test_who_waits_too_long_runs_dense(monkeypatch):
    engine, selector = Async(), Selector(None)
    front_of(engine, monkeypatch, selector, **{TIMEOUT: "0.05"})
    one = request()
    add(engine, one)
    assert engine.engine_core.requests == [one]
    assert engine.output_processor.request_states["one"].specprefill.reason == "no selection within 0.05 s"
    assert selector.given.cancelled()


def test_a_client_that_goes_away_takes_its_request_along(monkeypatch):
    engine, selector = Async(), Selector(None)
    front_of(engine, monkeypatch, selector)

    async def gone():
        waiting = asyncio.ensure_future(engine.engine_core.add_request_async(request()))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(gone())
    assert (engine.engine_core.requests, engine.output_processor.request_states) == ([], {})
    assert selector.given.cancelled()


def test_a_request_that_is_aborted_meanwhile_never_reaches_the_engine(monkeypatch):
    engine, selector = Async(), Selector(None)
    front_of(engine, monkeypatch, selector)

    async def aborted():
        waiting = asyncio.ensure_future(engine.engine_core.add_request_async(request()))
        await asyncio.sleep(0.05)
        engine.output_processor.abort_requests(["one"], internal=True)
        selector.given.set_result(SPARSE)
        await waiting

    asyncio.run(aborted())
    assert engine.engine_core.requests == []


@both
def test_workers_that_do_not_know_the_plugin(kind, monkeypatch):
    engine = kind()
    engine.engine_core.answers = [[None, "the model runner X is not known"]]
    front_of(engine, monkeypatch)
    add(engine, request())
    assert engine.output_processor.request_states["one"].specprefill.reason == "the model runner X is not known"
    add(engine, request())
    assert engine.engine_core.asked == 1  # once for all
    assert [len(sent.prompt_token_ids) for sent in engine.engine_core.requests] == [40, 40]


@both
def test_an_engine_without_the_plugin_is_remembered_and_a_passing_error_is_not(kind, monkeypatch):
    engine = kind()
    engine.engine_core.answers = [TimeoutError("busy"), AttributeError("no attribute 'specprefill_status'")]
    front_of(engine, monkeypatch)
    reasons = []
    for _ in range(3):
        add(engine, request())
        reasons.append(engine.output_processor.request_states["one"].specprefill.reason)
    assert reasons[0] == "the engine did not say whether it knows the plugin (busy)"
    assert reasons[1] == reasons[2] == "the engine does not know the plugin (no attribute 'specprefill_status')"
    assert engine.engine_core.asked == 2


def test_requests_that_come_together_ask_once(monkeypatch):
    engine = Async()
    engine.output_processor.request_states |= {name: SimpleNamespace(prompt=None) for name in "abc"}
    front_of(engine, monkeypatch)
    add(engine, *map(request, "abc"))
    assert (engine.engine_core.asked, len(engine.engine_core.requests)) == (1, 3)


def test_repetition_penalties_are_noted(monkeypatch):
    engine = Sync()
    front_of(engine, monkeypatch)
    add(engine, request(repetition_penalty=1.2))
    reason = engine.output_processor.request_states["one"].specprefill.reason
    assert reason == "chosen; repetition_penalty counts kept tokens only"


def test_an_engine_that_is_dropped_goes(monkeypatch):
    """vLLM's own tasks hold the client and not the engine; so must the front end."""
    engine = Async()
    front_of(engine, monkeypatch)
    client, gone = engine.engine_core, weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None
    assert client.requests == []


# ---- the speculator's thread ----


class Slow(PromptSelector):
    """Without a speculator: notes what is selected, and waits for `go`."""

    def __init__(self):
        self.selected, self.go = [], threading.Event()
        super().__init__(ServerSettings(speculator="x"), None, Chats())

    def _load(self):
        """Nothing."""

    def _select(self, ids, text, options, salt):
        assert self.go.wait(30)
        self.selected.append((list(ids), salt))
        return SPARSE


def test_children_of_one_request_share_its_selection():
    selector, ids, options = Slow(), [1, 2, 3], RequestOptions()
    children = [selector.submit(ids, None, options) for _ in range(3)]
    others = [selector.submit(list(ids), None, options), selector.submit(ids, None, RequestOptions(keep_ratio=0.5))]
    selector.go.set()
    assert [one.result(30) for one in [*children, *others]] == [SPARSE] * 5
    assert len(selector.selected) == 3
    selector.close()


def test_what_is_cancelled_before_its_turn_is_never_selected():
    selector = Slow()
    first, second = selector.submit([1], None, RequestOptions()), selector.submit([2], None, RequestOptions())
    assert second.cancel()
    again = selector.submit([2], None, RequestOptions())
    selector.go.set()
    first.result(30), again.result(30)
    assert [ids for ids, _ in selector.selected] == [[1], [2]]
    selector.close()


def test_a_speculator_that_cannot_be_loaded_is_the_reason_of_every_request():
    selector = PromptSelector(ServerSettings(speculator="no/such/model"), None, Chats())
    for _ in range(2):
        outcome = selector.submit([1, 2, 3], None, RequestOptions()).result(60)
        assert (outcome.mode, outcome.prompt_tokens, outcome.kept_tokens) == ("dense", 3, 3)
        assert outcome.reason.startswith("the speculator 'no/such/model' could not be loaded: ")
    selector.close()

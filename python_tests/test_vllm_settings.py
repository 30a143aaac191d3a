"""What a vLLM server's environment and its requests may say, and which are pruned at all. Needs no vLLM."""

from __future__ import annotations

import asyncio
import types

import pytest

from specprefill_kernels import SpecPrefillConfig
from specprefill_kernels.integrations.vllm.reports import Outcomes, _with_report
from specprefill_kernels.integrations.vllm.selection import Chats, Outcome, _renamed
from specprefill_kernels.integrations.vllm.settings import (
    BadRequest,
    BadSetting,
    RequestOptions,
    ServerSettings,
    request_options,
)
from specprefill_kernels.integrations.vllm.support import (
    engine_problem,
    has_rotary_positions,
    model_problem,
    request_problem,
)

# ---- the environment ----


def test_an_empty_environment_prunes_nothing():
    settings = ServerSettings.from_environment({})
    assert (settings.speculator, settings.by_default, settings.any_version) == (None, False, False)
    assert settings.config == SpecPrefillConfig.preset("default")
    assert settings.timeout == 120


def test_the_environment_is_read(monkeypatch):
    monkeypatch.setenv("SPECPREFILL_VLLM_SPECULATOR", "smollm2-135m")
    monkeypatch.setenv("SPECPREFILL_VLLM_DEFAULT", "On")
    monkeypatch.setenv("SPECPREFILL_VLLM_DEVICE", "cuda:1")
    monkeypatch.setenv("SPECPREFILL_VLLM_TIMEOUT", "2.5")
    monkeypatch.setenv("SPECPREFILL_VLLM_DTYPE", "bfloat16")
    monkeypatch.setenv("SPECPREFILL_VLLM_CONFIG", '{"preset": "paper", "keep_tokens": 64, "score_layers": [3, -1]}')
    settings = ServerSettings.from_environment()
    assert (settings.speculator, settings.by_default, settings.device) == ("smollm2-135m", True, "cuda:1")
    assert (settings.timeout, settings.dtype) == (2.5, "bfloat16")
    assert settings.config.budget == {"keep_tokens": 64}
    assert settings.config.score_layers == (3, -1)
    assert settings.config.protect == "none"  # the paper's


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("DEFAULT", "perhaps", "SPECPREFILL_VLLM_DEFAULT: expected on or off, got 'perhaps'"),
        ("ANY_VERSION", "2", "SPECPREFILL_VLLM_ANY_VERSION: expected on or off"),
        ("DTYPE", "fp32", "SPECPREFILL_VLLM_DTYPE: expected one of float32, bfloat16, float16, got 'fp32'"),
        ("TIMEOUT", "-1", "SPECPREFILL_VLLM_TIMEOUT: expected seconds above 0, got '-1'"),
        ("TIMEOUT", "soon", "SPECPREFILL_VLLM_TIMEOUT: expected seconds above 0, got 'soon'"),
        ("TIMEOUT", "nan", "SPECPREFILL_VLLM_TIMEOUT: expected seconds above 0"),
        ("CONFIG", "keep_ratio=2", "SPECPREFILL_VLLM_CONFIG: expected a JSON object"),
        ("CONFIG", "[1]", "SPECPREFILL_VLLM_CONFIG: expected a JSON object"),
        ("CONFIG", '{"keep_ratio": 2}', "SPECPREFILL_VLLM_CONFIG: keep_ratio: expected"),
        ("CONFIG", '{"keep_ration": 0.2}', "SPECPREFILL_VLLM_CONFIG: "),
        ("CONFIG", '{"preset": "best"}', "SPECPREFILL_VLLM_CONFIG: "),
    ],
)
def test_a_wrong_variable_is_named(name, value, message):
    with pytest.raises(BadSetting) as caught:
        ServerSettings.from_environment({f"SPECPREFILL_VLLM_{name}": value})
    assert message in str(caught.value)


# ---- a request ----


@pytest.mark.parametrize("given", [None, {}, {"other": 1}, {"specprefill": None}])
def test_a_request_that_says_nothing_follows_the_default(given):
    assert request_options(given) is None
    assert request_options(given, by_default=True) == RequestOptions()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(True, True), (1, True), ("on", True), (" TRUE ", True), (0, False), ("no", False), (False, False)],
)
@pytest.mark.parametrize("by_default", [True, False])
def test_words_for_yes_and_no(given, wanted, by_default):
    assert request_options({"specprefill": given}, by_default=by_default) == (RequestOptions() if wanted else None)


def test_other_users_of_the_same_names_are_left_alone():
    """`keep_ratio` and `protect` may mean something else to another plugin."""
    assert request_options({"keep_ratio": "much", "protect": 3, "protect_spans": "?"}) is None
    assert request_options({"specprefill": False, "keep_ratio": 7}, by_default=True) is None


def test_a_request_names_a_budget_and_what_survives():
    options = request_options({"specprefill": True, "keep_ratio": 1, "protect": "one", "protect_spans": [3, 5, 9, 12]})
    assert options == RequestOptions(1.0, ("one",), ((3, 5), (9, 12)))
    assert request_options({"protect": ["a", "b", "a"]}, by_default=True).passages == ("a", "b")
    config = SpecPrefillConfig(keep_ratio=None, keep_mass=0.5)
    assert options.budget(config).budget == {"keep_ratio": 1.0}
    assert RequestOptions().budget(config) is config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"specprefill": 2}, "specprefill: expected true or false, got 2"),
        ({"specprefill": [1]}, "specprefill: expected true or false, got [1]"),
        ({"keep_ratio": True}, "keep_ratio: expected a number in (0, 1], got True"),
        ({"keep_ratio": 1.01}, "keep_ratio: expected a number in (0, 1], got 1.01"),
        ({"keep_ratio": float("nan")}, "keep_ratio: expected a number in (0, 1], got nan"),
        ({"protect": ["a", ""]}, "protect: expected a passage of the prompt or a list of passages, got ['a', '']"),
        ({"protect": [3]}, "protect: expected a passage"),
        ({"protect_spans": [1.0, 2]}, "protect_spans: expected token positions"),
        ({"protect_spans": "12"}, "protect_spans: expected token positions"),
        ({"specprefill_positions": None}, "specprefill_positions: expected no such argument from outside, got None"),
        ({"protect": [str(i) for i in range(65)]}, "protect: expected at most 64 passages, got 65"),
        ({"protect_spans": [1] * 2050}, "protect_spans: expected at most 1024 spans, got 1025"),
    ],
)
def test_a_wrong_argument_is_named(given, message):
    with pytest.raises(BadRequest) as caught:
        request_options({"specprefill": True, **given})
    assert str(caught.value).startswith(message)


def test_a_long_wrong_argument_does_not_come_back_whole():
    with pytest.raises(BadRequest) as caught:
        request_options({"specprefill": True, "keep_ratio": ["x" * 1000] * 1000})
    assert len(str(caught.value)) < 400


def test_positions_from_outside_are_refused_whoever_asks():
    with pytest.raises(BadRequest, match="specprefill_positions"):
        request_options({"specprefill": False, "specprefill_positions": [9, 0, 5]})


def test_errors_name_the_list_that_the_request_has():
    assert _renamed("protect[1]: expected x", 2) == "protect[1]: expected x"
    assert _renamed("protect[3]: expected x", 2) == "protect_spans[1]: expected x"
    assert _renamed("prompt: expected x", 0) == "prompt: expected x"


# ---- which engines and requests are pruned ----


def model_config(**changes):
    window = changes.pop("window", None)
    text = {"rope_parameters": {"rope_theta": 1e4}, **changes.pop("text", {})}
    fields = {
        "runner_type": "generate",
        "max_model_len": 4096,
        **dict.fromkeys(("is_encoder_decoder", "is_hybrid", "has_inner_state", "is_attention_free"), False),
        **dict.fromkeys(("is_diffusion", "uses_mrope"), False),
        "uses_xdrope_dim": 0,
        "rswa_window": None,
        "get_sliding_window": lambda: window,
        "hf_text_config": types.SimpleNamespace(**text),
        **changes,
    }
    return types.SimpleNamespace(**fields)


def engine_config(model=None, parallel=(), cache=(), **changes):
    sizes = {"prefill_context_parallel_size": 1, "decode_context_parallel_size": 1, "use_ubatching": False}
    return types.SimpleNamespace(
        model_config=model or model_config(),
        parallel_config=types.SimpleNamespace(**{**sizes, **dict(parallel)}),
        cache_config=types.SimpleNamespace(**{"kv_sharing_fast_prefill": False, **dict(cache)}),
        **{"speculative_config": None, "kv_transfer_config": None, **changes},
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"runner_type": "pooling"}, "a model for pooling"),
        ({"is_encoder_decoder": True}, "an encoder-decoder model"),
        ({"is_hybrid": True}, "keep a state"),
        ({"has_inner_state": True}, "keep a state"),
        ({"is_attention_free": True}, "keep a state"),
        ({"is_diffusion": True}, "a diffusion model"),
        ({"uses_mrope": True}, "more than one dimension"),
        ({"uses_xdrope_dim": 3}, "more than one dimension"),
        ({"text": {"rope_parameters": None}}, "without rotary positions"),
        ({"text": {"alibi": True}}, "without rotary positions"),
        ({"window": 1024}, "a sliding window of 1024 tokens"),
        ({"text": {"attention_chunk_size": 512}}, "chunked attention of 512 tokens"),
        ({"rswa_window": 64}, "after the prompt of 64 tokens"),
        ({"text": {"index_topk": 2048}}, "indexer"),
        ({"text": {"sparse_attention_config": {"topk": 16}}}, "indexer"),
        ({"window": [128, None]}, "a sliding window of [128, None] tokens"),
    ],
)
def test_models_that_run_dense_have_a_reason(changes, reason):
    assert reason in (model_problem(model_config(**changes)) or "")
    assert reason in (engine_problem(engine_config(model_config(**changes)), "0.32.0") or "")


def test_models_with_rotary_positions_are_pruned():
    assert model_problem(model_config()) is None
    assert model_problem(model_config(window=4096)) is None  # it never cuts anything off
    for text in ({"rope_theta": 1e4}, {"rotary_dim": 64}, {"position_embedding_type": "rope", "rope_theta": 1e4}):
        assert has_rotary_positions(types.SimpleNamespace(**text))
    for text in ({}, {"position_embedding_type": "absolute", "rope_theta": 1e4}, {"rope_theta": None}):
        assert not has_rotary_positions(types.SimpleNamespace(**text))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"speculative_config": object()}, "speculative decoding"),
        ({"kv_transfer_config": object()}, "a KV connector"),
        ({"parallel": {"prefill_context_parallel_size": 2}}, "context parallelism"),
        ({"parallel": {"decode_context_parallel_size": 2}}, "context parallelism"),
        ({"parallel": {"use_ubatching": True}}, "dual batch overlap"),
        ({"cache": {"kv_sharing_fast_prefill": True}}, "fast prefill"),
        ({"aux_output_config": types.SimpleNamespace(enable_return_routed_experts=True)}, "experts"),
    ],
)
def test_servers_that_run_dense_have_a_reason(changes, reason):
    assert reason in (engine_problem(engine_config(**changes), "0.32.0") or "")


def test_versions():
    assert engine_problem(engine_config(), "0.32.1+cpu") is None
    for version in ("0.33.0", "0.3.2", "1.0"):
        problem = engine_problem(engine_config(), version)
        assert problem is not None
        assert problem.startswith(f"vLLM {version} is not one of the tested versions (0.32)")
        assert engine_problem(engine_config(), version, any_version=True) is None


def engine_request(**changes):
    params = {"prompt_logprobs": None, "extra_args": None, "max_tokens": 9, "detokenize": True, "logprobs": None}
    params["prompt_logprob_token_ids"] = None
    params |= {name: changes.pop(name) for name in list(changes) if name in params}
    fields = {
        "request_id": "7-abc",
        "external_req_id": "7",
        "prompt_token_ids": [1, 2, 3],
        "prompt_embeds": None,
        "mm_features": None,
        "resumable": False,
        "sampling_params": types.SimpleNamespace(**params),
        **changes,
    }
    return types.SimpleNamespace(**fields)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sampling_params": None}, "a pooling request"),
        ({"mm_features": [object()]}, "a multimodal prompt"),
        ({"prompt_embeds": object()}, "a prompt of embeddings"),
        ({"prompt_token_ids": None}, "a prompt of embeddings"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"prompt_logprob_token_ids": [[1]]}, "prompt_logprob_token_ids asks for every prompt token"),
        ({"resumable": True}, "comes in pieces"),
        ({"external_req_id": "cmpl-1-beam-0"}, "beam search"),
        ({"max_tokens": 1, "detokenize": False, "logprobs": 4}, "beam search"),
        ({"extra_args": {"kv_transfer_params": {"a": 1}}}, "transfers its KV cache"),
    ],
)
def test_requests_that_run_dense_have_a_reason(changes, reason):
    assert reason in (request_problem(engine_request(**changes)) or "")


def test_ordinary_requests_are_pruned():
    assert request_problem(engine_request()) is None
    assert request_problem(engine_request(max_tokens=1, logprobs=4)) is None


# ---- what a response says ----


def outcome(kept, mode="sparse"):
    return Outcome(mode, f"kept {kept}", 100, kept, ((0, kept),), {"score": 0.123456}, "cpu")


def output(outcome=None):
    return types.SimpleNamespace(**({} if outcome is None else {"specprefill": outcome}))


def seen(*outputs):
    """The report of a response after its requests' outputs."""
    outcomes = Outcomes()

    async def stream():
        for one in outputs:
            yield one

    async def read():
        return [one async for one in outcomes.seeing(stream())]

    assert asyncio.run(read()) == list(outputs)
    return outcomes.report()


def test_a_response_reports_its_own_outputs():
    assert seen(output(), output()) is None
    said = seen(output(outcome(20)), output(outcome(20)))  # the pieces of one answer
    assert (said["mode"], said["kept_tokens"], said["seconds"]) == ("sparse", 20, {"score": 0.1235})
    said = seen((1, output(Outcome.dense("too short", 9))), (0, output(outcome(30))), (2, output()))
    assert (said["mode"], said["prompt_tokens"], said["kept_tokens"]) == ("mixed", 109, 39)
    assert [one["mode"] for one in said["prompts"]] == ["sparse", "dense"]


def test_an_event_gets_its_report_and_keeps_the_rest():
    event = 'data: {"id":"1","choices":[],"usage":{"prompt_tokens":7},"model":"é"}\n\n'
    expected = (
        'data: {"id":"1","choices":[],"usage":{"prompt_tokens":7,"specprefill":{"mode":"dense"}},"model":"é"}\n\n'
    )
    assert _with_report(event, {"mode": "dense"}) == expected


def test_chats_are_found_by_text_or_ids_and_the_oldest_are_forgotten():
    chats = Chats()
    chats.remember("text", ["m"], {"o": 1})
    chats.remember([1, 2], ["n"], {})
    assert chats.take("text", [9]) == (["m"], {"o": 1})
    assert chats.take("text", [9]) is None  # a request takes its chat with it
    assert chats.take("other", [1, 2]) == (["n"], {})
    assert chats.take(None, [1]) is None
    for index in range(300):
        chats.remember(str(index), [], {})
    assert chats.take("0", []) is None
    assert chats.take("299", []) is not None

"""What a vLLM server's environment and its requests may say, and which are pruned at all. Needs no vLLM."""

from __future__ import annotations

import types

import pytest

from specprefill_kernels import SpecPrefillConfig
from specprefill_kernels.integrations.vllm.reports import Reports, _with_report
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


def test_the_environment_is_read(monkeypatch):
    monkeypatch.setenv("SPECPREFILL_VLLM_SPECULATOR", "smollm2-135m")
    monkeypatch.setenv("SPECPREFILL_VLLM_DEFAULT", "On")
    monkeypatch.setenv("SPECPREFILL_VLLM_DEVICE", "cuda:1")
    monkeypatch.setenv("SPECPREFILL_VLLM_CONFIG", '{"preset": "paper", "keep_tokens": 64, "score_layers": [3, -1]}')
    settings = ServerSettings.from_environment()
    assert (settings.speculator, settings.by_default, settings.device) == ("smollm2-135m", True, "cuda:1")
    assert settings.config.budget == {"keep_tokens": 64}
    assert settings.config.score_layers == (3, -1)
    assert settings.config.protect == "none"  # the paper's


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("DEFAULT", "perhaps", "SPECPREFILL_VLLM_DEFAULT: expected on or off, got 'perhaps'"),
        ("ANY_VERSION", "2", "SPECPREFILL_VLLM_ANY_VERSION: expected on or off"),
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


def test_a_request_that_says_nothing_says_nothing():
    assert request_options(None) == request_options({}) == request_options({"other": 1}) == RequestOptions()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(True, True), (1, True), ("on", True), (" TRUE ", True), (0, False), ("no", False), (None, None)],
)
def test_words_for_yes_and_no(given, wanted):
    assert request_options({"specprefill": given}).wanted is wanted


def test_a_request_names_a_budget_and_what_survives():
    options = request_options({"keep_ratio": 1, "protect": "one", "protect_spans": [3, 5, 9, 12]})
    assert options == RequestOptions(None, 1.0, ("one",), ((3, 5), (9, 12)))
    assert request_options({"protect": ["a", "b"]}).passages == ("a", "b")
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
    ],
)
def test_a_wrong_argument_is_named(given, message):
    with pytest.raises(BadRequest) as caught:
        request_options(given)
    assert str(caught.value).startswith(message)


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


def test_a_report_is_told_once_and_to_its_own_request():
    reports = Reports()
    reports.add("chatcmpl-1", outcome(20))
    reports.add("cmpl-2-0", outcome(30))
    reports.add("cmpl-2-1", Outcome.dense("too short", 9))
    said = reports.take("chatcmpl-1")
    assert said is not None
    assert (said["mode"], said["kept_tokens"], said["seconds"]) == ("sparse", 20, {"score": 0.1235})
    assert reports.take("chatcmpl-1") is None
    reports.add("cmpl-2-x", outcome(50))  # a client may name its requests
    reports.add("cmpl-2-1-0", outcome(50))
    several = reports.take("cmpl-2")
    assert several is not None
    assert (several["mode"], several["prompt_tokens"], several["kept_tokens"]) == ("mixed", 109, 39)
    assert [one["mode"] for one in several["prompts"]] == ["sparse", "dense"]
    for beam in range(3):
        reports.add(f"chatcmpl-3-{beam}f-beam-{beam}", Outcome.dense("beam search", 9))
    assert reports.take("chatcmpl-3") == Outcome.dense("beam search", 9).to_json()
    assert reports.take("chatcmpl-3") is None


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
    assert chats.find("text", [9]) == (["m"], {"o": 1})
    assert chats.find("other", [1, 2]) == chats.find(None, [1, 2]) == (["n"], {})
    assert chats.find(None, [1]) is None
    for index in range(300):
        chats.remember(str(index), [], {})
    assert chats.find("text", []) is None
    assert chats.find("299", []) is not None

"""Which engines the vLLM plugin leaves alone, told from vLLM's own configuration objects. No weights."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import transformers
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import registry
from vllm_engine import ENVIRONMENT

from specprefill_kernels.integrations.vllm.frontend import FrontEnd
from specprefill_kernels.integrations.vllm.reports import Reports
from specprefill_kernels.integrations.vllm.selection import Chats
from specprefill_kernels.integrations.vllm.settings import SPECULATOR, ServerSettings
from specprefill_kernels.integrations.vllm.support import engine_problem

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 1, "vocab_size": 512, "max_position_embeddings": 512}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 512}
OPT = {"hidden_size": 64, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 64}
BLOOM = {"hidden_size": 64, "n_layer": 2, "n_head": 2, "vocab_size": 512}
FALCON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 512}
NEOX = {**FALCON, "intermediate_size": 64}
MAMBA = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512, "state_size": 8}
THREE_DIMENSIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
ROTARY, WINDOW = "a model without rotary positions (RoPE)", "tokens, which would count kept tokens instead of positions"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    # vLLM looks at each model class in a process of its own, which takes seconds.
    monkeypatch.setattr(
        registry._LazyRegisteredModel,
        "inspect_model_cls",
        lambda self: registry._ModelInfo.from_model_cls(self.load_model_cls()),
    )
    # The plugin reads its settings once in a process, perhaps here, and real engines may come later.
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def vllm_config(folder, architecture, kind, fields, **options):
    """vLLM's configuration of a server for a small model; there are no weights."""
    getattr(transformers, kind)(**fields, architectures=[architecture]).save_pretrained(folder)
    given = {"skip_tokenizer_init": True, "load_format": "dummy", "dtype": "float32", "enforce_eager": True, **options}
    return EngineArgs(model=str(folder), **given).create_engine_config()


def llama(folder, fields=None, **options):
    return vllm_config(folder, "LlamaForCausalLM", "LlamaConfig", {**SMALL, **(fields or {})}, **options)


@pytest.mark.parametrize(
    ("architecture", "kind", "fields", "options", "problem"),
    [
        ("LlamaForCausalLM", "LlamaConfig", SMALL, {}, None),
        ("GPTNeoXForCausalLM", "GPTNeoXConfig", NEOX, {}, None),
        ("FalconForCausalLM", "FalconConfig", FALCON, {"max_model_len": 256}, None),
        ("FalconForCausalLM", "FalconConfig", {**FALCON, "alibi": True}, {"max_model_len": 256}, ROTARY),
        ("GPT2LMHeadModel", "GPT2Config", GPT, {}, ROTARY),
        ("OPTForCausalLM", "OPTConfig", OPT, {}, ROTARY),
        ("BloomForCausalLM", "BloomConfig", BLOOM, {}, ROTARY),
        ("MistralForCausalLM", "MistralConfig", {**SMALL, "sliding_window": 128}, {}, f"window of 128 {WINDOW}"),
        ("MistralForCausalLM", "MistralConfig", {**SMALL, "sliding_window": 128}, {"max_model_len": 128}, None),
        ("Gemma3ForCausalLM", "Gemma3TextConfig", {**SMALL, "sliding_window": 64}, {}, f"window of 64 {WINDOW}"),
        ("MambaForCausalLM", "MambaConfig", MAMBA, {"max_model_len": 256}, "keep a state of all tokens"),
        ("Qwen3NextForCausalLM", "Qwen3NextConfig", SMALL, {}, "keep a state of all tokens"),
        ("LlamaForCausalLM", "LlamaConfig", SMALL, {"runner": "pooling"}, "a model for pooling"),
        ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "rope_parameters": THREE_DIMENSIONS}, {}, "more than one dim"),
    ],
)
def test_models(tmp_path, architecture, kind, fields, options, problem):
    found = engine_problem(vllm_config(tmp_path, architecture, kind, fields, **options), "0.32.0")
    assert found is None if problem is None else problem in found


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
            "speculative decoding, whose draft model would count indices",
        ),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "a KV connector, whose keys know no positions",
        ),
        ({"decode_context_parallel_size": 2, "tensor_parallel_size": 2}, "context parallelism"),
        ({"tensor_parallel_size": 2}, None),
        ({"enable_prefix_caching": False, "max_num_batched_tokens": 512}, None),
    ],
)
def test_servers(tmp_path, options, problem):
    assert engine_problem(llama(tmp_path, **options), "0.32.0") == problem


@pytest.mark.parametrize(
    ("version", "tested"),
    [("0.32.0", True), ("0.32.7", True), ("0.32.1rc1+cpu", True), ("0.33.0", False), ("0.3.2", False), ("1.32", False)],
)
def test_versions(tmp_path, version, tested):
    config = llama(tmp_path)
    problem = engine_problem(config, version)
    assert problem is None if tested else (version in problem and "SPECPREFILL_VLLM_ANY_VERSION=1" in problem)
    assert engine_problem(config, version, any_version=True) is None


# ---- a front end, between a client and an engine that are stand-ins ----


class Client:
    """An engine's client that notes what comes, with both ways in, as vLLM's have them."""

    def __init__(self):
        self.requests = []

    def add_request(self, request):
        self.requests.append(request)

    async def add_request_async(self, request):
        self.requests.append(request)


class Sync:
    def __init__(self, config, tokenizer=None):
        self.vllm_config, self.engine_core = config, Client()
        self.renderer = SimpleNamespace(tokenizer=tokenizer)
        self.output_processor = SimpleNamespace(request_states={"one": SimpleNamespace(prompt=None)})

    def add_request(self):
        """As LLMEngine's."""


class Async(Sync):
    async def add_request(self):
        """As AsyncLLM's."""


def request(**options):
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    return EngineCoreRequest(
        request_id="one",
        external_req_id="one",
        prompt_token_ids=list(range(40)),
        mm_features=None,
        sampling_params=SamplingParams(extra_args={"specprefill": True}, **options),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


@pytest.mark.parametrize("kind", [Sync, Async])
@pytest.mark.parametrize(
    ("environment", "fields", "reason"),
    [
        ({}, {}, "no speculator: SPECPREFILL_VLLM_SPECULATOR names one"),
        ({SPECULATOR: "x"}, {"sliding_window": 64}, "a sliding window of 64"),
        ({SPECULATOR: "x"}, {}, "no tokenizer in the server"),
    ],
)
def test_a_server_that_cannot_prune_says_why_for_each_request(tmp_path, kind, environment, fields, reason):
    kinds = ("MistralForCausalLM", "MistralConfig") if fields else ("LlamaForCausalLM", "LlamaConfig")
    engine = kind(vllm_config(tmp_path, *kinds, {**SMALL, **fields}))
    front = FrontEnd(engine, ServerSettings.from_environment(environment), Chats(), Reports())
    one = request()
    if kind is Async:
        asyncio.run(engine.engine_core.add_request_async(one))
    else:
        engine.engine_core.add_request(one)
    front.close()
    assert engine.engine_core.requests == [one]
    outcome = engine.output_processor.request_states["one"].specprefill
    assert (outcome.mode, outcome.prompt_tokens, outcome.kept_tokens) == ("dense", 40, 40)
    assert outcome.reason.startswith(reason)


def test_an_unknown_version_runs_dense(tmp_path, monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.33.0")
    engine = Sync(llama(tmp_path))
    FrontEnd(engine, ServerSettings.from_environment({SPECULATOR: "x"}), Chats(), Reports())
    engine.engine_core.add_request(request())
    assert "vLLM 0.33.0 is not one of the tested versions" in (
        engine.output_processor.request_states["one"].specprefill.reason
    )

"""Which engines the vLLM plugin leaves alone, told from vLLM's own configuration objects. No weights."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

import transformers
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import registry
from vllm_engine import ENVIRONMENT

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

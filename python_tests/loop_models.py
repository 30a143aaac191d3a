"""Tiny random Transformers models and tokenizers for the loop tests, and the attention masks that define them."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    set_seed,
)

from specprefill_kernels import SpecPrefillConfig
from specprefill_kernels.loop import SpecPrefill

VOCAB = 300
WINDOW = 24  # shorter than every prompt of these tests
PROMPT = 150

# Weights large enough that attention is peaked and logits differ; greedy ties would hide errors.
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_MIXED = ["sliding_attention", "full_attention"] * 2

CONFIGS = {
    "llama": lambda: LlamaConfig(**_COMMON),
    "qwen2": lambda: Qwen2Config(**_COMMON),
    "qwen3": lambda: Qwen3Config(**_COMMON),
    "mistral": lambda: MistralConfig(**_COMMON, sliding_window=WINDOW),
    "phi3": lambda: Phi3Config(**_COMMON, sliding_window=WINDOW),
    "qwen2_sliding": lambda: Qwen2Config(**_COMMON, use_sliding_window=True, sliding_window=WINDOW, layer_types=_MIXED),
    "gemma2": lambda: Gemma2Config(
        **_COMMON, sliding_window=WINDOW, layer_types=_MIXED, query_pre_attn_scalar=9, attn_logit_softcapping=5.0
    ),
    "gemma3": lambda: Gemma3TextConfig(**_COMMON, sliding_window=WINDOW, layer_types=_MIXED, query_pre_attn_scalar=9),
}
FULL = ("llama", "qwen2", "qwen3")
SLIDING = ("mistral", "phi3", "qwen2_sliding", "gemma2", "gemma3")
FAMILIES = FULL + SLIDING


def build(family: str, *, seed: int = 0, attn: str | None = None, **changes: object) -> torch.nn.Module:
    """A model in fp32 in eval mode. `attn` picks the attention implementation."""
    if family == "gemma2" and attn is None:
        attn = "eager"  # the default today; older Transformers chose SDPA, which leaves the softcap out
    config = CONFIGS[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, **({} if attn is None else {"attn_implementation": attn})).eval()
    with torch.no_grad():  # peaked attention: flat importance would hide errors
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(1.5)
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                weight.add_(1)
    model.generation_config.eos_token_id = config.eos_token_id
    model.generation_config.pad_token_id = 0
    return model


def prompt(length: int = PROMPT, *, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def windows(model: torch.nn.Module) -> list[int | None]:
    """The sliding window of each layer, read off the config."""
    config = model.config
    types = getattr(config, "layer_types", None)
    if types is None:
        return [getattr(config, "sliding_window", None)] * config.num_hidden_layers
    return [config.sliding_window if kind == "sliding_attention" else None for kind in types]


def positional_masks(model: torch.nn.Module, positions: torch.Tensor):
    """4D masks for tokens at `positions`, causal and windowed by position: what sparse prefill has to equal."""
    distance = positions[:, None] - positions[None, :]

    def mask(window: int | None) -> torch.Tensor:
        seen = (distance >= 0) & (distance < (window or 10**9))
        if model.config._attn_implementation == "eager":
            return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
        return seen[None, None]

    types = getattr(model.config, "layer_types", None)
    if types is None:
        return mask(windows(model)[0])
    return {kind: mask(window) for kind, window in zip(types, windows(model))}


@torch.no_grad()
def logits_by_hand(model: torch.nn.Module, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[K, V] logits of all tokens at once: no cache, explicit masks."""
    masks = positional_masks(model, positions)
    if isinstance(masks, dict) and model.config.model_type in ("llama",):
        masks = masks["full_attention"]
    return model(input_ids=ids, position_ids=positions[None], attention_mask=masks, use_cache=False).logits[0]


def byte_tokenizer(merges: tuple[tuple[str, str], ...] = (), *, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the given merges, and a chat template with role markers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(["<eos>", "<bos>", "<|im_start|>", "<|im_end|>", *alphabet])}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        bos_token="<bos>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return fast


def config(**changes):
    return SpecPrefillConfig(**{"keep_ratio": 0.4, "chunk_size": 16, "min_prompt_tokens": 0, **changes})


def pipeline(family="llama", *, base=None, **changes):
    keywords = {name: changes.pop(name) for name in ("tokenizer", "self_layers") if name in changes}
    base = build(family, seed=7) if base is None else base
    speculator = None if "self_layers" in keywords else build(family, seed=3)
    return SpecPrefill(base, speculator, config(**changes), **keywords)


def ordinary(model, ids, count, **options):
    set_seed(0)
    return model.generate(ids, max_new_tokens=count, **options)[0, ids.shape[1] :].tolist()


def stand_ins(monkeypatch):
    """The registry's models are tiny ones, for code on the pages: no gigabyte is loaded."""
    from specprefill_kernels import models

    tiny = {
        "qwen2.5-coder-1.5b": lambda: (build("llama"), byte_tokenizer((("t", "h"),))),
        "smollm2-135m": lambda: (build("llama", seed=1), byte_tokenizer()),
    }
    assert tiny.keys() <= models.REGISTRY.keys()
    monkeypatch.setattr(models, "load", lambda name: tiny[name]())

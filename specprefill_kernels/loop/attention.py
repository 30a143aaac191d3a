"""A handler around every attention call of a Transformers model, for the length of a `with` block.

Transformers asks `config._attn_implementation` for the attention function at each call, so a name registered with its
`AttentionInterface` reaches every architecture that uses the interface. Names are registered once per implementation
("specprefill|sdpa"); which handler runs is a context variable. So nothing is patched, several threads may run different
models at once, and outside the block the model is exactly what it was.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = "specprefill|"

# handler(ordinary, module, query, key, value, attention_mask, **kwargs) -> (output, weights or None); `ordinary` is the
# attention function that the model would have called, with the same arguments from `module` on. Where a handler's
# attribute `unmasked` names the implementation, the handler makes the masks and the model builds none.
Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
Handler = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]

_handler: ContextVar[Handler | None] = ContextVar("specprefill_attention_handler", default=None)


def attention_function(module: torch.nn.Module, implementation: str) -> Attention:
    """The attention function that `module` would call under `implementation`.

    Models keep their own eager function, and may override others, in the file that defines their attention class.
    """
    for cls in type(module).__mro__:
        source = sys.modules.get(cls.__module__)
        if implementation == "eager":
            eager = getattr(source, "eager_attention_forward", None)
            if eager is not None:
                return eager
        else:
            interface = getattr(source, "ALL_ATTENTION_FUNCTIONS", None)
            if interface is not None:
                return interface[implementation]
    if implementation == "eager":
        raise RuntimeError(
            f"{type(module).__name__} has no eager attention function beside its class, which a sliding window over "
            'gapped positions needs here; load the model with attn_implementation="sdpa"'
        )
    return ALL_ATTENTION_FUNCTIONS[implementation]


class _View:
    """An object with some attributes replaced, for whoever reads them. The object itself is not touched."""

    def __init__(self, target: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced)
        self._target = target

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


def _under_its_own_name(function: Attention, implementation: str) -> Attention:
    """Flash attention loads its kernel by the name in `module.config`, where it must not find ours."""

    def call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        config = _View(module.config, _attn_implementation=implementation)
        return function(_View(module, config=config), *args, **kwargs)

    return call


def _dispatch(implementation: str, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    ordinary = attention_function(module, implementation)
    if implementation not in ("sdpa", "eager"):
        ordinary = _under_its_own_name(ordinary, implementation)
    handler = _handler.get()
    if handler is None:  # another thread runs this model while it is hooked
        return ordinary(module, *args, **kwargs)
    return handler(ordinary, module, *args, **kwargs)


def _mask(implementation: str, *args: Any, **kwargs: Any) -> Any:
    # Asked by thread, as the handler is: another thread's forward of this model needs its masks.
    if implementation in getattr(_handler.get(), "unmasked", ()):
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS[implementation](*args, **kwargs)


def _register(implementation: str) -> str:
    name = PREFIX + implementation
    AttentionInterface.register(name, partial(_dispatch, implementation))
    # Without a mask function under the same name the model would build no mask at all.
    if implementation in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, partial(_mask, implementation))
    return name


def attention_configs(model: torch.nn.Module) -> list[PretrainedConfig]:
    """Every config that a module of the model reads its attention implementation from, each once."""
    found: dict[int, PretrainedConfig] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            found.setdefault(id(config), config)
    return list(found.values())


def implementation_under(module: torch.nn.Module) -> str:
    """The attention implementation that this module would run without a handler."""
    config: Any = module.config
    return (config._attn_implementation or "eager").removeprefix(PREFIX)


def implementation_of(model: Any) -> str:
    """The model's attention implementation: "sdpa", "eager", "flash_attention_2", ..."""
    return (model.config.get_text_config(decoder=True)._attn_implementation or "eager").removeprefix(PREFIX)


@contextmanager
def attention_handler(configs: list[PretrainedConfig], handler: Handler) -> Iterator[None]:
    """Send every attention call of the models with these configs through `handler`; undone even by an exception."""
    before = [config._attn_implementation for config in configs]
    token = _handler.set(handler)
    try:
        for config, implementation in zip(configs, before):
            # The internal field: the public setter would also overwrite the sub-configs, which may differ.
            config._attn_implementation_internal = _register((implementation or "eager").removeprefix(PREFIX))
        yield
    finally:
        for config, implementation in zip(configs, before):
            config._attn_implementation_internal = implementation
        _handler.reset(token)

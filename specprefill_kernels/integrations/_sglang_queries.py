"""The query rows that SGLang's attention layers get, kept for `sglang.score`."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from specprefill_kernels import _checks

NEEDED = ("layer_id", "tp_q_head_num", "qk_head_dim", "scaling", "logit_cap", "sliding_window_size")


class QueryRecorder:
    """Between `with` and its end, keeps the last query rows of each `RadixAttention` layer of a model.

    A batch that extends (a prefill, or its last chunk) starts anew with each request's last `rows` rows; each decoding
    step of the same requests adds one. So a prefill with rows=8 gives what queries="observation_window" scores, and a
    prefill with rows=1 and seven steps what "look_ahead" scores. Rows are copied, as SGLang uses their memory again:
    B * N * Hq * D elements a layer.

    Layers are watched by forward hooks, which a replayed CUDA graph does not run, and on CUDA SGLang 0.5.23 replays
    prefills too unless told otherwise: the speculator runs with `--disable-cuda-graph`, which stands for
    `--cuda-graph-backend-prefill=disabled` and `--cuda-graph-backend-decode=disabled`. Steps that were replayed show in
    the shape of `queries`; a prefill that was replayed, as `sglang.score` compares the lengths in `options` with the
    pool's.

    Args:
        model: the speculator, `ModelRunner.model`.
        layers: layer ids. Default: all.
        rows: last rows of each prompt.

    Raises:
        ValueError: a layer cannot be scored (latent or cross attention, another soft cap than tanh), a forward is
            neither a prefill nor a decoding step, a prompt's last chunk is shorter than `rows`, requests changed,
            attention has sinks, or several layers have one id (shared keys).
    """

    def __init__(self, model: nn.Module, *, layers: Iterable[int] | None = None, rows: int = 1) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        _checks.integer("rows", rows, 1)
        attention: list[Any] = [one for one in model.modules() if all(hasattr(one, name) for name in NEEDED)]
        found = {int(one.layer_id): one for one in attention}
        uses = Counter(int(one.layer_id) for one in attention)
        chosen = sorted(found) if layers is None else list(layers)
        missing = sorted(set(chosen) - set(found))
        if missing or not chosen:
            _checks.fail("layers", f"layer ids of this model's RadixAttention, {sorted(found)}", missing or chosen)
        self._modules = {layer: found[layer] for layer in chosen}
        for layer, module in self._modules.items():
            if uses[layer] > 1:
                _checks.fail(f"layer {layer}", "one RadixAttention of this id", f"{uses[layer]}, which share its keys")
            _check_module(layer, module)
        self._rows = rows
        self._pieces: dict[int, list[Tensor]] = {}
        self._lengths: dict[int, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> "QueryRecorder":
        self._pieces, self._lengths = {}, {}
        for module in self._modules.values():
            self._hooks.append(module.register_forward_pre_hook(self._keep, with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self._modules)

    @property
    def queries(self) -> list[Tensor]:
        """[B, N, Hq, D] of each of `layers`; with tensor parallelism this rank's heads."""
        silent = [layer for layer in self._modules if layer not in self._pieces]
        if silent:
            raise ValueError(f"queries: expected a prefill inside `with`, got none in layers {silent}")
        return [torch.cat(self._pieces[layer], 1) for layer in self._modules]

    @property
    def options(self) -> dict[str, Any]:
        """What `sglang.score` must know of these layers: scale, softcap, window, key_scale, recorded_lens.

        `key_scale` is what the checkpoint gave the layers, whatever the pool's dtype is; `sglang.score` applies it to
        keys in fp8 alone, as SGLang divides no others by it. `recorded_lens`, [layers, B], are the tokens of each
        request when its prompt's rows were recorded, None before all layers have some.
        """
        modules = list(self._modules.values())
        same = {}
        for name in ("scaling", "logit_cap"):
            values = {float(getattr(module, name)) for module in modules}
            if len(values) > 1:
                _checks.fail("layers", f"layers of one {name}; score the others into the same state", sorted(values))
            same[name] = values.pop()
        windows = [module.sliding_window_size for module in modules]
        lengths = [self._lengths[layer] for layer in self._modules if layer in self._lengths]
        scales = [getattr(module, "k_scale_float", None) for module in modules]
        return {
            "scale": same["scaling"],
            "softcap": same["logit_cap"] or None,
            # SGLang's does not count the row itself
            "window": [window + 1 if window is not None and window >= 0 else None for window in windows],
            "key_scale": None if scales == [None] * len(scales) else [1.0 if s is None else float(s) for s in scales],
            "recorded_lens": torch.stack(lengths) if len(lengths) == len(modules) else None,
        }

    def _keep(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        query = args[0] if args else kwargs["q"]
        batch = args[3] if len(args) > 3 else kwargs["forward_batch"]
        if kwargs.get("k_rope") is not None:
            raise ValueError(f"model: expected keys of heads, got latent attention (MLA) in layer {module.layer_id}")
        if kwargs.get("sinks") is not None:
            raise ValueError(
                f"model: expected a softmax over keys alone, got attention sinks in layer {module.layer_id}"
            )
        query = query.view(-1, module.tp_q_head_num, module.qk_head_dim)
        mode = batch.forward_mode.name
        if mode == "EXTEND":
            lengths = batch.extend_seq_lens
            if batch.extend_seq_lens_cpu is not None:
                shortest = min(batch.extend_seq_lens_cpu)
                if shortest < self._rows:
                    _checks.fail("rows", f"at most {shortest}, the new tokens of the shortest prompt", self._rows)
            ends = lengths.cumsum(0)[:, None].long()
            rows = torch.arange(-self._rows, 0, device=ends.device)
            self._pieces[module.layer_id] = [query[ends + rows]]
            self._lengths[module.layer_id] = batch.seq_lens.clone()  # decoding counts in place
        elif mode == "DECODE":
            pieces = self._pieces.get(module.layer_id)
            if pieces is None or len(pieces[0]) != batch.batch_size:
                before = "none" if pieces is None else f"one of {len(pieces[0])} requests"
                _checks.fail("forward", f"a prefill of these {batch.batch_size} requests first", before)
            else:
                pieces.append(query[: batch.batch_size, None].clone())
        else:
            _checks.fail("forward_mode", "EXTEND or DECODE", mode)


def _check_module(layer: int, module: Any) -> None:
    name = f"layer {layer}"
    if getattr(module, "is_cross_attention", False):
        _checks.fail(name, "self-attention", "cross attention")
    if module.logit_cap and getattr(module, "logit_capping_method", "tanh") != "tanh":
        _checks.fail(name, "a soft cap by tanh", module.logit_capping_method)
    if getattr(module, "xai_temperature_len", -1) > 0:
        _checks.fail(name, "one scale for all positions", "a temperature by length")

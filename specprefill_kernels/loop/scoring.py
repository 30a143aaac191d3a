"""From captured queries and keys to the importance of each prompt token.

Apart from the forward, so that many settings can be scored on one capture: layers, rows, pooling, reduction.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specprefill_kernels._backends import resolve
from specprefill_kernels.config import SpecPrefillConfig
from specprefill_kernels.loop.capture import LayerCapture
from specprefill_kernels.ops.finalize import finalize_importance
from specprefill_kernels.ops.score import new_state, score_layers_


class NothingToScore(RuntimeError):
    """This prompt cannot be scored, or no layer is left to score; the message says why."""


@dataclass(frozen=True)
class Captured:
    """What a speculator's forwards left behind of one prompt.

    Attributes:
        layers: by index; the first piece of a layer's queries is the last prompt rows, the others one decoded row each.
        seq_len: T, the prompt's tokens.
        num_layers: the model's, from which negative layer indices count.
        prompt_rows: prompt rows that were asked for; a shorter prompt has fewer.
        look_ahead: look-ahead rows that were asked for, the last prompt row included; EOS or the end of the
            model's context may have come earlier.
        tokens: the decoded tokens, one per decoded row.
        reused_tokens: prompt tokens whose keys a `SpeculatorMemory` had already. The key tensors are then views of the
            memory's buffers: score them before the memory is used again.
        attention: how the prompt was read, "dense" or "sparse", and in words why.
    """

    layers: Mapping[int, LayerCapture]
    seq_len: int
    num_layers: int
    prompt_rows: int
    look_ahead: int
    tokens: tuple[int, ...] = ()
    reused_tokens: int = 0
    attention: tuple[str, str] = ("dense", "")


@dataclass(frozen=True)
class Speculation:
    """What one prompt's speculation gave.

    Attributes:
        importance: [T] fp32 on the speculator's device.
        num_look_ahead: query rows that counted: at most `config.look_ahead`, with queries="both" at most
            `config.observation_rows + config.look_ahead - 1`.
        layers: indices of the layers that were scored, ascending.
        look_ahead_tokens: the decoded tokens whose queries were used.
        backend: which implementation scored.
        layer_importance: [len(layers), T] fp32, the importance by each layer alone, where it was asked for.
        reused_tokens: prompt tokens that the speculator did not compute again.
        attention: how the speculator read the prompt, "dense" or "sparse", and in words why.
    """

    importance: Tensor
    num_look_ahead: int
    layers: tuple[int, ...]
    look_ahead_tokens: tuple[int, ...]
    backend: str
    layer_importance: Tensor | None = None
    reused_tokens: int = 0
    attention: tuple[str, str] = ("dense", "")


def prompt_rows(config: SpecPrefillConfig) -> int:
    """How many of the last prompt rows are queries."""
    return {"look_ahead": 1, "observation_window": config.look_ahead, "both": config.observation_rows}[config.queries]


def look_ahead_rows(config: SpecPrefillConfig) -> int:
    """How many rows look ahead: the last prompt row and the decoded ones."""
    return 1 if config.queries == "observation_window" else config.look_ahead


def layer_indices(score_layers: Iterable[int], count: int, name: str = "score_layers") -> frozenset[int]:
    """The layers that these indices mean in a model of `count` layers; negative ones count from the last.

    Raises:
        ValueError: an index is outside of the model.
    """
    wanted = set()
    for layer in score_layers:
        if not -count <= layer < count:
            raise ValueError(f"{name}: expected indices in [-{count}, {count}), got {layer}")
        wanted.add(layer % count)
    return frozenset(wanted)


@torch.no_grad()
def score_captured(
    captured: Captured,
    config: SpecPrefillConfig,
    *,
    layers: Iterable[int] | None = None,
    per_layer: bool = False,
) -> Speculation:
    """Importance of each prompt token by the captured attention.

    `config` may differ from the one that was captured with, as long as every row that it scores was captured: after
    queries="both" with all layers, any `queries` with at most as many rows can be scored.

    Args:
        layers: score these alone. Default: `config.score_layers`, and all that were captured where that is None.
        per_layer: also give each layer's own importance. The total is the same to the last bit.

    Raises:
        NothingToScore: `window="skip"` left no layer, or attention was never captured.
        ValueError: a layer or a row that was not captured.
    """
    chosen = _chosen(captured, config, layers)
    passes = _passes(captured, config)
    rows = prompt_rows(config) + look_ahead_rows(config) - 1
    counted = max(part.first + part.valid for part in passes)

    def score(group: list[LayerCapture], state: Tensor) -> None:
        for part in passes:
            _score_group(group, state[:, part.first : part.first + part.rows], part, captured.seq_len, config)

    def finalize(state: Tensor) -> Tensor:
        return finalize_importance(
            state,
            torch.tensor([captured.seq_len], dtype=torch.int32, device=state.device),
            torch.tensor([counted], dtype=torch.int32, device=state.device),
            reduce=config.reduce,
            backend=config.backend,
            pool_kernel_size=config.pool_kernel_size if config.pool_order == "after_max" else None,
            pool_edge=config.pool_edge,
        )[0]

    home = next(iter(chosen.values())).key.device
    states: dict[torch.device, Tensor] = {}  # a model may be spread over devices; nearly always there is one
    alone: list[Tensor] = []
    for group in [[layer] for layer in chosen.values()] if per_layer else _groups(chosen.values()):
        device = group[0].key.device
        if device not in states:
            states[device] = new_state(1, rows, captured.seq_len, device=device)
        if per_layer:
            own = new_state(1, rows, captured.seq_len, device=device)
            score(group, own)
            alone.append(finalize(own).to(home))
            torch.maximum(states[device], own, out=states[device])
        else:
            score(group, states[device])
    state = states.pop(home)
    for other in states.values():
        state = torch.maximum(state, other.to(home))
    return Speculation(
        importance=finalize(state),
        num_look_ahead=counted,
        layers=tuple(chosen),
        look_ahead_tokens=captured.tokens[: look_ahead_rows(config) - 1],
        backend=resolve("score_layers", config.backend, home.type),
        layer_importance=torch.stack(alone) if per_layer else None,
        reused_tokens=captured.reused_tokens,
        attention=captured.attention,
    )


@torch.no_grad()
def layer_states(captured: Captured, config: SpecPrefillConfig) -> tuple[tuple[int, ...], int, Tensor]:
    """(layers, rows that count, [L, rows, T] fp32): the state that each layer alone leaves, for calibration.

    The state of any set of layers is the elementwise maximum of theirs; `finalize_importance` does the rest.
    """
    chosen, passes = _chosen(captured, config, None), _passes(captured, config)
    rows = prompt_rows(config) + look_ahead_rows(config) - 1
    states = []
    for layer in chosen.values():
        state = new_state(1, rows, captured.seq_len, device=layer.key.device)
        for part in passes:
            _score_group([layer], state[:, part.first : part.first + part.rows], part, captured.seq_len, config)
        states.append(state[0].cpu())
    return tuple(chosen), max(part.first + part.valid for part in passes), torch.stack(states)


@dataclass(frozen=True)
class _Pass:
    """Rows that one call of the op takes, and the rows of the state that they go to.

    Attributes:
        queries: what they are to `score_layers_`.
        prompt_rows: how many of them are the last prompt rows.
        decoded: how many are decoded rows.
        rows: how many, padding included, so that shapes do not depend on EOS or a short prompt.
        valid: how many without it.
        first: where they begin in the state.
    """

    queries: str
    prompt_rows: int
    decoded: int
    rows: int
    valid: int
    first: int

    def of(self, layer: LayerCapture) -> Tensor:
        """[B, rows, Hq, D]."""
        pieces = [layer.queries[0][:, -self.prompt_rows :], *layer.queries[1 : 1 + self.decoded]]
        if self.rows > self.valid:
            batch, _, heads, dim = pieces[0].shape
            pieces.append(pieces[0].new_zeros(batch, self.rows - self.valid, heads, dim))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _passes(captured: Captured, config: SpecPrefillConfig) -> list[_Pass]:
    """With queries="both" the last prompt row is the last of one pass and the first of the other. Both write it to the
    same row of the state, whose maximum with itself it is: so it counts once."""
    window, ahead = prompt_rows(config), look_ahead_rows(config)
    if window > captured.prompt_rows:
        name = "observation_rows" if config.queries == "both" else "look_ahead"
        raise ValueError(f"{name}: expected at most {captured.prompt_rows}, the prompt rows captured, got {window}")
    if ahead > captured.look_ahead:
        raise ValueError(f"look_ahead: expected at most {captured.look_ahead}, the rows captured, got {ahead}")
    observed = min(window, captured.seq_len)
    decoded = min(ahead - 1, len(captured.tokens))
    passes = []
    if config.queries != "look_ahead":
        passes.append(_Pass("observation_window", observed, 0, window, observed, 0))
    if config.queries != "observation_window":
        passes.append(_Pass("look_ahead", 1, decoded, ahead, 1 + decoded, observed - 1))
    return passes


def _score_group(
    group: Sequence[LayerCapture], state: Tensor, part: _Pass, seq_len: int, config: SpecPrefillConfig
) -> None:
    device = state.device
    score_layers_(
        state,
        [part.of(layer) for layer in group],
        [layer.key for layer in group],
        layout="bhtd",
        seq_lens=torch.tensor([seq_len], dtype=torch.int32, device=device),
        num_look_ahead=torch.tensor([part.valid], dtype=torch.int32, device=device),
        queries=part.queries,
        normalize_over=config.normalize_over,
        scale=group[0].scale,
        softcap=group[0].softcap,
        window=[layer.window for layer in group],
        pool_kernel_size=config.pool_kernel_size,
        pool_edge=config.pool_edge,
        pool_order=config.pool_order,
        backend=config.backend,
    )


def _chosen(captured: Captured, config: SpecPrefillConfig, layers: Iterable[int] | None) -> dict[int, LayerCapture]:
    """The layers to score, ascending."""
    found = dict(sorted(captured.layers.items()))
    if not found:
        raise NothingToScore("the speculator's attention was never called through AttentionInterface")
    name, asked = ("score_layers", config.score_layers) if layers is None else ("layers", tuple(layers))
    if asked is not None:
        wanted = layer_indices(asked, captured.num_layers, name)
        missing = sorted(wanted - set(found))
        if missing or not wanted:
            raise ValueError(f"{name}: expected some of the captured layers {sorted(found)}, got {missing or asked}")
        found = {i: layer for i, layer in found.items() if i in wanted}
    if config.window == "skip":
        found = {i: layer for i, layer in found.items() if layer.window is None or layer.window >= captured.seq_len}
        if not found:
            raise NothingToScore('every scored layer has a sliding window shorter than the prompt (window="skip")')
    return found


def _groups(layers: Iterable[LayerCapture]) -> Iterator[list[LayerCapture]]:
    """Layers that one call can take: one scale, softcap and shape. Nearly every model is one group."""
    groups: dict[tuple[Any, ...], list[LayerCapture]] = {}
    for layer in layers:
        piece, key = layer.queries[0], layer.key
        same = (layer.scale, layer.softcap, piece.shape[2:], key.shape, piece.dtype, key.dtype, key.device)
        groups.setdefault(same, []).append(layer)
    yield from groups.values()

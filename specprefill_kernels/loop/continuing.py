"""One model, one forward: the lower layers read the whole prompt, the upper ones only what the lower ones chose.

    layers 0 .. last       all T tokens; the last prompt rows' attention of layers first .. last is captured
    choose(captured)       which K tokens go on, in the middle of the forward
    layers last+1 ..       the K tokens' hidden states, at their original positions
    decode                 from position T on: the lower layers hold T cache entries, the upper ones K

GemFilter (Shi et al., arXiv 2409.17422) selects with early layers too, and then starts again from the first layer.
FastV (Chen et al., arXiv 2403.06764) and FastKV (Jo et al., arXiv 2502.01068) go on from the middle, as this does.

The cut is a forward pre-hook on the upper decoder layers, there for the length of one prefill and removed even by an
exception. It acts only in the context (`contextvars`) that registered it, so another thread that runs the same model
meanwhile sees none of it. Not safe: two threads in the loop on ONE model at once, because the model's config names one
attention function; that is noticed and raised as an error.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from specprefill_kernels.loop.attention import Attention, attention_configs, attention_handler, implementation_of
from specprefill_kernels.loop.cache import full_cache
from specprefill_kernels.loop.capture import Capture, LayerCapture
from specprefill_kernels.loop.prefill import PositionalAttention
from specprefill_kernels.loop.support import (
    check_continuing_layers,
    continuing_problem,
    decoder_layers,
    head_options,
    layer_types,
    num_layers,
)

Choose = Callable[[dict[int, LayerCapture]], Tensor]

_active: ContextVar["_Cut | None"] = ContextVar("specprefill_cut", default=None)


class ContinuingRun:
    """One sequence on one model whose upper layers read a part of the prompt; see this file's head.

    Args:
        model: a Transformers causal language model.
        layer_range: (first, last), both included: the layers whose attention is captured; at least one is above them.
        rows: last prompt rows whose queries are captured.
        room: tokens that will be decoded, as far as known.
        prefill_chunk: prompt tokens per forward of the lower layers, which bounds their activations and masks; None
            reads all at once. Where the lower layers have not all the attention types of the upper ones (a model that
            gives each type its own position embeddings), it has no effect.

    Attributes:
        cache: entry i is layer i's: T + decoded entries up to layer `last`, K + decoded above.
        kept: [K] int64, what `choose` returned; None before the prefill.

    Raises:
        ValueError: the layers, or the model, do not allow it.
    """

    def __init__(
        self,
        model: Any,
        layer_range: tuple[int, int],
        *,
        rows: int = 8,
        room: int = 256,
        prefill_chunk: int | None = None,
    ) -> None:
        self._count = num_layers(model)
        self._first, self._last = check_continuing_layers(layer_range, self._count)
        layers = decoder_layers(model)
        problem = continuing_problem(model)
        if problem is not None or layers is None:
            raise ValueError(f"model: expected one whose upper layers can read a part of the prompt, got {problem}")
        self._model = model
        self._layers = layers
        self._rows = rows
        types = layer_types(model)
        covered = set(types[self._last + 1 :]) <= set(types[: self._last + 1])
        self._chunk = prefill_chunk if covered else None
        self._configs = attention_configs(model)
        self._implementation = implementation_of(model)
        self._head = head_options(model)
        self._upper_positions: Tensor | None = None
        self._next_position = 0
        self._started = False
        self.cache = full_cache(self._count, room)
        self.kept: Tensor | None = None

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, choose: Choose) -> Tensor:
        """Read a prompt; returns the logits of its last token, [1, V] fp32.

        Args:
            input_ids: [1, T].
            choose: gets the captures of layers first .. last (queries of the last rows, keys of all T tokens) and
                returns the positions that go on: [K] int64, ascending, T - 1 among them. All T of them is a dense
                prefill. It must not run the model.

        Raises:
            ValueError: `choose` returned something else. Whatever `choose` raises comes through.
        """
        if self._started:
            raise RuntimeError("prefill: expected one call per run, got a second")
        self._started = True
        seq_len = input_ids.shape[1]
        positions = torch.arange(seq_len, device=input_ids.device)
        cut = _Cut(self._layers, self._last, choose, seq_len)
        sides = _Sides(self._configs, range(self._first, self._last + 1), self._last)
        bounds = self._bounds(seq_len)
        with cut.hooked(chunked=len(bounds) > 1):
            for start, end in bounds[:-1]:
                lower = self._positional(positions[start:end], positions[:end], seq_len)
                with attention_handler(self._configs, lower):
                    cut.read_chunk(lambda: self._forward(input_ids[:, start:end], positions[start:end]))  # noqa: B023
            start, end = bounds[-1]
            sides.lower = self._positional(positions[start:], positions, seq_len)

            def captured(kept: Tensor) -> None:
                self.kept = self._upper_positions = kept
                sides.upper = self._positional(kept, kept, seq_len)

            cut.arrived = captured
            cut.captured = sides.layers
            with sides.running(self._rows):
                logits = self._forward(input_ids[:, start:], positions[start:])
        sides.check(self._count)
        self._next_position = seq_len
        return logits

    @torch.no_grad()
    def step(self, token: Tensor) -> Tensor:
        """Feed one decoded token [1, 1] at the next position; returns its logits, [1, V] fp32."""
        if self._upper_positions is None or not self._next_position:
            raise RuntimeError("step: expected a prefill before it")
        position = torch.full((1,), self._next_position, dtype=torch.int64, device=token.device)
        self._next_position += 1
        self._upper_positions = torch.cat([self._upper_positions, position])
        sides = _Sides(self._configs, range(0), self._last)
        everything = torch.arange(self._next_position, device=token.device)
        sides.lower = self._positional(position, everything, self._next_position)
        sides.upper = self._positional(position, self._upper_positions, self._next_position)
        with sides.running(0):
            logits = self._forward(token, position)
        sides.check(self._count)
        return logits

    def _bounds(self, seq_len: int) -> list[tuple[int, int]]:
        """Chunks of the prompt; the last one holds every row that is captured."""
        chunk = seq_len if self._chunk is None else self._chunk
        starts = [start for start in range(0, seq_len, chunk) if start == 0 or seq_len - start >= self._rows]
        return list(zip(starts, [*starts[1:], seq_len]))

    def _positional(self, queries: Tensor, keys: Tensor, span: int) -> PositionalAttention:
        return PositionalAttention(self._implementation, queries, keys, span)

    def _forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        output = self._model(
            input_ids=input_ids,
            position_ids=positions[None],
            past_key_values=self.cache,
            use_cache=True,
            **self._head,
        )
        # A copy in fp32, like generate's own: logits processors write in place.
        logits: Tensor = output.logits[:, -1].to(copy=True, dtype=torch.float32)
        return logits


class _Sides(Capture):
    """Attention handler: the lower layers' positions or the upper ones', and the capture between."""

    lower: PositionalAttention
    upper: PositionalAttention

    def __init__(self, configs: list[Any], wanted: range, last: int) -> None:
        super().__init__(configs, frozenset(wanted))
        self._last = last
        self._seen: set[int] = set()

    def __call__(
        self,
        ordinary: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        layer: int = module.layer_idx  # type: ignore[assignment]  # `decoder_layers` made sure of it
        self._seen.add(layer)
        positional = self.lower if layer <= self._last else self.upper
        return super().__call__(partial(positional, ordinary), module, query, key, value, attention_mask, **kwargs)

    def check(self, count: int) -> None:
        if len(self._seen) != count:
            missing = sorted(set(range(count)) - self._seen)
            raise RuntimeError(
                f"the attention of layers {missing} did not come through AttentionInterface; does another thread run "
                "this model in a loop of its own?"
            )


class _ChunkDone(Exception):
    """Ends the forward of a chunk that is not the last; never leaves `_Cut.read_chunk`."""


class _Cut:
    """What happens between layer `last` and the next, and to the arguments of every layer from there on.

    The model's own loop hands each layer the same tensors for all T rows (position embeddings, ids, masks). Above the
    cut they are replaced: masks by None, the rest by their kept rows. With chunks, each lower layer's arguments are
    remembered, and an upper layer's are put together from those of the lower layer that got the very same tensor in
    the last chunk.
    """

    def __init__(self, layers: list[nn.Module], last: int, choose: Choose, seq_len: int) -> None:
        self.arrived: Callable[[Tensor], None]
        self.captured: dict[int, LayerCapture] = {}
        self._layers = layers
        self._last = last
        self._choose = choose
        self._seq_len = seq_len
        self._kept: Tensor | None = None
        self._partial = False  # a chunk is being read that is not the last
        self._chunked = False
        self._chunk_rows = seq_len
        self._hidden: list[Tensor] = []
        self._pieces: dict[tuple[Any, ...], list[Tensor]] = {}
        self._origin: dict[int, tuple[Any, ...]] = {}  # id of a tensor of this chunk -> where it was first seen
        self._taken: dict[int, tuple[Tensor, Tensor]] = {}  # id of a tensor -> itself (so that the id stays its), rows

    @contextmanager
    def hooked(self, *, chunked: bool) -> Iterator[None]:
        self._chunked = chunked
        token = _active.set(self)
        handles = []
        try:
            for index in range(0 if chunked else self._last + 1, len(self._layers)):
                hook = partial(self._enter, index)
                handles.append(self._layers[index].register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            _active.reset(token)
            self._hidden, self.captured = [], {}
            self._pieces, self._origin, self._taken = {}, {}, {}

    def read_chunk(self, forward: Callable[[], Any]) -> None:
        self._partial = True
        try:
            forward()
        except _ChunkDone:
            pass
        finally:
            self._partial = False
            self._origin = {}

    def _enter(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if _active.get() is not self:
            return None
        parameters = [*signature(layer.forward).parameters]
        first, names = parameters[0], parameters[: len(args)]  # the first is the hidden states, whatever their name
        hidden: Tensor = args[0] if args else kwargs[first]
        if index == 0:
            self._chunk_rows = hidden.shape[1]
        if index <= self._last:
            for name, value in [*zip(names, args), *kwargs.items()]:
                if name != first and "mask" not in name:
                    self._remember((index, name), value)
            return None
        if index == self._last + 1:
            self._hidden.append(hidden)
            if self._partial:
                raise _ChunkDone
            hidden = self._go_on()
        if not self._chunked and self._kept is not None and self._kept.shape[0] == self._seq_len:
            return None

        def replaced(name: str, value: Any) -> Any:
            if name == first:
                return hidden
            return None if "mask" in name else self._kept_rows(value)

        return (
            tuple(replaced(name, value) for name, value in zip(names, args)),
            {name: replaced(name, value) for name, value in kwargs.items()},
        )

    def _go_on(self) -> Tensor:
        """Ask which tokens go on; returns their hidden states, [1, K, H]."""
        token = _active.set(None)
        try:
            kept = checked_kept(self._choose(self.captured), self._seq_len)
        finally:
            _active.reset(token)
        self.captured = {}
        self._kept = kept
        self.arrived(kept)
        hidden = self._hidden[0] if len(self._hidden) == 1 else torch.cat(self._hidden, dim=1)
        self._hidden = []
        return hidden.index_select(1, kept.to(hidden.device))

    def _remember(self, where: tuple[Any, ...], value: Any) -> None:
        if isinstance(value, Tensor):
            if _rows_dim(value, self._chunk_rows) is not None and id(value) not in self._origin:
                self._origin[id(value)] = where
                self._pieces.setdefault(where, []).append(value)
        else:
            for key, item in _items(value):
                self._remember((*where, key), item)

    def _kept_rows(self, value: Any) -> Any:
        """`value` with the kept rows of every tensor in it that has one row per token."""
        if isinstance(value, Tensor):
            dim = _rows_dim(value, self._chunk_rows)
            if dim is None or self._kept is None:
                return value
            if id(value) not in self._taken:
                whole = value
                if self._chunked:
                    pieces = self._pieces.get(self._origin.get(id(value), ()), [])
                    if sum(piece.shape[dim] for piece in pieces) != self._seq_len:
                        raise RuntimeError(
                            "the upper layers get arguments that the lower ones did not; run with prefill_chunk=None"
                        )
                    whole = torch.cat(pieces, dim=dim)
                self._taken[id(value)] = (value, whole.index_select(dim, self._kept.to(whole.device)))
            return self._taken[id(value)][1]
        if isinstance(value, dict):
            return {key: self._kept_rows(item) for key, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self._kept_rows(item) for item in value)
        return value


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if type(value) in (tuple, list) else []


def _rows_dim(value: Tensor, rows: int) -> int | None:
    """The dimension of `rows` tokens: of [B, T, D] and [B, T], else of [3, B, T] (M-RoPE), else of [T] and [T, D]."""
    for dim in [1, *range(2, value.ndim), 0]:
        if dim < value.ndim and value.shape[dim] == rows:
            return dim
    return None


def checked_kept(kept: Any, seq_len: int) -> Tensor:
    """`kept` as [K] int64.

    Raises:
        ValueError: it is not ascending positions below `seq_len`, the last of which is `seq_len - 1`.
    """
    if not isinstance(kept, Tensor) or kept.ndim != 1 or kept.dtype not in (torch.int32, torch.int64):
        got = f"{kept.dtype} {list(kept.shape)}" if isinstance(kept, Tensor) else type(kept).__name__
        raise ValueError(f"kept: expected integer positions [K], got {got}")
    values = kept.tolist()
    if not values or values[-1] != seq_len - 1:
        got = values[-1] if values else "none"
        raise ValueError(f"kept: expected the last prompt token, {seq_len - 1}, to be the last, got {got}")
    if values[0] < 0 or any(left >= right for left, right in pairwise(values)):
        raise ValueError("kept: expected positions in [0, T), ascending, each once, got others")
    return kept.to(torch.int64)

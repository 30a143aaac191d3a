"""SGLang: scores straight from its KV pool, and says which slots and positions are kept. Not one key is copied.

SGLang holds the keys of all requests in one buffer per layer, `[slots, Hkv, D]`, and the slot of token t of a request
at `req_to_token[req_pool_index, t]`. That is a paged cache with pages of one token: the buffer seen as
`[slots, 1, Hkv, D]`, the row as block table. With `page_size` P > 1 the slots of a page follow each other, so the same
buffer is seen as `[slots / P, P, Hkv, D]` and every P-th entry of the row, divided by P, is the table. A pool in HND
order (`[pages, Hkv, P, D]`) is taken as it is.

SGLang itself is not imported: objects are taken by what they have (`req_to_token`, `get_key_buffer`, `page_size`), as
its classes of 0.5.23 have it: `ReqToTokenPool` and `MHATokenToKVPool`, and `SWAKVPool` and `HybridLinearKVPool` for
their full-attention layers. What cannot be read in place raises `UnsupportedPool` with the reason.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specprefill_kernels import _checks
from specprefill_kernels.config import SpecPrefillConfig
from specprefill_kernels.integrations._sglang_queries import QueryRecorder
from specprefill_kernels.ops.gather import gather_tokens
from specprefill_kernels.ops.score import new_state, score_layers_
from specprefill_kernels.ops.select import Selection
from specprefill_kernels.ops.select_tokens import select_tokens

__all__ = ["KeptTokens", "PoolKeys", "QueryRecorder", "UnsupportedPool", "pool_keys", "score", "select"]


class UnsupportedPool(ValueError):
    """The keys of this pool cannot be read where they lie; the message says why."""


@dataclass(frozen=True)
class PoolKeys:
    """Keys of a batch of requests where SGLang has them.

    Attributes:
        keys: one view of a layer's buffer for each of `layers`; shares the pool's memory.
        layout: "paged_nhd" or "paged_hnd", as `score_layers_` takes it.
        block_table: [B, pages] int32, the pages of each request.
        slots: [B, max_len] int32, the slot of each prompt token. Behind a prompt's end lies whatever its row holds.
        seq_lens: [B] integers, prompt tokens of each request.
        layers: layer ids, as SGLang counts them.
        page_size: tokens of a page.
    """

    keys: tuple[Tensor, ...]
    layout: str
    block_table: Tensor
    slots: Tensor
    seq_lens: Tensor
    layers: tuple[int, ...]
    page_size: int

    @property
    def max_len(self) -> int:
        """Positions that scores are kept for."""
        return self.slots.shape[1]


class KeptTokens(NamedTuple):
    """What the base model prefills, one request behind the other, padded to B * K.

    Attributes:
        positions: [B * K] int64, original positions: `ForwardBatch.positions`. 0 behind the last token.
        slots: [B * K] int32, the kept tokens' slots in the pool that was scored. 0 behind the last token, which is the
            slot that SGLang itself writes padding to.
        cu_seqlens: [B + 1] int32, where each request begins; its differences are SGLang's `extend_seq_lens`.
        input_ids: [B * K], the kept ids, if `select` was given ids.
        selection: what `select_chunks` returns.
        importance: [B, max_len] fp32.
    """

    positions: Tensor
    slots: Tensor
    cu_seqlens: Tensor
    input_ids: Tensor | None
    selection: Selection
    importance: Tensor


def pool_keys(
    req_to_token_pool: Any,
    token_to_kv_pool: Any,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    *,
    layers: Iterable[int] | None = None,
    max_len: int | None = None,
    look_ahead_keys: int = 0,
) -> PoolKeys:
    """Views of the pool's buffers and the table that finds these requests in them.

    Allocates B * max_len slots and their pages (int32), and nothing of the size of a key.

    Args:
        req_to_token_pool: has `req_to_token`, [requests, max_context_len] int32.
        token_to_kv_pool: has `get_key_buffer(layer_id)`, `page_size` and `start_layer`, `layer_num`.
        req_pool_indices: [B] integers, each request's row of `req_to_token`.
        seq_lens: [B] integers, prompt tokens of each request whose keys are in the pool. During decoding SGLang's own
            `seq_lens` counts decoded tokens too: take those of the prompt.
        layers: layer ids. Default: all that the pool holds for full attention.
        max_len: at least the longest prompt. Default: the longest, which copies a number from the device.
        look_ahead_keys: tokens behind the prompts that scoring reads too, N - 1 with normalize_over="visible".

    Raises:
        UnsupportedPool: the keys cannot be read in place (latent keys, quantized with scales of their own, virtual
            slots, a sliding-window layer with a pool of its own, an unknown order).
        ValueError: an argument is wrong; on CPU tensors also a row, a length, or a page whose slots do not follow each
            other.
    """
    table = _attribute("req_to_token_pool", req_to_token_pool, "req_to_token")
    _checks.tensor("req_to_token", table, ndim=2, dtypes=_checks.INTEGERS, what="[requests, max_context_len]")
    _checks.tensor("req_pool_indices", req_pool_indices, ndim=1, dtypes=_checks.INTEGERS, device=table.device)
    batch = req_pool_indices.shape[0]
    if batch == 0:
        _checks.fail("req_pool_indices", "at least one request", "none")
    sizes = (batch,)
    _checks.tensor("seq_lens", seq_lens, ndim=1, dtypes=_checks.INTEGERS, device=table.device, sizes=sizes, what="[B]")
    _checks.integer("look_ahead_keys", look_ahead_keys, 0)
    if max_len is None:
        max_len = int(seq_lens.max())
    _checks.integer("max_len", max_len, 1)
    width = max_len + look_ahead_keys
    if width > table.shape[1]:
        _checks.fail("max_len", f"at most {table.shape[1]} tokens with look_ahead_keys, as req_to_token holds", width)
    if table.device.type == "cpu":
        _check_rows(req_pool_indices, seq_lens, table.shape[0], max_len)
    page_size = _attribute("token_to_kv_pool", token_to_kv_pool, "page_size")
    _checks.integer("token_to_kv_pool.page_size", page_size, 1)
    chosen = _layers(token_to_kv_pool, layers)
    views = [_view(token_to_kv_pool, layer, page_size, table.device) for layer in chosen]
    if len({layout for _, layout in views}) > 1:
        raise UnsupportedPool("token_to_kv_pool: expected one order for all layers, got both NHD and HND; score each")
    slots = table[:, :width].index_select(0, req_pool_indices).to(torch.int32)
    pages = slots
    if page_size > 1:
        if table.device.type == "cpu":
            _check_pages(slots, seq_lens + look_ahead_keys, page_size)
        pages = slots[:, ::page_size] // page_size
    return PoolKeys(
        keys=tuple(key for key, _ in views),
        layout=views[0][1],
        block_table=pages,
        slots=slots[:, :max_len],
        seq_lens=seq_lens,
        layers=chosen,
        page_size=page_size,
    )


def score(
    pool: PoolKeys,
    queries_per_layer: Sequence[Tensor],
    *,
    config: SpecPrefillConfig | None = None,
    num_look_ahead: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | Sequence[int | None] | None = None,
    lse: Sequence[Tensor] | None = None,
    key_scale: Sequence[float | Tensor] | None = None,
    recorded_lens: Tensor | None = None,
    state: Tensor | None = None,
) -> Tensor:
    """Fold these layers' attention into a state, read from the pool in place.

    Args:
        pool: from `pool_keys`, of the speculator's pools.
        queries_per_layer: for each of `pool.layers` [B, N, Hq, D] after RoPE, as `QueryRecorder` keeps them: row 0 of
            the last prompt token, the others of the decoded tokens; with queries="observation_window" the last N
            prompt tokens.
        config: how it is scored (`queries`, `normalize_over`, `pool_*`, `reduce`, `backend`). Default: preset
            "default". queries="both" takes two calls with one `state`, and is refused here.
        num_look_ahead: [B] integers in [1, N], rows that count.
        scale, softcap: `RadixAttention.scaling` and `logit_cap` (None where it is 0).
        window: keys that a sliding-window layer's row sees, itself included, one for each layer (None: all):
            `RadixAttention.sliding_window_size + 1` where that is not -1.
        lse: [B, N, Hq] fp32 per layer, if attention returned it.
        key_scale: per layer, `RadixAttention.k_scale_float`. Default: 1. Only fp8 keys are multiplied by it: SGLang
            stores keys divided by it in fp8, and undivided in the model's own dtype.
        recorded_lens: [layers, B] integers, from `QueryRecorder.options`: tokens of each request when its rows were
            recorded. Compared with the pool's, which copies a bool from the device. Default: nothing is compared.
        state: one from before, for more layers. Default: a new one, of one row where that is enough (reduce="max",
            pool_order="before_max").

    Returns:
        [B, N or 1, max_len] fp32. With tensor parallelism each rank holds its own heads' maximum:
        `torch.distributed.all_reduce(state, ReduceOp.MAX, group)` joins them.

    Raises:
        ValueError: as `score_layers_`, whose arguments these are.
    """
    config = _config(config)
    if config.queries == "both":
        _checks.fail("config.queries", "'look_ahead' or 'observation_window'", "'both'")
    _check_queries(pool, queries_per_layer)
    same = recorded_lens is None or recorded_lens.shape[-1:] == pool.seq_lens.shape
    if recorded_lens is not None and not (same and bool((recorded_lens == pool.seq_lens).all())):
        got = f"{recorded_lens.tolist()}; the last prefill was perhaps replayed by a CUDA graph"
        _checks.fail("recorded_lens", f"rows of these prompts' ends, {pool.seq_lens.tolist()} tokens", got)
    rows = queries_per_layer[0].shape[1]
    if config.queries == "look_ahead" and config.normalize_over == "visible":
        needed = -(-(pool.max_len + rows - 1) // pool.page_size)
        if pool.block_table.shape[1] < needed:
            _checks.fail("pool", f"look_ahead_keys of {rows - 1}, as normalize_over='visible' reads them", "fewer")
    if state is None:
        # Pooling after the maximum comes before the reduction over rows: then their maximum alone is not enough.
        kept_rows = 1 if config.reduce == "max" and config.pool_order == "before_max" else rows
        state = new_state(pool.slots.shape[0], kept_rows, pool.max_len, device=pool.slots.device)
    return score_layers_(
        state,
        list(queries_per_layer),
        list(pool.keys),
        layout=pool.layout,
        seq_lens=pool.seq_lens,
        block_table=pool.block_table,
        num_look_ahead=num_look_ahead,
        queries=config.queries,
        normalize_over=config.normalize_over,
        scale=scale,
        softcap=softcap,
        window=window,
        lse=lse,
        key_scale=_scales_of_fp8(pool.keys, key_scale),
        pool_kernel_size=config.pool_kernel_size,
        pool_edge=config.pool_edge,
        pool_order=config.pool_order,
        backend=config.backend,
    )


def select(
    pool: PoolKeys,
    state: Tensor,
    *,
    config: SpecPrefillConfig | None = None,
    num_look_ahead: Tensor | None = None,
    protect: Tensor | None = None,
    input_ids: Tensor | None = None,
) -> KeptTokens:
    """The kept tokens of each request: their original positions and their slots.

    Args:
        pool, config, num_look_ahead: those that were scored with.
        state: from `score`.
        protect: [B, max_len] bool, tokens that must survive (a config's protect="template" needs text, and has no
            effect here). `config.sink` and `config.tail` count.
        input_ids: [B, max_len], or flat as SGLang has them, [sum of seq_lens] (whose length is compared with theirs:
            that copies a number from the device).

    Raises:
        ValueError: as `select_tokens`.
    """
    config = _config(config)
    if not isinstance(pool, PoolKeys):
        raise TypeError(f"pool: expected a PoolKeys, got {type(pool).__name__}")
    if isinstance(state, Tensor) and state.ndim == 3 and state.shape[::2] != pool.slots.shape:
        wanted = f"[{pool.slots.shape[0]}, *, {pool.max_len}]"
        _checks.fail("state", f"shape {wanted}, as pool has", f"shape {_checks.shape(state)}")
    one_row = isinstance(state, Tensor) and state.ndim == 3 and state.shape[1] == 1
    packed, selection, importance = select_tokens(
        state,
        pool.slots,
        pool.seq_lens,
        None if one_row else num_look_ahead,
        reduce=config.reduce,
        chunk_size=config.chunk_size,
        rounding=config.rounding,
        protect=protect,
        sink=config.sink,
        tail=config.tail,
        pool_kernel_size=config.pool_kernel_size if config.pool_order == "after_max" else None,
        pool_edge=config.pool_edge,
        backend=config.backend,
        **config.budget,
    )
    ids = None
    if input_ids is not None:
        _checks.tensor("input_ids", input_ids, ndim=(1, 2), dtypes=_checks.INTEGERS, device=pool.slots.device)
        starts = None
        if input_ids.ndim == 1:
            starts = torch.nn.functional.pad(pool.seq_lens.cumsum(0), (1, 0))
            if int(starts[-1]) > input_ids.shape[0]:  # a batch whose prefixes were cached has only the rest
                _checks.fail("input_ids", f"the ids of whole prompts, {int(starts[-1])}", input_ids.shape[0])
        ids = gather_tokens(input_ids, selection, cu_seqlens=starts, backend=config.backend).values
    return KeptTokens(packed.position_ids, packed.values, packed.cu_seqlens, ids, selection, importance)


def _attribute(name: str, value: Any, attribute: str) -> Any:
    if not hasattr(value, attribute):
        raise TypeError(f"{name}: expected SGLang's pool with `{attribute}`, got {type(value).__name__}")
    return getattr(value, attribute)


def _config(config: SpecPrefillConfig | None) -> SpecPrefillConfig:
    if config is None:
        return SpecPrefillConfig.preset("default")
    if not isinstance(config, SpecPrefillConfig):
        raise TypeError(f"config: expected a SpecPrefillConfig, got {type(config).__name__}")
    return config


def _check_queries(pool: PoolKeys, queries: Sequence[Tensor]) -> None:
    if not isinstance(pool, PoolKeys):
        raise TypeError(f"pool: expected a PoolKeys, got {type(pool).__name__}")
    if not isinstance(queries, (list, tuple)):
        raise TypeError(f"queries_per_layer: expected a list of tensors, got {type(queries).__name__}")
    if len(queries) != len(pool.keys):
        _checks.fail("queries_per_layer", f"{len(pool.keys)} tensors, one for each of pool.layers", len(queries))
    _checks.tensor("queries_per_layer[0]", queries[0], ndim=4, what="[B, N, Hq, D]")


def _scales_of_fp8(keys: Sequence[Tensor], scales: Any) -> Any:
    if not isinstance(scales, (list, tuple)) or len(scales) != len(keys):
        return scales  # the op says what is wrong
    return [one if key.dtype in _checks.FP8 else 1.0 for one, key in zip(scales, keys)]


def _check_rows(rows: Tensor, seq_lens: Tensor, requests: int, max_len: int) -> None:
    for b, row in enumerate(rows.tolist()):
        if not 0 <= row < requests:
            _checks.fail(f"req_pool_indices[{b}]", f"a row of req_to_token in [0, {requests})", row)
    _checks.length_values(seq_lens, max_len, rows.shape[0])


def _check_pages(slots: Tensor, lengths: Tensor, page_size: int) -> None:
    """Slots of a page follow each other, from a multiple of the page size on."""
    at = torch.arange(slots.shape[1])
    expected = slots[:, ::page_size].repeat_interleave(page_size, 1)[:, : len(at)] // page_size * page_size
    wrong = (slots != expected + at % page_size) & (at < lengths[:, None])
    if bool(wrong.any()):
        b, t = wrong.nonzero()[0].tolist()
        wanted = f"{int(expected[b, t]) + t % page_size}, as pages of {page_size} tokens lie"
        _checks.fail(f"slot of token {t} of request {b}", wanted, int(slots[b, t]))


def _layers(pool: Any, layers: Iterable[int] | None) -> tuple[int, ...]:
    """Layer ids; those that this pool holds with pages of their own are refused."""
    mapped = getattr(pool, "layers_mapping", None)  # of a pool with sliding-window layers: id -> (id in pool, sliding)
    full = getattr(pool, "full_attention_layer_id_mapping", None)  # of a pool with linear-attention layers
    if mapped is not None:
        held = {layer for layer, (_, sliding) in mapped.items() if not sliding}
    elif full is not None:
        held = set(full)
    else:
        start = getattr(pool, "start_layer", None) or 0
        held = set(range(start, start + _attribute("token_to_kv_pool", pool, "layer_num")))
    if layers is None:
        chosen = tuple(sorted(held))
    else:
        chosen = tuple(layers)
        for layer in chosen:
            _checks.integer("layers", layer, 0)
            if mapped is not None and layer in mapped and layer not in held:
                raise UnsupportedPool(
                    f"layers: layer {layer} has a sliding window and a pool of its own, whose slots of tokens outside "
                    f"of the window are gone; take from {sorted(held)}"
                )
            if layer not in held:
                _checks.fail("layers", f"layers of this pool, {sorted(held)}", layer)
    if not chosen or len(set(chosen)) != len(chosen):
        _checks.fail("layers", "at least one layer, each once", chosen)
    return chosen


def _view(pool: Any, layer: int, page_size: int, device: torch.device) -> tuple[Tensor, str]:
    """(the layer's buffer as pages, its layout). Never a copy: the pool is asked first whether it would make one."""
    inner = [pool, *(getattr(pool, name) for name in ("full_kv_pool",) if hasattr(pool, name))]
    for one in inner:
        if hasattr(one, "kv_lora_rank"):
            raise UnsupportedPool(f"token_to_kv_pool: {type(one).__name__} holds latent keys (MLA), not keys of heads")
        if getattr(one, "is_quantized_kv_cache", False) or getattr(one, "k_scale_buffer", None) is not None:
            raise UnsupportedPool(
                f"token_to_kv_pool: {type(one).__name__} holds keys in blocks with scales of their own, which would "
                "have to be copied to be read; fp8 with one scale for each layer or head is fine"
            )
        if getattr(one, "requires_physical_write_loc", False):
            raise UnsupportedPool(f"token_to_kv_pool: {type(one).__name__} counts in virtual slots")
    key = _attribute("token_to_kv_pool", pool, "get_key_buffer")(layer)
    name = f"get_key_buffer({layer})"
    _checks.tensor(name, key, dtypes=(*_checks.FLOATS, *_checks.FP8), device=device)
    order = getattr(inner[-1], "kv_cache_layout", "nhd")
    if order == "hnd" and key.ndim == 4:
        if key.shape[2] != page_size:
            _checks.fail(name, f"shape [pages, Hkv, {page_size}, D]", f"shape {_checks.shape(key)}")
        return key, "paged_hnd"
    if order != "nhd" or key.ndim != 3:
        raise UnsupportedPool(
            f"token_to_kv_pool: expected [slots, Hkv, D] in order 'nhd' or [pages, Hkv, page_size, D] in 'hnd', got "
            f"shape {_checks.shape(key)} in order {order!r}"
        )
    if key.shape[0] < page_size:
        _checks.fail(name, f"at least one page of {page_size} slots", f"shape {_checks.shape(key)}")
    pages = key.shape[0] // page_size  # slots behind the last whole page are never given out
    return key[: pages * page_size].unflatten(0, (pages, page_size)), "paged_nhd"

"""What is measured: for each op and shape its inputs, the call, the right result and the bytes it must move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import specprefill_kernels as spk
from bench import shapes, traffic, truth
from bench.shapes import CHUNK, KEEP_RATIO, LOOK_AHEAD, Model, size_name

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


@dataclass
class Problem:
    """One row of the table.

    Attributes:
        call: runs the op on a backend, again and again on the same inputs.
        result: the tensors to be checked, from a call on fresh outputs.
        expected: what they must be; computed when it is asked for.
        rtol: relative tolerance of floating-point results; integers must be equal.
    """

    op: str
    shape: str
    traffic: int
    call: Callable[[str], object]
    result: Callable[[str], list[Tensor]]
    expected: Callable[[], list[Tensor]]
    rtol: float = 0.0


class WrongResult(AssertionError):
    """A backend's result is not what it must be, so its time says nothing."""


def verify(problem: Problem, backend: str, expected: list[Tensor]) -> None:
    """Refuse a backend whose result is wrong, before it is timed."""
    where = f"{problem.op} {problem.shape} on {backend}"
    for i, (got, wanted) in enumerate(zip(problem.result(backend), expected, strict=True)):
        if got.shape != wanted.shape:
            raise WrongResult(f"{where}: result {i} is {tuple(got.shape)}, not {tuple(wanted.shape)}")
        if not wanted.dtype.is_floating_point:
            wrong = int((got.long() != wanted.long()).sum())
            if wrong:
                raise WrongResult(f"{where}: {wrong} of {got.numel()} elements of result {i} differ")
            continue
        error = (got.double() - wanted.double()).abs()
        limit = problem.rtol * wanted.double().abs() + 1e-9 * (problem.rtol > 0)
        if not bool((error <= limit).all()):  # NaN fails too
            raise WrongResult(f"{where}: result {i} is off by {float(error.max()):.3g}")


Makers = list[tuple[str, Callable[[], Problem]]]


def problems(device: str, quick: bool = False, only: str = "") -> Makers:
    """All rows as (op, what makes the problem): the inputs of one are made when those before it are done with."""
    models = shapes.QUICK_MODELS if quick else shapes.MODELS
    prompts, long = (shapes.QUICK_PROMPTS, shapes.QUICK_LONG) if quick else (shapes.PROMPTS, shapes.LONG)
    largest, last = models[-1], prompts[-1]
    several = models[min(1, len(models) - 1)]
    makers: Makers = [("score_layer", partial(score, device, m, tokens)) for m in models for tokens in prompts]
    makers += [("score_layer", partial(score, device, m, last, lse=True)) for m in models]
    makers.append(("score_layer", partial(score, device, largest, last, dtype=E4M3)))
    makers.append(("score_layer", partial(score, device, largest, last, paged=True)))
    makers.append(("score_layers", partial(score_layers, device, several, prompts[len(prompts) // 2])))
    makers.append(("select_chunks", partial(select_many, device, *(shapes.QUICK_MANY if quick else shapes.MANY))))
    for op, make in (("select_chunks", select), ("select_tokens", select_tokens), ("finalize_importance", finalize)):
        makers += [(op, partial(make, device, tokens)) for tokens in long]
    makers += [("gather_tokens", partial(gather_tokens, device, tokens, 0)) for tokens in long]
    makers.append(("gather_tokens", partial(gather_tokens, device, long[0], 2048)))
    for m in dict.fromkeys((models[0], largest)):
        makers += [("gather_kv", partial(gather_kv, device, m, last, layout)) for layout in ("bhtd", "paged_nhd")]
    return [(op, make) for op, make in makers if only in op]


def _random(device: str, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Never zeros: those hide unwritten outputs and run faster than data does."""
    return torch.randn(shape, generator=torch.Generator(device=device).manual_seed(seed), device=device).to(dtype)


def _paged(key: Tensor, block: int = 16) -> tuple[Tensor, Tensor]:
    """[Hkv, T, D] as shuffled blocks [T / block, block, Hkv, D], and the table [1, T / block]."""
    blocks = key.transpose(0, 1).reshape(-1, block, key.shape[0], key.shape[2])
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0)).to(key.device)
    return blocks[order.argsort()], order[None].int()


def score(
    device: str, m: Model, tokens: int, *, lse: bool = False, dtype: torch.dtype = BF16, paged: bool = False
) -> Problem:
    query = _random(device, 1, LOOK_AHEAD, m.query_heads, m.head_dim, dtype=BF16) * 2
    dense = _random(device, m.kv_heads, tokens, m.head_dim, dtype=dtype, seed=1)
    options: dict = {"lse": truth.lse(query[0], dense.to(BF16))[None]} if lse else {}
    key = dense[None]
    if paged:
        key, options["block_table"] = _paged(dense)
        options |= {"layout": "paged_nhd", "seq_lens": torch.tensor([tokens], dtype=torch.int32, device=device)}
    kept = spk.new_state(1, LOOK_AHEAD, tokens, device=device)

    def run(backend: str, state: Tensor) -> Tensor:
        return spk.score_layer_(state, query, key, backend=backend, **options)

    moved = traffic.score(
        LOOK_AHEAD, m.query_heads, m.kv_heads, m.head_dim, tokens, key=dtype.itemsize, query=BF16.itemsize, lse=lse
    )
    notes = " lse" * lse + " e4m3" * (dtype == E4M3) + " paged" * paged
    return Problem(
        "score_layer",
        f"{m.name} {size_name(tokens)}{notes}",
        moved,
        lambda backend: run(backend, kept),
        lambda backend: [run(backend, torch.zeros_like(kept))[0]],
        lambda: [truth.state(query[0], dense.to(BF16))],
        rtol=1e-4,
    )


def score_layers(device: str, m: Model, tokens: int) -> Problem:
    queries = [_random(device, 1, LOOK_AHEAD, m.query_heads, m.head_dim, dtype=BF16, seed=i) for i in range(m.layers)]
    keys = [_random(device, 1, m.kv_heads, tokens, m.head_dim, dtype=BF16, seed=100 + i) for i in range(m.layers)]
    kept = spk.new_state(1, LOOK_AHEAD, tokens, device=device)
    one = traffic.score(LOOK_AHEAD, m.query_heads, m.kv_heads, m.head_dim, tokens, key=2, query=2, lse=False)

    def expected() -> list[Tensor]:
        best = torch.zeros(LOOK_AHEAD, tokens, dtype=torch.float64, device=device)
        for query, key in zip(queries, keys, strict=True):
            best = torch.maximum(best, truth.state(query[0], key[0]))
        return [best]

    return Problem(
        "score_layers",
        f"{m.name} {size_name(tokens)} x{m.layers}",
        traffic.score_layers(m.layers, LOOK_AHEAD, tokens, one),
        lambda backend: spk.score_layers_(kept, queries, keys, backend=backend),
        lambda backend: [spk.score_layers_(torch.zeros_like(kept), queries, keys, backend=backend)[0]],
        expected,
        rtol=1e-4,
    )


def finalize(device: str, tokens: int) -> Problem:
    state = _random(device, 1, LOOK_AHEAD, tokens).abs()
    return Problem(
        "finalize_importance",
        size_name(tokens),
        traffic.finalize(LOOK_AHEAD, tokens),
        lambda backend: spk.finalize_importance(state, backend=backend),
        lambda backend: [spk.finalize_importance(state, backend=backend)],
        lambda: [state.double().mean(1)],
        rtol=2e-6,
    )


def _kept(importance: Tensor) -> Tensor:
    chunks = traffic.kept_tokens(len(importance), KEEP_RATIO, CHUNK) // CHUNK
    return truth.kept(importance, max(1, chunks), CHUNK)


def select(device: str, tokens: int) -> Problem:
    importance = _random(device, 1, tokens).abs()

    def run(backend: str) -> spk.Selection:
        return spk.select_chunks(importance, keep_ratio=KEEP_RATIO, chunk_size=CHUNK, backend=backend)

    return Problem(
        "select_chunks",
        size_name(tokens),
        traffic.select(tokens, traffic.kept_tokens(tokens, KEEP_RATIO, CHUNK)),
        run,
        lambda backend: [_valid(run(backend))],
        lambda: [_kept(importance[0])],
    )


def select_many(device: str, prompts: int, tokens: int) -> Problem:
    """A server's batch: many short prompts of whole chunks in one call, so that all keep equally many."""
    importance = _random(device, prompts, tokens).abs()

    def run(backend: str) -> spk.Selection:
        return spk.select_chunks(importance, keep_ratio=KEEP_RATIO, chunk_size=CHUNK, backend=backend)

    one = traffic.select(tokens, traffic.kept_tokens(tokens, KEEP_RATIO, CHUNK))
    return Problem(
        "select_chunks",
        f"{prompts} x {size_name(tokens)}",
        prompts * one,
        run,
        lambda backend: [run(backend).indices],
        lambda: [torch.stack([_kept(row) for row in importance])],
    )


def _valid(selection: spk.Selection) -> Tensor:
    return selection.indices[0, : int(selection.num_kept[0])].long()


def _selection(device: str, tokens: int) -> spk.Selection:
    importance = _random(device, 1, tokens).abs()
    return spk.select_chunks(importance, keep_ratio=KEEP_RATIO, chunk_size=CHUNK, backend="reference")


def gather_tokens(device: str, tokens: int, hidden: int) -> Problem:
    """Token ids, or embeddings of `hidden` bf16 each."""
    ids = torch.arange(tokens, device=device)[None] * 7 + 1
    x = _random(device, 1, tokens, hidden, dtype=BF16) if hidden else ids
    selection = _selection(device, tokens)
    kept = _valid(selection)

    def run(backend: str) -> spk.Packed:
        return spk.gather_tokens(x, selection, backend=backend)

    token_bytes = 2 * hidden if hidden else 8
    return Problem(
        "gather_tokens",
        f"{size_name(tokens)} {f'x {hidden} bf16' if hidden else 'ids'}",
        traffic.gather_tokens(len(kept), token_bytes),
        run,
        lambda backend: [run(backend).values[: len(kept)], run(backend).position_ids[: len(kept)]],
        lambda: [x[0, kept], kept],
    )


def gather_kv(device: str, m: Model, tokens: int, layout: str) -> Problem:
    caches = [_random(device, m.kv_heads, tokens, m.head_dim, dtype=BF16, seed=i) for i in range(2)]
    selection = _selection(device, tokens)
    kept = _valid(selection)
    given, tables = [cache[None] for cache in caches], {}
    if layout == "paged_nhd":
        (key, table), (value, _) = (_paged(cache) for cache in caches)
        given, tables = [key, value], {"block_table": table}

    def run(backend: str) -> tuple[Tensor, Tensor]:
        return spk.gather_kv(*given, selection, layout=layout, backend=backend, **tables)

    def result(backend: str) -> list[Tensor]:
        outs = run(backend)
        if layout == "bhtd":
            return [out[0, :, : len(kept)] for out in outs]
        return [out.flatten(0, 1)[: len(kept)].transpose(0, 1) for out in outs]

    return Problem(
        "gather_kv",
        f"{m.name} {size_name(tokens)} {layout}",
        traffic.gather_kv(len(kept), m.kv_heads, m.head_dim, BF16.itemsize),
        run,
        result,
        lambda: [cache[:, kept] for cache in caches],
    )


def select_tokens(device: str, tokens: int) -> Problem:
    state = _random(device, 1, LOOK_AHEAD, tokens).abs()
    ids = torch.arange(tokens, device=device)[None] * 7 + 1

    def run(backend: str) -> spk.TokenSelection:
        return spk.select_tokens(state, ids, keep_ratio=KEEP_RATIO, chunk_size=CHUNK, backend=backend)

    def result(backend: str) -> list[Tensor]:
        packed, selection, importance = run(backend)
        count = int(selection.num_kept[0])
        # Which chunks are best follows from this backend's own importance, whose last bits may differ.
        missing = _valid(selection).shape != _kept(importance[0]).shape or bool(
            (_valid(selection) != _kept(importance[0])).any()
        )
        positions = packed.position_ids[:count]
        return [importance, packed.values[:count] - (positions * 7 + 1), torch.tensor([missing])]

    kept = traffic.kept_tokens(tokens, KEEP_RATIO, CHUNK)
    return Problem(
        "select_tokens",
        f"{size_name(tokens)} ids",
        traffic.select_tokens(LOOK_AHEAD, tokens, kept, 8),
        run,
        result,
        lambda: [state.double().mean(1), torch.zeros(kept, dtype=torch.int64, device=device), torch.tensor([False])],
        rtol=2e-6,
    )

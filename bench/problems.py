"""What is measured: for each op and shape its inputs, the call, the right result and the bytes it must move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import specprefill_kernels as spk
from bench import eager, operations, shapes, traffic, truth
from bench.shapes import CHUNK, KEEP_RATIO, LOOK_AHEAD, Grid, Model, layers_within, size_name

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
# An eager form of more scores than this is timed on fewer layers: it is a loop over layers, each as slow as the next.
EAGER_SCORES = 2**24


@dataclass
class Problem:
    """One row of the table.

    Attributes:
        call: runs the op on a backend, again and again on the same inputs.
        result: the tensors to be checked, from a call on fresh outputs.
        expected: what they must be; computed when it is asked for.
        rtol: relative tolerance of floating-point results; integers must be equal.
        tokens: the prompt's length, the tables' T.
        flops: operations that must be made.
        dtype: of the keys, or of what else is read most.
        layers: how many are scored, and of_layers how many the model has.
        eager: the plain form to compare with; without one, the backend "reference".
        eager_times: what to multiply its time by, where it ran on fewer layers.
        eager_check: a result of the plain form, and what it must be.
        tensors: of scores, each layer's query and key.
    """

    op: str
    shape: str
    traffic: int
    call: Callable[[str], object]
    result: Callable[[str], list[Tensor]]
    expected: Callable[[], list[Tensor]]
    rtol: float = 0.0
    tokens: int = 0
    flops: int = 0
    dtype: str = "float32"
    layers: int = 1
    of_layers: int = 1
    eager: Callable[[], object] | None = None
    eager_times: float = 1.0
    eager_check: Callable[[], tuple[list[Tensor], list[Tensor]]] | None = None
    tensors: tuple[list[Tensor], list[Tensor]] | None = None


class WrongResult(AssertionError):
    """A backend's result is not what it must be, so its time says nothing."""


def verify(problem: Problem, backend: str, expected: list[Tensor]) -> None:
    """Refuse a backend whose result is wrong, before it is timed."""
    compare(f"{problem.op} {problem.shape} on {backend}", problem.result(backend), expected, problem.rtol)


def verify_plain(problem: Problem, expected: list[Tensor]) -> None:
    """The same of the plain form, on as many layers as it is timed on."""
    if problem.eager is None:
        verify(problem, "reference", expected)
    elif problem.eager_check is not None:
        compare(f"{problem.op} {problem.shape}, eager", *problem.eager_check(), problem.rtol)


def compare(where: str, results: list[Tensor], expected: list[Tensor], rtol: float) -> None:
    """Raises WrongResult: integers must be equal, others within rtol."""
    for i, (got, wanted) in enumerate(zip(results, expected, strict=True)):
        if got.shape != wanted.shape:
            raise WrongResult(f"{where}: result {i} is {tuple(got.shape)}, not {tuple(wanted.shape)}")
        if not wanted.dtype.is_floating_point:
            wrong = int((got.long() != wanted.long()).sum())
            if wrong:
                raise WrongResult(f"{where}: {wrong} of {got.numel()} elements of result {i} differ")
            continue
        error = (got.double() - wanted.double()).abs()
        limit = rtol * wanted.double().abs() + 1e-9 * (rtol > 0)
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


def grid_problems(device: str, grid: Grid, key_bytes: int, only: str = "") -> Makers:
    """The rows of `pytest bench/`: scores of every model, prompt and type, layouts once, and what follows scoring."""
    dtypes = [getattr(torch, name) for name in grid.dtypes]
    largest, last = grid.models[-1], grid.prompts[-1]
    makers: Makers = [
        (
            "score_layers",
            partial(score_layers, device, m, tokens, dtype, layers_within(m, tokens, dtype.itemsize, key_bytes)),
        )
        for m in grid.models
        for tokens in grid.prompts
        for dtype in dtypes
    ]
    makers += [("score_layer", partial(score, device, largest, tokens)) for tokens in grid.prompts]
    for options in ({"lse": True}, {"paged": True}, {"dtype": E4M3}):
        makers.append(("score_layer", partial(score, device, largest, last, **options)))
    makers.append(("select_chunks", partial(select_many, device, *grid.many)))
    for op, make in (("select_chunks", select), ("select_tokens", select_tokens), ("finalize_importance", finalize)):
        makers += [(op, partial(make, device, tokens)) for tokens in grid.long]
    makers += [("gather_tokens", partial(gather_tokens, device, tokens, 0)) for tokens in grid.long]
    makers.append(("gather_tokens", partial(gather_tokens, device, last, 2048)))
    makers += [("gather_kv", partial(gather_kv, device, largest, last, layout)) for layout in ("bhtd", "paged_nhd")]
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
        tokens=tokens,
        flops=operations.score(LOOK_AHEAD, m.query_heads, m.head_dim, tokens),
        dtype=_name(dtype),
        of_layers=m.layers,
        eager=lambda: eager.score_layers([query[0]], [dense]),
        eager_check=lambda: ([eager.score_layers([query[0]], [dense])], [truth.state(query[0], dense.to(BF16))]),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def layer_tensors(
    device: str, m: Model, tokens: int, dtype: torch.dtype, layers: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Queries [1, N, Hq, D] and keys [1, Hkv, T, D] of so many layers, each layer's in memory of its own.

    The keys are one random tensor's, turned along the prompt and negated in every other layer: as distinct as random
    ones, made as fast as they are copied.
    """
    queries = [_random(device, 1, LOOK_AHEAD, m.query_heads, m.head_dim, dtype=dtype, seed=i) for i in range(layers)]
    first = _random(device, 1, m.kv_heads, tokens, m.head_dim, dtype=dtype, seed=100)
    others = [torch.roll(first, 977 * i, 2) for i in range(1, layers)]
    for key in others[::2]:
        key.neg_()
    return queries, [first, *others]


def score_layers(device: str, m: Model, tokens: int, dtype: torch.dtype = BF16, layers: int | None = None) -> Problem:
    count = m.layers if layers is None else layers
    queries, keys = layer_tensors(device, m, tokens, dtype, count)
    kept = spk.new_state(1, LOOK_AHEAD, tokens, device=device)
    size = dtype.itemsize
    one = traffic.score(LOOK_AHEAD, m.query_heads, m.kv_heads, m.head_dim, tokens, key=size, query=size, lse=False)
    few = max(1, min(count, EAGER_SCORES // (LOOK_AHEAD * m.query_heads * tokens)))

    def expected(first: int = count) -> list[Tensor]:
        best = torch.zeros(LOOK_AHEAD, tokens, dtype=torch.float64, device=device)
        for query, key in zip(queries[:first], keys[:first], strict=True):
            best = torch.maximum(best, truth.state(query[0], key[0]))
        return [best]

    def plain() -> Tensor:
        return eager.score_layers([query[0] for query in queries[:few]], [key[0] for key in keys[:few]])

    return Problem(
        "score_layers",
        f"{m.name} {size_name(tokens)} {_name(dtype)} x{count}",
        traffic.score_layers(count, LOOK_AHEAD, tokens, one),
        lambda backend: spk.score_layers_(kept, queries, keys, backend=backend),
        lambda backend: [spk.score_layers_(torch.zeros_like(kept), queries, keys, backend=backend)[0]],
        expected,
        rtol=1e-4,
        tokens=tokens,
        flops=count * operations.score(LOOK_AHEAD, m.query_heads, m.head_dim, tokens),
        dtype=_name(dtype),
        layers=count,
        of_layers=m.layers,
        eager=plain,
        eager_check=lambda: ([plain()], expected(few)),
        eager_times=count / few,
        tensors=(queries, keys),
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
        tokens=tokens,
        flops=operations.finalize(LOOK_AHEAD, tokens),
        eager=lambda: state.mean(1),
        eager_check=lambda: ([state.mean(1)], [state.double().mean(1)]),
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
        tokens=tokens,
        flops=operations.select(tokens),
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
        tokens=prompts * tokens,
        flops=prompts * operations.select(tokens),
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
        tokens=tokens,
        dtype=_name(x.dtype),
        eager=lambda: x[0, kept],
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
        tokens=tokens,
        dtype="bfloat16",
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
    count = -(-kept // CHUNK)
    return Problem(
        "select_tokens",
        f"{size_name(tokens)} ids",
        traffic.select_tokens(LOOK_AHEAD, tokens, kept, 8),
        run,
        result,
        lambda: [state.double().mean(1), torch.zeros(kept, dtype=torch.int64, device=device), torch.tensor([False])],
        rtol=2e-6,
        tokens=tokens,
        flops=operations.select_tokens(LOOK_AHEAD, tokens),
        eager=lambda: eager.select_tokens(state[0], ids[0], count, CHUNK),
        eager_check=lambda: eager.selection_check(state[0], ids[0], count, CHUNK),
    )

"""Scoring cases: random inputs in any layout, what the oracle says of them, and how close a backend must come."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
import oracle
import torch
from grid import Backend
from layouts import lay_out, place, poison, restride

import specprefill_kernels as spk

# Scores are accumulated in fp32 whatever the inputs' types are, and the oracle reads the same rounded inputs. The
# bound is far below one bf16 or fp16 rounding (4e-3, 5e-4), and test_score_faults.py shows what it catches.
RTOL, ATOL = 1e-4, 1e-7
UNTOUCHED = -7.5  # fills the state where a backend must not write; a score is never negative

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@dataclass(frozen=True)
class Case:
    """One scoring problem; ``options`` are keywords of ``oracle.Scoring`` and ``score_layer_`` alike."""

    seq_lens: tuple[int, ...] = (45, 20)
    rows: tuple[int, ...] | None = None  # num_look_ahead; None: all, and the argument is left out
    look_ahead: int = 3
    heads: tuple[int, int] = (4, 2)  # query heads, KV heads
    head_dim: int = 64
    dtypes: tuple[torch.dtype, torch.dtype] = (FP32, FP32)  # query, key
    layout: str = "bhtd"
    strides: str = "plain"
    query_strides: str = "plain"
    spare: int = 0  # tokens of poison after each sequence
    block_size: int = 16
    wider_state: int = 0  # columns of state beyond the longest sequence
    one_row: bool = False
    key_scale: float | str | None = None  # a number, or "per_head"
    lse: bool = False
    options: dict = field(default_factory=dict)
    seed: int = 0

    def but(self, **changes) -> Case:
        return dataclasses.replace(self, **changes)


@dataclass
class Problem:
    """A case with its tensors drawn."""

    case: Case
    query: torch.Tensor
    keys: list[torch.Tensor]
    state: torch.Tensor
    rows: tuple[int, ...]
    key_scale: torch.Tensor | float | None
    lse: torch.Tensor | None

    @property
    def options(self) -> oracle.Scoring:
        return oracle.Scoring(**self.case.options)

    def oracle_inputs(self) -> dict:
        """Float64 arrays for ``oracle.score_layer``; faulty variants change some of them."""
        return {
            "state": self.state.numpy().astype(np.float64),
            "query": self.query.double().numpy(),
            "keys": [tokens.to(torch.float32).double().numpy() for tokens in self.keys],
            "seq_lens": self.case.seq_lens,
            "rows": self.rows,
            "options": self.options,
            "lse": None if self.lse is None else self.lse.double().numpy(),
            "key_scale": None if self.key_scale is None else np.asarray(self.key_scale, dtype=np.float64),
        }

    def expected(self, **changes) -> np.ndarray:
        return oracle.score_layer(**{**self.oracle_inputs(), **changes})

    def arguments(self, device: str = "cpu") -> dict:
        """Keywords of ``score_layer_`` (key among them, state not)."""
        case = self.case
        cache = lay_out(self.keys, case.layout, strides=case.strides, spare=case.spare, block_size=case.block_size)
        given = {"query": restride(self.query, case.query_strides), "key": cache.buffer, **cache.arguments}
        given["seq_lens"] = torch.tensor(case.seq_lens, dtype=torch.int32)
        if case.rows is not None:
            given["num_look_ahead"] = torch.tensor(case.rows, dtype=torch.int32)
        given |= {"lse": self.lse, "key_scale": self.key_scale}
        placed = {k: place(v, device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        return {**placed, "layout": case.layout, **case.options}

    def run(self, backend: Backend | str, **changes) -> torch.Tensor:
        """The state after ``score_layer_``, on the CPU."""
        name, device = (backend, "cpu") if isinstance(backend, str) else (backend.name, backend.device)
        arguments = {**self.arguments(device), **changes}
        query, key = arguments.pop("query"), arguments.pop("key")
        state = self.state.clone().to(device)
        returned = spk.score_layer_(state, query, key, backend=name, **arguments)
        assert returned is state or returned.data_ptr() == state.data_ptr(), "score_layer_ must return its state"
        return state.cpu()


def _lse(case: Case, query, keys, rows, options, key_scale) -> torch.Tensor:
    """What an engine's decode attention would hand over; poison in the rows that are not valid."""
    batch, look_ahead, heads, dim = query.shape
    lse = poison(batch, look_ahead, heads, dtype=FP32)
    for b in range(batch):
        kv_heads = keys[b].shape[1]
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            factor = 1.0 if key_scale is None else np.broadcast_to(np.asarray(key_scale, np.float64), (kv_heads,))
            factor = factor if key_scale is None else factor[kv_head]
            for row in range(rows[b]):
                position = oracle.row_position(row, case.seq_lens[b], rows[b], options.queries)
                lse[b, row, head] = oracle.row_lse(
                    query[b, row, head].double().numpy(),
                    keys[b][:, kv_head].to(FP32).double().numpy() * factor,
                    position,
                    upto=case.seq_lens[b] if options.normalize_over == "prompt" else position + 1,
                    scale=options.scale if options.scale is not None else dim**-0.5,
                    softcap=options.softcap,
                    window=options.window,
                )
    return lse


def draw(case: Case) -> Problem:
    """Random tensors of a case. Queries are drawn wide, so that the scores have peaks."""
    random = torch.Generator().manual_seed(case.seed)
    batch, width = len(case.seq_lens), max(case.seq_lens) + case.wider_state
    query_heads, kv_heads = case.heads
    rows = case.rows if case.rows is not None else (case.look_ahead,) * batch
    options = oracle.Scoring(**case.options)
    query = (2 * torch.randn(batch, case.look_ahead, query_heads, case.head_dim, generator=random)).to(case.dtypes[0])
    seen_after = [rows[b] - 1 if options.normalize_over == "visible" else 0 for b in range(batch)]
    if options.queries == "observation_window":
        seen_after = [0] * batch
    keys = [
        torch.randn(case.seq_lens[b] + seen_after[b], kv_heads, case.head_dim, generator=random).to(case.dtypes[1])
        for b in range(batch)
    ]
    key_scale = case.key_scale
    if key_scale == "per_head":
        key_scale = torch.linspace(0.25, 1.5, kv_heads)
    state = torch.full((batch, 1 if case.one_row else case.look_ahead, width), UNTOUCHED)
    for b in range(batch):
        query[b, rows[b] :] = float("nan")
        state[b, : 1 if case.one_row else rows[b], : case.seq_lens[b]] = 0
    lse = _lse(case, query, keys, rows, options, key_scale) if case.lse else None
    return Problem(case, query, keys, state, rows, key_scale, lse)


def close(actual, expected) -> bool:
    """Whether scores agree within the bound that every backend is held to; NaN never agrees."""
    actual = np.asarray(actual, dtype=np.float64)
    return actual.shape == expected.shape and np.allclose(actual, expected, rtol=RTOL, atol=ATOL)


def assert_close(actual, expected) -> None:
    actual = np.asarray(actual, dtype=np.float64)
    np.testing.assert_allclose(actual, expected, rtol=RTOL, atol=ATOL, equal_nan=False)


def check(case: Case, backend: Backend) -> None:
    """One backend against the oracle; the sentinels in the state are part of what is compared."""
    problem = draw(case)
    assert_close(problem.run(backend), problem.expected())

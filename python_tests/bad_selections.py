"""Bad input of finalize_importance, select_chunks, the gathers and select_tokens."""

from __future__ import annotations

from collections.abc import Callable

import gpu
import torch
from bad_input import (
    INF,
    NAN,
    Bad,
    ints,
    lengths_table,
    meta,
    option_table,
    overlapping_rows,
    planted,
    tensor_table,
    to,
)
from calls import CALLS, KEPT, ROWS
from selecting import selection_of

FINALIZE = [
    *tensor_table("finalize", "state", dtype=torch.float16),
    Bad("finalize", "empty batch", {"state": lambda s: s[:0]}, "state", r"\[0, 3, 20\]"),
    Bad("finalize", "T = 0", {"state": lambda s: s[:, :, :0]}, "state", r"\[2, 3, 0\]"),
    *lengths_table("finalize"),
    *lengths_table("finalize", "num_look_ahead", ROWS),
    *option_table(
        "finalize", reduce=["sum", None], pool_edge=["wrap"], pool_kernel_size=[4, 0, -1, 2.0], backend=["x"]
    ),
    Bad("finalize", "NaN in the state", {"state": planted(NAN, 0, 2, 19)}, "state[0, 2, 19]", "nan", values=True),
    Bad("finalize", "Inf in the state", {"state": planted(INF, 1, 0, 10)}, "state[1, 0, 10]", "inf", values=True),
]

SELECT = [
    *tensor_table("select", "importance", dtype=torch.float64),
    Bad("select", "empty batch", {"importance": lambda i: i[:0]}, "importance", r"\[0, 20\]"),
    Bad("select", "T = 0", {"importance": lambda i: i[:, :0]}, "importance", r"\[2, 0\]"),
    *lengths_table("select"),
    *option_table("select", keep_ratio=[0, 0.0, -0.1, 1.0001, 2, NAN, INF, "0.5", True]),
    *option_table(
        "select", chunk_size=[0, -1, 2.0, None], rounding=["round"], sink=[-1, 1.5], tail=[-1], backend=["x"]
    ),
    *option_table("select mass", keep_mass=[0, -0.5, 1.5, NAN, "0.5"]),
    *[
        Bad(
            "select", f"keep_tokens={tokens!r}", {"keep_ratio": None, "keep_tokens": tokens}, "keep_tokens", str(tokens)
        )
        for tokens in (0, -1, 3.5, "9", True)
    ],
    Bad("select", "no budget", {"keep_ratio": None}, "keep_ratio, keep_tokens, keep_mass", "none"),
    Bad(
        "select", "two budgets", {"keep_tokens": 9}, "keep_ratio, keep_tokens, keep_mass", "keep_ratio and keep_tokens"
    ),
    Bad("select", "also a mass", {"keep_mass": 0.5}, "keep_ratio, keep_tokens, keep_mass", "keep_ratio and keep_mass"),
    *[
        Bad(
            "select",
            f"{value} importance",
            {"importance": planted(value, 1, 10)},
            "importance[1, 10]",
            str(value),
            values=True,
        )
        for value in (NAN, INF, -INF)
    ],
    Bad("select mass", "negative importance", {"importance": planted(-0.5, 1, 3)}, "importance", "-0.5", values=True),
    Bad("select protected", "protect of bytes", {"protect": to(torch.uint8)}, "protect", "uint8"),
    Bad("select protected", "protect too short", {"protect": lambda p: p[:, :19]}, "protect", r"\[2, 19\]"),
    Bad("select protected", "protect of one row", {"protect": lambda p: p[:1]}, "protect", r"\[1, 20\]"),
    Bad("select protected", "protect on meta", {"protect": meta}, "protect", "meta"),
    Bad("select protected", "protect of spans", {"protect": [(0, 3)]}, "protect", "list", error=TypeError),
]


def chosen(rows=KEPT, **changes):
    return {"selection": selection_of(rows)._replace(**changes)}


def selection_table(call: str) -> list[Bad]:
    """A selection made by hand may hold anything; ``select_chunks`` never makes these."""
    many = ints(4, 2)
    return [
        Bad(call, "selection a tensor", {"selection": torch.zeros(2, 3)}, "selection", "Tensor", error=TypeError),
        Bad(call, "selection None", {"selection": None}, "selection", "None", error=TypeError),
        Bad(call, "indices of another type", chosen(indices=torch.zeros(2, 3)), "selection.indices", "float32"),
        Bad(call, "indices of rank 1", chosen(indices=ints(1, 2)), "selection.indices", r"\[2\]"),
        Bad(
            call, "indices of no width", chosen(indices=ints(1, 2).view(2, 1)[:, :0]), "selection.indices", r"\[2, 0\]"
        ),
        Bad(call, "num_kept of another batch", chosen(num_kept=ints(3)), "selection.num_kept", r"\[1\]"),
        Bad(call, "num_kept of another type", chosen(num_kept=ints(3, 2).long()), "selection.num_kept", "int64"),
        Bad(call, "more kept than slots", chosen(num_kept=many), "selection.num_kept[0]", "4", values=True),
        Bad(call, "fewer kept than none", chosen(num_kept=ints(3, -1)), "selection.num_kept[1]", "-1", values=True),
        Bad(call, "a position beyond", chosen([[0, 3, 20], [7]]), "selection.indices[0, 2]", "20", values=True),
        Bad(call, "a negative position", chosen([[0, 3, 4], [-2, 7]]), "selection.indices[1, 0]", "-2", values=True),
    ]


GATHER = [
    *tensor_table("gather", "x", dtype=None, rank=False),
    *selection_table("gather"),
    *option_table("gather", token_dim=[0, -1, 5, 1.0], backend=["x"]),
    Bad("gather", "x of another batch", {"x": lambda x: x[:1]}, "x", r"\[1, 20\]"),
    Bad("gather", "x of rank 1", {"x": lambda x: x[0]}, "token_dim", "1"),
    Bad("gather", "x too short", {"x": lambda x: x[:, :19]}, "selection.indices[0, 2]", "19", values=True),
    Bad("gather packed", "cu_seqlens too short", {"cu_seqlens": ints(0, 20)}, "cu_seqlens", r"\[2\]"),
    Bad("gather packed", "cu_seqlens falling", {"cu_seqlens": ints(0, 40, 20)}, "cu_seqlens[2]", "20", values=True),
    Bad("gather packed", "cu_seqlens beyond", {"cu_seqlens": ints(0, 20, 41)}, "cu_seqlens[2]", "41", values=True),
    Bad(
        "gather packed",
        "beyond its sequence",
        {"cu_seqlens": ints(0, 19, 40)},
        "selection.indices[0, 2]",
        "19",
        values=True,
    ),
]


def overlapping_out(name: str):
    """A slice of an input as output: the cache is longer than what is kept."""
    return lambda out, arguments: (arguments[name][:, :, 1:4], out[1])


KV = [
    *tensor_table("kv", "key_cache", dtype=None),
    *tensor_table("kv", "value_cache", dtype=None),
    *selection_table("kv"),
    *option_table("kv", layout=["nhd", None], backend=["x"]),
    Bad("kv", "caches of unequal lengths", {"value_cache": lambda v: v[:, :, :19]}, "value_cache", r"\[2, 2, 19, 8\]"),
    Bad("kv", "caches of unequal heads", {"value_cache": lambda v: v[:, :1]}, "value_cache", r"\[2, 1, 20, 8\]"),
    Bad("kv", "an empty cache", {"key_cache": lambda k: k[:, :, :0]}, "key_cache", r"\[2, 2, 0, 8\]"),
    Bad("kv packed", "no cu_seqlens", {"cu_seqlens": None}, "cu_seqlens", "None"),
    Bad("kv packed", "cu_seqlens beyond", {"cu_seqlens": ints(0, 20, 41)}, "cu_seqlens[2]", "41", values=True),
    Bad("kv packed", "cu_seqlens falling", {"cu_seqlens": ints(0, 40, 20)}, "cu_seqlens[2]", "20", values=True),
    Bad("kv paged", "no block_table", {"block_table": None}, "block_table", "None"),
    Bad("kv paged", "a negative block", {"block_table": planted(-1, 0, 2)}, "block_table[0, 2]", "-1", values=True),
    Bad("kv paged", "a block too large", {"block_table": planted(13, 0, 0)}, "block_table[0, 0]", "13", values=True),
    Bad(
        "kv paged",
        "a table too narrow",
        {"block_table": lambda t: t[:, :2]},
        "selection.indices[0, 2]",
        "19",
        values=True,
    ),
    Bad("kv paged", "out_block_table without out", {"out_block_table": ints(0, 1).view(2, 1)}, "out_block_table"),
    Bad("kv out", "out a tensor", {"out": lambda out: out[0]}, "out", "Tensor", error=TypeError),
    Bad("kv out", "out of three", {"out": lambda out: (*out, out[0])}, "out", error=TypeError),
    Bad("kv out", "out of lists", {"out": ([1.0], [1.0])}, "out[0]", "list", error=TypeError),
    Bad("kv out", "out of another type", {"out": lambda out: (out[0], out[1].half())}, "out[1]", "float16"),
    Bad("kv out", "out too narrow", {"out": lambda out: (out[0][:, :, :2], out[1])}, "out[0]", r"\[2, 2, 2, 8\]"),
    Bad("kv out", "out on meta", {"out": lambda out: (out[0], meta(out[1]))}, "out[1]", "meta"),
    Bad("kv out", "out twice the same", {"out": lambda out: (out[0], out[0])}, "out[1]", "overlap"),
    Bad("kv out", "out expanded", {"out": lambda out: (out[0][:1].expand(2, 2, 3, 8), out[1])}, "out[0]", "strides"),
    Bad("kv out", "out shares memory", {"out": lambda out: (overlapping_rows(out[0]), out[1])}, "out[0]", "strides"),
    Bad("kv out", "out inside the keys", {"out": overlapping_out("key_cache")}, "out[0]", "overlap"),
    Bad("kv out", "out inside the values", {"out": overlapping_out("value_cache")}, "out[0]", "overlap"),
    Bad("kv out", "a table for dense out", {"out_block_table": ints(0, 1).view(2, 1)}, "out_block_table", "Tensor"),
    Bad("kv paged out", "no table for out", {"out_block_table": None}, "out_block_table", "None"),
    Bad(
        "kv paged out",
        "out's table too narrow",
        {"out_block_table": ints(0, 1).view(2, 1)[:, :0]},
        "out_block_table",
        "0",
    ),
    Bad(
        "kv paged out",
        "a block beyond out",
        {"out_block_table": planted(2, 1, 0)},
        "out_block_table[1, 0]",
        "2",
        values=True,
    ),
    Bad(
        "kv paged out",
        "a block of out twice",
        {"out_block_table": planted(0, 1, 0)},
        "out_block_table[1, 0]",
        "0",
        values=True,
    ),
]

TOKENS = [
    *tensor_table("tokens", "state", dtype=torch.float16),
    *tensor_table("tokens", "x", dtype=None, rank=False),
    *lengths_table("tokens"),
    *lengths_table("tokens", "num_look_ahead", ROWS),
    *option_table("tokens", reduce=["sum"], pool_kernel_size=[2], pool_edge=["x"], keep_ratio=[0, 1.5], chunk_size=[0]),
    *option_table("tokens", token_dim=[0, 7], rounding=["x"], sink=[-1], tail=[-1], backend=["x"]),
    Bad("tokens", "no budget", {"keep_ratio": None}, "keep_ratio, keep_tokens, keep_mass", "none"),
    Bad("tokens", "x of another batch", {"x": lambda x: x[:1]}, "x", r"\[1, 20\]"),
    Bad("tokens", "NaN in the state", {"state": planted(NAN, 0, 0, 0)}, "state[0, 0, 0]", "nan", values=True),
    Bad("tokens", "protect too long", {"protect": torch.ones(2, 21, dtype=torch.bool)}, "protect", r"\[2, 21\]"),
]


GATHERS = ["kv", "kv packed", "kv paged", "kv out", "kv paged out", "gather", "gather packed"]
WILD_COUNTS = [(-1, 10**6), (2**31 - 1, 2), (3, 3)]


def gather_anything(name: str, kept: tuple[int, int], backend: str, device: str = "cpu") -> list[Callable[[], bool]]:
    """Gather positions and counts that nothing could have selected; the questions ask what lies around the outputs."""
    arguments = CALLS[name].arguments(device)
    indices = torch.tensor([[2**31 - 1, -7, 5], [-(2**31), 10**6, 3]], dtype=torch.int32, device=device)
    counts = torch.tensor(kept, dtype=torch.int32, device=device)
    arguments["selection"] = arguments["selection"]._replace(indices=indices, num_kept=counts)
    guards = []
    if "out" in arguments:
        pairs = [gpu.guarded(tensor) for tensor in arguments["out"]]
        arguments["out"], guards = tuple(view for view, _ in pairs), [guard for _, guard in pairs]
    CALLS[name].function(**arguments, backend=backend)
    return guards

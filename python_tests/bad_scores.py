"""Bad input of score_layer_ and score_layers_."""

from __future__ import annotations

import torch
from bad_input import INF, NAN, Bad, ints, lengths_table, option_table, overlapping_rows, planted, tensor_table, to
from calls import ROWS

# The check of the weights cannot tell which of the factors was at fault; its message begins with the first of them.
WEIGHTS = "query"

SCORE = [
    *tensor_table("score", "state", dtype=torch.float64),
    Bad("score", "state fp16", {"state": to(torch.float16)}, "state", "float16"),
    Bad("score", "empty batch", {"state": lambda s: s[:0]}, "state", r"\[0, 3, 20\]"),
    Bad("score", "no rows", {"state": lambda s: s[:, :0]}, "state", r"\[2, 0, 20\]"),
    Bad("score", "T = 0", {"state": lambda s: s[:, :, :0]}, "state", r"\[2, 3, 0\]"),
    Bad("score", "state expanded", {"state": lambda s: s[:1].expand(2, 3, 20)}, "state", "strides"),
    Bad("score", "state rows share memory", {"state": overlapping_rows}, "state", "strides"),
    Bad("score", "state transposed", {"state": lambda s: s.transpose(1, 2).contiguous().transpose(1, 2)}, "state"),
    *tensor_table("score", "query"),
    Bad("score", "query fp8", {"query": to(torch.float8_e4m3fn)}, "query", "float8"),
    Bad("score", "query of another batch", {"query": lambda q: q[:1]}, "query", r"\[1, 3, 4, 8\]"),
    Bad("score", "query with a row too few", {"query": lambda q: q[:, :2]}, "query", r"\[2, 2, 4, 8\]"),
    Bad("score", "heads that do not divide", {"query": lambda q: q[:, :, :3]}, "query", "3"),
    Bad("score", "no heads", {"query": lambda q: q[:, :, :0]}, "query", r"\[2, 3, 0, 8\]"),
    Bad("score", "query of another dim", {"query": lambda q: q[..., :7]}, "key", r"\[2, 2, 20, 8\]"),
    *tensor_table("score", "key"),
    Bad("score", "key of another batch", {"key": lambda k: k[:1]}, "key", r"\[1, 2, 20, 8\]"),
    Bad("score", "key without heads", {"key": lambda k: k[:, :0]}, "key", r"\[2, 0, 20, 8\]"),
    Bad("score", "key without tokens", {"key": lambda k: k[:, :, :0]}, "key", r"\[2, 2, 0, 8\]"),
    Bad("score", "key too short", {"key": lambda k: k[:, :, :19]}, "seq_lens[0]", "20", values=True),
    Bad("score", "key too short, no lengths", {"key": lambda k: k[:, :, :19], "seq_lens": None}, "key", "19"),
    Bad("score", "no room for seen look-ahead keys", {"normalize_over": "visible"}, "seq_lens[0]", "20", values=True),
    *lengths_table("score"),
    *lengths_table("score", "num_look_ahead", ROWS),
    Bad(
        "score",
        "observation window longer than the prompt",
        {"seq_lens": ints(20, 2), "queries": "observation_window"},
        "num_look_ahead[1]",
        "3",
        values=True,
    ),
    *option_table("score", layout=["bhdt", None, 3], queries=["all"], normalize_over=["keys"]),
    *option_table("score", pool_edge=["reflect"], pool_order=["during"], backend=["gpu", None, 3]),
    *option_table("score", pool_kernel_size=[2, 0, -1, -3, 3.0, True, "13", None]),
    *option_table("score", scale=[NAN, INF, "1"], softcap=[0, 0.0, -1.0, NAN, INF, "30"]),
    *option_table("score", window=[0, -1, 2.5, "4"], key_scale=[NAN, "1"]),
    Bad("score", "key_scale of three", {"key_scale": torch.ones(3)}, "key_scale", "3"),
    Bad("score", "key_scale of rank 2", {"key_scale": torch.ones(2, 1)}, "key_scale", r"\[2, 1\]"),
    Bad("score", "key_scale of ints", {"key_scale": ints(1, 1)}, "key_scale", "int32"),
    Bad("score", "key_scale on meta", {"key_scale": torch.ones(2, device="meta")}, "key_scale", "meta"),
    Bad("score", "lse of another shape", {"lse": torch.zeros(2, 3, 5)}, "lse", r"\[2, 3, 5\]"),
    Bad("score", "lse in fp16", {"lse": torch.zeros(2, 3, 4).half()}, "lse", "float16"),
    Bad("score", "lse on meta", {"lse": torch.zeros(2, 3, 4, device="meta")}, "lse", "meta"),
    Bad("score", "lse a number", {"lse": 1.0}, "lse", "float", error=TypeError),
    Bad("score", "workspace of floats", {"workspace": torch.zeros(9)}, "workspace", "float32"),
    Bad("score", "workspace a number", {"workspace": 4096}, "workspace", "int", error=TypeError),
    Bad("score", "cu_seqlens without packed", {"cu_seqlens": ints(0, 20, 40)}, "cu_seqlens", "Tensor"),
    Bad("score", "block_table without paged", {"block_table": ints(0, 1).view(2, 1)}, "block_table", "Tensor"),
    *[
        Bad("score", f"{value} in {name}", {name: planted(value, *index)}, WEIGHTS, values=True)
        for name, index in (
            ("query", (1, 2, 3, 7)),
            ("query", (0, 0, 0, 0)),
            ("key", (0, 1, 19, 3)),
            ("key", (1, 0, 0, 0)),
        )
        for value in (NAN, INF)
    ],
    Bad("score", "Inf in lse", {"lse": torch.full((2, 3, 4), INF)}, "lse", values=True),
    Bad("score", "NaN in lse", {"lse": torch.full((2, 3, 4), NAN)}, "lse", values=True),
    Bad("score", "lse of no keys where there are", {"lse": torch.full((2, 3, 4), -INF)}, "lse", values=True),
    Bad("score", "NaN in key_scale", {"key_scale": torch.tensor([1.0, NAN])}, WEIGHTS, values=True),
]

PACKED = [
    Bad("score packed", "no cu_seqlens", {"cu_seqlens": None}, "cu_seqlens", "None"),
    Bad("score packed", "cu_seqlens too short", {"cu_seqlens": ints(0, 20)}, "cu_seqlens", r"\[2\]"),
    Bad("score packed", "cu_seqlens of floats", {"cu_seqlens": ints(0, 20, 40).float()}, "cu_seqlens", "float32"),
    Bad("score packed", "cu_seqlens a list", {"cu_seqlens": [0, 20, 40]}, "cu_seqlens", "list", error=TypeError),
    Bad("score packed", "cu_seqlens falling", {"cu_seqlens": ints(0, 30, 20)}, "cu_seqlens[2]", "20", values=True),
    Bad("score packed", "cu_seqlens standing", {"cu_seqlens": ints(0, 0, 20)}, "cu_seqlens[1]", "0", values=True),
    Bad("score packed", "cu_seqlens negative", {"cu_seqlens": ints(-1, 19, 40)}, "cu_seqlens[0]", "-1", values=True),
    Bad("score packed", "cu_seqlens beyond", {"cu_seqlens": ints(0, 20, 41)}, "cu_seqlens[2]", "41", values=True),
    Bad(
        "score packed",
        "longer than its part",
        {"seq_lens": ints(20, 20), "cu_seqlens": ints(0, 19, 39)},
        "seq_lens[0]",
        "20",
        values=True,
    ),
    Bad("score packed", "key of rank 4", {"key": lambda k: k[None]}, "key", r"\[1, 40, 2, 8\]"),
]

PAGED = [
    Bad("score paged", "no block_table", {"block_table": None}, "block_table", "None"),
    Bad("score paged", "no seq_lens", {"seq_lens": None}, "seq_lens", "None"),
    Bad("score paged", "block_table of floats", {"block_table": to(torch.float32)}, "block_table", "float32"),
    Bad("score paged", "block_table of one row", {"block_table": lambda t: t[:1]}, "block_table", r"\[1, 4\]"),
    Bad("score paged", "block_table too narrow", {"block_table": lambda t: t[:, :2]}, "seq_lens[0]", "20", values=True),
    Bad("score paged", "negative block", {"block_table": planted(-1, 0, 2)}, "block_table[0, 2]", "-1", values=True),
    Bad("score paged", "block too large", {"block_table": planted(13, 1, 1)}, "block_table[1, 1]", "13", values=True),
    Bad(
        "score paged",
        "huge block",
        {"block_table": planted(2**31 - 1, 0, 0)},
        "block_table[0, 0]",
        str(2**31 - 1),
        values=True,
    ),
    Bad(
        "score paged",
        "block that wraps",
        {"block_table": lambda t: planted(2**32, 0, 0)(t.long())},
        "block_table[0, 0]",
        "",  # the largest id of 32 bits: what lies behind the length may be anything, so size alone is no fault
        values=True,
    ),
]

LAYERS = [
    Bad(
        "score layers",
        "queries a tensor",
        {"queries_per_layer": lambda q: q[0]},
        "queries_per_layer",
        "Tensor",
        error=TypeError,
    ),
    Bad("score layers", "no layers", {"queries_per_layer": [], "keys_per_layer": []}, "queries_per_layer", "empty"),
    Bad("score layers", "a key missing", {"keys_per_layer": lambda k: k[:1]}, "keys_per_layer", "1"),
    Bad(
        "score layers",
        "second query fp64",
        {"queries_per_layer": lambda q: [q[0], q[1].double()]},
        "queries_per_layer[1]",
        "float64",
    ),
    Bad(
        "score layers",
        "second key a list",
        {"keys_per_layer": lambda k: [k[0], [1]]},
        "keys_per_layer[1]",
        "list",
        error=TypeError,
    ),
    Bad(
        "score layers",
        "second key shorter",
        {"keys_per_layer": lambda k: [k[0], k[1][:, :, :5]]},
        "seq_lens[0]",
        "20",
        values=True,
    ),
    Bad("score layers", "a window missing", {"window": [3]}, "window", "1"),
    Bad("score layers", "second window 0", {"window": [3, 0]}, "window[1]", "0"),
    Bad("score layers", "an lse missing", {"lse": [torch.zeros(2, 3, 4)]}, "lse", "1"),
    Bad(
        "score layers",
        "second lse fp16",
        {"lse": [torch.zeros(2, 3, 4), torch.zeros(2, 3, 4).half()]},
        "lse[1]",
        "float16",
    ),
    Bad("score layers", "a key_scale missing", {"key_scale": [1.0]}, "key_scale", "1"),
    Bad("score layers", "second key_scale NaN", {"key_scale": [1.0, NAN]}, "key_scale[1]", "nan"),
    Bad(
        "score layers", "NaN in the second key", {"keys_per_layer": lambda k: [k[0], k[1] * NAN]}, WEIGHTS, values=True
    ),
]

"""Scores that need more than one tile: of keys, of rows, of the head dimension, of pooling, and more than one launch.

A GPU backend cuts its work at constants of its own; the sizes here lie on both sides of them, on a GPU and in Triton's
interpreter, whose stretches of keys are shorter.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from grid import on_backends, same
from scoring import BF16, FP32, Case, assert_close, check, draw

import specprefill_kernels as spk

pytestmark = on_backends("score_layer")

# Row 1 ends within a stretch of keys that row 0 goes beyond.
LONG = Case(seq_lens=(530, 257), heads=(2, 1), head_dim=16, look_ahead=2)


@pytest.mark.parametrize("options", [{}, {"pool_kernel_size": 1}, {"pool_edge": "valid"}, {"softcap": 3.0}], ids=str)
def test_stretches_of_keys_join(backend, options):
    check(LONG.but(options=options), backend)


@pytest.mark.parametrize("lengths", [(231, 232), (233, 255), (256, 257), (463, 465), (512, 513)], ids=str)
def test_lengths_around_stretches(backend, lengths):
    check(LONG.but(seq_lens=lengths, look_ahead=1), backend)


@pytest.mark.parametrize("lengths", [(239, 241), (479, 481), (959, 961), (1023, 1025), (1199, 1201)], ids=str)
@pytest.mark.parametrize("width", [13, 17, 19])
def test_lengths_around_what_a_warp_and_a_block_pool(backend, lengths, width):
    """A window of 17 reaches as far as neighbours are kept; one of 19 is wide."""
    check(LONG.but(seq_lens=lengths, look_ahead=1, options={"pool_kernel_size": width}), backend)


@pytest.mark.parametrize("layout", ["bhtd", "packed", "paged_nhd"])
@pytest.mark.parametrize("lse", [False, True])
def test_a_model_s_heads_over_several_stretches(backend, layout, lse):
    case = Case(
        seq_lens=(backend.sized(1300, 1000), 45), heads=(8, 2), head_dim=64, look_ahead=8, dtypes=(BF16, BF16), lse=lse
    )
    check(case.but(layout=layout, block_size=16), backend)


@pytest.mark.parametrize("width", [3, 33, 65, 67, 129, 131, 301, 1201])
@pytest.mark.parametrize("edge", ["zero", "valid"])
def test_wide_pooling(backend, width, edge):
    """Wider than half a tile, than a tile, and than the prompt."""
    check(LONG.but(seq_lens=(300, 40), options={"pool_kernel_size": width, "pool_edge": edge}), backend)


@pytest.mark.parametrize("width", [13, 201])
@pytest.mark.parametrize("window", [1, 7, 120, 400])
@pytest.mark.parametrize("queries", ["look_ahead", "observation_window"])
def test_tiles_before_a_window_weigh_nothing(backend, queries, window, width):
    """Nor do they hide the edge of the window, which pooling carries a little further."""
    options = {"queries": queries, "window": window, "pool_kernel_size": width}
    check(LONG.but(seq_lens=(420, 130), look_ahead=3, options=options), backend)


@pytest.mark.parametrize("window", [1, 20])
def test_what_memory_held_before_does_not_matter(backend, window):
    """A tile that no row sees is next to one that some do: pooling reads both."""
    if backend.name == "reference":
        pytest.skip("takes no workspace")
    problem = draw(LONG.but(seq_lens=(790,), look_ahead=3, options={"window": window, "pool_kernel_size": 101}))
    size = spk.score_workspace_size(3, 2, 1, 16, 790, pool_kernel_size=101, backend=backend.name)
    workspace = torch.full((size,), 255, dtype=torch.uint8, device=backend.device)  # NaN, as fp32
    assert_close(problem.run(backend, workspace=workspace), problem.expected())


def test_nothing_is_read_before_a_window(backend):
    """Whole tiles that no row sees are not touched: NaN there does no harm."""
    problem = draw(LONG.but(seq_lens=(700,), options={"window": 20}))
    expected = problem.expected()
    key = problem.arguments(backend.device)["key"]
    if backend.name not in ("triton", "cuda"):
        pytest.skip("a promise of the GPU kernels, for speed")
    key[:, :, :300] = float("nan")
    assert_close(problem.run(backend, key=key), expected)


@pytest.mark.parametrize(
    ("look_ahead", "heads"),
    [(17, (2, 1)), (40, (1, 1)), (8, (9, 1)), (8, (17, 1)), (33, (5, 1)), (3, (71, 1)), (16, (12, 2)), (1, (130, 2))],
    ids=str,
)
def test_rows_beyond_one_tile(backend, look_ahead, heads):
    """More look-ahead rows, more heads of a group, or more of both than a tile has rows."""
    check(Case(seq_lens=(50, 43), look_ahead=look_ahead, heads=heads, head_dim=16), backend)
    rows = (look_ahead, max(1, look_ahead // 2))
    options = {"queries": "observation_window"}
    check(Case(seq_lens=(50, 43), look_ahead=look_ahead, rows=rows, heads=heads, head_dim=16, options=options), backend)


@pytest.mark.parametrize("look_ahead", [5, 20])
def test_one_row_of_state_takes_the_maximum_of_all_tiles(backend, look_ahead):
    check(Case(seq_lens=(50, 43), look_ahead=look_ahead, heads=(18, 2), head_dim=16, one_row=True), backend)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("head_dim", [72, 100, 130, 255, 257, 300, 520])
def test_heads_in_parts(backend, head_dim, dtype):
    check(Case(seq_lens=(40,), head_dim=head_dim, dtypes=(dtype, dtype)), backend)


@pytest.mark.parametrize("layers", [1, 2, 4, 5, 16, 17, 64, 65])
def test_any_number_of_layers_is_every_one_of_them(backend, layers):
    """Launches take so many layers each; the weight of each lies on a key of its own."""
    if (backend.name, backend.device) == ("triton", "cpu") and layers > 17:
        pytest.skip("no launch of Triton's takes more than 16, and its interpreter takes long")
    length, dim = 5 * layers + 120, 16
    keys = [torch.zeros(1, 1, length, dim) for _ in range(layers)]
    for i, key in enumerate(keys):
        key[0, 0, 5 * i] = 1
    queries = [torch.full((1, 1, 1, dim), 8.0) for _ in range(layers)]
    placed = [[x.to(backend.device) for x in xs] for xs in (queries, keys)]
    state = spk.new_state(1, 1, length, backend.device)
    spk.score_layers_(state, *placed, pool_kernel_size=1, backend=backend.name)
    weight = np.exp(8.0 * dim / 4)
    peak, rest = weight / (weight + length - 1), 1 / (weight + length - 1)
    expected = np.full((1, 1, length), rest)
    expected[0, 0, : 5 * layers : 5] = peak
    assert_close(state.cpu().numpy(), expected)


def test_a_long_sequence_alone_equals_the_same_in_a_batch(backend):
    """Stretches are cut at the same places, whatever else is in the batch."""
    problem = draw(LONG)
    together = problem.run(backend)
    for b, length in enumerate(LONG.seq_lens):
        arguments = problem.arguments(backend.device)
        query, key = arguments["query"][b : b + 1], arguments["key"][b : b + 1]
        state = spk.new_state(1, LONG.look_ahead, length, backend.device)
        spk.score_layer_(state, query, key, seq_lens=arguments["seq_lens"][b : b + 1], backend=backend.name)
        same(state.cpu(), together[b : b + 1, :, :length], f"sequence {b}")


def test_many_stretches_join(backend):
    """More than are joined at once; the largest logit comes last, so that all sums before it are rescaled."""
    length = backend.sized(35000, 17000, 9000)  # 17000: 34 sums for the 32 lanes of a warp
    problem = draw(LONG.but(seq_lens=(length, 300), heads=(1, 1), look_ahead=1))
    for b in range(2):
        problem.keys[b][-1, 0] = problem.query[b, 0, 0]
    assert_close(problem.run(backend), problem.expected())


@pytest.mark.parametrize("lengths", [(253, 254), (255, 256), (382, 766), (511, 512), (1023, 1024)], ids=str)
def test_look_ahead_keys_in_a_stretch_of_their_own(backend, lengths):
    check(LONG.but(seq_lens=lengths, look_ahead=3, options={"normalize_over": "visible"}), backend)


@pytest.mark.parametrize("lengths", [(383, 384), (385, 768)], ids=str)
def test_rows_that_end_within_a_full_tile(backend, lengths):
    check(LONG.but(seq_lens=lengths, look_ahead=3, options={"queries": "observation_window"}), backend)


@pytest.mark.parametrize("window", range(119, 126))
@pytest.mark.parametrize("queries", ["look_ahead", "observation_window"])
def test_windows_that_begin_around_a_tile_boundary(backend, queries, window):
    check(LONG.but(seq_lens=(250, 253), look_ahead=3, options={"queries": queries, "window": window}), backend)


@pytest.mark.parametrize(
    "options",
    [
        {"normalize_over": "visible"},
        {"queries": "observation_window"},
        {"queries": "observation_window", "window": 40},
        {"window": 40},
        {"window": 40, "normalize_over": "visible"},
    ],
    ids=str,
)
def test_masks_of_full_tiles_end_where_a_step_does(backend, options):
    """Rows that fill all tiles need a mask only for the steps at the prompt's end and at the window's edge."""
    lengths = tuple(range(64, 98))
    lengths = backend.sized(lengths, lengths, (64, 65, 72, 80, 81, 95, 96, 97))
    check(Case(seq_lens=lengths, look_ahead=4, heads=(4, 1), head_dim=16, options=options), backend)


@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize(
    ("look_ahead", "heads", "rows"),
    [(4, (3, 1), None), (3, (4, 1), None), (4, (4, 1), (2,)), (4, (4, 1), (3,)), (8, (3, 1), None), (12, (2, 1), None)],
    ids=str,
)
def test_rows_that_a_tile_has_to_spare_weigh_nothing(backend, look_ahead, heads, rows, one_row):
    """Also where all keys are seen, and no other row needs a mask."""
    case = Case(seq_lens=(150,), rows=rows, look_ahead=look_ahead, heads=heads, head_dim=16, one_row=one_row)
    check(case, backend)


def outshone(case: Case, at: int, row: int):
    """The case's problem with the key at a position along one row's query: its score is some thousand."""
    problem = draw(case)
    problem.keys[0][at] = 40 * problem.query[0, row, 0]
    return problem


@pytest.mark.parametrize("at", [0, 1, 11, 23, 24, 25, 100, 383, 384, 399])
def test_one_key_outshines_all_wherever_it_lies(backend, at):
    """The exponent's shift is a maximum over every key: without this one, its weight would be Inf."""
    problem = outshone(LONG.but(seq_lens=(400,), options={"pool_kernel_size": 3}), at, 0)
    assert_close(problem.run(backend), problem.expected())


@pytest.mark.parametrize(("options", "at"), [({"normalize_over": "visible"}, 46), ({"window": 20}, 25)], ids=str)
def test_a_key_that_a_row_must_not_see_does_not_outshine_its_own(backend, options, at):
    """Behind the row's position, or before its window: were it part of the row's maximum, all weights would be 0."""
    row = 0 if at == 46 else 1
    problem = outshone(LONG.but(seq_lens=(45,), look_ahead=3, options=options), at, row)
    assert_close(problem.run(backend), problem.expected())


@pytest.mark.parametrize("tokens", [20, 500])
@pytest.mark.parametrize(("head", "row"), [(0, 0), (1, 2), (4, 0), (5, 2)])
def test_the_row_that_is_not_finite_is_named(backend, tokens, head, row):
    """Layer, query head and look-ahead row, wherever among the vectors' lanes it lies."""
    if backend.name != "cpu":
        pytest.skip("names the sequence alone")
    query, key = torch.randn(1, 3, 6, 16), torch.randn(1, 2, tokens, 16)
    query[0, row, head, 3] = float("nan")
    with pytest.raises(ValueError, match=rf"layer 1, query head {head}, look-ahead row {row}\)"):
        spk.score_layers_(spk.new_state(1, 3, tokens), [torch.ones_like(query), query], [key, key], backend="cpu")

"""On a GPU: CUDA graphs, streams, devices; no wait for the device, no memory asked for without need."""

from __future__ import annotations

import gpu
import pytest
import torch
from calls import CALLS
from grid import on_gpu_backends, same
from layouts import lay_out, place
from scoring import BF16, E4M3

import specprefill_kernels as spk

pytestmark = pytest.mark.gpu

LENGTHS, ROWS, WIDTH, LAYERS = (4096, 1031, 17), (8, 3, 1), 4096, 3
LAYOUTS = ("bhtd", "packed", "paged_nhd")


def inputs(layout: str, dtype: torch.dtype, lengths, rows, seed: int) -> dict[str, list[torch.Tensor]]:
    """All tensors of a call of `chain`, by argument. Shapes depend neither on lengths nor on the seed."""
    random = torch.Generator().manual_seed(seed)
    queries = [(2 * torch.randn(3, 8, 4, 64, generator=random)).to(BF16) for _ in range(LAYERS)]
    tables: dict[str, torch.Tensor] = {}
    keys = []
    for _ in range(LAYERS):
        # Room for all of WIDTH, whatever the lengths are.
        tokens = [torch.randn(WIDTH, 2, 64, generator=random).to(dtype) for _ in lengths]
        cache = lay_out(tokens, layout)
        if layout == "paged_nhd":  # another order of blocks for each seed; one for all layers
            order = torch.randperm(len(cache.buffer), generator=torch.Generator().manual_seed(seed))
            cache.buffer = cache.buffer.view(torch.uint8)[order].view(dtype)
            table = cache.arguments["block_table"]
            wanted = (table >= 0) & (table < len(order))
            table[wanted] = order.argsort()[table[wanted].long()].to(table.dtype)
        keys.append(cache.buffer)
        tables |= cache.arguments
    ids = torch.randint(0, 50000, (3, WIDTH), generator=random)
    whole = {"seq_lens": torch.tensor(lengths), "num_look_ahead": torch.tensor(rows, dtype=torch.int32)}
    named = {"queries": queries, "keys": keys, "ids": [ids], **{k: [v] for k, v in (tables | whole).items()}}
    return {name: [place(tensor, "cuda") for tensor in tensors] for name, tensors in named.items()}


def fill(given: dict[str, list[torch.Tensor]], new: dict[str, list[torch.Tensor]]) -> None:
    """The same buffers with other contents: what a graph reads when it is replayed."""
    for name, tensors in given.items():
        for tensor, source in zip(tensors, new[name], strict=True):
            tensor.view(torch.uint8).copy_(source.view(torch.uint8)) if tensor.dtype == E4M3 else tensor.copy_(source)


def options_of(given: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What is neither a query, a key nor an id: lengths and tables."""
    return {name: tensors[0] for name, tensors in given.items() if name not in ("queries", "keys", "ids")}


def chain(backend, layout: str, given: dict[str, list[torch.Tensor]], state: torch.Tensor) -> list[torch.Tensor]:
    """Scores of all layers, then the whole tail."""
    single = options_of(given)
    state.zero_()
    spk.score_layers_(state, given["queries"], given["keys"], layout=layout, backend=backend.name, **single)
    packed, selection, importance = spk.select_tokens(
        state,
        given["ids"][0],
        single["seq_lens"],
        single["num_look_ahead"],
        keep_ratio=0.3,
        tail=5,
        backend=backend.name,
    )
    return [state, importance, *selection, packed.values, packed.position_ids, packed.cu_seqlens]


@on_gpu_backends("select_tokens")
@pytest.mark.parametrize("dtype", [BF16, E4M3], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_graph_replays_with_other_lengths_and_contents(backend, layout, dtype):
    """The whole way from keys to packed tokens, captured once; then the same buffers hold other prompts."""
    state = spk.new_state(3, 8, WIDTH, device="cuda")
    given = inputs(layout, dtype, LENGTHS, ROWS, 0)
    graph, results = gpu.captured(lambda: chain(backend, layout, given, state))
    for seed, (lengths, rows) in enumerate([(LENGTHS, ROWS), ((33, 4096, 4095), (2, 8, 8)), ((1, 1, 1), (1, 1, 1))]):
        other = inputs(layout, dtype, lengths, rows, seed)
        fill(given, other)
        graph.replay()
        expected = chain(backend, layout, other, spk.new_state(3, 8, WIDTH, device="cuda"))
        for result, wanted in zip(results, expected, strict=True):
            same(result, wanted, f"replay {seed}")


@on_gpu_backends("select_tokens")
@pytest.mark.parametrize("budget", [{"keep_ratio": 0.2}, {"keep_tokens": 500}, {"keep_mass": 0.5}], ids=str)
@pytest.mark.parametrize("protected", [False, True])
def test_a_graph_of_select_tokens(backend, budget, protected):
    state = gpu.random(3, 8, WIDTH, device="cuda").abs()
    ids = torch.arange(3 * WIDTH, device="cuda").view(3, WIDTH)
    lengths = torch.tensor(LENGTHS, device="cuda", dtype=torch.int32)
    protect = torch.zeros(3, WIDTH, dtype=torch.bool, device="cuda") if protected else None

    def call():
        packed, selection, importance = spk.select_tokens(
            state, ids, lengths, protect=protect, pool_kernel_size=13, sink=4, backend=backend.name, **budget
        )
        return [importance, *selection, packed.values, packed.position_ids, packed.cu_seqlens]

    graph, results = gpu.captured(call)
    for seed in range(3):
        state.copy_(gpu.random(3, 8, WIDTH, device="cuda", seed=seed + 1).abs())
        lengths.copy_(torch.tensor([WIDTH - 1000 * seed, 1 + seed, 31 + seed], dtype=torch.int32))
        if protected:
            protect[:, 100 * seed] = True
        graph.replay()
        replayed = [result.clone() for result in results]
        for result, wanted in zip(replayed, call(), strict=True):
            same(result, wanted)


@on_gpu_backends("select_tokens")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_waits_for_the_device(backend, layout):
    given = inputs(layout, BF16, LENGTHS, ROWS, 0)
    state = spk.new_state(3, 8, WIDTH, device="cuda")
    expected = [tensor.clone() for tensor in chain(backend, layout, given, state)]
    with gpu.no_host_sync():
        results = chain(backend, layout, given, state)
    for result, wanted in zip(results, expected, strict=True):
        same(result, wanted)


@on_gpu_backends("gather_kv")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("given_out", [False, True], ids=["new caches", "given caches"])
def test_gather_kv_waits_for_nothing_and_replays(backend, layout, given_out):
    given = inputs(layout, BF16, (WIDTH,) * 3, ROWS, 0)
    tables = {name: given[name][0] for name in ("cu_seqlens", "block_table") if name in given}
    importance = gpu.random(3, WIDTH, device="cuda")
    out = {}
    if given_out:
        selection = spk.select_chunks(importance, keep_ratio=0.3, backend=backend.name)
        fresh = spk.gather_kv(*given["keys"][:2], selection, layout=layout, backend=backend.name, **tables)
        out["out"] = tuple(torch.zeros_like(buffer) for buffer in fresh)
        if layout == "paged_nhd":
            blocks = torch.arange(len(fresh[0]), dtype=torch.int32, device="cuda")
            out["out_block_table"] = blocks.view(3, -1)

    def call():
        selection = spk.select_chunks(importance, keep_ratio=0.3, backend=backend.name)
        return spk.gather_kv(*given["keys"][:2], selection, layout=layout, backend=backend.name, **tables, **out)

    call()
    with gpu.no_host_sync():
        call()
    graph, results = gpu.captured(call)
    importance.copy_(gpu.random(3, WIDTH, device="cuda", seed=1))
    graph.replay()
    replayed = [result.clone() for result in results]
    for result, wanted in zip(replayed, call(), strict=True):
        same(result, wanted)


@on_gpu_backends("select_tokens")
def test_kernels_run_on_the_current_stream(backend):
    """Inputs arrive late on a stream of their own: kernels on any other would read what was there before."""
    given, late = (inputs("bhtd", BF16, LENGTHS, ROWS, seed) for seed in (0, 1))
    expected = [t.clone() for t in chain(backend, "bhtd", late, spk.new_state(3, 8, WIDTH, device="cuda"))]
    state = spk.new_state(3, 8, WIDTH, device="cuda")
    chain(backend, "bhtd", given, state)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about a tenth of a second
        fill(given, late)
        results = chain(backend, "bhtd", given, state)
    stream.synchronize()
    for result, wanted in zip(results, expected, strict=True):
        same(result, wanted)


@on_gpu_backends("select_tokens")
def test_tensors_of_another_device_than_the_current(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here")
    given = inputs("bhtd", BF16, LENGTHS, ROWS, 0)
    expected = chain(backend, "bhtd", given, spk.new_state(3, 8, WIDTH, device="cuda"))
    there = {name: [tensor.to("cuda:1") for tensor in tensors] for name, tensors in given.items()}
    results = chain(backend, "bhtd", there, spk.new_state(3, 8, WIDTH, device="cuda:1"))
    assert torch.cuda.current_device() == 0
    for result, wanted in zip(results, expected, strict=True):
        assert result.device.index == 1
        same(result, wanted)


def scoring_on_a_workspace(backend, layout: str, given: dict[str, list[torch.Tensor]]):
    """A call that scores all layers on a caller's workspace, the state it writes, and the workspace."""
    single = options_of(given)
    single["seq_lens"] = single["seq_lens"].int()  # the kernels' own type: another one is converted
    given["seq_lens"] = [single["seq_lens"]]
    state = spk.new_state(3, 8, WIDTH, device="cuda")
    size = spk.score_workspace_size(8, 4, 2, 64, WIDTH, batch=3, layers=LAYERS, backend=backend.name)
    workspace = torch.zeros(size, dtype=torch.uint8, device="cuda")
    scratch = {"workspace": workspace, "backend": backend.name}

    def call() -> None:
        state.zero_()
        spk.score_layers_(state, given["queries"], given["keys"], layout=layout, **single, **scratch)

    return call, state, workspace


@on_gpu_backends("score_layers")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scoring_into_a_workspace_allocates_nothing(backend, layout):
    call, _, _ = scoring_on_a_workspace(backend, layout, inputs(layout, BF16, LENGTHS, ROWS, 0))
    assert gpu.allocations(call) == 0


@on_gpu_backends("score_layers")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_graph_on_a_workspace_replays_whatever_the_workspace_holds(backend, layout):
    """Captured without asking for memory; between two replays the workspace is anybody's."""
    given = inputs(layout, BF16, LENGTHS, ROWS, 0)
    call, state, workspace = scoring_on_a_workspace(backend, layout, given)
    asked = []

    def counted() -> None:
        before = gpu.asked_for_memory()
        call()
        asked.append(gpu.asked_for_memory() - before)

    graph, _ = gpu.captured(counted)
    assert asked[-1] == 0  # the last one is what the graph holds
    for seed, (lengths, rows) in enumerate([((33, 4096, 4095), (2, 8, 8)), ((1, 1, 1), (1, 1, 1)), (LENGTHS, ROWS)]):
        other = inputs(layout, BF16, lengths, rows, seed)
        fill(given, other)
        workspace.fill_(255 if seed != 1 else 1)
        graph.replay()
        expected = spk.new_state(3, 8, WIDTH, device="cuda")
        single = options_of(other)
        spk.score_layers_(expected, other["queries"], other["keys"], layout=layout, backend=backend.name, **single)
        same(state, expected, f"replay {seed}")


@on_gpu_backends("select_tokens")
def test_two_graphs_at_once(backend):
    """On two streams, round after round: blocks that wait for each other do so while another grid holds the GPU."""
    sides = []
    for seed in range(2):
        given = inputs("bhtd", BF16, LENGTHS, ROWS, seed)
        state = spk.new_state(3, 8, WIDTH, device="cuda")
        graph, results = gpu.captured(lambda given=given, state=state: chain(backend, "bhtd", given, state))
        expected = [t.clone() for t in chain(backend, "bhtd", given, spk.new_state(3, 8, WIDTH, device="cuda"))]
        sides.append((torch.cuda.Stream(), graph, results, expected, given, state))
    torch.cuda.synchronize()
    for _ in range(30):
        for stream, graph, results, *_ in sides:
            with torch.cuda.stream(stream):
                for result in results:
                    result.zero_()
                graph.replay()
    torch.cuda.synchronize()
    for _, _, results, expected, *_ in sides:
        for result, wanted in zip(results, expected, strict=True):
            same(result, wanted)


@on_gpu_backends("select_tokens")
@pytest.mark.parametrize("name", CALLS)
def test_each_op_waits_for_nothing_and_replays(backend, name):
    """Every public op in every layout, small."""
    call, arguments = CALLS[name], CALLS[name].arguments("cuda")

    def run() -> list[torch.Tensor]:
        return gpu.tensors_in(call.function(**arguments, backend=backend.name))

    expected = [tensor.clone() for tensor in run()]
    with gpu.no_host_sync():
        run()
    graph, results = gpu.captured(run)
    if not name.startswith("score") and not name.endswith("out"):  # those write into memory that is given
        for result in results:
            result.zero_()
    graph.replay()
    for result, wanted in zip(results, expected, strict=True):
        same(result, wanted)


@on_gpu_backends("select_tokens")
def test_memory_does_not_grow(backend):
    given = inputs("paged_nhd", BF16, LENGTHS, ROWS, 0)
    state = spk.new_state(3, 8, WIDTH, device="cuda")
    for _ in range(2):
        chain(backend, "paged_nhd", given, state)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        chain(backend, "paged_nhd", given, state)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before

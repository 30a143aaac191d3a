"""What the vLLM plugin hangs into vLLM: block hashes, and the model runner that needs a GPU. No weights."""

from __future__ import annotations

import dataclasses
import inspect
import random
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import torch
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.utils.hashing import sha256, sha256_cbor
from vllm.v1.core import block_pool, kv_cache_utils
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec
from vllm.v1.request import Request
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from specprefill_kernels.integrations.vllm import core, worker
from specprefill_kernels.integrations.vllm.positions import KEY, Positions

BLOCK = 4


@pytest.fixture(scope="module", autouse=True)
def installed():
    core.install()
    worker.install()
    kv_cache_utils.init_none_hash(sha256)


# ---- prefix caching ----


def request(ids, spans=None, name="r", hash_function=sha256, **options):
    """One of the scheduler's requests. `ids` is the whole prompt."""
    hasher = kv_cache_utils.get_request_block_hasher(BLOCK, hash_function)
    extra, kept = None, list(ids)
    if spans is not None:
        extra = {KEY: Positions(len(ids), spans).to_wire()}
        kept = [token for start, end in spans for token in ids[start:end]]
    params = SamplingParams(max_tokens=30, extra_args=extra)
    return Request(name, kept, params, None, block_hasher=hasher, **options)


def chain(ids, *extra_keys, hash_function=sha256):
    """The hashes as vLLM makes them of blocks with these extra keys."""
    hashes, before = [], None
    for i, keys in enumerate(extra_keys):
        block = ids[i * BLOCK : (i + 1) * BLOCK]
        before = kv_cache_utils.hash_block_tokens(hash_function, before, block, keys)
        hashes.append(before)
    return hashes


@pytest.mark.parametrize("hash_function", [sha256, sha256_cbor])
def test_hashes_hold_positions_where_they_differ_from_indices(hash_function):
    ids = list(range(100, 140))
    one = request(ids, ((0, 6), (10, 14), (30, 40)), hash_function=hash_function)
    kept = list(one.prompt_token_ids)
    assert kept == [*ids[:6], *ids[10:14], *ids[30:]]
    keys = (
        None,
        (("specprefill", (2, 0, 2, 4)),),  # positions 4 5 10 11
        (("specprefill", (2, 4, 2, 20)),),  # 12 13 30 31
        (("specprefill", (4, 20)),),
        (("specprefill", (4, 20)),),
    )
    assert one.block_hashes == chain(kept, *keys, hash_function=hash_function)
    # Decoded tokens stand at 40, 41, ...: the shift stays 20.
    one.append_output_token_ids([1, 2, 3, 4, 5])
    assert one.block_hashes == chain([*kept, 1, 2, 3, 4], *keys, keys[-1], hash_function=hash_function)


def test_ordinary_requests_hash_as_without_the_plugin():
    ids = list(range(21))
    for one in (request(ids), request(ids, ((0, 21),))):
        assert one.block_hashes == chain(ids, *[None] * 5)


def test_names_of_adapters_and_salts_stay_in_their_places():
    ids, spans = list(range(40)), ((0, 2), (10, 25))
    adapter = LoRARequest("adapter", 1, "/nowhere")
    both = request(ids, spans, lora_request=adapter, cache_salt="salt")
    lora, salt = ("lora", "adapter", "/nowhere"), ("cache_salt", "salt")
    keys = [
        (lora, salt, ("specprefill", (2, 0, 2, 8))),
        *[(lora, ("specprefill", (4, 8)))] * 3,
    ]
    assert both.block_hashes == chain(list(both.prompt_token_ids), *keys)
    plain = request(ids[:8], lora_request=adapter, cache_salt="salt")
    assert plain.block_hashes == chain(ids, (lora, salt), (lora,))


def test_events_of_the_cache_publish_positions_as_one_value():
    """Consumers get each key's value without its name; a key is a pair."""
    one = request(list(range(40)), ((0, 2), (10, 25)), cache_salt="salt")
    keys = [block_pool.generate_block_hash_extra_keys(one, i * BLOCK, (i + 1) * BLOCK, 0)[0] for i in range(2)]
    assert kv_cache_utils.to_event_extra_keys([None, *keys]) == [None, ("salt", (2, 0, 2, 8)), ((4, 8),)]


def test_hashes_are_equal_just_where_all_tokens_and_positions_before_are():
    """Two random selections of one token, so that only positions can tell blocks apart; decoded tokens behind them."""
    draw = random.Random(0)
    compared = {True: 0, False: 0}
    for _ in range(400):
        shared = [(start, start + draw.randint(1, 6)) for start in range(0, 24, 8)][: draw.randint(0, 3)]
        pair = []
        for _ in range(2):
            total = draw.choice((60, 61))
            rest = [(start, start + draw.randint(1, 8)) for start in range(24, 52, 10)]
            spans = (*shared, *rest)
            one = request([7] * total, spans)
            one.append_output_token_ids([7] * 8)
            positions = [p for start, end in spans for p in range(start, end)] + list(range(total, total + 8))
            pair.append((one.block_hashes, positions))
        (mine, places), (other, others) = pair
        for i, (hash_here, hash_there) in enumerate(zip(mine, other)):
            end = (i + 1) * BLOCK
            same = places[:end] == others[:end]
            assert (hash_here == hash_there) is same
            compared[same] += 1
    assert min(compared.values()) > 200


# ---- the second model runner: emulation ----
#
# It needs a GPU. Here its own `finish_requests`, `prepare_attn` and `sample`, as the plugin has wrapped them, run on a
# runner that was never constructed; stand-ins are the model, the sampler, the block tables, and the kernel that writes
# indices. The batch, its buffers and what the scheduler says are vLLM's own classes.


class Tables:
    """Notes what slots in the cache are computed from."""

    def gather_block_tables(self, idx_mapping, num_reqs_padded):
        return ()

    def compute_slot_mappings(self, idx_mapping, query_start_loc, positions, num_tokens_padded):
        self.indices = positions.tolist()
        return torch.zeros(1, num_tokens_padded)


class Runner:
    """An engine's steps on a `GPUModelRunner`."""

    def __init__(self):
        self.buffers = InputBuffers(8, 64, torch.device("cpu"))
        self.runner = object.__new__(GPUModelRunner)
        self.tables, self.removed = Tables(), []
        self.counted = None
        own = {
            "pooling_runner": None,
            "pcp_manager": None,
            "batch_sharder": None,
            "rejection_sampler": None,
            "block_tables": self.tables,
            "model": SimpleNamespace(compute_logits=lambda hidden: hidden),
            "sampler": self._sampler,
            "_remove_request": self.removed.append,
            "model_state": object.__new__(DefaultModelState),
        }
        for name, value in own.items():
            setattr(self.runner, name, value)
        self.runner.model_state.rope_state = None

    def _sampler(self, logits, batch):
        self.counted = batch.positions[batch.logits_indices].tolist()
        return SimpleNamespace(num_sampled=None, num_rejected=None)

    def step(self, rows, new=(), finished=(), preempted=()):
        """Run the tokens of `rows`, (request id, first index, count); what the model sees as their positions."""
        output = SchedulerOutput.make_empty()
        self.runner.finish_requests(
            dataclasses.replace(
                output,
                scheduled_new_reqs=[NewRequestData.from_request(one, ([1],), [0]) for one in new],
                scheduled_cached_reqs=CachedRequestData.make_empty(),
                finished_req_ids=set(finished),
                preempted_req_ids=set(preempted),
            )
        )
        counts, padding = [count for _, _, count in rows], 3
        indices = [first + i for _, first, count in rows for i in range(count)]
        batch = InputBatch.make_dummy(len(rows), len(indices) + padding, self.buffers)
        self.buffers.positions[: len(indices)] = torch.tensor(indices)  # as prepare_pos_seq_lens does
        ends = torch.tensor(counts).cumsum(0)
        batch = dataclasses.replace(
            batch,
            req_ids=[name for name, _, _ in rows],
            num_tokens=len(indices),
            num_scheduled_tokens=ends.diff(prepend=torch.zeros(1, dtype=ends.dtype)).int().numpy(),
            num_computed_tokens_np=torch.tensor([first for _, first, _ in rows], dtype=torch.int32).numpy(),
            logits_indices=ends - 1,
        )
        self.runner.prepare_attn(batch)
        assert self.tables.indices == indices + [0] * padding
        assert batch.positions.tolist() == indices + [0] * padding  # as the attention's metadata has them
        assert self.runner.model_state.prepare_inputs(batch, None) == {}
        # What CUDA graphs read, and what is handed to the model.
        seen = self.buffers.positions[: len(indices) + padding].tolist()
        assert batch.positions.tolist() == seen
        assert seen[len(indices) :] == [0] * padding
        self.runner.sample(torch.zeros(len(indices), 4), batch, None)
        assert self.counted == [first + count - 1 for _, first, count in rows]
        return seen[: len(indices)]


def test_the_second_runner_emulated_reads_positions_and_counts_indices():
    """Emulation, see above: a prompt in two pieces, decoding, preemption, and ordinary requests on both sides."""
    one = request(range(20), ((0, 2), (5, 8), (16, 20)), "one")  # positions 0 1 5 6 7 16 17 18 19, then 20, 21, ...
    before, behind = request(range(5), name="before"), request(range(6), name="behind")
    runs = Runner()
    rows = [("before", 0, 5), ("one", 0, 4), ("behind", 0, 6)]
    assert runs.step(rows, new=[before, one, behind]) == [*range(5), 0, 1, 5, 6, *range(6)]
    assert runs.step([("one", 4, 5), ("before", 5, 1)]) == [7, 16, 17, 18, 19, 5]
    assert runs.step([("behind", 6, 1), ("one", 9, 1)]) == [6, 20]
    assert runs.step([("one", 10, 1)]) == [21]
    # Preempted requests come back as new ones, their decoded tokens behind the prompt.
    assert runs.step([("behind", 7, 1)], preempted=["one"]) == [7]
    assert runs.removed == ["one"]
    assert runs.step([("one", 0, 11), ("before", 6, 1)], new=[one]) == [0, 1, 5, 6, 7, 16, 17, 18, 19, 20, 21, 6]
    assert runs.step([("one", 11, 1)]) == [22]
    assert set(worker.tracked(runs.runner)) == {"one"}
    # Its name may come again at once, for an ordinary request.
    assert runs.step([("one", 0, 6)], new=[request(range(6), name="one")], finished=["one"]) == [*range(6)]
    assert worker.tracked(runs.runner) == {}


def full(**windows):
    return FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=64, dtype=torch.float32, **windows)


def sliding(width):
    return SlidingWindowSpec(block_size=16, num_kv_heads=1, head_size=64, dtype=torch.float32, sliding_window=width)


def with_cache(kind, *specs):
    """A runner that was never constructed, with the KV cache of layers of these kinds."""
    runner = object.__new__(kind)
    runner.max_model_len = 1024
    groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs]
    runner.kv_cache_config = SimpleNamespace(kv_cache_groups=groups)
    return runner


@pytest.mark.parametrize(
    ("specs", "problem"),
    [
        ([full()], None),
        ([full(), full(sliding_window=1024)], None),
        ([full(), sliding(1024)], None),
        ([full(), sliding(512)], "sliding_window of 512 tokens"),
        ([full(sliding_window=128)], "sliding_window of 128 tokens"),
        ([full(attention_chunk_size=128)], "attention_chunk_size of 128 tokens"),
        ([SimpleNamespace(kv_cache_specs={"a": full(), "b": full(sliding_window=8)})], "sliding_window of 8 tokens"),
        (
            [full(), MambaSpec(block_size=16, shapes=((1,),), dtypes=(torch.float32,))],
            "a KV cache of another kind than full attention (MambaSpec)",
        ),
    ],
)
def test_the_cache_tells_of_windows_whatever_the_configuration_calls_them(specs, problem):
    found = worker._status(SimpleNamespace(model_runner=with_cache(GPUModelRunner, *specs)))
    assert found is None if problem is None else problem in found


def test_a_model_state_of_another_kind_is_not_trusted():
    class Other(DefaultModelState):
        pass

    runner = with_cache(GPUModelRunner, full())
    runner.model_state = object.__new__(DefaultModelState)
    assert worker._status(SimpleNamespace(model_runner=runner)) is None
    runner.model_state = object.__new__(Other)
    assert "Other is not known" in worker._status(SimpleNamespace(model_runner=runner))


def test_an_engine_refuses_positions_that_no_server_made():
    """A front end without the plugin would let a client's own through."""
    engine = SimpleNamespace(vllm_config=SimpleNamespace(model_config=SimpleNamespace(max_model_len=64)))
    seen = []
    preprocess = core._checked(lambda self, request: seen.append(request))

    def given(wire, ids):
        params = SimpleNamespace(extra_args=None if wire is None else {KEY: wire})
        return SimpleNamespace(sampling_params=params, prompt_token_ids=ids)

    for wire, ids in (([64, 0, 3], [1, 2, 3]), (None, [1, 2])):
        preprocess(engine, given(wire, ids))
    preprocess(engine, SimpleNamespace(sampling_params=None, prompt_token_ids=[1]))
    assert len(seen) == 3
    for wire, ids in (([64, 0, 3], [1, 2]), ([65, 0, 3], [1, 2, 3]), ([64, 0, 3], None)):
        with pytest.raises(ValueError, match="positions: expected those of"):
            preprocess(engine, given(wire, ids))
    assert len(seen) == 3


def test_both_runners_have_what_the_hooks_wrap():
    """Names and arguments of the version that is installed, and the order that the second runner's hooks rely on."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    for kind, names in (
        (CPUModelRunner, ("_update_states", "_preprocess")),
        (GPUModelRunner, ("finish_requests", "prepare_attn", "sample")),
    ):
        assert tuple(method.__name__ for method in kind.of_specprefill) == names
        assert all(getattr(kind, name) is method for name, method in zip(names, kind.of_specprefill))
        assert all(hasattr(method, "__wrapped__") for method in kind.of_specprefill)
        assert worker._status(SimpleNamespace(model_runner=with_cache(kind, full()))) is None
    arguments = {name: list(inspect.signature(getattr(GPUModelRunner, name)).parameters) for name in names}
    assert arguments == {
        "finish_requests": ["self", "scheduler_output"],
        "prepare_attn": ["self", "input_batch"],
        "sample": ["self", "hidden_states", "input_batch", "grammar_output"],
    }
    steps = [
        "self.finish_requests(scheduler_output)",
        "self.add_requests(scheduler_output)",
        "input_batch = self.prepare_inputs(",
        "self.prepare_attn(input_batch)",
        "attn_metadata = self.model_state.prepare_attn(",
        '"positions": input_batch.positions',
        "**self.model_state.prepare_inputs(input_batch, self.req_states)",
    ]
    text = inspect.getsource(GPUModelRunner.execute_model)
    places = [text.index(step) for step in steps]
    assert places == sorted(places)
    assert "self.sample(" in inspect.getsource(GPUModelRunner.sample_tokens)


def test_a_runner_with_methods_of_its_own_is_not_trusted():
    class Other(GPUModelRunner):
        def prepare_attn(self, input_batch):
            return super().prepare_attn(input_batch)

    problem = worker._status(SimpleNamespace(model_runner=object.__new__(Other)))
    assert problem is not None
    assert problem.endswith("Other is not known")
    assert "is not known" in worker._status(SimpleNamespace(model_runner=object()))
    several = with_cache(GPUModelRunner, full())
    several.uses_mrope = True
    assert worker._status(SimpleNamespace(model_runner=several)) == "positions of more than one dimension"


def test_installing_twice_wraps_once():
    before = GPUModelRunner.prepare_attn, block_pool.generate_block_hash_extra_keys
    core.install()
    worker.install()
    assert (GPUModelRunner.prepare_attn, block_pool.generate_block_hash_extra_keys) == before
    assert kv_cache_utils.generate_block_hash_extra_keys is before[1]

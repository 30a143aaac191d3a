"""Why backend "cuda" cannot run, in every way there is, and where it takes its kernels from."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import processes
import pytest
import torch

import specprefill_kernels as spk
from specprefill_kernels import _backends, _cuda, _native
from specprefill_kernels.ops.score.native import arguments
from specprefill_kernels.ops.score.options import ScoreOptions, Sequences

EMULATED = _cuda.EMULATED
SIZES = {"look_ahead": 4, "num_q_heads": 8, "num_kv_heads": 2, "head_dim": 64, "max_len": 1000}

not_emulated = pytest.mark.skipif(EMULATED, reason="SPECPREFILL_EMULATION is set")


class Compiled(SimpleNamespace):
    """A compiled module with CUDA kernels, as far as the question goes whether they can run."""

    def __init__(self, says: str = "", no_code: str = "") -> None:
        super().__init__(
            cuda_unavailable=lambda: says,
            cuda_architectures=lambda: "sm_80 sm_90 compute_90",
            cuda_no_code_for=lambda architectures, major, minor: no_code,
        )


@pytest.fixture
def machine(monkeypatch):
    """A machine with one H100, a CUDA build of torch and of this package; tests break one of them."""
    monkeypatch.setattr(_native, "_C", Compiled())
    monkeypatch.setattr(_native, "_reason", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    return monkeypatch


def why() -> str | None:
    return _cuda.unavailable.__wrapped__()


@not_emulated
def test_where_all_is_there_it_runs(machine):
    assert why() is None


@not_emulated
def test_show_config_names_the_gpu_and_the_architectures(machine):
    machine.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    machine.setattr(_cuda, "unavailable", _cuda.unavailable.__wrapped__)
    assert spk._diagnosis._cuda() == "on NVIDIA H100 (sm_90); compiled for sm_80 sm_90 compute_90"
    machine.setattr(_cuda, "unavailable", lambda: "no GPU")
    assert spk._diagnosis._cuda() == "no: no GPU; compiled for sm_80 sm_90 compute_90"


@not_emulated
def test_without_a_compiled_module(machine):
    machine.setattr(_native, "_C", None)
    machine.setattr(_native, "_reason", "the compiled module is not there")
    assert why() == "the compiled module is not there"


@not_emulated
def test_a_build_without_cuda_says_why_it_has_none(machine):
    machine.setattr(_native, "_C", SimpleNamespace())
    machine.setattr(_native, "build_info", lambda: {"left_out": {"cuda": "nvcc not found: install it"}})
    assert why() == "the compiled module has no CUDA kernels: nvcc not found: install it"
    machine.setattr(_native, "build_info", dict)
    assert "built without setup.py" in why()


@not_emulated
def test_without_a_gpu(machine):
    machine.setattr(torch.cuda, "is_available", lambda: False)
    assert why().startswith("no GPU that torch can use")


@not_emulated
def test_a_torch_for_amd(machine):
    machine.setattr(torch.version, "hip", "7.0")
    assert why() == "this torch is for AMD GPUs"


@not_emulated
def test_a_gpu_without_code(machine):
    machine.setattr(_native, "_C", Compiled(no_code="a GPU of compute capability 7.5, and the kernels need 8.0"))
    assert why() == "a GPU of compute capability 7.5, and the kernels need 8.0"


@not_emulated
def test_what_the_cuda_runtime_says(machine):
    machine.setattr(_native, "_C", Compiled(says="the NVIDIA driver is for CUDA 12.4, and this build needs 13.0"))
    assert why() == "the NVIDIA driver is for CUDA 12.4, and this build needs 13.0"


def test_which_architectures_run_where():
    if not hasattr(_cuda.module() if EMULATED else _native.module(), "cuda_no_code_for"):
        pytest.skip("the compiled module has no CUDA kernels")
    no_code_for = (_cuda.module() if EMULATED else _native.module()).cuda_no_code_for
    runs = {
        "sm_80": [(8, 0), (8, 6), (8, 9)],
        "sm_86": [(8, 6), (8, 9)],
        "sm_90a": [(9, 0)],
        "sm_100f": [(10, 0), (10, 3)],
        "sm_80 sm_120": [(8, 0), (8, 6), (8, 9), (12, 0), (12, 1)],
        "compute_90a": [(9, 0)],
        "compute_100f": [(10, 0), (10, 3)],
        "compute_90": [(9, 0), (10, 0), (10, 3), (12, 0), (12, 1)],
        "sm_80 compute_120": [(8, 0), (8, 6), (8, 9), (12, 0), (12, 1)],
    }
    gpus = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)]
    for architectures, wanted in runs.items():
        assert [gpu for gpu in gpus if not no_code_for(architectures, *gpu)] == wanted, architectures
    assert no_code_for("sm_75", 7, 5) == "a GPU of compute capability 7.5, and the kernels need 8.0"
    assert "code for sm_80 compute_120: build it again with SPECPREFILL_CUDA_ARCHITECTURES=90" in no_code_for(
        "sm_80 compute_120", 9, 0
    )


ASK = """
import torch
import specprefill_kernels as spk
print(spk.available_backends("finalize_importance")["cuda"])
print(spk._diagnosis._cuda())
try:
    spk.finalize_importance(torch.rand(1, 1, 8), backend="cuda")
except spk.BackendUnavailable as error:
    print(error)
print(spk.finalize_importance(torch.rand(1, 1, 8)).shape)
"""


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "no such file"), ("not a module", "not an extension module"), ("", "")],
    ids=["missing", "no module", "a broken module"],
)
def test_an_emulation_that_cannot_be_loaded_says_so(tmp_path, content, says):
    path = tmp_path / ("_emulated.txt" if content else "_emulated.so")
    if content is not None:
        path.write_text(content)
    done = processes.python("-c", ASK, SPECPREFILL_EMULATION=str(path))
    assert done.returncode == 0, done.stderr
    reason, shown, error, shape = done.stdout.splitlines()
    assert reason.startswith(f"SPECPREFILL_EMULATION={path}: {says}")
    assert shown == f"no: {reason}"
    assert error == f"finalize_importance: backend 'cuda' cannot run here: {reason}"
    assert shape == "torch.Size([1, 8])"


def test_a_module_that_is_not_the_emulation_says_so():
    if _native.unavailable() or hasattr(_native.module(), "cuda_unavailable"):
        pytest.skip("needs a compiled module without CUDA")
    path = _native.module().__file__
    done = processes.python("-c", ASK, SPECPREFILL_EMULATION=path)
    assert f"SPECPREFILL_EMULATION={path}: " in done.stdout.splitlines()[0], done.stderr


@pytest.mark.skipif(not EMULATED, reason="SPECPREFILL_EMULATION is not set")
def test_the_emulation_is_shown_and_auto_passes_it_over_for_gpu_tensors():
    rows = dict(spk._diagnosis.config_rows())
    assert rows["cuda kernels"].startswith("emulated on CPU tensors")
    assert _backends._automatic.__wrapped__("finalize_importance", "cpu") == "cpu"
    assert "cuda: takes cpu tensors here" in rows["auto on cuda tensors"]


@pytest.mark.skipif(not EMULATED, reason="SPECPREFILL_EMULATION is not set")
def test_a_workspace_of_the_size_that_is_asked_for_is_enough_and_is_used():
    """At any alignment, whatever is in it; one that is too small is refused."""
    size = spk.score_workspace_size(**SIZES, backend="cuda")
    query = torch.randn(1, 4, 8, 64, generator=torch.Generator().manual_seed(0))
    key = torch.randn(1, 2, 1000, 64, generator=torch.Generator().manual_seed(1))
    expected = spk.score_layer_(spk.new_state(1, 4, 1000), query, key, backend="cuda")
    for offset in (0, 1, 255):
        memory = torch.full((offset + size,), 0xFF, dtype=torch.uint8)
        state = spk.new_state(1, 4, 1000)
        spk.score_layer_(state, query, key, backend="cuda", workspace=memory[offset:])
        assert torch.equal(state, expected)
        assert bool((memory[offset:] != 0xFF).any())
    with pytest.raises(ValueError, match="workspace: expected at least"):
        spk.score_layer_(spk.new_state(1, 4, 1000), query, key, backend="cuda", workspace=memory[:16])


def test_a_workspace_size_needs_a_backend_that_runs():
    if spk.available_backends("score_layers")["cuda"] is None:
        assert spk.score_workspace_size(**SIZES, backend="cuda") > 0
        return
    with pytest.raises(spk.BackendUnavailable, match="cuda"):
        spk.score_workspace_size(**SIZES, backend="cuda")


@not_emulated
def test_a_call_goes_to_the_current_stream_of_the_tensors_device(monkeypatch):
    """And makes that device current, where it is not."""
    calls = []
    current = SimpleNamespace(device=0)

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.device = self.device.index

        def __exit__(self, *_):
            current.device = 0

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current.device)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=100 + device.index))
    for index in (0, 3):
        on = SimpleNamespace(device=torch.device("cuda", index))
        _cuda.call(lambda *arguments: calls.append((current.device, *arguments)), "argument", on=on)
    assert calls == [(0, "argument", 100), (3, "argument", 103)]
    assert current.device == 0


@pytest.mark.skipif(not EMULATED, reason="needs SPECPREFILL_EMULATION")
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_layers_of_one_call_may_scale_their_keys_differently(order):
    """From C each layer has a scale per head, one for all, or none; layers go together only where that is the same."""
    random = torch.Generator().manual_seed(0)
    queries = [torch.randn(1, 2, 4, 16, generator=random) for _ in range(3)]
    keys = [torch.randn(1, 2, 40, 16, generator=random) for _ in range(3)]
    scales = [None, torch.tensor([0.5, 2.0]), torch.tensor([1.5])]
    module, options, state = _cuda.module(), ScoreOptions(), spk.new_state(1, 2, 40)
    layers = []
    for i in order:
        scale = [] if scales[i] is None else [scales[i]]
        score, layer = arguments(
            module, state, [queries[i]], [keys[i]], Sequences(None, None, None, None), [0], [], scale, options
        )
        layers += layer
    workspace = torch.empty(1 << 20, dtype=torch.uint8)
    module.score_layers_cuda(score, layers, workspace.data_ptr(), workspace.numel(), 0)
    expected = spk.new_state(1, 2, 40)
    for i in order:
        spk.score_layer_(expected, queries[i], keys[i], key_scale=scales[i], backend="reference")
    torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.skipif(not EMULATED, reason="needs SPECPREFILL_EMULATION")
def test_prompts_far_shorter_than_the_state():
    """A state for the longest prompt that may come: work is counted by those that came."""
    random = torch.Generator().manual_seed(0)
    query, key = torch.randn(3, 2, 2, 16, generator=random), torch.randn(3, 1, 70, 16, generator=random)
    lengths = torch.tensor([70, 3, 41])
    wide = torch.zeros(3, 1, 50000, 16)
    wide[:, :, :70] = key
    state = spk.score_layer_(spk.new_state(3, 2, 50000), query, wide, seq_lens=lengths, backend="cuda")
    expected = spk.score_layer_(spk.new_state(3, 2, 70), query, key, seq_lens=lengths, backend="cuda")
    assert torch.equal(state[:, :, :70], expected)
    assert not state[:, :, 70:].any()

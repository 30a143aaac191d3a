"""The report from made-up results: every table, every picture, and whatever is absent or broken."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import bench_results
import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # the bench is not part of the package

from bench import report, report_tables  # noqa: E402
from bench.report_data import FILES, load  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bench_results.write(tmp_path)
    return tmp_path


def test_the_page_has_every_table_and_picture(folder, capsys):
    pytest.importorskip("matplotlib")
    assert report.main([str(folder)]) == 0
    page = (folder / "report.md").read_text()
    for title, _, _ in (report.TABLES[name] for name in report.TABLES if name != "timing"):
        assert f"## {title}" in page
    shown = {line.split("(")[1].rstrip(")") for line in page.splitlines() if line.startswith("![")}
    names = {"latency", "roofline", "matmul", "eager", "memory", "tail", "peers", "scaling", "ttft"}
    assert shown == {f"{name}.png" for name in names}
    assert all((folder / name).stat().st_size > 5000 for name in shown)
    assert "Nothing here was measured on a GPU." in page
    assert "9 pictures" in capsys.readouterr().out


def test_figures_are_those_of_the_files(folder):
    results = load(folder)
    lines = report_tables.score(results).splitlines()
    assert lines[0] == "| model | tokens | bf16, 2 threads |"
    assert "| SmolLM2-135M | 128K | 9 ms (4/30 layers): 1.23 / 11.2 / 8.9 |" in lines
    assert "| Llama-3.1-8B | 2K | 64 ms: 1.23 / 11.2 / 8.9 |" in lines
    assert "| fast enough | 3 of 4 | 1.20 | 1.70 | no |" in report_tables.goals(results)
    assert "| select_tokens, 1 row | 2K | warm | 1 | 30 us | 20 us | 1.50 | 0.75 | 4.0x |" in report_tables.select(
        results
    )
    assert "(from 1 of 32 layers)" in report_tables.peers(results)
    assert "kvpress SnapKV was not measured: not installed." in report_tables.peers_compute(results)
    assert "| score_layer | 1.010 [0.990, 1.030] |" in report_tables.scaling(results)
    table = report_tables.ttft(results)
    assert table.count("| base 2 of 80 |") == table.count("| base 2 of 80, speculator 3 of 32 |") == 12
    assert table.splitlines()[-2:] == ["- random weights", "- random weights; base timed by 2 of 80 layers, scaled"]
    assert " | `python -m bench.ttft --tokens 4096`<br>`python -m bench.ttft --tokens 32768`<br>" in (
        report_tables.machine(results)
    )
    assert "| cpu | 2 | 10.0 | 12.0 | 100 | 0 |" in report_tables.ceilings(results)
    assert "Some Processor, 2 cores (avx512f); torch 2.13.0" in report_tables.machine(results)
    assert "`pytest bench`" in report_tables.machine(results)


def test_a_gpu_s_results_do_not_read_as_a_cpu_s(folder):
    ops = json.loads((folder / "ops.json").read_text())
    ops["environment"] |= {"device": "cuda", "gpu": "Some GPU"}
    (folder / "ops-gpu.json").write_text(json.dumps(ops))
    results = load(folder)
    assert len(results.ops) == 2 * len(ops["benchmarks"])
    assert "| `ops-gpu.json` | Some GPU;" in report_tables.machine(results)
    assert "Nothing here was measured on a GPU" not in report.page(results, [])


@pytest.mark.parametrize("kept", [*FILES.values(), "ops.json"])
def test_any_single_file_makes_a_report(tmp_path, folder, kept):
    for path in folder.glob("*.json"):
        if path.name != kept:
            path.unlink()
    known = (folder / kept).exists()
    assert report.main([str(folder), "--no-plots"]) == (0 if known else 2)
    if known:
        assert "Not in this folder: " in (folder / "report.md").read_text()


def test_a_broken_file_costs_no_other(folder, capsys):
    (folder / "peers.json").write_text('{"rows": [')
    (folder / "scaling.json").write_text("[]")
    assert report.main([str(folder), "--no-plots"]) == 1
    page = (folder / "report.md").read_text()
    assert "Could not be read: peers.json" in page
    assert "Could not be read: scaling.json: not a report" in page
    assert "## Scoring" in page
    assert "peers.json" in capsys.readouterr().err


def test_rows_that_failed_are_no_figures(folder):
    report_ = json.loads((folder / "ttft.json").read_text())
    report_["rows"] = [row | {"failed": "out of memory"} for row in report_["rows"]]
    (folder / "ttft.json").write_text(json.dumps(report_))
    assert report_tables.ttft(load(folder)) == ""


def test_markers_are_filled_again_and_again(folder, tmp_path):
    text = (
        "Before.\n\n<!-- bench:goals -->\n<!-- /bench:goals -->\n\n<!-- bench:timing -->\nold\n<!-- /bench:timing -->\n"
    )
    file = tmp_path / "SOME.md"
    file.write_text(text)
    for _ in range(2):
        assert report.main([str(folder), "--no-plots", "--readme", "--files", str(file)]) == 0
        filled = file.read_text()
        assert filled.count("fast enough") == 1
        assert filled.startswith("Before.\n\n<!-- bench:goals -->\n| goal |")
        assert "<!-- bench:timing -->\nold\n<!-- /bench:timing -->" in filled, "no results, so it stays"
    with pytest.raises(ValueError, match=r"bench:nothing.*expected one of"):
        report.fill("<!-- bench:nothing --><!-- /bench:nothing -->", load(folder))


def test_the_readme_s_markers_are_known():
    text = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    assert text.count("<!-- bench:") == text.count("<!-- /bench:") >= 8
    report.fill(text, load(ROOT / "bench"))  # raises for a name that is none


@pytest.mark.parametrize(
    ("seconds", "said"), [(2.5, "2.5 s"), (123.4, "123 s"), (0.01234, "12.3 ms"), (4.2e-5, "42 us"), (3e-7, "0.3 us")]
)
def test_times_are_said_with_three_digits(seconds, said):
    assert report_tables.time(seconds) == said

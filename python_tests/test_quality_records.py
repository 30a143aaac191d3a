"""Files of records: resumed, guarded against other settings, and read back as written."""

from __future__ import annotations

import json

import pytest
from quality_samples import record

from specprefill_kernels.quality.records import Record, RecordFile, read_records

SETTING = {"base": {"name": "a", "dtype": "float32"}, "keep_ratios": (0.1, 0.3)}


def test_records_come_back_as_they_went_in(tmp_path) -> None:
    path = tmp_path / "new" / "records.jsonl"
    written = [record(0, evidence=None), record(1, score=0.25, answer="gr\u00fcn\nline \u2028 two", note="cut")]
    with RecordFile(path, SETTING) as file:
        for one in written:
            file.append(one)
    setting, records = read_records(path)
    assert records == written
    assert setting == {"base": {"name": "a", "dtype": "float32"}, "keep_ratios": [0.1, 0.3]}
    assert isinstance(records[0], Record)


def test_a_record_is_on_disk_before_the_next_one_begins(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    with RecordFile(path, SETTING) as file:
        file.append(record(0))
        assert len(path.read_text().splitlines()) == 2


def test_what_is_done_is_known_after_reopening(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    with RecordFile(path, SETTING) as file:
        file.append(record(0))
    with RecordFile(path, SETTING) as file:
        assert file.done == {("door", 0, "kept", 0.3)}
        file.append(record(1))
    assert [one.seed for one in read_records(path)[1]] == [0, 1]


def test_another_setting_is_refused_by_name_and_nothing_is_lost(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    with RecordFile(path, SETTING) as file:
        file.append(record(0))
    before = path.read_bytes()
    other = {"base": {"name": "a", "dtype": "bfloat16"}, "keep_ratios": (0.1,)}
    with pytest.raises(ValueError, match=r'base.dtype was "float32", is "bfloat16"; keep_ratios was \[0.1, 0.3\]'):
        RecordFile(path, other)
    assert path.read_bytes() == before
    with RecordFile(path, other, resume=False) as file:
        assert file.records == []
    assert len(path.read_text().splitlines()) == 1


def test_a_setting_without_records_binds_nobody(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    RecordFile(path, SETTING).close()
    with RecordFile(path, {"b": 2}) as file:
        file.append(record(0))
    assert read_records(path)[0] == {"b": 2}


def test_a_line_that_was_cut_off_is_dropped_and_said(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    with RecordFile(path, SETTING) as file:
        file.append(record(0))
        file.append(record(1))
    path.write_bytes(path.read_bytes()[:-5])
    with RecordFile(path, SETTING) as file:
        assert file.dropped_line
        assert [one.seed for one in file.records] == [0]
        file.append(record(2))
    assert [one.seed for one in read_records(path)[1]] == [0, 2]


@pytest.mark.parametrize("content", ["", "not json\n", '{"a": 1}\n', '{"format": 9, "setting": {}}\n', "[]\n", "1\n"])
def test_other_files_are_no_records(content: str, tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"expected (records of an evaluation|format 1)"):
        read_records(path)


def test_a_broken_line_in_the_middle_is_an_error_and_not_overwritten(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    with RecordFile(path, SETTING) as file:
        file.append(record(0))
    path.write_text(path.read_text() + "{broken\n" + json.dumps({"x": 1}) + "\n")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="expected records of an evaluation"):
        RecordFile(path, SETTING)
    assert path.read_bytes() == before

"""Results are files that are there together or not at all."""

import csv
import io
import json

import pytest

from mla_jax import result_files


def test_files_are_replaced(tmp_path):
    (tmp_path / "a.json").write_text("earlier")
    result_files.write(tmp_path, {"a.json": b"1", "b.csv": b"2"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.json": b"1", "b.csv": b"2"}


def test_a_failure_leaves_what_was_there(tmp_path):
    (tmp_path / "a.json").write_text("earlier")
    with pytest.raises(OSError):
        result_files.write(tmp_path, {"a.json": b"1", "absent/b.csv": b"2"})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "earlier"


def test_tables_and_records_are_read_again():
    rows = [dict(name="a, b", x=0.1 + 0.2), dict(name='"c"', x=1e-30)]
    text = result_files.csv_bytes(rows).decode()
    assert [dict(row, x=float(row["x"])) for row in csv.DictReader(io.StringIO(text))] == rows
    assert json.loads(result_files.json_bytes(dict(rows=rows))) == dict(rows=rows)
    with pytest.raises(ValueError, match="not JSON compliant"):
        result_files.json_bytes(dict(x=float("nan")))

"""Parquet files have the columns of all records; a conflict between records is reported."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaledown.cli import main
from scaledown.data.input.training_files import entries

GOOD = {"query": "What?", "documents": ["One.", "Two."], "answer": "This."}
COMMANDS = ["merge", "export"]


def lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def numbered(count: int, **last: object) -> list[dict]:
    """`count` records; the last has more columns."""
    made = [{**GOOD, "query": f"Question {number}?"} for number in range(count)]
    made[-1] |= last
    return made


def parquet(command: str, path: Path, folder: Path) -> tuple[int, Path]:
    """The status of a command that writes Parquet, and its file."""
    if command == "merge":
        return main(
            ["merge", str(path), "--output_file", str(folder / "full.parquet")]
        ), folder / "full.parquet"
    words = ["export", str(path), "--format", "parquet", "--output_dir", str(folder / "shared")]
    return main(words), folder / "shared" / "train.parquet"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "late",
    [
        {"groundedness": 0.5},
        {"source": "wiki"},
        {"level": 3},
        {"tags": ["a", "b"], "meta": {"page": 7, "of": {"deep": [1.5]}}},
        {"answer_tokens": 7, "kept": True},
    ],
)
def test_columns_of_late_records_are_kept(command: str, late: dict, tmp_path: Path) -> None:
    status, written = parquet(command, lines(tmp_path / "a.jsonl", numbered(1500, **late)), tmp_path)
    assert status == 0
    found = [entry.record for entry in entries(written)]
    assert found == numbered(1500, **late)


def test_merge_refuses_scores_in_late_records_only(tmp_path: Path, capsys) -> None:
    path = lines(tmp_path / "a.jsonl", numbered(1200, reranking_scores=[1.0, 0.5]))
    assert parquet("merge", path, tmp_path)[0] == 1
    assert f"{path}:1200: some records have reranking_scores and some have none" in capsys.readouterr().err


def test_export_keeps_scores_in_late_records_only(tmp_path: Path) -> None:
    records = numbered(1200, reranking_scores=[1.0, 0.5])
    status, written = parquet("export", lines(tmp_path / "a.jsonl", records), tmp_path)
    assert status == 0
    assert [entry.record for entry in entries(written)] == records


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("early", "late", "reason"),
    [
        (3, "three", "level is string here and int64 in earlier records"),
        ("three", 3, "level is int64 here and string in earlier records"),
        (True, 1, "level is int64 here and bool in earlier records"),
        ([1], ["a"], "level is list<item: string> here and list<item: int64> in earlier records"),
        ({"a": 1}, "a", "level is string here and struct<a: int64> in earlier records"),
        (1, [2, "b"], "level holds values of several types"),
    ],
)
def test_conflict_is_reported_with_its_line(
    command: str, early: object, late: object, reason: str, tmp_path: Path, capsys
) -> None:
    records = numbered(1300, level=late)
    records[7]["level"] = early
    path = lines(tmp_path / "a.jsonl", records)
    status, written = parquet(command, path, tmp_path)
    assert status == 1
    error = capsys.readouterr().err
    assert f"{path}:1300: {reason}, which Parquet cannot hold in one column" in error
    assert "unexpected" not in error
    assert not written.exists()


def test_wrong_type_of_a_known_column_is_reported(tmp_path: Path, capsys) -> None:
    path = lines(tmp_path / "a.jsonl", numbered(4, prompt_tokens="many"))
    assert parquet("merge", path, tmp_path)[0] == 1
    assert f"{path}:4: prompt_tokens is string here and int64 in earlier records" in capsys.readouterr().err


@pytest.mark.parametrize("value", [{}, [{}], (1 << 53) + 1])
def test_values_that_parquet_cannot_hold_are_reported(value: object, tmp_path: Path, capsys) -> None:
    records = numbered(3, extra=value)
    records[0]["extra"] = 0.5 if isinstance(value, int) else None
    assert parquet("merge", lines(tmp_path / "a.jsonl", records), tmp_path)[0] in {0, 1}
    error = capsys.readouterr().err
    assert "unexpected" not in error
    assert "write .json or .jsonl" in error


def test_integers_become_floats_if_a_later_value_is_one(tmp_path: Path) -> None:
    records = numbered(1100, level=0.5)
    records[0]["level"] = 3
    _, written = parquet("merge", lines(tmp_path / "a.jsonl", records), tmp_path)
    found = [entry.record.get("level") for entry in entries(written)]
    assert (found[0], found[-1]) == (3.0, 0.5)


plain = st.none() | st.booleans() | st.integers(-(1 << 50), 1 << 50) | st.text(max_size=4)
values = st.recursive(
    plain | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(
    extras=st.lists(st.dictionaries(st.sampled_from(["x", "y", "query_id"]), values), min_size=1, max_size=5)
)
def test_any_columns_are_written_or_refused_with_an_error(extras: list[dict], tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("c")
    records = [{**GOOD, "query": f"q{place}", **extra} for place, extra in enumerate(extras)]
    path = lines(folder / "a.jsonl", records)
    status, written = parquet("merge", path, folder)
    if status == 0:
        found = [entry.record for entry in entries(written)]
        assert [record["query"] for record in found] == [record["query"] for record in records]
        kept = [name for record in records for name, value in record.items() if value is not None]
        assert {name for record in found for name in record} == set(kept)
    else:
        assert not written.exists()


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_null_scores_are_sound(ending: str, tmp_path: Path, capsys) -> None:
    path = lines(tmp_path / "a.jsonl", [{**one, "reranking_scores": None} for one in numbered(3)])
    assert main(["validate", str(path)]) == 0
    assert "3 records, all sound" in capsys.readouterr().out
    output = tmp_path / f"full.{ending}"
    assert main(["merge", str(path), "--output_file", str(output)]) == 0
    assert [entry.record["answer"] for entry in entries(output)] == ["This."] * 3
    assert main(["validate", str(output)]) == 0

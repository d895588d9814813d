import dataclasses
import json
import random
import tracemalloc
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaledown.cli import main
from scaledown.config.prepare import PrepareConfig
from scaledown.data.input import training_files
from scaledown.data.input.training_files import entries, problems, validate
from scaledown.data.output.merge import _COMPARED_SETTINGS, merge
from scaledown.data.output.writers import write_examples
from scaledown.errors import InputError, OutputError, UsageError
from scaledown.run import progress

GOOD = {"query": "What?", "documents": ["One.", "Two."], "answer": "This."}
SCORED = {**GOOD, "reranking_scores": [0.5, -1.25]}

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
example = st.fixed_dictionaries({"query": text, "documents": st.lists(text, max_size=3), "answer": text})


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".parquet"])
@settings(max_examples=40, deadline=None)
@given(records=st.lists(example, max_size=6), scored=st.booleans(), chunk=st.integers(1, 40))
def test_written_records_are_read_unchanged(ending, records, scored, chunk, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("f") / f"data{ending}"
    if scored:
        records = [{**r, "reranking_scores": [float(i) for i in range(len(r["documents"]))]} for r in records]
    before = training_files._CHUNK_CHARACTERS
    training_files._CHUNK_CHARACTERS = chunk
    try:
        assert write_examples(path, records) == len(records)
        assert [entry.record for entry in entries(path)] == records
    finally:
        training_files._CHUNK_CHARACTERS = before
    if ending == ".json":
        assert json.loads(path.read_text(encoding="utf-8")) == records
    if ending == ".parquet":
        assert pq.read_table(path).num_rows == len(records)


def test_the_json_is_the_guides_layout(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_examples(path, [SCORED, GOOD])
    assert path.read_text() == json.dumps([SCORED, GOOD], indent=2) + "\n"


def test_datasets_reads_every_format(tmp_path: Path) -> None:
    import datasets

    for ending, builder in ((".json", "json"), (".jsonl", "json"), (".parquet", "parquet")):
        path = tmp_path / f"data{ending}"
        write_examples(path, [SCORED] * 3)
        loaded = datasets.load_dataset(
            builder, data_files=str(path), split="train", cache_dir=str(tmp_path / "c")
        )
        assert loaded.num_rows == 3
        assert loaded[0] == SCORED


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def failing():
        yield GOOD
        raise RuntimeError("crash")

    with pytest.raises(RuntimeError):
        write_examples(path, failing())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ([], "is list"),
        ({**GOOD, "query": " "}, "query is empty"),
        ({**GOOD, "answer": 3}, "answer is int"),
        ({k: v for k, v in GOOD.items() if k != "answer"}, "has no answer"),
        ({**GOOD, "documents": []}, "documents is empty"),
        ({**GOOD, "documents": "One."}, "documents is not a list"),
        ({**GOOD, "documents": ["One.", 2]}, "document 2 is neither"),
        ({**GOOD, "documents": ["One.", {"title": "T"}]}, "document 2 is neither"),
        ({**GOOD, "documents": [""]}, "document 1 is empty"),
        ({**GOOD, "reranking_scores": [1.0]}, "has 1 reranking_scores for 2 documents"),
        ({**GOOD, "reranking_scores": [1.0, float("nan")]}, "not a finite number"),
        ({**GOOD, "reranking_scores": [1.0, 10**400]}, "not a finite number"),
        ({**GOOD, "reranking_scores": 1}, "reranking_scores is not a list"),
        ({**GOOD, "reranking_scores": [1.0, float("-inf")]}, "not a finite number"),
    ],
)
def test_problems_are_named(record, problem) -> None:
    assert any(problem in found for found in problems(record))


def test_sound_records_have_no_problems() -> None:
    for record in (GOOD, SCORED, {**GOOD, "documents": [{"title": "T", "text": "One."}, {"text": "Two."}]}):
        assert problems(record) == []


def test_validate_reports_each_wrong_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([GOOD, {**GOOD, "answer": ""}, GOOD, {"query": "x"}], indent=2))
    assert main(["validate", str(path)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{path}:10: record 2: answer is empty"
    assert out[1] == f"{path}:26: record 4: has no answer"
    assert out[2] == f"{path}:26: record 4: has no documents"
    assert out[3].startswith(f"{path}: 4 records, 2 with problems")
    path.write_text(json.dumps([GOOD]))
    assert main(["validate", str(path)]) == 0
    assert "1 record, all sound" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "expected a JSON list"),
        ('{"query": 1}', "expected a JSON list"),
        (json.dumps([GOOD])[:-1], "cut short"),
        (json.dumps([GOOD])[:-20], "invalid JSON"),
        (json.dumps([GOOD]) + "x", "more text after"),
        (json.dumps([GOOD])[:-1] + json.dumps(GOOD) + "]", "expected `,`"),
        (json.dumps([GOOD])[:-1] + ",]", "invalid JSON"),
        (json.dumps([{**GOOD, "answer": "\ud800"}]), "half of a surrogate pair"),
    ],
)
def test_broken_json_is_named(content: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    result = validate(path)
    assert result.bad_records == 1
    assert problem in result.messages[-1]


@pytest.mark.parametrize(("ending", "content"), [(".json", "[]"), (".jsonl", "\n")])
def test_a_file_without_records_has_none(ending: str, content: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / f"a{ending}"
    path.write_text(content)
    assert main(["validate", str(path)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: holds no records",
        f"{path}: 0 records, 0 with problems",
    ]


def test_queries_that_come_again_are_counted_and_no_problem(tmp_path: Path, capsys) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([GOOD, {**GOOD, "answer": "That."}, {**GOOD, "query": "Who?"}]))
    assert main(["validate", str(path)]) == 0
    assert "3 records, all sound, 1 repeated query" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "match"), [("", "is a folder; name"), ("none.json", "no such file")])
def test_validate_refuses_unreadable_files_in_one_line(name: str, match: str, tmp_path: Path, capsys) -> None:
    assert main(["validate", str(tmp_path / name)]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {tmp_path / name}: ")
    assert match in err
    assert err.count("\n") == 1


HOSTILE = [
    ("1" + "0" * 30, "more than 64 bits"),
    ('"\\ud800"', "half of a surrogate pair"),
    ('{"\\udfff": 1}', "half of a surrogate pair"),
    ("[NaN]", "not finite"),
    ("-Infinity", "not finite"),
    ("[" * 300 + "]" * 300, "nested too deep"),
]


@pytest.mark.parametrize(("value", "problem"), HOSTILE)
@pytest.mark.parametrize("column", ["extra", "title"])
def test_values_that_json_lacks_are_refused_by_name(
    value: str, problem: str, column: str, tmp_path: Path
) -> None:
    path, output = tmp_path / "my a.json", tmp_path / "full.json"
    record = (
        {**GOOD, "documents": [{"text": "One.", "title": "!"}]}
        if column == "title"
        else {**GOOD, "extra": "!"}
    )
    path.write_text(json.dumps([GOOD, record]).replace('"!"', value))
    assert problem in validate(path).messages[0]
    with pytest.raises(
        InputError, match=rf"a\.json:1: record 2: .* {problem}.*; `scaledown validate '{path}'`"
    ):
        merge([path], output)
    assert not output.exists()


def test_parquet_columns_that_json_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{**GOOD, "extra": b"bytes"}]), path)
    with pytest.raises(InputError, match="extra holds bytes"):
        merge([path], tmp_path / "full.json")


def test_invalid_utf8_and_jsonl_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(orjson.dumps(GOOD) + b"\n{broken\n" + b'{"query": "\xff"}\n')
    result = validate(path)
    assert result.records == 1
    assert [message.partition(": record")[0] for message in result.messages] == [f"{path}:2", f"{path}:3"]
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"query": "\xff"}]')
    assert "invalid UTF-8" in validate(path).messages[0]


def test_more_problems_than_are_shown_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n" * 50)
    assert main(["validate", str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 102
    assert lines[100] == "… and 50 more"


def test_some_scored_and_some_not_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([GOOD, SCORED]))
    assert "some have none" in validate(path).messages[0]


def test_a_large_file_is_read_in_little_memory(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "a.json"
    record = {**GOOD, "documents": ["x" * 2000] * 5}
    write_examples(path, (record for _ in range(4000)))
    assert path.stat().st_size > 40_000_000
    tracemalloc.start()
    assert sum(1 for _ in entries(path)) == 4000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


# merge


def made(path: Path, records: list[dict], **parameters) -> Path:
    """A training file with the manifest of the run that made it."""
    write_examples(path, records)
    work = Path(f"{path}.work")
    work.mkdir()
    manifest = {
        "parameters": {
            "top_k_retrieval": 5,
            "queries_file": [path.name],
            "output_file": str(path),
            **parameters,
        },
        "models": {"teacher": "commit:1"},
        "inputs": {"corpus": "c"},
    }
    (work / "manifest.json").write_text(json.dumps(manifest))
    return path


def numbered(numbers, base=GOOD) -> list[dict]:
    return [{**base, "query": f"Question {n}?"} for n in numbers]


def test_merge_joins_in_order_and_drops_duplicates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = made(tmp_path / "train_data_a.json", numbered(range(5)))
    second = made(tmp_path / "train_data_b.json", numbered(range(3, 9)))
    output = tmp_path / "full.jsonl"
    assert main(["merge", str(first), str(second), "--output-file", str(output)]) == 0
    assert [json.loads(line)["query"] for line in output.read_text().splitlines()] == [
        f"Question {n}?" for n in range(9)
    ]
    assert "9 records from 2 files, 2 repeated queries left out" in capsys.readouterr().out


def test_merge_looks_for_all_files_before_it_reads_one(tmp_path: Path, capsys) -> None:
    (tmp_path / "part.json").write_text("[{}]")  # this is not sound, but that is for later
    words = ["merge", str(tmp_path / "part.json"), str(tmp_path / "gone.json")]
    assert main([*words, "--output_file", str(tmp_path / "full.json")]) == 1
    assert "gone.json: there is no such file" in capsys.readouterr().err


def test_merge_shows_its_progress(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0.0)
    paths = [tmp_path / f"{number}.jsonl" for number in range(2)]
    for number, path in enumerate(paths):
        path.write_text(json.dumps(GOOD | {"query": f"q{number}"}) + "\n")
    assert main(["merge", *map(str, paths), "--output_file", str(tmp_path / "full.json")]) == 0
    told = capsys.readouterr().err
    assert "merge: 1/~2 records" in told
    assert "merge: 2/~2 records" in told


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".parquet"])
def test_merge_streams(ending: str, tmp_path: Path, monkeypatch) -> None:
    """Four times the files need no more memory, but for a hash of each query."""
    monkeypatch.setattr(training_files, "_CHUNK_CHARACTERS", 1 << 14)
    paths = [tmp_path / f"{number}{ending}" for number in range(8)]
    for number, path in enumerate(paths):
        rows = ({**GOOD, "query": f"{number} {row}", "answer": f"{row}" * 400} for row in range(1000))
        write_examples(path, rows)

    def peak(count: int) -> int:
        tracemalloc.start()
        try:
            assert merge(paths[:count], tmp_path / f"full{ending}").records == 1000 * count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1)  # what is imported late
    few, many = peak(2), peak(8)
    assert many - few < 6000 * 250


def test_merge_writes_through_a_link(tmp_path: Path) -> None:
    output, target = tmp_path / "full.json", tmp_path / "target"
    output.symlink_to(target)
    path = made(tmp_path / "a.json", numbered([1]))
    assert main(["merge", str(path), "--output_file", str(output)]) == 0
    assert output.is_symlink()
    assert json.loads(target.read_text()) == numbered([1])


def test_merge_refuses_different_settings_without_the_flag(tmp_path: Path) -> None:
    first = made(tmp_path / "a.json", numbered([1]))
    second = made(tmp_path / "b.json", numbered([2]), top_k_retrieval=20)
    with pytest.raises(UsageError, match="top_k_retrieval: 20 and 5"):
        merge([first, second], tmp_path / "full.json")
    assert not (tmp_path / "full.json").exists()
    assert merge([first, second], tmp_path / "full.json", allow_different_settings=True).records == 2


def test_merge_compares_only_settings_that_change_examples(tmp_path: Path, caplog) -> None:
    own = {
        "max_bad_fraction": 0.5,
        "passages_per_shard": 9,
        "queries_per_shard": 9,
        "strict": True,
        "seed": 4,
    }
    first, second = made(tmp_path / "a.json", numbered([1])), made(tmp_path / "b.json", numbered([2]), **own)
    assert merge([first, second], tmp_path / "full.json").records == 2
    assert not caplog.records
    assert set(_COMPARED_SETTINGS) <= {field.name for field in dataclasses.fields(PrepareConfig)}


def test_merge_finds_the_manifest_of_a_run_directory_of_another_name(tmp_path: Path, caplog) -> None:
    first = made(tmp_path / "a.json", numbered([1]))
    second = made(tmp_path / "b.json", numbered([2]), top_k_retrieval=20)
    place = Path(f"{second}.work").rename(tmp_path / "run") / "manifest.json"
    manifest = json.loads(place.read_text())
    place.write_text(json.dumps(manifest | {"output": {"path": str(second)}}))
    with pytest.raises(UsageError, match="top_k_retrieval: 20 and 5"):
        merge([first, second], tmp_path / "full.json")
    place.write_text(json.dumps(manifest | {"output": {"path": "/another.json"}}))
    assert merge([first, second], tmp_path / "full.json").records == 2
    assert f"{second}: it has no run directory, so its settings are not compared" in caplog.text


def test_merge_does_not_trip_over_a_manifest_of_another_kind(tmp_path: Path) -> None:
    path = made(tmp_path / "a.json", numbered([1]))
    for content in ("12", '{"parameters": {}}', '{"parameters": 1, "models": 2, "inputs": 3}'):
        (tmp_path / "a.json.work" / "manifest.json").write_text(content)
        assert merge([path], tmp_path / "full.json").records == 1


def test_merge_compares_content_and_not_where_it_lies(tmp_path: Path) -> None:
    first = made(tmp_path / "a.json", numbered([1]), corpus_path="here.jsonl", teacher_model="org/name")
    second = made(tmp_path / "b.json", numbered([2]), corpus_path="/there.jsonl", teacher_model="/a/folder")
    assert merge([first, second], tmp_path / "full.json").records == 2


def test_merge_compares_prompt_and_engine(tmp_path: Path) -> None:
    paths = []
    for name, prompt, backend in (("a", "1", "vllm"), ("b", "2", "vllm"), ("c", "1", "openvino")):
        path = made(tmp_path / f"{name}.json", numbered([len(paths)]))
        place = Path(f"{path}.work") / "manifest.json"
        manifest = json.loads(place.read_text())
        manifest["inputs"]["prompt"] = prompt
        manifest["stages"] = {"answers": {"settings": {"backend": backend}}}
        place.write_text(json.dumps(manifest))
        paths.append(path)
    with pytest.raises(UsageError, match=r"prompt \(content\)"):
        merge(paths[:2], tmp_path / "full.json")
    with pytest.raises(UsageError, match="teacher_backend"):
        merge([paths[0], paths[2]], tmp_path / "full.json")


def test_extra_columns_of_other_origin_fit_or_are_named(tmp_path: Path) -> None:
    write_examples(tmp_path / "a.parquet", numbered([1], GOOD | {"query_id": 7, "groundedness": 0.5}))
    (entry,) = entries(tmp_path / "a.parquet")
    assert entry.record["query_id"] == "7"
    late = [*numbered(range(1000)), *numbered([1000], GOOD | {"groundedness": 0.5})]
    with pytest.raises(OutputError, match="column groundedness is in some records, but not in the first"):
        write_examples(tmp_path / "b.parquet", late)
    assert not (tmp_path / "b.parquet").exists()


def test_merge_refuses_unsound_records(tmp_path: Path) -> None:
    plain, scored = made(tmp_path / "a.json", numbered([1])), made(tmp_path / "b.json", numbered([2], SCORED))
    with pytest.raises(InputError, match="some have none"):
        merge([plain, scored], tmp_path / "full.json")
    broken = tmp_path / "c.json"
    broken.write_text(json.dumps([{"query": "x"}]))
    with pytest.raises(InputError, match=r"c\.json:1: record 1: has no answer; `scaledown validate"):
        merge([plain, broken], tmp_path / "full.json")
    with pytest.raises(UsageError, match="is also read"):
        merge([plain], plain)
    with pytest.raises(InputError, match="no such file"):
        merge([tmp_path / "none.json"], tmp_path / "full.json")
    with pytest.raises(UsageError, match="use one of"):
        merge([plain], tmp_path / "full.txt")
    assert not (tmp_path / "full.json").exists()


def test_merge_reads_documents_with_titles(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{**GOOD, "documents": [{"title": "T", "text": "One."}]}]))
    merge([path], tmp_path / "full.json")
    assert json.loads((tmp_path / "full.json").read_text())[0]["documents"] == ["T\nOne."]


def test_reading_does_not_depend_on_where_chunks_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    records = [{**GOOD, "answer": "é" * random.Random(n).randrange(50)} for n in range(20)]
    write_examples(path, records)
    expected = [(entry.line, entry.record) for entry in entries(path)]
    assert [line for line, _ in expected] == [2 + 8 * n for n in range(20)]
    for size in (1, 3, 64, 999):
        monkeypatch.setattr(training_files, "_CHUNK_CHARACTERS", size)
        assert [(entry.line, entry.record) for entry in entries(path)] == expected


def test_parquet_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(InputError, match="Parquet"):
        validate(path)
    pq.write_table(pa.table({"query": ["a"]}), path)
    assert validate(path).bad_records == 1


def test_merge_warns_of_different_dtypes_on_one_kind_of_device(tmp_path: Path, caplog) -> None:
    """`--dtype auto` differs between processors, so the parameters are the same."""
    paths = [made(tmp_path / name, numbered([n])) for n, name in enumerate(("a.json", "b.json", "c.json"))]
    computed = [("cpu", "torch.float32"), ("cuda", "torch.bfloat16"), ("cpu", "torch.bfloat16")]
    for path, (device, dtype) in zip(paths, computed, strict=True):
        place = Path(f"{path}.work") / "manifest.json"
        manifest = json.loads(place.read_text())
        manifest["stages"] = {"vectors": {"settings": {"device": device, "dtype": dtype}}, "queries": {}}
        place.write_text(json.dumps(manifest))
    assert merge(paths, tmp_path / "full.json").records == 3
    (warning,) = [message for message in caplog.messages if "computed in" in message]
    assert warning == f"{paths[2]} was computed in torch.bfloat16, {paths[0]} in torch.float32"

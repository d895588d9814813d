import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from scaledown.config.shared import QueryPart
from scaledown.devices import choice
from scaledown.devices.halving import Halving
from scaledown.errors import ModelError, OutputError, RunDirectoryError
from scaledown.run.atomic import atomic, check_writable, read_json, write_json
from scaledown.run.directory import RunDirectory, fingerprint
from scaledown.run.stage import Stage


def table(number: int) -> pa.Table:
    return pa.table({"n": [number]})


def test_fingerprints_change_with_every_setting() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert len({fingerprint({"a": value}) for value in (1, "1", 1.5, None, [1])}) == 5


def test_atomic_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(ValueError, match="stop"), atomic(path) as temporary:
        temporary.write_text("half")
        raise ValueError("stop")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_full_disk_is_reported(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no space left.*same command"), atomic(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_full_disk_device_is_reported(tmp_path: Path) -> None:
    """/dev/full fails every write with ENOSPC."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OutputError, match="no space left"), atomic(tmp_path / "a") as temporary:
        temporary.symlink_to("/dev/full")
        with temporary.open("wb", buffering=0) as file:
            file.write(b"x")


def test_stages_keep_their_shards_by_settings(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    stage = Stage(run, "ranked", {"k": 5})
    stage.complete(3, table)
    stage.finish([1, 1, 1], {"rows": 3})
    other = Stage(run, "ranked", {"k": 6})
    assert other.done() is None
    assert not other.has(0)
    again = Stage(run, "ranked", {"k": 5})
    assert [t.to_pydict() for t in again.tables()] == [{"n": [n]} for n in range(3)]
    assert again.finished().counts == {"rows": 3}
    with pytest.raises(RunDirectoryError, match="unfinished"):
        other.finished()


@pytest.mark.parametrize(
    ("before", "now", "why"),
    [
        ({"top_k": 10}, {"top_k": 8}, "top_k is 8 (was 10)"),
        ({"column": ""}, {"column": "q"}, "column is q (was not set)"),
        ({}, {"search_memory": 1.5}, "search_memory is 1.5 (was not set)"),
        ({"vectors": "0" * 16, "n": 1}, {"vectors": "1" * 16, "n": 1}, "vectors changed"),
        ({"teacher": "sha256:" + "0" * 64}, {"teacher": "served:m"}, "teacher changed"),
        ({"files": ["a"]}, {"files": ["b"]}, "files changed"),
        ({"a": 1, "b": 1}, {"a": 2, "b": 2}, "a is 2 (was 1), b is 2 (was 1)"),
    ],
)
def test_log_has_the_reason_why_a_stage_is_made_again(before, now, why, tmp_path: Path, caplog) -> None:
    Stage(RunDirectory(tmp_path), "ranked", before).complete(1, table)
    with caplog.at_level("INFO", "scaledown"):
        Stage(RunDirectory(tmp_path), "ranked", now)
    assert f"ranked: made again, because {why}; earlier results stay in {tmp_path / 'ranked'}" in caplog.text


def test_a_new_stage_is_compared_with_the_nearest_earlier_one(tmp_path: Path, caplog) -> None:
    for settings in ({"a": 1, "b": 1}, {"a": 2, "b": 1}, {"a": 5, "b": 6}):
        Stage(RunDirectory(tmp_path), "ranked", settings).write(0, table(0))
    caplog.clear()
    with caplog.at_level("INFO", "scaledown"):
        Stage(RunDirectory(tmp_path), "ranked", {"a": 2, "b": 3})
    assert "because b is 3 (was 1);" in caplog.text


def test_earlier_results_without_a_record_of_their_settings(tmp_path: Path, caplog) -> None:
    """Versions before 0.7 kept none."""
    stage = Stage(RunDirectory(tmp_path), "ranked", {"a": 1})
    stage.write(0, table(0))
    (stage.folder / "settings.json").unlink()
    with caplog.at_level("INFO", "scaledown"):
        Stage(RunDirectory(tmp_path), "ranked", {"a": 2})
    assert "because a setting, an input or a model changed;" in caplog.text


def test_settings_are_beside_the_shards(tmp_path: Path, caplog) -> None:
    settings = {"name": os.fsdecode(b"\xff"), "path": tmp_path, "k": [1, None]}
    stage = Stage(RunDirectory(tmp_path / "run"), "ranked", settings)
    assert read_json(stage.folder / "settings.json") is None
    stage.complete(1, table)
    assert read_json(stage.folder / "settings.json") == {**settings, "path": str(tmp_path)}
    with caplog.at_level("DEBUG", "scaledown"):
        Stage(RunDirectory(tmp_path / "run"), "ranked", settings)
    assert "made again, because" not in caplog.text
    assert f"shards in {stage.folder} are not made again: their settings are the same" in caplog.text


def test_only_missing_shards_are_made(tmp_path: Path) -> None:
    stage = Stage(RunDirectory(tmp_path), "ranked", {})
    stage.write(1, table(10))
    made = []

    def work(shard: int) -> pa.Table:
        made.append(shard)
        return table(shard)

    stage.complete(3, work)
    assert made == [0, 2]
    assert stage.table(1).to_pydict() == {"n": [10]}


@pytest.mark.parametrize("kept", [None, 0, 60])
def test_damaged_shard_is_reported_with_the_file_to_delete(kept, tmp_path: Path) -> None:
    stage = Stage(RunDirectory(tmp_path), "ranked", {})
    stage.write(0, table(0))
    if kept is None:
        stage.path(0).unlink()
    else:
        stage.path(0).write_bytes(stage.path(0).read_bytes()[:kept])
    with pytest.raises(RunDirectoryError, match="delete the file and done.json"):
        stage.table(0)


def test_one_changed_bit_is_noticed(tmp_path: Path) -> None:
    stage = Stage(RunDirectory(tmp_path), "vectors", {})
    stage.write(0, pa.table({"n": list(range(1000))}))
    assert stage.table(0, check=True).num_rows == 1000
    content = bytearray(stage.path(0).read_bytes())
    content[len(content) // 2] ^= 1
    stage.path(0).write_bytes(content)
    with pytest.raises(RunDirectoryError, match="damaged"):
        stage.table(0, check=True)


def test_shards_made_together_are_made_once(tmp_path: Path) -> None:
    stage = Stage(RunDirectory(tmp_path), "candidates", {})
    stage.write(4, table(40))
    groups = []

    def work(group: range) -> list[pa.Table]:
        groups.append(group)
        return [table(shard) for shard in group]

    stage.complete_together(7, 3, work)
    assert groups == [range(3), range(3, 6), range(6, 7)]
    assert [stage.table(n).to_pydict()["n"] for n in range(7)] == [[0], [1], [2], [3], [40], [5], [6]]


@pytest.mark.parametrize(
    ("number", "expected"), [(0, [range(3), range(3, 5)]), (1, [range(5, 6), range(6, 9), range(9, 10)])]
)
def test_parts_have_the_groups_of_the_whole(number: int, expected: list[range], tmp_path: Path) -> None:
    """So that a process without a part does not make the same shards in other groups."""
    stage = Stage(RunDirectory(tmp_path, QueryPart(number, 2)), "candidates", {})
    groups = []

    def work(group: range) -> list[pa.Table]:
        groups.append(group)
        return [table(shard) for shard in group]

    stage.complete_together(10, 3, work)
    assert groups == expected


def test_work_after_a_stage_starts_before_that_stage_ends(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    source, stage = Stage(run, "passages", {}), Stage(run, "vectors", {})
    source.write(0, table(0))

    def work(shard: int) -> pa.Table:
        if shard == 0:  # only now does the source go on
            source.write(1, table(1))
            source.finish([1, 1], {})
        return source.table(shard)

    stage.complete_behind(source, work, lambda: None, lambda like, _: like)
    assert [stage.table(n).to_pydict()["n"] for n in range(2)] == [[0], [1]]


def test_work_after_a_failed_stage_fails_too(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)

    def check() -> None:
        raise ValueError("the corpus ended")

    with pytest.raises(ValueError, match="the corpus ended"):
        Stage(run, "vectors", {}).complete_behind(
            Stage(run, "passages", {}), lambda _: table(0), check, lambda like, _: like
        )


def test_journal_with_a_truncated_line_is_read(tmp_path: Path) -> None:
    stage = Stage(RunDirectory(tmp_path), "ranked", {})
    stage.write(0, table(0), 1.5)
    with (stage.folder / "journal.jsonl").open("a") as file:
        file.write('{"shard": 1, "sec\n')
    stage.write(1, table(1), 2.0)
    assert stage.finish([1, 1], {}).seconds == 3.5


def test_halved_batches_are_counted(tmp_path: Path) -> None:
    stage = Stage(RunDirectory(tmp_path), "vectors", {})
    halving = Halving("--batch_size")

    def work(batch: Sequence[int]) -> int:
        if len(batch) > 2:
            raise MemoryError
        return sum(batch)

    with stage.noting(0, lambda: halving.count):
        assert halving(work, [1, 2, 3, 4, 5]) == [3, 3, 9]
    stage.write(0, table(0))
    assert stage.finish([1], {"rows": 1}).counts == {"rows": 1, "halved_batches": 2}


def test_single_text_that_does_not_fit_is_an_error() -> None:
    def work(_: Sequence[int]) -> int:
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(ModelError, match="one text at a time"):
        Halving("--batch_size")(work, [1, 2])


def _complete(path: Path, made: Path) -> None:
    stage = Stage(RunDirectory(path), "ranked", {})

    def work(shard: int) -> pa.Table:
        time.sleep(0.05)
        (made / f"{shard}-{os.getpid()}").touch()
        return table(shard)

    stage.complete(12, work)


def test_two_processes_share_the_shards(tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_complete, args=(tmp_path / "w", made)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    names = [path.name.partition("-") for path in made.iterdir()]
    assert sorted(int(shard) for shard, _, _ in names) == list(range(12)), "every shard was made once"


CLAIM = """
import sys, time
from collections.abc import Sequence
from pathlib import Path
from scaledown.run.directory import RunDirectory
with RunDirectory(Path(sys.argv[1])).claim("mine"):
    print("in", flush=True)
    time.sleep(60)
"""


def test_a_live_run_with_other_settings_is_refused_and_a_dead_one_is_not(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CLAIM), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "in\n"
        run = RunDirectory(tmp_path)
        with run.claim("mine"):
            pass
        with pytest.raises(RunDirectoryError, match=rf"in use.*process {process.pid}"), run.claim("other"):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with RunDirectory(tmp_path).claim("other"):
        assert len(list((tmp_path / "live").glob("*.json"))) == 1
    assert not list((tmp_path / "live").glob("*.json"))


def test_process_that_is_about_to_end_does_not_block(tmp_path: Path) -> None:
    """Its note is gone while its lock is still held."""
    from filelock import FileLock

    run = RunDirectory(tmp_path)
    (tmp_path / "live").mkdir()
    leaving = tmp_path / "live" / "1-x"
    leaving.with_suffix(".json").write_text("")
    with FileLock(leaving.with_suffix(".lock")), run.claim("mine"):
        pass


def test_folder_with_other_files_is_not_a_run_directory(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunDirectoryError, match=r"thesis\.tex"):
        RunDirectory(tmp_path)
    with pytest.raises(RunDirectoryError, match="is a file"):
        RunDirectory(tmp_path / "thesis.tex")


def test_dtype_of_the_first_process_stays(tmp_path: Path, monkeypatch, caplog) -> None:
    def processor(*, fast: bool) -> None:
        monkeypatch.setattr(choice, "multiplies_bfloat16", lambda: fast)

    processor(fast=True)
    assert RunDirectory(tmp_path).dtype("auto", "cpu") == "bfloat16"
    assert not caplog.text
    processor(fast=False)
    assert RunDirectory(tmp_path).dtype("auto", "cpu") == "bfloat16"
    assert "Here it is very slow: --dtype float32" in caplog.text
    assert RunDirectory(tmp_path).dtype("float32", "cpu") == "float32"
    assert RunDirectory(tmp_path).dtype("auto", "cuda:1") == "bfloat16"
    assert RunDirectory(tmp_path).dtype("auto", "mps") == "float32"
    (tmp_path / "dtype-cpu.json").write_text("half written")
    assert RunDirectory(tmp_path).dtype("auto", "cpu") == "float32"
    processor(fast=True)
    assert RunDirectory(tmp_path).dtype("auto", "cpu") == "float32"


def test_content_hashes_follow_content_and_are_remembered(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "w")
    path = tmp_path / "corpus.jsonl"
    path.write_text("one")
    first = run.content_hash(path)
    os.utime(path, (1, 1))
    assert run.content_hash(path) == first, "a new time alone changes nothing"
    remembered = read_json(tmp_path / "w" / "inputs.json")
    (entry,) = remembered.values()
    entry["sha256"] = "remembered"
    write_json(tmp_path / "w" / "inputs.json", remembered)
    assert run.content_hash(path) != first, "the same size and time are not read again"
    path.write_text("two")
    assert run.content_hash(path) not in {first, "remembered"}
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "a").write_text("x")
    before = run.content_hash(folder)
    (folder / "a").rename(folder / "b")
    assert run.content_hash(folder) != before


def test_outputs_that_cannot_be_written_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a folder"):
        check_writable(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        check_writable(tmp_path / "file" / "out.json")
    check_writable(tmp_path / "new" / "folder" / "out.json")
    assert os.listdir(tmp_path) == ["file"]  # a check leaves nothing behind


def test_entering_process_keeps_files_that_others_write(tmp_path: Path, monkeypatch) -> None:
    """Inputs are hashed before a process has claimed the directory."""
    run = RunDirectory(tmp_path / "run")
    (tmp_path / "input").write_text("text")
    writing, entered = threading.Event(), threading.Event()
    replace = Path.replace

    def slow(self, target):
        if target.name == "inputs.json":
            writing.set()
            entered.wait(0.3)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", slow)
    with ThreadPoolExecutor(1) as executor:
        hashing = executor.submit(run.content_hash, tmp_path / "input")
        assert writing.wait(5)
        with RunDirectory(tmp_path / "run").claim("request"):
            entered.set()
            hashing.result()
    assert (tmp_path / "run" / "inputs.json").exists()

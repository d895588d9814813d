"""Folders of object stores as two machines see them: servers of S3 and of Google's protocol, and memory."""

import errno
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from scaledown.config.shared import QueryPart
from scaledown.data.prompts import answer_prompt
from scaledown.data.teacher import answer_log
from scaledown.data.teacher.answer_log import AnswerLog
from scaledown.devices import choice
from scaledown.errors import OutputError, RunDirectoryError, UsageError
from scaledown.records import Answer
from scaledown.run import object_store
from scaledown.run.directory import RunDirectory
from scaledown.run.locations import File, storage_at
from scaledown.run.stage import Stage, stage

EVERY = pytest.mark.parametrize("bucket", ["s3", "gs"], indirect=True)
MEMORY = pytest.mark.parametrize("bucket", ["memory"], indirect=True)
TABLE = pa.table({"n": list(range(100))})
OTHER = pa.table({"n": list(range(50))})


@pytest.fixture
def shards(machine) -> tuple[Stage, Stage, bytes]:
    """The same stage on two machines, and shard 0, which the first has made."""
    one, two = Stage(machine("one"), "ranked", {}), Stage(machine("two"), "ranked", {})
    one.write(0, TABLE)
    return one, two, one.path(0).read_bytes()


def replace_shard(stage: Stage, content: bytes) -> None:
    """Put other bytes into the store, without our checks."""
    stage.storage._system.pipe_file(stage.storage._at(stage.path(0)), content)


def while_waiting(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    """Do something in place of the pause before a shard is fetched again."""
    monkeypatch.setattr(stage, "time", SimpleNamespace(sleep=lambda _: action()))


# Shards


@EVERY
def test_shard_of_one_machine_is_read_by_another(machine) -> None:
    one, two = Stage(machine("one"), "ranked", {}), Stage(machine("two"), "ranked", {})
    assert not two.has(0)
    one.write(0, TABLE)
    assert two.has(0)
    assert two.table(0).equals(TABLE)
    assert two.size(0) == one.path(0).stat().st_size
    assert two.path(0).read_bytes() == one.path(0).read_bytes()
    one.note({"seconds": 1.0})
    two.note({"seconds": 2.0})
    two.finish([100], {"rows": 100})
    assert one.finished().rows == [100]
    assert one.finished().seconds == 3.0


@EVERY
def test_first_of_two_shards_stays(machine) -> None:
    one, two = Stage(machine("one"), "answers", {}), Stage(machine("two"), "answers", {})
    one.write(0, TABLE)
    two.write(0, OTHER)
    assert one.table(0).equals(TABLE)
    assert two.table(0).equals(TABLE)
    assert two.path(0).read_bytes() == one.path(0).read_bytes()


@EVERY
def test_dtype_of_the_first_of_two_machines_stays(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = machine("one"), machine("two")
    assert not two.storage.exists(two.path / "dtype-cpu.json")

    def while_another_is_faster() -> bool:
        monkeypatch.setattr(choice, "multiplies_bfloat16", lambda: True)
        assert one.dtype("auto", "cpu") == "bfloat16"
        monkeypatch.setattr(choice, "multiplies_bfloat16", lambda: False)
        return False

    monkeypatch.setattr(choice, "multiplies_bfloat16", while_another_is_faster)
    assert two.dtype("auto", "cpu") == "bfloat16"
    assert two.dtype("auto", "cpu") == "bfloat16"


@MEMORY
@pytest.mark.parametrize(
    "error", [NotImplementedError(), TypeError("mode"), OSError(errno.ENOSYS, "A header is not implemented")]
)
def test_last_shard_stays_without_conditional_writes(machine, monkeypatch, error) -> None:
    one, two = Stage(machine("one"), "answers", {}), Stage(machine("two"), "answers", {})
    one.write(0, TABLE)
    put = two.storage._system.put_file

    def unconditional(path: str, url: str, **mode: str) -> None:
        if mode:
            raise error
        put(path, url)

    monkeypatch.setattr(two.storage._system, "put_file", unconditional)
    two.write(0, OTHER)
    assert Stage(machine("three"), "answers", {}).table(0).equals(OTHER)


@MEMORY
def test_unmet_condition_that_s3fs_does_not_know_is_one(machine, monkeypatch) -> None:
    one, two = Stage(machine("one"), "answers", {}), Stage(machine("two"), "answers", {})
    one.write(0, TABLE)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EINVAL, "At least one of the pre-conditions did not hold")

    monkeypatch.setattr(two.storage._system, "put_file", refuse)
    two.path(0).write_bytes(b"its own")
    two.storage.publish(two.path(0), once=True)
    assert two.table(0).equals(TABLE)


@MEMORY
def test_shard_that_a_store_refuses_for_another_reason_is_sent_without_the_condition(
    machine, monkeypatch
) -> None:
    own = Stage(machine("one"), "answers", {})
    put = own.storage._system.put_file

    def refuse(path: str, url: str, **mode: str) -> None:
        if mode:
            raise OSError(errno.EINVAL, "Bad digest")
        put(path, url)

    monkeypatch.setattr(own.storage._system, "put_file", refuse)
    own.write(0, TABLE)
    assert own.path(0).exists()
    assert Stage(machine("two"), "answers", {}).table(0).equals(TABLE)


@MEMORY
def test_log_may_grow_while_it_is_sent(machine, monkeypatch) -> None:
    storage = machine("one").storage
    path = storage.root / "log.jsonl"
    path.write_text("first\n")
    send = storage._send

    def while_it_grows(sent: Path, *, once: bool) -> None:
        send(sent, once=once)
        with sent.open("a") as file:
            file.write("next\n")

    monkeypatch.setattr(storage, "_send", while_it_grows)
    storage.publish(path)
    assert path.read_text() == "first\nnext\n", "it is sent once"
    assert storage.read(path) == b"first\n"


@MEMORY
def test_part_of_another_command_is_reported(bucket, tmp_path, caplog) -> None:
    def entered(name: str, number: int, request: str) -> Any:
        part = QueryPart(number, 2)
        return RunDirectory(storage_at(f"{bucket}/run", str(tmp_path / name)), part).claim(request)

    message = "part 0/2 .* has other settings, models or inputs"
    for request, found in (("same", False), ("other", True)):
        caplog.clear()
        with entered(f"one-{request}", 0, "same"), entered(f"two-{request}", 1, request):
            assert bool(re.search(message, caplog.text)) == found


@MEMORY
def test_unpublished_shard_is_not_finished(machine, monkeypatch) -> None:
    own = Stage(machine("one"), "ranked", {})
    monkeypatch.setattr(own.storage, "publish", lambda *_, **__: None)
    own.write(0, TABLE)
    assert own.path(0).exists()
    assert not own.has(0)


def test_damaged_object_is_fetched_again_until_it_is_whole(shards, monkeypatch) -> None:
    one, two, whole = shards
    replace_shard(one, whole[:-40] + bytes(40))
    while_waiting(monkeypatch, lambda: replace_shard(one, whole))
    assert two.table(0).equals(TABLE)
    assert two.path(0).read_bytes() == whole


def test_object_that_is_listed_too_early_is_fetched_again(shards, monkeypatch) -> None:
    one, two, whole = shards
    monkeypatch.setattr(object_store, "_LISTED_SECONDS", 60)
    assert two.has(0)
    one.storage._system.rm_file(one.storage._at(one.path(0)))
    assert two.has(0), "an old listing"
    while_waiting(monkeypatch, lambda: replace_shard(one, whole))
    assert two.table(0).equals(TABLE)


@MEMORY
def test_object_that_stays_damaged_is_an_error(shards, monkeypatch) -> None:
    one, two, whole = shards
    while_waiting(monkeypatch, lambda: None)
    # Nobody is advised to delete what another process may be making.
    message = r"memory://.*/000000.arrow is missing or damaged: run the same command again when no"
    for damaged in (whole[:-40] + bytes(40), whole[:-1], b""):
        replace_shard(one, damaged)
        with pytest.raises(RunDirectoryError, match=message):
            two.table(0)
        assert not [path for path in two.folder.iterdir() if path.suffix == ".tmp"]


def test_object_that_a_store_keeps_in_part_is_sent_again(shards, monkeypatch, caplog) -> None:
    one, two, whole = shards
    system, sent = one.storage._system, []
    put = system.put_file

    def in_part(path: str, url: str, **mode: str) -> None:
        sent.append(url)
        if len(sent) < 2:
            system.pipe_file(url, Path(path).read_bytes()[:-1])
        else:
            put(path, url, **mode)

    monkeypatch.setattr(system, "put_file", in_part)
    one.storage.publish(one.path(0), once=True)
    assert len(sent) == 2
    assert f"keeps {len(whole) - 1:,} bytes of {len(whole):,}: sending it again" in caplog.text
    assert two.table(0).equals(TABLE)


@MEMORY
def test_store_that_never_keeps_all_is_an_error(shards, monkeypatch) -> None:
    one, _, whole = shards
    system = one.storage._system
    monkeypatch.setattr(system, "put_file", lambda path, url: system.pipe_file(url, whole[:-1]))
    with pytest.raises(OutputError, match=r"keeps .* bytes of .* check the store"):
        one.storage.publish(one.path(0))


@pytest.mark.parametrize("bucket", ["gs"], indirect=True)
@pytest.mark.parametrize("end", [b"\r", b"\r\n", b"\n", b"\r\r", b"\n--==0==\n", b"\0"])
def test_gs_test_server_keeps_uploads_byte_for_byte(machine, end) -> None:
    storage = machine("one").storage
    path = storage.root / "file.bin"
    path.write_bytes(bytes(range(256)) + end)
    storage.publish(path)
    assert storage._cat(path) == bytes(range(256)) + end


@MEMORY
def test_mirror_may_be_deleted(machine) -> None:
    own = Stage(machine("one"), "ranked", {})
    own.write(0, TABLE)
    shutil.rmtree(own.folder)
    assert own.table(0).equals(TABLE)


@EVERY
def test_removed_object_is_not_there(machine, monkeypatch) -> None:
    one, two = machine("one").storage, machine("two").storage
    for name in ("kept.json", "gone.json"):
        (one.root / name).write_text("{}")
        one.publish(one.root / name)
    monkeypatch.setattr(object_store, "_LISTED_SECONDS", 60)
    monkeypatch.setattr(object_store, "_PATIENCE_SECONDS", 0)  # nobody waits for it to come back
    assert two.exists(two.root / "gone.json")
    one.remove(one.root / "gone.json")
    assert two.read(two.root / "gone.json") is None
    assert two.read_json(two.root / "gone.json") is None
    assert not two.fetch(two.root / "gone.json")
    assert two.read(two.root / "kept.json") == b"{}"


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """A clock of the object store that only its own pauses move; the pauses are listed."""
    pauses: list[float] = []
    fake = SimpleNamespace(monotonic=lambda: 1000 + sum(pauses), sleep=pauses.append)
    monkeypatch.setattr(object_store, "time", fake)
    return pauses


@MEMORY
def test_store_out_of_reach_is_asked_again(machine, clock, caplog) -> None:
    storage, answers = machine("one").storage, [ConnectionError("no route"), TimeoutError(), "answer"]

    def question() -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert storage._ask(storage.root, question) == "answer"
    assert clock == [0.5, 1.0]
    assert caplog.text.count("the store cannot be reached") == 1


@MEMORY
def test_store_out_of_reach_for_a_minute_is_an_error(machine, clock) -> None:
    storage = machine("one").storage

    def question() -> None:
        raise ConnectionError("no route")

    with pytest.raises(OutputError, match="cannot be reached .*no route.*run the same command again"):
        storage._ask(storage.root, question)
    assert 50 < sum(clock) <= 60


# Answers before their shard is whole


def answers_of(run: RunDirectory, flush_seconds: float = 60) -> AnswerLog:
    return AnswerLog.of(Stage(run, "answers", {}), range(1), flush_seconds)


PROMPTS = [answer_prompt(str(n), f"question {n}", ["document"], 0.0) for n in range(3)]
ANSWERS = [Answer(f"answer {n}", "stop", 1, 1, 0) for n in range(3)]


def test_answers_of_another_machine_are_kept(machine) -> None:
    logs = [answers_of(machine(name)) for name in ("one", "two")]
    with logs[0].writing() as writer:
        writer.add(0, PROMPTS[0], ANSWERS[0])
    assert logs[1].read(PROMPTS) == {0: ANSWERS[0]}
    with logs[1].writing() as writer:
        writer.add(2, PROMPTS[2], ANSWERS[2])
    with logs[0].writing() as writer:  # back again, and before it has read what the other wrote
        writer.add(1, PROMPTS[1], ANSWERS[1])
    third = answers_of(machine("three"))
    for log in (*logs, third):
        assert log.read(PROMPTS) == dict(enumerate(ANSWERS))
        assert log.tokens() == 6
    assert [log.shards for log in AnswerLog.every(Stage(machine("four"), "answers", {}))] == [range(1)]
    third.remove()
    assert answers_of(machine("three")).read(PROMPTS) == {}


@MEMORY
def test_answers_that_were_not_uploaded_are_kept_and_then_uploaded(machine, monkeypatch) -> None:
    run = machine("one")
    monkeypatch.setattr(run.storage, "publish", lambda _: None)
    with answers_of(run).writing() as writer:
        writer.add(0, PROMPTS[0], ANSWERS[0])
    again = answers_of(machine("one"))
    assert again.read(PROMPTS) == {0: ANSWERS[0]}
    with again.writing() as writer:
        writer.add(1, PROMPTS[1], ANSWERS[1])
    assert answers_of(machine("two")).read(PROMPTS) == dict(enumerate(ANSWERS[:2]))


@MEMORY
def test_answers_are_uploaded_while_they_come(machine, monkeypatch) -> None:
    import time

    monkeypatch.setattr(answer_log, "_PUBLISH_SECONDS", 0.1)
    one, two = answers_of(machine("one"), 0.05), answers_of(machine("two"), 0.05)
    with one.writing() as writer:
        writer.add(0, PROMPTS[0], ANSWERS[0])
        deadline = time.monotonic() + 20
        while two.read(PROMPTS) != {0: ANSWERS[0]}:
            assert time.monotonic() < deadline
            time.sleep(0.05)


# Processes


@MEMORY
def test_leases_stay_on_the_disk(machine) -> None:
    one, same, two = machine("one"), machine("one"), machine("two")
    with one.leases.hold("ranked-f-000000"):
        with same.leases.hold("ranked-f-000000") as mine:
            assert not mine, "a machine makes a shard once"
        with two.leases.hold("ranked-f-000000") as mine:
            assert mine, "in a bucket nobody waits for another machine"
        assert one.storage.glob(one.path, "locks/*") == []


@MEMORY
def test_second_command_is_warned(machine, caplog) -> None:
    with machine("one").claim("same"), machine("two").claim("same"):
        pass
    assert caplog.text.count("another process may be at work (process ") == 1
    assert "with other settings" not in caplog.text
    caplog.clear()
    with machine("one").claim("same"), machine("two").claim("other"):
        pass
    assert "another process may be at work" in caplog.text
    assert ", with other settings. A bucket does not show" in caplog.text


@MEMORY
def test_command_after_one_that_ended_is_not_warned(machine, caplog) -> None:
    with machine("one").claim("same"):
        pass
    with machine("two").claim("same"):
        pass
    assert "another process" not in caplog.text


@MEMORY
def test_command_after_one_that_failed_is_warned_on_another_machine(machine, caplog) -> None:
    with pytest.raises(KeyboardInterrupt), machine("one").claim("same"):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), machine("one").claim("same"):
        raise KeyboardInterrupt
    assert "another process" not in caplog.text, "its own lock shows that it ended"
    with machine("two").claim("same"):
        pass
    assert "another process may be at work" in caplog.text


@MEMORY
def test_workers_and_parts_are_not_warned_of_each_other(bucket, tmp_path, caplog) -> None:
    def entered(name: str, part: QueryPart, worker: str = "") -> Any:
        return RunDirectory(storage_at(f"{bucket}/run", str(tmp_path / name)), part, worker).claim("same")

    with (
        entered("one", QueryPart(0, 2)),
        entered("two", QueryPart(1, 2)),
        entered("three", QueryPart(1, 2), "worker-0"),
    ):
        assert "another process" not in caplog.text
        with entered("four", QueryPart(0, 1)):
            assert caplog.text.count("another process may be at work") == 2
        with entered("five", QueryPart(1, 2)):
            assert caplog.text.count("another process may be at work") == 3


@MEMORY
def test_finished_directory_gives_no_warning(machine, caplog) -> None:
    with machine("one").claim("index", finished=True), machine("two").claim("index", finished=True):
        pass
    assert "another process" not in caplog.text


@MEMORY
def test_processes_of_one_machine_need_the_same_settings(machine) -> None:
    with machine("one").claim("same"):
        with machine("one").claim("same"):
            pass
        with pytest.raises(
            RunDirectoryError, match=r"memory://.* is in use by a live run with other settings"
        ):
            with machine("one").claim("other"):
                pass


@MEMORY
def test_bucket_of_an_earlier_version_continues(machine, bucket, caplog) -> None:
    """Its processes left notes and leases in the bucket, whose meaning has gone."""
    run = machine("one")
    Stage(run, "ranked", {}).write(0, TABLE)
    for name in ("live/1-aaaaaaaa.json", "live/1-aaaaaaaa.progress", "locks/entrance.held", "locks/x.held"):
        run.storage._system.pipe_file(f"{bucket}/run/{name}", b'{"request": "other", "pid": 1, "host": "h"}')
    two = machine("two")
    with two.claim("same"):
        assert Stage(two, "ranked", {}).table(0).equals(TABLE)
    assert "another process" not in caplog.text


@MEMORY
def test_shard_that_was_given_up_is_tried_again_by_a_command_and_not_by_a_worker(
    bucket, machine, tmp_path
) -> None:
    own = Stage(machine("one"), "ranked", {})
    own._mark(0, "3 workers died of it")
    with RunDirectory(storage_at(f"{bucket}/run", str(tmp_path / "two")), worker="worker-0").claim("same"):
        pass
    assert own.absent(0)
    with machine("three").claim("same"):
        assert not own.absent(0)


# Names


def test_files_of_other_origin_are_refused(machine, bucket) -> None:
    import fsspec

    fsspec.filesystem("s3", skip_instance_cache=True).pipe_file(f"{bucket}/run/thesis.tex", b"mine")
    with pytest.raises(RunDirectoryError, match=rf"{bucket}/run holds other things \(thesis.tex\)"):
        machine("one")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://host/run", "https:// cannot be written to; use a local path, s3://, gs:// or az://$"),
        ("sftp://host/run", "sftp:// cannot be written to"),
        ("hf://datasets/org/name/run", "hf:// cannot be written to; .*`scaledown export --push_to_hub`"),
        ("hf://buckets/owner/name/run", "hf:// cannot be written to; .*`scaledown export --push_to_hub`"),
        ("s3://", "give a bucket and a folder in it"),
        ("s3://bucket/../run", "give a bucket and a folder in it"),
    ],
)
def test_urls_that_cannot_be_written_to_are_refused(url: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        storage_at(url)


def test_file_url_is_a_local_path(tmp_path: Path) -> None:
    file = File.at(f"file://{tmp_path}/train.json")
    assert file.path == tmp_path / "train.json"
    assert str(file) == str(file.path)


def test_run_in_a_memory_store(tmp_path: Path) -> None:
    runs = [RunDirectory(storage_at(f"memory://{tmp_path}/run", str(tmp_path / name))) for name in ("a", "b")]
    one, two = (Stage(run, "ranked", {}) for run in runs)
    with runs[0].claim("request"):
        one.write(0, TABLE)
        two.write(0, OTHER)
        assert two.table(0).equals(TABLE)
    assert runs[0].storage.glob(runs[0].path, "live/*") == []


def test_secrets_in_a_url_are_not_shown(tmp_path: Path) -> None:
    storage = storage_at("s3://key:sec/ret@bucket/run", str(tmp_path))
    assert str(storage) == "s3://…@bucket/run"
    assert storage.shown(storage.root / "a" / "b.json") == "s3://…@bucket/run/a/b.json"

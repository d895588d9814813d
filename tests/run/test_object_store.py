"""Folders of object stores as two machines see them: an S3 server, and the Hub's buckets, on loopback."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from scaledown.data.prompts import answer_prompt
from scaledown.data.teacher.answer_log import AnswerLog
from scaledown.errors import OutputError, RunDirectoryError, UsageError
from scaledown.records import Answer
from scaledown.run import hub, object_store
from scaledown.run.directory import RunDirectory
from scaledown.run.leases import Leases
from scaledown.run.locations import File, storage_at
from scaledown.run.stage import Stage

# The server that stands for Google's writes whatever the condition, so contention says nothing there.
EXCLUSIVE = pytest.mark.parametrize("bucket", ["s3", "hf"], indirect=True)
EVERY = pytest.mark.parametrize("bucket", ["s3", "gs", "hf"], indirect=True)
TABLE = pa.table({"n": list(range(100))})


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_a_shard_that_one_machine_makes_is_there_for_another(machine) -> None:
    one, two = Stage(machine("one"), "ranked", {}), Stage(machine("two"), "ranked", {})
    assert not two.has(0)
    one.write(0, TABLE)
    assert within(5, lambda: two.has(0))
    assert two.table(0).equals(TABLE)
    assert two.size(0) == one.path(0).stat().st_size
    assert two.path(0).read_bytes() == one.path(0).read_bytes()
    one.note({"seconds": 1.0})
    two.note({"seconds": 2.0})
    two.finish([100], {"rows": 100})
    assert within(5, lambda: one.done() is not None)
    assert one.finished().rows == [100]
    assert one.finished().seconds == 3.0


def test_a_shard_that_was_not_published_is_not_finished(machine, monkeypatch) -> None:
    stage = Stage(machine("one"), "ranked", {})
    monkeypatch.setattr(stage.storage, "publish", lambda _: None)
    stage.write(0, TABLE)
    assert stage.path(0).exists()
    assert not stage.has(0)


@pytest.fixture
def shards(machine) -> tuple[Stage, Stage, bytes]:
    """The same stage on two machines, and shard 0, which the first has made."""
    one, two = Stage(machine("one"), "ranked", {}), Stage(machine("two"), "ranked", {})
    one.write(0, TABLE)
    return one, two, one.path(0).read_bytes()


def replace_shard(stage: Stage, content: bytes) -> None:
    """Put other bytes into the store, without our checks."""
    stage.storage._system.pipe_file(stage.storage._at(stage.path(0)), content)


@EVERY
def test_a_damaged_object_is_fetched_again_until_it_is_whole(shards) -> None:
    one, two, whole = shards
    replace_shard(one, whole[:-40] + bytes(40))
    mending = threading.Timer(1.2, replace_shard, (one, whole))
    mending.start()
    assert two.table(0).equals(TABLE)
    mending.join()
    assert two.path(0).read_bytes() == whole


@EVERY
def test_an_object_that_is_listed_before_it_is_there_is_fetched_again(shards, monkeypatch) -> None:
    one, two, whole = shards
    assert within(5, lambda: two.has(0))
    one.storage._system.rm_file(one.storage._at(one.path(0)))
    assert two.has(0), "by a listing of before"
    coming = threading.Timer(1.2, replace_shard, (one, whole))
    coming.start()
    assert two.table(0).equals(TABLE)
    coming.join()


# Nobody is told to delete what another process may be making.
DAMAGED = (
    r"s3://.*/000000.arrow is missing or damaged: run the same command again when no other process works"
)


def test_an_object_that_stays_damaged_is_told(shards, monkeypatch) -> None:
    one, two, whole = shards
    monkeypatch.setattr(type(two.storage), "pauses", (0.1, 0.1))
    for damaged in (whole[:-40] + bytes(40), whole[:-1], b""):
        replace_shard(one, damaged)
        with pytest.raises(RunDirectoryError, match=DAMAGED):
            two.table(0)
        assert not [path for path in two.folder.iterdir() if path.suffix == ".tmp"]


@pytest.mark.parametrize("bucket", ["s3", "gs"], indirect=True)
def test_an_object_that_a_store_kept_in_part_is_sent_again(shards, monkeypatch, caplog) -> None:
    one, two, whole = shards
    put, sent = one.storage._system.put_file, []

    def in_part(path: str, url: str) -> None:
        sent.append(url)
        content = Path(path).read_bytes()
        if len(sent) < 2:
            one.storage._system.pipe_file(url, content[:-1])
        else:
            put(path, url)

    monkeypatch.setattr(one.storage._system, "put_file", in_part)
    one.storage.publish(one.path(0))
    assert len(sent) == 2
    assert f"keeps {len(whole) - 1:,} bytes of {len(whole):,}: sending it again" in caplog.text
    assert two.table(0).equals(TABLE)


def test_a_store_that_never_keeps_all_is_told(shards, monkeypatch) -> None:
    one, _, whole = shards
    system = one.storage._system
    monkeypatch.setattr(system, "put_file", lambda path, url: system.pipe_file(url, whole[:-1]))
    with pytest.raises(OutputError, match=r"keeps .* bytes of .* check the store"):
        one.storage.publish(one.path(0))


@pytest.mark.parametrize("bucket", ["gs"], indirect=True)
@pytest.mark.parametrize("end", [b"\r", b"\r\n", b"\n", b"\r\r", b"\n--==0==\n", b"\0"])
def test_the_server_that_stands_for_googles_keeps_uploads_to_the_byte(machine, end) -> None:
    storage = machine("one").storage
    path = storage.root / "file.bin"
    path.write_bytes(bytes(range(256)) + end)
    storage.publish(path)
    assert storage._cat(path) == bytes(range(256)) + end


def test_the_mirror_may_be_deleted(machine) -> None:
    import shutil

    stage = Stage(machine("one"), "ranked", {})
    stage.write(0, TABLE)
    shutil.rmtree(stage.folder)
    assert stage.table(0).equals(TABLE)


@EVERY
def test_what_was_listed_and_is_gone_is_not_there(machine) -> None:
    one, two = machine("one").storage, machine("two").storage
    for name in ("kept.json", "gone.json"):
        (one.root / name).write_text("{}")
        one.publish(one.root / name)
    two._listings.clear()
    assert two.exists(two.root / "gone.json")
    one.remove(one.root / "gone.json")
    begun = time.monotonic()
    assert two.read(two.root / "gone.json") is None
    assert two.read_json(two.root / "gone.json") is None
    assert not two.fetch(two.root / "gone.json")
    assert two.read(two.root / "kept.json") == b"{}"
    assert time.monotonic() - begun < 20, "and nobody waits for it to come back"


@EVERY
def test_a_lease_holds_between_machines_as_long_as_its_holder_lives(machine) -> None:
    one, two = machine("one").leases, machine("two").leases
    with one.hold("shard") as mine:
        assert mine
        time.sleep(4)  # longer than the dead are silent
        with two.hold("shard") as also:
            assert not also
        assert [held.worker for held in two.held()] == ["one"]
    with two.hold("shard", wait=True) as mine:
        assert mine
    assert two.deaths("shard") == []


@EVERY
def test_what_a_dead_machine_was_at_is_taken_by_another_and_counted(machine, bucket, tmp_path) -> None:
    code = (
        "import os, sys\n"
        "from scaledown.run import hub, locations\n"
        "from scaledown.run.directory import RunDirectory\n"
        "hub._SETTLE_SECONDS = 0.5\n"
        "run = RunDirectory(locations.storage_at(sys.argv[1] + '/run', sys.argv[2]), worker='killed')\n"
        "with run.leases.hold('shard'): os.kill(os.getpid(), 9)"
    )
    process = subprocess.run([sys.executable, "-c", code, bucket, str(tmp_path / "killed")], check=False)
    assert process.returncode == -9
    two = machine("two").leases
    with two.hold("shard") as mine:
        assert not mine, "it may live"
    with two.hold("shard", wait=True) as mine:
        assert mine
        assert len(machine("three").leases.deaths("shard")) == 1
    again = subprocess.run([sys.executable, "-c", code, bucket, str(tmp_path / "killed")], check=False)
    assert again.returncode == -9
    with machine("killed").leases.hold("shard") as mine:
        assert mine, "on its own machine a lock tells at once that it is dead"
    assert len(two.deaths("shard")) == 2
    two.forget()
    assert machine("three").leases.deaths("shard") == []


def killed_at_a_shard(bucket: str, cache: Path) -> None:
    """A machine has died at a shard: its note is there, and not renewed."""
    code = (
        "import os, sys\n"
        "from scaledown.run import hub, locations\n"
        "from scaledown.run.directory import RunDirectory\n"
        "hub._SETTLE_SECONDS = 0.5\n"
        "run = RunDirectory(locations.storage_at(sys.argv[1] + '/run', sys.argv[2]), worker='killed')\n"
        "with run.leases.hold('s-f-000000'): os.kill(os.getpid(), 9)"
    )
    process = subprocess.run([sys.executable, "-c", code, bucket, str(cache)], check=False)
    assert process.returncode == -9


def most_at_once(leases: list[Leases], name: str) -> list[int]:
    """How many were inside when each came in, of as many as all wait for the same lease."""
    begin, inside, most = threading.Barrier(len(leases)), [], []

    def work(own: Leases) -> None:
        begin.wait()
        with own.hold(name, wait=True):
            inside.append(own)
            most.append(len(inside))
            time.sleep(0.2)
            inside.remove(own)

    threads = [threading.Thread(target=work, args=(own,)) for own in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return most


@EXCLUSIVE
def test_a_death_is_counted_once_though_many_wait_for_it(machine, bucket, tmp_path) -> None:
    killed_at_a_shard(bucket, tmp_path / "killed")
    leases = [machine(f"machine {n}").leases for n in range(6)]
    assert most_at_once(leases, "s-f-000000") == [1] * 6
    assert machine("another").leases.deaths("s-f-000000") == ["it was killed"]


def test_an_old_listing_does_not_end_a_living_lease(machine, bucket, tmp_path, monkeypatch) -> None:
    killed_at_a_shard(bucket, tmp_path / "killed")
    one, two = machine("one"), machine("two")
    assert within(10, lambda: not two.storage.taken(two.path / "locks" / "s-f-000000.held"))
    monkeypatch.setattr(
        object_store, "_LISTED_SECONDS", 60
    )  # two has seen the dead one's note, and looks no more
    two.storage.exists(two.path / "locks" / "s-f-000000.held")
    with one.leases.hold("s-f-000000", wait=True):
        with two.leases.hold("s-f-000000") as also:
            assert not also
        assert [held.worker for held in machine("three").leases.held()] == ["one"]
    assert machine("three").leases.deaths("s-f-000000") == ["it was killed"]


def test_who_dies_while_taking_over_holds_nobody_up(machine, bucket, tmp_path, monkeypatch) -> None:
    killed_at_a_shard(bucket, tmp_path / "killed")
    one = machine("one")

    def die(_: Path) -> None:
        raise MemoryError

    monkeypatch.setattr(one.storage, "remove", die)
    with pytest.raises(MemoryError), one.leases.hold("s-f-000000", wait=True):
        pass
    with machine("two").leases.hold("s-f-000000", wait=True) as mine:
        assert mine
    assert machine("three").leases.deaths("s-f-000000") == ["it was killed"]


def test_a_worker_elsewhere_that_is_known_to_be_dead_is_counted_at_once(machine, bucket, tmp_path) -> None:
    killed_at_a_shard(bucket, tmp_path / "killed")
    leases = machine("supervisor").leases
    assert leases.died("killed", "node gone") == ["s-f-000000"]
    assert machine("two").leases.deaths("s-f-000000") == ["node gone"]
    with machine("two").leases.hold("s-f-000000") as mine:
        assert mine


def test_the_next_after_one_who_died_while_taking_over(machine, bucket, tmp_path, monkeypatch) -> None:
    """Also when two find that out: one of them is between looking and removing the note."""
    killed_at_a_shard(bucket, tmp_path / "killed")
    died, one, two = machine("died"), machine("one"), machine("two")

    def die(_: Path) -> None:
        raise MemoryError

    monkeypatch.setattr(died.storage, "remove", die)
    with pytest.raises(MemoryError), died.leases.hold("s-f-000000", wait=True):
        pass
    at, go_on, got = threading.Event(), threading.Event(), []
    take = two.storage.take

    def slow(path: Path) -> bool:
        if path.suffix == ".death" and not at.is_set():
            at.set()
            go_on.wait(20)
        return take(path)

    monkeypatch.setattr(two.storage, "take", slow)

    def work() -> None:
        while not got:
            with two.leases.hold("s-f-000000") as mine:
                if mine or at.is_set():
                    got.append(mine)

    thread = threading.Thread(target=work)
    thread.start()
    assert at.wait(20)
    with one.leases.hold("s-f-000000", wait=True) as mine:
        assert mine
        go_on.set()
        thread.join()
        assert got == [False]
    assert machine("three").leases.deaths("s-f-000000") == ["it was killed"]


@pytest.fixture
def slow_beat(machine, monkeypatch) -> tuple[RunDirectory, threading.Event, threading.Event]:
    """A machine, that its beat is under way, and that it may land."""
    run = machine("one")
    pipe, begun, go_on = run.storage._system.pipe_file, threading.Event(), threading.Event()

    def slow(path: str, content: bytes, **mode: str) -> None:
        if not mode:
            begun.set()
            go_on.wait(20)
        pipe(path, content, **mode)

    monkeypatch.setattr(run.storage._system, "pipe_file", slow)
    return run, begun, go_on


def test_a_late_beat_leaves_nothing(machine, slow_beat) -> None:
    run, begun, go_on = slow_beat
    with run.leases.hold("s-f-000000"):
        assert begun.wait(20)
        threading.Timer(1.0, go_on.set).start()
    assert machine("two").leases.held() == []
    with machine("two").leases.hold("s-f-000000") as mine:
        assert mine


def test_a_beat_later_than_that_ends_no_others_lease(machine, slow_beat) -> None:
    run, begun, go_on = slow_beat
    with run.leases.hold("s-f-000000"):
        assert begun.wait(20)
    with machine("two").leases.hold("s-f-000000", wait=True) as mine:
        assert mine
        go_on.set()
        time.sleep(0.5)
        with machine("three").leases.hold("s-f-000000") as also:
            assert not also


@EXCLUSIVE
def test_one_of_many_gets_a_lease(machine) -> None:
    assert most_at_once([machine(f"machine {n}").leases for n in range(4)], "shard") == [1] * 4


@pytest.mark.parametrize("bucket", ["hf"], indirect=True)
def test_who_was_slow_to_take_a_lease_does_not_end_that_of_another(bucket, monkeypatch) -> None:
    quick, slow = hub.HubBuckets(), hub.HubBuckets()
    url, begun, sent, send = f"{bucket}/run/locks/x.held", threading.Event(), threading.Event(), slow._send
    monkeypatch.setattr(hub, "_SLOWEST_BEAT_SECONDS", 5)

    def late(content: bytes, url: str) -> None:
        begun.set()  # it has seen that nothing is there
        time.sleep(3 * hub._SETTLE_SECONDS)
        send(content, url)
        sent.set()

    def beat() -> None:
        begun.wait(20)
        quick.pipe_file(url, b"quick", mode="create")
        sent.wait(20)
        time.sleep(3 * hub._SETTLE_SECONDS)
        quick.pipe_file(url, b"quick")

    monkeypatch.setattr(slow, "_send", late)
    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(FileExistsError):
        slow.pipe_file(url, b"slow", mode="create")
    thread.join()
    assert quick.cat_file(url) == b"quick"


def test_who_had_to_wait_for_an_answer_leaves_others_time_to_wait_too(
    machine, bucket, tmp_path, monkeypatch
) -> None:
    killed_at_a_shard(bucket, tmp_path / "killed")
    run = machine("one")
    note = run.path / "locks" / "s-f-000000.held"
    assert within(10, lambda: not run.storage.taken(note))
    monkeypatch.setattr(object_store, "_SLOW_SECONDS", 0.5)
    info = run.storage._system.info

    def limited(*arguments: Any, **keywords: Any) -> Any:
        time.sleep(1)
        return info(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(run.storage._system, "info", limited)
        run.storage.state(note)
    assert run.storage.taken(note), "it may only have waited, like us"
    assert within(10, lambda: not run.storage.taken(note))


@EVERY
def test_partial_answers_of_another_machine_are_kept(machine) -> None:
    prompts = [answer_prompt(str(n), f"question {n}", ["document"], 0.0) for n in range(3)]
    answers = [Answer(f"answer {n}", "stop", 1, 1, 0) for n in range(3)]
    logs = [AnswerLog.of(Stage(machine(name), "answers", {}), range(1), 60) for name in ("one", "two")]
    with logs[0].writing() as writer:
        writer.add(0, prompts[0], answers[0])
    assert within(5, lambda: logs[1].read(prompts) == {0: answers[0]})
    with logs[1].writing() as writer:
        writer.add(2, prompts[2], answers[2])
    with logs[0].writing() as writer:  # back again, and before it has read what the other wrote
        writer.add(1, prompts[1], answers[1])
    every = dict(enumerate(answers))
    third = AnswerLog.of(Stage(machine("three"), "answers", {}), range(1), 60)
    for log in (*logs, third):
        assert within(5, lambda log=log: log.read(prompts) == every)
        assert log.tokens() == 6
    assert [log.shards for log in AnswerLog.every(Stage(machine("four"), "answers", {}))] == [range(1)]
    third.remove()
    assert AnswerLog.of(Stage(machine("three"), "answers", {}), range(1), 60).read(prompts) == {}


def test_answers_that_no_other_could_see_are_kept_and_then_seen(machine, monkeypatch) -> None:
    prompts = [answer_prompt(str(n), f"question {n}", ["document"], 0.0) for n in range(2)]
    answer = Answer("answer", "stop", 1, 1, 0)
    stage = Stage(machine("one"), "answers", {})
    monkeypatch.setattr(stage.storage, "publish", lambda _: None)
    with AnswerLog.of(stage, range(1), 60).writing() as writer:
        writer.add(0, prompts[0], answer)
    again = AnswerLog.of(Stage(machine("one"), "answers", {}), range(1), 60)
    assert again.read(prompts) == {0: answer}
    with again.writing() as writer:
        writer.add(1, prompts[1], answer)
    elsewhere = AnswerLog.of(Stage(machine("two"), "answers", {}), range(1), 60)
    assert within(5, lambda: elsewhere.read(prompts) == {0: answer, 1: answer})


def test_partial_answers_are_published_while_they_come(machine, monkeypatch) -> None:
    from scaledown.data.teacher import answer_log

    monkeypatch.setattr(answer_log, "_PUBLISH_SECONDS", 0.1)
    prompt, answer = answer_prompt("0", "question", ["document"], 0.0), Answer("answer", "stop", 1, 1, 0)
    one, two = (AnswerLog.of(Stage(machine(name), "answers", {}), range(1), 0.05) for name in ("one", "two"))
    with one.writing() as writer:
        writer.add(0, prompt, answer)
        assert within(10, lambda: two.read([prompt]) == {0: answer})


def test_a_store_without_conditional_writes(machine, monkeypatch) -> None:
    one, two = machine("one"), machine("two")
    for run in (one, two):
        pipe = run.storage._system.pipe_file

        def without(path: str, content: bytes, pipe: Callable[..., None] = pipe, **mode: str) -> None:
            if mode:
                raise NotImplementedError
            pipe(path, content)

        monkeypatch.setattr(run.storage._system, "pipe_file", without)
    with one.leases.hold("shard") as mine, two.leases.hold("shard") as also:
        assert mine
        assert not also


def test_files_of_other_origin_are_refused(machine, bucket) -> None:
    import fsspec

    fsspec.filesystem("s3", skip_instance_cache=True).pipe_file(f"{bucket}/run/thesis.tex", b"mine")
    with pytest.raises(RunDirectoryError, match=rf"{bucket}/run holds other things \(thesis.tex\)"):
        machine("one")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (
            "https://host/run",
            "https:// cannot hold it; use a local path, s3://, gs://, az:// or hf://buckets/",
        ),
        ("sftp://host/run", "sftp:// cannot hold it"),
        ("hf://datasets/org/name/run", "each file would be a commit there; use a bucket, hf://buckets/OWNER"),
        ("hf://buckets/owner", "name a bucket, and a folder in it"),
        ("s3://", "name a bucket, and a folder in it"),
        ("s3://bucket/../run", "name a bucket, and a folder in it"),
    ],
)
def test_urls_that_can_hold_no_run(url: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        storage_at(url)


def test_a_file_url_is_a_local_path(tmp_path: Path) -> None:
    file = File.at(f"file://{tmp_path}/train.json")
    assert file.path == tmp_path / "train.json"
    assert str(file) == str(file.path)


def test_memory_is_a_store_too(tmp_path: Path) -> None:
    runs = [RunDirectory(storage_at(f"memory://{tmp_path}/run", str(tmp_path / name))) for name in ("a", "b")]
    one, two = (Stage(run, "ranked", {}) for run in runs)
    with runs[0].claim("request"):
        one.write(0, TABLE)
        assert two.table(0).equals(TABLE)
        with pytest.raises(RunDirectoryError, match="in use by a live run"), runs[1].claim("other"):
            pass
        with runs[0].leases.hold("shard"), runs[1].leases.hold("shard") as mine:
            assert not mine
    assert runs[0].storage.glob(runs[0].path, "live/*") == []


def test_secrets_in_a_url_are_not_shown(tmp_path: Path) -> None:
    storage = storage_at("s3://key:sec/ret@bucket/run", str(tmp_path))
    assert str(storage) == "s3://…@bucket/run"
    assert storage.shown(storage.root / "a" / "b.json") == "s3://…@bucket/run/a/b.json"

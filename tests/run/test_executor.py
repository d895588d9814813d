"""Supervision, with workers that are threads of this process; and leases, which outlive no one."""

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from scaledown.config.prepare import PrepareConfig
from scaledown.config.shared import QueryPart
from scaledown.data import workers
from scaledown.devices.gpus import only
from scaledown.errors import InputError, NoRoomError, RunDirectoryError, UsageError
from scaledown.run import executor
from scaledown.run.directory import RunDirectory
from scaledown.run.executor import Ending, LocalPool, Order, supervise
from scaledown.run.leases import Leases
from scaledown.run.locations import storage_at
from scaledown.run.logs import LogStyle
from scaledown.run.ray_pool import RayPool
from scaledown.run.stage import Stage, together

WELL = Ending(well=True)


class Scripted:
    """A pool whose n-th worker ends as the n-th of `endings` says; None never ends by itself."""

    def __init__(self, *endings: Ending | None, at: Callable[[str], None] = lambda _: None) -> None:
        self.endings, self.at = list(endings), at
        self.orders: list[tuple[Order, int]] = []
        self.killed: list[str] = []

    def start(self, order: Order, place: int) -> Any:
        pool, number = self, len(self.orders)
        self.orders.append((order, place))
        self.at(order.worker)

        class Worker:
            def ended(self) -> Ending | None:
                if order.worker in pool.killed:
                    return Ending(well=False, reason="SIGKILL")
                return pool.endings[number]

            def kill(self) -> None:
                pool.killed.append(order.worker)

        return Worker()


def test_workers_that_end_well_are_not_replaced(tmp_path: Path) -> None:
    pool = Scripted(WELL, WELL)
    supervise(pool, "module:function", {"a": 1}, 2, [Leases(tmp_path, "me")])
    assert [(order.worker[:8], place) for order, place in pool.orders] == [("worker-0", 0), ("worker-1", 1)]
    assert len({order.worker[8:] for order, _ in pool.orders}) == 1
    assert pool.orders[0][0][:2] == ("module:function", {"a": 1})


def test_a_dead_worker_is_replaced_at_its_place_and_its_shard_remembers(tmp_path: Path) -> None:
    def at(worker: str) -> None:
        if worker.startswith("worker-1"):
            with pytest.raises(ValueError, match="stop"), Leases(tmp_path, worker).hold("ranked-f-000007"):
                raise ValueError("stop")

    pool = Scripted(WELL, Ending(well=False, reason="SIGSEGV"), WELL, at=at)
    leases = Leases(tmp_path, "me")
    supervise(pool, "m:f", {}, 2, [leases])
    assert [place for _, place in pool.orders] == [0, 1, 1]
    assert leases.deaths("ranked-f-000007") == ["SIGSEGV"]
    assert leases.held() == []


def test_an_error_of_the_user_ends_all(tmp_path: Path) -> None:
    pool = Scripted(None, Ending.failed("InputError", "no article with text"))
    with pytest.raises(InputError, match="no article"):
        supervise(pool, "m:f", {}, 2, [Leases(tmp_path, "me")])
    assert [name[:8] for name in pool.killed] == ["worker-0"]


def test_worker_that_is_killed_because_another_failed_counts_no_death(tmp_path: Path) -> None:
    def at(worker: str) -> None:
        if worker.startswith("worker-0"):
            with pytest.raises(ValueError, match="stop"), Leases(tmp_path, worker).hold("ranked-f-000007"):
                raise ValueError("stop")

    pool = Scripted(None, Ending.failed("InputError", "no article with text"), at=at)
    leases = Leases(tmp_path, "me")
    with pytest.raises(InputError, match="no article"):
        supervise(pool, "m:f", {}, 2, [leases])
    with leases.hold("ranked-f-000007") as mine:
        assert mine
    assert leases.deaths("ranked-f-000007") == []


def test_worker_with_full_gpu_stops_and_others_continue(tmp_path: Path, caplog: Any) -> None:
    full = Ending.failed("NoRoomError", "model x: out of memory while loading")
    pool = Scripted(full, WELL, WELL)
    supervise(pool, "m:f", {}, 3, [Leases(tmp_path, "me")])
    assert len(pool.orders) == 3, "none begins in its place"
    assert "stops, the others go on: model x: out of memory" in caplog.text
    with pytest.raises(NoRoomError, match="out of memory while loading"):
        supervise(Scripted(full, full), "m:f", {}, 2, [Leases(tmp_path, "me")])


def test_a_shard_is_given_back_by_a_worker_without_room(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    stage = Stage(run, "ranked", {})

    def full(shard: int) -> pa.Table:
        raise NoRoomError("out of memory")

    for _ in range(4):
        with pytest.raises(NoRoomError):
            stage.complete(1, full)
    assert stage.complete(1, lambda n: pa.table({"n": [n]})), "nobody died of it"


@pytest.mark.parametrize(
    ("shards", "most", "count"), [(28, 16, 1), (3490, 16, 16), (100, 16, 6), (1, 16, 1), (100, 4, 4)]
)
def test_number_of_shards_that_a_worker_takes_at_once(shards: int, most: int, count: int) -> None:
    assert together(shards, most) == count


def test_workers_receive_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content: dict[str, Any] = {}

    def supervise(_pool: Any, _target: str, settings: dict[str, Any], *_: Any) -> None:
        content.update(settings["config"])

    monkeypatch.setattr(workers, "supervise", supervise)
    monkeypatch.setattr(workers, "gpus_here", lambda _: 8)
    config = PrepareConfig(queries_file=("q.txt",), output_file="o.json")
    workers.share_work(config, "m:f", [RunDirectory(tmp_path / "run")])
    assert content["workers"] == 8


@pytest.mark.parametrize(
    ("given", "gpus_each", "count"),
    [({}, 0, 3), ({}, 1, 7), ({"workers": 2}, 0, 2), ({"workers": 2}, 1, 4)],
)
def test_gpus_that_share_a_teacher_can_be_workers_of_their_own(
    given: dict[str, Any], gpus_each: int, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "gpus_here", lambda _: 7)
    shown = []
    monkeypatch.setattr(
        executor,
        "_Process",
        lambda _order, _log, environment: shown.append(environment["CUDA_VISIBLE_DEVICES"]),
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config = PrepareConfig(queries_file=("q.txt",), output_file="o.json", tensor_parallel=2, **given)
    pool, found = workers.pool_of(config, RunDirectory(tmp_path / "run"), gpus_each)
    assert found == count
    for place in range(found):
        pool.start(Order("m:f", {}, "worker"), place)
    alone = [str(gpu) for gpu in range(7)]
    assert shown == (alone if gpus_each else ["0,1", "2,3", "4,5"])[:count]


def test_too_few_gpus_for_a_teacher_are_an_error_before_any_work(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(workers, "gpus_here", lambda _: 2)
    config = PrepareConfig(queries_file=("q.txt",), output_file="o.json", tensor_parallel=4)
    with pytest.raises(UsageError, match="are 2 GPUs, .*needs 4 for each worker: lower it"):
        workers.share_work(config, "m:f", [RunDirectory(tmp_path / "run")], gpus_each=1)


def test_workers_that_die_without_a_shard_end_the_run(tmp_path: Path) -> None:
    pool = Scripted(*[Ending(well=False, reason="exit status 1")] * 9)
    with pytest.raises(RunDirectoryError, match="3 workers died before they began anything.*exit status 1"):
        supervise(pool, "m:f", {}, 1, [Leases(tmp_path, "me")])
    assert len(pool.orders) == 3


def test_workers_without_a_shared_disk_make_a_part_each() -> None:
    pool = Scripted(Ending(well=False, reason="SIGKILL"), WELL, WELL)
    supervise(pool, "m:f", {"a": 1}, 2, [])
    assert [(order.settings, place) for order, place in pool.orders] == [
        ({"a": 1, "shard": "0/2"}, 0),
        ({"a": 1, "shard": "1/2"}, 1),
        ({"a": 1, "shard": "0/2"}, 0),
    ]


def test_workers_without_a_shared_disk_that_die_again_and_again_end_the_run(monkeypatch) -> None:
    monkeypatch.setattr(executor, "_LONG_LIFE_SECONDS", 0)  # however long they lived
    pool = Scripted(*[Ending(well=False, reason="exit status 1")] * 9)
    with pytest.raises(RunDirectoryError, match="3 workers died, the last of exit status 1; finished work"):
        supervise(pool, "m:f", {}, 1, [])


def test_only_workers_of_ray_in_a_bucket_share_no_disk(tmp_path: Path, monkeypatch) -> None:
    leases: list[int] = []
    monkeypatch.setattr(workers, "supervise", lambda *arguments: leases.append(len(arguments[4])))
    monkeypatch.setattr(workers, "pool_of", lambda *_: (None, 2))
    disk = RunDirectory(tmp_path / "run")
    bucket = RunDirectory(storage_at("memory://workers/run", str(tmp_path / "cache")))
    config = PrepareConfig(queries_file=("q.txt",), output_file="o.json")
    for executor_name, run in (("local", disk), ("local", bucket), ("ray", disk), ("ray", bucket)):
        workers.share_work(replace(config, executor=executor_name), "m:f", [run])
    assert leases == [1, 1, 1, 0]
    with pytest.raises(UsageError, match="--task_timeout: in a bucket"):
        workers.share_work(replace(config, executor="ray", task_timeout=9.0), "m:f", [bucket])


def test_worker_takes_its_part_from_the_order() -> None:
    config = PrepareConfig(queries_file=("q.txt",), output_file="o.json", workers=2)
    settings = {"config": asdict(config), "log": LogStyle()._asdict()}
    assert workers.settings_of(PrepareConfig, settings, "worker-0") == config
    given = workers.settings_of(PrepareConfig, {**settings, "shard": "1/2"}, "worker-1")
    assert given == replace(config, shard="1/2")


def test_a_hanging_worker_is_killed_and_one_that_gets_on_is_not(tmp_path: Path) -> None:
    done = threading.Event()

    def at(worker: str) -> None:
        leases = Leases(tmp_path, worker)
        name = f"ranked-f-{worker[7]:0>6}"

        def hold() -> None:
            with leases.hold(name):
                while not done.wait(0.1):
                    if not worker.startswith("worker-0"):
                        leases.renew(name)

        threading.Thread(target=hold, daemon=True).start()

    pool = Scripted(None, None, WELL, at=at)
    looked = []

    def look() -> None:
        looked.append(1)
        if pool.killed and len(pool.orders) == 3:
            pool.endings[1] = WELL

    leases = Leases(tmp_path, "me")
    supervise(pool, "m:f", {}, 2, [leases], task_timeout=2.0, look=look)
    done.set()
    assert [name[:8] for name in pool.killed] == ["worker-0"]
    assert looked


def test_a_shard_that_hangs_every_worker_is_its_fault_and_not_the_end(tmp_path: Path) -> None:
    def at(worker: str) -> None:
        if int(worker[7]) < 4:
            with pytest.raises(MemoryError), Leases(tmp_path, worker).hold("ranked-f-000001"):
                raise MemoryError  # leaves its note, as one that hangs has

    pool, leases = Scripted(None, None, None, None, WELL, at=at), Leases(tmp_path, "me")
    supervise(pool, "m:f", {}, 1, [leases], task_timeout=0.5)
    assert leases.deaths("ranked-f-000001") == ["hanging for 0.5 s"] * 4
    assert len(pool.killed) == 4


@pytest.mark.parametrize(
    ("visible", "place", "each", "own"),
    [
        ("", 0, 1, ["0"]),
        ("", 3, 2, ["6", "7"]),
        ("4,5, 6,7", 1, 2, ["6", "7"]),
        ("GPU-a,GPU-b", 1, 1, ["GPU-b"]),
    ],
)
def test_each_place_has_gpus_of_its_own(visible: str, place: int, each: int, own: list[str]) -> None:
    shown = only({"CUDA_VISIBLE_DEVICES": visible}, range(place * each, (place + 1) * each))
    assert shown == {"CUDA_VISIBLE_DEVICES": ",".join(own)}


def test_death_of_a_process_is_reported_with_its_reason(tmp_path: Path) -> None:
    pool = LocalPool(1, tmp_path / "live")
    endings = {}
    orders = {"lost": "no_such_module:f", "well": "time:strftime_", "content": "json:loads"}
    for name, target in orders.items():
        worker = pool.start(Order(target, {}, name), 0)
        while (ending := worker.ended()) is None:
            time.sleep(0.05)
        endings[name] = ending
    assert "No module named 'no_such_module'" in endings["lost"].reason
    assert not endings["well"].well
    assert "No module named" in (tmp_path / "live" / "lost.log").read_text()


def test_lease_of_dead_worker_is_taken_over_and_death_is_counted(tmp_path: Path) -> None:
    one, two = Leases(tmp_path, "one"), Leases(tmp_path, "two")
    with one.hold("s-f-000000") as mine, two.hold("s-f-000000") as other:
        assert (mine, other) == (True, False)
        assert [(held.name, held.worker) for held in two.held()] == [("s-f-000000", "one")]
    assert one.held() == []
    with pytest.raises(MemoryError), one.hold("s-f-000000"):
        raise MemoryError  # as unforeseen as a death
    with two.hold("s-f-000000") as mine:
        assert mine
    assert two.deaths("s-f-000000") == ["it was killed"]
    with pytest.raises(KeyboardInterrupt), one.hold("s-f-000000"):
        raise KeyboardInterrupt
    with two.hold("s-f-000000"):
        pass
    assert len(two.deaths("s-f-000000")) == 1, "who was interrupted did not die of it"
    two.forget()
    assert two.deaths("s-f-000000") == []


@pytest.mark.parametrize(("shards", "count"), [(7, 3), (2, 5), (8, 8), (1, 1), (0, 2)])
def test_parts_are_disjoint_and_complete(shards: int, count: int) -> None:
    parts = [QueryPart(number, count).of(shards) for number in range(count)]
    assert [shard for part in parts for shard in part] == list(range(shards))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_death_is_attributed_to_the_shard_and_not_to_cutting(tmp_path: Path) -> None:
    worker, leases = Leases(tmp_path, "w"), Leases(tmp_path, "me")
    with (
        pytest.raises(MemoryError),
        worker.hold("passages-f-all"),
        worker.hold("vectors-f-000003"),
    ):
        raise MemoryError
    assert sorted(leases.died("w", "SIGKILL")) == ["passages-f-all", "vectors-f-000003"]
    assert leases.deaths("passages-f-all") == []
    assert leases.deaths("vectors-f-000003") == ["SIGKILL"]


def test_worker_with_progress_is_not_blamed(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    stage = Stage(run, "passages", {})
    for _ in range(2):
        with pytest.raises(MemoryError), stage.lease("all"):
            raise MemoryError
        run.leases.died(run.leases.held()[0].worker, "SIGKILL")
    name = f"passages-{stage.fingerprint}-all"
    assert len(run.leases.deaths(name)) == 2
    with stage.lease("all"):
        stage.write(0, pa.table({"n": [1]}))
    assert run.leases.deaths(name) == []
    for _ in range(3):
        with pytest.raises(MemoryError), stage.lease("all"):
            raise MemoryError
        run.leases.died(run.leases.held()[0].worker, "SIGKILL")
    with pytest.raises(RunDirectoryError, match="passages: 3 workers died of it"), stage.lease("all"):
        pass


def died_of(run: RunDirectory, stage: Stage, shard: int, times: int = 3) -> None:
    for _ in range(times):
        with pytest.raises(MemoryError), run.leases.hold(f"{stage.name}-{stage.fingerprint}-{shard:06d}"):
            raise MemoryError
        run.leases.died(run.leases.held()[0].worker, "SIGKILL")


def test_empty_shard_replaces_a_given_up_shard(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    source, stage = Stage(run, "candidates", {}), Stage(run, "ranked", {})
    for number in range(3):
        source.write(number, pa.table({"n": [number, number]}))
    source.finish([2, 2, 2], {})
    died_of(run, stage, 1)

    def empty(like: pa.Table, shard: int) -> pa.Table:
        return pa.table({"n": [-1] * source.table(shard).num_rows})

    stage.complete_behind(source, source.table, lambda: None, empty)
    assert [stage.table(n).column("n").to_pylist() for n in range(3)] == [[0, 0], [-1, -1], [2, 2]]
    assert [stage.absent(n) for n in range(3)] == [False, True, False]
    content = stage.finish([2, 2, 2], {})
    assert content.counts["given_up"] == 1
    with run.claim("again"):  # alone: what was given up is tried again
        assert [stage.has(n) for n in range(3)] == [True, False, True]
        assert stage.done() is None
        stage.complete_behind(source, source.table, lambda: None, empty)
    assert stage.table(1).column("n").to_pylist() == [1, 1]


def test_shard_made_from_a_given_up_shard_is_made_again(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    source = Stage(run, "ranked", {})
    stage = Stage(run, "answers", {}, [source])
    died_of(run, source, 0)
    assert source.complete(2, lambda n: pa.table({"n": [n]}), nothing={"seen": "{}"})
    source.finish([0, 1], {})
    assert source.table(0).schema.metadata == {b"seen": b"{}"}
    assert stage.planned() == [0, 1]
    made = []
    assert stage.complete(2, lambda n: (made.append(n), source.table(n))[1])
    assert made == [1], "nothing is made from nothing"
    assert stage.made() == [0, 1]
    mark = stage.folder / "000000.absent.json"
    content = json.loads(mark.read_text())
    mark.write_text(json.dumps(content | {"part": [1, 2]}))
    with RunDirectory(run.path, QueryPart(0, 2)).claim("a part"):
        assert stage.has(0), "a part leaves what another part gave up"
    mark.write_text(json.dumps(content))
    with run.claim("again"):
        assert [stage.has(n) for n in range(2)] == [False, True]


def test_one_shard_of_a_group_is_to_blame(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    stage = Stage(run, "answers", {})
    with pytest.raises(MemoryError), run.leases.hold(f"answers-{stage.fingerprint}-000000-000004"):
        raise MemoryError
    run.leases.died(run.leases.held()[0].worker, "SIGKILL")
    groups = []

    def work(group: range) -> list[pa.Table]:
        groups.append(group)
        return [pa.table({"n": [shard]}) for shard in group]

    assert stage.complete_together(6, 4, work)
    assert groups == [range(n, n + 1) for n in range(4)] + [range(4, 6)]


def test_a_part_that_lost_all_of_its_shards_leaves_the_rest_to_others(tmp_path: Path) -> None:
    first, second = (RunDirectory(tmp_path / "run", QueryPart(number, 2)) for number in range(2))
    source, stage = Stage(first, "ranked", {}), Stage(first, "answers", {})
    died_of(first, source, 0)
    assert not source.complete(2, lambda n: pa.table({"n": [n]}))
    stage = Stage(first, "answers", {}, [source])
    source_of = Stage(first, "queries", {})
    source_of.finish([1, 1], {})
    source._sources = [source_of]
    assert not stage.complete(2, source.table)
    assert stage.absent(0)
    source, stage = Stage(second, "ranked", {}), Stage(second, "answers", {}, [source])
    assert source.complete(2, lambda n: pa.table({"n": [n]}))
    assert not stage.complete(2, source.table), "what it is made from has to be finished first"
    source.finish([0, 1], {})
    assert stage.complete(2, source.table)
    assert [stage.table(n).num_rows for n in range(2)] == [0, 1]


def test_all_shards_given_up_is_reported(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    stage = Stage(run, "ranked", {})
    for shard in range(2):
        died_of(run, stage, shard)
    with pytest.raises(RunDirectoryError, match="all of its shards were given up"):
        stage.complete(2, lambda n: pa.table({"n": [n]}))
    assert run.given_up() == 2
    assert RunDirectory(run.path).given_up() == 0, "of stages that were not opened"
    content = next(run.quarantine.iterdir()).read_text()
    assert json.loads(content)["deaths"] == ["SIGKILL"] * 3


@pytest.mark.parametrize(
    ("flags", "gpus_seen", "shared", "count", "each"),
    [
        ({}, 0, False, 1, 0),
        ({}, 1, False, 1, 1),
        ({}, 8, True, 8, 1),
        ({"workers": 4}, 8, True, 4, 1),
        ({"workers": 3}, 0, True, 3, 0),
        ({"tensor_parallel": 4}, 8, True, 2, 4),
        ({"tensor_parallel": 8}, 8, False, 1, 8),
        ({"task_timeout": 60.0}, 0, True, 1, 0),
    ],
)
def test_a_worker_for_each_gpu(
    flags: dict[str, Any],
    gpus_seen: int,
    shared: bool,
    count: int,
    each: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(workers, "gpus_here", lambda _: gpus_seen)
    config = PrepareConfig(queries_file=("q.txt",), output_file="o.json", **flags)
    assert workers.supervised(config) == shared
    pool, number = workers.pool_of(config, RunDirectory(tmp_path / "run"))
    assert isinstance(pool, LocalPool)
    if gpus_seen:
        with pytest.raises(UsageError, match="there are"):
            workers.pool_of(replace(config, workers=gpus_seen + 1), RunDirectory(tmp_path / "run"))
    assert (number, pool._gpus_each) == (count, each)


class FakeRay:
    """As much of Ray as a pool calls, on a cluster with GPUs that is not there."""

    class exceptions:  # noqa: N801
        RayError = RuntimeError

    def __init__(self, gpus: int) -> None:
        self.gpus = gpus
        self.options: list[dict[str, Any]] = []
        self.cancelled: list[Any] = []

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        own = {"CPU": 32.0, **({"GPU": self.gpus / 2} if self.gpus else {})}
        return [{"Alive": alive, "Resources": own} for alive in (True, True, False)]

    def available_resources(self) -> dict[str, float]:
        return {"CPU": 64.0, "GPU": float(self.gpus)}

    def remote(self, function: Callable[..., Any]) -> Any:
        ray = self

        class Remote:
            def options(self, **options: Any) -> "Remote":
                ray.options.append(options)
                return self

            def remote(self, order: dict[str, Any]) -> Any:
                return lambda: function(order)

        return Remote()

    def wait(self, references: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return references, []

    def get(self, reference: Any) -> Any:
        try:
            return reference()
        except TypeError as error:  # as Ray wraps what its tasks raise
            raise RuntimeError(str(error)) from error

    def cancel(self, reference: Any, force: bool) -> None:
        self.cancelled.append((reference, force))


def test_gpus_of_a_cluster_can_be_workers_of_their_own_too(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", FakeRay(16))
    monkeypatch.setattr(workers, "choose_device", lambda _: "cuda")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    config = PrepareConfig(queries_file=("q.txt",), output_file="o.json", executor="ray", tensor_parallel=4)
    assert workers.share_teachers(config), "the machine that starts them need not have several"
    counts = [workers.pool_of(config, RunDirectory(tmp_path / "run"), each)[1] for each in (0, 1)]
    assert counts == [4, 16]


@pytest.mark.parametrize(
    ("gpus_there", "asked", "each", "count", "own", "threads"),
    [(16, 0, 1, 16, 1, 4), (16, 0, 4, 4, 4, 16), (16, 3, 1, 3, 1, 4), (0, 0, 1, 2, 0, 32)],
)
def test_workers_on_ray_take_their_gpus(
    gpus_there: int,
    asked: int,
    each: int,
    count: int,
    own: int,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    ray = FakeRay(gpus_there)
    monkeypatch.setitem(sys.modules, "ray", ray)
    pool = RayPool("auto", asked, each)
    assert pool.workers == count
    worker = pool.start(Order("builtins:isinstance", {}, "worker-0"), 0)
    (options,) = ray.options
    assert (options["num_gpus"], options["max_retries"]) == (own, 0)
    assert options["num_cpus"] == (1 if own else 32)
    assert options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == str(threads)
    ending = worker.ended()
    assert ending is not None
    assert "isinstance() arg 2 must be a type" in ending.reason
    worker.kill()
    assert ray.cancelled[0][1]


@pytest.mark.parametrize(
    ("gpus_there", "device", "each", "says"),
    [(2, "auto", 2, "no node of the cluster has that many"), (2, "cuda:0", 1, "leave out the number")],
)
def test_unsupported_settings_of_a_cluster_are_refused(
    gpus_there: int, device: str, each: int, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", FakeRay(gpus_there))
    flags = {"executor": "ray", "device": device, "tensor_parallel": each}
    config = PrepareConfig(queries_file=("q.txt",), output_file="o.json", **flags)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=says):
        workers.pool_of(config, RunDirectory(tmp_path / "run"))


def test_ray_driver_without_gpus_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", FakeRay(4))
    config = PrepareConfig(queries_file=("q.txt",), output_file="o.json", executor="ray")
    with pytest.raises(UsageError, match="this machine has none"):
        workers.pool_of(config, RunDirectory(tmp_path / "run"))
    pool, count = workers.pool_of(replace(config, device="cpu"), RunDirectory(tmp_path / "run"))
    assert (count, pool._gpus_each) == (2, 0)  # type: ignore[attr-defined]


def test_token_limit_with_several_workers_is_refused(tmp_path: Path) -> None:
    limits = {"teacher_endpoint": ("http://localhost/v1",), "max_total_tokens": 5, "workers": 2}
    config = PrepareConfig(queries_file=("q.txt",), output_file="o.json", **limits)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--max_total_tokens applies to one process"):
        workers.share_work(config, "m:f", [RunDirectory(tmp_path / "run")])


def test_killed_worker_ends_its_child_processes(tmp_path: Path) -> None:
    """A child that holds the pipe of a dead worker must not keep its supervisor waiting."""
    script = (
        "import subprocess,os,signal;subprocess.Popen(['sleep','600']);os.kill(os.getpid(),signal.SIGKILL)"
    )
    (tmp_path / "forking.py").write_text(f"def work(settings, worker):\n    exec({script!r})\n")
    pool = LocalPool(1, tmp_path / "live")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        worker = pool.start(Order("forking:work", {}, "w"), 0)
        started = time.monotonic()
        while (ending := worker.ended()) is None:
            assert time.monotonic() - started < 60
            time.sleep(0.05)
    assert ending == Ending(well=False, reason="SIGKILL")


def test_work_order_with_a_missing_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not have it"):
        Order("builtins:print", {}, "w", str(tmp_path / "nowhere")).carry_out()

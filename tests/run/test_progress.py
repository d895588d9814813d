import contextlib
import io
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from rich.console import Console

from scaledown.run import overview, progress
from scaledown.run.directory import RunDirectory
from scaledown.run.heartbeat import Work
from scaledown.run.overview import Overview
from scaledown.run.progress import Tracker, at_work, duration, track
from scaledown.run.stage import Stage


def test_a_line_has_count_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, *[110.0] * 20])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    tracker = Tracker("retrieve", "queries", 3000, 1000)
    tracker.done = 2000
    assert tracker.line() == "retrieve: 2,000/3,000 queries, 100.0/s, 10.0 s left"


def test_an_unknown_total_is_estimated_from_the_share_that_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, *[10.0] * 20])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    tracker = Tracker("passages", "passages", None, 0)
    tracker.advance(500, 0.25)
    assert tracker.line() == "passages: 500/~2,000 passages, 50.0/s, 30.0 s left"


@pytest.mark.parametrize(
    ("unit", "total", "fraction", "shown"),
    [
        ("queries", 1, None, "1/1 query"),
        ("passages", 1, None, "1/1 passage"),
        ("passages", None, None, "1 passage"),
        ("passages", None, 0.5, "1/~2 passages"),
        ("steps", 2, None, "1/2 steps"),
    ],
)
def test_unit_is_singular_for_one(unit: str, total: int | None, fraction: float | None, shown: str) -> None:
    tracker = Tracker("name", unit, total, 0)
    tracker.advance(1, fraction)
    assert tracker.counts() == shown


def test_progress_is_plain_lines_without_a_terminal(caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "scaledown"), track("teach", "answers", 4, 2) as tracker:
        tracker.advance(1)
        tracker.advance(1)
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == "teach: continues after 2 answers"
    assert messages[1].startswith("teach: 3/4 answers, ")
    assert messages[1].endswith(" left")
    assert messages[-1].startswith("teach: 4/4 answers, ")


def test_on_a_terminal_there_is_a_bar_with_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=screen, force_terminal=True, width=100))
    with track("teach", "answers", 4) as tracker:
        for _ in range(4):
            tracker.advance()
    shown = screen.getvalue()
    assert "4/4 answers" in shown
    assert "/s" in shown
    assert "0:00:00" in shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.9, "59.9 s"),
        (61.4, "1 min 01 s"),
        (599.9, "10 min"),
        (3599, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_in_flight_count_restarts_with_each_shard(tmp_path: Path) -> None:
    stage = Stage(RunDirectory(tmp_path), "candidates", {})
    with track("retrieve", "queries", 8, stage=stage) as tracker:
        assert at_work() == [tracker]
        for shard in (0, 1):
            stage.at = range(shard, shard + 1)
            tracker.skip(1)
            tracker.advance(2)
            assert (tracker.at, tracker.in_flight) == (stage.at, 3)
    assert at_work() == []
    assert tracker.done == 6


def test_other_work_is_not_published() -> None:
    with track("read", "records", 8):
        assert at_work() == []


@pytest.fixture
def two_at_work(tmp_path: Path) -> Iterator[Stage]:
    """A stage of which two processes make a shard each, as far as others can see."""
    run = RunDirectory(tmp_path)
    rows = pa.table({"row": [0, 1, 2, 3]})
    queries = Stage(run, "queries", {})
    for shard in range(3):
        queries.write(shard, rows)
    queries.finish([4, 4, 4], {"queries": 12})
    stage = Stage(run, "ranked", {}, [queries])
    stage.write(0, rows)
    with contextlib.ExitStack() as stack:
        for number in (1, 2):
            place = stack.enter_context(run.claim("same"))
            work = Work("ranked", "pairs", 40, 120, 0, 10.0 * number, (number, number + 1), 10)
            stages = {name: str(folder) for name, folder in run.opened.items()}
            word = {"worker": f"worker-{number}", "stages": stages}
            content = {**word, "time": time.time(), "work": [work._asdict()]}
            place.with_suffix(".progress").write_text(json.dumps(content))
        death = tmp_path / "locks" / "deaths" / f"ranked-{stage.fingerprint}-000001.0.death"
        death.parent.mkdir(parents=True)
        death.write_text('{"time": 1.0, "of": "SIGKILL"}')
        yield stage


def test_a_supervisor_shows_all_workers_together(
    two_at_work: Stage, tmp_path: Path, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(overview, "_EVERY_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "scaledown"), contextlib.closing(Overview(tmp_path)) as shown:
        shown.look()
        for shard in (1, 2):
            two_at_work.write(shard, pa.table({"row": [0, 1, 2, 3]}))
        two_at_work.finish([4, 4, 4], {})
        shown.look()
        shown.look()
    messages = [record.getMessage() for record in caplog.records]
    # 120 pairs are 12 queries: 4 are done, each worker has done 1 of another 4
    assert messages[0] == "ranked: 6/12 queries, 3.0/s, 2.0 s left, 2 workers, 1 death"
    assert messages[-1].startswith("ranked: 12/12 queries, 3.0/s")
    assert len(messages) == 3


def test_supervisor_draws_progress_bars_on_a_terminal(
    two_at_work: Stage, tmp_path: Path, monkeypatch
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=screen, force_terminal=True, width=120))
    with contextlib.closing(Overview(tmp_path)) as shown:
        shown.look()
    assert "6/12 queries  3.0/s  2 workers, 1 death" in screen.getvalue()

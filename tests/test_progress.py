import io
import logging
import time

import pytest
from rich.console import Console

from scaledown import progress
from scaledown.progress import Tracker, duration, track


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


def test_elsewhere_than_on_a_terminal_there_are_plain_lines(
    caplog: pytest.LogCaptureFixture, monkeypatch
) -> None:
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

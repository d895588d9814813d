"""The log as JSON lines: for commands, for their last word, and for workers."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from scaledown.cli import main
from scaledown.errors import InputError, run_command
from scaledown.run import logs, progress
from scaledown.run.logs import start_logging
from scaledown.run.progress import track

log = logging.getLogger("scaledown")


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_json_log_has_one_object_per_line(capsys) -> None:
    start_logging("info", "json", "worker-3")
    log.info("two\nlines of %s", 'a "quoted" \udc80 \x1b[31mname')
    (line,) = lines(capsys)
    assert line.pop("time").endswith("+00:00")
    message = 'two\nlines of a "quoted" \udc80 \x1b[31mname'
    assert line == {"level": "info", "logger": "scaledown", "message": message, "worker": "worker-3"}


def test_progress_has_its_numbers_as_fields(capsys, monkeypatch) -> None:
    """And no bars, also on a terminal."""
    monkeypatch.setattr(logs.console, "_force_terminal", True)
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0.0)
    start_logging("info", "json")
    with track("teach", "answers", 4) as tracker:
        tracker.advance(1)
    first, _ = lines(capsys)
    assert (first["stage"], first["unit"], first["done"], first["total"]) == ("teach", "answers", 1, 4)
    assert first["rate"] > 0
    assert first["seconds_left"] >= 0
    assert first["message"].startswith("teach: 1/4 answers")


def test_json_log_ends_with_the_error(capsys) -> None:
    def command() -> int:
        start_logging("error", "json")
        raise InputError("nothing there: look")

    assert run_command(command, debug=False) == 1
    (line,) = lines(capsys)
    assert (line["level"], line["message"]) == ("error", "nothing there: look")


def test_json_log_has_exceptions_as_a_field(capsys) -> None:
    start_logging("debug", "json")
    try:
        raise ValueError("x")
    except ValueError:
        log.debug("failed", exc_info=True)
    (line,) = lines(capsys)
    assert line["exception"].endswith("ValueError: x")


def test_json_log_of_a_run(prepare, capsys) -> None:
    assert prepare("--log_format", "json") == 0
    captured = capsys.readouterr()
    log_lines = [json.loads(line) for line in captured.err.splitlines()]
    by_stage = {line["stage"]: line for line in log_lines if "stage" in line}
    assert by_stage["answers"]["done"] == by_stage["answers"]["total"] == 4
    assert "4 examples" in captured.out, "the summary stays as it is"


@pytest.mark.parametrize("command", ["validate", "merge", "report", "answer", "export-openvino", "status"])
def test_every_command_has_log_format(command: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "--log_format" in capsys.readouterr().out


def test_other_formats_are_wrong_usage(tmp_path: Path, capsys) -> None:
    assert main(["validate", str(tmp_path / "x.json"), "--log_format", "xml"]) == 2
    assert "--log_format" in capsys.readouterr().err

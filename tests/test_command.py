"""`run_cli`, which runs every command."""

import errno
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from scaledown.cli import main
from scaledown.command import CommandHelp, run_cli
from scaledown.config.options import Options, Range, option
from scaledown.config.shared import OUTPUT
from scaledown.errors import InputError, run_command

USAGE = CommandHelp("test", "--number N", "Count.", (OUTPUT,))


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    number: int = option(1, OUTPUT, "a number", role="result", within=Range(1), metavar="N")
    output_dir: str = option("out", OUTPUT, "a folder", role="place", metavar="DIR")


def twice(config: Config, *, overwrite: bool = False) -> int:
    return 2 * config.number + overwrite


def run(work: Callable[..., int], *words: str, **others: Any) -> int:
    return run_cli(
        Config, work, lambda result, config: f"{config.number}: {result}", usage=USAGE, argv=words, **others
    )


def test_run_cli_runs_the_work_and_prints_its_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(twice, "--number", "3", "--overwrite") == 0
    assert capsys.readouterr() == ("3: 7\n", "")


def test_flags_override_the_config_file_and_repeats_is_its_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"number": 4, "output_dir": "there"}))
    seen: list[Any] = []

    def work(config: Config, **others: Any) -> int:
        seen.append((config, others))
        return 0

    assert run(work, "--config", str(path), "--output-dir", "here") == 0
    assert run(work, "--config", str(path), repeats=True) == 0
    assert seen == [
        (Config(number=4, output_dir="here"), {}),
        (Config(number=4, output_dir="there"), {"repeats": path}),
    ]


@pytest.mark.parametrize(
    ("reason", "status", "error"), [(None, 0, ""), ("", 1, ""), ("it is odd", 1, "error: it is odd\n")]
)
def test_failure_sets_the_status_and_is_printed_after_the_summary(
    reason: str | None, status: int, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(twice, failure=lambda _result, _config: reason) == status
    assert capsys.readouterr() == ("1: 2\n", error)


def test_only_the_first_process_makes_the_summary(monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run_cli(Config, twice, lambda *_: pytest.fail("made"), usage=USAGE, argv=[]) == 0


def test_only_the_first_process_prints(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run(twice) == 0
    assert capsys.readouterr().out == ""


def test_errors_are_one_line_with_their_status(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(_: Config) -> int:
        raise InputError("no input")

    def interrupted(_: Config) -> int:
        raise KeyboardInterrupt

    assert run(twice, "--number", "0") == 2
    assert run(broken) == 1
    assert run(interrupted, resumes=True) == 130
    assert capsys.readouterr().err.splitlines() == [
        "error: --number 0: must be at least 1",
        "error: no input",
        "interrupted; finished work is kept, the same command continues from it",
    ]
    with pytest.raises(InputError):
        run(broken, "--debug")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "a.arrow"),
        OSError(errno.EDQUOT, "Disk quota exceeded", "a.arrow"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk_is_one_line_with_the_next_step(error: Exception, capsys) -> None:
    def command() -> int:
        raise error

    assert run_command(command, debug=False, resumes=True) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "error: no space left on the disk: free some; finished work is kept, the same command continues "
        "from it"
    )


def test_command_without_output_has_no_overwrite_flag(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True)
    class Shown(Options):
        number: int = option(1, OUTPUT, "a number", role="result", metavar="N")

    assert run_cli(Shown, lambda config: config.number, lambda *_: "", usage=USAGE, argv=["--overwrite"]) == 2
    assert "unrecognized arguments: --overwrite (see" in capsys.readouterr().err


def test_misspelt_flags_are_answered_by_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--numbr=3", "--log-levl", "info", "--quite_another"]
    assert run(twice, *argv) == 2
    assert "--quite_another: did you mean --number and --log_level? (see" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["trian"], ": did you mean train? (see scaledown --help)"),
        (["prepare", "--preset", "dmo"], ": did you mean demo? (see scaledown prepare --help)"),
        (["evaluate", "--systems", "compresed"], ": did you mean compressed? (see"),
        (["fly"], ") (see scaledown --help)"),
    ],
)
def test_misspelt_choices_are_answered_by_the_known_ones(
    argv: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert meant in capsys.readouterr().err


def test_missing_input_is_an_error_before_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True)
    class Reading(Options):
        files: tuple[str, ...] = option((), OUTPUT, "files", role="input", metavar="FILE")

    def work(config: Reading) -> None:
        raise AssertionError(config)

    argv = ["--files", __file__, "s3://bucket/file", "no/such.txt"]
    assert run_cli(Reading, work, lambda *_: "", usage=USAGE, argv=argv) == 1
    assert capsys.readouterr().err == "error: --files no/such.txt: there is no such file; check the path\n"

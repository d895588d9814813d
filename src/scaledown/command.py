"""Runs a command: reads flags into settings, does the work, prints a summary, returns the exit status."""

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from scaledown.config.flags import Config, Parser, command_parser, from_flags, underscored
from scaledown.config.prepare import GROUPS
from scaledown.errors import print_last_message, run_command
from scaledown.run.logs import start_logging

Result = TypeVar("Result")


class CommandHelp(NamedTuple):
    """The help of a command, except its flags."""

    program: str
    """The name of the command, as in `scaledown train`."""
    needed: str
    """The flags in the usage line."""
    description: str
    """The text at the beginning of the help."""
    groups: Sequence[str] = GROUPS
    """The groups of the help, in their order."""


def run_cli(
    config: type[Config],
    run: Callable[..., Result],
    summary: Callable[[Result, Config], str],
    *,
    usage: CommandHelp,
    argv: Sequence[str] | None = None,
    failure: Callable[[Result, Config], str | None] = lambda _result, _config: None,
    resumes: bool = False,
    repeats: bool = False,
    add: Callable[[Parser], None] = lambda _parser: None,
) -> int:
    """Run a command. All messages for the user are printed here.

    Args:
        config: The class of its settings; each field is a flag.
        run: Does the work: `run(settings, **others)`. `others` are given flags that are not settings, for
            example `overwrite=True`.
        summary: Makes the text that is printed at the end. If torchrun started several processes, only the
            first makes and prints it.
        usage: The help.
        argv: The command line; by default, the one of this process.
        failure: Returns the reason for status 1 although there is a summary, or None for status 0. An empty
            reason is not printed.
        resumes: Whether the same command continues an interrupted run.
        repeats: Whether `run` takes the path of a `--config` file as `repeats`.
        add: Adds flags that are not settings.

    Returns:
        The exit status.
    """
    words = underscored(sys.argv[1:] if argv is None else argv)
    parser = command_parser(usage.program, config, usage.needed, usage.description, usage.groups)
    add(parser)

    def command() -> int:
        flags = vars(parser.parse_args(words))
        flags.pop("debug", None)
        start_logging(flags.pop("log_level", "info"), flags.pop("log_format", "text"))
        settings = {*config.options(), "config", "preset"}
        others: dict[str, Any] = {name: flags.pop(name) for name in flags.keys() - settings}
        if repeats and "config" in flags:
            others["repeats"] = Path(flags["config"]).expanduser()
        given = from_flags(flags, config)
        given.check_inputs()
        result = run(given, **others)
        if is_first() and (text := summary(result, given)):
            print(text)
        reason = failure(result, given)
        if reason:
            print_last_message(f"error: {reason}")
        return 0 if reason is None else 1

    return run_command(command, debug="--debug" in words, resumes=resumes)


def is_first() -> bool:
    """Whether this is the only process, or the first of the processes that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def program_name() -> str:
    """The command that starts this program on this machine, for printed commands."""
    if shutil.which("scaledown"):
        return "scaledown"
    python = Path(sys.executable)
    here = Path.cwd()
    return f"{python.relative_to(here) if python.is_relative_to(here) else python} -m scaledown"

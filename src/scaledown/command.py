"""How every command runs: flags -> settings -> work -> summary -> exit status."""

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from scaledown.config.flags import Parser, command_parser, from_flags, underscored
from scaledown.config.options import Options
from scaledown.config.prepare import GROUPS
from scaledown.errors import run_command, tell
from scaledown.run.logs import start_logging

Config = TypeVar("Config", bound=Options)
Result = TypeVar("Result")


class Usage(NamedTuple):
    """What the help of a command says besides its flags."""

    program: str
    needed: str
    """The flags that the usage line shows."""
    description: str
    groups: Sequence[str] = GROUPS
    """The groups of the help, in their order."""


def run_cli(
    config: type[Config],
    run: Callable[..., Result],
    summary: Callable[[Result, Config], str],
    *,
    usage: Usage,
    argv: Sequence[str] | None = None,
    failure: Callable[[Result, Config], str | None] = lambda _result, _config: None,
    resumes: bool = False,
    repeats: bool = False,
    add: Callable[[Parser], None] = lambda _parser: None,
) -> int:
    """Run a command and give its exit status; all messages for the user are printed here.

    Args:
        config: Its settings; each field is a flag.
        run: Does the work: `run(settings, **others)`, where `others` are the flags that are no settings and
            were given, as `overwrite=True`.
        summary: What is printed at the end. Of several processes that torchrun started, the first prints it.
        usage: For the help.
        argv: The command line; without it, that of this process.
        failure: Why the status is 1 although there is a summary; None if it is 0. An empty reason is not
            printed.
        resumes: Whether the same command continues an interrupted one.
        repeats: Whether `run` takes the path of a `--config` file as `repeats`.
        add: Adds flags that are no settings.
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
        result = run(given, **others)
        if (text := summary(result, given)) and is_first():
            print(text)
        reason = failure(result, given)
        if reason:
            tell(f"error: {reason}")
        return 0 if reason is None else 1

    return run_command(command, debug="--debug" in words, resumes=resumes)


def is_first() -> bool:
    """Whether this is the process that writes, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def program_name() -> str:
    """How to call the program here, for commands that are shown."""
    if shutil.which("scaledown"):
        return "scaledown"
    python = Path(sys.executable)
    here = Path.cwd()
    return f"{python.relative_to(here) if python.is_relative_to(here) else python} -m scaledown"

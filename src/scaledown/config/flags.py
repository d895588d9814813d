"""A command's settings from its flags and `--config` file; each field of the dataclass is a flag.

Precedence, lowest first: defaults, `--preset`, `--config`, flags.
"""

import argparse
import dataclasses
import difflib
import json
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

from scaledown.config.index import IndexConfig
from scaledown.config.options import Option, Options
from scaledown.config.prepare import GROUPS, PrepareConfig
from scaledown.config.presets import PRESETS
from scaledown.config.shared import OUTPUT
from scaledown.errors import InputError, UsageError
from scaledown.urls import is_url, local

Config = TypeVar("Config", bound=Options)

_METAVARS: Final = {int: "N", float: "X"}
"""Names of number values in the help."""
_SIMILAR: Final = 0.75  # similarity of a misspelt word, as `difflib` measures it


class _Once(argparse.Action):
    """Stores the value of a flag for an input, and refuses a second value: the first would be ignored.

    For all other flags the last value counts, as scripts expect.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if isinstance(parser, Parser):
            if self.dest in parser.given:
                parser.error(f"{option_string} is given twice, and takes one value: give it once")
            parser.given.add(self.dest)
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `UsageError`s."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.given: set[str] = set()
        super().__init__(*arguments, **settings)

    def parse_known_args(self, *arguments: Any, **settings: Any) -> Any:
        """Parse as argparse does; the flags of an earlier call are forgotten."""
        self.given.clear()
        return super().parse_known_args(*arguments, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise an error with one line, instead of printing the whole usage.

        Args:
            message: The message of argparse.

        Raises:
            UsageError: Always.
        """
        raise UsageError(f"{message}{self._meant(message)} (see {self.prog} --help)")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Add to the error of argparse the known command or value that an unknown one looks like."""
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            close = difflib.get_close_matches(str(value), map(str, action.choices or ()), 1, _SIMILAR)
            error.message += f": did you mean {close[0]}?" if close else ""
            raise

    def _meant(self, message: str) -> str:
        """Return a question that names the known flags which the unknown ones look like."""
        _, _, words = message.partition("unrecognized arguments: ")
        flags = [word.partition("=")[0] for word in words.split() if word.startswith("--")]
        known = [name for name in self._option_string_actions if name.startswith("--")]
        close = [name for flag in flags for name in difflib.get_close_matches(flag, known, 1, _SIMILAR)]
        return f": did you mean {' and '.join(close)}?" if close else ""


def command_parser(
    program: str, config: type[Options], needed: str, description: str, order: Sequence[str] = GROUPS
) -> Parser:
    """Make a parser with a flag for each setting of a command, and the flags that commands share.

    A flag that is not given is absent from the result.

    Args:
        program: The name of the command in the help.
        config: The dataclass of its settings.
        needed: The flags in the usage line.
        description: The text at the beginning of the help.
        order: The groups of the help, in their order; `config` may have fields in these groups only.
    """
    parser = Parser(
        prog=program,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        usage=f"{program} {needed} [options]",
        description=description,
        epilog="Flags may be written with hyphens or underscores. A flag that is on can be turned off by "
        "--no_NAME.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
    )
    used = {about.group for about in config.options().values()}
    groups = {name: parser.add_argument_group(name) for name in order if name in used}
    add_flags(groups.__getitem__, config)
    run = groups[OUTPUT]
    run.add_argument(
        "--config",
        metavar="FILE",
        help="take settings from JSON: a manifest.json or settings.json repeats its run [default: none]",
    )
    if issubclass(config, IndexConfig):
        run.add_argument(
            "--preset",
            choices=tuple(PRESETS),
            help="guide: the guide's models; oscar: the paper's; demo: small bundled ones on any CPU "
            "[default: guide]",
        )
    if config.named("place"):
        add_overwrite(run)
    add_log_flags(run)
    return parser


def add_log_flags(group: argparse._ActionsContainer) -> None:
    """Add the flags that all commands share: what is logged, and how."""
    shown = group.argument_default != argparse.SUPPRESS
    group.add_argument(
        "--log_level",
        choices=("debug", "info", "warning", "error"),
        default="info" if shown else argparse.SUPPRESS,
        help="what is logged on standard error [default: info]",
    )
    group.add_argument(
        "--log_format",
        choices=("text", "json"),
        default="text" if shown else argparse.SUPPRESS,
        help="format of the log: text, or json: one object per line and no progress bars [default: text]",
    )
    group.add_argument("--debug", action="store_true", help="show tracebacks [default: off]")


def add_overwrite(group: argparse._ActionsContainer) -> None:
    """Add the flag `--overwrite`, which all commands have that write files."""
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace what is there, even if this command did not make it [default: off]",
    )


def add_flags(group: Callable[[str], argparse._ActionsContainer], config: type[Options]) -> None:
    """Add a flag for each field of a dataclass.

    Args:
        group: Returns the group of flags for the name of a group.
        config: The dataclass.
    """
    hints = typing.get_type_hints(config)
    for item in dataclasses.fields(config):  # type: ignore[arg-type]  # a dataclass, like all that inherit
        about: Option = item.metadata["option"]
        _add_flag(group(about.group), item, about, hints[item.name])


def _add_flag(
    group: argparse._ActionsContainer, item: "dataclasses.Field[Any]", about: Option, hint: Any
) -> None:
    flag = f"--{item.name}"
    details = [*([about.unit] if about.unit else []), f"default: {_shown_default(item.default, about)}"]
    text = f"{about.text} [{'; '.join(details)}]".replace("%", "%%")
    if hint in {bool, bool | None}:
        group.add_argument(flag, action="store_true", help=text)
        group.add_argument(f"--no_{item.name}", dest=item.name, action="store_false", help=argparse.SUPPRESS)
        return
    arguments: dict[str, Any] = {"help": text}
    if about.choices and not about.metavar:
        arguments["choices"] = about.choices
    else:
        arguments["metavar"] = about.metavar or ("MODEL" if about.role == "model" else _METAVARS[hint])
    if isinstance(hint, types.GenericAlias):
        group.add_argument(flag, action="extend", nargs="+", **arguments)
    else:
        if about.role == "input" or about.path:
            arguments["action"] = _Once
        group.add_argument(flag, type=hint, **arguments)


def _shown_default(default: Any, about: Option) -> str:
    if about.automatic:
        return "{}, on CUDA {}".format(*about.automatic)
    if default is None:
        return "auto"
    if default is False:
        return "off"
    if default in {"", ()} or (default == 0 and about.unit):
        return "none"
    return " ".join(default) if isinstance(default, tuple) else str(default)


def underscored(argv: Sequence[str]) -> list[str]:
    """Return arguments with underscores in the names of flags: `--top-k=5` becomes `--top_k=5`.

    Args:
        argv: The arguments; those after `--` are values and stay as they are.
    """
    result: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--":  # only values follow
            return [*result, word, *words]
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            result.append("--" + flag[2:].replace("-", "_") + equals + value)
        else:
            result.append(word)
    return result


def from_flags(given: Mapping[str, Any], config: type[Config]) -> Config:
    """Build the settings of a command from its flags.

    Args:
        given: The values of the flags that were given, by name; also `config` and `preset`.
        config: The dataclass of the settings.

    Returns:
        The settings; a leading ~ in paths is expanded.

    Raises:
        UsageError: A value is not allowed, or settings contradict each other.
        InputError: The `--config` file cannot be read.
    """
    flags = dict(given)
    about = config.options()
    for name, value in flags.items():
        if value == "" or (isinstance(value, list) and "" in value):
            raise UsageError(f"--{name} is empty: give it a value, or leave it out")
        if name in about and (other := about[name].settled_by) in flags:
            raise UsageError(f"--{name} is settled by --{other}: leave one of them out")
    if flags.get("top_k_reranking") == 0:
        raise UsageError("--top_k_reranking 0: must be at least 1; leave the flag out for no reranking")
    preset = flags.pop("preset", "guide")
    settings: dict[str, Any] = {}
    if "config" in flags:
        path = Path(flags.pop("config")).expanduser()
        settings = read_settings(path, config)
        if "preset" in given and PRESETS[preset].keys() <= settings.keys():
            raise UsageError(f"--preset {preset} changes nothing: --config {path} comes after it; give one")
    settings |= flags
    settings = {
        name: _expanded(value) if name in about and about[name].is_path else _frozen(value)
        for name, value in settings.items()
    }
    if issubclass(config, IndexConfig):
        return config.preset(preset, **settings)
    return config(**settings)


def _expanded(value: Any) -> Any:
    """Expand a leading ~ in paths to the home folder, and turn a `file://` URL into its path."""
    if isinstance(value, tuple | list):
        return tuple(map(_expanded, value))
    return os.path.expanduser(local(value)) if isinstance(value, str) else value  # noqa: PTH111 (keeps a final slash)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def local_path(text: str) -> Path:
    """Convert the value of a flag for a local path.

    Raises:
        ArgumentTypeError: It is a URL, or empty.
    """
    if is_url(local(text)):
        raise argparse.ArgumentTypeError("is a URL: fetch the file and give its path")
    return Path(path_or_url(text))


def path_or_url(text: str) -> str:
    """Convert the value of a flag for a path, URL or model name; a leading ~ is expanded.

    Raises:
        ArgumentTypeError: It is empty.
    """
    if not text:
        raise argparse.ArgumentTypeError("is empty: name a file")
    return text if is_url(text := local(text)) else str(Path(_expanded(text)))


def read_settings(path: Path, config: type[Options]) -> dict[str, Any]:
    """Read settings from a JSON file.

    Args:
        path: A flat object of settings, or a manifest, whose settings are in `parameters`.
        config: The dataclass of the settings. For an index, settings of `scaledown prepare` are allowed, too.

    Returns:
        The settings that `config` has, by name.

    Raises:
        InputError: The file cannot be read as an object.
        UsageError: A setting is unknown, or its value has another type.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"--config {path}: cannot be read as JSON ({error})") from error
    settings = content.get("parameters", content) if isinstance(content, dict) else None
    if not isinstance(settings, dict):
        raise InputError(f"--config {path}: must hold a JSON object of settings, or be a manifest.json")
    # A manifest of `prepare` serves `index` as well.
    if isinstance(corpus := settings.get("corpus_path"), str):  # before 0.7 there was one
        settings["corpus_path"] = [corpus] if corpus else []
    hints = typing.get_type_hints(PrepareConfig if issubclass(config, IndexConfig) else config)
    for name, value in settings.items():
        if name not in hints:
            raise UsageError(f"--config {path}: unknown setting {name!r}")
        hint = hints[name]
        if hint == bool | None:
            if value is None:
                continue
            hint = bool
        kind: Any = list if isinstance(hint, types.GenericAlias) else hint
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise UsageError(f"--config {path}: {name} must be {kind.__name__}, not {value!r}")
        if kind is list and not all(isinstance(item, str) and item for item in value):
            raise UsageError(f"--config {path}: {name} must be a list of file names, not {value!r}")
    return {name: _frozen(value) for name, value in settings.items() if name in config.options()}

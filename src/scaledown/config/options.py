"""Declaration of a command's settings. A field has all facts about itself; the rest is derived from it.

A command has the flags of the fields of its dataclass. No field is a secret: keys are read from the
environment only. Secrets in a URL are removed wherever a setting is stored.
"""

import math
from collections.abc import Sequence
from dataclasses import Field, field, fields, replace
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Self, get_args

from scaledown.errors import UsageError
from scaledown.extensions import OUTPUT_FORMATS
from scaledown.urls import check_exists, check_store, is_url

Role = Literal["result", "input", "model", "place", "operation", "report"]
"""The effect of a setting. It decides whether two runs in one directory must have the same value.

- `result`: what is made. Part of a run's identity.
- `input`: the data that is read, a path or URL. Compared by its content.
- `model`: the model, a name or a path. Compared by its weights.
- `place`: where something is written, a path or URL.
- `operation`: how the work is done: processes, speed, restarts. It does not change the result.
- `report`: what is shown, and the exit status.
"""
ROLES: Final[tuple[Role, ...]] = get_args(Role)


class Range(NamedTuple):
    """The allowed values of a number, which must be finite. `above` and `below` are exclusive."""

    at_least: float = -math.inf
    at_most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def allows(self, value: float) -> bool:
        """Whether `value` is in the range."""
        inside = self.at_least <= value <= self.at_most and self.above < value < self.below
        return inside and math.isfinite(value)

    @property
    def rule(self) -> str:
        """The range in words, to follow "must"."""
        if math.isfinite(self.at_least) and math.isfinite(self.at_most):
            return f"lie between {self.at_least} and {self.at_most}"
        if self == Range(0):
            return "not be negative"
        named = self._asdict().items()
        parts = [f"{name.replace('_', ' ')} {limit}" for name, limit in named if math.isfinite(limit)]
        return f"be {' and '.join(parts)}"

    @property
    def unit(self) -> str:
        """The range as in the help; empty if it has no lower or no upper end."""
        both = math.isfinite(self.at_least) and math.isfinite(self.at_most)
        return f"{self.at_least}..{self.at_most}" if both else ""


SHARE: Final = Range(0, 1)


class Option(NamedTuple):
    """The facts about a field; `option` explains each."""

    group: str
    text: str
    unit: str
    role: Role
    choices: tuple[str, ...]
    metavar: str
    within: Range | None
    local: bool
    path: bool
    automatic: tuple[int, int] | None
    only_with: str
    settled_by: str
    in_records: bool
    per_process: bool
    ids: bool

    @property
    def is_path(self) -> bool:
        """Whether a value may be a path, in which a leading ~ is expanded to the home folder."""
        return self.path or self.role in {"input", "model", "place"}


def option(
    default: Any,
    group: str,
    text: str,
    unit: str = "",
    *,
    role: Role,
    choices: Sequence[str] = (),
    metavar: str = "",
    within: Range | None = None,
    local: bool = False,
    path: bool = False,
    automatic: tuple[int, int] | None = None,
    only_with: str = "",
    settled_by: str = "",
    in_records: bool = False,
    per_process: bool = False,
    ids: bool = False,
) -> Any:
    """Declare a field.

    Args:
        default: Its default. A tuple makes a flag that takes several values.
        group: Its group in the help.
        text: Its help.
        unit: The unit of a number.
        role: What the setting decides.
        choices: The allowed values, besides the default.
        metavar: The name of the value in the help; without it the choices, N, X or MODEL.
        within: The allowed values of a number.
        local: The path must not be a URL.
        path: The setting has the role `result`, and its value is or may be a path.
        automatic: The values that 0 selects on a CPU and on CUDA, which needs larger batches.
        only_with: The setting is part of a run's identity only if this other setting, or itself, is not at
            its default. So runs of a version without the setting can be continued.
        settled_by: The flag that excludes this one.
        in_records: The setting changes the records: `scaledown merge` joins only runs with equal values.
        per_process: The limit is for one process: several workers are refused.
        ids: An input may also be an id, which is no path.

    Raises:
        ValueError: `role` is unknown.
    """
    if role not in ROLES:
        raise ValueError(f"role {role!r}: use one of {', '.join(ROLES)}")
    unit = unit or (within.unit if within else "")
    about = Option(
        *(group, text, unit, role, tuple(choices), metavar, within),
        *(local, path, automatic, only_with, settled_by),
        *(in_records, per_process, ids),
    )
    return field(default=default, metadata={"option": about})


class Options:
    """A dataclass of options, with everything that is derived from the facts about its fields."""

    @classmethod
    def options(cls) -> dict[str, Option]:
        """Return the facts about each field, by name."""
        return {item.name: item.metadata["option"] for item in fields(cls)}  # type: ignore[arg-type]

    @classmethod
    def named(cls, *roles: Role) -> tuple[str, ...]:
        """Return the names of the fields that have one of the `roles`, in order."""
        return tuple(name for name, about in cls.options().items() if about.role in roles)

    def __post_init__(self) -> None:
        """Check each value on its own. Raises `UsageError` that names the flag."""
        for item in fields(self):  # type: ignore[arg-type]  # of the dataclass that inherits this
            if isinstance(value := getattr(self, item.name), list):  # as JSON has it
                object.__setattr__(self, item.name, tuple(value))
            self._check(item)

    def _check(self, item: "Field[Any]") -> None:
        about: Option = item.metadata["option"]
        flag, value = f"--{item.name}", getattr(self, item.name)
        if isinstance(item.default, tuple) and (not isinstance(value, tuple) or "" in value):
            raise UsageError(
                f"{flag}: expected a tuple of texts, none of them empty, like ('a.txt', 'b.txt')"
            )
        for one in value if isinstance(value, tuple) else (value,):
            if about.choices and one not in (item.default, *about.choices):
                raise UsageError(f"{flag} {one}: use one of {', '.join(about.choices)}")
            if about.local and is_url(one):
                raise UsageError(f"{flag} is a URL: give a local path")
            if about.role == "place":
                check_store(one)
        if about.within and not about.within.allows(value):
            finite = "" if math.isfinite(value) else ", and finite"
            raise UsageError(f"{flag} {value}: must {about.within.rule}{finite}")

    def check_inputs(self) -> None:
        """Raise `InputError` if a local input does not exist: at once, before torch is imported."""
        for name, about in self.options().items():
            if about.role != "input" or about.ids:
                continue
            value = getattr(self, name)
            for one in value if isinstance(value, tuple) else (value,):
                if one not in {"", "-"}:
                    check_exists(one, f"--{name}")

    @classmethod
    def batch_for(cls, name: str, given: int, device: str) -> int:
        """Return the size of batches on a device.

        Args:
            name: The setting.
            given: Its value; 0 is the automatic value for the device.
            device: `cpu`, `cuda`, `cuda:N` or `mps`.
        """
        on_cpu, on_cuda = cls.options()[name].automatic or (given, given)
        return given or (on_cuda if device.startswith("cuda") else on_cpu)

    def sized(self, device: str) -> Self:
        """Return the settings with automatic sizes of batches replaced by their values.

        Args:
            device: `cpu`, `cuda`, `cuda:N` or `mps`.
        """
        sizes = {
            name: self.batch_for(name, getattr(self, name), device)
            for name, about in self.options().items()
            if about.automatic
        }
        return replace(self, **sizes)  # type: ignore[type-var]

    def compared(self) -> dict[str, Any]:
        """Return the settings that must be equal for two runs in one directory.

        Inputs and models are not included: they are compared by their contents. A run can continue on another
        device, since automatic batch sizes are always compared by their values for a CPU.
        """
        sized = self.sized("")
        return {
            name: getattr(sized, name)
            for name, about in self.options().items()
            if about.role == "result" and self._counts(about.only_with)
        }

    def _counts(self, other: str) -> bool:
        return not other or getattr(self, other) != getattr(type(self), other)


OUTPUT_SUFFIXES: Final = tuple(f".{name}" for name in OUTPUT_FORMATS)


def check_ending(flag: str, output: str | Path) -> None:
    """Check that the suffix of an output is one of the formats.

    Args:
        flag: The flag that names the output, for the message.
        output: The file.

    Raises:
        UsageError: It is not.
    """
    if Path(output).suffix not in OUTPUT_SUFFIXES:
        raise UsageError(
            f"{flag} {output}: the ending chooses the format; use one of {', '.join(OUTPUT_SUFFIXES)}"
        )


def check_output_dir(folder: str) -> None:
    """Raise `UsageError` if `--output_dir` is empty or is a file."""
    if not folder:
        raise UsageError("no output: give --output_dir DIR")
    if Path(folder).is_file():
        raise UsageError(f"--output_dir {folder} is a file: name a folder")

"""How a command's settings are declared, and the checks that all of them share."""

import math
from collections.abc import Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any, Final

from scaledown.errors import UsageError
from scaledown.extensions import OUTPUT_FORMATS


def option(  # noqa: PLR0917
    default: Any,
    group: str,
    text: str,
    unit: str = "",
    choices: Sequence[str] = (),
    metavar: str = "",
) -> Any:
    """Declare a field: its default, the group of the help it stands in, its text and its unit."""
    metadata = {"group": group, "text": text, "unit": unit, "choices": tuple(choices), "metavar": metavar}
    return field(default=default, metadata=metadata)


class Checked:
    """Checks for dataclasses of options; each raises `UsageError` that names the flag."""

    def _check_choices(self) -> None:
        for item in fields(self):  # type: ignore[arg-type]  # of the dataclass that this is mixed into
            allowed, given = item.metadata["choices"], getattr(self, item.name)
            for value in given if isinstance(given, tuple) else (given,):
                if allowed and value not in (item.default, *allowed):
                    raise UsageError(f"--{item.name} {value}: use one of {', '.join(allowed)}")

    def _check_at_least(self, least: int, *names: str) -> None:
        for name in names:
            if getattr(self, name) < least:
                rule = f"be at least {least}" if least else "not be negative"
                raise UsageError(f"--{name} {getattr(self, name)}: must {rule}")

    def _check_share(self, name: str) -> None:
        if not 0 <= getattr(self, name) <= 1:
            raise UsageError(f"--{name} {getattr(self, name)}: must lie between 0 and 1")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"--{name} {getattr(self, name)}: must be above 0, and finite")

    def _check_finite(self, *names: str) -> None:
        for name in names:
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"--{name} {getattr(self, name)}: must not be negative, and finite")

    def _check_files(self, *names: str) -> None:
        for name in names:
            given: object = getattr(self, name)
            if not isinstance(given, tuple) or "" in given:
                raise UsageError(f"--{name}: expected a tuple of file names, none of them empty")


OUTPUT_SUFFIXES: Final = tuple(f".{name}" for name in OUTPUT_FORMATS)


def check_ending(flag: str, output: str | Path) -> None:
    """Raise `UsageError` where the ending of an output names none of the formats."""
    if Path(output).suffix not in OUTPUT_SUFFIXES:
        raise UsageError(
            f"{flag} {output}: the ending chooses the format; use one of {', '.join(OUTPUT_SUFFIXES)}"
        )

"""The settings of a stage, kept beside its shards, and how they differ from those of earlier results."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from scaledown.run.atomic import as_json, read_json, write_json
from scaledown.run.directory import FINGERPRINT

SETTINGS: Final = "settings.json"
"""The file in a stage's folder that has what its fingerprint is a hash of."""

_SHOWN_CHARACTERS: Final = 40


def keep_settings(settings: Mapping[str, Any], folder: Path) -> Path:
    """Write the settings of a stage into its folder.

    Args:
        settings: What the stage's fingerprint is a hash of.
        folder: The folder of the stage.

    Returns:
        The path of the file.
    """
    path = folder / SETTINGS
    write_json(path, as_json(settings))
    return path


def why_new(settings: Mapping[str, Any], stage: Path) -> str:
    """Describe how settings differ from those of the nearest earlier results.

    The nearest has the fewest differences; of several it is the newest.

    Args:
        settings: The settings of a stage that is made again.
        stage: The folder with a folder of results for each set of settings.

    Returns:
        The differences for a log line, as `batch_size is 16 (was 32), vectors changed`.
    """
    files = sorted(stage.glob(f"*/{SETTINGS}"), key=lambda file: file.stat().st_mtime, reverse=True)
    earlier = [kept for file in files if isinstance(kept := read_json(file), dict)]
    wanted = as_json(settings)
    nearest = min((_setting_differences(kept, wanted) for kept in earlier), key=len, default=[])
    return ", ".join(nearest) or "a setting, an input or a model changed"


def _setting_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = [name for name in {**now, **before} if now.get(name) != before.get(name)]
    return [_difference(name, before.get(name), now.get(name)) for name in names]


def _difference(name: str, before: Any, now: Any) -> str:
    """Name a setting, with both values unless one of them says nothing to a reader."""
    if _is_shown(before) and _is_shown(now):
        return f"{name} is {_shown_value(now)} (was {_shown_value(before)})"
    return f"{name} changed"


def _is_shown(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= _SHOWN_CHARACTERS and value.isprintable() and not FINGERPRINT.fullmatch(value)
    return value is None or isinstance(value, int | float)


def _shown_value(value: Any) -> str:
    return "not set" if value is None or value == "" else str(value)

"""The log on standard error: lines of text, or for machines one JSON object on each line."""

import json
import logging
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from rich.console import Console
from rich.logging import RichHandler

log = logging.getLogger("scaledown")
console: Final = Console(stderr=True)


class LogStyle(NamedTuple):
    """The style of the log."""

    level: str = "info"
    """The least level that is shown: `debug`, `info`, `warning` or `error`."""
    form: str = "text"
    """`text` or `json`."""
    worker: str = ""
    """The name of this process if it is one of several workers."""


class JSONLines(logging.Formatter):
    """Formats a record as a JSON object: time, level, logger, message, worker, fields of `extra["fields"]`.

    The object is always on one line and in ASCII.
    """

    structured: Final = True
    """Makes `errors.run_command` log its last message, too."""

    def __init__(self, worker: str = "") -> None:
        super().__init__()
        self._worker = worker

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **({"worker": self._worker} if self._worker else {}),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


_style = LogStyle()


def start_logging(level: str, form: str = "text", worker: str = "") -> None:
    """Send the package's log to standard error.

    Args:
        level: The least level that is shown: `debug`, `info`, `warning` or `error`.
        form: `json` for a JSON object on each line, `text` for lines of text, which are styled on a terminal.
        worker: The name of this process if it is one of several workers; JSON has it in each line.
    """
    global _style  # noqa: PLW0603
    _style = LogStyle(level, form, worker)
    handler: logging.Handler = logging.StreamHandler()
    if form == "json":
        handler.setFormatter(JSONLines(worker))
    elif console.is_terminal:
        handler = RichHandler(console=console, show_path=False, markup=False, log_time_format="%H:%M:%S")
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(level.upper())
    log.propagate = False


def style() -> LogStyle:
    """Return the style that `start_logging` set last."""
    return _style

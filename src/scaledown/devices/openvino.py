"""OpenVINO on this machine: the library, and whether it is installed."""

import importlib.util
import sys
from typing import Any

from scaledown.errors import MissingExtraError, install_command


def is_installed() -> bool:
    """Whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


def openvino(flag: str) -> Any:
    """Import the library; `flag` is named in the message.

    Raises:
        MissingExtraError: It is not installed.
    """
    # On import OpenVINO sends usage data, unless this package cannot be imported.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino as library
    except ImportError as error:
        raise MissingExtraError(f"{flag} needs OpenVINO: {install_command('openvino')}") from error
    return library

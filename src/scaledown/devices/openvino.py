"""OpenVINO on this machine: the library, and whether it is installed."""

import importlib.util
import sys
from typing import Any, Final

from scaledown.errors import MissingExtraError, install_command

GRAPH: Final = "3"
"""Part of the key of graphs in the cache: raise it if `models.openvino.write_graph` writes something else."""
WHOLE_STATES: Final = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""By default OpenVINO rounds states to 8 bits too, before a product with weights of 8 bits."""


def is_installed() -> bool:
    """Whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


def openvino(need: str) -> Any:
    """Import the library; `need` is named in the message.

    Raises:
        MissingExtraError: It is not installed, or cannot be imported.
    """
    # On import OpenVINO sends usage data, unless this package cannot be imported.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino as library
    except ImportError as error:
        raise MissingExtraError(f"{need} needs OpenVINO ({error}): {install_command('openvino')}") from error
    return library

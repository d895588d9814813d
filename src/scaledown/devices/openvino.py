"""OpenVINO on this machine: the library, and whether it is installed."""

import contextlib
import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any, Final

from scaledown.devices.choice import has_amx
from scaledown.errors import MissingExtraError, install_command

GRAPH: Final = "4"
"""Part of the key of graphs in the cache: raise it if `models.openvino.write_graph` writes something else."""
WHOLE_STATES: Final = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""By default OpenVINO rounds states to 8 bits too, before a product with weights of 8 bits."""


def is_installed() -> bool:
    """Whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


def openvino(need: str) -> Any:
    """Import the library.

    Args:
        need: What needs it, for the message.

    Returns:
        The module `openvino`.

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


def crashes_in_bfloat16() -> bool:
    """Whether a step of a causal LM in bfloat16 would end this process.

    OpenVINO 2026.4 divides by zero (SIGFPE) on processors with AMX if it has one thread; see issue 33300 of
    openvinotoolkit/openvino.
    """
    import torch

    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return has_amx() and min(cores, torch.get_num_threads()) == 1


class SignalStack(ctypes.Structure):
    """Linux's `stack_t`: the stack on which this thread handles signals."""

    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))

    def exchange(self, new: "SignalStack | None" = None) -> None:
        """Store the current signal stack here, and set another one. Does nothing on other systems than Linux.

        Args:
            new: The stack to set; None leaves the current one.
        """
        if sys.platform == "linux":
            ctypes.CDLL(None).sigaltstack(ctypes.byref(new) if new else None, ctypes.byref(self))


@contextlib.contextmanager
def same_signal_stack() -> Iterator[None]:
    """Restore this thread's signal stack at the end of the block, in which OpenVINO compiles a model.

    A compiled model sets a stack of its own, and at its end sets again the one that it found. If that was of
    a model that has ended, it is freed memory, and the next signal is a segmentation fault.
    """
    before = SignalStack()
    before.exchange()
    try:
        yield
    finally:
        SignalStack().exchange(before)

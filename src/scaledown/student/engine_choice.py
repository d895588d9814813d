"""The engines that can write a student's answers, and the choice of one."""

from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any, Final, NamedTuple

from scaledown.devices.openvino import is_installed, openvino
from scaledown.devices.vllm import check_vllm, runs_on
from scaledown.errors import UsageError
from scaledown.models.openvino import only_grows
from scaledown.models.sources import ModelSource
from scaledown.student.engines.base import Generation
from scaledown.student.model import read_settings


class StudentEngine(NamedTuple):
    """An engine that can write a student's answers."""

    title: str
    """Its name in messages."""
    suits: Callable[[str, ModelSource], bool]
    """Whether `auto` may choose it for a device and a model."""
    check: Callable[[str], None]
    """Raises `MissingExtraError`, `ModelError` or `UsageError` if it cannot run on a device."""
    batch: int
    """Default number of answers that `scaledown answer` writes at a time."""
    generation: str = ""
    """`module:Class` of the `Generation` that replaces the model's own generator; empty if none does."""

    def start(self, model: Any, source: ModelSource, device: str, batch_size: int) -> Generation | None:
        """Start the `Generation` that writes the answers; None if the model's own generator does."""
        if not self.generation:
            return None
        made: Generation = resolve_name(self.generation)(model, source, device, batch_size)
        return made


def _openvino_suits(device: str, source: ModelSource) -> bool:
    if device != "cpu" or not is_installed():
        return False
    settings = read_settings(source)
    return only_grows(settings.architecture(settings.generator))


def _check_openvino(device: str) -> None:
    openvino("--engine openvino")
    if device != "cpu":
        raise UsageError(f"--engine openvino --device {device}: it runs on a CPU only: give --device cpu")


ENGINES: Final = {
    "vllm": StudentEngine(
        "vLLM",
        lambda device, _: runs_on(device),
        lambda device: check_vllm(device, "--engine vllm"),
        batch=256,
        generation="scaledown.student.engines.vllm:VllmGeneration",
    ),
    "openvino": StudentEngine(
        "OpenVINO",
        _openvino_suits,
        _check_openvino,
        batch=8,
        generation="scaledown.student.engines.openvino:OpenVINOGeneration",
    ),
    "transformers": StudentEngine("transformers", lambda *_: True, lambda _: None, batch=8),
}
"""Engines by name; `auto` takes the first that suits the device and the model."""


def choose_engine(name: str, device: str, source: ModelSource) -> StudentEngine:
    """Return the engine of that name; for `auto` the first that suits the device and the model.

    Raises:
        MissingExtraError: The named engine is not installed.
        ModelError: The named engine cannot run on the device, or this is no ScaleDown model.
        UsageError: The named engine is not for the device.
    """
    if name not in ENGINES:
        return next(engine for engine in ENGINES.values() if engine.suits(device, source))
    ENGINES[name].check(device)
    return ENGINES[name]

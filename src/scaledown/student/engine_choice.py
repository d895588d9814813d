"""The engines that can write a student's answers, and the choice of one."""

import logging
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any, Final, NamedTuple

from scaledown.devices.openvino import is_installed, openvino
from scaledown.devices.vllm import check_vllm, runs_on
from scaledown.errors import ModelError, UsageError, install_command
from scaledown.models.openvino import can_run
from scaledown.models.sources import ModelSource
from scaledown.student.engines.base import Generation
from scaledown.student.model import read_settings

log = logging.getLogger("scaledown")


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
    has_8bit: bool = False
    """Whether it can round the generator's weights to 8 bits."""
    is_optional: bool = False
    """Whether `auto` uses the model's own generator if this engine cannot run the model."""

    def start(
        self,
        model: Any,
        source: ModelSource,
        device: str,
        batch_size: int,
        *,
        asked: str,
        eight_bits: bool = False,
    ) -> tuple[Generation | None, str]:
        """Start the engine.

        Args:
            model: The `ScaleDownModel`.
            source: Where it comes from.
            device: cpu, cuda or cuda:N.
            batch_size: The most answers written at the same time.
            asked: The name that the user gave, or auto.
            eight_bits: Whether to round the generator's weights to 8 bits; only if `has_8bit`.

        Returns:
            The `Generation` that writes the answers, None if the model's own generator does; and its title.

        Raises:
            ModelError: The engine cannot run the model.
            NoRoomError: The device has too little free memory.
        """
        if not self.generation:
            return None, self.title
        try:
            options = {"eight_bits": True} if eight_bits else {}
            made: Generation = resolve_name(self.generation)(model, source, device, batch_size, **options)
        except ModelError as error:
            if asked in ENGINES or eight_bits or not self.is_optional:
                raise
            log.warning("%s: transformers writes the answers", str(error).rpartition(": use ")[0] or error)
            return None, ENGINES["transformers"].title
        return made, self.title


def _openvino_suits(device: str, source: ModelSource) -> bool:
    if device != "cpu" or not is_installed():
        return False
    settings = read_settings(source)
    return can_run(settings.architecture(settings.generator))


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
        has_8bit=True,
        is_optional=True,
    ),
    "transformers": StudentEngine("transformers", lambda *_: True, lambda _: None, batch=8),
}
"""Engines by name; `auto` takes the first that suits the device and the model."""


def choose_engine(name: str, device: str, source: ModelSource, *, eight_bits: bool = False) -> StudentEngine:
    """Return the engine of that name; for `auto` the first that suits the device and the model.

    Args:
        name: A name in `ENGINES`, or `auto`.
        device: `cpu`, `cuda`, `cuda:N` or `mps`.
        source: The model.
        eight_bits: Whether the engine must be able to round the generator's weights to 8 bits.

    Returns:
        The engine; it is not started.

    Raises:
        MissingExtraError: The named engine is not installed.
        ModelError: The named engine cannot run on the device, or this is no ScaleDown model.
        UsageError: The named engine is not for the device, or no engine has 8 bits.
    """
    if name not in ENGINES:
        for engine in ENGINES.values():
            if engine.has_8bit >= eight_bits and engine.suits(device, source):
                return engine
        raise UsageError(
            "--generator_8bit: no engine here can do it: it needs --device cpu and OpenVINO, "
            f"{install_command('openvino')}"
        )
    if eight_bits and not ENGINES[name].has_8bit:
        raise UsageError(f"--generator_8bit --engine {name}: use --engine openvino, or leave one of them out")
    ENGINES[name].check(device)
    return ENGINES[name]

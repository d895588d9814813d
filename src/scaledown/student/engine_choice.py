"""The choice of the engine that writes a student's answers."""

from scaledown.config.shared import AUTO
from scaledown.errors import UsageError, install_command
from scaledown.extensions import STUDENT_ENGINES
from scaledown.models.sources import ModelSource
from scaledown.student.engines.base import StudentEngine


def choose_engine(name: str, device: str, source: ModelSource, *, eight_bits: bool = False) -> StudentEngine:
    """Return the engine of that name; for `auto` the last that suits the device and the model.

    Args:
        name: A name in `STUDENT_ENGINES`, or `auto`.
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
    if name == AUTO:
        for entry in reversed([*STUDENT_ENGINES]):
            engine: StudentEngine = STUDENT_ENGINES[entry]
            if engine.has_8bit >= eight_bits and engine.suits(device, source):
                return engine
        raise UsageError(
            "--generator_8bit: no engine here can do it: it needs --device cpu and OpenVINO, "
            f"{install_command('openvino')}"
        )
    engine = STUDENT_ENGINES[name]
    if eight_bits and not engine.has_8bit:
        raise UsageError(f"--generator_8bit --engine {name}: use --engine openvino, or leave one of them out")
    engine.check(device)
    return engine

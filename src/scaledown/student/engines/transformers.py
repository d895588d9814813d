"""The engine that is always there: the model's own generator, in transformers."""

from typing import Final

from scaledown.student.engines.base import StudentEngine

ENGINE: Final = StudentEngine("transformers", generation=None, suits=lambda device, source: True)

"""The engine that runs a student's generator in OpenVINO, on a CPU: the graph takes embeddings of prompts."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from scaledown.devices.openvino import GRAPH, crashes_in_bfloat16, is_installed, openvino
from scaledown.errors import ModelError, UsageError
from scaledown.models.openvino import PRECISIONS, can_run, compiled, write_graph
from scaledown.models.sources import ModelSource, kept_folder, written_once
from scaledown.student.engines.base import StudentEngine
from scaledown.student.engines.steps import StepGeneration
from scaledown.student.settings import ScaleDownConfig

log = logging.getLogger("scaledown")


class OpenVINOGeneration(StepGeneration):
    """A `Generation` by OpenVINO. The compressor stays in torch."""

    def __init__(
        self, model: Any, source: ModelSource, device: str, batch_size: int, *, eight_bits: bool = False
    ) -> None:
        """Load the generator's graph, which the first call writes to the cache folder.

        Args:
            model: A `ScaleDownModel`. Afterwards it keeps only the token embeddings of its generator.
            source: Where the model comes from.
            device: `cpu`.
            batch_size: Not used: rows join and leave freely.
            eight_bits: Whether to round the generator's weights to 8 bits.

        Raises:
            MissingExtraError: OpenVINO is not installed.
            ModelError: OpenVINO cannot compute this generator, or not in the model's precision.
        """
        graph = generator_graph(model, source, eight_bits=eight_bits)
        model.forget_generator()
        super().__init__(model, OpenVINODecoding(graph, model.get_input_embeddings(), model.dtype))


class OpenVINODecoding:
    """A `RowDecoding` by OpenVINO. Keys and values stay in the engine between steps."""

    def __init__(self, graph: Path, embeddings: nn.Embedding, dtype: torch.dtype) -> None:
        """Load the graph.

        Args:
            graph: The file that `generator_graph` returns.
            embeddings: The generator's token embeddings.
            dtype: The precision of the computation, float32 or bfloat16.
        """
        if dtype is torch.bfloat16 and crashes_in_bfloat16():
            log.warning(
                "OpenVINO computes in float32: with one thread, bfloat16 would crash on this processor"
            )
            dtype = torch.float32
        self._openvino = openvino("--engine openvino")
        model = compiled(graph, dtype)
        # Each has a cache of its own: that of the rows, and that of new prompts.
        self._request, self._reader = model.create_infer_request(), model.create_infer_request()
        self._embeddings = embeddings
        self._clear()

    def _clear(self) -> None:
        self._mask = np.zeros((0, 0), dtype=np.int64)
        """[rows, length]: 0 at positions of the cache that a row does not use."""
        self._places = np.zeros((0, 1), dtype=np.int64)
        """[rows, 1]: the position of each row's last token."""
        self._rows = np.zeros(0, dtype=np.int32)
        """For each row its number in OpenVINO's cache, which drops the others in the next step."""
        self.logits = torch.zeros(0, 0)
        """[rows, vocabulary]: the scores of each row's next token."""
        self._request.reset_state()

    def __len__(self) -> int:
        return len(self._mask)

    @property
    def can_grow(self) -> bool:
        """True: a model whose cache cannot grow has no graph."""
        return True

    def join(self, embedded: torch.Tensor, mask: torch.Tensor) -> None:
        """Read prompts, which become the last rows.

        After an error while prompts are read all earlier rows remain; after any other error no rows are left.

        Args:
            embedded: [rows, length, width], padded on the left.
            mask: [rows, length], 0 at padding.
        """
        new = mask.numpy()
        places = (new.cumsum(1) - 1).clip(min=0)
        self._reader.reset_state()
        rows = np.arange(len(new), dtype=np.int32)
        logits = _forward(self._reader, embedded.float(), new, places, rows)
        if not len(self):
            self._request, self._reader = self._reader, self._request
            self._mask, self._places, self._rows, self.logits = new, places[:, -1:], rows, logits
            return
        unused = int(self._mask.any(0).argmax())  # columns that only removed rows used
        old = self._mask[:, unused:]
        length = max(old.shape[1], new.shape[1])
        try:
            added = {state.name: state for state in self._reader.query_state()}
            for state in self._request.query_state():
                self._append(state, added[state.name], unused, length)
            self._reader.reset_state()
        except BaseException:  # some layers may have the new rows while others do not
            self._clear()
            raise
        self._mask = np.concatenate([_padded_mask(old, length), _padded_mask(new, length)])
        self._places = np.concatenate([self._places, places[:, -1:]])
        self._rows = np.arange(len(self._mask), dtype=np.int32)
        self.logits = torch.cat([self.logits, logits])

    def _append(self, state: Any, added: Any, unused: int, length: int) -> None:
        """Append the rows of `added` to one layer's keys or values, without the first `unused` positions."""
        old, new = state.state, added.state
        kept, (count, heads, _, size) = len(self._rows), new.shape
        joined = self._openvino.Tensor(
            new.element_type, self._openvino.Shape([kept + count, heads, length, size])
        )
        # NumPy has no bfloat16 and reads it as float16. Copies and zeros are the same in both.
        for part, content in (
            (joined.data[:kept], old.data[self._rows, :, unused:]),
            (joined.data[kept:], new.data),
        ):
            begin = length - content.shape[2]
            part[:, :, :begin] = 0
            part[:, :, begin:] = content
        state.state = joined

    def step(self, tokens: torch.Tensor) -> None:
        """Feed each row its next token, [rows]. After an error no rows are left."""
        mask = np.concatenate([self._mask, np.ones((len(self), 1), dtype=np.int64)], 1)
        places = self._places + 1
        try:
            embedded = self._embeddings(tokens[:, None]).float()
            self.logits = _forward(self._request, embedded, mask, places, self._rows)
        except BaseException:
            self._clear()
            raise
        self._mask, self._places, self._rows = mask, places, np.arange(len(mask), dtype=np.int32)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        if not rows:
            self._clear()
            return
        chosen = list(rows)
        self._mask, self._places = self._mask[chosen], self._places[chosen]
        self._rows = self._rows[chosen]
        self.logits = self.logits[chosen]


def _forward(
    request: Any, embedded: torch.Tensor, mask: np.ndarray, places: np.ndarray, rows: np.ndarray
) -> torch.Tensor:
    """Run one step of a request. Returns the scores of next tokens, [rows, vocabulary]."""
    given = {
        "inputs_embeds": embedded.numpy(),
        "attention_mask": mask,
        "position_ids": places,
        "beam_idx": rows,
    }
    return torch.from_numpy(request.infer(given)["logits"][:, -1].copy())


def _padded_mask(mask: np.ndarray, length: int) -> np.ndarray:
    """Pad a mask with zeros in front to `length` columns."""
    return np.pad(mask, ((0, 0), (length - mask.shape[1], 0)))


def generator_graph(model: Any, source: ModelSource, *, eight_bits: bool = False) -> Path:
    """Return the file of the generator's graph in the cache; the first call writes it, with LoRA merged.

    Args:
        model: A `ScaleDownModel` in float32 or bfloat16, on a CPU.
        source: Where the model comes from.
        eight_bits: Whether to round the generator's weights to 8 bits.

    Returns:
        The path of `generator.xml`.

    Raises:
        MissingExtraError: OpenVINO is not installed.
        ModelError: OpenVINO cannot compute this generator, or not in the model's precision.
    """
    if model.dtype not in PRECISIONS:
        raise ModelError(
            f"--engine openvino computes in float32 or bfloat16, not in {model.dtype}: give --dtype"
        )
    dtype = model.dtype
    settings = [str(dtype), GRAPH, *(["8 bits"] if eight_bits else [])]
    folder = kept_folder("openvino-generators", source, *settings)

    def write(temporary: Path) -> None:
        if model.config.generator_training == "lora":
            model.merge_lora()
        log.info("the generator is written once for OpenVINO: %s", folder)
        temporary.mkdir()
        try:
            file = temporary / "generator.xml"
            write_graph(model.generator.float(), file, reads="embeddings", eight_bits=eight_bits)
        finally:
            model.generator.to(dtype)

    return written_once(folder, source, write) / "generator.xml"


def _suits(device: str, source: ModelSource) -> bool:
    if device != "cpu" or not is_installed():
        return False
    settings = ScaleDownConfig.read(source)
    return can_run(settings.architecture(settings.generator))


def _check(device: str) -> None:
    openvino("--engine openvino")
    if device != "cpu":
        raise UsageError(f"--engine openvino --device {device}: it runs on a CPU only: give --device cpu")


ENGINE: Final = StudentEngine(
    "OpenVINO",
    generation=OpenVINOGeneration,
    suits=_suits,
    check=_check,
    has_8bit=True,
    is_optional=True,
)

"""The engine that runs a student's generator in OpenVINO, on a CPU: the graph takes embeddings of prompts."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import nn

from scaledown.devices.openvino import openvino
from scaledown.errors import ModelError
from scaledown.models.openvino import GRAPH, PRECISIONS, compiled, write_graph
from scaledown.models.sources import ModelSource, kept_folder
from scaledown.student.engines.steps import StepGeneration

log = logging.getLogger("scaledown")


class OpenVINOGeneration(StepGeneration):
    """A `Generation` by OpenVINO. The compressor stays in torch."""

    def __init__(self, model: Any, source: ModelSource, device: str, batch_size: int) -> None:
        """Load the generator's graph, which the first call writes to the cache folder.

        Args:
            model: A `ScaleDownModel`. Afterwards it keeps only the token embeddings of its generator.
            source: Where the model comes from.
            device: `cpu`.
            batch_size: Not used: rows join and leave freely.

        Raises:
            MissingExtraError: OpenVINO is not installed.
            ModelError: OpenVINO cannot compute this generator, or not in the model's precision.
        """
        graph = generator_graph(model, source)
        model.forget_generator()
        super().__init__(model, OpenVINODecoding(graph, model.get_input_embeddings(), model.dtype))


class OpenVINODecoding:
    """What `Decoding` does, by OpenVINO. Keys and values stay in the engine between steps."""

    def __init__(self, graph: Path, embeddings: nn.Embedding, dtype: torch.dtype) -> None:
        """Load the graph.

        Args:
            graph: The file that `generator_graph` returns.
            embeddings: The generator's token embeddings.
            dtype: The precision of the computation, float32 or bfloat16.
        """
        self._openvino = openvino("--engine openvino")
        self._request = compiled(graph, dtype).create_infer_request()
        self._states = self._request.query_state()
        self._embeddings = embeddings
        self._clear()

    def _clear(self) -> None:
        self._request.reset_state()
        self._mask = np.zeros((0, 0), dtype=np.int64)
        """[rows, length]: 0 at positions of the cache that a row does not use."""
        self._places = np.zeros((0, 1), dtype=np.int64)
        """[rows, 1]: the position of each row's last token."""
        self._rows = np.zeros(0, dtype=np.int32)
        """For each row its number in OpenVINO's cache, which drops the others in the next step."""
        self.logits = torch.zeros(0, 0)
        """[rows, vocabulary]: the scores of each row's next token."""

    def __len__(self) -> int:
        return len(self._mask)

    @property
    def can_grow(self) -> bool:
        """True: a model whose cache cannot grow has no graph."""
        return True

    def join(self, embedded: torch.Tensor, mask: torch.Tensor) -> None:
        """Read prompts, which become the last rows; see `Decoding.join`. After an error no rows are left."""
        before, old = self.logits, self._mask
        unused = int(old.any(0).argmax()) if old.size else 0  # columns that only removed rows used
        old, old_places = old[:, unused:], self._places
        try:
            cache = [state.state.data[self._rows, :, unused:] for state in self._states] if len(old) else []
            self._request.reset_state()
            new = mask.numpy()
            places = (new.cumsum(1) - 1).clip(min=0)
            self._forward(embedded.float(), new, places, np.arange(len(new), dtype=np.int32))
            length = max(old.shape[1], new.shape[1])
            for state, own in zip(self._states, cache, strict=False):
                now = state.state
                joined = np.concatenate([_widened(own, length, 2), _widened(now.data, length, 2)])
                tensor = self._openvino.Tensor(now.element_type, self._openvino.Shape(joined.shape))
                tensor.data[:] = joined  # to the bit: NumPy has no bfloat16, and takes it for float16
                state.state = tensor
        except BaseException:
            self._clear()
            raise
        self._places = np.concatenate([old_places, places[:, -1:]])
        self._mask = np.concatenate([_widened(old, length, 1), _widened(new, length, 1)])
        self._rows = np.arange(len(self._mask), dtype=np.int32)
        if len(old):
            self.logits = torch.cat([before, self.logits])

    def step(self, tokens: torch.Tensor) -> None:
        """Feed each row its next token, [rows]."""
        mask = np.concatenate([self._mask, np.ones((len(self), 1), dtype=np.int64)], 1)
        places = self._places + 1
        try:
            self._forward(self._embeddings(tokens[:, None]).float(), mask, places, self._rows)
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
        self, embedded: torch.Tensor, mask: np.ndarray, places: np.ndarray, rows: np.ndarray
    ) -> None:
        given = {
            "inputs_embeds": embedded.numpy(),
            "attention_mask": mask,
            "position_ids": places,
            "beam_idx": rows,
        }
        self.logits = torch.from_numpy(self._request.infer(given)["logits"][:, -1].copy())


def _widened(rows: np.ndarray, length: int, axis: int) -> np.ndarray:
    """Pad `rows` with zeros in front to `length` entries along an axis."""
    before = [(0, 0)] * rows.ndim
    before[axis] = (length - rows.shape[axis], 0)
    return np.pad(rows, before)


def generator_graph(model: Any, source: ModelSource) -> Path:
    """Return the file of the generator's graph in the cache; the first call writes it, with LoRA merged.

    Raises:
        MissingExtraError: OpenVINO is not installed.
        ModelError: OpenVINO cannot compute this generator, or not in the model's precision.
    """
    if model.dtype not in PRECISIONS:
        raise ModelError(
            f"--engine openvino computes in float32 or bfloat16, not in {model.dtype}: give --dtype"
        )
    folder = kept_folder("openvino-generators", source, str(model.dtype), GRAPH)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            if model.config.generator_training == "lora":
                model.merge_lora()
            log.info("the generator is written once for OpenVINO: %s", folder)
            temporary = folder.with_suffix(".tmp")
            temporary.mkdir(exist_ok=True)
            write_graph(model.generator, temporary / "generator.xml", reads="embeddings")
            temporary.replace(folder)
    return folder / "generator.xml"

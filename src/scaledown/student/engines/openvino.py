"""The engine that runs a student's generator in OpenVINO, on a CPU: the graph takes embeddings of prompts."""

import inspect
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from filelock import FileLock
from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from scaledown.devices.openvino import openvino
from scaledown.errors import ModelError
from scaledown.models.sources import ModelSource, kept_folder
from scaledown.student.decoding import Decoding, only_grows
from scaledown.student.engines.steps import StepGeneration

log = logging.getLogger("scaledown")

_GRAPH: Final = "1"  # raise it if `_graph` changes: graphs in the cache are made again
_PRECISIONS: Final = {torch.float32: "f32", torch.bfloat16: "bf16"}
_TOLERANCE: Final = {torch.float32: 1e-3, torch.bfloat16: 0.5}  # of scores, in their standard deviations


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
        precision = _PRECISIONS[dtype]
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": precision,  # by default it would have 8 bits
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        self._openvino = openvino("--engine openvino")
        self._request = self._openvino.Core().compile_model(graph, "CPU", settings).create_infer_request()
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
        given = {"embedded": embedded.numpy(), "mask": mask, "places": places, "rows": rows}
        self.logits = torch.from_numpy(self._request.infer(given)["logits"].copy())


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
    if model.dtype not in _PRECISIONS:
        raise ModelError(
            f"--engine openvino computes in float32 or bfloat16, not in {model.dtype}: give --dtype"
        )
    library = openvino("--engine openvino")
    folder = kept_folder("openvino-generators", source, str(model.dtype), _GRAPH)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            if model.config.generator_training == "lora":
                model.merge_lora()
            log.info("the generator is written once for OpenVINO: %s", folder)
            temporary = folder.with_suffix(".tmp")
            temporary.mkdir(exist_ok=True)
            library.save_model(_graph(model.generator), temporary / "generator.xml", compress_to_fp16=False)
            _check(model, temporary / "generator.xml")
            temporary.replace(folder)
    return folder / "generator.xml"


def _check(model: Any, graph: Path) -> None:
    """Raise `ModelError` unless the graph computes what the generator does, for two padded prompts."""
    ids = torch.arange(10, device=model.device).reshape(2, 5) % model.get_input_embeddings().num_embeddings
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    found = []
    with torch.inference_mode():
        embedded = model.get_input_embeddings()(ids)
        for decoding in (
            Decoding(model.generator),
            OpenVINODecoding(graph, model.get_input_embeddings(), model.dtype),
        ):
            decoding.join(embedded, mask)
            decoding.step(ids[:, 0])
            found.append(decoding.logits.float())
    expected, computed = found
    if (error := float((expected - computed).abs().max() / expected.std())) > _TOLERANCE[model.dtype]:
        raise ModelError(
            f"OpenVINO computes other scores than this generator (they differ by {error:.2g} standard "
            "deviations): use --engine transformers"
        )


class _Grown(Cache):  # type: ignore[misc]  # transformers has no types
    """A cache that only appends, so that its trace has no branches.

    `tensors` are keys and values of each layer in turn, [rows, heads, length, size]; after the step `grown`
    are.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__(layers=[])
        self.tensors = tensors
        self.grown: list[Any] = [None] * len(tensors)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        place = 2 * layer_idx
        for number, new in enumerate((key_states, value_states), place):
            self.grown[number] = torch.cat([self.tensors[number], new], 2)
        return self.grown[place], self.grown[place + 1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tensors[0].shape[2]


class _Step(nn.Module):
    """A step of the generator as a function of tensors alone."""

    def __init__(self, generator: Any) -> None:
        super().__init__()
        self.generator = generator

    def forward(
        self, embedded: torch.Tensor, mask: torch.Tensor, places: torch.Tensor, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        cache, new = _Grown(tensors), embedded.shape[1]
        query = torch.arange(new)[:, None] + tensors[0].shape[2]
        key = torch.arange(mask.shape[1])[None]
        # Padding reads itself: without any key its scores would not be numbers.
        visible = ((key <= query) & (mask[:, None] > 0)) | (key == query)
        output = self.generator(
            inputs_embeds=embedded.to(tensors[0].dtype),
            attention_mask=visible[:, None],
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return (output.logits[:, -1].float(), *cache.grown)


def _graph(generator: Any) -> Any:
    """Trace the generator into OpenVINO's graph, whose keys and values are a state between steps."""
    from openvino import opset13 as op
    from openvino._offline_transformations import apply_make_stateful_transformation

    library = openvino("--engine openvino")
    width = generator.get_input_embeddings().embedding_dim
    tensors = _empty_cache(generator, width)
    embedded = torch.zeros(2, 3, width)
    example = (embedded, torch.ones(2, 5, dtype=torch.long), torch.arange(2, 5).expand(2, 3), *tensors)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of each branch
        try:
            graph = library.convert_model(_Step(generator.eval()), example_input=example)
        except Exception as error:  # of many kinds, by what the architecture does
            raise ModelError(
                f"OpenVINO cannot trace a {type(generator).__name__} ({type(error).__name__}): use --engine "
                "transformers"
            ) from error
    names = ["embedded", "mask", "places"]
    given, made = [f"past.{n}" for n in range(len(tensors))], [f"grown.{n}" for n in range(len(tensors))]
    ports = [*graph.inputs, *graph.outputs]
    for port, name in zip(ports, [*names, *given, "logits", *made], strict=True):
        port.get_tensor().set_names({name})
    shapes = {"embedded": [-1, -1, width], "mask": [-1, -1], "places": [-1, -1]}
    sizes = {name: (one.shape[1], one.shape[3]) for name, one in zip(given, tensors, strict=True)}
    graph.reshape(shapes | {name: [-1, heads, -1, size] for name, (heads, size) in sizes.items()})

    rows = op.parameter([-1], library.Type.i32)
    rows.output(0).get_tensor().set_names({"rows"})
    graph.add_parameters([rows])
    for name in given:
        port = graph.input(name)
        readers = port.get_target_inputs()
        chosen = op.gather(port, rows, op.constant(np.int64(0)))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, dict(zip(given, made, strict=True)))

    # A state begins with as many rows as the prompts have, and no positions.
    count = op.gather(
        op.shape_of(graph.input("embedded"), output_type="i64"), op.constant(np.array([0])), op.constant(0)
    )
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            shape = node.get_output_partial_shape(0)
            heads, size = (op.constant(np.array([shape[axis].get_length()])) for axis in (1, 3))
            begin = op.concat([count, heads, op.constant(np.array([0])), size], 0)
            zero = op.constant(np.zeros((), np.float32))
            node.set_arguments([op.broadcast(op.convert(zero, node.get_output_element_type(0)), begin)])
    graph.validate_nodes_and_infer_types()
    return graph


def _empty_cache(generator: Any, width: int) -> list[torch.Tensor]:
    """Return keys and values of each layer for two rows of two tokens, [2, heads, 2, size].

    Raises `ModelError` if the generator takes no positions, or its cache does not only grow.
    """
    if "position_ids" not in inspect.signature(generator.forward).parameters or not only_grows(
        generator.config
    ):
        raise ModelError(
            f"--engine openvino cannot run a {type(generator).__name__}, whose attention reads a window or "
            "takes no positions: use --engine transformers"
        )
    cache = DynamicCache(config=generator.config)
    embedded = torch.zeros(2, 2, width, dtype=generator.dtype)
    with torch.inference_mode():
        generator(inputs_embeds=embedded, past_key_values=cache, use_cache=True)
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]

"""A causal LM as a graph of OpenVINO, traced in this process. The names are those of OpenVINO GenAI."""

import inspect
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from scaledown.devices.openvino import WHOLE_STATES, openvino, same_signal_stack
from scaledown.errors import ModelError

PRECISIONS: Final = {torch.float32: "f32", torch.bfloat16: "bf16"}
"""OpenVINO's names of the precisions in which a graph can be computed."""
_UNREAD_SCORE: Final = torch.finfo(torch.bfloat16).min  # added to the scores of positions that are not read
_TOLERANCE: Final = 1e-3  # of scores: the root mean square error, in their standard deviations
CANNOT: Final = "its attention does not keep all positions, or it takes no positions"


def write_graph(model: Any, file: Path, *, reads: str, eight_bits: bool = False) -> None:
    """Trace a causal LM and write its graph, which must compute the scores that the model computes.

    Inputs are `input_ids` [rows, new] or `inputs_embeds` [rows, new, width]; `attention_mask` [rows, all], 0
    at padding; `position_ids` [rows, new]; and `beam_idx` [rows], for each row its number in the step before.
    The output is `logits`, [rows, new or 1, vocabulary]. Keys and values are a state of the request.

    Args:
        model: A causal LM of transformers, in float32, on a CPU. In the graph of one in bfloat16, OpenVINO
            merges fewer steps.
        file: The file to write, `….xml`; the weights are written beside it.
        reads: `ids` or `embeddings`. With `embeddings`, only the last position has logits.
        eight_bits: After the check, round each row of each matrix to 256 values.

    Raises:
        MissingExtraError: OpenVINO is not installed.
        ModelError: OpenVINO cannot compute this model, or the graph cannot be written.
    """
    library = openvino("a model on OpenVINO")
    name = {"ids": "input_ids", "embeddings": "inputs_embeds"}[reads]
    try:
        graph = _with_state(*_traced(library, model.eval(), name), library)
        _check_graph(model, graph, name)
        if eight_bits:
            _round(graph, library)
        library.save_model(graph, file, compress_to_fp16=False)
    except ModelError:
        raise
    except Exception as error:  # its kind depends on the architecture
        first = next(iter(str(error).strip().splitlines()), "")
        raise ModelError(
            f"OpenVINO cannot run a {type(model).__name__} ({type(error).__name__}: {first}): use the engine "
            "transformers"
        ) from error


def compiled(graph: Any, dtype: torch.dtype) -> Any:
    """Compile a graph for this machine's CPU.

    Args:
        graph: A graph of OpenVINO, or the file of one.
        dtype: The precision of the computation, float32 or bfloat16.

    Returns:
        OpenVINO's compiled model.

    Raises:
        MissingExtraError: OpenVINO is not installed.
    """
    precision = PRECISIONS[dtype]
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,  # by default it would have 8 bits
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        **WHOLE_STATES,
    }
    library = openvino("a model on OpenVINO")
    with same_signal_stack():
        return library.Core().compile_model(graph, "CPU", settings)


def can_run(config: Any) -> bool:
    """Whether a causal LM takes positions, and keeps all of them in every layer, as a graph needs.

    Args:
        config: The model's configuration, of transformers.
    """
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return (
        kind is not None
        and "position_ids" in inspect.signature(kind.forward).parameters
        and keeps_positions(config)
    )


def keeps_positions(config: Any) -> bool:
    """Whether each layer of a causal LM keeps all positions; a sliding window drops old ones."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


class _Grown(Cache):  # type: ignore[misc]  # transformers has no types
    """A cache that only appends, so that its trace has no branches.

    `tensors` are keys and values of each layer in turn, [rows, heads, length, size]; `grown` has them after
    the step.
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
    """A step of the model as a function of tensors alone."""

    def __init__(self, model: Any, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(
        self, read: torch.Tensor, mask: torch.Tensor, places: torch.Tensor, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        cache, new = _Grown(tensors), read.shape[1]
        query = torch.arange(new)[:, None] + tensors[0].shape[2]
        key = torch.arange(mask.shape[1])[None]
        # Padding reads itself: without any key its scores would not be numbers.
        visible = ((key <= query) & (mask[:, None] > 0)) | (key == query)
        # With a mask of truth values OpenVINO reads a long prompt several times as slowly.
        hidden = torch.where(visible, 0.0, _UNREAD_SCORE)
        given: dict[str, Any] = {self.name: read}
        if self.name == "inputs_embeds":
            given = {self.name: read, "logits_to_keep": 1}
        output = self.model(
            **given,
            attention_mask=hidden[:, None],
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
        )
        return (output.logits, *cache.grown)


def _traced(library: Any, model: Any, name: str) -> tuple[Any, list[str], list[str]]:
    """Trace one step. Returns the graph, and the names of its keys and values before and after the step."""
    tensors = _example_cache(model)
    read = torch.zeros(2, 3, dtype=torch.long)
    if name == "inputs_embeds":
        read = torch.zeros(2, 3, model.get_input_embeddings().embedding_dim)
    example = (read, torch.ones(2, 5, dtype=torch.long), torch.arange(2, 5).expand(2, 3), *tensors)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of each branch
        graph = library.convert_model(_Step(model, name), example_input=example)
    parts = [f"{number}.{part}" for number in range(len(tensors) // 2) for part in ("key", "value")]
    before, after = [f"past_key_values.{part}" for part in parts], [f"present.{part}" for part in parts]
    names = [name, "attention_mask", "position_ids", *before, "logits", *after]
    for port, own in zip([*graph.inputs, *graph.outputs], names, strict=True):
        port.get_tensor().set_names({own})
    for port, own in zip(graph.inputs, names, strict=False):
        port.get_node().set_friendly_name(own)  # OpenVINO GenAI finds inputs by this name
    shapes = {own: [-1, one.shape[1], -1, one.shape[3]] for own, one in zip(before, tensors, strict=True)}
    shapes |= {name: [-1, -1, *read.shape[2:]], "attention_mask": [-1, -1], "position_ids": [-1, -1]}
    graph.reshape(shapes)
    return graph, before, after


def _example_cache(model: Any) -> list[torch.Tensor]:
    """Return keys and values of each layer for two rows of two tokens, [2, heads, 2, size].

    Raises `ModelError` if `can_run` is false.
    """
    if not can_run(model.config):
        raise ModelError(
            f"OpenVINO cannot run a {type(model).__name__}: {CANNOT}: use the engine transformers"
        )
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=torch.zeros(2, 2, dtype=torch.long), past_key_values=cache, use_cache=True)
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _with_state(graph: Any, before: list[str], after: list[str], library: Any) -> Any:
    """Make keys and values a state; `beam_idx` chooses its rows in each step."""
    from openvino import opset13 as op
    from openvino._offline_transformations import apply_make_stateful_transformation

    rows = op.parameter([-1], library.Type.i32, name="beam_idx")
    rows.output(0).get_tensor().set_names({"beam_idx"})
    graph.add_parameters([rows])
    for name in before:
        port = graph.input(name)
        readers = port.get_target_inputs()
        chosen = op.gather(port, rows, op.constant(np.int64(0)))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, dict(zip(before, after, strict=True)))

    # A state begins with as many rows as the prompts have, and no positions.
    shape = op.shape_of(graph.input("attention_mask"), output_type="i64")
    count = op.gather(shape, op.constant(np.array([0])), op.constant(0))
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            whole = node.get_output_partial_shape(0)
            heads, size = (op.constant(np.array([whole[axis].get_length()])) for axis in (1, 3))
            begin = op.concat([count, heads, op.constant(np.array([0])), size], 0)
            node.set_arguments([op.broadcast(op.constant(np.float32(0)), begin)])
    graph.validate_nodes_and_infer_types()
    return graph


def _round(graph: Any, library: Any) -> None:
    """Replace the matrices of products and of token embeddings by 8-bit numbers.

    Each row has a scale and a zero point.
    """
    from openvino import opset13 as op

    for node in graph.get_ordered_ops():
        kind = node.get_type_name()
        if kind not in {"MatMul", "Gather"}:
            continue
        port = 1 if kind == "MatMul" else 0
        constant = node.input_value(port).get_node()
        if constant.get_type_name() != "Constant" or len(constant.get_output_shape(0)) != 2:
            continue
        if not constant.get_output_element_type(0).is_real():
            continue
        weights = constant.data
        across = 0 if kind == "MatMul" and not node.get_attributes()["transpose_b"] else 1
        low = weights.min(across, keepdims=True).clip(max=0)
        high = weights.max(across, keepdims=True).clip(min=0)
        scale = (high - low) / 255
        scale[scale == 0] = 1
        zero = np.round(-low / scale)
        rounded = np.clip(np.round(weights / scale) + zero, 0, 255)
        value, offset = (
            op.convert(op.constant(own.astype(np.uint8)), library.Type.f32) for own in (rounded, zero)
        )
        own = op.multiply(op.subtract(value, offset), op.constant(scale.astype(np.float32)))
        node.input(port).replace_source_output(own.output(0))
    graph.validate_nodes_and_infer_types()


def _check_graph(model: Any, graph: Any, name: str) -> None:
    """Raise `ModelError` unless the graph computes what the model does: for two prompts, one of them padded,
    and a step in which the rows change places.
    """
    ids = torch.arange(12).reshape(2, 6) % model.get_input_embeddings().num_embeddings
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    order = torch.tensor([1, 0])
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask, position_ids=places).logits[order, -1]
        read = ids if name == "input_ids" else model.get_input_embeddings()(ids)
    request = compiled(graph, torch.float32).create_infer_request()

    def step(rows: torch.Tensor, begin: int, end: int) -> np.ndarray:
        given = {
            name: read[rows, begin:end].numpy(),
            "attention_mask": mask[rows, :end].numpy(),
            "position_ids": places[rows, begin:end].numpy(),
            "beam_idx": rows.numpy().astype(np.int32),
        }
        scores: np.ndarray = request.infer(given)["logits"][:, -1].copy()
        return scores

    step(torch.arange(2), 0, 5)
    found = torch.from_numpy(step(order, 5, 6))
    error = float(((found - expected).pow(2).mean(1).sqrt() / expected.std(1)).max())
    if not error <= _TOLERANCE:  # also if it is not a number
        raise ModelError(
            f"OpenVINO computes other scores than this {type(model).__name__} (they differ by {error:.2g} "
            "standard deviations): use the engine transformers"
        )

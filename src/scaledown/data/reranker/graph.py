"""A cross-encoder as a graph of OpenVINO, whose attention is faster than torch's on a CPU."""

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from scaledown.devices.halving import batches_at_once
from scaledown.devices.openvino import openvino

if TYPE_CHECKING:
    import torch

Features = Mapping[str, "torch.Tensor"]

SMALL: Final = 1_000_000
"""Weights. A smaller model is not compiled, since that takes a second."""
_TOLERANCE: Final = {"torch.float32": 1e-3, "torch.bfloat16": 0.05}
"""Of logits, relative to the largest."""


def as_graph(
    model: Any, head: str, example: Features
) -> tuple[Callable[[Features], "torch.Tensor"] | None, str]:
    """Compile a sequence classifier by OpenVINO, but for its last layers, which stay in torch and in float32.

    Args:
        model: The classifier, in evaluation mode, on a CPU.
        head: The name of its last layers.
        example: Its input, to compare the logits.

    Returns:
        A function that several threads may call: features to logits, [pairs, 1]. Or None, and the reason.

    Raises:
        MissingExtraError: OpenVINO is not installed.
    """
    import torch

    from scaledown.models.openvino import PRECISIONS, compiled

    library = openvino("the reranker of this run")
    last, dtype, names = getattr(model, head), next(model.parameters()).dtype, list(example)
    if model.num_parameters() < SMALL:
        return None, "it is small"
    if dtype not in PRECISIONS:
        return None, f"OpenVINO does not compute in {dtype}"

    class Body(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *features: "torch.Tensor") -> Any:
            return self.model(**dict(zip(names, features, strict=True))).logits

    idle: list[Any] = []  # requests: a new one is slow at first, and threads live for a shard

    @torch.inference_mode()
    def logits(features: Features) -> "torch.Tensor":
        try:
            request = idle.pop()
        except IndexError:
            request = body.create_infer_request()
        request.infer([features[name].numpy() for name in names], share_inputs=True)
        scores: torch.Tensor = last(torch.from_numpy(request.get_output_tensor().data))
        idle.append(request)
        return scores

    try:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer warns of each branch
            expected = model(**example).logits
            setattr(model, head, torch.nn.Identity())
            try:
                # In the graph of a model in bfloat16, OpenVINO merges fewer steps.
                graph = library.convert_model(Body().float(), example_input=tuple(example.values()))
            finally:
                setattr(model, head, last)
                model.to(dtype)
                last.float()
        body = compiled(graph, dtype, at_once=batches_at_once("cpu"))
        difference = float((logits(example) - expected).abs().max())
    except Exception as error:  # a model of another author may raise anything
        return None, f"OpenVINO cannot run it: {type(error).__name__}: {error}".splitlines()[0]
    limit = _TOLERANCE[str(dtype)] * float(expected.abs().max())
    if not difference <= limit:  # also if it is not a number
        return None, f"by OpenVINO its scores differ by {difference:.2g}"
    return logits, ""

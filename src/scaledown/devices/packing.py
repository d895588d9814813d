"""Weights of linear layers in the order in which oneDNN multiplies them, on a CPU."""

import functools
import logging
import platform
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

log = logging.getLogger("scaledown")


def pack_linear_layers(model: Any) -> None:
    """Reorder the weights of a model's linear layers once, so that no product has to.

    The model can then only be run. Its `weight`s are without data, except that of the output layer, which the
    embeddings may share. On other devices and processors than x86 nothing is changed. A product takes 5% to
    15% less time (`benchmarks/rerank.py`). Its bits do not depend on the number of threads.

    Args:
        model: A model of transformers in evaluation mode.
    """
    import torch

    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear: list[Any] = [layer for layer in model.modules() if type(layer) is torch.nn.Linear]
    for layer in linear:
        if layer is not output and _can_pack(layer.weight):
            layer.forward = _packed(layer.weight.detach(), layer.bias)
            layer.weight = torch.nn.Parameter(layer.weight.to("meta"), requires_grad=False)


def _can_pack(weight: "torch.Tensor") -> bool:
    is_x86 = platform.machine().lower() in {"x86_64", "amd64"}  # others were not measured
    return is_x86 and weight.device.type == "cpu" and _works(weight.dtype)


@functools.cache
def _works(dtype: "torch.dtype") -> bool:
    """Whether this torch packs weights of such a dtype: these are functions that its compiler uses."""
    import torch

    if dtype not in {torch.float32, torch.bfloat16}:
        return False
    states, weight, bias = (torch.linspace(-1, 1, count).to(dtype) for count in (5 * 48, 32 * 48, 32))
    states, weight = states.view(5, 48), weight.view(32, 48)
    try:
        with torch.inference_mode():
            found, expected = _packed(weight, bias)(states), torch.nn.functional.linear(states, weight, bias)
        reason = "" if torch.allclose(found, expected, rtol=1e-2, atol=1e-2) else "wrong products"
    except (AttributeError, RuntimeError) as error:  # NotImplementedError is a RuntimeError
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    if reason:
        log.debug("weights in %s are not packed (%s)", dtype, reason)
    return not reason


def _packed(
    weight: "torch.Tensor", bias: "torch.Tensor | None"
) -> Callable[["torch.Tensor"], "torch.Tensor"]:
    """Return the function of a linear layer: states [..., inputs] to states [..., outputs]."""
    import torch

    operations = torch.ops.mkldnn
    with torch.inference_mode():
        packed = operations._reorder_linear_weight(weight, None)
    return lambda states: operations._linear_pointwise(states, packed, bias, "none", [], "")

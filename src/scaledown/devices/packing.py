"""Weights of linear layers in the order in which oneDNN multiplies them, on a CPU."""

import logging
import platform
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

log = logging.getLogger("scaledown")

_TOLERANCE: Final = {"torch.float32": 1e-4, "torch.bfloat16": 0.05}
"""Of logits, relative to the largest."""
_MOST_INPUTS: Final = 1024
"""Of a layer in float32. With more, oneDNN may divide the sum of an output among threads, and then the bits
depend on their number. In bfloat16, torch's own products are oneDNN's, too.
"""


def pack_linear_layers(model: Any, example: dict[str, "torch.Tensor"]) -> bool:
    """Reorder the weights of a model's linear layers once, instead of in each product.

    A GELU that follows a layer becomes a part of its product. The model can then only be run: the plain
    weights of these layers are gone. It stays as it is on other devices, on processors that are not x86, and
    if its logits would change.

    Args:
        model: A model of transformers in evaluation mode that is only called.
        example: Its input, to compare its logits before and after.

    Returns:
        Whether the weights were packed.
    """
    import torch

    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear: list[Any] = [layer for layer in model.modules() if type(layer) is torch.nn.Linear]
    chosen = [one for one in linear if one is not output and _can_pack(one.weight)]
    if not chosen:
        return False
    plain = [layer.weight for layer in chosen]
    blocks = {block.dense: block for block in model.modules() if _ends_in_gelu(block)}
    activations = {layer: blocks[layer].intermediate_act_fn for layer in chosen if layer in blocks}
    with torch.inference_mode():
        try:
            expected = model(**example).logits.float()
            for layer in chosen:
                layer.forward = _packed(layer.weight.detach(), layer.bias, gelu=layer in activations)
                if layer in activations:
                    blocks[layer].intermediate_act_fn = torch.nn.Identity()
                # Code of a model that reads the weights itself then fails here, not at the first batch.
                layer.weight = torch.nn.Parameter(layer.weight.to("meta"), requires_grad=False)
            difference = float((model(**example).logits.float() - expected).abs().max())
            limit = _TOLERANCE[str(plain[0].dtype)] * float(expected.abs().max())
            reason = "" if difference <= limit else f"its logits differ by {difference:.2g}"
        except Exception as error:  # a model of another author may raise anything
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
    if reason:
        log.debug("the weights of %s are not packed (%s)", type(model).__name__, reason)
        for layer, weight in zip(chosen, plain, strict=True):
            layer.weight = weight
            layer.__dict__.pop("forward", None)
            if layer in activations:
                blocks[layer].intermediate_act_fn = activations[layer]
    return not reason


def _can_pack(weight: "torch.Tensor") -> bool:
    is_x86 = platform.machine().lower() in {"x86_64", "amd64"}  # others were not measured
    same_bits = str(weight.dtype) != "torch.float32" or weight.shape[1] <= _MOST_INPUTS
    return is_x86 and same_bits and weight.device.type == "cpu" and str(weight.dtype) in _TOLERANCE


def _ends_in_gelu(block: Any) -> bool:
    """Whether a module is a linear layer and an exact GELU, as in BERT, RoBERTa, ELECTRA and DeBERTa."""
    import torch
    from transformers.activations import GELUActivation

    parts = dict(block.named_children())
    activation: Any = parts.get("intermediate_act_fn")
    is_exact = type(activation) is GELUActivation and activation.act is torch.nn.functional.gelu
    return is_exact and parts.keys() == {"dense", "intermediate_act_fn"}


def _packed(
    weight: "torch.Tensor", bias: "torch.Tensor | None", *, gelu: bool
) -> Callable[["torch.Tensor"], "torch.Tensor"]:
    """Return the function of a linear layer: states [..., inputs] to states [..., outputs]."""
    import torch

    operations = torch.ops.mkldnn  # what torch's compiler calls; where they are missing, nothing is packed
    packed = operations._reorder_linear_weight(weight, None)
    # The second "none" is GELU itself, and not its approximation by tanh.
    after: tuple[str, list[float], str] = ("gelu", [], "none") if gelu else ("none", [], "")
    return lambda states: operations._linear_pointwise(states, packed, bias, *after)

"""Quantize the generator's frozen weights to 4 bits (NF4; QLoRA, arXiv 2305.14314), for small GPUs."""

from typing import Any, Final

from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

from scaledown.errors import UsageError

_KIND: Final = "nf4"


class FourBitLinear(Linear4bit):  # type: ignore[misc]  # bitsandbytes has no types
    """A frozen linear layer in 4 bits. A state dict holds its weight dequantized, with the same values.

    So a saved model computes the function that was trained, and does not need bitsandbytes.
    """

    def __init__(self, layer: nn.Linear) -> None:
        sizes = layer.in_features, layer.out_features
        super().__init__(*sizes, bias=False, compute_dtype=layer.weight.dtype, device="meta")
        packed, state = quantize_4bit(layer.weight.data, quant_type=_KIND, compress_statistics=True)
        self.weight = Params4bit(
            packed, requires_grad=False, quant_type=_KIND, quant_state=state, module=self, bnb_quantized=True
        )
        self.bias = layer.bias
        # On processors with AVX512-BF16, bitsandbytes reorders the weights in evaluation; training would then
        # fail.
        self.support_avx512bf16_for_cpu = False

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # Each layer moves to the CPU: dequantized, all layers together would not fit on a small GPU.
        destination[f"{prefix}weight"] = dequantize_4bit(self.weight.data, self.weight.quant_state).cpu()
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, state_dict: Any, *_: Any) -> None:
        """Keep the present weights: a run that continues has quantized the same weights again."""


def quantize(generator: Any) -> None:
    """Quantize all frozen linear layers of a generator, except its output layer, one after the other.

    Args:
        generator: A causal LM of transformers; its layers are replaced in place.

    Raises:
        UsageError: It has none.
    """
    head = generator.get_output_embeddings()
    linear = [
        (name, layer)
        for name, layer in generator.named_modules()
        if type(layer) is nn.Linear and layer is not head and not layer.weight.requires_grad
    ]
    if not linear:
        raise UsageError("--generator_4bit: the generator has no frozen linear layers; leave the flag out")
    for name, layer in linear:
        generator.set_submodule(name, FourBitLinear(layer))

"""The generator's frozen weights in 4 bits (NF4; QLoRA, arXiv 2305.14314), for training on small GPUs."""

from typing import Any, Final

from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

_KIND: Final = "nf4"


class FourBitLinear(Linear4bit):  # type: ignore[misc]  # bitsandbytes has no types
    """A frozen linear layer in 4 bits. In a state dict its weight is a plain one, of the same values.

    So whatever is saved needs no bitsandbytes, and is the function that was trained.
    """

    def __init__(self, layer: nn.Linear) -> None:
        sizes = layer.in_features, layer.out_features
        super().__init__(*sizes, bias=False, compute_dtype=layer.weight.dtype, device="meta")
        packed, state = quantize_4bit(layer.weight.data, quant_type=_KIND, compress_statistics=True)
        self.weight = Params4bit(
            packed, requires_grad=False, quant_type=_KIND, quant_state=state, module=self, bnb_quantized=True
        )
        self.bias = layer.bias
        # In evaluation bitsandbytes would rearrange the weights for such processors, and training fails then.
        self.support_avx512bf16_for_cpu = False

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # Layer by layer to the host: all of them would not fit on the GPU that 4 bits are for.
        destination[f"{prefix}weight"] = dequantize_4bit(self.weight.data, self.weight.quant_state).cpu()
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, state_dict: Any, *_: Any) -> None:
        """Keep what is here: a run that goes on has made it of the same weights as before."""


def quantize(generator: Any) -> None:
    """Put all frozen linear layers of a generator but its head into 4 bits, one after the other."""
    head = generator.get_output_embeddings()
    for name, layer in list(generator.named_modules()):
        if type(layer) is nn.Linear and layer is not head and not layer.weight.requires_grad:
            generator.set_submodule(name, FourBitLinear(layer))

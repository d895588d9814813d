"""What a training run holds in memory before it sees any example."""

import math
from typing import Any, Final, NamedTuple

# As bitsandbytes has them.
_LEAST_IN_8_BITS: Final = 4096
_BLOCK: Final = 256


class Memory(NamedTuple):
    """Bytes, over all processes together where they share the model."""

    frozen: int
    """Weights that are not trained."""
    trained: int
    """Weights that are, in float32."""
    gradients: int
    moments: int
    """Of AdamW, two for each trained weight, in float32 or 8 bits."""

    def __str__(self) -> str:
        names = ("frozen weights", "trained weights", "gradients", "moments of AdamW")
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in zip(names, self, strict=True))
        return f"{sum(self) / 1e9:.1f} GB before any example: {parts}"


def memory_of(model: Any, optimizer: str = "adamw") -> Memory:
    """What training with an `--optimizer` holds in memory. Tied weights count once."""
    sizes, moments = {True: 0, False: 0}, 0
    for parameter in model.parameters():
        sizes[parameter.requires_grad] += parameter.numel() * parameter.element_size()
        if state := getattr(
            parameter, "quant_state", None
        ):  # of weights in 4 bits: the scales of their blocks
            sizes[False] += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
        if parameter.requires_grad:
            moments += 2 * _moment_bytes(parameter.numel(), optimizer)
    return Memory(sizes[False], sizes[True], sizes[True], moments)


def _moment_bytes(weights: int, optimizer: str) -> int:
    """Of one moment of so many weights. In 8 bits each block has a scale in float32; small ones are whole."""
    if optimizer == "adamw" or weights < _LEAST_IN_8_BITS:
        return 4 * weights
    return weights + 4 * math.ceil(weights / _BLOCK)

"""The memory that a training run needs before it reads any example."""

import math
from typing import Any, Final, NamedTuple

# Constants of bitsandbytes: smaller weights are not in 8 bits; a block of weights shares a scale.
_LEAST_IN_8_BITS: Final = 4096
_VALUES_A_SCALE: Final = 256


class Memory(NamedTuple):
    """Bytes; summed over all processes if these share the model."""

    frozen: int
    """Weights that are not trained."""
    trained: int
    """Trained weights, in float32."""
    gradients: int
    """Gradients of the trained weights, in float32."""
    moments: int
    """AdamW's two moments of each trained weight, in float32 or 8 bits."""

    def __str__(self) -> str:
        names = ("frozen weights", "trained weights", "gradients", "moments of AdamW")
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in zip(names, self, strict=True))
        return f"{sum(self) / 1e9:.1f} GB before any example: {parts}"


def memory_of(model: Any, optimizer: str = "adamw") -> Memory:
    """Compute the memory of training. Tied weights count once.

    Args:
        model: The `ScaleDownModel`, with its trained weights in float32.
        optimizer: The value of `--optimizer`: `adamw`, or `adamw8bit` for moments in 8 bits.

    Returns:
        Bytes of each part.
    """
    sizes, moments = {True: 0, False: 0}, 0
    for parameter in model.parameters():
        sizes[parameter.requires_grad] += parameter.numel() * parameter.element_size()
        if state := getattr(parameter, "quant_state", None):  # scales of the blocks of 4-bit weights
            sizes[False] += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
        if parameter.requires_grad:
            moments += 2 * _moment_bytes(parameter.numel(), optimizer)
    return Memory(sizes[False], sizes[True], sizes[True], moments)


def _moment_bytes(weights: int, optimizer: str) -> int:
    """Return the bytes of one moment.

    In 8 bits each block has a float32 scale; small weights stay float32.
    """
    if optimizer == "adamw" or weights < _LEAST_IN_8_BITS:
        return 4 * weights
    return weights + 4 * math.ceil(weights / _VALUES_A_SCALE)

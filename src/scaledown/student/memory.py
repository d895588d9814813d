"""What a training run holds in memory before it sees any example."""

from typing import Any, NamedTuple


class Memory(NamedTuple):
    """Bytes, over all processes together where they share the model."""

    frozen: int
    """Weights that are not trained."""
    trained: int
    """Weights that are, in float32."""
    gradients: int
    moments: int
    """Of AdamW, two for each trained weight."""

    def __str__(self) -> str:
        names = ("frozen weights", "trained weights", "gradients", "moments of AdamW")
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in zip(names, self, strict=True))
        return f"{sum(self) / 1e9:.1f} GB before any example: {parts}"


def memory_of(model: Any) -> Memory:
    """What training a model holds, by its weights as they are. Tied weights count once."""
    sizes = {True: 0, False: 0}
    for parameter in model.parameters():
        sizes[parameter.requires_grad] += parameter.numel() * parameter.element_size()
    return Memory(sizes[False], sizes[True], sizes[True], 2 * sizes[True])

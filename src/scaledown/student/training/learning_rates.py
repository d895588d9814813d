"""What is trained, at which learning rate and with how much weight decay."""

from typing import Any, Final

from torch import nn

from scaledown.student.settings import N_LAYERS, POINTER

WEIGHT_DECAY: Final = 0.1  # the paper's (arXiv 2504.07109, table 7)

# Of the compressor's learning rate. What scores tokens is new; and one step at the full rate would move what
# is added to a token's embedding by the length of an embedding.
_SCORER_RATE: Final = 10 / 3
_CARRY_RATE: Final = 1 / 15
COMPRESSOR_RATES: Final = {N_LAYERS: 5e-5, POINTER: 3e-4}
"""Learning rates of compressors; the paper's for N-Layers, which is not the generator's."""
SEPARATE_RATE: Final = 1e-4


def parameter_groups(model: nn.Module, generator_rate: float, compressor_rate: float) -> list[dict[str, Any]]:
    """What is trained, by learning rate and weight decay.

    Decay is for matrices. Norms, biases and the embeddings of memory and RR are left out: they place and
    scale what the model sees, and pulling them to zero regularises nothing. So is a pointer's scorer.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    rates = {
        "generator": generator_rate,
        "compressor": compressor_rate,
        "pointer": compressor_rate * _SCORER_RATE,
        "carry": compressor_rate * _CARRY_RATE,
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "carry" if name.startswith("pointer.carry.") else name.partition(".")[0]
            decays = parameter.ndim > 1 and name not in {"memory", "rerank_token"}
            decays &= part not in {"pointer", "carry"}
            groups.setdefault((part if part in rates else "compressor", decays), []).append(parameter)
    return [
        {
            "name": part,
            "lr": rates[part],
            "weight_decay": WEIGHT_DECAY if decays else 0.0,
            "params": parameters,
        }
        for (part, decays), parameters in groups.items()
    ]

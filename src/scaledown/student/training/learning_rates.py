"""What is trained, at which learning rate and with how much weight decay."""

from typing import Any, Final

WEIGHT_DECAY: Final = 0.1  # the paper's (arXiv 2504.07109, table 7)


def parameter_groups(model: Any, generator_rate: float, compressor_rate: float) -> list[dict[str, Any]]:
    """What is trained, by learning rate and weight decay.

    Decay is for matrices. Norms, biases and the embeddings of memory and RR are left out: they place and
    scale what the model sees, and pulling them to zero regularises nothing. So are parts that have a rate of
    their own (`Compressor.part_rates`); such a group is named by the last word of the part.
    """
    groups: dict[tuple[str, bool], list[Any]] = {}
    parts = model.config.kind.part_rates
    rates = {"generator": generator_rate, "compressor": compressor_rate}
    rates |= {name.rpartition(".")[2]: compressor_rate * multiple for name, multiple in parts.items()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = max((part for part in parts if name.startswith(f"{part}.")), key=len, default="")
            decays = parameter.ndim > 1 and name not in {"memory", "rerank_token"} and not own
            group = own.rpartition(".")[2] or name.partition(".")[0]
            groups.setdefault((group if group in rates else "compressor", decays), []).append(parameter)
    return [
        {
            "name": part,
            "lr": rates[part],
            "weight_decay": WEIGHT_DECAY if decays else 0.0,
            "params": parameters,
        }
        for (part, decays), parameters in groups.items()
    ]

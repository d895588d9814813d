"""Parameter groups: learning rate and weight decay of each trained weight."""

from typing import Any, Final

WEIGHT_DECAY: Final = 0.1  # the paper's (arXiv 2504.07109, table 7)


def parameter_groups(model: Any, generator_rate: float, compressor_rate: float) -> list[dict[str, Any]]:
    """Group the trained weights by learning rate and weight decay.

    Only matrices have weight decay. Norms, biases and the embeddings of memory and reranking tokens have
    none: pulling them to zero does not regularise the model. Parts with their own learning rate
    (`Compressor.part_rates`) have none either; the name of such a group is the last word of the part.

    Args:
        model: The `ScaleDownModel`; weights that are not trained are left out.
        generator_rate: Learning rate of the generator.
        compressor_rate: Learning rate of everything else, except for `part_rates`.

    Returns:
        Groups for an optimizer of torch: `name`, `lr`, `weight_decay` and `params`.
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

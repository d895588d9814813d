"""Layers that read query, document and memory tokens: the generator's first ones, or a separate model."""

import copy
from typing import Any, Final

import torch
from torch import nn

from scaledown.errors import ModelError, UsageError
from scaledown.models.sources import ModelSource
from scaledown.models.weights import loadable, loading, onto
from scaledown.student.settings import ScaleDownConfig

# Names of the norm after the last layer, in different decoders.
_FINAL_NORMS: Final = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


def new_compressor(config: ScaleDownConfig) -> Any:
    """Create a compressor with the shapes that `config` describes; its weights are loaded later.

    Args:
        config: With the configuration of the generator, or of a separate compressor.

    Returns:
        A model of transformers without a head.

    Raises:
        ModelError: A configuration is missing, or the architecture cannot be cut after a layer.
        UsageError: The generator has fewer than `config.num_layers` layers.
    """
    from transformers import AutoModel

    if config.compressor_name is not None:
        if config.compressor_config is None:
            raise ModelError(
                f"the model's compressor {config.compressor!r} is an extension: install the package that "
                "adds it (docs/extending.md)"
            )
        return _bare(AutoModel.from_config(config.architecture(config.compressor_config)))
    architecture = config.architecture(config.generator)
    if config.num_layers > architecture.num_hidden_layers:
        raise UsageError(
            f"--num_layers {config.num_layers}: {config.generator_name} has "
            f"{architecture.num_hidden_layers}; use fewer"
        )
    architecture.num_hidden_layers = config.num_layers
    if kinds := getattr(architecture, "layer_types", None):
        architecture.layer_types = kinds[: config.num_layers]
    compressor = AutoModel.from_config(architecture)
    norm = next((name for name in _FINAL_NORMS if hasattr(compressor, name)), None)
    if norm is None:
        raise ModelError(
            f"{type(compressor).__name__} cannot be cut after its first layers, because its final norm is "
            "not known: use --compressor modernbert or the name of another model"
        )
    setattr(compressor, norm, nn.Identity())  # the state after layer N itself, as inside the generator
    return _bare(compressor)


def first_layers(config: ScaleDownConfig, generator: Any) -> Any:
    """Copy the generator's embeddings and first `config.num_layers` layers.

    Args:
        config: With the generator's configuration.
        generator: A causal LM of transformers.

    Returns:
        The compressor, with the generator's device and dtype.

    Raises:
        ModelError: The architecture cannot be cut after a layer.
        UsageError: The generator has fewer layers.
    """
    with generator.device:
        compressor = new_compressor(config)
    weights = generator.get_decoder().state_dict()
    compressor.load_state_dict({name: weights[name] for name in compressor.state_dict()})
    return compressor.to(generator.dtype)


def load_compressor(
    config: ScaleDownConfig, source: ModelSource, dtype: torch.dtype, device: str = "cpu"
) -> Any:
    """Load a pretrained encoder or decoder.

    Args:
        config: Its lengths of query, document and memory tokens must fit into the context of the model.
        source: The model.
        dtype: Of the weights.
        device: `cpu`, `cuda`, `cuda:N` or `mps`.

    Returns:
        The model without its pooling layer.

    Raises:
        ModelError: It cannot be loaded, is neither an encoder nor a decoder, or its context is too short.
    """
    from transformers import AutoModel

    name, pinned = loadable(source)
    with loading(source):
        compressor, info = AutoModel.from_pretrained(
            name, dtype=dtype, **pinned, **onto(device), output_loading_info=True
        )
    compressor = _bare(compressor)
    if missing := set(info["missing_keys"]) & compressor.state_dict().keys():
        raise ModelError(f"--compressor {source.name} lacks weights ({min(missing)}): use another model")
    if compressor.config.is_encoder_decoder:
        raise ModelError(f"--compressor {source.name} is an encoder with a decoder: use one that is either")
    positions = getattr(compressor.config, "max_position_embeddings", None) or 1 << 30
    spare = 6  # special tokens, the reranking token, and the two positions that RoBERTa leaves out
    needed = config.query_max_length + config.doc_max_length + config.memory_tokens + spare
    if needed > positions:
        raise ModelError(
            f"--compressor {source.name} reads {positions} tokens; query, document and memory tokens are up "
            f"to {needed}: lower --doc_max_length or --query_max_length"
        )
    return compressor


def mapping(config: ScaleDownConfig, width: int, generator_width: int) -> nn.Module:
    """Create the map from a separate compressor's states to the generator's embeddings.

    It has two linear layers and a ReLU (arXiv 2504.07109, section 3).

    Args:
        config: `mapping_width` is the number of hidden units.
        width: Width of the compressor's states.
        generator_width: Width of the generator's embeddings.

    Returns:
        A module that maps [..., width] to [..., generator_width].
    """
    return nn.Sequential(
        nn.Linear(width, config.mapping_width),
        nn.ReLU(),
        nn.Linear(config.mapping_width, generator_width),
    )


def compress(
    compressor: Any,
    extra: torch.Tensor,
    ids: torch.Tensor,
    lengths: torch.Tensor,
    *,
    causal: bool,
) -> torch.Tensor:
    """Compute the states of extra tokens that follow each document.

    The extra tokens are inserted right after a document's last token, before its padding. A causal compressor
    needs no mask: the tokens never attend to the padding behind them. Other compressors get one.

    Args:
        compressor: The model that reads the documents.
        extra: [k, width]: embeddings of the extra tokens.
        ids: [documents, length]: tokens, padded on the right.
        lengths: [documents]: number of tokens without padding.
        causal: Whether the compressor's attention is causal.

    Returns:
        [documents, k, width].
    """
    embedded = with_extra(compressor.get_input_embeddings()(ids), lengths, extra)
    mask = None
    if not causal:
        mask = torch.arange(embedded.shape[1], device=ids.device) < (lengths + len(extra))[:, None]
        mask = mask.long()
    states = compressor(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
    return states_of_extra(states, lengths, len(extra))


def with_extra(embedded: torch.Tensor, lengths: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
    """Insert extra tokens after the last token of each row, before its padding.

    Args:
        embedded: [documents, length, width], padded on the right.
        lengths: [documents]: number of tokens without padding.
        extra: [k, width].

    Returns:
        [documents, length + k, width].
    """
    embedded = nn.functional.pad(embedded, (0, 0, 0, len(extra)))
    index = _after(lengths, len(extra), embedded.shape[-1])
    return embedded.scatter(1, index, extra.to(embedded.dtype).expand(len(embedded), -1, -1))


def states_of_extra(states: torch.Tensor, lengths: torch.Tensor, count: int) -> torch.Tensor:
    """Return the states of the tokens that `with_extra` inserted.

    Args:
        states: [documents, length + count, width].
        lengths: [documents]: number of tokens before the inserted ones.
        count: Number of inserted tokens.

    Returns:
        [documents, count, width].
    """
    return states.gather(1, _after(lengths, count, states.shape[-1]))


def _after(lengths: torch.Tensor, count: int, width: int) -> torch.Tensor:
    places = lengths[:, None] + torch.arange(count, device=lengths.device)  # [documents, count]
    return places[..., None].expand(-1, -1, width)


def token_like(compressor: Any, count: int) -> torch.Tensor:
    """Draw embeddings for new tokens, with the mean and deviation of the vocabulary's.

    Args:
        compressor: The model that has the vocabulary.
        count: Number of new tokens.

    Returns:
        [count, width] float32, on the compressor's device.
    """
    weight: torch.Tensor = compressor.get_input_embeddings().weight.detach().float()  # [vocabulary, width]
    return weight.mean(0) + weight.std(0) * torch.randn(count, weight.shape[1], device=weight.device)


def architecture_of(model: Any) -> dict[str, Any]:
    """Return a model's configuration as in `config.json`, without entries about one copy of the weights."""
    settings: dict[str, Any] = copy.deepcopy(model.config.to_dict())
    for name in ("dtype", "torch_dtype", "_name_or_path", "transformers_version", "quantization_config"):
        settings.pop(name, None)
    return settings


def _bare(compressor: Any) -> Any:
    """Remove parts that memory tokens do not pass through: their parameters would have no gradients."""
    if getattr(compressor, "pooler", None) is not None:
        compressor.pooler = None
    compressor.config.use_cache = False
    return compressor

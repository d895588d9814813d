"""Attention for training in bfloat16 on a CPU: torch's kernel is slow in its backward pass there."""

from typing import Any, Final

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import eager_mask

_ATTENTION_NAME: Final = "scaledown_cpu"
_LONGEST_TEXT: Final = 256  # tokens; the scores of longer texts need much memory, and the gain is small


def use_matrix_products(*models: Any) -> None:
    """Compute the attention of these models by `attention`."""
    AttentionInterface.register(_ATTENTION_NAME, attention)
    AttentionMaskInterface.register(_ATTENTION_NAME, eager_mask)
    for model in models:
        model.set_attn_implementation(_ATTENTION_NAME)


def attention(  # noqa: PLR0917  # the signature is that of transformers
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention by matrix products where gradients are needed and the text is short, else by torch.

    The attention `eager` of transformers also uses matrix products, but for texts of any length.

    Args:
        module: The layer.
        query: [batch, heads, tokens, width].
        key: [batch, key heads, tokens, width].
        value: [batch, key heads, tokens, width].
        attention_mask: Added to the scores, [batch, 1, tokens, tokens].
        dropout: The share of probabilities set to 0.
        scaling: Factor of the scores; None is the reciprocal of the square root of the width.
        others: Further options of a model, which torch's kernel gets.

    Returns:
        [batch, tokens, heads, width], and None in place of the probabilities.
    """
    special = dropout or any(others.get(name) is not None for name in ("softcap", "position_bias"))
    if attention_mask is None or special or not query.requires_grad or key.shape[2] > _LONGEST_TEXT:
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return found
    batch, heads, tokens, width = query.shape
    repeats = heads // key.shape[1]
    keys, values = (repeat_kv(one, repeats).flatten(0, 1) for one in (key, value))  # [batch x heads, ...]
    mask = attention_mask.expand(batch, heads, tokens, key.shape[2]).flatten(0, 1)
    scale = width**-0.5 if scaling is None else scaling
    scores = torch.baddbmm(mask.to(query.dtype), query.flatten(0, 1), keys.transpose(1, 2), alpha=scale)
    read = scores.softmax(-1).to(values.dtype) @ values
    return read.view(batch, heads, tokens, width).transpose(1, 2).contiguous(), None

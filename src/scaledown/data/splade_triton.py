"""The SPLADE head as one CUDA kernel: product with the vocabulary and running maximum over tokens.

After Sparton (arXiv 2603.25011). Logits live only in registers: what is written is [batch, vocabulary].
"""

from typing import Any, Final

import torch
import triton
import triton.language as tl

_TERMS: Final = 128  # of the vocabulary, a program
_TOKENS: Final = 64  # of the text, at once
_WIDTH: Final = 64  # of the hidden state, at once


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # noqa: PLR0917
    hidden: Any,
    length: Any,
    weight: Any,
    result: Any,
    batch: Any,
    longest: Any,
    width: Any,
    vocabulary: Any,
    TERMS: tl.constexpr,  # noqa: N803
    TOKENS: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
) -> None:
    """`result[text, terms] = max over tokens (hidden[text] @ weight[terms].T)` for one text, some terms."""
    program = tl.program_id(0).to(tl.int64)
    text = program % batch  # neighbours share a tile of the weights, which then comes from the cache
    terms = (program // batch) * TERMS + tl.arange(0, TERMS)
    real = tl.load(length + text)
    known = terms < vocabulary
    best = tl.full([TERMS], float("-inf"), tl.float32)
    for first in range(0, real, TOKENS):
        tokens = first + tl.arange(0, TOKENS)
        inside = tokens < real
        logits = tl.zeros([TOKENS, TERMS], tl.float32)
        for start in range(0, width, WIDTH):
            part = start + tl.arange(0, WIDTH)
            states = tl.load(
                hidden + (text * longest + tokens[:, None]) * width + part[None, :],
                mask=inside[:, None] & (part < width)[None, :],
                other=0.0,
            )  # [tokens, width]
            rows = tl.load(
                weight + terms[None, :] * width + part[:, None],
                mask=known[None, :] & (part < width)[:, None],
                other=0.0,
            )  # [width, terms]
            logits = tl.dot(states, rows, logits, input_precision="ieee")
        logits = tl.where(inside[:, None], logits, float("-inf"))
        best = tl.maximum(best, tl.max(logits, 0))
    tl.store(result + text * vocabulary + terms, best, mask=known)


def max_logits_fused(
    hidden: torch.Tensor, length: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """max over tokens of `hidden @ weight.T + bias`, float32 [batch, vocabulary]; see `max_logits`."""
    batch, longest, width = hidden.shape
    vocabulary = len(weight)
    result = torch.empty(batch, vocabulary, dtype=torch.float32, device=hidden.device)
    programs = (batch * triton.cdiv(vocabulary, _TERMS),)
    _kernel[programs](
        hidden.contiguous(),
        length.to(torch.int32),
        weight.contiguous(),
        result,
        batch,
        longest,
        width,
        vocabulary,
        TERMS=_TERMS,
        TOKENS=_TOKENS,
        WIDTH=_WIDTH,
    )
    return result if bias is None else result.add_(bias)

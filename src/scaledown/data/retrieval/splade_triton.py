"""The SPLADE head as one CUDA kernel: product with the vocabulary and running maximum over tokens.

After Sparton (arXiv 2603.25011). The logits stay in registers; only the maxima [batch, vocabulary] are
written. Triton reads the annotations of a kernel's arguments as its own types, so only constants have them.
"""

from typing import Final

import torch
import triton
import triton.language as tl

TILES: Final = {
    "TERMS": 128,  # terms of the vocabulary for each program
    "TOKENS": 64,  # tokens in a tile
    "REST": 16,  # tokens in a tile at the end of a text, if small tiles are less work
    "WIDTH": 64,  # columns of the hidden state in a tile
}
OPTIONS: Final = {"enable_fp_fusion": True}  # of the compiler: fused multiply-add


@triton.jit
def whole(real, TOKENS, REST):  # type: ignore[no-untyped-def]  # noqa: N803
    """Return the number of tokens that tiles of `TOKENS` cover; at most two tiles of `REST` cover the others.

    Args:
        real: Tokens of the text.
        TOKENS: Tokens in a tile.
        REST: Tokens in a tile at the end of a text.
    """
    return (real + TOKENS - 1 - 2 * REST) // TOKENS * TOKENS


@triton.jit  # type: ignore[untyped-decorator]
def _tile_maximum(  # type: ignore[no-untyped-def]  # noqa: PLR0917
    states,
    rows,
    first,
    real,
    width,
    known,
    TERMS: tl.constexpr,  # noqa: N803
    TOKENS: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
):
    """The maximum over a tile of tokens that starts at `first`, for a tile of terms."""
    tokens = first + tl.arange(0, TOKENS)
    inside = tokens < real
    logits = tl.zeros([TOKENS, TERMS], tl.float32)
    for start in range(0, width, WIDTH):
        part = start + tl.arange(0, WIDTH)
        left = tl.load(
            states + tokens[:, None] * width + part[None, :],
            mask=inside[:, None] & (part < width)[None, :],
            other=0.0,
        )  # [tokens, width]
        right = tl.load(
            rows[None, :] + part[:, None], mask=known[None, :] & (part < width)[:, None], other=0.0
        )  # [width, terms]
        logits = tl.dot(left, right, logits, input_precision="ieee")
    return tl.max(tl.where(inside[:, None], logits, float("-inf")), 0)


@triton.jit(do_not_specialize=["batch", "longest"])  # type: ignore[untyped-decorator]
def kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0917
    hidden,
    length,
    weight,
    result,
    batch,
    longest,
    width,
    vocabulary,
    TERMS: tl.constexpr,  # noqa: N803
    TOKENS: tl.constexpr,  # noqa: N803
    REST: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
):
    """`result[text, terms] = max over tokens (hidden[text] @ weight[terms].T)`, for a text and some terms.

    Args:
        hidden: Hidden states [batch, longest, width].
        length: Tokens of each text, int32 [batch].
        weight: The decoder's weight [vocabulary, width].
        result: Receives the maxima, float32 [batch, vocabulary].
        batch: Number of texts.
        longest: Tokens of the longest text.
        width: Width of a hidden state.
        vocabulary: Number of terms.
        TERMS: Terms in a tile.
        TOKENS: Tokens in a tile.
        REST: Tokens in a tile at the end of a text.
        WIDTH: Columns of the hidden state in a tile.
    """
    program = tl.program_id(0).to(tl.int64)
    text = program % batch  # neighbouring programs share a tile of the weights, so it comes from the cache
    terms = (program // batch) * TERMS + tl.arange(0, TERMS)
    known = terms < vocabulary
    real = tl.load(length + text)
    states = hidden + text * longest * width
    rows = weight + terms * width
    best = tl.full([TERMS], float("-inf"), tl.float32)
    end = whole(real, TOKENS, REST)
    for first in range(0, end, TOKENS):
        best = tl.maximum(best, _tile_maximum(states, rows, first, real, width, known, TERMS, TOKENS, WIDTH))
    for first in range(end, real, REST):
        best = tl.maximum(best, _tile_maximum(states, rows, first, real, width, known, TERMS, REST, WIDTH))
    tl.store(result + text * vocabulary + terms, best, mask=known)


def max_logits_fused(
    hidden: torch.Tensor, length: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`max_logits` by the CUDA kernel.

    Args:
        hidden: [batch, longest, width], on a CUDA device.
        length: [batch].
        weight: [vocabulary, width].
        bias: [vocabulary], or None.

    Returns:
        Maxima, float32 [batch, vocabulary].
    """
    batch, longest, width = hidden.shape
    vocabulary = len(weight)
    result = torch.empty(batch, vocabulary, dtype=torch.float32, device=hidden.device)
    programs = (batch * triton.cdiv(vocabulary, TILES["TERMS"]),)
    with torch.cuda.device_of(hidden):  # type: ignore[no-untyped-call]  # Triton launches on the current one
        kernel[programs](
            hidden.contiguous(),
            length.to(torch.int32),
            weight.contiguous(),
            result,
            batch,
            longest,
            width,
            vocabulary,
            **TILES,
            **OPTIONS,
        )
    return result if bias is None else result.add_(bias)

"""SPLADE: sparse vectors of texts over the vocabulary (Formal et al. 2021, arXiv 2109.10086).

The weight of a term is the maximum over the text's tokens of log(1 + relu(logit)). Both functions are
monotone, so the maximum can be taken over the raw logits. It is computed in tiles of the vocabulary: a tensor
of batch x length x vocabulary never exists.
"""

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import scipy.sparse as sp

from scaledown.devices.choice import dtype_to_run
from scaledown.devices.halving import Halving
from scaledown.devices.packing import pack_linear_layers
from scaledown.errors import ModelError
from scaledown.models.sources import ModelSource
from scaledown.models.weights import loadable, loading, onto, read_config_file

if TYPE_CHECKING:
    import torch

log = logging.getLogger("scaledown")

_TEXTS_AT_ONCE: Final = 8
_TILE_ELEMENTS: Final = 1 << 20  # logits in a tile; they fit into the processor's cache
_CHECKED_TEXTS: Final = ("How tall is the tower?", "The tower is 330 metres tall. It was built in 1889.")
_TOLERANCE: Final = {"torch.float32": 1e-3, "torch.bfloat16": 0.2, "torch.float16": 0.05}


class SpladeEncoder:
    """A masked language model with SPLADE pooling.

    If the head is a linear layer over the vocabulary with max pooling, our own head computes it. Otherwise
    sentence-transformers does, and the log has the reason. Only then is sentence-transformers imported,
    because the import takes longer than everything else here.

    Args:
        source: The model.
        device: cpu, cuda, cuda:N or mps.
        dtype: auto, float32, bfloat16 or float16.
        batch_size: Texts encoded at once.
    """

    def __init__(self, source: ModelSource, device: str, dtype: str, batch_size: int) -> None:
        self._device, self._batch_size = device, batch_size
        self.halving = Halving("--batch_size")
        self._model: Any = None
        reason, parts = _from_files(source, device, dtype)
        self._fast: _Fast | None = None
        if parts is not None:
            reason, self._fast = _fast(parts)
        if self._fast is None:
            parts = None  # free the model before it is loaded again
            log.info("retriever: the fast SPLADE head cannot be used (%s)", reason)
            self._model = _from_sentence_transformers(source, device, dtype)

    def documents(
        self,
        texts: Sequence[str],
        advance: Callable[[int], None],
        tokens: Sequence[np.ndarray[Any, Any]] | None = None,
    ) -> sp.csr_matrix:
        """Encode documents.

        Args:
            texts: The texts, title included. Tokens beyond the model's limit are not read.
            advance: Called with the number of texts in each finished batch.
            tokens: The token ids of each text, without special tokens; None if they are not known.

        Returns:
            CSR float32 [texts, vocabulary].

        Raises:
            ModelError: The states are too large for float16, or a text alone does not fit into memory.
        """
        if self._fast:
            return self._encode_fast(texts, advance, tokens)
        return self._encode(self._model.encode_document, texts, advance)

    def queries(self, texts: Sequence[str], advance: Callable[[int], None]) -> sp.csr_matrix:
        """Encode queries.

        Args:
            texts: The texts of the queries.
            advance: Called with the number of texts in each finished batch.

        Returns:
            CSR float32 [texts, vocabulary].

        Raises:
            ModelError: The states are too large for float16, or a text alone does not fit into memory.
        """
        if self._fast:
            return self._encode_fast(texts, advance, None)
        return self._encode(self._model.encode_query, texts, advance)

    def _encode_fast(
        self,
        texts: Sequence[str],
        advance: Callable[[int], None],
        tokens: Sequence[np.ndarray[Any, Any]] | None,
    ) -> sp.csr_matrix:
        fast = self._fast
        assert fast is not None  # noqa: S101  # for the type checker
        ids = fast.tokenised(texts) if tokens is None else tokens

        def launch(batch: Sequence[int]) -> "torch.Tensor":
            return fast.launch([ids[i] for i in batch])

        return self._batches(by_length(ids), launch, fast.read, advance, in_threads=True)

    def _encode(
        self, encode: Callable[..., Any], texts: Sequence[str], advance: Callable[[int], None]
    ) -> sp.csr_matrix:
        def launch(batch: Sequence[int]) -> Any:
            return encode(
                [texts[i] for i in batch],
                batch_size=len(batch),
                show_progress_bar=False,
                convert_to_tensor=True,
                convert_to_sparse_tensor=True,
            )

        def read(vectors: Any) -> sp.csr_matrix:
            coo = vectors.cpu().coalesce()
            row, column = coo.indices().numpy()
            return sp.csr_matrix((coo.values().float().numpy(), (row, column)), shape=coo.shape)

        return self._batches(by_length(texts), launch, read, advance)

    def _batches(
        self,
        order: np.ndarray[Any, Any],
        launch: Callable[[Sequence[int]], Any],
        read: Callable[[Any], sp.csr_matrix],
        advance: Callable[[int], None],
        *,
        in_threads: bool = False,
    ) -> sp.csr_matrix:
        parts = []
        batches = in_batches(order, self._batch_size)
        at_once = len(batches) if in_threads else 1
        with contextlib.closing(self.halving.each(batches, launch, read, self._device, at_once)) as encoded:
            for batch, made in encoded:
                parts += made
                advance(len(batch))
        return sp.vstack(parts, format="csr")[np.argsort(order)]


class _Fast(NamedTuple):
    """A masked language model whose decoder is replaced by the identity, and the decoder's weights."""

    model: Any
    tokenizer: Any
    weight: "torch.Tensor"  # [vocabulary, hidden]
    bias: "torch.Tensor | None"  # [vocabulary]
    before: list[int]  # special tokens before a text
    after: list[int]  # special tokens after a text
    longest: int  # tokens of a text at most, with special tokens
    twice: bool  # whether log1p is applied twice, as in OpenSearch's models (arXiv 2504.14839)

    def tokenised(self, texts: Sequence[str]) -> list[np.ndarray[Any, Any]]:
        """Token ids of each text, without special tokens."""
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return [np.asarray(ids, np.int64) for ids in encoded["input_ids"]]

    def launch(self, tokens: Sequence[np.ndarray[Any, Any]]) -> "torch.Tensor":
        """Vectors on the device, float32 [texts, vocabulary], of texts given by their token ids."""
        import torch

        room = self.longest - len(self.before) - len(self.after)
        lengths = [min(len(ids), room) + len(self.before) + len(self.after) for ids in tokens]
        padded = np.full((len(tokens), max(lengths)), self.tokenizer.pad_token_id or 0, np.int64)
        for row, (ids, length) in enumerate(zip(tokens, lengths, strict=True)):
            padded[row, :length] = [*self.before, *ids[:room].tolist(), *self.after]
        device = self.weight.device
        with torch.inference_mode():
            real = torch.tensor(lengths, device=device)
            batch = torch.from_numpy(padded).to(device)  # [batch, longest]
            mask = torch.arange(batch.shape[1], device=device) < real[:, None]  # [batch, longest]
            hidden = self.model(input_ids=batch, attention_mask=mask.long()).logits  # [batch, longest, width]
            if hidden.dtype is torch.float16 and not hidden.isfinite().all():  # a maximum could hide it
                raise ModelError("the retriever's states are too large for float16: give --dtype float32")
            logits = max_logits(hidden, real, self.weight, self.bias)  # [batch, vocabulary]
            weights = logits.relu_().log1p_()
            return weights.log1p_() if self.twice else weights

    @staticmethod
    def read(weights: "torch.Tensor") -> sp.csr_matrix:
        """The same vectors, from the device."""
        import torch

        with torch.inference_mode():
            places = weights.nonzero(as_tuple=True)
            column, values = places[1].cpu().numpy(), weights[places].cpu().numpy()
            counts = torch.bincount(places[0], minlength=len(weights)).cpu().numpy()
        starts = np.concatenate([[0], np.cumsum(counts)])
        return sp.csr_matrix((values, column.astype(np.int32), starts), shape=weights.shape)


def max_logits(
    hidden: "torch.Tensor", length: "torch.Tensor", weight: "torch.Tensor", bias: "torch.Tensor | None"
) -> "torch.Tensor":
    """The maximum over tokens of `hidden @ weight.T + bias`.

    On CUDA with Triton the logits are never written to memory (after Sparton, arXiv 2603.25011).

    Args:
        hidden: Hidden states [batch, longest, width].
        length: The number of tokens of each text, without padding [batch].
        weight: The decoder's weight [vocabulary, width].
        bias: The decoder's bias [vocabulary], or None.

    Returns:
        Maxima, float32 [batch, vocabulary].
    """
    fused = _fused(hidden.device, hidden.dtype, hidden.shape[2]) if hidden.is_cuda else None
    return (fused or max_logits_tiled)(hidden, length, weight, bias)


@functools.cache
def _fused(device: "torch.device", dtype: "torch.dtype", width: int) -> Callable[..., "torch.Tensor"] | None:
    """The CUDA kernel, or None if Triton cannot compile it for such states or its result is wrong."""
    import torch

    try:
        from scaledown.data.retrieval.splade_triton import max_logits_fused

        probe = torch.ones(2, 2, width, device=device, dtype=dtype)
        found = max_logits_fused(probe, torch.full([2], 2, device=device), probe[0], None)
        reason = "" if (found == width).all() else "the kernel's result is wrong"
    except Exception as error:  # a compiler or a driver may raise anything
        reason = f"{type(error).__name__}: {error}"
    if reason:
        log.warning("the SPLADE head runs in tiles, which is slower than the CUDA kernel (%s)", reason)
        return None
    return max_logits_fused


def max_logits_tiled(
    hidden: "torch.Tensor", length: "torch.Tensor", weight: "torch.Tensor", bias: "torch.Tensor | None"
) -> "torch.Tensor":
    """`max_logits` by plain matrix products: a few texts and a tile of the vocabulary at a time.

    It is fastest if texts are sorted by length, because a few texts are cut to the longest of them. The
    padding that remains is replaced by the first token, which does not change the maximum.

    Args:
        hidden: As for `max_logits`, also the others.
        length: [batch].
        weight: [vocabulary, width].
        bias: [vocabulary], or None.

    Returns:
        Maxima, float32 [batch, vocabulary].
    """
    import torch

    width = hidden.shape[2]
    result = torch.empty(len(hidden), len(weight), dtype=torch.float32, device=hidden.device)
    space = hidden.new_empty(0)  # one buffer for all tiles: new memory takes as long as the product
    for low in range(0, len(hidden), _TEXTS_AT_ONCE):
        real = length[low : low + _TEXTS_AT_ONCE]
        longest = int(real.max())
        texts = hidden[low : low + _TEXTS_AT_ONCE, :longest]
        padding = torch.arange(longest, device=hidden.device) >= real[:, None]  # [texts, longest]
        rows = torch.where(padding[..., None], texts[:, :1], texts).view(
            -1, width
        )  # [texts * longest, width]
        tile = min(4096, max(256, _TILE_ELEMENTS // len(rows) // 64 * 64))
        if len(space) < len(rows) * tile:
            space = hidden.new_empty(len(rows) * tile)
        for start in range(0, len(weight), tile):
            terms = weight[start : start + tile]
            product = space[: len(rows) * len(terms)].view(len(rows), len(terms))
            torch.mm(rows, terms.T, out=product)
            best = product.view(len(texts), longest, -1).amax(1)  # [texts, tile]
            result[low : low + _TEXTS_AT_ONCE, start : start + tile] = best
    return result if bias is None else result.add_(bias)


class _Parts(NamedTuple):
    """The parts of a SPLADE model with max pooling."""

    model: Any
    """A masked language model."""
    tokenizer: Any
    longest: int
    twice: bool
    """Whether log1p is applied twice."""


# Settings of sentence-transformers' models. With other values it does something that our head does not do.
_DEFAULT_SETTINGS: Final[dict[str, tuple[Any, ...]]] = {
    "do_lower_case": (False, None),
    "transformer_task": ("fill-mask",),
    "query_length": (None,),
    "document_length": (None,),
    "query_expansion": (None,),
    "processing_kwargs": (None, {}),
}
_IRRELEVANT: Final = {"max_seq_length", "modality_config", "module_output_name", "unpad_inputs"}
_POOLING: Final = "1_SpladePooling"
_TASKS: Final = (".MLMTransformer", ".Transformer")


def _from_files(source: ModelSource, device: str, dtype: str) -> tuple[str, _Parts | None]:
    """Load a plain masked language model, or one that sentence-transformers saved with max pooling.

    Returns:
        "" and the parts; or the reason and None, if its files describe another kind of model.
    """
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    modules = read_config_file(source, "modules.json")
    pooling = (read_config_file(source, f"{_POOLING}/config.json") or {}) if modules else {}
    kept = read_config_file(source, "sentence_bert_config.json") or {}
    whole = read_config_file(source, "config_sentence_transformers.json") or {}
    if modules:
        first, second = [*modules, {}, {}][:2]
        if len(modules) != 2 or not str(second.get("type")).endswith(".SpladePooling"):
            return "its modules are not a masked language model and SPLADE pooling", None
        is_known = first.get("path") == "" and second.get("path") == _POOLING
        if not is_known or not str(first.get("type")).endswith(_TASKS):
            return "its modules are of another kind", None
    if pooling.get("pooling_strategy", "max") != "max":
        return f"its pooling is {pooling['pooling_strategy']}", None
    if any((whole.get("prompts") or {}).values()) or whole.get("max_active_dims"):
        return "it has prompts or limits the number of active terms", None
    for name, value in kept.items():
        if name not in _IRRELEVANT and value not in _DEFAULT_SETTINGS.get(name, ()):
            return f"its {name} is {value}", None
    name, pinned = loadable(source)
    with loading(source):
        tokenizer = AutoTokenizer.from_pretrained(name, **pinned)
        model = AutoModelForMaskedLM.from_pretrained(
            name, dtype=dtype_to_run(dtype, device), **pinned, **onto(device)
        ).eval()
    longest = kept.get("max_seq_length")
    if longest is None:
        positions = getattr(model.config, "max_position_embeddings", -1)
        longest = min(tokenizer.model_max_length, positions if positions != -1 else math.inf)
    return "", _Parts(model, tokenizer, longest, pooling.get("activation_function") == "log1p_relu")


def _from_sentence_transformers(source: ModelSource, device: str, dtype: str) -> Any:
    from sentence_transformers import SparseEncoder

    name, pinned = loadable(source)
    arguments: dict[str, Any] = {"model_kwargs": {"dtype": dtype_to_run(dtype, device), **onto(device)}}
    with loading(source):
        return SparseEncoder(name, device=device, **pinned, **arguments)


def _fast(parts: _Parts) -> tuple[str, _Fast | None]:
    """Make the fast head of a model, and replace the model's decoder by the identity.

    Returns:
        "" and the head; or the reason why it cannot be used, and None.
    """
    tokenizer, masked = parts.tokenizer, parts.model
    decoder = masked.get_output_embeddings()
    weight = getattr(decoder, "weight", None)
    if weight is None or weight.ndim != 2:
        return "its last layer is not a linear layer over the vocabulary", None
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    place = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), None)
    if place is None or tokenizer.padding_side != "right":
        return "its tokenizer does more than add tokens around the text", None
    fast = _Fast(
        model=masked,
        tokenizer=tokenizer,
        weight=decoder.weight.detach(),
        bias=None if getattr(decoder, "bias", None) is None else decoder.bias.detach(),
        before=whole[:place],
        after=whole[place + len(bare) :],
        longest=parts.longest,
        twice=parts.twice,
    )
    expected = [_by_definition(parts, text) for text in _CHECKED_TEXTS]
    decoder.forward = lambda hidden: hidden
    try:
        found = fast.read(fast.launch(fast.tokenised(_CHECKED_TEXTS))).toarray()
        difference = abs(np.stack(expected) - found).max()
        if difference <= _TOLERANCE[str(decoder.weight.dtype)]:
            pack_linear_layers(masked, dict(tokenizer(_CHECKED_TEXTS[1], return_tensors="pt")))
            return "", fast
        reason = f"its vectors differ by {difference:.2g}"
    except ModelError:
        raise
    except Exception as error:  # a model of another author may raise anything
        reason = f"{type(error).__name__}: {error}"
    del decoder.forward
    return reason, None


def _by_definition(parts: _Parts, text: str) -> np.ndarray[Any, Any]:
    """The vector of one text, computed as SPLADE is defined [vocabulary]."""
    import torch

    read = parts.tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        ids, mask = (read[name].to(parts.model.device) for name in ("input_ids", "attention_mask"))
        weights = parts.model(input_ids=ids, attention_mask=mask).logits[0].amax(0).float().relu().log1p()
        found: np.ndarray[Any, Any] = (weights.log1p() if parts.twice else weights).cpu().numpy()
    return found


def by_length(texts: Sequence[Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The order of texts from longest to shortest, int64 [texts].

    Batches then have texts of similar length, and too little memory shows in the first batch.
    """
    return np.argsort([-len(text) for text in texts], kind="stable")


def in_batches(order: np.ndarray[Any, np.dtype[np.int64]], size: int) -> list[list[int]]:
    """Cut an order of texts into batches.

    Args:
        order: Positions of texts, int64 [texts].
        size: The most positions in a batch.
    """
    return [order[start : start + size].tolist() for start in range(0, len(order), size)]

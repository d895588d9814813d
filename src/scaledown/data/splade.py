"""Text -> sparse vectors over the vocabulary: SPLADE (Formal et al. 2021, arXiv 2109.10086).

A term's weight is max over the text's tokens of log(1 + relu(logit)).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp

from scaledown.models import ModelSource, choose_dtype, loadable, loading, memory_errors


class SpladeEncoder:
    """A masked language model with SPLADE pooling, on sentence-transformers' `SparseEncoder`."""

    def __init__(self, source: ModelSource, device: str, dtype: str, batch_size: int) -> None:
        from sentence_transformers import SparseEncoder

        name, pinned = loadable(source)
        arguments: dict[str, Any] = {"model_kwargs": {"dtype": choose_dtype(dtype, device)}}
        with loading(source):
            self._model = SparseEncoder(name, device=device, **pinned, **arguments)
        self._batch_size = batch_size

    def documents(self, texts: Sequence[str], advance: Callable[[int], None]) -> sp.csr_matrix:
        """Vectors of documents, float32 [texts, vocabulary]."""
        return self._encode(self._model.encode_document, texts, advance)

    def queries(self, texts: Sequence[str], advance: Callable[[int], None]) -> sp.csr_matrix:
        """Vectors of queries, float32 [texts, vocabulary]."""
        return self._encode(self._model.encode_query, texts, advance)

    def _encode(
        self, encode: Callable[..., Any], texts: Sequence[str], advance: Callable[[int], None]
    ) -> sp.csr_matrix:
        order, parts = by_length(texts), []
        for start in range(0, len(texts), self._batch_size):
            batch = [texts[i] for i in order[start : start + self._batch_size]]
            with memory_errors("--batch_size"):
                coo = encode(
                    batch,
                    batch_size=self._batch_size,
                    show_progress_bar=False,
                    convert_to_tensor=True,
                    convert_to_sparse_tensor=True,
                    save_to_cpu=True,
                ).coalesce()
            row, column = coo.indices().numpy()
            parts.append(sp.csr_matrix((coo.values().float().numpy(), (row, column)), shape=coo.shape))
            advance(len(batch))
        return sp.vstack(parts, format="csr")[np.argsort(order)]


def by_length(texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The order from longest to shortest: batches of similar length, and too little memory shows early."""
    return np.argsort([-len(text) for text in texts], kind="stable")

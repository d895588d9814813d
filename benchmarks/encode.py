"""Encoding with our SPLADE head against sentence-transformers' SparseEncoder, and against OpenVINO.

The same model and texts on a CPU. OpenVINO computes a graph of the model with the pooling in it, in batches
by length, as users write it in a few lines. Each rival has its best batch size.
"""

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import scipy.sparse as sp
import torch
from common import (
    arguments,
    close,
    machine,
    openvino_queue,
    paired,
    peak_gflops,
    questions,
    real_texts,
    verdict,
)

from scaledown.data.retrieval.index import pack, search
from scaledown.data.retrieval.splade import SpladeEncoder
from scaledown.models.sources import resolve
from scaledown.models.weights import loadable

MODEL = "bundled:splade-tiny"


def rival(dtype: torch.dtype) -> "SparseEncoder":
    from sentence_transformers import SparseEncoder

    name, pinned = loadable(resolve(MODEL))
    return SparseEncoder(name, device="cpu", model_kwargs={"dtype": dtype}, **pinned)


def encode_rival(model: object, texts: list[str], batch_size: int) -> torch.Tensor:
    return model.encode_document(
        texts, batch_size=batch_size, show_progress_bar=False, convert_to_sparse_tensor=True
    )


def best_batch(encode: Callable[[list[str], int], object], texts: list[str]) -> int:
    """The batch size with which a rival is fastest on these texts."""
    seconds = {}
    for size in (1, 2, 4, 8, 16, 32):
        encode(texts[:16], size)
        started = time.perf_counter()
        encode(texts[:48], size)
        seconds[size] = time.perf_counter() - started
    return min(seconds, key=seconds.__getitem__)


class OpenVINO:
    """The model and its pooling as one graph of OpenVINO."""

    def __init__(self, model: object, dtype: str, hint: str) -> None:
        class Pooled(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.masked = model[0].auto_model

            def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
                weights = self.masked(input_ids=ids, attention_mask=mask).logits.relu().log1p()
                return (weights * mask[..., None]).amax(1)

        self.tokenizer = model.tokenizer
        self.queue = openvino_queue(Pooled(), 2, dtype, hint)

    def encode(self, texts: list[str], batch_size: int) -> sp.csr_matrix:
        """Vectors [texts, vocabulary]."""
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        batches = [order[low : low + batch_size] for low in range(0, len(order), batch_size)]
        found = {}
        self.queue.set_callback(
            lambda request, number: found.update({number: sp.csr_matrix(request.get_output_tensor().data)})
        )
        for number, batch in enumerate(batches):
            read = self.tokenizer(
                [texts[i] for i in batch], padding=True, truncation=True, return_tensors="np"
            )
            self.queue.start_async([read["input_ids"], read["attention_mask"]], number)
        self.queue.wait_all()
        return sp.vstack([found[number] for number in range(len(batches))], format="csr")[np.argsort(order)]


def flops(model: object, texts: list[str]) -> float:
    """Floating-point operations of the products that encoding the texts needs, by the model's shape."""
    config = model[0].auto_model.config
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    total = 0
    for ids in model.tokenizer(texts, truncation=True, max_length=model.max_seq_length)["input_ids"]:
        length = len(ids)
        layer = 2 * length * (4 * width * width + 2 * width * inner) + 4 * length * length * width
        total += layers * layer + 2 * length * width * (width + config.vocab_size)
    return total


def top20(passages: object, queries: object) -> np.ndarray:
    table = pack(passages, "float32")
    return search(queries, [lambda: table], [table.num_rows], 20).rows


def run(dtype_name: str, name: str, bar: float) -> None:
    options = arguments(__doc__)
    texts = real_texts()
    texts = texts[:60] if options.quick else texts
    dtype = getattr(torch, dtype_name)
    print(f"{machine()}\n{len(texts)} paragraphs of xquad-dev, {MODEL}, {dtype_name}")

    reference = rival(torch.float32)
    rivals = {"SparseEncoder float32": partial(encode_rival, reference)}
    if dtype_name != "float32":
        rivals[f"SparseEncoder {dtype_name}"] = partial(encode_rival, rival(dtype))
    for hint in ("LATENCY", "THROUGHPUT"):
        rivals[f"OpenVINO {dtype_name}, {hint.lower()}"] = OpenVINO(reference, dtype_name, hint).encode
    ours = SpladeEncoder(resolve(MODEL), "cpu", dtype_name, 32)
    sides = {}
    for kind, encode in rivals.items():
        size = best_batch(encode, texts)
        sides[f"{kind}, batch {size}"] = partial(encode, texts, size)
    sides["ScaleDown, batch 32"] = lambda: ours.documents(texts, lambda _: None)
    timed = paired(sides, 3 if options.quick else 7)
    rates = {side: len(texts) / result.seconds for side, result in timed.items()}
    for side, rate in rates.items():
        print(f"  {side:<40}{rate:8.1f} docs/s")

    best = max(rate for side, rate in rates.items() if side != "ScaleDown, batch 32")
    ratio = rates["ScaleDown, batch 32"] / best
    gc.collect()
    peak = statistics.median(peak_gflops(dtype) for _ in range(3))
    achieved = flops(reference, texts) / timed["ScaleDown, batch 32"].seconds / 1e9
    share = achieved / peak
    exact = timed[next(iter(sides))].result.coalesce().to_dense().numpy()
    difference = float(abs(timed["ScaleDown, batch 32"].result.toarray() - exact).max())
    if dtype_name == "float32":
        met = verdict("largest difference", f"{difference:.1e}", "1e-4", met=difference <= 1e-4)
        met &= verdict(
            "share of the matmul peak", f"{share:.0%} of {peak:.0f} GFLOP/s", "60%", met=share >= 0.6
        )
    else:
        asked = questions()
        whole = real_texts()
        first = reference.encode_document(
            whole, batch_size=4, convert_to_sparse_tensor=True, show_progress_bar=False
        )
        second = reference.encode_query(
            asked, batch_size=32, convert_to_sparse_tensor=True, show_progress_bar=False
        )
        expected = top20(*(sp.csr_matrix(part.coalesce().to_dense().numpy()) for part in (first, second)))
        found = top20(ours.documents(whole, lambda _: None), ours.queries(asked, lambda _: None))
        pairs = zip(expected, found, strict=True)
        overlap = float(np.mean([len(np.intersect1d(a, b)) / 20 for a, b in pairs]))
        met = verdict(
            f"top-20 overlap with float32, {len(asked)} questions",
            f"{overlap:.4f}",
            "0.98",
            met=overlap >= 0.98,
        )
        print(
            f"  share of the matmul peak: {share:.0%} of {peak:.0f} GFLOP/s; largest difference "
            f"{difference:.2f}"
        )
    close(name, ratio, bar, also=met)


if __name__ == "__main__":
    run("float32", "encode", 1.2)

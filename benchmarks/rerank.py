"""Reranking a planned shard against one `CrossEncoder.predict` a query and against OpenVINO.

OpenVINO computes a graph of the same model, in batches by characters, as `CrossEncoder` makes them. For query
likelihood, passages that are read once for all their questions against pairs.
"""

import random
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import arguments, close, machine, openvino_queue, paired, questions, real_texts, verdict
from models import minilm

from scaledown.data.reranker.api import score_once
from scaledown.data.reranker.base import Pair
from scaledown.data.reranker.cross_encoder import CrossEncoderReranker
from scaledown.data.reranker.query_likelihood import QueryLikelihoodReranker
from scaledown.data.retrieval import SPLADERetriever
from scaledown.models.sources import resolve
from scaledown.records import document_text

BATCH = 16
TOP = 20
FOUND = 10  # passages of a question for query likelihood, as the demo takes them


def compare(folder: Path, dtype: str, pairs: list[Pair], repeats: int) -> tuple[float, float, float]:
    """Pairs a second of all sides are printed.

    Returns our ratio to `CrossEncoder`, that to OpenVINO, and the largest difference of scores.
    """
    from sentence_transformers import CrossEncoder

    rival = CrossEncoder(str(folder), device="cpu")
    by_openvino = OpenVINO(rival.model, rival.tokenizer, dtype)  # its graph is traced in float32
    rival.model.to(getattr(torch, dtype))
    ours = CrossEncoderReranker(resolve(str(folder)), "cpu", dtype, BATCH)
    raw = torch.nn.Identity()

    def one_query_at_a_time() -> np.ndarray:
        scores = [
            rival.predict(
                pairs[low : low + TOP], batch_size=BATCH, activation_fn=raw, show_progress_bar=False
            )
            for low in range(0, len(pairs), TOP)
        ]
        return np.concatenate(scores)

    timed = paired(
        {
            "one query at a time": one_query_at_a_time,
            "OpenVINO by length": lambda: by_openvino.score(pairs),
            "by length": lambda: score_once(ours, pairs, lambda _: None),
        },
        repeats,
    )
    rates = {side: len(pairs) / result.seconds for side, result in timed.items()}
    print(f"  {dtype}: " + ", ".join(f"{side} {rate:.1f} pairs/s" for side, rate in rates.items()))
    difference = abs(np.array(timed["by length"].result) - timed["one query at a time"].result).max()
    own = rates["by length"]
    return own / rates["one query at a time"], own / rates["OpenVINO by length"], float(difference)


class OpenVINO:
    """A cross-encoder as a graph of OpenVINO."""

    def __init__(self, model: torch.nn.Module, tokenizer: object, dtype: str) -> None:
        class Logits(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
                return self.model(input_ids=ids, attention_mask=mask, token_type_ids=types).logits

        self.tokenizer = tokenizer
        self.queue = openvino_queue(Logits(), 3, dtype, "THROUGHPUT")

    def score(self, pairs: list[Pair]) -> np.ndarray:
        """The logit of each pair."""
        order = np.argsort([-len(pair.query + pair.document) for pair in pairs])
        found = np.empty(len(pairs), np.float32)

        def keep(request: object, batch: np.ndarray) -> None:
            found[batch] = request.get_output_tensor().data[:, 0]

        self.queue.set_callback(keep)
        for low in range(0, len(order), BATCH):
            batch = order[low : low + BATCH]
            texts = ([pairs[i].query for i in batch], [pairs[i].document for i in batch])
            read = self.tokenizer(*texts, padding=True, truncation=True, return_tensors="np")
            self.queue.start_async(
                [read[name] for name in ("input_ids", "attention_mask", "token_type_ids")], batch
            )
        self.queue.wait_all()
        return found


def packed(*, quick: bool) -> bool:
    """Query likelihood of real questions and the passages found for them; gives whether it met its bar.

    The shard is all questions about some articles: a passage is found for many of them.
    """
    asked = questions()[: 24 if quick else 48]
    corpus = [{"id": str(n), "title": "", "text": text} for n, text in enumerate(real_texts())]
    found = SPLADERetriever("bundled:splade-tiny").retrieve(asked, corpus, top_k=FOUND)
    pairs = [
        Pair(query, document_text(document))
        for query, documents in zip(asked, found, strict=True)
        for document in documents
    ]
    passages = len({pair.document for pair in pairs})
    print(f"query likelihood, SmolLM2-135M, float32: {len(pairs)} pairs of {passages} passages")
    sides = [QueryLikelihoodReranker(resolve("bundled:smollm2-135m"), "cpu", "float32", BATCH) for _ in "12"]
    sides[1]._together = 0  # each question with its own copy of the passage
    timed = paired(
        {
            name: lambda side=side: side.score(pairs, lambda _: None)
            for name, side in zip(("passages read once", "pair by pair"), sides, strict=True)
        },
        1 if quick else 3,
    )
    once, each = timed.values()
    print("  " + ", ".join(f"{name} {len(pairs) / side.seconds:.1f} pairs/s" for name, side in timed.items()))
    difference = float(abs(np.array(once.result) - each.result).max())
    same = verdict("largest difference of scores", f"{difference:.1e}", "1e-4", met=difference <= 1e-4)
    ratio = each.seconds / once.seconds
    return verdict("passages read once", f"{ratio:.2f}x", "1.6x", met=ratio >= 1.6) and same


def main() -> None:
    options = arguments(__doc__)
    draw = random.Random(0)
    asked = draw.sample(questions(("qed-dev", "xquad-dev")), 24 if options.quick else 48)
    # Candidates of a question are of any length, as retrieval gives them.
    texts = real_texts(("qed-dev", "xquad-dev", "cmu-dev"), least=40)
    texts = [text[:700] for text in texts]
    pairs = [Pair(question, text) for question in asked for text in draw.sample(texts, TOP)]
    print(
        f"{machine()}\n{len(asked)} real questions x {TOP} real paragraphs, MiniLM-L6's size, batch {BATCH}"
    )
    with tempfile.TemporaryDirectory() as folder:
        model = minilm(Path(folder))
        repeats = 3 if options.quick else 5
        ratio, other, difference = compare(model, "float32", pairs, repeats)
        met = verdict("largest difference of scores", f"{difference:.1e}", "1e-4", met=difference <= 1e-4)
        met &= verdict("against OpenVINO in float32", f"{other:.2f}x", "1.0x", met=other >= 1)
        half, other, _ = compare(model, "bfloat16", pairs, repeats)
        print(f"  in bfloat16 against CrossEncoder: {half:.2f}x")
        met &= verdict("against OpenVINO in bfloat16", f"{other:.2f}x", "1.0x", met=other >= 1)
    met = packed(quick=options.quick) and met
    close("rerank", ratio, 1.2, also=met)


if __name__ == "__main__":
    main()

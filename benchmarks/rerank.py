"""Reranking a planned shard by length against one `CrossEncoder.predict` a query: same model, same dtype."""

import random
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import arguments, close, machine, paired, questions, real_texts, verdict
from models import minilm

from scaledown.data.reranker import CrossEncoderReranker, Pair, score_once
from scaledown.models import resolve

BATCH = 16
TOP = 20


def compare(folder: Path, dtype: str, pairs: list[Pair], repeats: int) -> tuple[float, float]:
    """Pairs a second of both sides are printed; gives their ratio and the largest difference of scores."""
    from sentence_transformers import CrossEncoder

    rival = CrossEncoder(str(folder), device="cpu", model_kwargs={"dtype": getattr(torch, dtype)})
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
            "by length": lambda: score_once(ours, pairs, lambda _: None),
        },
        repeats,
    )
    rates = {side: len(pairs) / result.seconds for side, result in timed.items()}
    print(f"  {dtype}: " + ", ".join(f"{side} {rate:.1f} pairs/s" for side, rate in rates.items()))
    difference = abs(np.array(timed["by length"].result) - timed["one query at a time"].result).max()
    return rates["by length"] / rates["one query at a time"], float(difference)


def main() -> None:
    options = arguments(__doc__)
    draw = random.Random(0)
    asked = draw.sample(questions(("qed-dev", "xquad-dev")), 12 if options.quick else 48)
    # Candidates of a question are of any length, as retrieval gives them.
    texts = real_texts(("qed-dev", "xquad-dev", "cmu-dev"), least=40)
    texts = [text[:700] for text in texts]
    pairs = [Pair(question, text) for question in asked for text in draw.sample(texts, TOP)]
    print(
        f"{machine()}\n{len(asked)} real questions x {TOP} real paragraphs, MiniLM-L6's size, batch {BATCH}"
    )
    with tempfile.TemporaryDirectory() as folder:
        model = minilm(Path(folder))
        ratio, difference = compare(model, "float32", pairs, 2 if options.quick else 5)
        met = verdict("largest difference of scores", f"{difference:.1e}", "1e-4", met=difference <= 1e-4)
        half, _ = compare(model, "bfloat16", pairs, 2 if options.quick else 5)
        print(f"  in bfloat16: {half:.2f}x")
    close("rerank", ratio, 1.2, also=met)


if __name__ == "__main__":
    main()

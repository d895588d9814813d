"""The whole pipeline against a straightforward script (`baseline`): same models, data, batches and dtype.

Both sides run in processes of their own, load their models themselves and use the transformers teacher.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import arguments, child, close, machine, questions, real_texts
from models import minilm

PASSAGES, QUERIES = 2000, 100
TOP, KEEP, NEW_TOKENS, BATCH = 20, 5, 32, 8


def data(quick: bool) -> tuple[list[dict[str, str]], list[str]]:
    """Real paragraphs of at most 128 words, and real questions over some of them."""
    draw = random.Random(0)
    texts = real_texts(("xquad-dev", "qed-dev", "cmu-dev"), least=100)
    passages = [
        {"id": str(number), "title": title, "text": " ".join(text.split()[:90])}
        for number, (title, _, text) in enumerate(text.partition("\n") for text in texts)
    ]
    count = (PASSAGES // 5, QUERIES // 5) if quick else (PASSAGES, QUERIES)
    return passages[: count[0]], draw.sample(questions(("xquad-dev", "qed-dev")), count[1])


def baseline(folder: Path, dtype: str) -> None:
    """In a process of its own: the script, its seconds as JSON."""
    import torch
    from baseline import run

    from scaledown.models.sources import resolve
    from scaledown.models.weights import loadable

    passages = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    started = time.perf_counter()
    seconds, _ = run(
        [f"{passage['title']}\n{passage['text']}" for passage in passages],
        (folder / "queries.txt").read_text().splitlines(),
        {
            "retriever": loadable(resolve("bundled:splade-tiny"))[0],
            "reranker": str(folder / "minilm"),
            "teacher": loadable(resolve("bundled:smollm2-135m"))[0],
        },
        dtype=getattr(torch, dtype),
        encode_batch=4,  # its best on CPU: larger ones drown in logits
        top_k=TOP,
        keep=KEEP,
        max_new_tokens=NEW_TOKENS,
        teacher_batch=BATCH,
    )
    print(json.dumps(seconds | {"in all": time.perf_counter() - started}))


def ours(folder: Path, dtype: str, name: str) -> dict[str, float]:
    """The command, as a user types it; seconds by its manifest, in all by the clock."""
    words = [
        *(sys.executable, "-m", "scaledown.data.prepare_dataset", "--device", "cpu", "--dtype", dtype),
        *("--corpus_path", str(folder / "corpus.jsonl"), "--queries_file", str(folder / "queries.txt")),
        *("--retriever_model", "bundled:splade-tiny", "--reranker_model", str(folder / "minilm")),
        *("--teacher_model", "bundled:smollm2-135m", "--output_file", str(folder / name)),
        *("--passages", "article", "--top_k_retrieval", str(TOP), "--top_k_reranking", str(KEEP)),
        *("--max_new_tokens", str(NEW_TOKENS), "--teacher_batch_size", str(BATCH)),
    ]
    started = time.perf_counter()
    subprocess.run(words, check=True, capture_output=True)
    seconds = time.perf_counter() - started
    stages = json.loads((folder / f"{name}.work" / "manifest.json").read_text())["stages"]
    return {stage: found["seconds"] for stage, found in stages.items()} | {"in all": seconds}


def main() -> None:
    options = arguments(__doc__)
    dtype = "bfloat16"
    passages, asked = data(options.quick)
    print(f"{machine()}\n{len(passages):,} passages, {len(asked)} queries, {TOP} reranked to {KEEP}, {dtype}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        minilm(folder / "minilm")
        (folder / "corpus.jsonl").write_text("".join(json.dumps(passage) + "\n" for passage in passages))
        (folder / "queries.txt").write_text("\n".join(asked) + "\n")
        runs: dict[str, list[dict[str, float]]] = {"script": [], "ScaleDown": []}
        for number in range(1 if options.quick else 3):
            runs["script"].append(child([str(Path(__file__)), "--baseline", str(folder), dtype]))
            runs["ScaleDown"].append(ours(folder, dtype, f"{number}.json"))
    names = ("queries", "passages", "vectors", "candidates", "ranked", "answers", "in all")
    median = {
        side: {name: statistics.median(run.get(name, 0.0) for run in found) for name in names}
        for side, found in runs.items()
    }
    print(f"  {'stage':<11} {'script':>9} {'ScaleDown':>10}")
    for name in names:
        print(f"  {name:<11} {median['script'][name]:>7.1f} s {median['ScaleDown'][name]:>8.1f} s")
    close("pipeline", median["script"]["in all"] / median["ScaleDown"]["in all"], 1.5)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--baseline"]:
        baseline(Path(sys.argv[2]), sys.argv[3])
    else:
        main()

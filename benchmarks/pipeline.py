"""The whole pipeline against a straightforward script (`baseline`): same models, data, batches and dtype.

All sides run in processes of their own, load their models themselves and use the transformers teacher. Ours
also runs with OpenVINO's, whose weights have 8 bits, after its export. Then what 1,000 queries more cost
while no model computes: SPLADE-tiny, and a reranker and a teacher of one layer, 16 wide, so that little is
hidden behind them. The teacher writes one token.
"""

import contextlib
import functools
import io
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import arguments, child, close, machine, questions, real_texts, verdict
from models import hardly_any, minilm

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


def ours(folder: Path, dtype: str, name: str, teacher: str) -> dict[str, float]:
    """The command, as a user types it; seconds by its manifest, in all by the clock."""
    words = [
        *(sys.executable, "-m", "scaledown.data.prepare_dataset", "--device", "cpu", "--dtype", dtype),
        *("--corpus_path", str(folder / "corpus.jsonl"), "--queries_file", str(folder / "queries.txt")),
        *("--retriever_model", "bundled:splade-tiny", "--reranker_model", str(folder / "minilm")),
        *("--teacher_model", "bundled:smollm2-135m", "--output_file", str(folder / name)),
        *("--passages", "article", "--top_k_retrieval", str(TOP), "--top_k_reranking", str(KEEP)),
        *("--max_new_tokens", str(NEW_TOKENS), "--teacher_batch_size", str(BATCH)),
        *("--teacher_backend", teacher),
    ]
    started = time.perf_counter()
    subprocess.run(words, check=True, capture_output=True)
    seconds = time.perf_counter() - started
    stages = json.loads((folder / f"{name}.work" / "manifest.json").read_text())["stages"]
    return {stage: found["seconds"] for stage, found in stages.items()} | {"in all": seconds}


def outside(folder: Path, *, quick: bool) -> float:
    """Seconds for 1,000 queries more in which no model computes."""
    hardly_any(folder)
    asked = questions(("xquad-dev",) if quick else ("xquad-dev", "qed-dev", "cmu-dev"))
    passages = [{"id": str(n), "title": "", "text": text} for n, text in enumerate(real_texts())]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(passage) + "\n" for passage in passages))
    counts = (len(asked) // 10, len(asked))
    for count in counts:
        (folder / f"{count}.txt").write_text("\n".join(asked[:count]) + "\n")
    found: dict[int, list[float]] = {count: [] for count in counts}
    for number in range(4):
        for count, seconds in found.items():
            seconds.append(child([__file__, "--outside", str(folder), str(count), f"{count}-{number}.json"]))
    few, many = (statistics.median(seconds[1:]) for seconds in found.values())  # the first makes the index
    return (many - few) / (counts[1] - counts[0]) * 1000


def outside_once(folder: Path, count: str, name: str) -> None:
    """In a process of its own: a run, its seconds without a model at work as JSON."""
    from transformers import BertForMaskedLM, BertForSequenceClassification, LlamaForCausalLM

    from scaledown.data import prepare_dataset
    from scaledown.data.retrieval import splade

    spans: list[tuple[float, float]] = []

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def measured(*given: Any, **named: Any) -> Any:
            begun = time.perf_counter()
            try:
                return call(*given, **named)
            finally:
                spans.append((begun, time.perf_counter()))

        return measured

    for kind in (BertForMaskedLM, BertForSequenceClassification, LlamaForCausalLM):
        kind.forward = timed(kind.forward)
    splade.max_logits = timed(splade.max_logits)
    words = [
        *("--device", "cpu", "--dtype", "float32", "--queries_file", str(folder / f"{count}.txt")),
        *("--corpus_path", str(folder / "corpus.jsonl"), "--index_dir", str(folder / "index")),
        *("--retriever_model", "bundled:splade-tiny", "--reranker_model", str(folder / "reranker")),
        *("--teacher_model", str(folder / "teacher"), "--teacher_backend", "transformers"),
        *("--top_k_retrieval", str(TOP), "--top_k_reranking", str(KEEP), "--max_new_tokens", "1"),
        *("--teacher_batch_size", "32", "--output_file", str(folder / name)),
    ]
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        status = prepare_dataset.main(words)
    seconds, last = time.perf_counter() - started, 0.0
    for begun, ended in sorted(spans):  # several threads compute at the same time
        seconds -= max(0.0, ended - max(begun, last))
        last = max(last, ended)
    assert status == 0, status
    print(json.dumps(seconds))


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
        sides = {
            "script": lambda number: child([str(Path(__file__)), "--baseline", str(folder), dtype]),
            "same teacher": lambda number: ours(folder, dtype, f"same-{number}.json", "transformers"),
            "OpenVINO": lambda number: ours(folder, dtype, f"own-{number}.json", "openvino"),
        }
        once = ours(folder, dtype, "once.json", "openvino")
        print(f"  the first run with OpenVINO, with the export if there was none: {once['in all']:.1f} s")
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for number in range(1 if options.quick else 3):
            for side, run in sides.items():
                runs[side].append(run(number))
        names = ("queries", "passages", "vectors", "candidates", "ranked", "answers", "in all")
        median = {
            side: {name: statistics.median(run.get(name, 0.0) for run in found) for name in names}
            for side, found in runs.items()
        }
        print(f"  {'stage':<11}" + "".join(f"{side:>14}" for side in sides))
        for name in names:
            print(f"  {name:<11}" + "".join(f"{median[side][name]:>12.1f} s" for side in sides))
        (folder / "outside").mkdir()
        cost = outside(folder / "outside", quick=options.quick)
    met = verdict("outside models, 1,000 queries", f"{cost:.1f} s", "at most 5 s", met=cost <= 5)
    whole = {side: found["in all"] for side, found in median.items()}
    same = whole["script"] / whole["same teacher"]
    met &= verdict("with the same teacher", f"{same:.2f}x", "1.6x", met=same >= 1.6)
    close("pipeline", whole["script"] / whole["OpenVINO"], 2.5, also=met)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--baseline"]:
        baseline(Path(sys.argv[2]), sys.argv[3])
    elif sys.argv[1:2] == ["--outside"]:
        outside_once(Path(sys.argv[2]), *sys.argv[3:])
    else:
        main()

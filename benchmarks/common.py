"""What the benchmarks share: real and synthetic data, paired timing, and the closing line."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
VOCABULARY = 30_522
SHARD = 8192


def parser(description: str) -> argparse.ArgumentParser:
    """With `--quick`: less of the same, within 180 s on two cores."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--quick", action="store_true", help="do less of the same")
    return made


def arguments(description: str) -> argparse.Namespace:
    """Where there is nothing but `--quick`."""
    return parser(description).parse_args()


def machine() -> str:
    """Processor, cores and versions, to be printed above the figures."""
    import torch

    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {model}, Python {platform.python_version()}, torch {torch.__version__}"


def fast_dtype() -> str:
    """`bfloat16` where the processor multiplies it; elsewhere torch emulates it, 40 times as slow on AVX2."""
    from scaledown.devices.choice import multiplies_bfloat16

    return "bfloat16" if multiplies_bfloat16() else "float32"


def openvino_queue(model: Any, inputs: int, dtype: str, hint: str) -> Any:
    """Compile a torch module for OpenVINO, and give a queue of requests on all threads.

    The module takes so many `inputs` of token ids or masks, [batch, length]. Hints: LATENCY, THROUGHPUT.
    """
    import torch

    from scaledown.devices.openvino import openvino

    library = openvino("this rival")
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of each branch
        example = (torch.ones(2, 4, dtype=torch.long),) * inputs
        graph = library.convert_model(model.eval(), example_input=example)
    settings = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": hint,
    }
    return library.AsyncInferQueue(library.Core().compile_model(graph, "CPU", settings))


def close(name: str, ratio: float, bar: float, *, also: bool = True, lower: bool = False) -> None:
    """Print the last line and leave: with status 1 when the bar, or one of those printed above, is missed."""
    print(f"{name}: ratio {ratio:.2f} (bar {bar}{', at most' if lower else ''})")
    sys.exit(0 if also and (ratio <= bar if lower else ratio >= bar) else 1)


def verdict(what: str, value: str, bar: str, *, met: bool) -> bool:
    """Print a figure that has a bar of its own; gives whether it was met."""
    print(f"  {what}: {value} (bar {bar}) {'' if met else 'MISSED'}".rstrip())
    return met


class Timed(NamedTuple):
    """Median seconds of several runs, and the result of the last."""

    seconds: float
    result: Any


def paired(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Timed]:
    """Run each side once to warm up, then all sides in turn, `repeats` times."""
    results = {name: side() for name, side in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            started = time.perf_counter()
            results[name] = side()
            seconds[name].append(time.perf_counter() - started)
    return {name: Timed(statistics.median(seconds[name]), results[name]) for name in sides}


def peak_gflops(dtype: Any) -> float:
    """The machine's best rate of a large matrix product, GFLOP/s."""
    import torch

    size = 4096
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
    left @ right
    seconds = []
    for _ in range(8):
        started = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds) / 1e9


def questions(folders: Sequence[str] = ("xquad-dev",)) -> list[str]:
    """Real questions over the articles of `real_texts`."""
    found = []
    for folder in folders:
        lines = (SHARED / folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()
        found += [json.loads(line)["question"] for line in lines]
    return found


def real_texts(folders: Sequence[str] = ("xquad-dev",), least: int = 200) -> list[str]:
    """Paragraphs of real articles, with their titles, of at least so many characters."""
    texts = []
    for folder in folders:
        for line in (SHARED / folder / "kilt.jsonl").read_text(encoding="utf-8").splitlines():
            article = json.loads(line)
            texts += [f"{article['wikipedia_title']}\n{text.strip()}" for text in article["text"][1:]]
    return [text for text in texts if len(text) >= least]


def synthetic(passages: int, seed: int = 0) -> Iterator[sp.csr_matrix]:
    """Shards of sparse vectors that look like SPLADE's: about 120 non-zeros a passage.

    Each passage is about one of 512 topics, touches two others and has some terms of no topic; terms are
    distributed as in text (Zipf). The spread of a query's scores is that of real questions over real
    articles: the 2nd, 5th, 20th, 100th and 1,000th of 8,192 passages score 0.78, 0.60, 0.49, 0.38 and 0.21
    of the first (SPLADE-tiny, medians), here 0.79, 0.66, 0.52, 0.37 and 0.15. A shard depends only on
    `seed` and its number.
    """
    topics = _topics(np.random.default_rng(seed))
    for number, first in enumerate(range(0, passages, SHARD)):
        random = np.random.default_rng((seed, number))
        yield _mixtures(random, topics, min(SHARD, passages - first), _DRAWS)


def synthetic_queries(count: int, seed: int = 0) -> sp.csr_matrix:
    """Queries about passages of the first shard: some 20 of a passage's strongest terms, reweighted."""
    random = np.random.default_rng((seed, 1 << 30))
    first = next(synthetic(SHARD, seed))
    chosen = first[random.choice(first.shape[0], count, replace=count > SHARD)].tocoo()
    strength = chosen.data * random.random(chosen.nnz)
    order = np.lexsort((-strength, chosen.row))
    rank = np.arange(chosen.nnz) - np.searchsorted(chosen.row[order], chosen.row[order])
    kept = order[rank < random.integers(12, 28, count)[chosen.row[order]]]
    weights = (chosen.data[kept] * (0.5 + random.random(len(kept)))).astype(np.float32)
    return sp.csr_matrix((weights, (chosen.row[kept], chosen.col[kept])), shape=chosen.shape)


_TOPICS, _TERMS, _DRAWS = 128, 512, 180


def _topics(random: np.random.Generator) -> np.ndarray:
    """Terms of each topic, [topics, terms], the topic's own first."""
    frequency = 1 / (np.arange(VOCABULARY) + 15.0)
    steps = np.cumsum(frequency / frequency.sum())
    return np.searchsorted(steps, random.random((_TOPICS, _TERMS))).clip(max=VOCABULARY - 1)


def _mixtures(random: np.random.Generator, topics: np.ndarray, count: int, draws: int) -> sp.csr_matrix:
    mixed = random.integers(0, _TOPICS, (count, 3))
    part = np.searchsorted([0.72, 0.82, 0.9], random.random((count, draws)))  # 3: no topic
    share = random.random((count, draws)) ** 3
    place = (share * _TERMS).astype(np.int64)
    own = topics[mixed[np.arange(count)[:, None], part.clip(max=2)], place]
    background = topics[random.integers(0, _TOPICS, (count, draws)), place]
    drawn = np.where(part < 3, own, background)
    strength = np.where(part < 3, 0.2 + 2.2 * (1 - share) ** 3, 0.3) * random.gamma(6.0, 1 / 6, drawn.shape)
    order = np.lexsort((-strength, drawn), axis=1)
    terms = np.take_along_axis(drawn, order, 1)
    first = np.ones_like(terms, bool)
    first[:, 1:] = terms[:, 1:] != terms[:, :-1]
    weights = np.take_along_axis(strength, order, 1)[first].clip(max=3.5).astype(np.float16)
    starts = np.concatenate([[0], np.cumsum(first.sum(1))])
    return sp.csr_matrix((weights.astype(np.float32), terms[first], starts), shape=(count, VOCABULARY))


def child(words: Sequence[str]) -> dict[str, Any]:
    """Run a benchmark's own file again as a process of its own; its last line of output is JSON."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])

"""A simulation, not a measurement: 893,000 queries over all of KILT on 1, 8 and 64 GPUs.

Measured here, in this run, on the code that would run there: how fast a corpus is cut and searched, what a
shard costs besides its work, and how unevenly long equal shards of a search take. Reckoned from processor
time: how fast the one process can be that reads the corpus and writes passages. Taken from elsewhere, with
their sources below: the sizes of corpus and models, a GPU's peak. Assumed: how much of the peak is reached;
that a search is as fast on each core of many as on those here, and vectors are read for free; that shards of
all stages are as uneven.
"""

import functools
import heapq
import math
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from common import SHARD, SHARED, arguments, close, machine, synthetic, synthetic_queries

from scaledown.config.index import IndexConfig
from scaledown.data.input.corpus import build_passages
from scaledown.data.retrieval.index import pack, search
from scaledown.models.sources import resolve
from scaledown.run.directory import RunDirectory
from scaledown.run.executor import cores
from scaledown.run.stage import Stage

KILT_BYTES = 35e9  # and 5.9 million articles (github.com/facebookresearch/KILT)
PASSAGES = 30_000_000  # of 128 tokens, from the passages per byte of real articles (docs/results.md)
QUERIES = 893_000  # OSCAR, arXiv 2504.07109, section 4
TOP_K = 20
PEAK = 989e12  # FLOP/s of an H100 in bfloat16, dense (NVIDIA's data sheet)
REACHED = 0.35  # of it: assumed
GPUS_A_BOX, CORES_A_GPU = 8, 16  # assumed: boxes of 8 GPUs and 128 cores; one of them cuts the corpus
TEACHERS_AT_ONCE = 16  # shards that vLLM is given together (prepare_dataset)
LOADING = {
    "vectors": 10.0,
    "candidates": 5.0,
    "ranked": 10.0,
    "answers": 60.0,
}  # s, assumed: models from disk

# FLOPs of one row: 2 x parameters x tokens, of the paper's models.
ENCODE = 2 * 128 * (85e6 + 768 * 30_522)  # SPLADE-v3: BERT-base and its head, 128 tokens
RERANK = 2 * 304e6 * 170 * TOP_K  # DeBERTa-v3-large, question and passage together
TEACH = 2 * 7.1e9 * (750 + 40)  # Mistral-7B, five passages and the prompt, an answer

BAR = 6.0


class Measured(NamedTuple):
    """What this machine says."""

    cutting: float
    """Bytes a second and core."""
    reading: float
    """Bytes a second of the one process that reads the corpus and writes what the others have cut."""
    searching: float
    """Queries times passages a second, on all cores."""
    shard: float
    """Seconds of a shard besides its work: lease, file, journal."""
    spread: float
    """Standard deviation of equal shards' seconds over their mean."""


class Ran(NamedTuple):
    """A simulated stage: hours, and the share of its workers' time that was work."""

    hours: float
    busy: float


def measure(*, quick: bool) -> Measured:
    """Measure it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lines = b"".join((SHARED / name / "kilt.jsonl").read_bytes() for name in ("cmu-dev", "qed-dev"))
        corpus = folder / "kilt.jsonl"
        corpus.write_bytes(lines * (12 if quick else 60))  # enough for several processes
        run = RunDirectory(folder / "run")
        before = spent()
        build_passages(Stage(run, "passages", {}), IndexConfig(), [corpus], resolve("bundled:splade-tiny"))
        own, others = (after - at_first for after, at_first in zip(spent(), before, strict=True))
        cutting, reading = (corpus.stat().st_size / seconds for seconds in (own + others, own))

        rows = 100_000 if quick else 400_000
        shards = [pack(vectors) for vectors in synthetic(rows)]
        sizes = [shard.num_rows for shard in shards]
        queries = synthetic_queries(512)
        loads = [functools.partial(shards.__getitem__, number) for number in range(len(shards))]
        search(queries[:8], loads[:1], sizes[:1], TOP_K)  # compiles
        started = time.perf_counter()
        search(queries, loads, sizes, TOP_K)
        searching = 512 * sum(sizes) / (time.perf_counter() - started)

        count = 200 if quick else 1000
        table = pa.table({"n": list(range(256))})
        started = time.perf_counter()
        Stage(run, "ranked", {}).complete(count, lambda _: table)
        shard = (time.perf_counter() - started) / count

        seconds = []
        for part in range(8 if quick else 24):
            own = slice(part % (len(shards) - 1), part % (len(shards) - 1) + 1)
            started = time.perf_counter()
            search(queries[:256], loads[own], sizes[own], TOP_K)
            seconds.append(time.perf_counter() - started)
        spread = statistics.stdev(seconds) / statistics.mean(seconds)
    return Measured(cutting, reading, searching, shard, spread)


def spent() -> tuple[float, float]:
    """Processor seconds of this process, and of its children that have ended."""
    sides = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    own, others = (side.ru_utime + side.ru_stime for side in sides)
    return own, others


def stage(ready: Sequence[float], seconds: float, workers: int, loading: float, measured: Measured) -> Ran:
    """Workers take the next shard that is `ready`, each of about `seconds`, until none is left."""
    draw = random.Random(0)
    free = [loading] * workers
    worked = 0.0
    for moment in ready:
        begin = max(heapq.heappop(free), moment)
        own = seconds * max(0.1, draw.gauss(1.0, measured.spread))
        worked += own
        heapq.heappush(free, begin + own + measured.shard)
    last = max(free)
    return Ran(last / 3600, worked / (last * workers))


def simulate(gpus: int, per_shard: int, measured: Measured) -> dict[str, Ran]:
    """A run's stages, one after the other but for passages and vectors."""
    power = PEAK * REACHED
    passages = math.ceil(PASSAGES / SHARD)
    rate = min(measured.cutting * CORES_A_GPU * min(gpus, GPUS_A_BOX), measured.reading)
    cut = KILT_BYTES / rate / passages
    cutting = [cut * (number + 1) for number in range(passages)]
    shards = math.ceil(QUERIES / per_shard)
    together = max(1, 4096 // per_shard)  # shards of queries that are searched at once
    groups = math.ceil(shards / together)
    taught = min(TEACHERS_AT_ONCE, shards)
    given = math.ceil(shards / taught)
    own_cores = measured.searching * CORES_A_GPU / cores()
    asked = per_shard * together * PASSAGES / own_cores
    return {
        "passages": Ran(cutting[-1] / 3600, 1.0),
        "vectors": stage(cutting, ENCODE * SHARD / power, gpus, LOADING["vectors"], measured),
        "candidates": stage([0.0] * groups, asked, gpus, LOADING["candidates"], measured),
        "ranked": stage([0.0] * shards, RERANK * per_shard / power, gpus, LOADING["ranked"], measured),
        "answers": stage(
            [0.0] * given, TEACH * per_shard * taught / power, gpus, LOADING["answers"], measured
        ),
    }


def hours(stages: dict[str, Ran]) -> float:
    """Of the whole run: vectors end after passages."""
    return sum(ran.hours for name, ran in stages.items() if name != "passages")


def main() -> None:
    options = arguments(__doc__)
    print(machine())
    measured = measure(quick=options.quick)
    print("measured here:")
    print(
        f"  cutting {measured.cutting / 1e6:.1f} MB/s and core, at most {measured.reading / 1e6:.0f} MB/s "
        "by the processor time of the one process that reads and writes"
    )
    print(f"  searching {measured.searching / 1e6:,.0f} million queries x passages a second")
    print(f"  a shard costs {1e3 * measured.shard:.1f} ms besides its work")
    print(f"  equal shards spread {measured.spread:.1%}")
    print(f"assumed: {REACHED:.0%} of {PEAK / 1e12:.0f} TFLOP/s and {CORES_A_GPU} cores a GPU")
    sizes = (64, 256, 1024, 4096, 16384)
    counts = (1, 8, 64)
    runs = {gpus: simulate(gpus, 256, measured) for gpus in counts}
    print(f"\nSIMULATED hours of each stage, {QUERIES:,} queries, {PASSAGES:,} passages, 256 queries a shard")
    print(f"  {'':<12}" + "".join(f"{gpus:>8} GPU{'s' if gpus > 1 else ' '}  (busy)" for gpus in counts))
    for name in runs[1]:
        cells = "".join(
            f"{runs[gpus][name].hours:>11.2f} h  {runs[gpus][name].busy:>6.0%}" for gpus in counts
        )
        print(f"  {name:<12}{cells}")
    print(f"  {'all':<12}" + "".join(f"{hours(runs[gpus]):>11.2f} h  {'':>6}" for gpus in counts))
    print("\nSIMULATED hours of candidates, ranked and answers, by queries a shard")
    best = {}
    for size in sizes:
        own = {gpus: simulate(gpus, size, measured) for gpus in counts}
        spent = {
            gpus: sum(own[gpus][name].hours for name in ("candidates", "ranked", "answers"))
            for gpus in counts
        }
        best[size] = spent
        print(f"  {size:>10,}" + "".join(f"{spent[gpus]:>11.2f} h  {'':>6}" for gpus in counts))
    for gpus in counts:
        longest = max(runs[gpus], key=lambda name: runs[gpus][name].hours * runs[gpus][name].busy)
        size = min(sizes, key=lambda one: best[one][gpus])
        share = runs[gpus][longest].hours / hours(runs[gpus])
        print(
            f"  {gpus} GPUs: saturated first: {longest}, {share:.0%} of the run; best shard {size:,} queries"
        )
    print(
        "(ratio: how much faster 8 GPUs are than one at what queries cost; passages are cut by one machine)"
    )
    close("simulate_cluster", best[256][1] / best[256][8], BAR)


if __name__ == "__main__":
    main()

"""Peak memory of making an index of synthetic vectors and searching it, as the corpus grows.

Also the cost as work grows: time, memory and disk at three sizes, and a line fitted through them.
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import arguments, child, close, machine, synthetic_queries, verdict

QUERIES = 1000
KILT_PASSAGES = 30_000_000
KILT_QUERIES = 893_000


def measure(passages: int) -> None:
    """In a process of its own: build, search, print what it took."""
    import torch  # noqa: F401  (as in a real run, whose memory it is part of)
    from search import ours, stored

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        stage = stored(folder, passages)
        built = time.perf_counter() - started
        queries = synthetic_queries(QUERIES)
        ours(stage, queries[:2])
        started = time.perf_counter()
        ours(stage, queries)
        searched = time.perf_counter() - started
        disk = sum(file.stat().st_size for file in stage.folder.iterdir())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"built": built, "searched": searched, "disk": disk, "peak": peak}))


def main() -> None:
    options = arguments(__doc__)
    print(machine())
    sizes = (10_000, 50_000, 250_000) if options.quick else (10_000, 50_000, 100_000, 1_000_000)
    found = {}
    print(f"  {'passages':>9} {'make and write':>15} {'1,000 queries':>14} {'memory':>9} {'disk':>9}")
    for size in sizes:
        found[size] = child([str(Path(__file__)), "--measure", str(size)])
        row = found[size]
        print(
            f"  {size:>9,} {row['built']:>13.1f} s {row['searched']:>12.2f} s {row['peak'] / 1e6:>6,.0f} MB "
            f"{row['disk'] / 1e6:>6,.0f} MB"
        )
    print(
        f"Fitted to {KILT_PASSAGES:,} passages of the same kind, {KILT_QUERIES:,} queries in blocks of 4,096:"
    )
    for what, unit, factor in (("searched", "h", KILT_QUERIES / QUERIES / 3600), ("disk", "GB", 1e-9)):
        slope, start = np.polyfit(list(found), [row[what] for row in found.values()], 1)
        print(f"  {what}: {(slope * KILT_PASSAGES + start) * factor:,.1f} {unit}")
    largest = max(sizes)
    peak = found[largest]["peak"]
    met = verdict(f"peak memory at {largest:,}", f"{peak / 1e9:.2f} GB", "2 GB", met=peak < 2e9)
    close("memory", peak / found[50_000]["peak"], 1.3, also=met, lower=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(int(sys.argv[2]))
    else:
        main()

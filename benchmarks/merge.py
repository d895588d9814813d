"""Peak memory and speed of `scaledown merge`, as the files grow in number: real texts, repeated.

What must grow is what finds queries that come again, a hash for each. What 100 files of 1 GB would need is
extrapolated from that, and said to be. Speed is that of the text, however small its files are.
"""

import itertools
import json
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

from common import arguments, child, close, machine, questions, real_texts

GIGABYTES = 100


def make(folder: Path, ending: str, files: int, size: float) -> tuple[list[Path], int]:
    """So many files of about `size` bytes of text: real texts and questions, numbered to be different."""
    from scaledown.data.output.writers import write_examples

    texts = itertools.cycle(real_texts())
    asked = itertools.cycle(questions())
    numbers = itertools.count()

    def records():
        written = 0
        while written < size:
            documents = list(itertools.islice(texts, 5))
            written += sum(map(len, documents)) + 200
            yield {
                "query": f"{next(asked)} ({next(numbers)})",
                "documents": documents,
                "answer": documents[0][:80],
                "reranking_scores": [4.5, 3.25, 0.5, -1.0, -7.75],
            }

    paths = [folder / f"{number}{ending}" for number in range(files)]
    return paths, sum(write_examples(path, records()) for path in paths)


def measure(output: str, *paths: str) -> None:
    """In a process of its own: merge, print what it took."""
    from scaledown.data.output.merge import merge

    before = peak()
    started = time.perf_counter()
    merged = merge([Path(path) for path in paths], Path(output), allow_different_settings=True)
    seconds = time.perf_counter() - started
    print(json.dumps({"before": before, "peak": peak(), "seconds": seconds, "records": merged.records}))


def peak() -> int:
    """The most memory that this process ever had, in bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def hash_size() -> float:
    """Bytes a query, of a million, to know those that come again."""
    from scaledown.data.input.seen import Seen

    tracemalloc.start()
    seen = Seen()
    for number in range(1_000_000):
        seen.add(str(number))
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size / 1_000_000


def main() -> None:
    options = arguments(__doc__)
    print(machine())
    files, size = (4, 4e6) if options.quick else (10, 100e6)
    print(f"  {'':9} {'files':>5} {'size':>9} {'records':>9} {'at start':>9} {'peak':>9} {'speed':>10}")
    worst, a_query = 0.0, hash_size()
    for ending in (".json", ".jsonl", ".parquet"):
        rows = []
        for count in (files, 4 * files):
            with tempfile.TemporaryDirectory() as folder:
                paths, records = make(Path(folder), ending, count, size)
                data = sum(path.stat().st_size for path in paths)
                words = [str(Path(__file__)), "--measure", str(Path(folder) / f"full{ending}")]
                row = child([*words, *map(str, paths)])
            assert row["records"] == records
            rows.append(row)
            print(
                f"  {ending:<9} {count:>5} {data / 1e6:>6,.0f} MB {records:>9,} "
                f"{row['before'] / 1e6:>6,.0f} MB {row['peak'] / 1e6:>6,.0f} MB "
                f"{size * count / 1e6 / row['seconds']:>5,.0f} MB/s"
            )
        one, four = rows
        worst = max(worst, four["peak"] / one["peak"])
    queries = GIGABYTES * 1e9 / (4 * files * size / four["records"])
    print(
        f"  {a_query:.0f} bytes a query to know it again; extrapolated to {queries / 1e6:.0f} million "
        f"queries, {GIGABYTES} GB of text: {a_query * queries / 1e9:.1f} GB"
    )
    close("merge", worst, 1.2, lower=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
    else:
        main()

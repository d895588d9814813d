"""Passages from KILT lines: MB/s on one core, and with several processes."""

import os
import tempfile
import time
from pathlib import Path

from common import SHARED, arguments, close, machine

from scaledown.config.index import IndexConfig
from scaledown.data.input.corpus import build_passages
from scaledown.models.sources import resolve
from scaledown.run.directory import RunDirectory
from scaledown.run.executor import cores
from scaledown.run.stage import Stage


def passages(corpus: Path, folder: str) -> tuple[float, int]:
    """Seconds, and passages made, by a process a core."""
    config = IndexConfig(corpus_path=(str(corpus),))
    stage = Stage(RunDirectory(Path(folder)), "passages", {})
    started = time.perf_counter()
    build_passages(stage, config, [corpus], resolve("bundled:splade-tiny"))
    return time.perf_counter() - started, sum(stage.finished().rows)


def main() -> None:
    options = arguments(__doc__)
    print(machine())
    lines = b"".join(
        (SHARED / name / "kilt.jsonl").read_bytes() for name in ("cmu-dev", "qed-dev", "xquad-dev")
    )
    copies = 25 if options.quick else 75  # above the size from which several processes are used
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "kilt.jsonl"
        corpus.write_bytes(lines * copies)
        size = corpus.stat().st_size / 1e6
        print(f"{size:.0f} MB of KILT lines (real articles, {copies} times), passages of 128 tokens")
        passages(_first(corpus, len(lines)), f"{folder}/warm")
        rates = {}
        for workers in sorted({1, 2, cores()}):
            own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
            if own:
                os.sched_setaffinity(0, sorted(own)[:workers])
            seconds, count = passages(corpus, f"{folder}/{workers}")
            if own:
                os.sched_setaffinity(0, own)
            rates[workers] = size / seconds
            print(f"  {workers} process(es): {rates[workers]:.1f} MB/s, {count / seconds:,.0f} passages/s")
        hours = {workers: 35_000 / rate / 3600 for workers, rate in rates.items()}
        print("  35 GB of KILT: " + ", ".join(f"{h:.1f} h with {workers}" for workers, h in hours.items()))
    close("ingest", rates[max(rates)] / rates[1], 0)


def _first(corpus: Path, size: int) -> Path:
    part = corpus.with_name("first.jsonl")
    part.write_bytes(corpus.read_bytes()[:size])
    return part


if __name__ == "__main__":
    main()

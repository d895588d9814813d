"""A run killed at random moments (SIGKILL) and started again, against one left alone: equal bytes."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import arguments, close, machine
from models import minilm

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def words(folder: Path, model: Path, name: str) -> list[str]:
    """The command: real models but the reranker, and shards so small that each kill falls in another one."""
    return [
        *(sys.executable, "-m", "scaledown.data.prepare_dataset", "--preset", "demo", "--device", "cpu"),
        *("--corpus_path", str(EXAMPLES / "corpus.jsonl"), "--queries_file", str(EXAMPLES / "queries.txt")),
        *("--reranker_model", str(model), "--passages_per_shard", "16", "--queries_per_shard", "2"),
        *("--output_file", str(folder / name), "--max_new_tokens", "24"),
    ]


def differing(whole: Path, other: Path) -> Path | None:
    """The first shard, in the order of the stages, that two runs do not share."""
    works = [output.with_name(output.name + ".work") for output in (whole, other)]
    for stage in ("queries", "passages", "vectors", "candidates", "ranked", "answers"):
        for shard in sorted(works[0].glob(f"{stage}/*/*.arrow")):
            twin = works[1] / shard.relative_to(works[0])
            if not twin.exists() or twin.read_bytes() != shard.read_bytes():
                return shard.relative_to(works[0])
    return None


def main() -> None:
    options = arguments(__doc__)
    kills = 5 if options.quick else 20
    draw = random.Random(0)
    print(machine())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = minilm(folder / "minilm")
        started = time.perf_counter()
        subprocess.run(words(folder, model, "whole.json"), check=True, capture_output=True)
        alone = time.perf_counter() - started
        expected = (folder / "whole.json").read_bytes()
        print(f"  left alone: {alone:.0f} s, {len(expected):,} bytes")

        equal, killed, runs = True, 0, 0
        while killed < kills or not equal:
            runs += 1
            command = words(folder, model, f"{runs}.json")
            while True:
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                try:
                    # Late enough to get somewhere, early enough to fall into any stage.
                    process.wait(draw.uniform(3, 0.5 * alone) if killed < kills else None)
                    break
                except subprocess.TimeoutExpired:
                    os.kill(process.pid, signal.SIGKILL)
                    process.wait()
                    killed += 1
            same = process.returncode == 0 and (folder / f"{runs}.json").read_bytes() == expected
            equal &= same
            print(f"  run {runs}: finished after {killed} kills in all, {'equal' if same else 'DIFFERENT'}")
            if not equal:
                print(
                    f"  first shard that differs: {differing(folder / 'whole.json', folder / f'{runs}.json')}"
                )
                break
    close("kill", killed if equal else 0, kills)


if __name__ == "__main__":
    main()

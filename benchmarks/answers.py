"""Peak memory of asking, reviewing and writing, as the number of answers grows; the teacher is a stand-in."""

import json
import resource
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
from common import arguments, child, close, machine

from scaledown.config.prepare import PrepareConfig
from scaledown.data.output.writers import examples, write_examples
from scaledown.data.prompts import Prompt
from scaledown.data.teacher.review import review_answers
from scaledown.data.teacher.stage import Teaching, answer_queries
from scaledown.devices.halving import Halving
from scaledown.records import Answer
from scaledown.run.directory import RunDirectory
from scaledown.run.stage import Stage

PASSAGES, DOCUMENTS, SHARD = 1000, 5, 256
FEW = 1000


class Ready:
    """Has an answer at once; the last prompt first."""

    halving = Halving("--teacher_batch_size")

    def answers(self, prompts: Sequence[Prompt], have: Collection[int] = ()) -> Iterator[tuple[int, Answer]]:
        """Each place once."""
        for place in reversed(range(len(prompts))):
            if place not in have:
                yield place, Answer(f"Word {place} of the passage.", "stop", 750, 8, 0)


def passages(run: RunDirectory) -> Stage:
    stage = Stage(run, "passages", {})
    names = [str(number) for number in range(PASSAGES)]
    texts = [f"This is the passage {name}. " * 25 for name in names]
    stage.write(0, pa.table({"passage_id": names, "doc_id": names, "title": names, "text": texts}))
    stage.finish([PASSAGES], {})
    return stage


def ranked(run: RunDirectory, queries: int) -> Stage:
    stage = Stage(run, "ranked", {})
    rows = []
    for shard, first in enumerate(range(0, queries, SHARD)):
        numbers = range(first, min(first + SHARD, queries))
        found = [[(number * 7 + place) % PASSAGES for place in range(DOCUMENTS)] for number in numbers]
        columns = {
            "query_id": [str(number) for number in numbers],
            "query": [f"What is the passage number {number} about?" for number in numbers],
            "rows": pa.array(found, pa.list_(pa.int64())),
        }
        stage.write(shard, pa.table(columns))
        rows.append(len(numbers))
    stage.finish(rows, {})
    return stage


def measure(queries: int) -> None:
    """In a process of its own: the stages from the teacher to the output."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "train_data.json"
        run = RunDirectory(Path(folder) / "work")
        asked, documents = ranked(run, queries), passages(run)
        started = time.perf_counter()
        answers, reviewed = Stage(run, "answers", {}), Stage(run, "reviewed", {})
        answer_queries(answers, asked, documents, Ready, Teaching(DOCUMENTS, shards_at_once=16))
        config = PrepareConfig(queries_file=("q",), output_file=str(output))
        review_answers(reviewed, answers, None, documents, config)
        count = write_examples(output, examples(reviewed, documents, None))
        seconds = time.perf_counter() - started
        assert count == queries
        size = output.stat().st_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"seconds": seconds, "peak": peak, "size": size}))


def main() -> None:
    options = arguments(__doc__)
    many = 20_000 if options.quick else 1_000_000
    print(machine())
    print(f"  {'answers':>9} {'time':>9} {'memory':>9} {'output':>10}")
    found = {}
    for queries in (FEW, SHARD * 16, many):
        row = found[queries] = child([str(Path(__file__)), "--measure", str(queries)])
        memory, size = row["peak"] / 1e6, row["size"] / 1e6
        print(f"  {queries:>9,} {row['seconds']:>7.1f} s {memory:>6,.0f} MB {size:>7,.0f} MB")
    # A group of 16 shards, whose answers a server has in flight together, is what is held.
    close("answers", found[many]["peak"] / found[SHARD * 16]["peak"], 1.2, lower=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(int(sys.argv[2]))
    else:
        main()

"""The stage of answers: the teacher answers queries from ranked passages.

Answers are logged as they arrive.
"""

import collections
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import pyarrow as pa

from scaledown.config.prepare import PrepareConfig
from scaledown.data.input.corpus import PassageTable
from scaledown.data.logprobs import LOGPROBS_TYPE
from scaledown.data.prompts import PAPER, Prompt, Template, answer_prompt
from scaledown.data.teacher.answer_log import AnswerLog, answer_prompts
from scaledown.data.teacher.base import Rejection, Teacher
from scaledown.data.teacher.review import answer_problem
from scaledown.errors import InputError
from scaledown.records import Answer, full_text
from scaledown.run.progress import Tracker, tracked
from scaledown.run.stage import Stage

_AGAIN_TEMPERATURE: Final = 0.7
_COLUMN_TYPES: Final = {
    "text": pa.large_string(),
    "finish_reason": pa.large_string(),
    "answer_logprobs": LOGPROBS_TYPE,
}
"""Types of the columns of `Answer` that are not counts."""
_HEARD: Final = {"left_out", "model"}
"""Fields of `Answer` that are counted and have no column."""


class Teaching(NamedTuple):
    """Settings for asking the teacher."""

    documents_per_query: int
    """The most documents in a prompt."""
    temperature: float = 0.0
    """0 is greedy decoding."""
    template: Template = PAPER
    """The text around question and documents."""
    shards_at_once: int = 1
    """Shards whose prompts are sent together."""
    flush_seconds: float = PrepareConfig.flush_seconds
    """Seconds after which an answer is on the disk at the latest."""
    prices: tuple[float, float] = (0.0, 0.0)
    """Prices of a million prompt tokens and of a million answer tokens."""
    logprobs: bool = False
    """Whether answers come with log probabilities."""


def answer_queries(
    stage: Stage, ranked: Stage, passages: Stage, load: Callable[[], Teacher], teaching: Teaching
) -> None:
    """Let the teacher answer each shard of queries from their first documents.

    Answers are logged to disk as they arrive. Queries that could not be answered go to the quarantine.

    Args:
        stage: The stage of answers: columns as those of `ranked`, those of `Answer`, and prompt_hash.
        ranked: The stage of queries with their candidates, best first.
        passages: The stage of passages.
        load: Loads the teacher; called for each group of shards.
        teaching: How the teacher is asked.

    Raises:
        InputError: No query was answered.
    """
    if stage.done():
        return
    rows = ranked.planned()
    with tracked(stage, "teach", "answers", rows) as tracker:
        meter = AnswerMeter(tracker, teaching.prices)

        def work(group: range) -> Iterator[pa.Table]:
            texts = PassageTable(passages)
            tables = [_first_documents(ranked.table(shard), teaching.documents_per_query) for shard in group]
            records = [record for table in tables for record in table.to_pylist()]
            prompts = [_prompt(record, texts, teaching) for record in records]
            log = AnswerLog.of(stage, group, teaching.flush_seconds)
            written = AnswerLog.others(stage, group, prompts) | _finished_answers(
                stage, group, tables, prompts
            )
            tracker.skip(len(log.read(prompts).keys() - written.keys()))
            teacher = load()
            with stage.noting(group.start, lambda: teacher.halving.count):
                answers = answer_prompts(teacher, prompts, log, meter.add, written)
            first = 0
            for shard, table in zip(group, tables, strict=True):
                last = first + table.num_rows
                both = list(zip(prompts[first:last], answers[first:last], strict=True))
                yield _answered_queries(stage, shard, table, both, logprobs=teaching.logprobs)
                first = last
            log.remove()

        whole = stage.complete_together(len(rows), teaching.shards_at_once, work)
    if not whole:
        return
    for log in AnswerLog.every(stage):  # logs of groups whose shards were made one by one later
        log.remove()
    rows = stage.made()
    names = ("answers", "rejected", "truncated", "shortened", "prompt_tokens", "answer_tokens")
    counts = dict.fromkeys(names, 0)
    answered = []
    for shard, asked in enumerate(rows):
        table = stage.table(shard)
        answered.append(table.num_rows)
        counts["answers"] += table.num_rows
        counts["rejected"] += asked - table.num_rows
        counts["truncated"] += table.column("finish_reason").to_pylist().count("length")
        counts["shortened"] += sum(map(bool, table.column("dropped_tokens").to_pylist()))
        for name in ("prompt_tokens", "answer_tokens"):
            counts[name] += sum(table.column(name).to_pylist())
    if not counts["answers"] and stage.name == "answers":
        why = f" ({meter.reason})" if meter.reason else ""
        raise InputError(f"no query was answered{why}: quarantine/ in the run directory says why, one by one")
    stage.finish(answered, counts | heard_counts(stage, len(rows)))


def retry(
    stage: Stage, answers: Stage, passages: Stage, load: Callable[[], Teacher], teaching: Teaching
) -> None:
    """Ask again, with sampling, for answers that have a problem (see `review.answer_problem`).

    A second answer without a problem replaces the first.

    Args:
        stage: The stage of answers after this; columns as those of `answers`.
        answers: The stage of first answers.
        passages: The stage of passages.
        load: Loads the teacher; called for each group of shards that has such answers.
        teaching: How the teacher is asked.
    """
    if stage.done():
        return
    rows = answers.planned()
    with tracked(stage, "retry", "answers", rows) as tracker:
        meter = AnswerMeter(tracker, teaching.prices)

        def work(group: range) -> Iterator[pa.Table]:
            texts = PassageTable(passages)
            tables = [answers.table(shard) for shard in group]
            records = [record for table in tables for record in table.to_pylist()]
            places = [
                n for n, record in enumerate(records) if answer_problem(record["text"], record["query"])
            ]
            tracker.advance(len(records) - len(places))
            prompts = [_prompt(records[place], texts, teaching) for place in places]
            again = [
                prompt._replace(
                    key=f"{prompt.key}:again", temperature=max(prompt.temperature, _AGAIN_TEMPERATURE)
                )
                for prompt in prompts
            ]
            better: dict[int, Answer] = {}
            log = AnswerLog.of(stage, group, teaching.flush_seconds)
            if again:
                teacher = load()
                with stage.noting(group.start, lambda: teacher.halving.count):
                    second = answer_prompts(
                        teacher, again, log, meter.add, AnswerLog.others(stage, group, again)
                    )
                better = {
                    place: answer
                    for place, answer in zip(places, second, strict=True)
                    if isinstance(answer, Answer) and not answer_problem(answer.text, records[place]["query"])
                }
            first = 0
            for table in tables:
                own = range(first, first + table.num_rows)
                asked = sum(place in own for place in places)
                yield _mended(
                    table, {place - first: better[place] for place in own if place in better}, asked
                )
                first = own.stop
            log.remove()

        nothing = {"retried": "0", "mended": "0"}
        whole = stage.complete_together(len(rows), teaching.shards_at_once, work, nothing=nothing)
    if not whole:
        return
    for log in AnswerLog.every(stage):
        log.remove()
    rows = stage.made()
    metadata = [stage.table(shard).schema.metadata for shard in range(len(rows))]
    counts = {name: sum(int(own[name.encode()]) for own in metadata) for name in ("retried", "mended")}
    stage.finish(rows, {"answers": sum(rows), **counts})


def _mended(table: pa.Table, better: Mapping[int, Answer], retried: int) -> pa.Table:
    """Return a shard of answers in which better ones replace others; their number is in the metadata."""
    own = [name for name in Answer._fields if name in table.column_names]
    for name in own if better else ():
        values = table.column(name).to_pylist()
        for row, answer in better.items():
            values[row] = getattr(answer, name)
        place = table.column_names.index(name)
        table = table.set_column(place, name, pa.array(values, table.schema.field(name).type))
    return table.replace_schema_metadata({"retried": str(retried), "mended": str(len(better))})


def _prompt(record: Mapping[str, Any], texts: PassageTable, teaching: Teaching) -> Prompt:
    found = [texts[row] for row in record["rows"]]
    documents = [full_text(passage.title, passage.text) for passage in found]
    return answer_prompt(
        record["query_id"], record["query"], documents, teaching.temperature, teaching.template
    )


def spent_tokens(stage: Stage) -> int:
    """Count the tokens of prompts and answers on disk."""
    paths = stage.storage.glob(stage.folder, "*.arrow")
    shards = {int(path.stem): stage.table(int(path.stem)) for path in paths}
    columns = (shard.column(name) for shard in shards.values() for name in ("prompt_tokens", "answer_tokens"))
    total: int = sum(sum(column.to_pylist()) for column in columns)
    for log in AnswerLog.every(stage):
        whole = [shards[shard].column("prompt_hash") for shard in log.shards if shard in shards]
        total += log.tokens({own for column in whole for own in column.to_pylist()})
    return total


class AnswerMeter:
    """Shows the progress of answers: tokens per second, and the cost so far."""

    def __init__(self, tracker: Tracker, prices: tuple[float, float]) -> None:
        self._tracker, self._prices = tracker, prices
        self._started = time.monotonic()
        self._tokens = 0
        self._cost = 0.0
        self.reason = ""
        """The reason why the last rejected prompt has no answer."""

    def add(self, answer: Answer | Rejection) -> None:
        """Count a new answer or rejection."""
        if isinstance(answer, Answer):
            self._tokens += answer.prompt_tokens + answer.answer_tokens
            price = zip(self._prices, (answer.prompt_tokens, answer.answer_tokens), strict=True)
            self._cost += sum(each * count / 1e6 for each, count in price)
        else:
            self.reason = answer.reason
        rate = self._tokens / max(time.monotonic() - self._started, 1e-9)
        cost = f", cost so far {self._cost:,.2f}" if any(self._prices) else ""
        self._tracker.note = f"{rate:,.0f} tokens/s{cost}"
        self._tracker.advance(1)


def _finished_answers(
    stage: Stage, group: range, tables: Sequence[pa.Table], prompts: Sequence[Prompt]
) -> dict[int, Answer]:
    """Return the answers in complete shards of a group, by the place of their prompt."""
    found: dict[int, Answer] = {}
    first = 0
    for shard, table in zip(group, tables, strict=True):
        if stage.has(shard):
            places = {prompts[place].key: place for place in range(first, first + table.num_rows)}
            for record in stage.table(shard).to_pylist():
                place = places.get(record["query_id"], -1)
                if place >= 0 and record["prompt_hash"] == prompts[place].digest:
                    found[place] = Answer(**{name: record[name] for name in Answer._fields if name in record})
        first += table.num_rows
    return found


def _answered_queries(
    stage: Stage,
    shard: int,
    table: pa.Table,
    both: Sequence[tuple[Prompt, Answer | Rejection]],
    *,
    logprobs: bool,
) -> pa.Table:
    """Return the queries of a shard that have an answer, with it; the others go to the quarantine."""
    stage.quarantine(
        f"{shard:06d}",
        [
            {"query_id": prompt.key, "reason": answer.reason}
            for prompt, answer in both
            if isinstance(answer, Rejection)
        ],
    )
    table = table.take(pa.array([i for i, (_, a) in enumerate(both) if isinstance(a, Answer)], pa.int64()))
    given = [answer for _, answer in both if isinstance(answer, Answer)]
    for name in Answer._fields:
        if name not in _HEARD and (name != "answer_logprobs" or logprobs):
            values = [getattr(answer, name) for answer in given]
            table = table.append_column(name, pa.array(values, _COLUMN_TYPES.get(name, pa.int64())))
    hashes = [prompt.digest for prompt, answer in both if isinstance(answer, Answer)]
    table = table.append_column("prompt_hash", pa.array(hashes, pa.string()))
    return with_heard(table, given)


def with_heard(table: pa.Table, answers: Iterable[Answer]) -> pa.Table:
    """Count answers that had thoughts, and answers under another model name.

    Args:
        table: The shard.
        answers: Its answers.

    Returns:
        The shard, with the counts in its metadata.
    """
    counts: collections.Counter[str] = collections.Counter()
    for answer in answers:
        counts["freed_of_thoughts"] += bool(answer.left_out)
        if answer.model:
            counts[f"by {answer.model}"] += 1
    return table.replace_schema_metadata({"heard": json.dumps(+counts)})


def heard_counts(stage: Stage, shards: int) -> dict[str, int]:
    """Return the counts of `with_heard` in all shards of a stage.

    Args:
        stage: The stage, with all its shards.
        shards: Number of its shards.
    """
    counts: collections.Counter[str] = collections.Counter()
    for shard in range(shards):
        metadata = stage.table(shard).schema.metadata or {}  # a given-up shard has none
        counts.update(json.loads(metadata.get(b"heard", b"{}")))
    return dict(counts)


def _first_documents(table: pa.Table, count: int) -> pa.Table:
    """Return the table with its lists cut to their first `count` entries."""
    for name in ("rows", "scores", "reranking_scores"):
        if name in table.column_names:
            lists = [entries[:count] for entries in table.column(name).to_pylist()]
            place = table.column_names.index(name)
            table = table.set_column(place, name, pa.array(lists, table.schema.field(name).type))
    return table

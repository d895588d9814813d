"""The stage that asks the teacher: ranked passages -> answers, on disk as they come."""

import collections
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import pyarrow as pa

from scaledown.config.prepare import PrepareConfig
from scaledown.data.input.corpus import PassageTable
from scaledown.data.logprobs import ARROW
from scaledown.data.prompts import PAPER, Prompt, Template, answer_prompt
from scaledown.data.teacher.answer_log import AnswerLog, ask
from scaledown.data.teacher.base import Rejection, Teacher
from scaledown.data.teacher.review import problem
from scaledown.errors import InputError
from scaledown.records import Answer, full_text
from scaledown.run.progress import Tracker, tracked
from scaledown.run.stage import Stage

_AGAIN_TEMPERATURE: Final = 0.7
_KINDS: Final = {"text": pa.large_string(), "finish_reason": pa.large_string(), "answer_logprobs": ARROW}
"""Of the columns of `Answer` that are no counts."""
_HEARD: Final = {"left_out", "model"}
"""What of `Answer` is counted and no column."""


class Teaching(NamedTuple):
    """How the queries of a run are asked."""

    documents_per_query: int
    temperature: float = 0.0
    template: Template = PAPER
    shards_at_once: int = 1
    flush_seconds: float = PrepareConfig.flush_seconds
    prices: tuple[float, float] = (0.0, 0.0)
    """Of a million prompt tokens and of a million answer tokens."""
    logprobs: bool = False
    """Whether answers come with log probabilities."""


def teach(
    stage: Stage, ranked: Stage, passages: Stage, load: Callable[[], Teacher], teaching: Teaching
) -> None:
    """Let the teacher answer each shard of queries with its first documents.

    Adds the columns of `Answer` and prompt_hash. Answers are on disk as they come, beside the shards they
    will be in. Queries that could not be asked go to the quarantine. Raises `InputError` when no query at
    all was answered.
    """
    if stage.done():
        return
    rows = ranked.planned()
    with tracked(stage, "teach", "answers", rows) as tracker:
        meter = Meter(tracker, teaching.prices)

        def work(group: range) -> Iterator[pa.Table]:
            texts = PassageTable(passages)
            tables = [_first_documents(ranked.table(shard), teaching.documents_per_query) for shard in group]
            records = [record for table in tables for record in table.to_pylist()]
            prompts = [_prompt(record, texts, teaching) for record in records]
            log = AnswerLog.of(stage, group, teaching.flush_seconds)
            written = AnswerLog.others(stage, group, prompts) | _written(stage, group, tables, prompts)
            tracker.skip(len(log.read(prompts).keys() - written.keys()))
            teacher = load()
            with stage.noting(group.start, lambda: teacher.halving.count):
                answers = ask(teacher, prompts, log, meter.add, written)
            first = 0
            for shard, table in zip(group, tables, strict=True):
                last = first + table.num_rows
                both = list(zip(prompts[first:last], answers[first:last], strict=True))
                yield _answered(stage, shard, table, both, logprobs=teaching.logprobs)
                first = last
            log.remove()

        whole = stage.complete_together(len(rows), teaching.shards_at_once, work)
    if not whole:
        return
    for log in AnswerLog.every(stage):  # of groups whose shards were then made one by one
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
    """Ask once more, sampling, where an answer has a problem (see `review.problem`); all others stay.

    A second answer takes the place of the first where it has none.
    """
    if stage.done():
        return
    rows = answers.planned()
    with tracked(stage, "retry", "answers", rows) as tracker:
        meter = Meter(tracker, teaching.prices)

        def work(group: range) -> Iterator[pa.Table]:
            texts = PassageTable(passages)
            tables = [answers.table(shard) for shard in group]
            records = [record for table in tables for record in table.to_pylist()]
            places = [n for n, record in enumerate(records) if problem(record["text"], record["query"])]
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
                    second = ask(teacher, again, log, meter.add, AnswerLog.others(stage, group, again))
                better = {
                    place: answer
                    for place, answer in zip(places, second, strict=True)
                    if isinstance(answer, Answer) and not problem(answer.text, records[place]["query"])
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
    told = [stage.table(shard).schema.metadata for shard in range(len(rows))]
    counts = {name: sum(int(of[name.encode()]) for of in told) for name in ("retried", "mended")}
    stage.finish(rows, {"answers": sum(rows), **counts})


def _mended(table: pa.Table, better: Mapping[int, Answer], retried: int) -> pa.Table:
    """A shard of answers with better ones in their rows; how many is in its metadata."""
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
    """Tokens of the answers on disk, of prompts and answers together."""
    paths = stage.storage.glob(stage.folder, "*.arrow")
    shards = {int(path.stem): stage.table(int(path.stem)) for path in paths}
    columns = (shard.column(name) for shard in shards.values() for name in ("prompt_tokens", "answer_tokens"))
    total: int = sum(sum(column.to_pylist()) for column in columns)
    for log in AnswerLog.every(stage):
        whole = [shards[shard].column("prompt_hash") for shard in log.shards if shard in shards]
        total += log.tokens({own for column in whole for own in column.to_pylist()})
    return total


class Meter:
    """Shows answers as they come: how many tokens a second, and what they cost so far."""

    def __init__(self, tracker: Tracker, prices: tuple[float, float]) -> None:
        self._tracker, self._prices = tracker, prices
        self._started = time.monotonic()
        self._tokens = 0
        self._cost = 0.0
        self.reason = ""
        """Why the last prompt without an answer has none."""

    def add(self, answer: Answer | Rejection) -> None:
        """An answer came."""
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


def _written(
    stage: Stage, group: range, tables: Sequence[pa.Table], prompts: Sequence[Prompt]
) -> dict[int, Answer]:
    """Answers of those shards of a group that are whole already, by the place of their prompt."""
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


def _answered(
    stage: Stage,
    shard: int,
    table: pa.Table,
    both: Sequence[tuple[Prompt, Answer | Rejection]],
    *,
    logprobs: bool,
) -> pa.Table:
    """The queries of a shard that have an answer, with it; the others go to the quarantine."""
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
            table = table.append_column(name, pa.array(values, _KINDS.get(name, pa.int64())))
    hashes = [prompt.digest for prompt, answer in both if isinstance(answer, Answer)]
    table = table.append_column("prompt_hash", pa.array(hashes, pa.string()))
    return with_heard(table, given)


def with_heard(table: pa.Table, answers: Iterable[Answer]) -> pa.Table:
    """A shard of answers that says how many were freed of thoughts, or came under which other name."""
    counts: collections.Counter[str] = collections.Counter()
    for answer in answers:
        counts["freed_of_thoughts"] += bool(answer.left_out)
        if answer.model:
            counts[f"by {answer.model}"] += 1
    return table.replace_schema_metadata({"heard": json.dumps(+counts)})


def heard_counts(stage: Stage, shards: int) -> dict[str, int]:
    """What `with_heard` counted in all shards of a stage."""
    counts: collections.Counter[str] = collections.Counter()
    for shard in range(shards):
        told = stage.table(shard).schema.metadata or {}  # none of a shard that was given up
        counts.update(json.loads(told.get(b"heard", b"{}")))
    return dict(counts)


def _first_documents(table: pa.Table, count: int) -> pa.Table:
    """The table with its lists cut to their first `count` entries."""
    for name in ("rows", "scores", "reranking_scores"):
        if name in table.column_names:
            lists = [entries[:count] for entries in table.column(name).to_pylist()]
            place = table.column_names.index(name)
            table = table.set_column(place, name, pa.array(lists, table.schema.field(name).type))
    return table

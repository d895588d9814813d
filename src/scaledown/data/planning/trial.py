"""Short trials of the models on real texts: the cost of a query or passage on this machine."""

import contextlib
import functools
import math
import platform
import random
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
import orjson
import pyarrow as pa

from scaledown.config.prepare import PrepareConfig
from scaledown.data.input.queries import QUERY_SCHEMA
from scaledown.data.logprobs import LOGPROBS_TYPE
from scaledown.data.prompts import answer_prompt, load_template
from scaledown.data.reranker.api import load_reranker, resolve_reranker
from scaledown.data.reranker.base import Pair, Reranker
from scaledown.data.retrieval.encoders import Encoder, load_encoder
from scaledown.data.retrieval.index import Ranking, Vectors, pack, search, stacked
from scaledown.data.retrieval.stages import Candidates, TokenLists, candidates_table
from scaledown.data.teacher.api import choose_backend, engine_of, find_teacher, is_served, load_teacher
from scaledown.data.teacher.base import EngineSettings, Rejection, Teacher, TeacherSettings, answer_all
from scaledown.data.teacher.questions import questions_about
from scaledown.devices.choice import choose_device
from scaledown.devices.gpus import OnDevice, index
from scaledown.devices.halving import batches_at_once
from scaledown.errors import MissingExtraError, ModelError, ScaleDownError
from scaledown.models.sources import resolve
from scaledown.records import Answer, Logprobs, Passage, full_text
from scaledown.run.executor import cores
from scaledown.run.progress import no_progress

_TRIAL_SECONDS: Final = 5.0  # after this time no further batch is tried
_QUERIES_SEARCHED: Final = 256
_PASSAGES_SEARCHED: Final = 20_000

Item = TypeVar("Item")
Made = TypeVar("Made")
Used = TypeVar("Used")


class StageCost(NamedTuple):
    """Seconds before the first row, seconds for each row, bytes of memory; infinite seconds are not known."""

    start: float
    each: float
    memory: int


UNKNOWN_COST: Final = StageCost(math.inf, math.inf, 0)


class Trials(NamedTuple):
    """Short trials of each stage on real texts. They return costs, and tables with rows like the stage's."""

    config: PrepareConfig
    texts: list[str]  # queries
    passages: list[Passage]
    tokens: TokenLists
    top_k: int
    documents_per_query: int
    most: int  # queries in the run
    missing: list[str]

    def queries(self) -> pa.Table:
        """Return a table of queries, as in a shard."""
        return pa.table([[f"q{n}" for n in range(len(self.texts))], self.texts], schema=QUERY_SCHEMA)

    def candidates(self, top_k: int, *, ranked: bool = False) -> pa.Table:
        """Return a table of candidates, as in a shard. All scores are 0.

        Args:
            top_k: Candidates of each query.
            ranked: Add the reranker's scores.
        """
        nothing = np.zeros(top_k)
        table = candidates_table(self.queries(), [Candidates(nothing, nothing)] * len(self.texts))
        return table.append_column("reranking_scores", table.column("scores")) if ranked else table

    def questions(self) -> tuple[pa.Table | None, StageCost]:
        """Let the teacher write questions about sampled passages."""
        rows = self._by_length()

        def write(teacher: Teacher) -> tuple[float, list[pa.Table]]:
            size = self.config.teacher_batch_size
            answer = functools.partial(answer_all, teacher)
            return _timed(
                rows, size, lambda batch: questions_about([(0, row) for row in batch], self.passages, answer)
            )

        cost, made = self._try_teacher(write)
        return pa.concat_tables(made) if made else None, cost

    def vectors(self, shards: int) -> tuple[pa.Table | None, StageCost, StageCost]:
        """Encode sampled passages and search them.

        Args:
            shards: Number of shards of vectors in the run.

        Returns:
            A shard of vectors, or None if the model is missing; the cost of encoding a passage; the cost of
            searching one passage for a query.
        """
        config, rows = self.config, self._by_length()

        def load(device: str) -> Encoder:
            return load_encoder(resolve(config.retriever_model), device, config.dtype, config.batch_size)

        def encode(encoder: Encoder) -> tuple[float, tuple[Vectors, StageCost]]:
            def documents(batch: Sequence[int]) -> Vectors:
                return encoder.documents(
                    [self._document(row) for row in batch], no_progress, [self.tokens[row] for row in batch]
                )

            size = config.batch_size * batches_at_once(choose_device(config.device))
            each, parts = _timed(rows, size, documents)
            vectors = stacked(parts)
            # The cost of an approximate search is not known before its index exists.
            searching = self._search(encoder, vectors, shards) if config.search == "exact" else UNKNOWN_COST
            return each, (vectors, searching)

        cost, made = self._try(load, encode)
        return (pack(made[0], config.weights), cost, made[1]) if made else (None, cost, UNKNOWN_COST)

    def _search(self, encoder: Encoder, vectors: Vectors, shards: int) -> StageCost:
        texts = self.texts[:_QUERIES_SEARCHED]
        queries, encoding = _clocked(lambda: encoder.queries(texts, no_progress))
        copies = math.ceil(min(self.config.passages_per_shard, _PASSAGES_SEARCHED) / vectors.shape[0])
        shard = pack(stacked([vectors] * copies), self.config.weights)
        threads = min(cores(), shards)
        count = threads * math.ceil(_PASSAGES_SEARCHED / shard.num_rows / threads)

        def look(times: int) -> Ranking:
            sizes = [shard.num_rows] * times
            return search(queries, [lambda: shard] * times, sizes, self.top_k, threads=threads)

        look(1)  # compiles
        _, searching = _clocked(lambda: look(count))
        each = (searching + encoding) / len(texts) / (count * shard.num_rows)
        return StageCost(0, each, peak("cpu") + round(self.config.search_memory * 1e9))

    def ranked(self) -> tuple[pa.Table, StageCost]:
        """Score pairs of queries and sampled passages. The cost is for a query with all its passages."""
        config, chance = self.config, random.Random(self.config.seed)  # noqa: S311
        count = 3 * config.reranker_batch_size * batches_at_once("cpu")
        rows = [chance.randrange(len(self.passages)) for _ in range(min(count, self.most * self.top_k))]
        pairs = [Pair(chance.choice(self.texts), self._document(row)) for row in rows]
        pairs.sort(key=lambda pair: len(pair.document + pair.query))

        def load(device: str) -> Reranker:
            source = resolve_reranker(config.reranker_model)
            return load_reranker(source, device, config.dtype, config.reranker_batch_size)

        def score(reranker: Reranker) -> tuple[float, list[list[float]]]:
            size = config.reranker_batch_size * batches_at_once(choose_device(config.device))
            return _timed(pairs, size, lambda batch: reranker.score(batch, no_progress))

        cost, _ = self._try(load, score)
        return self.candidates(self.top_k, ranked=True), cost._replace(each=cost.each * self.top_k)

    def answers(self) -> tuple[pa.Table, StageCost]:
        """Let the teacher answer queries with sampled documents."""
        config, chance = self.config, random.Random(self.config.seed)  # noqa: S311
        size = max(self._full_load(), config.teacher_batch_size)
        template = load_template(config.prompt)
        prompts = []
        for number in range(min(3 * size, self.most)):
            rows = chance.sample(range(len(self.passages)), min(self.documents_per_query, len(self.passages)))
            documents = [self._document(row) for row in rows]
            query = self.texts[number % len(self.texts)]
            prompts.append(answer_prompt(str(number), query, documents, config.temperature, template))
        prompts.sort(key=lambda prompt: sum(map(len, prompt.documents)))

        def answer(teacher: Teacher) -> tuple[float, list[list[Answer | Rejection]]]:
            return _timed(prompts, size, lambda batch: answer_all(teacher, batch))

        cost, made = self._try_teacher(answer)
        given = [answer for batch in made or () for answer in batch if isinstance(answer, Answer)]
        given = given or [_longest(config.max_new_tokens, config.teacher_logprobs)]
        table = self.candidates(self.documents_per_query, ranked=config.reranks)
        for name in Answer._fields:
            if name != "answer_logprobs" or config.teacher_logprobs:
                values = [getattr(given[row % len(given)], name) for row in range(len(table))]
                table = table.append_column(
                    name, pa.array(values, LOGPROBS_TYPE if name == "answer_logprobs" else None)
                )
        hashes = pa.array([prompts[row % len(prompts)].digest for row in range(len(table))])
        return table.append_column("prompt_hash", hashes), cost

    def reviewed(self, answers: pa.Table) -> pa.Table:
        """Return a table of answers, as in the last stage."""
        table = answers.append_column("problem", pa.array([""] * len(answers)))
        return table.append_column("groundedness", pa.array([1.0] * len(answers)))

    def record_bytes(self, answers: pa.Table) -> int:
        """Return the bytes of an average training record."""

        def average(texts: Sequence[str]) -> str:
            return "x" * round(sum(len(text.encode()) for text in texts) / len(texts))

        document = average([self._document(row) for row in range(len(self.passages))])
        record: dict[str, Any] = {
            "query": average(self.texts),
            "documents": [document] * self.documents_per_query,
            "answer": average(answers.column("text").to_pylist()),
        }
        if self.config.enable_reranking:
            record["reranking_scores"] = [-1.2345678901] * self.documents_per_query
        size = len(orjson.dumps(record, option=orjson.OPT_INDENT_2))
        if self.config.teacher_logprobs:
            every = answers.column("answer_logprobs").to_pylist()
            size += sum(len(orjson.dumps(one, option=orjson.OPT_INDENT_2)) for one in every) // len(every)
        return size

    def _document(self, row: int) -> str:
        return full_text(self.passages[row].title, self.passages[row].text)

    def _by_length(self) -> list[int]:
        return sorted(range(len(self.passages)), key=lambda row: len(self.passages[row].text))

    def _try_teacher(self, use: Callable[[Teacher], tuple[float, Used]]) -> tuple[StageCost, Used | None]:
        if is_served(EngineSettings.of(self.config)):  # a server's answers may cost money
            return UNKNOWN_COST, None
        return self._try(self._load_teacher, use)

    def _full_load(self) -> int:
        """Return how many prompts keep the teacher's engine busy, if that is more than a batch."""
        engine = EngineSettings.of(self.config)
        if is_served(engine):
            return 0
        try:
            source = find_teacher(self.config.teacher_model, engine)
            generation = TeacherSettings.of(self.config)
            backend = choose_backend(engine, source, choose_device(self.config.device), generation)
        except ScaleDownError:  # the error is listed when the teacher is loaded
            return 0
        return engine_of(backend).full_load

    def _load_teacher(self, device: str) -> Teacher:
        config = self.config
        engine = EngineSettings.of(config)
        source = find_teacher(config.teacher_model, engine)
        return load_teacher(source, device, config.dtype, TeacherSettings.of(config), engine)

    def _try(
        self, load: Callable[[str], Made], use: Callable[[Made], tuple[float, Used]]
    ) -> tuple[StageCost, Used | None]:
        """Load a model, and measure its seconds per row by `use`. A missing model is listed."""
        cost: StageCost = UNKNOWN_COST
        made: Used | None = None
        with listing_missing(self.missing):
            device = choose_device(self.config.device)
            if device.startswith("cuda"):
                import torch

                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(index(device))
            model = OnDevice("the model that was tried", device, lambda: load(device))
            _, start = _clocked(model)
            each, made = use(model())
            cost = StageCost(start, each, peak(device))
            model.release()
        return cost, made


def _longest(tokens: int, logprobs: int) -> Answer:
    """Make an answer of `tokens` tokens with four letters each, if no teacher has written one."""
    each: Logprobs = {
        "tokens": ["xxxx"] * tokens,
        "token_ids": None,
        "top_tokens": [["xxxx"] * logprobs] * tokens,
        "top_ids": None,
        "top_logprobs": [[-12.3456] * logprobs] * tokens,
    }
    return Answer("xxxx" * tokens, "length", 0, 0, 0, each if logprobs else None)


def _timed(
    items: Sequence[Item], batch_size: int, work: Callable[[Sequence[Item]], Made]
) -> tuple[float, list[Made]]:
    """Time batches of medium, short and long items of the sorted `items`. Returns seconds per item, results.

    The longest item is worked on first, untimed, so that libraries are initialised for all sizes.
    """
    work(items[-1:])
    made: list[Made] = []
    seconds, done = 0.0, 0
    for place in (1 / 2, 1 / 6, 5 / 6):
        first = max(0, min(len(items) - batch_size, round(place * len(items) - batch_size / 2)))
        batch = items[first : first + batch_size]
        result, took = _clocked(lambda batch=batch: work(batch))  # type: ignore[misc]
        made.append(result)
        seconds += took
        done += len(batch)
        if done == len(items) or seconds > _TRIAL_SECONDS:
            break
    return seconds / done, made


def _clocked(work: Callable[[], Made]) -> tuple[Made, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def peak(device: str) -> int:
    """Return the peak of memory so far, in bytes: of the GPU, or of this process.

    Memory that other processes use on the GPU now counts too; they may be an engine's own processes.
    """
    if device.startswith("cuda"):
        import torch

        free, total = torch.cuda.mem_get_info(index(device))
        return max(torch.cuda.max_memory_allocated(index(device)), total - free)
    unit = 1 if platform.system() == "Darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


@contextlib.contextmanager
def listing_missing(missing: list[str]) -> Iterator[None]:
    """Add a missing model to the list, once, and continue."""
    try:
        yield
    except (ModelError, MissingExtraError) as error:
        if str(error) not in missing:
            missing.append(str(error))

"""The engine: continuous batching. A request joins the running batch, and leaves it when it is done.

One thread owns the model and the `Generation` that writes the answers, by one of `student.engines`. Other
threads submit requests and receive pieces of answers by thread-safe calls.
"""

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch

from scaledown.config.serve import ServeConfig
from scaledown.config.train import BUDGETS
from scaledown.data.teacher.base import Rejection
from scaledown.devices.gpus import give_back
from scaledown.devices.halving import is_out_of_memory
from scaledown.errors import InputError, ModelError, ScaleDownError
from scaledown.serving.answer_text import AnswerText
from scaledown.serving.embedding_cache import EmbeddingCache, key_of
from scaledown.serving.jobs import End, Job, Piece, Scores, Usage
from scaledown.serving.protocol import RequestError
from scaledown.student.batch import Encoded, EncodedDocument, EncodedQuestion
from scaledown.student.decoding import Decoding
from scaledown.student.engines.base import Generation, Sampling
from scaledown.student.engines.steps import StepGeneration

log = logging.getLogger("scaledown")

SHUTTING_DOWN: Final = "the server is shutting down"
_FAILED_MESSAGE: Final = "the model failed on this request"
_TOO_LARGE: Final = "this request does not fit into memory: ask for less"
_FAILURES: Final = 3  # consecutive failures of the model after which the engine gives up
_TRY_AGAIN: Final = 100  # answers, after which a larger batch than the last that fitted is tried
_CHECK_SECONDS: Final = 1.0  # between two checks of an idle engine
_POSITIONS: Final = 1 << 13  # of prompts in one prefill, padding included: bounds memory


@dataclass(eq=False)
class _Row:
    """An answer that is being written."""

    job: Job
    text: AnswerText
    usage: Usage
    written: int = 0


class _EncodedRequest(NamedTuple):
    """A request and its documents in the compressor's tokens; no documents if their text is read instead."""

    job: Job
    documents: list[EncodedDocument]
    cut: tuple[int, int]
    """Documents, and queries, that were cut because they are longer than the compressor's limit."""


class _Made(NamedTuple):
    """The compressed documents of a request."""

    embeddings: list[torch.Tensor]
    """[memory tokens, width] of each document."""
    relevance: list[float]
    """Of each document; empty unless the request asks for it."""


class Engine:
    """Answers and scores of one `ScaleDownModel`, for many requests at a time."""

    def __init__(self, model: Any, config: ServeConfig, generation: Generation | None = None) -> None:
        """Create the engine without starting it.

        Args:
            model: The `ScaleDownModel`.
            config: Batch size, limits and cache size.
            generation: Writes the answers; without it the model's own generator does.
        """
        self._model = model
        self._config = config
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._admitted: list[Job] = []
        """Requests that have left `_waiting` and are not in `_rows` yet."""
        self._rows: list[_Row] = []
        if generation is None:
            generation = StepGeneration(model, Decoding(model.generator))
        self._generation = generation
        self._most_rows = config.batch_size
        self._answered = 0
        """Answers finished since `_most_rows` changed."""
        self._cache = EmbeddingCache(config.embedding_cache)
        self._failures = 0
        self._draining = self._closed = False
        self._on_failure: Callable[[], None] = lambda: None
        self.failed = ""
        """Why the engine gave up; empty while it works."""
        self.hits = self.misses = 0
        """Pairs of query and document that were in the cache, and pairs that were not."""
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self, on_failure: Callable[[], None]) -> None:
        """Start the engine's thread, which calls `on_failure` if the engine gives up."""
        self._on_failure = on_failure
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Add a request to the queue.

        Raises:
            RequestError: Too many requests wait (429), or the server is shutting down or failed (503).
        """
        with self._changed:
            if self.failed or self._draining:
                raise RequestError(self.failed or SHUTTING_DOWN, 503)
            most = self._config.max_waiting + self._most_rows - len(self._rows)
            if len(self._waiting) >= most:
                self._waiting = deque(job for job in self._waiting if not job.cancelled)
            if len(self._waiting) >= most:
                raise RequestError("too many requests wait: try again soon", 429, kind="rate_limit_error")
            self._waiting.append(job)
            self._changed.notify()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Answers that are being written."""
        return len(self._rows)

    @property
    def cached_bytes(self) -> int:
        """Bytes of the embeddings in the cache."""
        return self._cache.size

    def refuse_all(self) -> None:
        """Refuse new requests, and fail the others now."""
        self._drain()
        self._fail_all(RequestError(SHUTTING_DOWN, 503))

    def stop(self, patience: float) -> None:
        """Refuse new requests, finish the others within `patience` seconds, and fail those that are left."""
        self._drain()
        self._thread.join(patience)
        self._closed = True
        self._generation.close()
        self._fail_all(RequestError(SHUTTING_DOWN, 503))

    def _drain(self) -> None:
        with self._changed:
            self._draining = True
            self._changed.notify()

    # The engine's thread.

    def _work(self) -> None:
        try:
            self._run()
        except BaseException:
            log.exception("the engine ended")
            self.failed = self.failed or "the engine ended: start the server again"
        if self.failed:
            self._fail_all(RequestError(self.failed, 503))
            self._on_failure()

    def _run(self) -> None:
        while not (self.failed or self._closed):
            with self._changed:
                idle = not self._waiting and not self._rows
                if idle and self._draining:
                    return
                if idle:
                    self._changed.wait(_CHECK_SECONDS)
            try:
                if idle:
                    self._generation.check()
                    continue
                fine = self._admit()
                if self._rows:
                    self._advance()
                if fine:
                    self._failures = 0
            except ModelError as error:  # the process that writes answers has ended
                self.failed = f"{error}: start the server again"
            except Exception as error:
                rows = len(self._rows)
                self._drop_rows(error, alone=rows == 1)
                if is_out_of_memory(error):
                    self._allow(rows // 2 or self._config.batch_size)
                else:
                    self._count_failure()

    def _drop_rows(self, error: Exception, *, alone: bool = False) -> None:
        """Fail all requests whose answers are being written; `alone` if there is only one such request."""
        failure = RequestError(_FAILED_MESSAGE, 500)
        if is_out_of_memory(error) and alone:
            self._cache.clear()
            failure = RequestError(_TOO_LARGE, 413)
        elif is_out_of_memory(error):
            failure = RequestError("out of memory: ask for less at once, or try again", 503)
        for row in self._rows:
            row.job.finish(failure)
        self._rows = []
        self._generation.keep([])

    def _count_failure(self) -> None:
        log.exception("the model failed; the requests that it worked on get an error")
        self._failures += 1
        if self._failures == _FAILURES:
            self.failed = "the model does not work any more: start the server again"

    def _allow(self, rows: int) -> None:
        """Limit the batch to `rows` answers, until a larger batch is tried again."""
        self._most_rows, self._answered = max(1, min(rows, self._config.batch_size)), 0
        if self._most_rows < self._config.batch_size:
            log.warning("out of memory: at most %s answers at once for now", self._most_rows)
        give_back()

    def _room(self) -> int:
        """Return how many answers may begin now."""
        if self._answered >= _TRY_AGAIN and self._most_rows < self._config.batch_size:
            self._most_rows, self._answered = min(2 * self._most_rows, self._config.batch_size), 0
        return self._most_rows - len(self._rows) if self._generation.can_grow else 0

    def _admit(self) -> bool:
        """Begin as many waiting requests as there is room for. Returns False if the model failed."""
        room = self._room()
        with self._changed:
            while self._waiting and len(self._admitted) < room:
                job = self._waiting.popleft()
                if not job.cancelled:
                    self._admitted.append(job)
        try:
            if self._admitted:
                self._begin(self._admitted)
        except ModelError as error:
            for job in self._admitted:
                job.finish(RequestError(str(error), 503))
            raise
        except Exception as error:
            writing = {row.job for row in self._rows}
            if len(self._generation) != len(self._rows):  # it failed while new rows were joined to these
                self._drop_rows(error)
            left = [job for job in self._admitted if not (job.settled or job in writing)]
            if not is_out_of_memory(error):
                for job in left:
                    job.finish(RequestError(_FAILED_MESSAGE, 500))
                self._count_failure()
                return False
            self._begin_later(left, len(writing))
        finally:
            self._admitted = []
        return True

    def _begin_later(self, jobs: Sequence[Job], running: int) -> None:
        """Queue requests again that found too little memory. One that had all memory to itself is refused."""
        alone = len(jobs) == 1 and not running
        if alone and jobs[0].had_all_memory:
            jobs[0].finish(RequestError(_TOO_LARGE, 413))
        else:
            if alone:
                self._cache.clear()
                jobs[0].had_all_memory = True
            with self._changed:
                self._waiting.extendleft(reversed(jobs))
        self._allow(self._config.batch_size if alone else (len(jobs) + running) // 2)

    def _begin(self, jobs: Sequence[Job]) -> None:
        read: list[_EncodedRequest] = []
        for job in jobs:
            with _blamed(job):
                read.append(self._read(job))
        with self._model.using():
            made = self._compressed(read)
        begun: list[tuple[_Row, EncodedQuestion]] = []
        for asked in read:
            job, own = asked.job, made[asked.job]
            tokens = sum(one.stop - one.start for one in asked.documents)
            if job.ranks:
                job.finish(Scores(own.relevance, Usage(0, 0, tokens, 0, *asked.cut)))
                continue
            with _blamed(job):
                question, cut_tokens = self._question(asked, own)
                embeddings = sum(map(len, own.embeddings))
                usage = Usage(question.encoded.prompt_length, 0, tokens, embeddings, *asked.cut, cut_tokens)
                begun.append((_Row(job, AnswerText(self._model.tokenizer, job.stops), usage), question))
        parts = _alike(begun)
        while parts and self._generation.can_grow:
            part = parts.pop(0)
            samplings = [_sampling(row.job) for row, _ in part]
            self._generation.join([question for _, question in part], samplings)
            self._rows += [row for row, _ in part]
        with self._changed:  # requests that could not join are the next ones in the queue
            self._waiting.extendleft(row.job for part in reversed(parts) for row, _ in reversed(part))

    def _read(self, job: Job) -> "_EncodedRequest":
        if not (job.documents and (job.compressed or job.ranks)):
            return _EncodedRequest(job, [], (0, 0))
        reader = self._model.reader
        before, before_queries = reader.cut, reader.cut_queries
        documents = reader.read(job.query, job.documents, rate=job.rate)
        return _EncodedRequest(job, documents, (reader.cut - before, reader.cut_queries - before_queries))

    def _compressed(self, read: Sequence["_EncodedRequest"]) -> dict[Job, "_Made"]:
        """Compress the documents of each request."""
        found = self._by_pair([own for own in read if own.job.budget == "each" and not own.job.ranks])
        for budget in BUDGETS:
            chosen = [own for own in read if own.job not in found and own.job.budget == budget]
            if chosen:
                made = self._model.compress_read([own.documents for own in chosen], budget)
                for asked, own in zip(chosen, made, strict=True):
                    relevance = own.relevance.tolist() if own.relevance is not None else []
                    found[asked.job] = _Made(list(torch.split(own.embeddings, own.counts)), relevance)
        return found

    def _by_pair(self, read: Sequence["_EncodedRequest"]) -> dict[Job, "_Made"]:
        """Compress each document by itself. Embeddings that are in the cache are taken from there."""
        pairs = {
            asked.job: [
                (key_of(asked.job, text), one)
                for text, one in zip(asked.job.documents, asked.documents, strict=True)
            ]
            for asked in read
            if asked.documents
        }
        kept = {key: self._cache.get(key) for own in pairs.values() for key, _ in own}
        new = {key: one for own in pairs.values() for key, one in own if kept[key] is None}
        self.hits += len(kept) - len(new)
        self.misses += len(new)
        if new:
            made = self._model.compress_read([[one] for one in new.values()], "each")
            for key, own in zip(new, made, strict=True):
                kept[key] = own.embeddings
                self._cache.put(key, own.embeddings)
        embeddings = {key: own for key, own in kept.items() if own is not None}
        return {
            asked.job: _Made([embeddings[key] for key, _ in pairs.get(asked.job, ())], []) for asked in read
        }

    def _question(self, asked: "_EncodedRequest", made: "_Made") -> tuple[EncodedQuestion, int]:
        """Return the prompt, and the number of document tokens that were left out of it."""
        reader, job = self._model.reader, asked.job
        if not asked.documents:
            fitted = reader.fit_text(job.query, job.documents, job.max_new_tokens, job.system)
            if isinstance(fitted, Rejection):
                raise InputError(f"{fitted.reason}: shorten the question or the system message")
            ids, cut = fitted
            return EncodedQuestion(Encoded([], [ids], [], None), None), cut
        laid = [EncodedDocument([], 0, 0, len(own)) for own in made.embeddings]
        encoded = Encoded(laid, reader.prompt_parts(job.query, len(laid), job.system), [], None)
        if encoded.prompt_length + job.max_new_tokens > reader.context:
            raise InputError(
                f"the prompt has {encoded.prompt_length:,} positions and {job.max_new_tokens:,} new tokens "
                f"are asked for; the model takes {reader.context:,}: give fewer documents or ask for fewer "
                "tokens"
            )
        return EncodedQuestion(encoded, torch.cat(made.embeddings)), 0

    def _advance(self) -> None:
        """Write the next tokens of each running answer."""
        going: list[int] = []
        for place, (row, tokens) in enumerate(zip(self._rows, self._generation.tokens(), strict=True)):
            if row.job.cancelled or row.job.settled:
                continue
            if isinstance(tokens, Exception):
                log.error("request %s failed", row.job.identity, exc_info=tokens)
                row.job.finish(RequestError(_FAILED_MESSAGE, 500))
            elif self._goes_on(row, tokens):
                going.append(place)
        self._rows = [self._rows[place] for place in going]
        self._generation.keep(going)

    def _goes_on(self, row: _Row, tokens: Sequence[int]) -> bool:
        """Send the text of new tokens. Returns whether the answer continues."""
        for token in tokens:
            ended = token in self._model.stops
            row.written += 1
            if not ended and (text := row.text.add(token)):
                row.job.send(Piece(text))
            if ended or row.text.stopped or row.written >= row.job.max_new_tokens:
                if not row.text.stopped and (text := row.text.rest()):
                    row.job.send(Piece(text))
                reason = "stop" if ended or row.text.stopped else "length"
                row.job.finish(End(reason, row.usage._replace(completion=row.written)))
                self._answered += 1
                return False
        return True

    def _fail_all(self, error: RequestError) -> None:
        with self._changed:
            jobs = [*(row.job for row in self._rows), *self._admitted, *self._waiting]
            self._waiting.clear()
        for job in jobs:
            job.finish(error)


@contextlib.contextmanager
def _blamed(job: Job) -> Iterator[None]:
    """End only this request if there is an error in the block.

    Running out of memory is raised to the caller, since other requests may hold more of the memory.
    """
    try:
        yield
    except ScaleDownError as error:
        job.finish(RequestError(str(error)))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        log.exception("request %s failed", job.identity)
        job.finish(RequestError(_FAILED_MESSAGE, 500))


def _sampling(job: Job) -> Sampling:
    return Sampling(job.max_new_tokens, job.temperature, job.top_p, job.seed)


def _alike(begun: Sequence[tuple[_Row, EncodedQuestion]]) -> list[list[tuple[_Row, EncodedQuestion]]]:
    """Group prompts of similar length for prefill, at most `_POSITIONS` each; the oldest group first."""
    parts: list[list[tuple[_Row, EncodedQuestion]]] = []
    for row, question in sorted(begun, key=lambda own: own[1].encoded.prompt_length):
        longest = question.encoded.prompt_length
        if not parts or (len(parts[-1]) + 1) * longest > _POSITIONS:
            parts.append([])
        parts[-1].append((row, question))
    return sorted(parts, key=lambda part: min(row.job.arrived for row, _ in part))

"""The teacher behind OpenAI-compatible servers: many requests in flight, and faults waited out."""

import asyncio
import contextlib
import ipaddress
import logging
import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import httpx2

from scaledown.data.prompts import Prompt
from scaledown.data.teacher.base import Generation, Rejection
from scaledown.data.teacher.chat import Chat, Draft, NoLogprobsError, listed
from scaledown.data.teacher.rate_limit import LOUD_WAIT, MOST_IN_FLIGHT, Endpoint, Fault, Rate, retry_after
from scaledown.errors import ModelError, one_line
from scaledown.models import Halving
from scaledown.records import Answer
from scaledown.run.progress import at_work

log = logging.getLogger("scaledown")

KEY: Final = "OPENAI_API_KEY"

TRIES: Final = 8
"""Of one prompt, at faults that may be its own."""
BACKOFF: Final = 0.5
"""Seconds, at most, before the first retry; doubled each time, up to `LONGEST_BACKOFF`."""
LONGEST_BACKOFF: Final = 30.0
PATIENCE: Final = 1800.0
"""Seconds without a result after which the servers are given up."""
REFUSALS: Final = 20
"""Prompts refused in a row with one status, and none answered, after which it is no prompt's fault."""
ALIAS: Final = 3
"""Answers under another name, and none under its own, after which a listed model is taken for an alias."""
LOOK_TIMEOUT: Final = 10.0
_GATEWAY: Final = frozenset({502, 503, 504, 529})


class EndpointTeacher:
    """A model behind one or more OpenAI-compatible servers, which share the load.

    The key comes from `OPENAI_API_KEY`. There is no tokenizer here: four characters count as a token where
    documents are shortened. Raises `ModelError` where no server answers, or one lacks the model.
    """

    def __init__(
        self,
        model: str,
        endpoints: Sequence[str],
        generation: Generation,
        *,
        max_total_tokens: int = 0,
        max_requests_per_minute: int = 0,
        request_timeout: float = 120.0,
        spent_tokens: int = 0,
    ) -> None:
        self.halving = Halving("--teacher_batch_size")  # a server cares for its memory itself
        self.max_total_tokens = max_total_tokens
        self.spent_tokens = spent_tokens
        """Prompts and answers, with those of earlier runs."""
        self.request_timeout = request_timeout
        self.rate = Rate(max_requests_per_minute)
        self.endpoints = [Endpoint(url) for url in dict.fromkeys(endpoints)]
        self._key = os.environ.get(KEY, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ModelError(f"{KEY} has characters that no key has: set it again")
        self.chat = Chat(model, generation, self._key)
        self.answered = False
        self.has_logprobs = False
        """Whether an answer came with those that were asked for."""
        self._without = 0
        self._refused: list[str] = []
        # By URL: answers under other names, where the model is listed, named so, and known by another name.
        self._others: Counter[str] = Counter()
        self._lists: set[str] = set()
        self._named: set[str] = set()
        self._aliased: set[str] = set()
        for endpoint in self.endpoints:
            if self._key and endpoint.url.startswith("http://") and not _is_loopback(endpoint.url):
                log.warning("%s goes to %s unencrypted: use https:// where others listen", KEY, endpoint.url)
        self._look()

    def answers(
        self, prompts: Sequence[Prompt], have: Collection[int] = ()
    ) -> Iterator[tuple[int, Answer | Rejection]]:
        """Answers as they arrive. Places in `have` are never asked: their answers are paid for.

        Documents of a prompt that is too long lose their ends from the last one on; `dropped_tokens` are the
        characters dropped // 4. Raises `ModelError` once the tokens are used up or no server is left; what
        is in flight then is waited for and given first.
        """
        todo = [number for number in range(len(prompts)) if number not in have]
        if not todo:
            return
        with _loop() as run:
            crew = _Crew(self, [(number, prompts[number]) for number in reversed(todo)])
            try:
                while result := run(crew.next()):
                    yield result
            finally:
                run(crew.close())

    def connection(self, url: str) -> dict[str, Any]:
        """How a client reaches a server."""
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        # Behind a proxy's settings, which others need, a server on this machine is out of reach.
        return {"headers": headers, "trust_env": not _is_loopback(url)}

    def _refusal(self, client: httpx2.Client, url: str) -> str:
        """What the server says to a question of one token where it knows no such model; else nothing."""
        body = {
            "model": self.chat.model,
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 1,
        }
        response = client.post(_path(url, "chat/completions"), json=body, timeout=self.request_timeout)
        status = self.chat.status(response)
        known = not 400 <= status < 500 or status == 429 or self.chat.is_spent(response)
        return "" if known else self.chat.said(response) or f"status {status}"

    def refuse_key(self, url: str, status: int) -> NoReturn:
        """The key, or its absence, is wrong: no prompt can be asked."""
        raise ModelError(f"--teacher_endpoint {url} answers {status}: set {KEY} to a key that it accepts")

    def refused(self, how: str, said: str) -> None:
        """Count a prompt that gets no answer. Raises `ModelError` where none does: not all are set aside."""
        self._refused = [*self._refused, how] if how in self._refused[-1:] else [how]
        if len(self._refused) >= REFUSALS and not self.answered:
            raise ModelError(f"the server {how} ({said}): mend that and run the same command again")

    def named(self, url: str) -> None:
        """Remember that a server answered under the name it was asked by."""
        self._named.add(url)

    def takes(self, url: str, model: str) -> bool:
        """Whether to take an answer under another name: where the server lists the wanted one, and has not
        answered under that. Raises `ModelError` where no server ever does, nor lists it.
        """
        if url in self._aliased:
            return True
        self._others[url] += 1
        if url in self._lists and url not in self._named:
            if self._others[url] < ALIAS:
                return False
            said = (url, self.chat.model, self.chat.plain(model))
            log.warning("%s answers for %s under the name %s: both are kept", *said)
            self._aliased.add(url)
            return True
        if self._others.total() >= TRIES and not self.answered:
            raise ModelError(
                f"the server answers for --teacher_model {self.chat.model} with {self.chat.plain(model)}: if "
                "that is the one you want, name it"
            )
        return False

    def gave_logprobs(self, url: str, *, of_answer: bool) -> None:
        """Count an answer's log probabilities. Raises `ModelError` where they are always of other tokens."""
        self.has_logprobs |= of_answer
        self._without += not of_answer
        if self._without >= TRIES and not self.has_logprobs:
            self.refuse_logprobs(url, "gives those of other tokens than the answer's")

    def refuse_logprobs(self, url: str, why: str) -> NoReturn:
        """The server has no log probabilities as they are wanted: no answer would have them."""
        raise ModelError(
            f"--teacher_logprobs {self.chat.logprobs}: {url} {why}: lower it or leave it out, or use a "
            "server or an engine (--teacher_backend transformers, vllm) that gives them"
        )

    def _look(self) -> None:
        """Find out at once which servers are there, and whether they have the model."""
        reasons = {endpoint.url: self._look_at(endpoint.url) for endpoint in self.endpoints}
        if all(reasons.values()):
            found = "; ".join(f"{url}: {reason}" for url, reason in reasons.items())
            raise ModelError(f"--teacher_endpoint {found}: start the server or mend the URL")
        for endpoint in self.endpoints:
            if reason := reasons[endpoint.url]:
                endpoint.leave_out(reason, time.monotonic())

    def _look_at(self, url: str) -> str:
        """Why the server cannot be reached, or nothing."""
        try:
            with httpx2.Client(timeout=LOOK_TIMEOUT, **self.connection(url)) as client:
                response = client.get(_path(url, "models"))
                models = listed(response)
                unlisted = bool(models) and not self.chat.is_among(models)
                if models and not unlisted:
                    self._lists.add(url)
                # Some servers list a part of what they load when asked.
                refusal = self._refusal(client, url) if unlisted else ""
        except httpx2.HTTPError as error:
            return _unreachable(error)
        if response.status_code in {401, 403}:
            self.refuse_key(url, response.status_code)
        if response.is_redirect:
            raise ModelError(f"--teacher_endpoint {url} leads elsewhere: give the URL that it leads to")
        if response.status_code in _GATEWAY:  # others may fail at the list and answer all the same
            return f"status {response.status_code}"
        if refusal:
            raise ModelError(
                f"--teacher_model {self.chat.model} is not at {url} ({refusal}): give one that is, such as "
                + ", ".join(map(self.chat.plain, models[:5]))
            )
        return ""


@contextlib.contextmanager
def _loop() -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    """Something that runs coroutines, one after the other, on an event loop of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        with asyncio.Runner() as runner:
            yield runner.run
        return
    runner = asyncio.Runner()  # a notebook's loop runs in this thread, which takes no second one
    with ThreadPoolExecutor(1) as thread:
        try:
            yield lambda work: thread.submit(runner.run, work).result()
        finally:
            thread.submit(runner.close).result()


@dataclass
class _Job:
    """A prompt on its way to an answer."""

    draft: Draft
    tries: int = 0
    faults: int = 0
    last: Endpoint | None = None


class _Crew:
    """One call's requests; `todo` is taken from its end."""

    def __init__(self, teacher: EndpointTeacher, todo: list[tuple[int, Prompt]]) -> None:
        self._teacher = teacher
        self._todo = todo
        self._tasks: set[asyncio.Task[tuple[int, Answer | Rejection]]] = set()
        self._finished: asyncio.Queue[asyncio.Task[tuple[int, Answer | Rejection]]] = asyncio.Queue()
        self._clients: dict[str, httpx2.AsyncClient] = {}
        self._gate = asyncio.Lock()
        self._changed = asyncio.Event()
        self._stopped = asyncio.Event()
        self._stop: ModelError | None = None
        self._last_fault = "no reply"
        self._waiting = ""

    async def next(self) -> tuple[int, Answer | Rejection] | None:
        """The next result; None after the last. Raises what stopped the crew once nothing is in flight."""
        while True:
            # Half as many again wait for their turn, or out a fault.
            most = sum(endpoint.limit for endpoint in self._teacher.endpoints) * 3 // 2 + 1
            while self._todo and len(self._tasks) < most and not self._stop:
                task = asyncio.create_task(self._answer(*self._todo.pop()))
                self._tasks.add(task)
                task.add_done_callback(self._finished.put_nowait)
            if not self._tasks:
                if self._stop:
                    raise self._stop
                return None
            try:
                async with asyncio.timeout(max(PATIENCE, 2 * self._teacher.request_timeout)):
                    task = await self._finished.get()
            except TimeoutError:
                raise self._given_up() from None
            self._tasks.remove(task)
            try:
                return task.result()
            except ModelError as error:
                self._halt(error)

    async def close(self) -> None:
        """End what is in flight, and the connections."""
        # All of this loop: an interrupt leaves `next` waiting, too.
        tasks = {*asyncio.all_tasks(), *self._tasks} - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for client in self._clients.values():
            await client.aclose()

    def _given_up(self) -> ModelError:
        urls = " and ".join(endpoint.url for endpoint in self._teacher.endpoints)
        return ModelError(
            f"the server is down: {urls} gave no answer for {PATIENCE / 60:.0f} minutes "
            f"({self._last_fault}): start it again; the same command continues"
        )

    def _halt(self, error: ModelError) -> None:
        """Send nothing more; what is in flight may end."""
        self._stop = self._stop or error
        self._stopped.set()
        self._changed.set()

    async def _answer(self, number: int, prompt: Prompt) -> tuple[int, Answer | Rejection]:
        job = _Job(self._teacher.chat.draft(prompt))
        while True:
            result = await self._request(job)
            if isinstance(result, Answer | Rejection):
                return number, result
            if result is None:  # ask again, changed
                continue
            job.faults += 1
            self._last_fault = result.reason
            if job.tries >= TRIES:
                self._teacher.refused("answers no prompt", result.reason)
                return number, Rejection(f"given up after {job.tries} tries: {result.reason}")
            if not result.wait:  # which all who ask this server keep
                longest = min(LONGEST_BACKOFF, BACKOFF * 2 ** (job.faults - 1))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(random.uniform(0, longest)):  # noqa: S311
                        await self._stopped.wait()

    async def _request(self, job: _Job) -> Answer | Rejection | Fault | None:
        """One request, and what it teaches about its server."""
        endpoint = await self._turn(job)
        ticket, probes = endpoint.begin(), endpoint.paused
        job.last = endpoint
        try:
            result, status = await self._post(endpoint, job.draft)
        except BaseException:
            endpoint.cancel()
            raise
        finally:
            self._changed.set()
        fault = result if isinstance(result, Fault) else None
        endpoint.end(ticket, fault, time.monotonic())
        # Without a connection, or from a gateway whose server is known to be down, it is not the prompt's.
        if fault and status not in {0, 429} and not (probes and status in _GATEWAY):
            job.tries += 1
        return result

    async def _turn(self, job: _Job) -> Endpoint:
        """Wait, each in its turn, until a request may start; gives the server for it."""
        teacher = self._teacher
        async with self._gate:
            while True:
                self._check_budget()
                if self._stop:
                    raise self._stop
                now = time.monotonic()
                waits = {endpoint: endpoint.wait(now) for endpoint in teacher.endpoints}
                wait = max(teacher.rate.wait(now), min(waits.values()))
                self._tell(min(waits, key=waits.__getitem__), min(waits.values()))
                if not wait:
                    teacher.rate.take(now)
                    free = [endpoint for endpoint in teacher.endpoints if not waits[endpoint]]
                    # A retry goes elsewhere if it can; a probe that is due goes first.
                    return min(free, key=lambda e: (e is job.last, not e.paused, e.running / e.limit))
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(None if math.isinf(wait) else wait):
                        await self._changed.wait()

    def _tell(self, endpoint: Endpoint, wait: float) -> None:
        """Show a long wait for a server as long as it lasts."""
        why = ""
        if LOUD_WAIT <= wait < math.inf:
            until = time.strftime("%H:%M:%S", time.localtime(time.time() + wait))
            why = f"waits until {until} for {endpoint.url} ({endpoint.reason})"
        if why != self._waiting:
            self._waiting = why
            for tracker in at_work():
                tracker.wait(why)

    def _check_budget(self) -> None:
        most, spent = self._teacher.max_total_tokens, self._teacher.spent_tokens
        if most and spent >= most:
            self._halt(
                ModelError(
                    f"--max_total_tokens {most} is used up ({spent} tokens): raise it and run the same "
                    "command again, answers so far are kept"
                )
            )

    def _client(self, url: str) -> httpx2.AsyncClient:
        if url not in self._clients:
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=MOST_IN_FLIGHT)
            timeout = httpx2.Timeout(None, connect=min(LOOK_TIMEOUT, self._teacher.request_timeout))
            self._clients[url] = httpx2.AsyncClient(
                limits=limits, timeout=timeout, **self._teacher.connection(url)
            )
        return self._clients[url]

    async def _post(
        self, endpoint: Endpoint, draft: Draft
    ) -> tuple[Answer | Rejection | Fault | None, int | None]:
        """What came of a request, and its status: 0 without a connection, None without a whole reply."""
        body, timeout = self._teacher.chat.body(draft), self._teacher.request_timeout
        try:
            async with asyncio.timeout(timeout):  # of the whole: the client times each read alone
                response = await self._client(endpoint.url).post(
                    _path(endpoint.url, "chat/completions"), json=body
                )
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
            return Fault(_unreachable(error), down=True), 0
        except TimeoutError:
            return Fault(f"no reply within {timeout:g} s", down=True, slow=True), None
        except httpx2.HTTPError as error:  # whose text may hold a header
            return Fault(f"connection lost ({type(error).__name__})", down=True), None
        status = self._teacher.chat.status(response) or response.status_code
        return self._judge(endpoint, body, draft, response), status

    def _judge(
        self, endpoint: Endpoint, body: dict[str, Any], draft: Draft, response: httpx2.Response
    ) -> Answer | Rejection | Fault | None:
        """What a reply amounts to; None is to be asked again, changed."""
        chat, status = self._teacher.chat, self._teacher.chat.status(response)
        if 0 < status < 300:
            return self._read(endpoint, draft, response)
        if chat.is_spent(response):  # also one with seconds to wait, and before a key is blamed
            raise ModelError(
                f"--teacher_endpoint {endpoint.url} wants payment or a larger quota ({chat.said(response)}): "
                "the same command continues when there is credit, answers so far are kept"
            )
        if status == 0:
            return Fault(f"the server reports an error: {chat.said(response)}")
        if status == 401 or (status == 403 and not self._teacher.answered):  # later: of this prompt
            self._teacher.refuse_key(endpoint.url, status)
        pause = retry_after(response.headers.get("Retry-After", ""), math.inf)
        if status == 429 and pause > PATIENCE:
            raise ModelError(
                f"--teacher_endpoint {endpoint.url} wants no request for {pause:,.0f} s "
                f"({chat.said(response)}): the same command continues then, answers so far are kept"
            )
        if status in {408, 429} or status >= 500:
            wait = retry_after(response.headers.get("Retry-After", ""))
            reason = f"status {status}: {chat.said(response)}"
            return Fault(reason, down=status >= 500, slow=status in {408, 429, 503}, wait=wait)
        if status in {404, 405}:  # of all prompts, not of this one
            raise ModelError(
                f"--teacher_endpoint {endpoint.url} answers {status} ({chat.said(response)}): does the URL "
                "end in /v1, and is --teacher_model the server's name for it?"
            )
        if chat.adapts(body, draft, response):
            return None
        if chat.logprobs and "logprobs" in response.text and not self._teacher.answered:
            self._teacher.refuse_logprobs(endpoint.url, f"refuses it ({chat.said(response)})")
        self._teacher.refused(f"refuses every prompt with status {status}", chat.said(response))
        return Rejection(f"the server refused it with status {status}: {chat.said(response)}")

    def _read(
        self, endpoint: Endpoint, draft: Draft, response: httpx2.Response
    ) -> Answer | Rejection | Fault:
        chat = self._teacher.chat
        try:
            answer, model, tokens = chat.read(draft, response)
        except ValueError as error:
            if isinstance(error, NoLogprobsError) and not self._teacher.has_logprobs:
                self._teacher.refuse_logprobs(endpoint.url, "gives none")
            return Fault(str(error))
        # It cost what it cost, even where it cannot be used.
        self._teacher.spent_tokens += tokens
        if (other := chat.is_other(model)) and not self._teacher.takes(endpoint.url, model):
            return Fault(f"answered by another model: {chat.plain(model)}")
        if isinstance(answer, Fault):
            return answer
        if isinstance(answer, Rejection):
            self._teacher.refused("gives no prompt an answer", answer.reason)
            return answer
        if other:
            answer = answer._replace(model=chat.plain(model))
        else:
            self._teacher.named(endpoint.url)
        if chat.logprobs and answer.text:
            self._teacher.gave_logprobs(endpoint.url, of_answer=answer.answer_logprobs is not None)
        self._teacher.answered = True
        return answer


def _path(url: str, name: str) -> str:
    return f"{url.rstrip('/')}/{name}"


def _unreachable(error: httpx2.HTTPError) -> str:
    """Why there is no connection."""
    return one_line(f"out of reach ({str(error) or type(error).__name__})", 200)


def _is_loopback(url: str) -> bool:
    host = httpx2.URL(url).host
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

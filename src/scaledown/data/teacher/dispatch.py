"""Dispatch requests to servers: many at a time, each to a free server, with waits after faults."""

import asyncio
import contextlib
import math
import random
import time
from dataclasses import dataclass
from typing import Any, Final

import httpx2

from scaledown.data.prompts import Prompt
from scaledown.data.teacher.base import Rejection
from scaledown.data.teacher.chat import Draft, NoLogprobsError
from scaledown.data.teacher.rate_limit import LOUD_WAIT, MOST_IN_FLIGHT, Endpoint, Fault, retry_after
from scaledown.data.teacher.servers import GATEWAY, LOOK_TIMEOUT, REQUEST_TRIES, Servers, path, unreachable
from scaledown.errors import ModelError
from scaledown.records import Answer
from scaledown.run.progress import at_work

BACKOFF: Final = 0.5
"""The most seconds before the first retry; doubled each time, up to `LONGEST_BACKOFF`."""
LONGEST_BACKOFF: Final = 30.0
PATIENCE: Final = 1800.0
"""Seconds without a result after which the servers are given up."""


@dataclass
class _Job:
    """A prompt that is not answered yet."""

    draft: Draft
    tries: int = 0
    faults: int = 0
    last: Endpoint | None = None


class Dispatcher:
    """The requests of one call; `todo` is taken from its end."""

    def __init__(self, servers: Servers, todo: list[tuple[int, Prompt]]) -> None:
        self._servers = servers
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
        """Return the next result.

        None after the last. An error that stopped it is raised when no request runs.
        """
        while True:
            # 1.5 times the servers' limits: the other tasks wait for their turn or after a fault.
            most = sum(endpoint.limit for endpoint in self._servers.endpoints) * 3 // 2 + 1
            while self._todo and len(self._tasks) < most and not self._stop:
                task = asyncio.create_task(self._answer(*self._todo.pop()))
                self._tasks.add(task)
                task.add_done_callback(self._finished.put_nowait)
            if not self._tasks:
                if self._stop:
                    raise self._stop
                return None
            try:
                async with asyncio.timeout(max(PATIENCE, 2 * self._servers.request_timeout)):
                    task = await self._finished.get()
            except TimeoutError:
                raise self._given_up() from None
            self._tasks.remove(task)
            try:
                return task.result()
            except ModelError as error:
                self._halt(error)

    async def close(self) -> None:
        """Cancel the running requests, and close the connections."""
        # All tasks of this loop: after an interrupt, `next` is waiting too.
        tasks = {*asyncio.all_tasks(), *self._tasks} - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for client in self._clients.values():
            await client.aclose()

    def _given_up(self) -> ModelError:
        urls = " and ".join(endpoint.url for endpoint in self._servers.endpoints)
        return ModelError(
            f"the server is down: {urls} gave no answer for {PATIENCE / 60:.0f} minutes "
            f"({self._last_fault}): start it again; the same command continues"
        )

    def _halt(self, error: ModelError) -> None:
        """Send no more requests; running ones may finish."""
        self._stop = self._stop or error
        self._stopped.set()
        self._changed.set()

    async def _answer(self, number: int, prompt: Prompt) -> tuple[int, Answer | Rejection]:
        job = _Job(self._servers.chat.draft(prompt))
        while True:
            result = await self._request(job)
            if isinstance(result, Answer | Rejection):
                return number, result
            if result is None:  # ask again, changed
                continue
            job.faults += 1
            self._last_fault = result.reason
            if job.tries >= REQUEST_TRIES:
                self._servers.refused("answers no prompt", result.reason)
                return number, Rejection(f"given up after {job.tries} tries: {result.reason}")
            if not result.wait:  # with it, the server's own pause applies to all its requests
                longest = min(LONGEST_BACKOFF, BACKOFF * 2 ** (job.faults - 1))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(random.uniform(0, longest)):  # noqa: S311
                        await self._stopped.wait()

    async def _request(self, job: _Job) -> Answer | Rejection | Fault | None:
        """Send one request, and update what is known about its server."""
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
        # Without a connection, or behind a gateway without its server, the fault is not the prompt's.
        if fault and status not in {0, 429} and not (probes and status in GATEWAY):
            job.tries += 1
        return result

    async def _turn(self, job: _Job) -> Endpoint:
        """Wait for this request's turn to start. Returns the server for it."""
        servers = self._servers
        async with self._gate:
            while True:
                self._check_budget()
                if self._stop:
                    raise self._stop
                now = time.monotonic()
                waits = {endpoint: endpoint.wait(now) for endpoint in servers.endpoints}
                wait = max(servers.rate.wait(now), min(waits.values()))
                self._tell(min(waits, key=waits.__getitem__), min(waits.values()))
                if not wait:
                    servers.rate.take(now)
                    free = [endpoint for endpoint in servers.endpoints if not waits[endpoint]]
                    # A retry prefers another server; a probe that is due has priority.
                    return min(free, key=lambda e: (e is job.last, not e.paused, e.running / e.limit))
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(None if math.isinf(wait) else wait):
                        await self._changed.wait()

    def _tell(self, endpoint: Endpoint, wait: float) -> None:
        """Show a long wait for a server while it lasts."""
        why = ""
        if LOUD_WAIT <= wait < math.inf:
            until = time.strftime("%H:%M:%S", time.localtime(time.time() + wait))
            why = f"waits until {until} for {endpoint.url} ({endpoint.reason})"
        if why != self._waiting:
            self._waiting = why
            for tracker in at_work():
                tracker.wait(why)

    def _check_budget(self) -> None:
        most, spent = self._servers.max_total_tokens, self._servers.spent_tokens
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
            timeout = httpx2.Timeout(None, connect=min(LOOK_TIMEOUT, self._servers.request_timeout))
            self._clients[url] = httpx2.AsyncClient(
                limits=limits, timeout=timeout, **self._servers.connection(url)
            )
        return self._clients[url]

    async def _post(
        self, endpoint: Endpoint, draft: Draft
    ) -> tuple[Answer | Rejection | Fault | None, int | None]:
        """Return the result of a request and its status: 0 without connection, None without a full reply."""
        body, timeout = self._servers.chat.body(draft), self._servers.request_timeout
        try:
            async with asyncio.timeout(timeout):  # of the whole request: the client limits only each read
                response = await self._client(endpoint.url).post(
                    path(endpoint.url, "chat/completions"), json=body
                )
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
            return Fault(unreachable(error), down=True), 0
        except TimeoutError:
            return Fault(f"no reply within {timeout:g} s", down=True, slow=True), None
        except httpx2.HTTPError as error:  # its text may contain a header
            return Fault(f"connection lost ({type(error).__name__})", down=True), None
        status = self._servers.chat.status(response) or response.status_code
        return self._judge(endpoint, body, draft, response), status

    def _judge(
        self, endpoint: Endpoint, body: dict[str, Any], draft: Draft, response: httpx2.Response
    ) -> Answer | Rejection | Fault | None:
        """Return the result of a reply; None if the changed request must be sent again."""
        chat, status = self._servers.chat, self._servers.chat.status(response)
        if 0 < status < 300:
            return self._read(endpoint, draft, response)
        if chat.is_spent(response):  # before the key is checked, and even with seconds to wait
            raise ModelError(
                f"--teacher_endpoint {endpoint.url} requires payment or a larger quota "
                f"({chat.error_text(response)}): the same command continues when there is credit, answers so "
                "far are kept"
            )
        if status == 0:
            return Fault(f"the server reports an error: {chat.error_text(response)}")
        # After a success, 403 is about this prompt and not about the key.
        if status == 401 or (status == 403 and not self._servers.answered):
            self._servers.refuse_key(endpoint.url, status)
        pause = retry_after(response.headers.get("Retry-After", ""), math.inf)
        if status == 429 and pause > PATIENCE:
            raise ModelError(
                f"--teacher_endpoint {endpoint.url} wants no request for {pause:,.0f} s "
                f"({chat.error_text(response)}): the same command continues then, answers so far are kept"
            )
        if status in {408, 429} or status >= 500:
            wait = retry_after(response.headers.get("Retry-After", ""))
            reason = f"status {status}: {chat.error_text(response)}"
            return Fault(reason, down=status >= 500, slow=status in {408, 429, 503}, wait=wait)
        if status in {404, 405}:  # about all prompts, not this one
            raise ModelError(
                f"--teacher_endpoint {endpoint.url} answers {status} ({chat.error_text(response)}): does the "
                "URL end in /v1, and is --teacher_model the server's name for it?"
            )
        if chat.adapts(body, draft, response):
            return None
        if chat.logprobs and "logprobs" in response.text and not self._servers.answered:
            self._servers.refuse_logprobs(endpoint.url, f"refuses it ({chat.error_text(response)})")
        self._servers.refused(f"refuses every prompt with status {status}", chat.error_text(response))
        return Rejection(f"the server refused it with status {status}: {chat.error_text(response)}")

    def _read(
        self, endpoint: Endpoint, draft: Draft, response: httpx2.Response
    ) -> Answer | Rejection | Fault:
        chat = self._servers.chat
        try:
            answer, model, tokens = chat.read(draft, response)
        except ValueError as error:
            if isinstance(error, NoLogprobsError) and not self._servers.has_logprobs:
                self._servers.refuse_logprobs(endpoint.url, "gives none")
            return Fault(str(error))
        # Its tokens count, even if the answer cannot be used.
        self._servers.spent_tokens += tokens
        if (other := chat.is_other(model)) and not self._servers.takes(endpoint.url, model):
            return Fault(f"answered by another model: {chat.plain(model)}")
        if isinstance(answer, Fault):
            return answer
        if isinstance(answer, Rejection):
            self._servers.refused("gives no prompt an answer", answer.reason)
            return answer
        if other:
            answer = answer._replace(model=chat.plain(model))
        else:
            self._servers.named(endpoint.url)
        if chat.logprobs and answer.text:
            self._servers.gave_logprobs(endpoint.url, of_answer=answer.answer_logprobs is not None)
        self._servers.gave_answer()
        return answer

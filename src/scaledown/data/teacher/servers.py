"""OpenAI-compatible servers: which are available, whether they have the model, what they refuse."""

import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final, NoReturn

import httpx2

from scaledown.data.teacher.base import TeacherSettings
from scaledown.data.teacher.chat import Chat, served_models
from scaledown.data.teacher.rate_limit import Endpoint, Rate
from scaledown.errors import ModelError, one_line
from scaledown.urls import is_loopback

log = logging.getLogger("scaledown")

KEY: Final = "OPENAI_API_KEY"

REQUEST_TRIES: Final = 8
"""Attempts for one prompt, at faults that it may cause itself."""
REFUSALS: Final = 20
"""Consecutive refusals with one status, without any answer, after which the server is the cause."""
LATER_REFUSALS: Final = 100
"""The same after an answer: a key has expired, or a firewall has closed."""
ALIAS: Final = 3
"""Answers under another name, and none under its own, after which a listed name counts as an alias."""
LOOK_TIMEOUT: Final = 10.0
GATEWAY: Final = frozenset({502, 503, 504, 529})
"""Statuses of a gateway whose server does not respond."""


class Servers:
    """One or more OpenAI-compatible servers of one model, which share the load.

    The key comes from `OPENAI_API_KEY`.

    Args:
        model: The name of the model on the servers.
        endpoints: URLs of the servers, for example `http://host:8000/v1`.
        generation: How the model decodes.
        max_total_tokens: The most tokens of all prompts and answers; 0 is no limit.
        max_requests_per_minute: To all servers together; 0 is no limit.
        request_timeout: Seconds.
        spent_tokens: Tokens of `max_total_tokens` that earlier runs used.

    Raises:
        ModelError: No server answers, or one of them does not have the model or refuses the key.
    """

    def __init__(
        self,
        model: str,
        endpoints: Sequence[str],
        generation: TeacherSettings,
        *,
        max_total_tokens: int = 0,
        max_requests_per_minute: int = 0,
        request_timeout: float = 120.0,
        spent_tokens: int = 0,
    ) -> None:
        self.max_total_tokens = max_total_tokens
        self.spent_tokens = spent_tokens
        """Tokens of prompts and answers, including earlier runs."""
        self.request_timeout = request_timeout
        self.rate = Rate(max_requests_per_minute)
        self.endpoints = [Endpoint(url) for url in dict.fromkeys(endpoints)]
        self._key = os.environ.get(KEY, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ModelError(f"{KEY} has characters that no key has: set it again")
        self.chat = Chat(model, generation, self._key)
        self.answered = False
        self.has_logprobs = False
        """Whether an answer came with the requested log probabilities."""
        self._without = 0
        self._refused, self._refusals = "", 0
        # By URL: answers under other names; servers that list the model, use its name, use another name.
        self._others: Counter[str] = Counter()
        self._lists: set[str] = set()
        self._named: set[str] = set()
        self._aliased: set[str] = set()
        for endpoint in self.endpoints:
            if (
                self._key
                and endpoint.url.startswith("http://")
                and not is_loopback(httpx2.URL(endpoint.url).host)
            ):
                log.warning("%s goes to %s unencrypted: use https:// where others listen", KEY, endpoint.url)
        self._look()

    def connection(self, url: str) -> dict[str, Any]:
        """Return the client's settings for a server."""
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        # Other servers may need a proxy; a server on this machine cannot be reached by it.
        return {"headers": headers, "trust_env": not is_loopback(httpx2.URL(url).host)}

    def _refusal(self, client: httpx2.Client, url: str) -> str:
        """Ask for one token.

        Returns the server's message if it does not know the model, else an empty text.
        """
        body = {
            "model": self.chat.model,
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 1,
        }
        response = client.post(path(url, "chat/completions"), json=body, timeout=self.request_timeout)
        status = self.chat.status(response)
        known = not 400 <= status < 500 or status == 429 or self.chat.is_spent(response)
        return "" if known else self.chat.error_text(response) or f"status {status}"

    def refuse_key(self, url: str, status: int) -> NoReturn:
        """Raise an error for a wrong or missing key: no prompt can be answered.

        Args:
            url: The server.
            status: The status of its reply.

        Raises:
            ModelError: Always.
        """
        raise ModelError(f"--teacher_endpoint {url} answers {status}: set {KEY} to a key that it accepts")

    def refused(self, how: str, message: str) -> None:
        """Count a prompt without an answer.

        Args:
            how: What the server did, for example its status; refusals of one kind are counted together.
            message: The server's message.

        Raises:
            ModelError: There were too many refusals of this kind without an answer between them.
        """
        self._refusals = self._refusals + 1 if how == self._refused else 1
        self._refused = how
        if self._refusals >= (LATER_REFUSALS if self.answered else REFUSALS):
            raise ModelError(
                f"the server {how} ({message}; {self._refusals} in a row): fix that and run the same command "
                "again"
            )

    def gave_answer(self) -> None:
        """Record an answer: refusals before it were about single prompts."""
        self.answered, self._refusals = True, 0

    def named(self, url: str) -> None:
        """Record that a server answered under the requested name."""
        self._named.add(url)

    def takes(self, url: str, model: str) -> bool:
        """Decide whether to accept an answer under another model name.

        It is accepted if the server lists the requested model, has not answered under this name, and has
        answered under other names `ALIAS` times.

        Args:
            url: The server.
            model: The name in the reply.

        Raises:
            ModelError: No answer was accepted so far, after `REQUEST_TRIES` answers under other names.
        """
        if url in self._aliased:
            return True
        self._others[url] += 1
        if url in self._lists and url not in self._named:
            if self._others[url] < ALIAS:
                return False
            names = (url, self.chat.model, self.chat.plain(model))
            log.warning("%s answers for %s under the name %s: both are kept", *names)
            self._aliased.add(url)
            return True
        if self._others.total() >= REQUEST_TRIES and not self.answered:
            raise ModelError(
                f"the server answers for --teacher_model {self.chat.model} with {self.chat.plain(model)}: if "
                "that is the one you want, name it"
            )
        return False

    def gave_logprobs(self, url: str, *, of_answer: bool) -> None:
        """Record whether an answer came with usable log probabilities.

        Args:
            url: The server.
            of_answer: Whether they belong to the answer's own tokens.

        Raises:
            ModelError: None of the first `REQUEST_TRIES` answers had usable ones.
        """
        self.has_logprobs |= of_answer
        self._without += not of_answer
        if self._without >= REQUEST_TRIES and not self.has_logprobs:
            self.refuse_logprobs(url, "gives those of other tokens than the answer's")

    def refuse_logprobs(self, url: str, why: str) -> NoReturn:
        """Raise an error for a server without usable log probabilities: no answer would have them.

        Args:
            url: The server.
            why: What the server does, as the rest of a sentence.

        Raises:
            ModelError: Always.
        """
        raise ModelError(
            f"--teacher_logprobs {self.chat.logprobs}: {url} {why}: lower it or leave it out, or use a "
            "server or an engine (--teacher_backend transformers, vllm) that gives them"
        )

    def _look(self) -> None:
        """Check, for all servers at once, that they respond and have the model."""
        reasons = {endpoint.url: self._look_at(endpoint.url) for endpoint in self.endpoints}
        if all(reasons.values()):
            found = "; ".join(f"{url}: {reason}" for url, reason in reasons.items())
            raise ModelError(f"--teacher_endpoint {found}: start the server or correct the URL")
        for endpoint in self.endpoints:
            if reason := reasons[endpoint.url]:
                endpoint.leave_out(reason, time.monotonic())

    def _look_at(self, url: str) -> str:
        """Return why the server cannot be used; empty if it can."""
        try:
            with httpx2.Client(timeout=LOOK_TIMEOUT, **self.connection(url)) as client:
                response = client.get(path(url, "models"))
                models = served_models(response)
                unlisted = bool(models) and not self.chat.is_among(models)
                if models and not unlisted:
                    self._lists.add(url)
                # Some servers list only a part of the models that they can load.
                refusal = self._refusal(client, url) if unlisted else ""
        except httpx2.HTTPError as error:
            return unreachable(error)
        if response.status_code in {401, 403}:
            self.refuse_key(url, response.status_code)
        if response.is_redirect:
            raise ModelError(f"--teacher_endpoint {url} leads elsewhere: give the URL that it leads to")
        if response.status_code in GATEWAY:  # other servers may lack the list and still answer
            return f"status {response.status_code}"
        if refusal:
            raise ModelError(
                f"--teacher_model {self.chat.model} is not at {url} ({refusal}): give one that is, such as "
                + ", ".join(map(self.chat.plain, models[:5]))
            )
        return ""


def path(url: str, name: str) -> str:
    """Return the URL of a request to a server."""
    return f"{url.rstrip('/')}/{name}"


def unreachable(error: httpx2.HTTPError) -> str:
    """Return why there is no connection."""
    return one_line(f"out of reach ({str(error) or type(error).__name__})", 200)

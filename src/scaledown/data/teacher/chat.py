"""Chat completions: make the request for a prompt, and read the reply."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import httpx2

from scaledown.data.logprobs import for_answer, from_server
from scaledown.data.prompts import Prompt
from scaledown.data.teacher.base import Rejection, TeacherSettings, seed_of
from scaledown.data.teacher.rate_limit import Fault
from scaledown.data.teacher.reply import CONTROL, heard
from scaledown.errors import ModelError, one_line
from scaledown.records import Answer, Logprobs

log = logging.getLogger("scaledown")

SHORTENINGS: Final = 12
"""How often a prompt is shortened, each time by a third of its documents, before all are removed."""

_CHARACTERS_A_TOKEN: Final = 4
_TOO_LONG: Final = re.compile(
    r"context.{0,20}(length|window|size)|too (long|large|many (input )?tokens)|max_model_len|"
    r"(maximum|input|prompt|sequence).{0,30}length|tokens.{0,30}exceed|exceed.{0,60}tokens|input tokens|"
    r"reduce the (length|input|prompt)|tokens.{0,30}must be <",
    re.DOTALL,
)
_SYSTEM_ROLE: Final = re.compile(
    r"system.{0,40}role|role.{0,40}system|conversation roles must alternate", re.DOTALL
)
_TEMPERATURE: Final = re.compile(
    r"temperature.{0,80}(only|default|support|fixed|must be 1\b)|(only|support).{0,80}temperature", re.DOTALL
)
_POSITIVE: Final = re.compile(r"temperature.{0,40}(positive|greater than 0|> ?0)", re.DOTALL)
# Finish reasons of servers: the answer reached its limit; it is forbidden; it was broken off.
_CUT: Final = re.compile(r"length|(model|max)_length|token_limit|max_\w*tokens")
_FILTERED: Final = re.compile(
    r"content_filter\w*|guardrail\w*|safety|recitation|blocklist|prohibited_content|refusal"
)
_BROKEN: Final = re.compile(
    r"abort(ed)?|error\w*|\w+_error|fail(ed|ure)|cancell?ed|timeout|interrupted|insufficient_system_resource"
)
# Errors that waiting does not fix. A server may report a quota per minute in the same way, with seconds to
# wait.
_SPENT: Final = re.compile(
    r"insufficient[_ ](quota|balance|credits?|funds)|billing_(hard_limit|not_active)|out of credits|"
    r"credit balance is too low|account.{0,20}(deactivated|suspended|overdue|in arrears)|"
    r"exceeded your current quota(?!.*retry)|(credit|key) limit exceeded|arrearage|"
    r"limit exceeded: \S*per-day",
    re.DOTALL,
)
_SPENT_STATUS: Final = frozenset({0, 400, 402, 403, 429})
# What servers call an error, where they give no status of it.
_STATUS: Final = {"rate_limit": 429, "overloaded": 503, "invalid_request": 400}
_THOUGHTS: Final = ("reasoning_content", "reasoning", "thinking")
_MOST_TOKENS: Final = 1 << 40  # a larger count is invalid


class NoLogprobsError(ValueError):
    """A reply lacks the requested log probabilities."""


class Draft:
    """A prompt as it is sent: each document cut to `document_tokens` (0: whole), then shortened further."""

    def __init__(self, prompt: Prompt, document_tokens: int) -> None:
        most = document_tokens * _CHARACTERS_A_TOKEN
        self.prompt = prompt
        plain = [
            CONTROL.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text) for text in prompt.documents
        ]
        self._all = sum(map(len, plain))
        self.documents = [_head(text, most) if most else text for text in plain]
        self._shortened = 0

    @property
    def dropped_tokens(self) -> int:
        """Estimate of the tokens left out: characters // 4."""
        left_out = self._all - sum(map(len, self.documents))
        return left_out // _CHARACTERS_A_TOKEN

    def shorten(self) -> bool:
        """Cut a third of the documents' text, from the last one. Returns False if nothing is left to cut."""
        length = sum(map(len, self.documents))
        self._shortened += 1
        surplus = length if self._shortened > SHORTENINGS else -(-length // 3)
        while self.documents and surplus > 0:
            last = self.documents.pop()
            if kept := _head(last, len(last) - surplus):
                self.documents.append(kept)
            surplus -= len(last) - len(kept)
        return length > 0


class Reply(NamedTuple):
    """The result of a completion."""

    result: Answer | Rejection | Fault
    """The answer, or the reason why there is none."""
    model: str
    """The model that the reply names."""
    tokens: int
    """Tokens of prompt and reply."""


class Chat:
    """Requests to one model, adapted to what its servers refuse.

    Args:
        model: The name of the model on the servers.
        generation: How it decodes.
        secret: The key; it is removed from all messages. May be empty.
    """

    def __init__(self, model: str, generation: TeacherSettings, secret: str) -> None:
        self.model = model
        self.logprobs = generation.logprobs
        """Number of log probabilities requested for each token."""
        self._generation = generation
        self._secret = secret
        self._folds_system = False
        self._own_temperature = False
        self._seeds = True
        self._limit = "max_tokens"

    def draft(self, prompt: Prompt) -> Draft:
        """Return the prompt, with its documents cut as the settings say."""
        return Draft(prompt, self._generation.document_tokens)

    def body(self, draft: Draft) -> dict[str, Any]:
        """Make the body of a request.

        Args:
            draft: The prompt as it is sent.

        Returns:
            JSON values, without features that the servers refused before.
        """
        prompt = draft.prompt
        system, user = prompt.system, prompt.user(draft.documents)
        if system and self._folds_system:
            system, user = "", f"{system}\n\n{user}"
        messages = [{"role": "system", "content": system}] if system else []
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [*messages, {"role": "user", "content": user}],
            self._limit: self._generation.max_new_tokens,
            "temperature": prompt.temperature,
            "stream": False,
        }
        if self._own_temperature:
            del body["temperature"]
        if prompt.temperature and self._seeds:
            body["seed"] = seed_of(self._generation.seed, prompt.key)
        if self.logprobs:
            body |= {"logprobs": True, "top_logprobs": self.logprobs}
        return body

    def adapts(self, body: dict[str, Any], draft: Draft, response: httpx2.Response) -> bool:
        """Adapt to a refused request.

        Features that the server does not support are left out of all later requests.

        Args:
            body: The body of the refused request.
            draft: The prompt; it is shortened if it was too long.
            response: The server's reply.

        Returns:
            Whether to send it again.

        Raises:
            ModelError: `--temperature` must be changed.
        """
        text, status = response.text.lower(), self.status(response)
        if status == 400 and "max_completion_tokens" in text and "max_tokens" in body:
            self._limit = "max_completion_tokens"
            return True
        if status == 400 and _SYSTEM_ROLE.search(text) and len(body["messages"]) > 1:
            log.info("the server does not support the system role: its text goes into the user's message")
            self._folds_system = True
            return True
        if status in {400, 422} and "seed" in body and re.search(r"\bseed\b", text):
            log.warning(
                "the server does not accept a seed (%s): its samples differ in each run",
                self.error_text(response),
            )
            self._seeds = False
            return True
        above_0 = bool(_POSITIVE.search(text)) and not draft.prompt.temperature
        if status in {400, 422} and "temperature" in body and (above_0 or _TEMPERATURE.search(text)):
            if self._generation.temperature not in {None, 1.0} and not above_0:
                raise ModelError(
                    f"--temperature {self._generation.temperature:g}: the server of {self.model} refuses it "
                    f"({self.error_text(response)}): give --temperature 1"
                )
            log.warning(
                "the server accepts only its own temperature (%s): none is sent", self.error_text(response)
            )
            self._own_temperature = True
            return True
        return status in {400, 413, 422} and bool(_TOO_LONG.search(text)) and draft.shorten()

    def read(self, draft: Draft, response: httpx2.Response) -> Reply:
        """Read a reply.

        Log probabilities of tokens outside the answer, such as a model's thoughts, are left out.

        Args:
            draft: The prompt as it was sent.
            response: The reply.

        Returns:
            The answer, a rejection if the server or the model refuses one, or a fault if the server ended the
            answer early.

        Raises:
            NoLogprobsError: An answer has no log probabilities, though they were requested.
            ValueError: The reply is not a chat completion.
        """
        try:
            reply = response.json()
            choice = reply["choices"][0]
            message = choice["message"]
            thought = any(message.get(name) for name in _THOUGHTS)
            ended = choice.get("finish_reason") is not None  # Azure and Gemini leave out what is empty
            content = message.get("content") if thought or ended else message["content"]
            thought |= _holds_thoughts(content)
            # JSON may hold halves of characters, which no file does.
            text = _message_text(content).strip().encode(errors="replace").decode()
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            reason = f"{type(error).__name__}: {self.error_text(response)}"
            raise ValueError(f"the reply is not a chat completion ({reason})") from None
        usage = reply.get("usage")
        usage = usage if isinstance(usage, Mapping) else {}
        prompt = draft.prompt.system + draft.prompt.user(draft.documents)
        answer = Answer(
            text,
            self._end(choice.get("finish_reason")),
            _reported_tokens(usage.get("prompt_tokens"), prompt),
            _reported_tokens(usage.get("completion_tokens"), text),
            draft.dropped_tokens,
        )
        model = str(reply.get("model") or self.model)
        tokens = answer.prompt_tokens + answer.answer_tokens
        end = answer.finish_reason.lower()
        if _FILTERED.fullmatch(end):
            return Reply(Rejection(f"the server withheld the answer: {answer.finish_reason}"), model, tokens)
        if _BROKEN.fullmatch(end):
            why = f"{answer.finish_reason} {choice.get('error') or ''}".strip()
            return Reply(Fault(f"the server broke off the answer: {self.plain(why)}"), model, tokens)
        if not text and isinstance(declined := message.get("refusal"), str) and declined.strip():
            return Reply(Rejection(f"the model declined: {self.plain(declined)}"), model, tokens)
        if self.logprobs and text:
            logprobs = _logprobs(choice.get("logprobs"), self.logprobs)
            answer = answer._replace(answer_logprobs=for_answer(logprobs, text))
        return Reply(heard(answer, self._generation, thought=thought), model, tokens)

    def _end(self, reason: object) -> str:
        """Return why the answer ended: `stop`, `length`, or the server's own word."""
        if isinstance(reason, Mapping):
            reason = reason.get("type")
        if not isinstance(reason, str) or not reason.strip():
            return "stop"
        return "length" if _CUT.fullmatch(reason.strip().lower()) else self.plain(reason)

    def status(self, response: httpx2.Response) -> int:
        """Return the status of a reply, also if only its text has it; 0 for an error without a status."""
        error = _error(response)
        status: int = response.status_code
        if not response.is_success or error is None:
            return status
        code = error.get("code", error.get("status")) if isinstance(error, Mapping) else None
        if str(code).isdecimal() and 400 <= int(str(code)) < 600:
            return int(str(code))
        return next((own for word, own in _STATUS.items() if word in response.text), 0)

    def is_spent(self, response: httpx2.Response) -> bool:
        """Whether the server requires payment or a larger quota: waiting does not help."""
        status = self.status(response)
        return status == 402 or (status in _SPENT_STATUS and bool(_SPENT.search(response.text.lower())))

    def is_other(self, model: str) -> bool:
        """Whether a reply is clearly from another model; servers may add prefixes and tags to a name."""
        return _base(model) not in self.model.lower() and _base(self.model) not in model.lower()

    def is_among(self, models: Sequence[str]) -> bool:
        """Whether a server that lists these has the model."""
        return bool({_base(self.model), _base(self.model.partition(":")[0])} & set(map(_base, models)))

    def plain(self, text: str) -> str:
        """Return a server's text for a message: one line, short, without the secret."""
        return one_line(text.replace(self._secret, "[key]") if self._secret else text, 200)

    def error_text(self, response: httpx2.Response) -> str:
        """Return the message of an error reply, or its text."""
        error = _error(response)
        message = error.get("message") if isinstance(error, Mapping) else error
        return self.plain(message if isinstance(message, str) else response.text)


def _error(response: httpx2.Response) -> Any:
    """Return the error in a reply that is not a completion; None if it has none."""
    try:
        content = response.json()
    except ValueError:
        return None
    content = content[0] if isinstance(content, list) and content else content
    if not isinstance(content, Mapping) or (response.is_success and content.get("choices")):
        return None
    return content.get("error") or (None if response.is_success else content)


def _message_text(content: Any) -> str:
    """Return the text of a message, which may be in parts; parts with thoughts are left out."""
    if isinstance(content, list):
        return "".join(part if isinstance(part, str) else part.get("text") or "" for part in content)
    if not isinstance(content, str | None):
        raise TypeError
    return content or ""


def _holds_thoughts(content: Any) -> bool:
    kinds = [str(part.get("type")) for part in content if isinstance(part, Mapping)] if content else []
    return any("think" in kind or "reason" in kind for kind in kinds)


def _logprobs(given: Any, count: int) -> Logprobs:
    """Read the log probabilities of a choice. Raises `NoLogprobsError` if they are missing or invalid."""
    try:
        found = from_server(given["content"], count) if given else None
    except (ValueError, TypeError, LookupError, AttributeError):
        found = None
    if not found:
        raise NoLogprobsError("the reply has no log probabilities")
    return found


def served_models(response: httpx2.Response) -> list[str]:
    """Return the models in the reply to GET /models; empty if the server has no such list."""
    try:
        return [str(entry["id"]) for entry in response.json()["data"]] if response.is_success else []
    except (ValueError, TypeError, LookupError):
        return []


def _head(text: str, size: int) -> str:
    """Return at most `size` characters from the start, cut between words if possible."""
    if len(text) <= size:
        return text
    words = text[: size + 1].rsplit(None, 1) if size > 0 else [""]
    return (words[0] if len(words) > 1 else text[: max(0, size)]).rstrip()


def _reported_tokens(count: object, text: str) -> int:
    if isinstance(count, int | float) and not isinstance(count, bool) and 0 <= count < _MOST_TOKENS:
        return int(count)
    return len(text) // _CHARACTERS_A_TOKEN


def _base(model: str) -> str:
    """Return the name of a model without folder, revision or the tag `latest`."""
    name = model.rstrip("/").rpartition("/")[2].partition("@")[0].lower()
    return name.removesuffix(":latest")

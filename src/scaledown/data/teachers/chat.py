"""The wire: a prompt as a chat completions request, and what the reply says."""

import logging
import re
from collections.abc import Sequence
from typing import Any, Final

import httpx2

from scaledown.data.logprobs import for_answer, from_server
from scaledown.data.prompts import Prompt
from scaledown.data.teachers import Generation, seed_of
from scaledown.errors import one_line
from scaledown.records import Answer

log = logging.getLogger("scaledown")

SHORTENINGS: Final = 12
"""Of one prompt, each by a third of its documents, before it is asked without any."""

_CHARACTERS_A_TOKEN: Final = 4
_TOO_LONG: Final = re.compile(
    r"context.{0,20}(length|window|size)|too (long|large|many (input )?tokens)|max_model_len|"
    r"(maximum|input|prompt|sequence).{0,30}length|tokens.{0,30}exceed|exceed.{0,60}tokens|input tokens|"
    r"reduce the (length|input|prompt)",
    re.DOTALL,
)
_SYSTEM_ROLE: Final = re.compile(
    r"system.{0,40}role|role.{0,40}system|conversation roles must alternate", re.DOTALL
)
# What ends a turn in the chat templates of common models: text from data shall not.
_CONTROL: Final = re.compile(r"<\|[^|<>\n]{1,40}\|>|\[/?INST\]|</?s>|<(?:start|end)_of_turn>|<<SYS>>")


class NoLogprobsError(ValueError):
    """A reply without the log probabilities that were asked for."""


class Draft:
    """A prompt as it is sent: each document cut to `document_tokens` (0: whole), then shortened further."""

    def __init__(self, prompt: Prompt, document_tokens: int) -> None:
        most = document_tokens * _CHARACTERS_A_TOKEN
        self.prompt = prompt
        plain = [
            _CONTROL.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text) for text in prompt.documents
        ]
        self._all = sum(map(len, plain))
        self.documents = [_head(text, most) if most else text for text in plain]
        self._shortened = 0

    @property
    def dropped_tokens(self) -> int:
        """Characters left out // 4."""
        left_out = self._all - sum(map(len, self.documents))
        return left_out // _CHARACTERS_A_TOKEN

    def shorten(self) -> bool:
        """Cut a third of the documents' text, from the last one; false where nothing is left to cut."""
        length = sum(map(len, self.documents))
        self._shortened += 1
        surplus = length if self._shortened > SHORTENINGS else -(-length // 3)
        while self.documents and surplus > 0:
            last = self.documents.pop()
            if kept := _head(last, len(last) - surplus):
                self.documents.append(kept)
            surplus -= len(last) - len(kept)
        return length > 0


class Chat:
    """How one model is asked over the wire, adapted to what its servers refuse. `secret` is in no message."""

    def __init__(self, model: str, generation: Generation, secret: str) -> None:
        self.model = model
        self.logprobs = generation.logprobs
        """How many are asked for with each token."""
        self._generation = generation
        self._secret = secret
        self._folds_system = False
        self._limit = "max_tokens"

    def draft(self, prompt: Prompt) -> Draft:
        """The prompt with as much of its documents as the settings allow."""
        return Draft(prompt, self._generation.document_tokens)

    def body(self, draft: Draft) -> dict[str, Any]:
        """The request."""
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
        if prompt.temperature:
            body["seed"] = seed_of(self._generation.seed, prompt.key)
        if self.logprobs:
            body |= {"logprobs": True, "top_logprobs": self.logprobs}
        return body

    def adapts(self, body: dict[str, Any], draft: Draft, response: httpx2.Response) -> bool:
        """Whether a refused request is worth sending again, changed; whatever its server does not know
        changes in all requests from then on.
        """
        text, status = response.text.lower(), response.status_code
        if status == 400 and "max_completion_tokens" in text and "max_tokens" in body:
            self._limit = "max_completion_tokens"
            return True
        if status == 400 and _SYSTEM_ROLE.search(text) and len(body["messages"]) > 1:
            log.info("the server knows no system role: its text goes into the user's turn")
            self._folds_system = True
            return True
        return status in {400, 413, 422} and bool(_TOO_LONG.search(text)) and draft.shorten()

    def read(self, draft: Draft, response: httpx2.Response) -> tuple[Answer, str]:
        """The answer in a reply, and the model that gave it.

        Log probabilities of other tokens than the answer's, such as a model's thoughts, are left out. Raises
        `NoLogprobsError` for an answer without those that were asked for, `ValueError` for any other reply.
        """
        try:
            reply = response.json()
            choice, usage = reply["choices"][0], reply.get("usage") or {}
            # JSON may hold halves of characters, which no file does.
            text = _text(choice["message"]["content"]).strip().encode(errors="replace").decode()
            answer = Answer(
                text,
                "length" if choice.get("finish_reason") == "length" else "stop",
                _tokens(usage.get("prompt_tokens"), draft.prompt.system + draft.prompt.user(draft.documents)),
                _tokens(usage.get("completion_tokens"), text),
                draft.dropped_tokens,
            )
            content = (choice.get("logprobs") or {}).get("content")
            logprobs = from_server(content, self.logprobs) if self.logprobs else None
            model = str(reply.get("model") or self.model)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"the reply is not a chat completion ({type(error).__name__})") from None
        if self.logprobs and text and not logprobs:
            raise NoLogprobsError("the reply has no log probabilities")
        return answer._replace(answer_logprobs=logprobs and for_answer(logprobs, text)), model

    def is_other(self, model: str) -> bool:
        """Whether a reply came from a model that is clearly another one; servers decorate names."""
        return _base(model) not in self.model.lower() and _base(self.model) not in model.lower()

    def is_among(self, models: Sequence[str]) -> bool:
        """Whether a server that lists these has the model."""
        return bool({_base(self.model), _base(self.model.partition(":")[0])} & set(map(_base, models)))

    def plain(self, text: str) -> str:
        """Text from a server, fit for a message: one line, short, and without the secret."""
        return one_line(text.replace(self._secret, "[key]") if self._secret else text, 200)

    def said(self, response: httpx2.Response) -> str:
        """The message of a reply that is an error, or its text."""
        try:
            error = response.json()
            error = error.get("error", error) if isinstance(error, dict) else error
            message = error.get("message") if isinstance(error, dict) else error
        except ValueError:
            message = None
        return self.plain(message if isinstance(message, str) else response.text)


def _text(content: Any) -> str:
    """The text of a message, which some servers give in parts."""
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def listed(response: httpx2.Response) -> list[str]:
    """The models in the reply to GET /models; none where a server has no such list."""
    try:
        return [str(entry["id"]) for entry in response.json()["data"]] if response.is_success else []
    except (ValueError, TypeError, LookupError):
        return []


def _head(text: str, size: int) -> str:
    """At most `size` characters from the start, whole words if there is more than one."""
    if len(text) <= size:
        return text
    words = text[: size + 1].rsplit(None, 1) if size > 0 else [""]
    return (words[0] if len(words) > 1 else text[: max(0, size)]).rstrip()


def _tokens(count: object, text: str) -> int:
    return count if isinstance(count, int) and count >= 0 else len(text) // _CHARACTERS_A_TOKEN


def _base(model: str) -> str:
    """The name of a model without its folder, revision or tag of the latest."""
    name = model.rstrip("/").rpartition("/")[2].partition("@")[0].lower()
    return name.removesuffix(":latest")

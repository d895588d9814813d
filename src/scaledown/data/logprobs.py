"""Log probabilities of a teacher's answer: reads them from an engine's reply, cuts and checks them."""

import codecs
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Final

import pyarrow as pa

from scaledown.records import Logprobs
from scaledown.text import writable

LOGPROBS_TYPE: Final = pa.struct(
    {
        "tokens": pa.list_(pa.string()),
        "token_ids": pa.list_(pa.int32()),
        "top_tokens": pa.list_(pa.list_(pa.string())),
        "top_ids": pa.list_(pa.list_(pa.int32())),
        "top_logprobs": pa.list_(pa.list_(pa.float64())),
    }
)
"""`Logprobs` in shards and Parquet."""

_LEAST: Final = -9999.0  # vLLM's value for a probability of 0, whose logarithm is not finite
_SIGNIFICANT_DIGITS: Final = 4  # bfloat16 has three; more digits would only make JSON twice as large
_HALF_CHARACTER: Final = "\ufffd"  # a tokenizer decodes the first bytes of a character to this


def rounded(logprob: float) -> float:
    """Round a log probability for storage: from -9999 to 0, with four decimals."""
    return round(min(logprob, 0.0) if logprob > _LEAST else _LEAST, _SIGNIFICANT_DIGITS)


def from_ids(
    tokenizer: Any,
    token_ids: Sequence[int],
    top_ids: Sequence[Sequence[int]],
    top_logprobs: Sequence[Sequence[float]],
) -> Logprobs:
    """Make the log probabilities of an answer from an engine that returns token ids.

    Args:
        tokenizer: The teacher's Hugging Face tokenizer.
        token_ids: The tokens of the answer, [T].
        top_ids: The most probable tokens at each of them, best first, [T, K]; rows after T are ignored.
        top_logprobs: Their natural log probabilities, [T, K].

    Returns:
        The record to store.
    """
    count = len(token_ids)
    return {
        "tokens": _token_texts(tokenizer, token_ids),
        "token_ids": list(token_ids),
        "top_tokens": None,
        "top_ids": [list(row) for row in top_ids[:count]],
        "top_logprobs": [[rounded(value) for value in row] for row in top_logprobs[:count]],
    }


def _token_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The text that each token adds to the tokens before it; joined, these are the whole text."""
    if not token_ids:
        return []
    starts = [
        tokenizer.decode(token_ids[:count], skip_special_tokens=True).rstrip(_HALF_CHARACTER)
        for count in range(len(token_ids))
    ]
    text: str = tokenizer.decode(token_ids, skip_special_tokens=True)
    # A token may change the text of tokens before it, so the ends are made ascending.
    ends = itertools.accumulate((min(len(start), len(text)) for start in starts), max)
    return [text[start:end] for start, end in itertools.pairwise([*ends, len(text)])]


def from_server(content: Any, count: int) -> Logprobs | None:
    """Read the log probabilities of an answer from a reply in the chat completions format.

    Args:
        content: The `logprobs.content` of a choice: for each token an object with `token`, `bytes` (optional)
            and `top_logprobs`.
        count: How many log probabilities to keep at most for each token.

    Returns:
        The record to store; None if the server sent none.

    Raises:
        TypeError, LookupError, AttributeError: The content has another form.
    """
    if not content or not all(step.get("top_logprobs") for step in content):
        return None
    # A character may be in several tokens, each with some of its bytes.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    best = [sorted(step["top_logprobs"], key=lambda top: -top["logprob"])[:count] for step in content]
    return {
        "tokens": [decoder.decode(_bytes(step), step is content[-1]) for step in content],
        "token_ids": None,
        "top_tokens": [[writable(top["token"]) for top in step] for step in best],
        "top_ids": None,
        "top_logprobs": [[rounded(top["logprob"]) for top in step] for step in best],
    }


def _bytes(token: Any) -> bytes:
    """The bytes of a server's token; if the server left them out, the bytes of its text."""
    own = token.get("bytes")
    return writable(token["token"]).encode() if own is None else bytes(own)


def for_answer(logprobs: Logprobs, answer: str) -> Logprobs | None:
    """Cut log probabilities to the tokens of an answer that begins the text.

    Args:
        logprobs: Log probabilities of the text that the teacher wrote.
        answer: The beginning of this text, without white space around it.

    Returns:
        Log probabilities of the fewest first tokens whose text, joined and stripped, is `answer`. None if
        there are no such tokens, for example if `answer` ends inside a token.
    """
    text = ""
    for count, token in enumerate(logprobs["tokens"], 1):
        text += token
        if text.strip() == answer:
            return _at(logprobs, slice(count))
    return None


def _at(logprobs: Logprobs, tokens: slice) -> Logprobs:
    """Log probabilities of some of the tokens."""
    lists = ((name, logprobs[name]) for name in LOGPROBS_TYPE.names)  # type: ignore[literal-required]
    return {name: rows and rows[tokens] for name, rows in lists}  # type: ignore[return-value]


def for_part(logprobs: Logprobs, answer: str) -> Logprobs | None:
    """Cut log probabilities to the tokens of an answer that follows other text, for example thoughts.

    Args:
        logprobs: Log probabilities of the whole text that the teacher wrote.
        answer: The part of this text that is kept; its last occurrence is used.

    Returns:
        Log probabilities of the fewest tokens with `answer`. None if `answer` begins or ends inside a token.
    """
    tokens = logprobs["tokens"]
    for first in reversed(range(len(tokens))):
        if "".join(tokens[first:]).lstrip().startswith(answer):
            return for_answer(_at(logprobs, slice(first, None)), answer)
    return None


def logprobs_problem(value: Any, answer: str) -> str:  # noqa: PLR0911 (one for each check)
    """Find out why a value cannot be the `answer_logprobs` of an answer.

    Args:
        value: The value, as read from a training file; None is allowed.
        answer: The answer.

    Returns:
        The reason; empty if it can.
    """
    if value is None:
        return ""
    if not isinstance(value, dict) or not value.keys() <= set(LOGPROBS_TYPE.names):
        return f"is not an object of {', '.join(LOGPROBS_TYPE.names)}"
    lists: dict[str, Any] = {name: value.get(name) for name in LOGPROBS_TYPE.names}
    tokens, top_logprobs = lists["tokens"], lists["top_logprobs"]
    if not _is_list_of(tokens, _is_text) or not _is_table(top_logprobs, _is_logprob):
        return f"lacks tokens as texts or top_logprobs as lists of numbers from {_LEAST:.0f} to 0"
    if "".join(tokens).strip() != answer.strip():
        return "is of another text: its tokens, joined, are not the answer"
    if not all(len(rows) == len(tokens) for rows in lists.values() if isinstance(rows, list)):
        return "has lists of different lengths"
    if lists["token_ids"] is not None and not _is_list_of(lists["token_ids"], _is_id):
        return "token_ids is not a list of ids"
    for name, check in (("top_ids", _is_id), ("top_tokens", _is_text)):
        if (rows := lists[name]) is not None and not (
            _is_table(rows, check) and list(map(len, rows)) == list(map(len, top_logprobs))
        ):
            return f"{name} does not have the shape of top_logprobs"
    return ""


def _is_table(value: Any, check: Callable[[Any], bool]) -> bool:
    return _is_list_of(value, lambda row: _is_list_of(row, check))


def _is_list_of(value: Any, check: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(check, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _is_logprob(value: Any) -> bool:
    return type(value) in {int, float} and _LEAST <= value <= 0

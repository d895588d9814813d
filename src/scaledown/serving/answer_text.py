"""Decode the tokens of an answer into text, piece by piece."""

from collections.abc import Sequence
from typing import Any


class AnswerText:
    """Decodes tokens as they arrive, and holds back text that may be the beginning of a stop text.

    `stopped` is true once a stop text has occurred.

    Args:
        tokenizer: The generator's tokenizer.
        stops: Texts that end the answer; they are not part of it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._ids: list[int] = []
        # The tokens from `_start` to `_read` are decoded again with the new ones: a tokenizer writes the
        # space before a word only if it sees the word before.
        self._start = self._read = 0
        self._held = ""
        self._is_first = True
        self.stopped = False

    def add(self, token: int) -> str:
        """Add a token.

        Args:
            token: The next token of the answer, not an end token.

        Returns:
            The text that is now final; it may be empty.
        """
        self._ids.append(token)
        return self._settled(self._new_text())

    def rest(self) -> str:
        """Return the text that was held back, at the end of the answer."""
        before = len(self._decode(self._start, self._read))
        text, self.stopped = self._cut(self._held + self._decode(self._start, len(self._ids))[before:])
        self._held, self._read = "", len(self._ids)
        return self._shown(text.rstrip())

    def _new_text(self) -> str:
        before = self._decode(self._start, self._read)
        text = self._decode(self._start, len(self._ids))
        if len(text) <= len(before) or text.endswith("\ufffd"):  # the bytes of a character are incomplete
            return ""
        self._start, self._read = self._read, len(self._ids)
        return text[len(before) :]

    def _decode(self, start: int, stop: int) -> str:
        text: str = self._tokenizer.decode(self._ids[start:stop], skip_special_tokens=True)
        return text

    def _settled(self, new: str) -> str:
        text, self.stopped = self._cut(self._held + new)
        kept = 0 if self.stopped else max((_beginning(text, stop) for stop in self._stops), default=0)
        sure = text[: len(text) - kept].rstrip()  # an answer does not end with white space
        self._held = text[len(sure) :]
        return self._shown(sure)

    def _shown(self, text: str) -> str:
        """Remove white space at the beginning of the answer."""
        text = text.lstrip() if self._is_first else text
        self._is_first &= not text
        return text

    def _cut(self, text: str) -> tuple[str, bool]:
        """Return the text before the first stop text, and whether a stop text was found."""
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        return (text[: min(places)], True) if places else (text, False)


def _beginning(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` may be the beginning of `stop`."""
    longest = min(len(stop) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)

"""Makes the input of a cross-encoder from two texts; each text is tokenised once for all its pairs."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch

_LONGEST_PAIR: Final = 1 << 16  # tokens; the limit of a tokenizer without one is 1e30


class PairTokens:
    """Puts two texts into the tokenizer's template. Long pairs are cut by its rule, longest first.

    Args:
        tokenizer: A Hugging Face tokenizer that pads on the right.

    Raises:
        ValueError: The tokenizer changes the texts' own tokens in a pair, or has no length limit.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[str, _Text] = {}
        one, other = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "b"))
        pair = tokenizer("a", "b")
        ids, types = pair["input_ids"], pair.get("token_type_ids")
        first = _find_part(ids, one, 0)
        second = _find_part(ids, other, first + len(one))
        spans = (slice(first), slice(first + len(one), second), slice(second + len(other), None))
        self._around = [ids[span] for span in spans]
        self._types: _Types | None = None
        if types is not None:
            self._types = _Types([types[span] for span in spans], types[first], types[second])
        self._longest = tokenizer.model_max_length
        if self._longest > _LONGEST_PAIR:
            raise ValueError("its tokenizer has no limit")
        self._room = self._longest - sum(map(len, self._around))

    def read(self, texts: Iterable[str]) -> None:
        """Tokenise the texts that are new."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            found = self._tokenizer(
                new,
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]
            self._texts |= {
                text: _Text(np.array(ids[: self._longest], np.int32), len(ids))
                for text, ids in zip(new, found, strict=True)
            }

    def length(self, pair: Sequence[str]) -> int:
        """Return how many tokens `features` keeps of two texts, without those of the template.

        Args:
            pair: Two texts that `read` has tokenised.
        """
        length: int = min(sum(self._texts[text].length for text in pair), self._room)
        return length

    def forget(self) -> None:
        """Delete all texts."""
        self._texts.clear()

    def features(self, pairs: Sequence[Sequence[str]]) -> dict[str, "torch.Tensor"]:
        """Make the model's input for pairs of texts.

        Args:
            pairs: Pairs of texts that `read` has tokenised.

        Returns:
            `input_ids`, `attention_mask` and, if the model has them, `token_type_ids`: int64 [pairs, longest
            pair], padded on the right.
        """
        import torch

        before, between, after = self._around
        rows, types = [], []
        for pair in pairs:
            texts = [self._texts[text] for text in pair]
            kept = _cut(texts[0].length, texts[1].length, self._room)
            one, other = (text.ids[:length] for text, length in zip(texts, kept, strict=True))
            rows.append(np.concatenate([before, one, between, other, after]))
            if kinds := self._types:
                own = [[kinds.first] * len(one), [kinds.second] * len(other)]
                types.append([*kinds.around[0], *own[0], *kinds.around[1], *own[1], *kinds.around[2]])
        found = {"input_ids": _padded(rows, self._tokenizer.pad_token_id)}
        if self._types:
            found["token_type_ids"] = _padded(types, self._tokenizer.pad_token_type_id)
        found["attention_mask"] = _padded([np.ones(len(row)) for row in rows], 0)
        return {name: torch.from_numpy(values) for name, values in found.items()}


class _Text(NamedTuple):
    """A text's token ids, cut to the length of the longest pair, and its number of tokens before the cut."""

    ids: np.ndarray[Any, np.dtype[np.int32]]
    length: int


class _Types(NamedTuple):
    """Token types of the template's tokens (before, between, after) and of each text's tokens."""

    around: list[list[int]]
    first: int
    second: int


def _find_part(ids: list[int], part: list[int], start: int) -> int:
    places = range(start, len(ids) - len(part) + 1)
    found = next((i for i in places if ids[i : i + len(part)] == part), None)
    if found is None or not part:
        raise ValueError("its tokenizer changes the tokens of texts in a pair")
    return found


def _cut(one: int, other: int, room: int) -> tuple[int, int]:
    """Return how many tokens two texts keep: the longer is cut first, as in the tokenizers library."""
    if one + other <= room:
        return one, other
    short = min(one, other)
    if 2 * short > room:
        short = room // 2
    return (short, room - short) if one <= other else (room - short, short)


def _padded(rows: Sequence[Any], value: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    result = np.full((len(rows), max(map(len, rows))), value, np.int64)
    for n, row in enumerate(rows):
        result[n, : len(row)] = row
    return result

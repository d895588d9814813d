"""A generation step by step: the rows' next tokens are chosen here, and a decoding computes their scores."""

from collections.abc import Sequence
from typing import Any, Final, Protocol

import torch

from scaledown.devices.halving import is_out_of_memory
from scaledown.student.batch import EncodedQuestion
from scaledown.student.engines.base import Sampling

_COLDEST: Final = 1e-4  # lowest temperature: here only the most probable token has a chance


class RowDecoding(Protocol):
    """Computes the scores of next tokens: `Decoding` by transformers, or another class with its methods."""

    logits: torch.Tensor
    """[rows, vocabulary]: the scores of each row's next token."""

    def __len__(self) -> int:
        """Number of rows."""

    @property
    def can_grow(self) -> bool:
        """Whether rows may join now."""

    def join(self, embedded: torch.Tensor, mask: torch.Tensor) -> None:
        """Read prompts, which become the last rows.

        Args:
            embedded: [rows, length, width], padded on the left.
            mask: [rows, length], 0 at padding.
        """

    def step(self, tokens: torch.Tensor) -> None:
        """Compute the scores of each row's token after the next one.

        Args:
            tokens: [rows]: the next token of each row.
        """

    def keep(self, rows: Sequence[int]) -> None:
        """Keep some rows, and remove the others.

        Args:
            rows: Indices of the rows to keep, in their new order.
        """


class StepGeneration:
    """A `Generation` by a decoding in this process; each step writes one token for each row."""

    def __init__(self, model: Any, decoding: RowDecoding) -> None:
        """Begin without rows.

        Args:
            model: The `ScaleDownModel` that makes prompts.
            decoding: What reads them.
        """
        self._model = model
        self._decoding = decoding
        self._chances: list[_Chance | None] = []
        self._next: list[int] = []
        """The newest token of each row, which the model has not read yet; empty at the beginning."""

    def __len__(self) -> int:
        return len(self._decoding)

    @property
    def can_grow(self) -> bool:
        """Whether rows may join now."""
        return self._decoding.can_grow

    def join(self, questions: Sequence[EncodedQuestion], samplings: Sequence[Sampling]) -> None:
        """Read prompts, which become the last rows. After an error there may be no rows left."""
        with self._model.using():
            self._decoding.join(*self._model.prompts(questions))
        self._chances += [_Chance(own) if own.temperature else None for own in samplings]

    def tokens(self) -> list[Sequence[int] | Exception]:
        """Return one token for each row, or the error of a row whose token cannot be drawn."""
        self._next = self._decoding.logits.argmax(-1).tolist()
        found: list[Sequence[int] | Exception] = [[token] for token in self._next]
        for place, chance in enumerate(self._chances):
            if chance is None:
                continue
            try:
                self._next[place] = chance.draw(self._decoding.logits[place])
                found[place] = [self._next[place]]
            except Exception as error:  # ends this row alone
                if is_out_of_memory(error):
                    raise
                found[place] = error
        return found

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, and let the model read their tokens."""
        if len(rows) < len(self):
            self._decoding.keep(rows)
        self._chances = [
            self._chances[place] for place in rows
        ]  # these are more than `rows` if joining failed
        if rows:
            chosen = torch.tensor([self._next[place] for place in rows], device=self._model.device)
            with self._model.using():
                self._decoding.step(chosen)

    def check(self) -> None:
        """Do nothing: this process writes the answers."""

    def close(self) -> None:
        """Do nothing: no resources are held outside of this process."""


class _Chance:
    """Draws tokens with their probability."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed % (1 << 63))

    def draw(self, logits: torch.Tensor) -> int:
        """Draw the next token from the most probable ones that together have `top_p`.

        `logits` is [vocabulary].
        """
        scores = logits.float().cpu()
        scores = (scores - scores.max()) / max(self._sampling.temperature, _COLDEST)
        chances = scores.softmax(-1)
        if self._sampling.top_p == 1:  # to sort a vocabulary takes longer than all the rest
            return int(torch.multinomial(chances, 1, generator=self._random))
        ordered, places = chances.sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered[1:][before[1:] >= self._sampling.top_p] = 0  # the most probable token always remains
        return int(places[torch.multinomial(ordered, 1, generator=self._random)])

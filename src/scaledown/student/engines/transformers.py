"""Answers by the model's own generator on transformers."""

from collections.abc import Sequence
from typing import Any, Final

import torch

from scaledown.models import is_out_of_memory
from scaledown.student.batch import Question
from scaledown.student.decoding import Decoding
from scaledown.student.engines.base import Sampling

_COLDEST: Final = 1e-4  # of temperatures: below, nothing but the likeliest has a chance


class TransformersGeneration:
    """A `Generation` by the model's own generator: batches in step, a token each."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._decoding = Decoding(model.generator)
        self._chances: list[_Chance | None] = []
        self._next: list[int] = []
        """The token of each row that the model has not read yet; empty before there are any."""

    def __len__(self) -> int:
        return len(self._decoding)

    @property
    def can_grow(self) -> bool:
        """Whether rows may join: a cache that forgets old tokens holds none apart."""
        return self._decoding.can_grow

    def join(self, questions: Sequence[Question], samplings: Sequence[Sampling]) -> None:
        """Read prompts, which become the last rows. What fails on the way may leave no row at all."""
        with self._model.using():
            self._decoding.join(*self._model.prompts(questions))
        self._chances += [_Chance(own) if own.temperature else None for own in samplings]

    def tokens(self) -> list[Sequence[int] | Exception]:
        """One token for each row."""
        self._next = self._decoding.logits.argmax(-1).tolist()
        found: list[Sequence[int] | Exception] = [[token] for token in self._next]
        for place, chance in enumerate(self._chances):
            if chance is None:
                continue
            try:
                self._next[place] = chance.draw(self._decoding.logits[place])
                found[place] = [self._next[place]]
            except Exception as error:  # a row of which none can be drawn ends, and no other
                if is_out_of_memory(error):
                    raise
                found[place] = error
        return found

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, and let the model read their tokens."""
        if len(rows) < len(self):
            self._decoding.keep(rows)
        self._chances = [self._chances[place] for place in rows]  # of more rows, where joining has failed
        if rows:
            chosen = torch.tensor([self._next[place] for place in rows], device=self._model.device)
            with self._model.using():
                self._decoding.step(chosen)

    def close(self) -> None:
        """Nothing is held outside."""


class _Chance:
    """Draws tokens by their probability."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed % (1 << 63))

    def draw(self, logits: torch.Tensor) -> int:
        """The next token, of those that together have `top_p`. `logits` is [vocabulary]."""
        scores = logits.float().cpu()
        scores = (scores - scores.max()) / max(self._sampling.temperature, _COLDEST)
        ordered, places = scores.softmax(-1).sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered[1:][before[1:] >= self._sampling.top_p] = (
            0  # the likeliest stays, however little is asked for
        )
        return int(places[torch.multinomial(ordered, 1, generator=self._random)])

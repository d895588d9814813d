"""Query likelihood under a causal LM: how well a passage explains a question."""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from scaledown.data.prompts import LIKELIHOOD_AFTER, LIKELIHOOD_BEFORE
from scaledown.data.reranker.base import Pair, scores_of
from scaledown.devices.choice import dtype_to_run
from scaledown.devices.halving import Halving
from scaledown.models.sources import ModelSource
from scaledown.models.weights import loadable, loading, onto

if TYPE_CHECKING:
    import torch

log = logging.getLogger("scaledown")

SCORING: Final = 2
"""Version of the computation: the last bits of scores differ between versions."""
_TOGETHER: Final = 256  # tokens of questions after one passage: attention grows with their square
_CHECKED_PROMPT: Final = ("The tower is 330 metres tall.", " How tall is the tower?", " Who built it?")
_TOLERANCE: Final = {"torch.float32": 1e-3, "torch.bfloat16": 0.1, "torch.float16": 0.05}


class _PairTokens(NamedTuple):
    """A pair as token ids. Pairs with the same prompt object share a row of the batch."""

    prompt: list[int]
    question: list[int]


class _Launched(NamedTuple):
    """Log-probabilities of the tokens of some questions, on the device, and how many each question has."""

    chosen: "torch.Tensor"  # [tokens of questions]
    lengths: list[int]


def _means(launched: _Launched) -> list[float]:
    import torch

    each = torch.split(launched.chosen.cpu(), launched.lengths)
    return [float(found.mean()) if len(found) else -math.inf for found in each]


class QueryLikelihoodReranker:
    """Mean log-probability of the question's tokens given the passage (UPR, Sachan et al. 2022).

    It works with any causal LM and needs no training for relevance. Questions about the same passage follow
    it in one row, so that the passage is read once; a mask hides the questions from each other. A model that
    does not support such a mask reads the passage again for each question.

    Args:
        source: The model.
        device: cpu, cuda, cuda:N or mps.
        dtype: auto, float32, bfloat16 or float16.
        batch_size: Pairs scored at once.

    Raises:
        ModelError: The model cannot be loaded.
    """

    def __init__(self, source: ModelSource, device: str, dtype: str, batch_size: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        name, pinned = loadable(source)
        with loading(source):
            self._tokenizer = AutoTokenizer.from_pretrained(name, **pinned)
            model = AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype_to_run(dtype, device), **pinned, **onto(device)
            )
        self._model = model.eval()
        self.name = source.name
        self._device = device
        self._batch_size = batch_size
        self.halving = Halving("--reranker_batch_size")
        self._limit = int(getattr(model.config, "max_position_embeddings", 0) or 2048)
        self._after = self._ids([LIKELIHOOD_AFTER])[LIKELIHOOD_AFTER]
        self._together = _TOGETHER
        if reason := self._differs():
            self._together = 0
            log.info("reranker: each question is read with its own copy of the passage (%s)", reason)

    def _ids(self, texts: Iterable[str], *, special: bool = False) -> dict[str, list[int]]:
        """Return the token ids of each text; equal texts are tokenised once."""
        unique = list(dict.fromkeys(texts))
        found = self._tokenizer(unique, add_special_tokens=special, verbose=False) if unique else {}
        return dict(zip(unique, found.get("input_ids", ()), strict=True))

    def score(self, pairs: Sequence[Pair], advance: Callable[[int], None]) -> list[float]:
        """Return the mean log-probability of each pair's question, see `Reranker.score`.

        Args:
            pairs: Pairs of a query and a document.
            advance: Called with the number of pairs in each finished batch.

        Returns:
            Natural logarithms, at most 0.

        Raises:
            ModelError: A value is not finite, or one pair alone does not fit into memory.
        """
        questions = self._ids(f" {pair.query.strip()}" for pair in pairs)
        passages = self._ids((LIKELIHOOD_BEFORE + pair.document for pair in pairs), special=True)
        prompts: dict[tuple[str, int], list[int]] = {}  # by passage and the number of its tokens that fit
        asked = []
        for pair in pairs:
            question = questions[f" {pair.query.strip()}"][: self._limit // 2]
            passage = passages[LIKELIHOOD_BEFORE + pair.document]
            kept = min(len(passage), self._limit - len(question) - len(self._after))
            prompt = prompts.setdefault((pair.document, kept), passage[:kept] + self._after)
            asked.append(_PairTokens(prompt, question))

        def launch(batch: Sequence[int]) -> _Launched:
            return self._launch([asked[i] for i in batch])

        return scores_of(self, self._batches(asked), launch, _means, self._device, advance)

    def _batches(self, asked: Sequence["_PairTokens"]) -> list[list[int]]:
        """Return batches of indices of `asked`; the rows of a batch have similar lengths."""
        by_prompt: dict[int, list[int]] = {}
        for i, one in enumerate(asked):
            by_prompt.setdefault(id(one.prompt), []).append(i)
        rows = self._rows(asked, itertools.chain.from_iterable(by_prompt.values()))
        tokens = [len(asked[row[0]].prompt) + sum(len(asked[i].question) for i in row) for row in rows]
        batches: list[list[int]] = []
        for n in sorted(range(len(rows)), key=lambda n: (-len(rows[n]), -tokens[n])):
            if batches and len(batches[-1]) + len(rows[n]) <= self._batch_size:
                batches[-1] += rows[n]
            else:
                batches.append(list(rows[n]))
        return batches

    def _rows(self, asked: Sequence["_PairTokens"], order: Iterable[int]) -> list[list[int]]:
        """Return rows of indices of `asked`, taken in `order`; the pairs of a row share a passage."""
        rows: list[list[int]] = []
        tokens = 0
        for i in order:
            prompt, question = asked[i]
            fits = rows and len(rows[-1]) < self._batch_size and tokens + len(question) <= self._together
            if fits and asked[rows[-1][-1]].prompt is prompt:
                rows[-1].append(i)
            else:
                rows.append([i])
                tokens = 0
            tokens += len(question)
        return rows

    def _launch(self, asked: Sequence["_PairTokens"]) -> "_Launched":
        """Launch a batch; neighbours with the same prompt share a row: prompt, question, question, ..."""
        import torch

        rows = [[asked[i] for i in row] for row in self._rows(asked, range(len(asked)))]
        lengths = [len(row[0].prompt) + sum(len(one.question) for one in row) for row in rows]
        longest = max(lengths)
        ids = np.zeros((len(rows), longest), np.int64)  # padded on the left
        position = np.zeros_like(ids)
        part = np.full_like(ids, -1)  # 0: the prompt, n: its nth question, -1: padding
        before: list[tuple[int, int]] = []  # row and position that predict each token of a question
        targets: list[int] = []
        for n, row in enumerate(rows):
            start = longest - lengths[n]
            behind = start + len(row[0].prompt)
            for number, tokens in enumerate([row[0].prompt, *(one.question for one in row)]):
                span = slice(start, start + len(tokens))
                ids[n, span] = tokens
                part[n, span] = number
                position[n, span] = np.arange(len(tokens)) + (len(row[0].prompt) if number else 0)
                if number:
                    targets += tokens
                    places = [behind - 1, *range(start, span.stop - 1)]
                    before += [(n, place) for place in places[: len(tokens)]]
                start = span.stop
        first = min((place for _, place in before), default=longest - 1)
        with torch.inference_mode():
            parts = torch.from_numpy(part).to(self._device)
            mask = (parts >= 0).long()  # [rows, longest]
            if len(rows) < len(
                asked
            ):  # tokens see the prompt and their own part: [rows, 1, longest, longest]
                mask = ((parts[:, None] == 0) | (parts[:, None] == parts[..., None])).tril()[:, None]
            logits = self._model(
                input_ids=torch.from_numpy(ids).to(self._device),
                attention_mask=mask,
                position_ids=torch.from_numpy(position).to(self._device),
                logits_to_keep=longest - first,
                use_cache=False,
            ).logits  # [rows, longest - first, vocabulary]
            at = torch.tensor(before, dtype=torch.long, device=self._device).reshape(-1, 2)
            logits = logits[at[:, 0], at[:, 1] - first].float()  # [tokens of questions, vocabulary]
            wanted = torch.tensor(targets, dtype=torch.long, device=self._device)[:, None]
            chosen = torch.log_softmax(logits, -1).gather(-1, wanted)[:, 0]
        return _Launched(chosen, [len(one.question) for one in asked])

    def _differs(self) -> str:
        """Return why this model cannot read several questions in a row; empty if it can."""
        prompt, *questions = self._ids(
            [LIKELIHOOD_BEFORE + _CHECKED_PROMPT[0], *_CHECKED_PROMPT[1:]]
        ).values()
        prompt = prompt + self._after
        asked = [
            _PairTokens(prompt, question) for question in (questions[0], *questions)
        ]  # the first one twice
        try:
            together = _means(self._launch(asked))
            alone = [_means(self._launch([one]))[0] for one in asked]
        except Exception as error:  # any error of a model that we do not know
            return f"{type(error).__name__}: {error}"
        difference = max(abs(one - other) for one, other in zip(together, alone, strict=True))
        same = difference <= _TOLERANCE[str(self._model.dtype)]
        return "" if same else f"its scores differ by {difference:.2g}"

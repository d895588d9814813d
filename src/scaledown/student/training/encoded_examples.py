"""Encode examples for training and evaluation: with compressed documents, or as plain text."""

import contextlib
from typing import Any, NamedTuple

import numpy as np

from scaledown.config.train import PretrainConfig, StudentConfig, TrainConfig
from scaledown.errors import InputError
from scaledown.student.batch import Encoded, Reader
from scaledown.student.compressor import Compressor
from scaledown.student.training.training_data import Examples


class EncodedExamples:
    """Examples as token ids; each is tokenized when it is read.

    In training (`trains`), a compressor with several rates gets one of them at random for each example, and
    some examples have their documents as text, or no documents. The choice depends only on the seed and the
    index. The index keeps growing from pass to pass, so that the choice for a record differs in each pass.
    """

    def __init__(self, examples: Examples, model: Any, config: StudentConfig, *, trains: bool) -> None:
        self._examples = examples
        self._reader: Reader = model.reader
        self._kind: Compressor = model.config.kind
        self._config = config
        self._trains = trains

    def __getitem__(self, place: int) -> Encoded:
        query, documents, answer, scores = self._examples[place % len(self._examples)]
        config, random = self._config, np.random.default_rng((self._config.seed, place))
        if isinstance(config, PretrainConfig) and self._kind.picks_tokens:  # pretraining has no generator
            return Encoded(self._reader.read(query, documents, answer), [], [], None)
        rates = self._kind.rates or (0, 0, 0, 0)  # drawn for all kinds, so that `chance` is the same for all
        rate, chance = (int(random.choice(rates)), random.random()) if self._trains else (0, 1.0)
        if isinstance(config, TrainConfig) and chance < config.text_fraction + config.closed_book_fraction:
            shown = documents if chance < config.text_fraction else []
            ids = self._reader.answer_ids(answer)[: self._reader.context // 2]
            with contextlib.suppress(
                InputError
            ):  # the question alone is too long: the documents are compressed
                return self._reader.encode_text(query, shown, len(ids))._replace(answer_ids=ids)
        learned = None if self._kind.ranks else scores
        encoded = self._reader.encode(query, documents, answer, learned, rate=rate)
        room = self._reader.context - encoded.prompt_length
        return encoded._replace(answer_ids=encoded.answer_ids[: max(1, room)])


class Batches(NamedTuple):
    """Examples in batches."""

    examples: EncodedExamples
    places: list[list[int]]
    """For each batch the indices of its examples; may be empty."""

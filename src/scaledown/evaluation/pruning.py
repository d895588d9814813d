"""Hard pruning, a baseline for compression: a reranker keeps sentences, in as many tokens as compression."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pyarrow as pa

from scaledown.data.reranker.api import best_first, score_once
from scaledown.data.reranker.base import Pair, Reranker
from scaledown.data.teacher.review import sentences
from scaledown.evaluation import questions
from scaledown.records import full_text, title_of
from scaledown.run.progress import tracked
from scaledown.run.stage import Stage


class Sentence(NamedTuple):
    """A sentence of a document. It is scored with the document's title, and kept without it."""

    document: int
    """Index of the document."""
    title: str
    """The title of the document; empty if it has none."""
    text: str


class TokenCodec(NamedTuple):
    """The generator's tokenizer."""

    encode: Callable[[str], list[int]]
    """Returns the token ids of a text, without special tokens."""
    decode: Callable[[list[int]], str]
    """Returns the text of token ids."""


def split_sentences(documents: Sequence[str]) -> list[Sentence]:
    """Split all documents into sentences, in reading order, without titles."""
    return [
        Sentence(number, title, text)
        for number, document in enumerate(documents)
        for title in (title_of(document),)
        for text in sentences(document.removeprefix(title))
    ]


def keep_best(
    found: Sequence[Sentence], scores: Sequence[float], budget: int, tokens: TokenCodec
) -> list[str]:
    """Keep the best sentences that fit into a number of tokens.

    Sentences are tried from the best to the worst; each that still fits is kept. If none fits, the beginning
    of the best one is kept.

    Args:
        found: The sentences of all documents, in reading order.
        scores: The relevance of each sentence.
        budget: The most tokens of all kept sentences together.
        tokens: The generator's tokenizer.

    Returns:
        One text for each document that has kept sentences; sentences are in reading order.
    """
    order = best_first(scores, len(scores))
    chosen: list[int] = []
    for place in order:
        tried = sorted([*chosen, place])
        if sum(len(tokens.encode(text)) for text in _joined_texts([found[one] for one in tried])) <= budget:
            chosen = tried
    if chosen or not order:
        return _joined_texts([found[place] for place in chosen])
    ids = tokens.encode(found[order[0]].text)[:budget]
    while ids and len(tokens.encode(tokens.decode(ids).strip())) > budget:  # a cut word may need more tokens
        ids.pop()
    return [text] if (text := tokens.decode(ids).strip()) else []


def _joined_texts(kept: Sequence[Sentence]) -> list[str]:
    documents: dict[int, list[str]] = {}
    for sentence in kept:
        documents.setdefault(sentence.document, []).append(sentence.text)
    return [" ".join(texts) for texts in documents.values()]


def prune(
    stage: Stage,
    asked: Stage,
    load: Callable[[], Reranker],
    tokens: TokenCodec,
    memory: Callable[[str], int],
) -> None:
    """Prune the documents of each question to as many tokens as compression has for all of them.

    Args:
        stage: The stage of pruned documents.
        asked: The finished stage of questions.
        load: Loads the reranker.
        tokens: The generator's tokenizer.
        memory: Returns the number of memory tokens of a document.
    """
    if stage.done():
        return
    rows = asked.finished().rows
    with tracked(stage, "prune", "questions", rows) as tracker:

        def work(shard: int) -> pa.Table:
            own = questions.read_questions(asked, shard)
            found = [split_sentences(question.documents) for question in own]
            pairs = [
                Pair(question.query, full_text(sentence.title, sentence.text))
                for question, sentences_ in zip(own, found, strict=True)
                for sentence in sentences_
            ]
            reranker = load()
            with stage.noting(shard, lambda: reranker.halving.count):
                scores = iter(score_once(reranker, pairs, lambda _: None))
            budgets = [sum(map(memory, question.documents)) for question in own]
            kept = [
                keep_best(sentences_, [next(scores) for _ in sentences_], budget, tokens)
                for budget, sentences_ in zip(budgets, found, strict=True)
            ]
            tracker.advance(len(own))
            return pa.table({"documents": pa.array(kept, pa.list_(pa.large_string()))})

        stage.complete(len(rows), work)
    stage.finish(rows, {"questions": sum(rows)})

"""Score answers: the value of each measure, and a file with every answer and its scores."""

import math
import statistics
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson

from scaledown.evaluation import judge, questions
from scaledown.extensions import MEASURES
from scaledown.metrics import has_answer
from scaledown.run.atomic import atomic
from scaledown.run.progress import track
from scaledown.run.stage import Stage

Measure = Callable[[str, Sequence[str]], float]
"""An entry of `MEASURES`: takes an answer and the right answers, and returns 0 to 1; higher is better."""

TAU: Final = "tau"
"""Kendall's tau-b between the model's ranking of the documents and the teacher's reranker's, -1 to 1."""
ORDER: Final = "R@1 order"
"""1 if the first document of the data holds a right answer, else 0.

This measure and the next two have no value for a question of which no document holds a right answer.
"""
BY_MODEL: Final = "R@1 model"
"""The same for the document that the model scores highest."""
SUM: Final = "R@1 sum"
"""The same for the highest sum of the model's and the data's scores, each standardised in its question."""
LENGTH: Final = "length"
"""Words of the answer; not a measure of quality."""


class Scored(NamedTuple):
    """The scores of all answers."""

    values: dict[str, dict[str, "array[float]"]]
    """By system and measure, a value for each question; NaN for a question without a value."""
    articles: list[str]
    """The article of each question; questions about one article are similar."""
    held: list[bool]
    """For each question, whether one of its documents holds a right answer."""


def score(
    path: Path, asked: Stage, answers: Mapping[str, Stage], verdicts: Mapping[str, Mapping[str, Stage]]
) -> Scored:
    """Measure each answer, and write a line for each question to `path`: all answers with their scores.

    Args:
        path: The file to write, as JSON lines.
        asked: The finished stage of questions.
        answers: The finished stage of answers, by system.
        verdicts: The finished stages of verdicts, by system and measure.

    Returns:
        The values of all measures.
    """
    rows = asked.finished().rows
    measures: dict[str, Measure] = dict(MEASURES)
    reranks = {system: bool(stage.finished().counts["reranked"]) for system, stage in answers.items()}
    values = {
        system: {
            name: array("d")
            for name in (
                *measures,
                *verdicts.get(system, ()),
                *((TAU, ORDER, BY_MODEL, SUM) if reranks[system] else ()),
                LENGTH,
            )
        }
        for system in answers
    }
    scored = Scored(values, [], [])
    with (
        track("score", "questions", sum(rows)) as tracker,
        atomic(path) as temporary,
        temporary.open("wb") as file,
    ):
        for shard in range(len(rows)):
            batch = questions.read_questions(asked, shard)
            shown: list[dict[str, Any]] = [{} for _ in batch]  # by system, for the file
            holding = [
                [has_answer(document, question.right) for document in question.documents]
                for question in batch
            ]
            for system, stage in answers.items():
                judged = {
                    name: judge.read_verdicts(verdict, shard)
                    for name, verdict in verdicts.get(system, {}).items()
                }
                for row, given in enumerate(stage.table(shard).to_pylist()):
                    scores: dict[str, float | None] = {
                        name: measure(given["answer"], batch[row].right) for name, measure in measures.items()
                    }
                    scores |= {name: column[row] for name, column in judged.items()}
                    if reranks[system]:
                        scores[TAU] = _tau(given["scores"], batch[row].scores)
                        scores |= _first_of_each_order(given["scores"], batch[row].scores, holding[row])
                    scores[LENGTH] = len(given["answer"].split())
                    for name, value in scores.items():
                        scored.values[system][name].append(math.nan if value is None else value)
                    error = {"error": given["error"]} if given["error"] else {}
                    shown[row][system] = {"answer": given["answer"], **error, **scores}
            for question, is_held, found in zip(batch, map(any, holding), shown, strict=True):
                record = {
                    "query": question.query,
                    "gold": question.right,
                    "article": question.article,
                    "held": is_held,
                }
                file.write(orjson.dumps({**record, "answers": found}, option=orjson.OPT_APPEND_NEWLINE))
                scored.articles.append(question.article)
                scored.held.append(is_held)
            tracker.advance(len(batch))
    return scored


def _tau(own: Sequence[float] | None, teachers: Sequence[float] | None) -> float | None:
    """Return Kendall's tau-b; None if one side has no scores or only equal ones."""
    if own is None or teachers is None or len(set(own)) < 2 or len(set(teachers)) < 2:
        return None
    from scipy.stats import kendalltau

    return float(kendalltau(own, teachers).statistic)


def _first_of_each_order(
    own: Sequence[float] | None, given: Sequence[float] | None, holding: Sequence[bool]
) -> dict[str, float | None]:
    """Return R@1 for the orders of the data, of the model and of both.

    A value is None if there is no such order, or if no document holds a right answer.
    """
    if own is None or not any(holding):
        return dict.fromkeys((ORDER, BY_MODEL, SUM))
    both = (
        None if given is None else [sum(pair) for pair in zip(_standard(own), _standard(given), strict=True)]
    )
    orders = {ORDER: [0.0] * len(holding), BY_MODEL: own, SUM: both}  # ties go to the earlier document
    return {
        name: None if scores is None else float(holding[max(range(len(scores)), key=scores.__getitem__)])
        for name, scores in orders.items()
    }


def _standard(scores: Sequence[float]) -> list[float]:
    """Standardise scores to mean 0 and standard deviation 1; equal scores become 0."""
    mean, deviation = statistics.fmean(scores), statistics.pstdev(scores)
    return [(score - mean) / (deviation or 1) for score in scores]

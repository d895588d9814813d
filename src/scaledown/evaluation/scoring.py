"""Answers and verdicts -> values of each measure, and a file that shows every answer beside its scores."""

import math
import statistics
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson

from scaledown.evaluation import judge, questions
from scaledown.extensions import MEASURES
from scaledown.metrics import holds
from scaledown.run.atomic import atomic
from scaledown.run.progress import track
from scaledown.run.stage import Stage

Measure = Callable[[str, Sequence[str]], float]
"""An entry of `MEASURES`: an answer and the right answers -> 0 to 1, higher is better."""

TAU: Final = "tau"
"""Kendall's tau-b: how far the model ranks the documents as the teacher's reranker does, -1 to 1."""
ORDER: Final = "R@1 order"
"""1 where the first document of the data holds a right answer; this and the next two have no value where no
document does."""
MODEL: Final = "R@1 model"
"""The same of the document that the model scores highest."""
SUM: Final = "R@1 sum"
"""The same of the highest sum of the model's score and the data's, each standardised within the question."""
LENGTH: Final = "length"
"""Words of the answer, which are no quality."""


class Scored(NamedTuple):
    """What every answer is worth."""

    values: dict[str, dict[str, "array[float]"]]
    """By system, then by measure, one a question; NaN where there is none."""
    articles: list[str]
    """Of each question, what it shares with those that are like it."""
    held: list[bool]
    """Of each question, whether one of its documents holds a right answer."""


def score(
    path: Path, asked: Stage, answers: Mapping[str, Stage], verdicts: Mapping[str, Mapping[str, Stage]]
) -> Scored:
    """Measure each answer; `path` gets a line for each question: all answers to it with their scores."""
    rows = asked.finished().rows
    measures: dict[str, Measure] = dict(MEASURES)
    reranks = {system: bool(stage.finished().counts["reranked"]) for system, stage in answers.items()}
    values = {
        system: {
            name: array("d")
            for name in (
                *measures,
                *verdicts.get(system, ()),
                *((TAU, ORDER, MODEL, SUM) if reranks[system] else ()),
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
            own = questions.read(asked, shard)
            told: list[dict[str, Any]] = [{} for _ in own]
            holding = [[holds(document, one.right) for document in one.documents] for one in own]
            for system, stage in answers.items():
                judged = {name: judge.read(one, shard) for name, one in verdicts.get(system, {}).items()}
                for row, given in enumerate(stage.table(shard).to_pylist()):
                    scores: dict[str, float | None] = {
                        name: measure(given["answer"], own[row].right) for name, measure in measures.items()
                    }
                    scores |= {name: column[row] for name, column in judged.items()}
                    if reranks[system]:
                        scores[TAU] = _tau(given["scores"], own[row].scores)
                        scores |= _first_of_each_order(given["scores"], own[row].scores, holding[row])
                    scores[LENGTH] = len(given["answer"].split())
                    for name, value in scores.items():
                        scored.values[system][name].append(math.nan if value is None else value)
                    error = {"error": given["error"]} if given["error"] else {}
                    told[row][system] = {"answer": given["answer"], **error, **scores}
            for question, holds_it, found in zip(own, map(any, holding), told, strict=True):
                record = {
                    "query": question.query,
                    "gold": question.right,
                    "article": question.article,
                    "held": holds_it,
                }
                file.write(orjson.dumps({**record, "answers": found}, option=orjson.OPT_APPEND_NEWLINE))
                scored.articles.append(question.article)
                scored.held.append(holds_it)
            tracker.advance(len(own))
    return scored


def _tau(own: Sequence[float] | None, teachers: Sequence[float] | None) -> float | None:
    """None where there is no order to compare."""
    if own is None or teachers is None or len(set(own)) < 2 or len(set(teachers)) < 2:
        return None
    from scipy.stats import kendalltau

    return float(kendalltau(own, teachers).statistic)


def _first_of_each_order(
    own: Sequence[float] | None, given: Sequence[float] | None, holding: Sequence[bool]
) -> dict[str, float | None]:
    """R@1 of the orders of the data, the model and both; None where there is no such order, or no answer."""
    if own is None or not any(holding):
        return dict.fromkeys((ORDER, MODEL, SUM))
    both = (
        None if given is None else [sum(pair) for pair in zip(_standard(own), _standard(given), strict=True)]
    )
    orders = {ORDER: [0.0] * len(holding), MODEL: own, SUM: both}  # ties go to the earlier document
    return {
        name: None if scores is None else float(holding[max(range(len(scores)), key=scores.__getitem__)])
        for name, scores in orders.items()
    }


def _standard(scores: Sequence[float]) -> list[float]:
    """Scores with mean 0 and standard deviation 1; all 0 where they are the same."""
    mean, deviation = statistics.fmean(scores), statistics.pstdev(scores)
    return [(score - mean) / (deviation or 1) for score in scores]

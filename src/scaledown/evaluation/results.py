"""Results of an evaluation: typed records, written to `results.json` and shown as a table."""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import scaledown
from scaledown.config.evaluate import UNCOMPRESSED
from scaledown.errors import InputError, one_line
from scaledown.evaluation.efficiency import Cost, Shape
from scaledown.evaluation.judge import PREFERRED
from scaledown.evaluation.scoring import LENGTH
from scaledown.evaluation.statistics import Difference, Estimate, difference, estimate
from scaledown.extensions import COMPRESSORS
from scaledown.run.atomic import read_json, write_json
from scaledown.run.progress import track

if TYPE_CHECKING:
    from scaledown.student.compressor import Compressor

RESULTS_LAYOUT: Final = 2
RESULTS_FILE: Final = "results.json"

_MAIN: Final = "accuracy"
_FEW_ARTICLES: Final = 20  # with fewer, the bootstrap's intervals are too narrow


class SystemResult(NamedTuple):
    """The results of one system."""

    measures: dict[str, Estimate]
    """By the name that papers use."""
    differences: dict[str, Difference]
    """Differences to the baseline, by measure; empty for the baseline itself."""
    counts: dict[str, int]
    """Counts of problems: `errors`, `no_verdict`, `missing`; for rankings also `contradicted` and `tied`."""
    held: dict[str, Estimate]
    """The measures over the questions whose documents hold a right answer; empty for rankings."""
    not_held: dict[str, Estimate]
    """The measures over the other questions."""


class Results(NamedTuple):
    """The content of `results.json`; see docs/evaluation.md."""

    kind: str
    """`answers` or `rankings`."""
    request: str
    """Fingerprint of settings, models and inputs."""
    parameters: dict[str, Any]
    """The settings of the command."""
    inputs: dict[str, Any]
    """Hashes of the input files."""
    models: dict[str, str]
    """Commits or hashes of the model, the reranker and the judge."""
    model: dict[str, Any]
    """Name and settings of the model; empty for rankings."""
    right_answers: str
    """The source of right answers: `gold`, `teacher`, or `qrels`."""
    counts: dict[str, int]
    """Numbers of questions, of articles, and of records and queries with problems, by name."""
    baseline: str
    """The system, or the run, that the others are compared with."""
    systems: dict[str, SystemResult]
    """The results of each system; for rankings of each run."""
    files: dict[str, str]
    """Hashes of the other files in the output folder, by name."""


class Run(NamedTuple):
    """A model with its results and costs."""

    name: str
    """The last part of the folder, or more of it if names would be equal; ends in `-Nx` for one of several
    rates."""
    folder: Path
    """The folder of the model."""
    results: Results
    """The results of its evaluation."""
    costs: list[Cost]
    """Two for each measured size of batch: compressed and uncompressed; empty if costs were not measured."""
    differences: dict[str, Difference]
    """Differences of its compressed answers to the reference, by measure; empty for the reference itself."""

    @property
    def compressor(self) -> str:
        """The name of the model's kind of compressor."""
        return str(self.results.model["compressor"])

    @property
    def kind(self) -> "Compressor":
        """The declaration of this kind; for a kind that is not registered here, that of a separate model."""
        found: Compressor = COMPRESSORS.find(self.compressor)
        return found

    def cost(self, system: str, batch: int) -> Cost | None:
        """Return the cost of a query; None if it was not measured.

        Args:
            system: `compressed` or `uncompressed`.
            batch: Number of queries in a batch.
        """
        return next((one for one in self.costs if (one.system, one.batch) == (system, batch)), None)


class Comparison(NamedTuple):
    """Runs in the order of the command; the first has the baselines."""

    runs: list[Run]
    reference: str
    """The system of the first run that the others are compared with."""
    machine: str
    """The machine that costs were measured on."""
    shape: Shape
    """The sizes of a timed query."""
    batches: list[int]
    """Requested sizes of batches; a run has no costs for those that did not fit into memory."""


Values = Mapping[str, Mapping[str, Sequence[float]]]
"""By system and measure, a value for each question; NaN for a question without a value."""


def conclude(
    values: Values,
    groups: Sequence[Hashable] | None,
    baseline: str,
    counts: Mapping[str, dict[str, int]],
    *,
    seed: int,
    held: Sequence[bool] = (),
) -> dict[str, SystemResult]:
    """Compute means, intervals and differences of each system.

    Args:
        values: By system and measure, a value for each question; NaN for a question without a value.
        groups: The group of each question; similar questions have the same group.
        baseline: The system that the others are compared with.
        counts: Counts of problems, by system.
        seed: Seed of the resampling.
        held: For each question, whether its documents hold a right answer; empty for rankings.

    Returns:
        A record for each system. A measure without any value is left out. `length` has no differences.
    """
    found = {}
    with track("compare", "measures", sum(map(len, values.values()))) as tracker:
        for system, measures in values.items():
            result = SystemResult({}, {}, counts[system], {}, {})
            for measure, own in measures.items():
                tie = [0.5 if measure == PREFERRED else math.nan] * len(own)
                other = values[baseline].get(measure, tie)
                here = [place for place, value in enumerate(own) if not math.isnan(value)]
                both = [place for place in here if not math.isnan(other[place])]
                if here:
                    result.measures[measure] = estimate(*_values_at(here, own, groups), seed=seed)
                for found_there, wanted in ((result.held, True), (result.not_held, False)):
                    if part := [place for place in here if held and held[place] == wanted]:
                        found_there[measure] = estimate(*_values_at(part, own, groups), seed=seed)
                if both and system != baseline and measure != LENGTH:
                    left, grouped = _values_at(both, own, groups)
                    right, _ = _values_at(both, other, None)
                    result.differences[measure] = difference(left, right, grouped, seed=seed)
                tracker.advance()
            found[system] = result
    return found


def _values_at(
    places: Sequence[int], values: Sequence[float], groups: Sequence[Hashable] | None
) -> tuple[list[float], Sequence[Hashable] | None]:
    return [values[place] for place in places], groups and [groups[place] for place in places]


def write_results(folder: Path, results: Results) -> None:
    """Write `results.json`.

    Args:
        folder: An existing folder.
        results: The results.
    """
    content = results._asdict()
    content["systems"] = {
        name: {
            "measures": {measure: own._asdict() for measure, own in system.measures.items()},
            "differences": {measure: own._asdict() for measure, own in system.differences.items()},
            "counts": system.counts,
            "held": {measure: own._asdict() for measure, own in system.held.items()},
            "not_held": {measure: own._asdict() for measure, own in system.not_held.items()},
        }
        for name, system in results.systems.items()
    }
    write_json(
        folder / RESULTS_FILE, {"schema": RESULTS_LAYOUT, "scaledown": scaledown.__version__, **content}
    )


def read_results(folder: Path) -> Results:
    """Read the results in a folder.

    Args:
        folder: The `--output_dir` of `scaledown evaluate`.

    Raises:
        InputError: The folder has no `results.json` of this version.
    """
    content = read_json(folder / RESULTS_FILE)
    try:
        if content["schema"] != RESULTS_LAYOUT:
            raise InputError(f"{folder / RESULTS_FILE} is of another version: run scaledown evaluate again")
        systems = {
            name: SystemResult(
                {measure: Estimate(**own) for measure, own in system["measures"].items()},
                {measure: Difference(**own) for measure, own in system["differences"].items()},
                system["counts"],
                {measure: Estimate(**own) for measure, own in system["held"].items()},
                {measure: Estimate(**own) for measure, own in system["not_held"].items()},
            )
            for name, system in content["systems"].items()
        }
        fields = {name: content[name] for name in Results._fields}
        return Results(**fields | {"systems": systems})
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{folder} holds no {RESULTS_FILE} of scaledown evaluate: name its --output_dir"
        ) from error


def results_table(results: Results) -> str:
    """Return a text table: measures of each system with 95% intervals, differences, p-values."""
    width = max(map(len, results.systems)) + 2
    names = list(dict.fromkeys(name for own in results.systems.values() for name in own.measures))
    heading = f"against {results.baseline}" if len(results.systems) > 1 else ""
    lines = [f"  {'':<10}{'':<{width}}{'mean [95% interval]':<24}{heading}".rstrip()]
    for measure in names:
        first = measure
        for system, own in results.systems.items():
            if measure in own.measures:
                against = own.differences.get(measure, "")
                lines.append(
                    f"  {first:<10}{one_line(system):<{width}}{own.measures[measure]!s:<24}{against}".rstrip()
                )
                first = ""
    return "\n".join(lines)


def held_table(results: Results) -> str:
    """Return a text table: accuracy for questions whose documents hold a right answer, and for the others.

    It is empty if all questions are of one kind.
    """
    rows = [row for row in held_rows(results) if row[0] == _MAIN]
    if not rows:
        return ""
    width = max(len(system) for _, system, _, _ in rows) + 2
    held, questions = results.counts["held"], results.counts["questions"]
    lines = [
        f"  {_MAIN}, by whether the documents hold a right answer",
        f"  {'':<10}{'':<{width}}{f'held ({held:,})':<24}not held ({questions - held:,})",
    ]
    lines += [f"  {'':<10}{system:<{width}}{own:<24}{other}" for _, system, own, other in rows]
    return "\n".join(lines)


def held_rows(results: Results) -> list[tuple[str, str, str, str]]:
    """Return rows: measure, system, estimate if documents hold a right answer, and if not.

    There are no rows if all questions are of one kind.
    """
    if results.counts.get("held", 0) in {0, results.counts.get("questions", 0)}:
        return []
    names = dict.fromkeys(name for own in results.systems.values() for name in own.measures)
    return [
        (measure, system, str(own.held.get(measure, "")), str(own.not_held.get(measure, "")))
        for measure in names
        for system, own in results.systems.items()
        if measure in own.held and measure in own.not_held
    ]


_COUNT_NAMES: Final = {
    "trained_on": "questions are training data of this model: their results do not hold for other questions",
    "below_0": "judgements below 0 count as 0, as in trec_eval",
    "gold_came_again": "questions of --gold come again: all their answers count",
    "gold_passed_over": "files of --gold are passed over: the log names them",
    "gold_guessed": "files of --gold are read by their content: the log says how",
    "gold_unread": "rows of --gold hold no question: passed over, the log names them",
}

_COUNTED_OF_A_SYSTEM: Final = {
    "errors": "{} questions could not be asked and count as not answered",
    "missing": "{} judged queries are not in the run and count as 0",
    "contradicted": "the ranks of {} queries contradict their scores; the scores are used",
    "tied": "{} scores are tied: the larger id comes first, as in trec_eval",
}


def remarks(results: Results) -> Iterator[str]:
    """Yield notes about the numbers: what was left out, what counts as wrong."""
    counts = results.counts
    if counts.get("without_right_answer"):
        without = f"{counts['without_right_answer']:,} of {counts['records']:,} records"
        yield f"{without} have no right answer: left out"
    if counts.get("trained_without_text") and UNCOMPRESSED in results.systems:
        yield (
            "the generator was trained without text (--text_fraction 0): before, it may have answered better "
            "from text"
        )
    if counts.get("unusable"):
        yield f"{counts['unusable']:,} of {counts['records']:,} records cannot be asked: left out"
    for name, said in _COUNT_NAMES.items():
        if count := counts.get(name):
            yield f"{count:,} {said}"
    if counts.get("articles", _FEW_ARTICLES) < _FEW_ARTICLES:
        yield f"intervals and p-values from {counts['articles']:,} articles are rough: use {_FEW_ARTICLES}"
    for system, own in results.systems.items():
        for name, count in own.counts.items():
            if count:
                without = f"the judge gave no verdict about {{}} answers ({name}): left out"
                yield f"{system}: {_COUNTED_OF_A_SYSTEM.get(name, without).format(f'{count:,}')}"

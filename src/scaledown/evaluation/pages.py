"""Pages of evaluations and comparisons: tables, plots of quality against cost, answers to browse."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import orjson

from scaledown.config.evaluate import COMPRESSED, SYSTEMS, UNCOMPRESSED
from scaledown.evaluation.efficiency import Cost, Seconds
from scaledown.evaluation.results import Comparison, Results, Run, held_rows, remarks
from scaledown.evaluation.scoring import LENGTH
from scaledown.evaluation.statistics import Estimate
from scaledown.report import plots
from scaledown.report.page import (
    Cell,
    Field,
    MarkedText,
    Note,
    Page,
    PageBlock,
    PageExample,
    PageExamples,
    PageTable,
    Plot,
    Section,
)

SHOWN_QUESTIONS: Final = 200  # questions to browse
_QUALITY: Final = "accuracy"
_HOW: Final = (
    "Intervals are 95% by bootstrap over articles, p-values those of a two-sided paired randomisation test."
)


def evaluation_page(results: Results, answers: Path) -> Page:
    """Make the page of one evaluation.

    Args:
        results: The results, of kind `answers`.
        answers: The path of its `answers.jsonl`; the first `SHOWN_QUESTIONS` questions are on the page.
    """
    model = results.model
    whose = "gold answers" if results.right_answers == "gold" else "the teacher's answers taken as right"
    lead = (
        f"{results.counts.get('questions', 0):,} held-out questions about "
        f"{results.counts.get('articles', 0):,} articles, {whose}. {_HOW}"
    )
    made = [(name.replace("_", " "), str(value)) for name, value in model.items()]
    sections = [
        Section(
            "Quality",
            [*_quality_plots(results), _measures(results), *_apart(results), *map(Note, remarks(results))],
        ),
        Section("Answers", [_answer_examples(answers, list(results.systems))]),
        Section("Model", [PageTable("", ("setting", "value"), made)]),
    ]
    return Page(f"Evaluation of {Path(str(model.get('name', ''))).name}", lead, sections)


def _measures(results: Results) -> PageTable:
    rows = [
        (
            measure,
            system,
            str(own.measures[measure]),
            str(own.differences.get(measure, "")),
            own.measures[measure].n,
        )
        for measure in _measure_names(results)
        for system, own in results.systems.items()
        if measure in own.measures
    ]
    columns = ("measure", "system", "mean [95% interval]", f"against {results.baseline}", "questions")
    return PageTable("Every measure of every system", columns, rows)


def _apart(results: Results) -> list[PageBlock]:
    """Measures for questions whose documents hold a right answer, and for the others.

    There are none if all questions are of one kind.
    """
    rows = held_rows(results)
    if not rows:
        return []
    held, questions = results.counts["held"], results.counts["questions"]
    columns = ("measure", "system", f"held: {held:,} questions", f"not held: {questions - held:,}")
    return [PageTable("Questions whose documents hold a right answer, and the others", columns, rows)]


def _measure_names(results: Results) -> list[str]:
    return list(dict.fromkeys(name for own in results.systems.values() for name in own.measures))


def _quality_plots(results: Results) -> list[PageBlock]:
    found: list[PageBlock] = []
    for measure in _measure_names(results):
        if measure == LENGTH:
            continue
        own = {
            name: one.measures[measure] for name, one in results.systems.items() if measure in one.measures
        }
        drawn = plots.intervals(list(own), [_bounds(one) for one in own.values()], measure)
        rows = [(name, one.mean, one.low, one.high, one.n) for name, one in own.items()]
        table = PageTable("", ("system", "mean", "low", "high", "questions"), rows)
        found.append(Plot(f"{measure} of each system", drawn, table))
    return found


def _bounds(one: Estimate) -> tuple[float, float, float]:
    low, high = (one.mean if end is None else end for end in (one.low, one.high))
    return one.mean, low, high


def _answer_examples(path: Path, systems: Sequence[str]) -> PageExamples:
    examples = []
    with path.open("rb") as file:
        for record in map(orjson.loads, itertools.islice(file, SHOWN_QUESTIONS)):
            own = record["answers"]
            right = {name for name in systems if own[name].get(_QUALITY)}
            tags = [f"{name} {'right' if name in right else 'wrong'}" for name in systems]
            if COMPRESSED in right and len(right) == 1:
                tags.append("only compressed right")
            fields = [Field("right answers", [MarkedText(" / ".join(record["gold"]))])]
            fields += [Field(name, [MarkedText(own[name]["answer"] or "(none)")]) for name in systems]
            examples.append(PageExample(record["query"], tags, fields))
    return PageExamples(f"The first {len(examples):,} questions with the answers of each system", examples)


def comparison_page(comparison: Comparison) -> Page:
    """Make the page of a comparison: quality against cost, as in figures 1, 3 and 12 of the paper, tables."""
    first = comparison.runs[0].results
    shape = comparison.shape
    whose = "gold answers" if first.right_answers == "gold" else "the teacher's answers taken as right"
    lead = (
        f"{len(comparison.runs)} runs on {first.counts.get('questions', 0):,} held-out questions about "
        f"{first.counts.get('articles', 0):,} articles, {whose}. {_HOW} Costs are of a query of "
        f"{shape.query_tokens} "
        f"tokens with {shape.documents} documents of {shape.document_tokens}, {shape.new_tokens} new tokens, "
        f"on {comparison.machine}."
    )
    columns, rows = quality_rows(comparison)
    sections = [
        Section("Quality and cost", [*_against_cost(comparison), PageTable("Each run", columns, rows)]),
        Section("What changes quality", [*_against_settings(comparison)]),
        Section("Cost", [_cost_table(comparison), *_cost_notes(comparison)]),
        Section("All measures", [_all_measures(comparison), *map(Note, remarks(first))]),
    ]
    return Page("Comparison", lead, [section for section in sections if section.blocks])


def quality_rows(comparison: Comparison) -> tuple[Sequence[str], list[list[Cell]]]:
    """Return the table of quality, and of how much cheaper compressed documents are than text.

    Args:
        comparison: Its baselines come first.

    Returns:
        The columns, and a row for each baseline of each run and for each run.
    """
    batches = sorted({cost.batch for run in comparison.runs for cost in run.costs})
    columns = ["run", "compressor", "rate", "accuracy", "F1", f"accuracy against {comparison.reference}"]
    columns += ["fewer FLOPs", *(f"faster, batch {batch}" for batch in batches)]
    rows: list[list[Cell]] = []
    for run in comparison.runs:
        for system, own in run.results.systems.items():
            if system != COMPRESSED:
                measured = [str(own.measures[name]) for name in (_QUALITY, "F1")]
                rate = f"{run.results.model['compression_rate']}x" if SYSTEMS[system].has_rate else ""
                rows.append([system, "", rate, *measured, *[""] * (len(columns) - 5)])
    for run in comparison.runs:
        own = run.results.systems[COMPRESSED]
        against = run.differences.get(_QUALITY)
        row: list[Cell] = [run.name, _compressor(run), f"{run.results.model['compression_rate']}x"]
        row += [str(own.measures[_QUALITY]), str(own.measures["F1"]), str(against or "")]
        row.append(_ratio([run.cost(side, batches[0]) for side in _SIDES] if batches else [], "flops"))
        row += [_ratio([run.cost(side, batch) for side in _SIDES], "seconds") for batch in batches]
        rows.append(row)
    return columns, rows


_SIDES: Final = (UNCOMPRESSED, COMPRESSED)


def _ratio(sides: Sequence[Cost | None], what: str) -> str:
    text, compressed = (getattr(side, what, None) for side in sides) if sides else (None, None)
    return f"{text / compressed:.2f}x" if text and compressed else ""


def _compressor(run: Run) -> str:
    model = run.results.model
    made = f"first {model['num_layers']} layers" if run.kind.of_generator else run.compressor
    made = f"{run.kind.label} on {made}" if run.kind.label else made
    return f"{made}, reranking" if model["enable_reranking"] else made


def _against_cost(comparison: Comparison) -> list[PageBlock]:
    """Figure 1 of the paper: a point for each run, and for answers from the text."""
    found: list[PageBlock] = []
    batches = sorted({cost.batch for run in comparison.runs for cost in run.costs})
    costs = [("FLOPs of a query", "flops", batches[0], 1e9, "GFLOPs")] if batches else []
    costs += [(f"time of a query, batches of {b}", "seconds", b, 1e-3, "milliseconds") for b in batches]
    for title, what, batch, unit, name in costs:
        series: dict[str, list[plots.Point]] = {}
        rows = []
        for run in comparison.runs:
            for system in _SIDES:
                own, cost = run.results.systems.get(system), run.cost(system, batch)
                if own is None or cost is None:
                    continue
                mean, low, high = _bounds(own.measures[_QUALITY])
                label = run.name if system == COMPRESSED else "text"
                group = _compressor(run) if system == COMPRESSED else UNCOMPRESSED
                point = plots.Point(label, getattr(cost, what) / unit, mean, low, high)
                series.setdefault(group, []).append(point)
                rows.append((label, group, point.x, mean, low, high))
        table = PageTable("", ("run", "kind", name, _QUALITY, "low", "high"), rows)
        drawn = plots.plane(series, name, _QUALITY, logarithmic=True)
        found.append(Plot(f"{_QUALITY.capitalize()} against {title}", drawn, table))
    return found


def _against_settings(comparison: Comparison) -> list[PageBlock]:
    """Figures 3 and 12 of the paper: quality by compression rate and by layers, if the runs differ in it."""
    found: list[PageBlock] = []
    for setting, title in (
        ("compression_rate", "compression rate"),
        ("num_layers", "layers of the compressor"),
    ):
        series: dict[str, list[plots.Point]] = {}
        for run in comparison.runs:
            model = run.results.model
            if setting == "num_layers" and (run.kind.rates or not run.kind.of_generator):
                continue
            reranks = ", reranking" if model["enable_reranking"] else ""
            rest = (
                _compressor(run)
                if setting == "compression_rate"
                else f"{model['compression_rate']}x{reranks}"
            )
            value = _bounds(run.results.systems[COMPRESSED].measures[_QUALITY])
            series.setdefault(rest, []).append(plots.Point(run.name, float(model[setting]), *value))
        values = {point.x for points in series.values() for point in points}
        if len(values) < 2:
            continue
        ordered = {name: sorted(points, key=lambda point: point.x) for name, points in series.items()}
        rows = [(p.name, name, p.x, p.y, p.low, p.high) for name, points in ordered.items() for p in points]
        table = PageTable("", ("run", "kind", title, _QUALITY, "low", "high"), rows)
        drawn = plots.plane(ordered, title, _QUALITY, logarithmic=setting == "compression_rate")
        found.append(Plot(f"{_QUALITY.capitalize()} by {title}", drawn, table))
    return found


def _cost_table(comparison: Comparison) -> PageTable:
    """The table of costs, as the paper's table 5."""
    columns = (
        *("run", "reads", "batch", "GFLOPs: compression", "generation", "sum"),
        *("ms: compression [quartiles]", "generation [quartiles]", "sum", "peak memory of the batch, GB"),
    )
    rows: list[tuple[Cell, ...]] = []
    for run in comparison.runs:
        for one in run.costs:
            flops = [value / 1e9 for value in (one.compression_flops, one.generation_flops, one.flops)]
            peak = None if one.peak_bytes is None else one.peak_bytes / 1e9
            times = (_milliseconds(one.compression), _milliseconds(one.generation), one.seconds * 1e3)
            reads = "embeddings" if one.system == COMPRESSED else "text"
            rows.append((run.name, reads, one.batch, *flops, *times, peak))
    return PageTable("A query's cost, medians over repetitions", columns, rows)


def _milliseconds(one: Seconds) -> str:
    median, low, high = (value * 1e3 for value in one)
    return f"{median:,.1f} [{low:,.1f}, {high:,.1f}]" if median else "–"


def _cost_notes(comparison: Comparison) -> list[PageBlock]:
    left_out = [
        Note(
            f"{run.name} in batches of {', '.join(map(str, missing))}: left out, because a whole batch "
            "does not fit into memory."
        )
        for run in comparison.runs
        if (missing := [size for size in comparison.batches if run.cost(COMPRESSED, size) is None])
    ]
    return [
        *left_out,
        Note(
            "FLOPs are those of matrix products and attention, counted by torch. Peak memory is that of the "
            "whole process on a CPU, and the memory that torch allocated on a GPU."
        ),
    ]


def _all_measures(comparison: Comparison) -> PageTable:
    rows = [
        (run.name, system, measure, str(found), found.n)
        for run in comparison.runs
        for system, own in run.results.systems.items()
        for measure, found in own.measures.items()
    ]
    return PageTable("", ("run", "system", "measure", "mean [95% interval]", "questions"), rows)

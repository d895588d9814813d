"""Measures of rankings by ir_measures: runs and relevance judgements in TREC's format, query by query."""

import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson

from scaledown.data.input import files
from scaledown.errors import InputError, UsageError
from scaledown.run.atomic import atomic
from scaledown.urls import check_exists

log = logging.getLogger("scaledown")

_MOST_RELEVANCE: Final = 10_000  # trec_eval counts each grade: larger grades need much memory
_HEADINGS: Final = frozenset({"score", "relevance", "rel", "grade", "label", "judgment", "judgement", "rank"})

RunScores = dict[str, dict[str, float]]
"""By query, then by document."""


class _Form(NamedTuple):
    """The columns of a file, and the indices of the document and its value."""

    columns: tuple[str, ...]
    document: int
    value: int


_RUNS: Final = (  # TREC's and MS MARCO's
    _Form(("qid", "Q0", "docid", "rank", "score", "tag"), 2, 4),
    _Form(("qid", "docid", "rank"), 1, 2),
)
_QRELS: Final = (  # TREC's and BEIR's
    _Form(("qid", "0", "docid", "relevance"), 2, 3),
    _Form(("query-id", "corpus-id", "score"), 1, 2),
)


def read_run(path: Path, counts: Counter[str] | None = None) -> RunScores:
    """Read the scores of a TREC run, or of a run that has only ranks.

    If a run has scores, its ranks are ignored, as in trec_eval.

    Args:
        path: The file.
        counts: Receives the number of queries whose ranks contradict their scores (`contradicted`) and the
            number of `tied` scores. Both are logged too.

    Returns:
        The score of each document, by query.

    Raises:
        InputError: A line is not valid; the message names the file and the line.
    """
    found: RunScores = {}
    ranks: dict[str, list[tuple[float, float]]] = {}
    form = _RUNS[0]
    for where, form, fields in _ranking_rows(path, "--run", _RUNS):
        value = _number(fields[form.value], where, form, whole=form is not _RUNS[0])
        score = value if form is _RUNS[0] else -value
        query, document = fields[0], fields[form.document]
        if document in found.setdefault(query, {}):
            raise InputError(f"{where}: document {document} occurs twice for query {query}: keep one")
        found[query][document] = score
        if form is _RUNS[0] and fields[3].isdecimal():
            ranks.setdefault(query, []).append((int(fields[3]), -score))
    later = [query for query, own in found.items() if max(own.values()) < -1]
    if form is not _RUNS[0] and 2 * len(later) > len(found):
        raise InputError(
            f"--run {path}: its third column holds no ranks: query {later[0]} has none of 0 or 1; give "
            f"{' '.join(_RUNS[0].columns)} if these are scores"
        )
    counts = Counter() if counts is None else counts
    if wrong := sum(map(_contradict, ranks.values())):
        log.warning(
            "--run %s: the ranks of %s of %s queries contradict their scores: scores count, higher is better",
            *(path, f"{wrong:,}", f"{len(found):,}"),
        )
        counts["contradicted"] = wrong
    tied = sum(len(own) - len(set(own.values())) for own in found.values())
    if tied:
        counts["tied"] = tied
        log.info("--run %s: %s ties, broken as trec_eval does: the larger id comes first", path, f"{tied:,}")
    return found


def _contradict(ranked: list[tuple[float, float]]) -> bool:
    """Whether the order by rank differs from the order by falling score."""
    return any(rank < other and low > high for (rank, low), (other, high) in pairwise(sorted(ranked)))


def read_qrels(path: Path, counts: Counter[str] | None = None) -> dict[str, dict[str, int]]:
    """Read the relevance of judged documents. Equal judgements that occur twice count once.

    Args:
        path: The file.
        counts: Receives the number of relevances below 0 (`below_0`), which become 0, as in trec_eval.

    Returns:
        The relevance of each document, by query.

    Raises:
        InputError: A line is not valid; the message names the file and the line.
    """
    found: dict[str, dict[str, int]] = {}
    below = 0
    for where, form, fields in _ranking_rows(path, "--qrels", _QRELS):
        value = _number(fields[form.value], where, form, whole=True)
        if value > _MOST_RELEVANCE:
            raise InputError(f"{where}: relevance {value:g} is above {_MOST_RELEVANCE:,}: use small grades")
        below += value < 0
        relevance = max(0, int(value))
        query, document = fields[0], fields[form.document]
        if found.setdefault(query, {}).setdefault(document, relevance) != relevance:
            raise InputError(f"{where}: document {document} occurs twice for query {query}: keep one")
    if below:
        if counts is not None:
            counts["below_0"] = below
        log.warning("--qrels %s: %s relevances below 0 count as 0, as in trec_eval", path, f"{below:,}")
    return found


def _ranking_rows(path: Path, flag: str, forms: Sequence[_Form]) -> Iterator[tuple[str, _Form, list[str]]]:
    """Yield the place, the form and the fields of each line; a line of headings is skipped."""
    check_exists(str(path), flag)
    form = None
    empty = True
    for number, line in files.lines(path):
        text = line.decode("utf-8", "replace")
        where = f"{flag} {path}:{number}"
        for known in (form,) if form else forms:
            # Most files separate fields by any white space; in files with tabs an id may contain a space.
            tabs = [field.strip() for field in text.split("\t")]
            fields = tabs if len(tabs) == len(known.columns) and all(tabs) else text.split()
            fields = [field[1:-1] if re.fullmatch(r'".+"', field) else field for field in fields]
            if len(fields) == len(known.columns):
                break
        else:
            expected = " or ".join(
                f"{len(known.columns)}: {' '.join(known.columns)}" for known in ((form,) if form else forms)
            )
            raise InputError(f"{where}: {len(fields)} fields, expected {expected}")
        if form is None:
            form = known
            heads = fields[form.value].lower() in _HEADINGS
            if heads and (form.columns[form.value] == "rank") != (fields[form.value].lower() == "rank"):
                raise InputError(
                    f"{where}: its last column is called {fields[form.value]}, expected "
                    f"{form.columns[form.value]}; give {' '.join(forms[0].columns)}"
                )
            if heads or form is not forms[0]:
                headed = "after a line of headings" if heads else "no line of headings"
                log.info("%s %s: read as %s, %s", flag, path, " ".join(form.columns), headed)
            if heads:
                continue
        empty = False
        yield where, form, fields
    if empty:
        raise InputError(f"{flag} {path}: is empty; it needs lines of {' '.join(forms[0].columns)}")


def _number(text: str, where: str, form: _Form, *, whole: bool) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (whole and not value.is_integer()):
        kind = "whole number" if whole else "number"
        raise InputError(f"{where}: {form.columns[form.value]} {text!r} is not a {kind}: fix that line")
    return value


def parse_measures(names: Sequence[str]) -> list[Any]:
    """Parse the names in `--measures`.

    Args:
        names: Names as ir_measures writes them: `nDCG@10`, `R@20`, `RR@10`, `AP`.

    Returns:
        Measures of ir_measures.

    Raises:
        UsageError: ir_measures does not know a name.
    """
    import ir_measures

    found = []
    for name in names:
        try:
            found.append(ir_measures.parse_measure(name))
        except (NameError, ValueError, SyntaxError, TypeError, AssertionError, KeyError) as error:
            raise UsageError(
                f"--measures {name}: ir_measures knows no such measure; use nDCG@10, R@20, RR@10, AP, P@5 …"
            ) from error
    return found


def per_query(
    run: RunScores, qrels: dict[str, dict[str, int]], measures: Sequence[Any]
) -> dict[str, list[float]]:
    """Compute each measure for each query.

    Args:
        run: The scores of the retrieved documents.
        qrels: The relevance of judged documents.
        measures: The result of `parse_measures`.

    Returns:
        By the measure's name, a value for each query of `qrels` in its order; 0 if the run lacks the query.

    Raises:
        UsageError: ir_measures cannot compute one of the measures.
    """
    import ir_measures

    judged, ranked = _untied(run, qrels)
    found = {str(measure): [0.0] * len(qrels) for measure in measures}
    try:
        for value in ir_measures.iter_calc(measures, judged, ranked):
            found[str(value.measure)][int(value.query_id)] = float(value.value)
    except Exception as error:  # its providers raise many types
        raise UsageError(
            f"--measures {' '.join(map(str, measures))}: ir_measures cannot compute one of them here "
            f"({type(error).__name__}); use nDCG@10, R@20, RR@10, AP, P@5 …"
        ) from error
    return found


def _untied(
    run: RunScores, qrels: Mapping[str, Mapping[str, int]]
) -> tuple[dict[str, dict[str, int]], RunScores]:
    """Replace ids by numbers and scores by ranks, so that all measures use the same order.

    Documents of equal score are ordered by id, the larger id first, as in trec_eval.
    """
    judged: dict[str, dict[str, int]] = {}
    ranked: RunScores = {}
    for number, (query, relevant) in enumerate(qrels.items()):
        scores = run.get(query, {})
        order = sorted(sorted(scores, reverse=True), key=lambda document: -scores[document])
        names = {document: str(place) for place, document in enumerate([*order, *relevant])}
        judged[str(number)] = {names[document]: grade for document, grade in relevant.items()}
        if order:
            ranked[str(number)] = {names[document]: -float(place) for place, document in enumerate(order)}
    return judged, ranked


def write_queries(
    path: Path, queries: Sequence[str], values: Mapping[str, Mapping[str, Sequence[float]]]
) -> None:
    """Write a line for each query, with every measure of every run.

    Args:
        path: The file; it appears in one step.
        queries: The ids of the queries.
        values: By run and measure, a value for each query, in the order of `queries`.
    """
    with atomic(path) as temporary, temporary.open("wb") as file:
        for place, query in enumerate(queries):
            runs = {run: {name: own[place] for name, own in found.items()} for run, found in values.items()}
            file.write(orjson.dumps({"query_id": query, "runs": runs}, option=orjson.OPT_APPEND_NEWLINE))

"""The command `scaledown report`: a page about training data, and a dataset card."""

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from scaledown.data.input.gold import Gold, read_gold
from scaledown.data.input.training_files import output_format
from scaledown.data.manifest import manifest_of
from scaledown.data.report.audit import UNGROUNDED, Audit, Looked, audit, marked, recall_by_depth
from scaledown.data.report.fidelity import fidelity, licences
from scaledown.data.report.rerank_effect import MOST_QUERIES, Reordering, reordering
from scaledown.data.teacher.review import content_words
from scaledown.errors import InputError, one_line
from scaledown.report import plots
from scaledown.report.page import (
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
    html,
    markdown,
)
from scaledown.run.atomic import atomic
from scaledown.run.progress import counted, duration
from scaledown.run.storage import Storage
from scaledown.urls import is_url

_SET_ASIDE: Final = 10
_CLIPPED: Final = 8_000  # the most characters shown of a text
MADE: Final = "<!-- made by scaledown report -->"
_SIZES: Final = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_COUNT_TEXTS: Final = {
    "empty": "empty answers",
    "refusal": "refusals",
    "echo": "answers that repeat the prompt",
    "truncated": "answers cut at their longest",
    "ungrounded": f"answers with less than {UNGROUNDED:.0%} of their content words in the documents",
    "document twice": "records with one document twice",
    "right": "answers that hold a right answer",
    "wrong": "answers that hold none",
    "right answer in no document": "queries whose documents hold no right answer",
}


class Report(NamedTuple):
    """A report that was written."""

    page: Path
    """The page."""
    card: Path
    """The dataset card."""
    audit: Audit
    """The findings."""


def write_report(
    data: Path,
    page: Path,
    card: Path,
    gold: Sequence[str] = (),
    *,
    origin: Path | None = None,
    work: Storage | None = None,
) -> Report:
    """Write the page and the card of a training file, with facts about its run if the run directory exists.

    Args:
        data: The training file.
        page: The page to write.
        card: The dataset card to write.
        gold: Files with right answers. Without any, those in the run's own query files are used.
        origin: The file that the run made, if `data` is a copy of it.
        work: The run directory; None to search for it beside the file.

    Raises:
        InputError: The data or a file with right answers cannot be read.
        OutputError: The disk is full.
    """
    manifest: dict[str, Any] = {}
    if work:
        manifest = work.read_json(work.root / "manifest.json")
    elif run := manifest_of(origin or data):
        manifest, work = run
    known = read_gold(gold, "--gold") if gold else _own_gold(manifest)
    found = audit(data, known)
    changed = reordering(manifest, work, known) if work else None
    content = _page(found, manifest, work, changed)
    texts = ((page, html(content)), (card, _front_matter(found) + markdown(content) + _use(data)))
    for path, text in texts:
        with atomic(path.resolve()) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="replace")
    return Report(page, card, found)


def _own_gold(manifest: Mapping[str, Any]) -> Gold | None:
    """Read right answers from the run's query files, if these are on this machine and have any."""
    files = (manifest.get("parameters") or {}).get("queries_file") or ()
    names = [name for name in files if not is_url(name) and Path(name).is_file()]
    try:
        return read_gold(names, "--queries_file", needed=False)
    except InputError:  # a file has changed since the run
        return None


def _page(
    found: Audit, manifest: Mapping[str, Any], work: Storage | None, changed: Reordering | None
) -> Page:
    whole = found.sampled == found.records
    sampled = "all of them" if whole else f"a random sample of {found.sampled:,}"
    bad = f" {found.bad:,} more are not usable ({'; '.join(found.messages)})." if found.bad else ""
    each = found.documents / found.records
    lead = (
        f"{counted(found.records, 'records')}, {each:.3g} documents each.{bad} Counts of "
        f"records and repetitions are over the whole file; everything else is from {sampled}."
    )
    sections = [
        Section("Counts", [*_counts(found, manifest)]),
        Section("Answers", [*_answer_blocks(found), *_set_aside(work)]),
        Section("Where the answer is", [*_place_blocks(found, changed)]),
        Section("Reranking", [*_reranking(found, changed)]),
        Section("Lengths", [*_length_blocks(found)]),
        Section("Repetitions", [*_repetitions(found)]),
    ]
    if manifest:
        sections += [
            Section("Beside the paper", [_fidelity(manifest)]),
            Section("Licences and revisions", [*_licences(manifest)]),
        ]
    sections.append(Section("Examples", [_examples(found)]))
    return Page(f"{found.path.name}: training data", lead, [one for one in sections if one.blocks])


def _counts(found: Audit, manifest: Mapping[str, Any]) -> list[PageBlock]:
    rows: list[tuple[str, str, str]] = []
    for name, stage in (manifest.get("stages") or {}).items():
        counts = ", ".join(
            counted(value, key.replace("_", " ")) for key, value in (stage.get("counts") or {}).items()
        )
        measured = [f"{key} {value:.4g}" for key, value in (stage.get("measured") or {}).items()]
        rows.append((name, ", ".join([counts, *measured]), duration(float(stage.get("seconds") or 0))))
    rows.append(("export", counted(found.records, "records"), ""))
    blocks: list[PageBlock] = [
        PageTable("What each stage made, and its time", ("stage", "counts", "time"), rows)
    ]
    if passed := manifest.get("passed_over"):
        over = [(flag, name, why) for flag, files in passed.items() for name, why in files.items()]
        blocks.append(PageTable("Files that were passed over", ("flag", "file", "why"), over))
    if guessed := manifest.get("guessed"):
        how = [(flag, name, said) for flag, files in guessed.items() for name, said in files.items()]
        blocks.append(PageTable("Files that were read by their content", ("flag", "file", "how"), how))
    return blocks


def _answer_blocks(found: Audit) -> list[PageBlock]:
    share = {name: count / found.sampled for name, count in found.tags.items()}
    rows = [
        (said, found.tags[name], f"{share[name]:.2%}")
        for name, said in _COUNT_TEXTS.items()
        if name in share and name != "document twice"
    ]
    if not any(name in share for name in ("empty", "refusal", "echo", "ungrounded")):
        rows.insert(0, ("empty, refusing, repeating or ungrounded answers", 0, "0%"))
    blocks: list[PageBlock] = [
        PageTable(
            f"In {counted(found.sampled, 'records')}; the examples below can be filtered by each", _OF, rows
        )
    ]
    if not found.finish_known:
        blocks.append(
            Note("This file does not say which answers were cut: --columns finish_reason adds that.")
        )
    return blocks


def _set_aside(work: Storage | None) -> Iterator[PageBlock]:
    """Show the first answers and queries that the run left out, each with its reason."""
    rows = []
    for stage in ("queries", "answers", "reviewed"):
        files = work.glob(work.root / "quarantine", f"{stage}-*.jsonl") if work else []
        lines = itertools.chain.from_iterable(_json_lines(work, file) for file in files if work)
        for one in itertools.islice(lines, _SET_ASIDE):
            what = one.get("answer") or one.get("query") or one.get("content") or ""
            rows.append((str(one.get("query_id", "")), one_line(str(what), 90), str(one.get("reason", ""))))
    if rows:
        caption = f"Left out by the run, at most {_SET_ASIDE} of each stage; all are in its quarantine"
        yield PageTable(caption, ("query", "what", "why"), rows)


def _json_lines(work: Storage, path: Path) -> Iterator[dict[str, Any]]:
    work.fetch(path)
    with path.open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                if isinstance(record := json.loads(line), dict):
                    yield record


_OF: Final = ("what", "records", "share")


def _place_blocks(found: Audit, changed: Reordering | None) -> list[PageBlock]:
    blocks: list[PageBlock] = []
    for places, caption in (
        (found.gold_places, "First document that holds a right answer, word for word"),
        (found.answer_places, "First document that has all content words of the teacher's answer"),
    ):
        if places:
            most = max(places)
            names = [*map(str, range(1, most + 1)), "none"]
            values = [places.count(place) for place in range(1, most + 1)] + [places.count(0)]
            table = PageTable("", ("document", "records"), list(zip(names, values, strict=True)))
            blocks.append(Plot(caption, plots.bars(names, values, "records"), table))
    curves: dict[str, list[float]] = {}
    if changed and changed.gold_after:
        depth = len(changed.firsts)
        curves = {
            "retrieved": recall_by_depth(changed.gold_before, depth),
            "reranked": recall_by_depth(changed.gold_after, depth),
        }
    elif found.gold_places:
        curves = {"documents": recall_by_depth(found.gold_places, max(1, *found.gold_places))}
    if curves:
        ks = list(range(1, len(next(iter(curves.values()))) + 1))
        table = PageTable("", ("k", *curves), list(zip(ks, *curves.values(), strict=True)))
        number = len(changed.gold_after) if changed and changed.gold_after else len(found.gold_places)
        caption = f"R@k: share of {number:,} queries with a right answer in the first k passages"
        blocks.append(Plot(caption, plots.curves(curves, ks, "k", "R@k"), table))
    return blocks


def _reranking(found: Audit, changed: Reordering | None) -> list[PageBlock]:
    if not found.scores and not changed:
        return [Note("No reranking scores: --enable_reranking keeps them.")]
    blocks: list[PageBlock] = []
    if found.scores:
        every = np.concatenate([np.asarray(scores) for scores in found.scores]).clip(-1e30, 1e30)
        low, high = float(every.min()), float(every.max())
        counts, edges = np.histogram(every, bins=24, range=(low, high + (high == low) * max(1.0, abs(low))))
        table = PageTable(
            "",
            ("place", "5%", "median", "95%", "mean"),
            [
                (place, *map(float, np.percentile(scores, [5, 50, 95])), float(np.mean(scores)))
                for place, scores in enumerate(found.scores, 1)
            ],
        )
        drawn = plots.histogram(edges.tolist(), counts.tolist(), "reranking score", "documents")
        blocks.append(Plot("Reranking scores of the documents; by place in the numbers", drawn, table))
    if changed:
        places = list(range(1, len(changed.firsts) + 1))
        scope = (
            f"of the first {MOST_QUERIES:,} queries" if changed.queries == MOST_QUERIES else "of all queries"
        )
        orders = {"retriever's order": changed.before, "reranker's order": changed.after}
        means = list(zip(places, changed.before, changed.after, strict=True))
        table = PageTable("", ("place", "mean score, retriever's order", "reranker's order"), means)
        drawn = plots.curves(orders, places, "place", "mean reranking score")
        blocks.append(Plot(f"What reranking changed, {scope}: mean score at each place", drawn, table))
        firsts = list(zip(places, changed.firsts, strict=True))
        table = PageTable("", ("place before", "came first after reranking"), firsts)
        drawn = plots.bars([str(place) for place in places], changed.firsts, "queries")
        kept = changed.firsts[0] / max(1, changed.queries)
        caption = f"Where the first passage had stood before reranking: {kept:.0%} stayed first"
        blocks.append(Plot(caption, drawn, table))
    return blocks


def _length_blocks(found: Audit) -> list[PageBlock]:
    columns = ("words", "least", "5%", "median", "95%", "most")
    rows = [(s.name, s.least, s.low, s.median, s.high, s.most) for s in found.spreads]
    blocks: list[PageBlock] = [PageTable("Lengths in words", columns, rows)]
    for spread in found.spreads:
        drawn = plots.histogram(spread.edges, spread.counts, "words", spread.name)
        rows_of = [
            (f"{low:.0f} to {high:.0f}", count)
            for low, high, count in zip(spread.edges, spread.edges[1:], spread.counts, strict=False)
        ]
        table = PageTable("", ("words", spread.name), rows_of)
        blocks.append(Plot(f"Length of {spread.name}, up to the 99th percentile", drawn, table))
    return blocks


def _repetitions(found: Audit) -> list[PageBlock]:
    rows: list[tuple[str, int, str]] = [
        ("records", found.records, ""),
        (
            "repeated queries",
            found.repeated_queries,
            f"{found.repeated_queries / found.records:.2%} of the records",
        ),
        ("documents in all records", found.documents, ""),
        (
            "different documents",
            found.different_documents,
            f"each serves {found.documents / found.different_documents:.3g} queries",
        ),
        ("records with one document twice", found.tags.get("document twice", 0), "in the sample"),
    ]
    blocks: list[PageBlock] = [PageTable("Over the whole file", ("what", "number", ""), rows)]
    if found.frequent:
        common = [
            (
                one_line(one.text, 90) or "in no record of the sample",
                one.queries,
                f"{one.queries / found.records:.2%}",
            )
            for one in found.frequent
        ]
        blocks.append(
            PageTable("Documents that serve the most queries", ("document", "queries", "of all"), common)
        )
    return blocks


def _fidelity(manifest: Mapping[str, Any]) -> PageBlock:
    said = {True: "same", False: "differs", None: "–"}
    rows = [(one.name, one.paper, one.here, said[one.same]) for one in fidelity(manifest)]
    return PageTable(
        "Every setting of the data of OSCAR (arXiv 2504.07109) and this run's",
        ("setting", "paper", "this run", ""),
        rows,
    )


def _licences(manifest: Mapping[str, Any]) -> list[PageBlock]:
    rows = [tuple(one) for one in licences(manifest)]
    columns = ("part", "name", "revision", "licence", "allows")
    note = "What licences allow is only a reminder to read them, not legal advice."
    return [PageTable("Models and corpus", columns, rows), Note(note)]


def _examples(found: Audit) -> PageExamples:
    first = "those with findings first" if found.sampled > len(found.shown) else "all of them"
    caption = (
        f"{counted(len(found.shown), 'records')}, {first}. The answer's words are marked in the documents."
    )
    return PageExamples(caption, [_page_example(one) for one in found.shown])


def _page_example(one: Looked) -> PageExample:
    record = one.record
    scores = record.get("reranking_scores") or [None] * len(record["documents"])
    fields = [Field("answer", [MarkedText(record["answer"][:_CLIPPED])])]
    if one.right:
        fields.append(Field("right answers", [MarkedText(" / ".join(one.right))]))
    words = content_words(record["answer"])
    for place, (text, score) in enumerate(zip(record["documents"], scores, strict=True), 1):
        shown = "" if score is None else f", score {score:.4g}"
        clipped = text if len(text) <= _CLIPPED else text[:_CLIPPED] + " …"
        parts = marked(clipped, [*one.right, record["answer"].strip(" .")], words)
        fields.append(Field(f"document {place}{shown}", parts))
    return PageExample(record["query"], one.tags, fields)


def _front_matter(found: Audit) -> str:
    size = next((name for most, name in _SIZES if found.records < most), "n>1M")
    return (
        "---\nlicense: other\nlicense_name: see-licences-below\ntask_categories:\n- question-answering\n"
        f"tags:\n- rag\n- context-compression\n- oscar\n- scaledown\nsize_categories:\n- {size}\n---\n\n"
    )


def _use(data: Path) -> str:
    kind = output_format(data).builder
    name = json.dumps(data.name)
    return (
        f"\n{MADE}\n"
        f'\n## Use\n\n```python\nfrom datasets import load_dataset\n\ndata = load_dataset("{kind}", '
        f"data_files={name})\n```\n\nMade with ScaleDown, which trains a compressor on it: `scaledown train "
        "--train_data FILE`.\n"
    )


def report_summary(report: Report) -> str:
    """Return what `scaledown report` prints."""
    found = report.audit
    lines = [f"{found.path}: {counted(found.records, 'records')}, {found.sampled:,} read word for word"]
    tags = [f"  {found.tags[name]:>8,}  {said}" for name, said in _COUNT_TEXTS.items() if name in found.tags]
    return "\n".join([*lines, *(["", *tags] if tags else []), "", f"look: {report.page}, {report.card}"])

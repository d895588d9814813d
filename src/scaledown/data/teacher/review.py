"""Review of the teacher's answers: cut ends, problems, groundedness, agreement with a second teacher.

Makes the stage `reviewed` from `answers` without a model, so that other limits cost nothing.
"""

import collections
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

import pyarrow as pa

from scaledown.config.prepare import PrepareConfig
from scaledown.data.input.corpus import PassageTable
from scaledown.data.logprobs import LOGPROBS_TYPE, for_answer
from scaledown.errors import InputError
from scaledown.metrics import f1
from scaledown.records import full_text
from scaledown.run.stage import Stage
from scaledown.text import normalized

REVIEW_VERSION: Final = 2
"""Of what a problem and an agreement is: the stages that depend on it name it."""

# Refusals: openings that are common to current chat models.
_REFUSAL: Final = re.compile(
    r"(unfortunately,? )?(i'?m sorry|i am sorry|sorry|i apologi[sz]e|as an ai|i('m| am) (unable|not able)|"
    r"i (can ?not|can'?t|could not|couldn'?t|do not|don'?t) "
    r"(answer|provide|find|determine|know|have|help|assist)|"
    r"(the|these|this|none of the) (provided |given )?"
    r"(documents?|background|passages?|text|context|information)( \w+)? "
    r"(do(es)? not|don'?t|doesn'?t|did not) |"
    r"there is no (information|mention)|(it is )?not (mentioned|specified|stated|provided))",
    re.IGNORECASE,
)
# Not after an initial or a title; Chinese and Japanese have no space after a sentence.
_END_OF_SENTENCE: Final = re.compile(
    r"(?:(?<!\b[A-Z])(?<!\b[DMS]r)(?<!\bMrs)(?<!\b[SM]t)(?<!\bvs)(?<!\bNo)\.|[!?\u2026])[\"'\u201d\u2019)\]]*(?=\s|$)"
    r"|[\u3002\uff01\uff1f][\u300d\u300f\u201d]?"
)
WORD: Final = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]|\w+")  # Chinese and Japanese by character
_ECHO_WORDS: Final = 4  # an answer may begin with a question of fewer words

# English function words, which occur in every document.
STOP_WORDS: Final = frozenset(
    """a about above after again against all also am an and any are as at be because been before being below
    between both but by can could did do does doing down during each few for from further had has have having
    he her here hers him his how i if in into is it its itself just may me might more most must my no nor not
    of off on once only or other our out over own same she should so some such than that the their them then
    there these they this those through to too under until up very was we were what when where which while
    who whom whose why will with would yes you your""".split()  # noqa: SIM905
)


class Review(NamedTuple):
    """The review of an answer."""

    text: str
    """The answer, perhaps cut."""
    problem: str
    """`empty`, `refusal`, `echo`, or an empty text if there is none."""
    groundedness: float
    """Share of the answer's content words that occur in its documents (after K-Precision, Adlakha et al.
    2023, arXiv 2307.16877, here without function words); 1 if it has no content words."""


def review_answer(
    text: str, finish_reason: str, query: str, documents: Iterable[str], *, cut: bool
) -> Review:
    """Review an answer.

    Args:
        text: The answer.
        finish_reason: As in `Answer`; `length` means truncated.
        query: The question.
        documents: The texts of its documents.
        cut: Cut a truncated answer after its last sentence.
    """
    if cut and finish_reason == "length":
        text = whole_sentences(text)
    return Review(text, answer_problem(text, query), groundedness(text, documents))


def whole_sentences(text: str) -> str:
    """Return the text up to its last end of a sentence; the whole text if there is none."""
    ends = [match.end() for match in _END_OF_SENTENCE.finditer(text)]
    return text[: ends[-1]] if ends else text


def sentences(text: str) -> list[str]:
    """Split a text into sentences; the end of a line ends a sentence too."""
    found = []
    for line in text.splitlines():
        ends = [0, *(match.end() for match in _END_OF_SENTENCE.finditer(line)), len(line)]
        found += [line[start:end].strip() for start, end in itertools.pairwise(ends)]
    return [sentence for sentence in found if sentence]


def answer_problem(text: str, query: str) -> str:
    """Find out why an answer is useless.

    Args:
        text: The answer.
        query: The question.

    Returns:
        `empty`, `refusal`, `echo` if it repeats the question or the prompt, or an empty text if it is useful.
    """
    if not text.strip():
        return "empty"
    if _REFUSAL.match(text.strip().replace("\u2019", "'")):
        return "refusal"
    own, asked = normalized(text).split(), normalized(query).split()
    if (
        len(asked) >= _ECHO_WORDS
        and own[: len(asked)] == asked
        and not set(content_words(text)) - set(content_words(query))
    ):
        return "echo"
    return "echo" if re.search(r"(?m)^\s*(Background|Question|Documents):", text) else ""


def groundedness(text: str, documents: Iterable[str]) -> float:
    """Return the share of an answer's content words that occur in its documents.

    Args:
        text: The answer.
        documents: The texts of its documents.

    Returns:
        0 to 1; 1 if the answer has no content words.
    """
    words = content_words(text)
    there = set().union(*map(content_words, documents))
    return sum(word in there for word in words) / len(words) if words else 1.0


def content_words(text: str) -> list[str]:
    """Return the words in lower case without English function words; Chinese and Japanese by character."""
    return [word for word in WORD.findall(text.lower()) if word not in STOP_WORDS]


def review_answers(  # noqa: PLR0917
    stage: Stage,
    answers: Stage,
    second: Stage | None,
    passages: Stage,
    config: PrepareConfig,
    left_out: Callable[[str, Sequence[str]], dict[str, Any] | None],
) -> None:
    """Keep the answers that `config` allows; the others go to the quarantine, with reasons.

    Adds the columns problem, groundedness and, with a second teacher, second_answer and agreement. Log
    probabilities are cut where the answer is cut.

    Args:
        stage: The stage of reviewed answers.
        answers: The stage of answers.
        second: The stage of the second teacher's answers, if there is one.
        passages: The stage of passages.
        config: What is kept.
        left_out: Returns for an answer and its passages why it must not be trained on, or None.

    Raises:
        InputError: No answer is kept.
    """
    if stage.done():
        return
    rows = answers.planned()
    dropped = {"empty"} if config.bad_answers == "keep" else {"empty", "refusal", "echo"}

    def work(shard: int) -> pa.Table:
        texts = PassageTable(passages)
        table = answers.table(shard)
        others = dict(_second_answers(second, shard)) if second else {}
        seen: collections.Counter[str] = collections.Counter()
        reviews, rejected, kept = [], [], []
        for number, record in enumerate(table.to_pylist()):
            found = [texts[row] for row in record["rows"]]
            documents = [full_text(passage.title, passage.text) for passage in found]
            cut = config.truncated_answers == "cut"
            own = review_answer(record["text"], record["finish_reason"], record["query"], documents, cut=cut)
            why: dict[str, Any] | None = None
            if own.problem in dropped:
                why = {
                    "reason": f"the teacher's answer is {_FLAG_TEXTS[own.problem]}",
                    "problem": own.problem,
                }
            elif own.groundedness < config.min_groundedness:
                reason = f"groundedness {own.groundedness:.2f} is below --min_groundedness"
                why = {"reason": reason, "problem": own.problem or "ungrounded"}
            else:
                why = left_out(own.text, [passage.text for passage in found])
            seen[why["problem"] if why else own.problem] += 1
            if why:
                rejected.append({"query_id": record["query_id"], **why, "answer": record["text"]})
            else:
                kept.append(number)
                reviews.append(own)
        stage.quarantine(f"{shard:06d}", rejected)
        table = table.take(pa.array(kept, pa.int64()))
        columns: dict[str, Any] = {
            name: pa.array([getattr(own, name) for own in reviews], kind)
            for name, kind in (("problem", pa.string()), ("groundedness", pa.float64()))
        }
        if second:
            theirs = [others.get(key) for key in table.column("query_id").to_pylist()]
            both = zip(reviews, theirs, strict=True)
            columns["second_answer"] = pa.array(theirs, pa.large_string())
            columns["agreement"] = pa.array(
                [None if text is None else f1(own.text, [text]) for own, text in both], pa.float64()
            )
        if "answer_logprobs" in table.column_names:
            given = table.column("answer_logprobs").to_pylist()
            of_kept = [one and for_answer(one, own.text) for one, own in zip(given, reviews, strict=True)]
            place = table.column_names.index("answer_logprobs")
            table = table.set_column(place, "answer_logprobs", pa.array(of_kept, LOGPROBS_TYPE))
        cut_texts = pa.array([own.text for own in reviews], pa.large_string())
        table = table.set_column(table.column_names.index("text"), "text", cut_texts)
        for name, values in columns.items():
            table = table.append_column(name, values)
        return table.replace_schema_metadata({"seen": json.dumps(seen)})

    if stage.complete(len(rows), work, nothing={"seen": "{}"}):
        _finish_review(stage, stage.made(), second)


_REVIEW_COUNTS: Final = {
    "empty": "empty",
    "refusal": "refusals",
    "echo": "echoes",
    "ungrounded": "ungrounded",
    "contaminated": "contaminated",
}
_FLAG_TEXTS: Final = {"empty": "empty", "refusal": "a refusal", "echo": "an echo of the prompt"}


def _second_answers(second: Stage, shard: int) -> Iterable[tuple[str, str]]:
    table = second.table(shard)
    return zip(table.column("query_id").to_pylist(), table.column("text").to_pylist(), strict=True)


def _finish_review(stage: Stage, rows: list[int], second: Stage | None) -> None:
    kept: list[int] = []
    bare = 0
    problems: collections.Counter[str] = collections.Counter()
    sums: collections.Counter[str] = collections.Counter()
    agreeing = 0
    for shard in range(len(rows)):
        table = stage.table(shard)
        kept.append(table.num_rows)
        problems.update(json.loads(table.schema.metadata[b"seen"]))
        if "answer_logprobs" in table.column_names:
            bare += table.column("answer_logprobs").null_count
        sums["groundedness"] += sum(table.column("groundedness").to_pylist())
        if second:
            values = [value for value in table.column("agreement").to_pylist() if value is not None]
            agreeing += len(values)
            sums["agreement"] += sum(values)
    if not sum(kept):
        raise InputError(
            "no answer was kept: quarantine/ in the run directory says why, one by one; try a larger "
            "--teacher_model, a lower --min_groundedness, or other --decontaminate files"
        )
    measured = {"groundedness": round(sums["groundedness"] / sum(kept), 4)}
    if agreeing:
        measured["agreement"] = round(sums["agreement"] / agreeing, 4)
    rejected = sum(rows) - sum(kept) - problems["contaminated"]
    counts = {"kept": sum(kept), "rejected": rejected}
    counts |= {_REVIEW_COUNTS[name]: problems[name] for name in _REVIEW_COUNTS if problems[name]}
    if bare:
        counts["without_logprobs"] = bare
    stage.finish(kept, counts, measured)

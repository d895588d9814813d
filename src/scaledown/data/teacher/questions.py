"""Questions that the teacher writes about passages: synthetic queries."""

import functools
import logging
import random
import re
import time
from collections.abc import Callable, Sequence
from typing import Final

import pyarrow as pa

from scaledown.config.prepare import PrepareConfig
from scaledown.data.input.corpus import PassageTable
from scaledown.data.prompts import Prompt, question_prompt
from scaledown.data.retrieval.parts import kept_rows, removed_rows
from scaledown.data.teacher.answer_log import AnswerLog, answer_prompts
from scaledown.data.teacher.base import Rejection, Teacher
from scaledown.errors import InputError
from scaledown.records import Answer, Passage, full_text
from scaledown.run.progress import track
from scaledown.run.stage import Stage
from scaledown.text import question_key

log = logging.getLogger("scaledown")

_QUESTION_WORDS: Final = frozenset(
    [
        *("who", "whom", "whose", "what", "when", "where", "which", "why", "how"),
        *("is", "are", "was", "were", "do", "does", "did", "has", "have", "had"),
        *("can", "could", "should", "would", "will"),
    ]
)
_ABOUT_THE_TEXT: Final = re.compile(
    r"\b(?:the|this|that|given|above) "
    r"(?:text|passage|article|paragraph|document|author|question|answer|subject)\b"
    r"|\bexample topic\b",
    re.IGNORECASE,
)
_LIST_LABEL: Final = re.compile(r"^\s*(?:[-•]|\d+[.)]|(?:question|q)(?: ?\d+)?\s*[:.])\s*", re.IGNORECASE)
PASSES: Final = 4
LATER_TEMPERATURE: Final = 0.8


def as_question(text: str, passage: str) -> str | None:
    """Find the question in a teacher's text.

    It asks something, in 3 to 40 words, does not speak of the text, and has at least half of its longer
    words from the passage.

    Args:
        text: What the teacher wrote.
        passage: The text of the passage.

    Returns:
        The first such question; None if there is none.
    """
    known = set(re.findall(r"\w+", passage.lower()))
    for line in text.splitlines():
        question = _LIST_LABEL.sub("", line.replace("*", "")).strip().strip("\"'“”").strip()
        head, mark, _ = question.partition("?")
        question = head + mark
        words = re.findall(r"\w+", question.lower())
        longer = [word for word in words if len(word) > 3 and word not in _QUESTION_WORDS]
        if (
            mark
            and 3 <= len(words) <= 40
            and (words[0] in _QUESTION_WORDS or not _QUESTION_WORDS.isdisjoint(words[:6]))
            and not _ABOUT_THE_TEXT.search(question)
            and sum(word in known for word in longer) * 2 >= max(1, len(longer))
        ):
            return question
    return None


def write_questions(
    stage: Stage, passages: Stage, load: Callable[[], Teacher], config: PrepareConfig
) -> None:
    """Let the teacher write questions about sampled passages until there are enough different ones.

    Each pass asks once about each sampled passage: greedily first, then sampled at 0.8.

    Args:
        stage: The stage of questions, see `questions_about`.
        passages: The finished stage of passages.
        load: Loads the teacher; called for each shard that is missing.
        config: The run's settings.

    Raises:
        InputError: The teacher wrote no usable question.
    """
    if stage.done():
        return
    wanted = config.num_synthetic_queries
    removed = removed_rows(passages)
    total = sum(passages.finished().rows) - len(removed)
    places = random.Random(config.seed).sample(range(total), min(total, 8 * wanted))  # noqa: S311
    sample = kept_rows(places, removed)
    size = min(config.queries_per_shard, wanted)
    with stage.lease("all", wait=True):
        seen: set[str] = set()
        rows: list[int] = []
        asked = 0
        table = PassageTable(passages)
        with track("questions", "questions", wanted, stage=stage) as tracker:
            while len(seen) < wanted and asked < PASSES * len(sample):
                turns = range(asked, min(asked + size, PASSES * len(sample)))
                turn = [(number // len(sample), sample[number % len(sample)]) for number in turns]
                if not stage.has(len(rows)):
                    started = time.perf_counter()
                    teacher = load()
                    with stage.noting(len(rows), lambda: teacher.halving.count):  # noqa: B023
                        kept = AnswerLog.of(stage, range(len(rows), len(rows) + 1), config.flush_seconds)
                        answer = functools.partial(answer_prompts, teacher, log=kept)
                        questions = questions_about(turn, table, answer)
                    stage.write(len(rows), questions, time.perf_counter() - started)
                    kept.remove()
                before = len(seen)
                written = stage.table(len(rows)).column("question").to_pylist()
                seen.update(question_key(question) for question in written if question)
                tracker.advance(min(len(seen), wanted) - min(before, wanted))
                rows.append(len(turn))
                asked += len(turn)
        if not seen:
            raise InputError(
                f"the teacher wrote no usable question about {asked:,} passages: use a larger --teacher_model"
            )
        if len(seen) < wanted:
            log.warning("the corpus gave only %s different questions of %s wanted", len(seen), wanted)
        stage.finish(rows, {"asked": asked, "questions": min(len(seen), wanted)})


def questions_about(
    turns: Sequence[tuple[int, int]],
    passages: PassageTable | Sequence[Passage],
    answer: Callable[[Sequence[Prompt]], list[Answer | Rejection]],
) -> pa.Table:
    """Let the teacher write about passages, one question for each turn.

    Args:
        turns: The number of a pass, from 0, and the row of a passage. Later passes are sampled.
        passages: The passages, by row.
        answer: Answers prompts, in order.

    Returns:
        Columns row int64, text, and question, which is null if the text has no usable question.
    """
    prompts = []
    for number, row in turns:
        passage = passages[row]
        temperature = LATER_TEMPERATURE if number else 0.0
        prompts.append(
            question_prompt(f"{number}:{row}", full_text(passage.title, passage.text), temperature)
        )
    answers = answer(prompts)
    texts = [given.text if isinstance(given, Answer) else "" for given in answers]
    return pa.table(
        {
            "row": pa.array([row for _, row in turns], pa.int64()),
            "text": pa.array(texts, pa.large_string()),
            "question": pa.array(
                [as_question(text, prompt.documents[0]) for text, prompt in zip(texts, prompts, strict=True)],
                pa.large_string(),
            ),
        }
    )

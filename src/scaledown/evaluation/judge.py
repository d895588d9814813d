"""A language model as judge: it grades single answers, and decides which of two answers is better.

A reply without a verdict is counted as such; it is never a grade of 0.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import pyarrow as pa

from scaledown.config.evaluate import EvaluateConfig
from scaledown.config.shared import EngineConfig
from scaledown.data.prompts import JUDGE_VERSION, Prompt, judge_prompt, preference_prompt
from scaledown.data.teacher.answer_log import AnswerLog, answer_prompts
from scaledown.data.teacher.api import choose_backend, engine_of, load_teacher, preflight
from scaledown.data.teacher.base import EngineSettings, Rejection, Teacher, TeacherSettings
from scaledown.data.teacher.stage import AnswerMeter, heard_counts, spent_tokens, with_heard
from scaledown.devices.choice import choose_device
from scaledown.devices.gpus import OnDevice
from scaledown.evaluation import questions, systems
from scaledown.models.sources import ModelSource
from scaledown.records import Answer
from scaledown.run.directory import RunDirectory
from scaledown.run.progress import tracked
from scaledown.run.stage import Stage
from scaledown.text import normalized

JUDGED: Final = "judge"
"""The measure from grades of single answers."""
PREFERRED: Final = "preferred"
"""The measure from pairs of answers: 1 if the answer is better than the baseline's, 0.5 for a tie, else 0."""
NEW_TOKENS: Final = 32  # a verdict needs one; some models write a few words around it

_GRADES: Final = {"0": 0.0, "0.0": 0.0, "0.5": 0.5, ".5": 0.5, "1": 1.0, "1.0": 1.0}
_LABELS: Final = {
    "correct": 1.0,
    "partially correct": 0.5,
}  # the prompt's names of the grades; other names are 0
_VERDICT: Final = re.compile(r"\b(partially correct|incorrect|not correct|correct|wrong)\b", re.IGNORECASE)
_LABEL_ALONE: Final = re.compile(
    rf"\W*(?:(?:the )?(?:answer|grade|verdict)\W+(?:is\W+)?)?{_VERDICT.pattern}\W*", re.IGNORECASE
)
_BOTH: Final = re.compile(rf"\W*(0\.5|0|1)\s*:\s*{_VERDICT.pattern}(?!\s*,\s*\d)", re.IGNORECASE)
_GRADE: Final = re.compile(r"-?(?:\d+(?:[.,]\d+)*|\.\d+)")
_LETTER: Final = re.compile(  # the letter alone, or named as better: B in "A better answer is B"
    r"\W*(?:(?:the )?(?:better )?(?:answer|verdict|choice)\W+(?:is\W+)?)?([ABC])"
    r"(?=\W*$|[.,:;)*\n]| is (?:the )?better\b)",
    re.IGNORECASE,
)


def grade(reply: str) -> float | None:
    """Read the grade in a reply.

    A grade is `number: name` as the prompt asks, the only number, or a name alone.

    Args:
        reply: The judge's reply to `judge_prompt`.

    Returns:
        0, 0.5 or 1; None if the reply has no grade, or names of other grades too.
    """
    numbers = set(_GRADE.findall(reply))
    if both := _BOTH.match(reply):
        numbers = {both[1]}
    elif not numbers and (alone := _LABEL_ALONE.fullmatch(reply)):
        return _LABELS.get(alone[1].lower(), 0.0)
    found = _GRADES.get(numbers.pop()) if len(numbers) == 1 else None
    named = {_LABELS.get(name.lower(), 0.0) for name in _VERDICT.findall(reply)}
    return found if named <= {found} else None


def preference(there: str, back: str) -> float | None:
    """Combine two replies about a pair of answers.

    Args:
        there: The reply to the answers in their order.
        back: The reply to the answers in reverse order.

    Returns:
        1 if the first answer is better, 0 if the second is, 0.5 for a tie or if the replies disagree; None if
        one of them has no verdict.
    """
    letters = [found[1].upper() if (found := _LETTER.match(reply)) else "" for reply in (there, back)]
    if "" in letters:
        return None
    return {("A", "B"): 1.0, ("B", "A"): 0.0}.get((letters[0], letters[1]), 0.5)


class Judging(NamedTuple):
    """How the judge is loaded and asked."""

    load: Callable[[int], Teacher]
    """Loads the judge; the argument is the number of tokens spent on it before."""
    device: str
    """`cpu`, `cuda`, `cuda:N` or `mps`."""
    at_once: int
    """Shards whose prompts are sent together."""
    settings: dict[str, Any]
    """Everything that its verdicts depend on."""
    flush_seconds: float
    """Seconds after which replies are written to disk at the latest."""
    prices: tuple[float, float]
    """Prices of a million tokens of prompts, and of replies, to show the cost."""

    @classmethod
    def of(
        cls,
        config: EvaluateConfig,
        source: ModelSource,
        identities: Mapping[str, str],
        machine: Mapping[str, str],
    ) -> "Judging":
        """Create it from the settings of an evaluation.

        Args:
            config: The settings.
            source: The judge; without a location it is behind a server.
            identities: The exact weights of the `judge`, and of its `lora` adapter if it has one.
            machine: Device and dtype of the evaluation.

        Raises:
            MissingExtraError: The engine of the judge is not installed.
            ModelError: The server or the model cannot be reached, or the engine cannot run the model.
            UsageError: The engine does not support one of the settings.
        """
        device = choose_device(config.device)
        size = EngineConfig.batch_for("teacher_batch_size", config.teacher_batch_size, device)
        generation = TeacherSettings(
            NEW_TOKENS,
            batch_size=size,
            load_in_8bit=config.teacher_8bit,
            load_in_4bit=config.teacher_4bit,
            context=config.teacher_context,
            if_cut_short=f"a verdict has {NEW_TOKENS}, so take a --judge_model that does not reason",
        )
        engine = EngineSettings.of(config)
        engine = engine._replace(backend=choose_backend(engine, source, device, generation))
        own = engine_of(engine.backend)
        settings = {
            "judge": identities["judge"],
            "lora": identities.get("lora"),
            "backend": engine.backend,
            "prompts": JUDGE_VERSION,
            "bits": generation.bits,
            "context": config.teacher_context,
            "max_new_tokens": NEW_TOKENS,
            "batch_size": size if own.deterministic else None,
            "machine": None if own.served else machine,
        }
        preflight(engine, source, device, generation)
        dtype = own.dtype(config.dtype, machine["dtype"].removeprefix("torch."))
        load = functools.partial(load_teacher, source, device, dtype, generation, engine)
        prices = (config.input_price, config.output_price)
        return cls(load, device, own.shards_at_once, settings, config.flush_seconds, prices)


def judge(
    run: RunDirectory, asked: Stage, answers: Mapping[str, Stage], against: str | None, judging: Judging
) -> dict[str, dict[str, Stage]]:
    """Grade the answers of each system, and compare them with those of the system `against`.

    Args:
        run: The run directory of the evaluation.
        asked: The finished stage of questions.
        answers: The finished stage of answers, by system.
        against: The system to compare with; None for grades alone.
        judging: The judge.

    Returns:
        The finished stages of verdicts, by system and measure.
    """
    found: dict[str, dict[str, Stage]] = {}
    for system, own in answers.items():
        settings = {"answers": own.fingerprint, **judging.settings}
        found[system] = {JUDGED: Stage(run, f"judged_{system}", settings)}
        if against and system != against:
            pair = {"others": answers[against].fingerprint, **settings}
            found[system][PREFERRED] = Stage(run, f"preferred_{system}", pair)
    every = [stage for own in found.values() for stage in own.values()]
    teacher = OnDevice("the judge", judging.device, lambda: judging.load(sum(map(spent_tokens, every))))
    for system, stages in found.items():
        _judge(stages[JUDGED], asked, _grading(asked, answers[system]), teacher, judging)
        if against and PREFERRED in stages:
            pairs = _comparing(asked, answers[system], answers[against])
            _judge(stages[PREFERRED], asked, pairs, teacher, judging)
    teacher.release()
    return found


class _Inquiry(NamedTuple):
    """The prompts for the judge, and how a verdict follows from its replies."""

    replies: int
    """Number of replies to a question that needs the judge."""
    prompts: Callable[[int], list[list[Prompt]]]
    """Returns the prompts of each question of a shard; none if the verdict needs no judge."""
    verdict: Callable[[Sequence[str]], float | None]
    """Returns the verdict from the replies to a question."""


def _grading(asked: Stage, answers: Stage) -> _Inquiry:
    """Grade answers. An empty answer has grade 0."""

    def prompts(shard: int) -> list[list[Prompt]]:
        pairs = zip(questions.read_questions(asked, shard), systems.read_answers(answers, shard), strict=True)
        return [
            [judge_prompt(f"{shard}:{row}", question.query, question.right, answer)] if answer else []
            for row, (question, answer) in enumerate(pairs)
        ]

    return _Inquiry(1, prompts, lambda replies: grade(*replies) if replies else 0.0)


def _comparing(asked: Stage, answers: Stage, others: Stage) -> _Inquiry:
    """Compare the answers of two systems. Equal answers are a tie."""

    def prompts(shard: int) -> list[list[Prompt]]:
        own, other = systems.read_answers(answers, shard), systems.read_answers(others, shard)
        found: list[list[Prompt]] = []
        for row, (question, *both) in enumerate(
            zip(questions.read_questions(asked, shard), own, other, strict=True)
        ):
            there, back = (
                preference_prompt(f"{shard}:{row}:{way}", question.query, question.right, *pair)
                for way, pair in (("there", both), ("back", both[::-1]))
            )
            found.append([] if normalized(both[0]) == normalized(both[1]) else [there, back])
        return found

    return _Inquiry(2, prompts, lambda replies: preference(*replies) if replies else 0.5)


def _judge(
    stage: Stage, asked: Stage, inquiry: _Inquiry, load: Callable[[], Teacher], judging: Judging
) -> None:
    """Ask the judge about each shard of questions. Replies are logged as they arrive; verdicts are kept."""
    if stage.done():
        return
    rows = asked.finished().rows
    with tracked(stage, stage.name, "replies", rows, inquiry.replies) as tracker:
        meter = AnswerMeter(tracker, judging.prices)

        def work(group: range) -> Iterator[pa.Table]:
            wanted = [inquiry.prompts(shard) for shard in group]
            prompts = [prompt for shard in wanted for own in shard for prompt in own]
            log = AnswerLog.of(stage, group, judging.flush_seconds)
            others = AnswerLog.others(stage, group, prompts)
            new = len(prompts) - len(log.read(prompts).keys() | others.keys())
            tracker.skip(sum(map(len, wanted)) * inquiry.replies - new)
            replies: Iterator[Answer | Rejection] = iter(())
            if prompts:
                teacher = load()
                with stage.noting(group.start, lambda: teacher.halving.count):
                    replies = iter(answer_prompts(teacher, prompts, log, meter.add, others))
            for shard, lists in zip(group, wanted, strict=True):
                given = [[next(replies) for _ in own] for own in lists]
                yield _verdicts_of_shard(stage, shard, given, inquiry.verdict)
            log.remove()

        stage.complete_together(len(rows), judging.at_once, work)
    for left in AnswerLog.every(stage):  # logs of groups whose shards were made one by one later
        left.remove()
    without = sum(stage.table(shard).column("verdict").null_count for shard in range(len(rows)))
    counts = {"verdicts": sum(rows) - without, "no_verdict": without}
    stage.finish(rows, counts | heard_counts(stage, len(rows)))


def _verdicts_of_shard(
    stage: Stage,
    shard: int,
    given: Sequence[Sequence[Answer | Rejection]],
    verdict: Callable[[Sequence[str]], float | None],
) -> pa.Table:
    rejected, verdicts, texts, tokens = [], [], [], []
    for row, replies in enumerate(given):
        refused = [reply.reason for reply in replies if isinstance(reply, Rejection)]
        answers = [reply for reply in replies if isinstance(reply, Answer)]
        rejected += [{"question": f"{shard}:{row}", "reason": reason} for reason in refused]
        texts.append([answer.text for answer in answers])
        verdicts.append(None if refused else verdict(texts[-1]))
        tokens.append(
            (sum(answer.prompt_tokens for answer in answers), sum(answer.answer_tokens for answer in answers))
        )
    stage.quarantine(f"{shard:06d}", rejected)
    table = pa.table(
        {
            "verdict": pa.array(verdicts, pa.float64()),
            "replies": pa.array(texts, pa.list_(pa.large_string())),
            "prompt_tokens": pa.array([prompt for prompt, _ in tokens], pa.int64()),
            "answer_tokens": pa.array([answer for _, answer in tokens], pa.int64()),
        }
    )
    return with_heard(table, (reply for own in given for reply in own if isinstance(reply, Answer)))


def read_verdicts(stage: Stage, shard: int) -> list[float | None]:
    """Return the verdicts of one shard.

    Args:
        stage: A finished stage of verdicts.
        shard: The number of the shard.

    Returns:
        A verdict from 0 to 1 for each question; None for replies without a verdict.
    """
    verdicts: list[float | None] = stage.table(shard).column("verdict").to_pylist()
    return verdicts

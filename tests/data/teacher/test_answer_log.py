"""Answers are found again however the shards were grouped when they were given."""

from pathlib import Path

import pytest

from scaledown.data.prompts import Prompt
from scaledown.data.teacher.answer_log import AnswerLog
from scaledown.records import Answer
from scaledown.run.directory import RunDirectory
from scaledown.run.stage import Stage


def prompt(number: int) -> Prompt:
    return Prompt(f"q{number}", f"query {number}", "before", (), "after")


def answer(number: int) -> Answer:
    return Answer(f"answer {number}", "stop", 1, 1, 0)


def log_of(stage: Stage, shards: range, answers: dict[int, int]) -> None:
    """A log of these shards, two prompts each, that has an answer at these places."""
    with AnswerLog.of(stage, shards, 60).writing() as writer:
        for place, number in answers.items():
            writer.add(place, prompt(number), answer(number))


@pytest.mark.parametrize(
    ("logged", "asked", "found"),
    [
        (range(4), range(1, 2), {0: 2, 1: 3}),  # each alone, after they died together
        (range(1, 2), range(4), {2: 2, 3: 3}),  # together, after one was asked alone
        (range(2, 6), range(4), {4: 4, 5: 5}),  # in groups that begin elsewhere
        (range(4, 6), range(4), {}),
    ],
)
def test_other_groups(logged: range, asked: range, found: dict[int, int], tmp_path: Path) -> None:
    stage = Stage(RunDirectory(tmp_path / "run"), "answers", {})
    first = 2 * logged.start
    log_of(stage, logged, {place: first + place for place in range(2 * len(logged))})
    prompts = [prompt(number) for number in range(2 * asked.start, 2 * asked.stop)]
    others = AnswerLog.others(stage, asked, prompts)
    assert {place: others[place].text for place in found} == {p: f"answer {n}" for p, n in found.items()}
    assert len(others) == len(
        set(range(2 * asked.start, 2 * asked.stop)) & set(range(first, 2 * logged.stop))
    )
    assert AnswerLog.of(stage, asked, 60).read(prompts) == {}


def test_invalid_answer_log_is_ignored(tmp_path: Path) -> None:
    stage = Stage(RunDirectory(tmp_path / "run"), "answers", {})
    for name in ("evil.part.jsonl", "1.part.jsonl", "000000-x.part.jsonl"):
        (stage.folder / name).write_text('["hostile"]\n')
    assert AnswerLog.every(stage) == []
    assert AnswerLog.others(stage, range(4), [prompt(0)]) == {}

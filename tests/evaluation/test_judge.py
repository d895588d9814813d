"""What a judge says, read strictly."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from scaledown.data.prompts import judge_prompt, preference_prompt
from scaledown.data.teacher.answer_log import AnswerLog
from scaledown.evaluation import judge
from scaledown.evaluation.judge import grade, preference
from scaledown.records import Answer
from scaledown.run.directory import RunDirectory
from scaledown.run.stage import Stage


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("1", 1),
        ("0", 0),
        ("0.5", 0.5),
        ("Grade: 1.0.", 1),
        ("**0.5** (partially correct)", 0.5),
        ("1\n1", 1),
        ("1: Correct", 1),
        ("0.5: Partially correct.", 0.5),
        ("{0: Wrong}", 0),
        (" Correct.", 1),
        ("**Partially correct**", 0.5),
        ("wrong", 0),
        ("Not correct", 0),
        ("1: Incorrect", None),
        ("1: not correct", None),
        ("1: Correct. Released in 1994", 1),
        ("0: wrong, it was 1994.", 0),
        ("Correct!", 1),
        ("(Partially correct)", 0.5),
        ("Answer: wrong", 0),
        ("0: Correct", None),
        ("1: Wrong", None),
        ("0. It is not correct.", 0),
        ("1. The generated answer is correct", 1),
        ("0, since it is incorrect", 0),
        ("0.5: partially correct", 0.5),
        ("1: Correct, 0.5: Partially correct, 0: Wrong.", None),
        ("The answer is right.", None),
        ("", None),
        ("2", None),
        ("-1", None),
        ("10", None),
        ("0.55", None),
        ("1 or 0", None),
        ("0.5/1", None),
        ("In 1402 it was built: 1", None),
    ],
)
def test_grades(reply: str, expected: float | None) -> None:
    assert grade(reply) == expected


@pytest.mark.parametrize(
    ("there", "back", "expected"),
    [
        ("A", "B", 1),
        ("B", "A", 0),
        ("A", "A", 0.5),  # the place decided, not the answer
        ("C", "B", 0.5),
        ("Answer A is better", "**b**", 1),
        ("Better answer: A.", "B", 1),
        ("A", "both are fine", None),
        ("A better answer is B.", "B", None),
        ("The better answer is A", "B)", 1),
        ("", "B", None),
        ("A's fine", "B", None),
    ],
)
def test_preferences(there: str, back: str, expected: float | None) -> None:
    assert preference(there, back) == expected


def test_the_judge_is_shown_question_golden_and_generated_answer() -> None:
    prompt = judge_prompt("1", "Who {answer}?", ["Ada", "Countess"], "It was {question}")
    asks, question, golden, generated = prompt.user([]).splitlines()
    assert asks.endswith("Simply answer with one of 1: correct, 0.5: partially correct, 0: wrong.")
    assert question == "Question: Who {answer}?."
    assert golden == "Golden answer: Ada or Countess."
    assert generated == "Generated answer: It was {question}."
    for grade_and_label in ("1: Correct", "0.5: Partially correct", "0: wrong"):
        assert grade_and_label in prompt.system
        assert grade(grade_and_label) == float(grade_and_label.partition(":")[0])
    both = preference_prompt("1", "Who?", ["Ada"], "one", "other")
    assert "Answer A: one\nAnswer B: other" in both.user([])


def test_replies_to_shards_that_were_asked_together_are_not_paid_again(tmp_path: Path) -> None:
    """A process died of them; then each shard is asked alone."""
    run = RunDirectory(tmp_path / "run")
    asked, stage = Stage(run, "questions", {}), Stage(run, "judged_compressed", {})
    prompts = [judge_prompt(f"{shard}:0", "Who?", ["Ada"], f"answer {shard}") for shard in range(3)]
    for shard in range(3):
        asked.write(shard, pa.table({"n": [shard]}))
    asked.finish([1, 1, 1], {})
    with AnswerLog.of(stage, range(3), 60).writing() as writer:
        for place, prompt in enumerate(prompts):
            writer.add(place, prompt, Answer(("1", "0", "0.5")[place], "stop", 1, 1, 0, None, place, "other"))
    with pytest.raises(MemoryError), run.leases.hold(f"judged_compressed-{stage.fingerprint}-000000-000003"):
        raise MemoryError
    run.leases.died(run.leases.held()[0].worker, "SIGKILL")

    def answers(own: list[Any], known: frozenset[int]) -> list[Any]:
        assert known == frozenset(range(len(own))), "nothing is asked"
        return []

    teacher: Any = SimpleNamespace(answers=answers, halving=SimpleNamespace(count=0))
    inquiry = judge._Inquiry(1, lambda shard: [[prompts[shard]]], lambda replies: grade(*replies))
    judge._judge(
        stage, asked, inquiry, lambda: teacher, judge.Judging(lambda _: teacher, "cpu", 3, {}, 60.0, (0, 0))
    )
    assert [judge.read_verdicts(stage, shard) for shard in range(3)] == [[1.0], [0.0], [0.5]]
    assert AnswerLog.every(stage) == []
    assert stage.finished().counts == {
        **{"verdicts": 3, "no_verdict": 0},
        **{"freed_of_thoughts": 2, "by other": 3},
    }

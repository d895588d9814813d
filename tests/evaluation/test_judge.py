"""What a judge says, read strictly."""

import pytest

from scaledown.data.prompts import judge_prompt, preference_prompt
from scaledown.evaluation.judge import grade, preference


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
        ("Not correct", None),
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

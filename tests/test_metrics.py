import pytest

from scaledown.metrics import accuracy, f1, normalized


def test_normalized() -> None:
    assert normalized("  The Answer, an 'Apple'!\n") == "answer apple"


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("It was in Paris, France.", ["the Paris"], 1),
        ("It was in Rome.", ["Paris", "rome"], 1),
        ("It was in Rome.", ["Paris"], 0),
        ("", ["Paris"], 0),
        ("Paris", [], 0),
        ("Paris", ["A", "the"], 0),
    ],
)
def test_accuracy(answer: str, right: list[str], expected: float) -> None:
    assert accuracy(answer, right) == expected


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("Paris", ["Paris"], 1),
        ("in Paris now", ["Paris"], 0.5),
        ("red red blue", ["red blue blue"], 2 / 3),
        ("in Paris now", ["Rome", "Paris now"], 0.8),
        ("Rome", ["Paris"], 0),
        ("the", ["a"], 1),
        ("", ["Paris"], 0),
        ("Paris", [], 0),
    ],
)
def test_f1(answer: str, right: list[str], expected: float) -> None:
    assert f1(answer, right) == pytest.approx(expected)

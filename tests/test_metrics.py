import random
import string
from collections.abc import Iterator

import pytest

from scaledown.metrics import accuracy, exact_match, f1, has_answer, rouge_l
from scaledown.text import normalized


def test_normalized_removes_case_punctuation_and_articles() -> None:
    assert normalized("  The Answer, an 'Apple'!\n") == "answer apple"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("U.S.A.", "usa"),  # punctuation goes before articles, so that these are whole words
        ("a-b", "ab"),
        ("A. b", "b"),
        ("the,cat", "thecat"),
        ("An apple\u2014the one", "apple\u2014 one"),  # only ASCII punctuation
        ("the\u00a0end", "end"),
        ("", ""),
        ("It is -5.", "it is \u22125"),  # a sign is no punctuation
        ("\u22125 and \u20135 (-5)", "\u22125 and \u22125 \u22125"),
        ("1914-1918, 1914\u20131918", "19141918 19141918"),
        ("Jose\u0301", "jos\u00e9"),
        ("O\u2019Neill\u2019s \u201cX\u201d", "oneills x"),
        ("\uff21\uff22\uff11\uff01\u3000\uff08\u6771\u4eac\u3002\uff09", "ab1 \u6771\u4eac"),
        ("Stra\u00dfe", "strasse"),
        ("10\u00b2, 5\u00bd, x\u00b2", "10 2 5 12 x2"),  # a raised digit makes no other number
    ],
)
def test_normalization_is_in_the_order_of_squad(text: str, expected: str) -> None:
    assert normalized(text) == expected


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("The Denver Broncos!", ["Denver Broncos"], 1),
        ("Denver", ["Denver Broncos", "denver"], 1),
        ("Denver Broncos won", ["Denver Broncos"], 0),
        ("", ["the"], 1),
        ("Denver", [], 0),
    ],
)
def test_exact_match(answer: str, right: list[str], expected: float) -> None:
    assert exact_match(answer, right) == expected


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        # Lin 2004, section 3.1: both share three of four words in order, against two.
        ("police kill the gunman", ["police killed the gunman"], 0.75),
        ("the gunman kill police", ["police killed the gunman"], 0.5),
        ("the gunman police killed", ["police killed the gunman"], 0.5),
        # section 3.2
        ("a b c", ["x", "a c"], 0.8),
        ("snake_case", ["snake case"], 1),
        ("Tschüss, Größe!", ["größe tschüss"], 0.5),
        ("", ["a"], 0),
        ("a", [""], 0),
        ("a", [], 0),
    ],
)
def test_rouge_l(answer: str, right: list[str], expected: float) -> None:
    assert rouge_l(answer, right) == pytest.approx(expected)


def pairs() -> Iterator[tuple[str, list[str]]]:
    """A thousand short answers with articles, punctuation and cases, each with one to four right answers."""
    draw = random.Random(0)
    words = ["a", "an", "The", "the", "cat", "Cat,", "sat-on", "don't", "U.S.", "3.5", "it's", "mat.", "_x_"]

    def text() -> str:
        chosen = [draw.choice(words) for _ in range(draw.randrange(9))]
        return draw.choice([" ", "  ", "\n"]).join(chosen) + draw.choice(["", *string.punctuation])

    for _ in range(1000):
        yield text(), [text() for _ in range(draw.randint(1, 4))]


def test_em_and_f1_equal_torchmetrics_on_a_thousand_pairs() -> None:
    from torchmetrics.functional.text import squad

    for answer, right in pairs():
        reference = [{"answers": {"answer_start": [0] * len(right), "text": right}, "id": "1"}]
        theirs = squad([{"prediction_text": answer, "id": "1"}], reference)
        assert exact_match(answer, right) == pytest.approx(float(theirs["exact_match"]) / 100)
        assert f1(answer, right) == pytest.approx(float(theirs["f1"]) / 100, abs=1e-6)


def test_rouge_l_equals_rouge_score_on_a_thousand_pairs() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    for answer, right in pairs():
        theirs = scorer.score_multi(right, answer)["rougeL"].fmeasure
        assert rouge_l(answer, right) == pytest.approx(theirs)


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
        ("-5", ["5"], 0),
        ("caf\u00e9", ["cafe\u0301"], 1),
        ("\u6771\u4eac\u90fd\u3002", ["\u6771\u4eac"], 0.8),  # by characters
        ("\u0e01\u0e23\u0e38\u0e07", ["\u0e01\u0e23"], 2 / 3),
    ],
)
def test_f1(answer: str, right: list[str], expected: float) -> None:
    assert f1(answer, right) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("document", "right", "expected"),
    [
        ("Tower\nPainted by Ada, in 1889.", ["ADA"], True),
        ("Painted by Adam.", ["Ada"], False),  # whole words
        ("The iron, tower", ["iron tower", "x"], True),
        ("anything", ["the", ""], False),  # nothing is left of them
        ("", ["Ada"], False),
        ("Ada", [], False),
        ("\u90fd\u5e02\u6771\u4eac\u3067\u3059", ["\u6771\u4eac"], True),  # no spaces between words
        ("It is -5.", ["5"], False),
    ],
)
def test_has_answer_finds_whole_words_only(document: str, right: list[str], expected: bool) -> None:
    assert has_answer(document, right) is expected

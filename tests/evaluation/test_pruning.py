"""Pruning keeps the best sentences in reading order, within the budget."""

import pytest

from scaledown.evaluation.pruning import Sentence, TokenCodec, keep_best, split_sentences

# A token a word.
WORDS = TokenCodec(lambda text: [hash(word) for word in text.split()], lambda ids: " ".join("w" for _ in ids))


def test_documents_are_split_into_sentences_beneath_their_title() -> None:
    found = split_sentences(["Tides\nThe moon pulls. Dr. Ada said so!\nAnd more", "no title", ""])
    assert found == [
        Sentence(0, "Tides", "The moon pulls."),
        Sentence(0, "Tides", "Dr. Ada said so!"),
        Sentence(0, "Tides", "And more"),
        Sentence(1, "", "no title"),
    ]


SENTENCES = [
    Sentence(0, "", "one two three."),
    Sentence(0, "", "four five."),
    Sentence(1, "", "six seven eight nine."),
    Sentence(1, "", "ten."),
]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (10, ["one two three. four five.", "six seven eight nine. ten."]),
        (6, ["four five.", "six seven eight nine."]),  # the best, then the next that fits
        (5, ["six seven eight nine. ten."]),
        (4, ["six seven eight nine."]),
        (3, ["four five.", "ten."]),  # the best does not fit, others do
        (0, []),
    ],
)
def test_best_sentences_that_fit_are_kept_in_order(budget: int, expected: list[str]) -> None:
    kept = keep_best(SENTENCES, [0.1, 0.5, 0.9, 0.3], budget, WORDS)
    assert kept == expected
    assert sum(len(text.split()) for text in kept) <= budget


def test_best_sentence_is_cut_if_none_fits() -> None:
    letters = TokenCodec(lambda text: [ord(c) for c in text], lambda ids: "".join(map(chr, ids)))
    assert keep_best([Sentence(0, "", "abcdef"), Sentence(0, "", "ghijkl")], [0.0, 1.0], 4, letters) == [
        "ghij"
    ]
    assert keep_best([], [], 4, letters) == []

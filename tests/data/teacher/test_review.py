import pytest

from scaledown.data.teacher.review import (
    answer_problem,
    groundedness,
    review_answer,
    sentences,
    whole_sentences,
)

QUERY = "When was the bridge over the Vltava finished?"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("In 1402.", ""),
        ("", "empty"),
        (" \n", "empty"),
        ("I'm sorry, but I cannot help with that.", "refusal"),
        ("The provided documents do not mention when it was finished.", "refusal"),
        ("There is no information about the bridge.", "refusal"),
        ("Not mentioned in the text.", "refusal"),
        ("I know that it was 1402.", ""),
        ("Sorry", "refusal"),
        ("Unfortunately, the king died before 1402.", ""),
        ("Unfortunately, there is no mention of it.", "refusal"),
        ("When was the bridge over the Vltava finished? In 1402.", ""),  # it says something, too
        ("I\u2019m sorry, but I can\u2019t say.", "refusal"),
        ("when was bridge over the Vltava finished", "echo"),
        ("In 1402.\n\nQuestion: When was the bridge", "echo"),
        ("The question: it was 1402.", ""),
    ],
)
def test_answers_that_teach_nothing_are_found(text: str, expected: str) -> None:
    assert answer_problem(text, QUERY) == expected


def test_a_short_question_may_begin_its_answer() -> None:
    assert answer_problem("Who wrote it is unknown: the author signed as M.", "Who wrote it") == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It was built. Then it fell because", "It was built."),
        ('He said "stop." and then', 'He said "stop."'),
        ("It cost 3.5 million", "It cost 3.5 million"),
        ("no end at all", "no end at all"),
        ("Done!", "Done!"),
        ("それは橋です。そして", "それは橋です。"),
        ("It was designed by Dr. Peter", "It was designed by Dr. Peter"),
        ("It was built. George W. Bush who", "It was built."),
        ("He lives on St. John in", "He lives on St. John in"),
    ],
)
def test_a_truncated_answer_ends_with_a_sentence(text: str, expected: str) -> None:
    assert whole_sentences(text) == expected


def test_a_text_in_sentences() -> None:
    assert sentences("It fell. Dr. Ada saw it!\nA heading\n\n橋です。そして 3.5") == [
        *("It fell.", "Dr. Ada saw it!", "A heading", "橋です。", "そして 3.5")
    ]
    assert sentences(" \n") == []


def test_only_a_truncated_answer_is_cut() -> None:
    text = "It was built. Then it fell because"
    assert review_answer(text, "stop", QUERY, [], cut=True).text == text
    assert review_answer(text, "length", QUERY, [], cut=False).text == text
    assert review_answer(text, "length", QUERY, [], cut=True).text == "It was built."


def test_groundedness_is_the_share_of_content_words_that_the_documents_have() -> None:
    documents = ["Charles Bridge\nThe bridge was finished in 1402.", "It crosses the Vltava."]
    assert groundedness("The bridge was finished in 1402", documents) == 1
    assert groundedness("The bridge was finished in 1357", documents) == pytest.approx(2 / 3)
    assert groundedness("purple elephants", documents) == 0
    assert groundedness("Yes", documents) == 1  # no content word: nothing to doubt
    assert groundedness("橋", ["橋の歴史"]) == 1
    assert groundedness("bridge", []) == 0


def test_an_answer_may_begin_with_its_question() -> None:
    query = "average salary of a nurse in texas"
    assert answer_problem("The average salary of a nurse in Texas is $70,000.", query) == ""
    assert answer_problem("The average salary of a nurse in Texas.", query) == "echo"

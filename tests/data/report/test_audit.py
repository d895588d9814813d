"""The audit counts what is there: checked on files where every count is known."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scaledown.data.input.gold import Gold
from scaledown.data.report import audit as room
from scaledown.data.report.audit import audit, marked, recall_by_depth
from scaledown.errors import InputError
from scaledown.report.page import MarkedText
from scaledown.text import question_key

Write = Callable[..., Path]

SOUND = {"query": "Who was Ada?", "documents": ["Ada was a countess.", "Bees."], "answer": "A countess."}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(*records: Any) -> Path:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return make


def gold(**answers: str) -> Gold:
    return Gold({question_key(query.replace("_", " ")): (answer,) for query, answer in answers.items()})


def test_counts(write: Write) -> None:
    found = audit(
        write(
            SOUND,
            SOUND | {"query": "who was ada"},
            SOUND | {"answer": "I'm sorry, I cannot answer."},
            SOUND | {"answer": "Xylophones quickly jump."},
            SOUND | {"answer": "Background: it"},
            SOUND | {"finish_reason": "length"},
            SOUND | {"documents": ["Bees.", "Bees."]},
            SOUND | {"answer": " "},
            {"query": "no documents"},
        )
    )
    assert (found.records, found.bad, found.sampled) == (8, 1, 8)
    assert found.messages == ["line 9: has no answer"]
    assert found.repeated_queries == 7
    assert found.documents == 16
    assert found.different_documents == 2
    assert found.tags == {
        "empty": 1,
        "refusal": 1,
        "ungrounded": 4,
        "echo": 1,
        "truncated": 1,
        "document twice": 1,
    }
    assert [(one.queries, one.text) for one in found.frequent] == [(8, "Bees."), (7, "Ada was a countess.")]
    assert found.finish_known


def test_place_of_the_answer_in_the_documents(write: Write) -> None:
    records = [SOUND, SOUND | {"query": "Who?", "documents": ["Bees.", "Ada was a countess."]}]
    lost = SOUND | {"query": "Why?", "documents": ["Bees."], "answer": "Because."}
    found = audit(write(*records, lost), gold(who_was_ada="countess", who="Countess", why="honey"))
    assert found.gold_places == [1, 2, 0]
    assert found.answer_places == [1, 2, 0]
    assert recall_by_depth(found.gold_places, 2) == pytest.approx([1 / 3, 2 / 3])
    assert found.tags["right"] == 2
    assert found.tags["wrong"] == 1
    assert found.tags["right answer in no document"] == 1


def test_lengths_and_scores(write: Write) -> None:
    records = [SOUND | {"query": "w " * n, "reranking_scores": [n, -n]} for n in range(1, 101)]
    found = audit(write(*records))
    queries = found.spreads[0]
    assert (queries.least, queries.median, queries.most) == (1, 50.5, 100)
    assert sum(queries.counts) == 99, "up to the 99th percentile"
    assert [sum(scores) for scores in found.scores] == [5050.0, -5050.0]


def test_a_large_file_is_sampled_and_counted_whole(write: Write) -> None:
    path = write(*(SOUND | {"query": f"Who was number {n}?"} for n in range(500)))
    found = audit(path, sample=50)
    assert (found.records, found.sampled, found.documents) == (500, 50, 1000)
    assert found.frequent[0].queries == 500
    numbers = [int(one.record["query"].split()[-1].strip("?")) for one in found.shown]
    assert 150 < sum(numbers) / len(numbers) < 350, "from all over the file"
    assert audit(path, sample=50) == found, "the same sample every time"


def test_examples_with_problems_are_shown_first(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "SHOWN_EXAMPLES", 5)
    records = [SOUND | {"query": f"Who was number {n}?"} for n in range(40)]
    records[31] = records[31] | {"answer": "I'm sorry."}
    shown = audit(write(*records)).shown
    assert len(shown) == 5
    assert shown[0].tags[0] == "refusal"
    assert shown[1].tags == ()


def test_documents_with_titles_are_read(write: Write) -> None:
    found = audit(write(SOUND | {"documents": [{"title": "Ada", "text": "A countess."}]}))
    assert found.shown[0].record["documents"] == ["Ada\nA countess."]


def test_nothing_sound_is_an_error(write: Write) -> None:
    with pytest.raises(InputError, match="holds no valid record; `scaledown validate"):
        audit(write({"query": "x"}))


def test_words_without_spaces_are_marked() -> None:
    text = "東京は日本の首都です。"
    assert [part.text for part in marked(text, ["東京"], []) if part.marked] == ["東京"]
    assert [part.text for part in marked(text, [], ["都"]) if part.marked] == ["都"]


def test_a_sample_is_bounded_by_its_size(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_SAMPLE_CHARACTERS", 1_000)
    found = audit(write(*(SOUND | {"query": f"Who was number {n}?"} for n in range(500))))
    assert found.records == 500
    assert 5 <= found.sampled < 25


@pytest.mark.parametrize(
    ("phrases", "words", "expected"),
    [
        (
            ["the Sun"],
            ["sun"],
            [MarkedText("Under ", False), MarkedText("the sun", True), MarkedText(", sunny.", False)],
        ),
        (
            ["Moon"],
            ["sun"],
            [MarkedText("Under the ", False), MarkedText("sun", True), MarkedText(", sunny.", False)],
        ),
        ([""], [], [MarkedText("Under the sun, sunny.", False)]),
        (["(.*"], ["\\w"], [MarkedText("Under the sun, sunny.", False)]),
    ],
)
def test_marking(phrases: list[str], words: list[str], expected: list[MarkedText]) -> None:
    assert marked("Under the sun, sunny.", phrases, words) == expected

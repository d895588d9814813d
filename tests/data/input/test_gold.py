"""Right answers are found in the shapes that data sets come in."""

import bz2
import csv
import gzip
import json
from pathlib import Path

import pytest

from scaledown.data.input.gold import GoldQuestion, gold_questions, read_gold
from scaledown.errors import InputError

SHAPES = {
    "nq_open": ({"question": "who?", "answer": ["a", "b"]}, ("a", "b"), ()),
    "squad": (
        {
            "id": "7",
            "question": "who?",
            "context": "It was a.",
            "answers": {"text": ["a"], "answer_start": [7]},
        },
        ("a",),
        ("It was a.",),
    ),
    "trivia_qa": (
        {
            "question_id": "7",
            "question": "who?",
            "answer": {"value": "a", "aliases": ["a", "b"], "type": "x"},
        },
        ("a", "b"),
        (),
    ),
    "hotpot_qa_hub": (
        {
            "id": "7",
            "question": "who?",
            "answer": "a",
            "context": {"title": ["A"], "sentences": [["It.", "Is."]]},
        },
        ("a",),
        ("It.", "Is."),
    ),
    "numbers": ({"question": "who?", "answer": [1969, True, 2.5]}, ("1969", "yes", "2.5"), ()),
    "hotpot_qa": ({"_id": "7", "question": "who?", "answer": "a"}, ("a",), ()),
    "pop_qa": ({"id": 7, "question": "who?", "possible_answers": '["a", "b"]'}, ("a", "b"), ()),
    "bio_asq": (
        {"id": "7", "body": "who?", "exact_answer": [["a", "b"], ["c"]], "snippets": [{"text": "It is."}]},
        ("a", "b", "c"),
        ("It is.",),
    ),
    "ragas": (
        {"question": "who?", "answer": "what a model said", "ground_truth": "a", "contexts": ["It is a."]},
        ("a",),
        ("It is a.",),
    ),
    "ragas_2": (
        {"user_input": "who?", "response": "x", "reference": "a", "reference_contexts": ["It is a."]},
        ("a",),
        ("It is a.",),
    ),
    "label": ({"question": "who?", "label": "a"}, ("a",), ()),
    "answer_and_label": ({"question": "who?", "answer": "a", "label": 1}, ("a",), ()),
    "mrqa": (
        {"context": "It was a.", "qas": [{"qid": "7", "question": "who?", "answers": ["a", "b"]}]},
        ("a", "b"),
        ("It was a.",),
    ),
    "musique": (
        {
            "paragraphs": [{"title": "T", "paragraph_text": "p"}],
            "question": "who?",
            "answer": "a",
            "answer_aliases": ["b"],
            "answerable": True,
        },
        ("a", "b"),
        (),
    ),
    "musique_unanswerable": ({"question": "who?", "answer": "a", "answerable": False}, (), ()),
    "an_empty_answer_beside_a_label": ({"question": "who?", "answer": None, "label": "a"}, ("a",), ()),
    "an_empty_answer_beside_a_class": ({"question": "who?", "answer": "", "label": 1}, (), ()),
    "an_empty_truth_beside_what_a_model_said": (
        {"question": "who?", "ground_truth": "", "answer": "m"},
        (),
        (),
    ),
    "floats": ({"question": "who?", "answer": [1984.0, 2.5]}, ("1984", "2.5"), ()),
    "asqa": (
        {"ambiguous_question": "who?", "qa_pairs": [{"short_answers": ["a"]}, {"short_answers": ["b"]}]},
        ("a", "b"),
        (),
    ),
    "kilt": ({"id": "7", "input": "who?", "output": [{"answer": "a"}, {"provenance": []}]}, ("a",), ()),
    "ours": (
        {"query": "who?", "documents": ["A\nIt was a.", {"title": "B", "text": "b"}], "answer": "a"},
        ("a",),
        ("A\nIt was a.", "b"),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, tmp_path: Path) -> None:
    record, answers, passages = SHAPES[name]
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(record) + "\n")
    (found,) = gold_questions(str(path), "--gold")
    assert found.query == "who?"
    assert found.answers == answers
    assert found.passages == passages
    assert found.query_id in {"7", ""}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["dev.json", "dev.json.gz", "dev.json.bz2"])
def test_a_json_list_is_read_too(name: str, indent: int | None, tmp_path: Path) -> None:
    squeeze = {".gz": gzip.compress, ".bz2": bz2.compress}.get(name[8:], bytes)
    records = [{"question": "who?", "answer": "a"}, "why?"]
    path = tmp_path / name
    path.write_bytes(squeeze(json.dumps(records, indent=indent).encode()))
    assert [one.query for one in gold_questions(str(path), "--gold")] == ["who?", "why?"]


def test_every_wording_of_a_question_counts(tmp_path: Path) -> None:
    path = tmp_path / "gold.jsonl"
    path.write_text('{"id": 7, "questions": ["Who?", "Who was it?", "???"], "answer": "a"}\n')
    found = list(gold_questions(str(path), "--decontaminate"))
    assert [(one.query_id, one.query, one.answers) for one in found] == [
        ("7", "Who?", ("a",)),
        ("7", "Who was it?", ("a",)),
    ]


def test_rows_of_gold_files_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "gold.jsonl"
    lines = ('{"question": "who?", "answer": "a"}', '{"question": "Who", "answer": "b"}', '{"title": "x"}')
    path.write_text("\n".join((*lines, "no json", '{"question": "why?", "answer": "..."}')))
    counts = {"gold_came_again": 1, "gold_unread": 2, "gold_without_answer": 1}
    assert read_gold([str(path)], "--gold").counts == counts
    (tmp_path / "more.tsv").write_text("Who was it?\t['a']\n")
    (tmp_path / "more.tsv.1").touch()
    counts |= {"gold_passed_over": 1, "gold_guessed": 1}
    assert read_gold([str(tmp_path)], "--gold").counts == counts


SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "T",
            "paragraphs": [
                {
                    "context": "It was a.",
                    "qas": [
                        {"id": "7", "question": "Who?", "answers": [{"text": "a", "answer_start": 7}]},
                        {
                            "id": "8",
                            "question": "Why?",
                            "answers": [],
                            "is_impossible": True,
                            "plausible_answers": [{"text": "a"}],
                        },
                    ],
                }
            ],
        }
    ],
}
TRIVIA_QA = {
    "Data": [
        {
            "Question": "Who?",
            "QuestionId": "7",
            "Answer": {"Value": "a", "Aliases": ["a", "A."], "NormalizedValue": "x"},
        },
        {"Question": "Why?", "QuestionId": "8"},
    ]
}


@pytest.mark.parametrize("indent", [None, 4])
@pytest.mark.parametrize("name", ["dev.json", "dev.jsonl", "dev.txt", "dev"])
@pytest.mark.parametrize(("content", "answers"), [(SQUAD, ("a",)), (TRIVIA_QA, ("a", "A."))])
def test_official_files(content: dict, answers: tuple, name: str, indent: int | None, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(json.dumps(content, indent=indent))
    found = list(gold_questions(str(path), "--gold"))
    assert [(one.query_id, one.query, one.answers) for one in found] == [
        ("7", "Who?", answers),
        ("8", "Why?", ()),
    ]
    assert found[0].passages == (("It was a.",) if content is SQUAD else ())


@pytest.mark.parametrize(
    ("cell", "answers"),
    [
        ("['Goethe', 'J. W. Goethe']", ("Goethe", "J. W. Goethe")),
        ("['Goethe' 'J. W. Goethe']", ("Goethe", "J. W. Goethe")),
        ("['Goethe'\n \"O'Neill\"]", ("Goethe", "O'Neill")),
        ("{'text': array(['a', 'b'], dtype=object), 'answer_start': array([1, 2])}", ("a", "b")),
        ("array(['a', 'b'], dtype=object)", ("a", "b")),
        ("[1984 1990.]", ("1984", "1990")),
        ("('Goethe', 'J. W. Goethe')", ("Goethe", "J. W. Goethe")),
        ("{'b', 'a'}", ("a", "b")),
        ("[np.str_('a (b)'), np.str_('c'), np.int64(7)]", ("a (b)", "c", "7")),
        ("(sic)", ("(sic)",)),
        ("[nan]", ()),
        ("(no answer)", ()),
        ("#N/A", ()),
        ("Na", ("Na",)),
        ("None", ("None",)),
        ("[007 008]", ("[007 008]",)),
        ('["a", "b"]', ("a", "b")),
        ("[sic] a [b]", ("[sic] a [b]",)),
        ("[a, b]", ("[a, b]",)),
        ("1984.0", ("1984",)),
        ("4.0", ("4", "4.0")),
        ("3.14", ("3.14",)),
        *((none, ()) for none in ("[]", "<unk>", "No Answer Present.", "CANNOTANSWER", "...", "nan", "-")),
        ("['<unk>', 'a']", ("a",)),
    ],
)
def test_cell_of_a_table_has_answers_in_many_forms(cell: str, answers: tuple, tmp_path: Path) -> None:
    path = tmp_path / "gold.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["question", "answer"], ["who?", cell]])
    (found,) = gold_questions(str(path), "--gold")
    assert found.answers == answers


def test_all_answers_of_a_question_count_wherever_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = tmp_path / "a.csv", tmp_path / "b.jsonl"
    one.write_text("question,answer\nWho?,a\nwho,b\nWhy?,No Answer Present.\n")
    other.write_text('{"question": "Who?", "answer": ["b", "c"]}\n')
    with caplog.at_level("INFO", logger="scaledown"):
        gold = read_gold([str(one), str(other)], "--gold")
    assert gold.answers("who?") == ("a", "b", "c")
    assert gold.answers("why?") == ()
    assert "a.csv: 2 questions with right answers, 1 without; 1 came again" in caplog.text
    assert "b.jsonl: 1 questions with right answers, 0 without; 1 came again" in caplog.text


def test_questions_that_differ_in_a_sign_are_two(tmp_path: Path) -> None:
    path = tmp_path / "gold.csv"
    path.write_text(
        "question,answer\nWhat is 5?,five\nWhat is -5?,minus five\nWhat is C#?,a\nWhat is C++?,b\n"
    )
    gold = read_gold([str(path)], "--gold")
    asked = ["what is 5", "What is \u22125?", "What is C#", "What is c++"]
    assert [gold.answers(one) for one in asked] == [("five",), ("minus five",), ("a",), ("b",)]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("q.txt", "who is it?\n\nwhy?\n", [("", "who is it?"), ("", "why?")]),
        ("q.tsv", "1\twho?\n2\twhy?\n", [("1", "who?"), ("2", "why?")]),
        ("q.csv", "id,question\n1,who?\n", [("1", "who?")]),
        ("pop.tsv", 'id\tquestion\tpossible_answers\n1\twho?\t"[""a""]"\n', [("1", "who?")]),
    ],
)
def test_text_and_tables(name: str, text: str, expected: list[tuple[str, str]], tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    found = list(gold_questions(str(tmp_path / name), "--gold"))
    assert [(one.query_id, one.query) for one in found] == expected
    assert name != "pop.tsv" or found == [GoldQuestion("1", "who?", ("a",))]


def test_answers_are_found_by_words_not_by_id(tmp_path: Path) -> None:
    path = tmp_path / "gold.jsonl"
    path.write_text('{"id": 3, "question": "Who was  Ada Lovelace?", "answer": ["a countess"]}\n')
    gold = read_gold([str(path)], "--gold")
    assert gold.answers("who was ada lovelace") == ("a countess",)
    assert gold.answers("who was she?") == (), "another set may well have an id 3"


def test_bad_rows_are_logged_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "gold.jsonl"
    path.write_text('{"question": "who?", "answer": "a"}\n{"title": "x"}\nnot json\n')
    with caplog.at_level("WARNING", logger="scaledown"):
        assert len(list(gold_questions(str(path), "--gold"))) == 1
    assert [record.getMessage().split(":")[1] for record in caplog.records] == ["2", "3"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"title": "x"}\n', "no question under .*; the columns are title"),
        ('{"question": "who?"}\n', "has no answers"),
    ],
)
def test_files_that_are_of_no_use(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "gold.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_gold([str(path)], "--gold")

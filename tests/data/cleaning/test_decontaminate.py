"""Evaluation questions and repeated queries are left out, each recorded with its match."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import SHARED
from scaledown import cli
from scaledown.config.shared import CleanConfig
from scaledown.data import prepare_dataset as command
from scaledown.data.cleaning.decontaminate import Cleaner
from scaledown.data.cleaning.near_duplicates import EXACT, Questions
from scaledown.errors import InputError, UsageError
from scaledown.run.stage import Stage
from scaledown.text import question_key, words

QUESTION = "How many points did the Panthers defense surrender?"
LETTERS = "abcdefgh"
QUERIES = st.lists(st.text(LETTERS, min_size=1, max_size=2), min_size=1, max_size=12).map(" ".join)


def written(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def matched(query: str, question: str = QUESTION, least: float = 0.6) -> float | None:
    known = Questions(least)
    known.add([question])
    (found,) = known.find([query])
    return found and found.similarity


# Equal and similar questions


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (QUESTION, "how many points did panthers defense surrender"),
        ("Who ain’t here?", "who aint here"),
        ("Wer gründete Köln?", "WER GRUNDETE  KÖLN"),
        ("Straße", "STRASSE"),
        ("谁写了《红楼梦》？", "谁写了红楼梦"),
        ("ﬁnd № 5", "find no 5"),
        ("Кто написал «Войну и мир»?", "кто написал войну и мир"),
        ("x² + 1", "X2 +1"),
        ("5½ m", "5 1/2 m"),
        ("9/11, 1914-1918", "9-11 1914/1918"),
        ("*Who* wrote 5 *plays*!", "who wrote 5 plays"),
    ],
)
def test_match_ignores_case_punctuation_accents_and_articles(one: str, other: str) -> None:
    assert words(one) == words(other)
    assert matched(one, other, EXACT) == matched(one, other) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *[("What is 5?", f"What is {other}?") for other in ("-5", "√5", "5!", "5%", "$5", "5°", "±5")],
        *[("Is 3 < 4?", f"Is 3 {other} 4?") for other in (">", "=", "≤", "!=", "≠")],
        *[("What is 3 + 4?", f"What is 3 {other} 4?") for other in ("-", "*", "/", "^", "and")],
        ("What is 10²?", "What is 102?"),
        ("Is x>y?", "Is x<y?"),
        ("What is C#?", "What is C++?"),
    ],
)
def test_questions_with_other_numbers_do_not_match(one: str, other: str) -> None:
    assert question_key(one) != question_key(other)
    assert matched(one, other, EXACT) is None


@pytest.mark.parametrize("text", ["???", "the", "😀", "\u200b", "\ud800", " - "])
def test_every_text_has_words(text: str) -> None:
    assert words(text)
    assert matched(text, text, EXACT) == matched(text, text) == 1


@pytest.mark.parametrize(
    ("query", "similarity"),
    [
        ("surrender the Panthers defense did how many points", 1.0),
        ("How many points did the Panthers defense concede?", 0.75),
        ("How many points did the Panthers surrender?", 6 / 7),
        ("How many points did the Broncos defense give up?", None),
        ("How many interceptions did Josh Norman have?", None),
    ],
)
def test_near_match_shares_most_words_in_any_order(query: str, similarity: float | None) -> None:
    assert matched(query) == (similarity and pytest.approx(similarity))


def test_similarity_of_short_questions_other_numbers_and_repeated_words() -> None:
    assert matched("Who founded the city of Rome?", "Who established the city of Rome?") == pytest.approx(
        2 / 3
    )
    assert matched("What is septicemia?", "What is photosynthesis?") is None
    assert matched("who won the super bowl in 2015", "who won the super bowl in 2016") is None
    assert matched("What is -5?", "What is 5?", EXACT) is matched("What is -5?", "What is 5?") is None
    assert matched("What is \u22125?", "what is \u20135", EXACT) == 1
    assert matched("in 1914-1918", "in 1914\u20131918", EXACT) == 1
    assert matched("who sang who are you", "who sang are you") == pytest.approx(4 / 5)
    assert matched("谁在一九九八年写了这本书", "谁在一九九八年买了这本书") == pytest.approx(11 / 13)


@settings(deadline=None, max_examples=50)
@given(QUERIES, st.randoms())
def test_near_match_ignores_order_and_includes_exact_matches(query: str, chance: random.Random) -> None:
    mixed = query.split()
    chance.shuffle(mixed)
    assert matched(" ".join(mixed), query) == 1
    assert matched(query.upper() + "?!", query, EXACT) == matched(query.upper() + "?!", query) == 1


def jaccard(one: str, other: str) -> float:
    """Jaccard similarity by its definition, over words and their occurrences."""
    sets = [
        {(word, found[:place].count(word)) for place, word in enumerate(found)}
        for found in (words(one), words(other))
    ]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@settings(deadline=None, max_examples=50)
@given(st.lists(QUERIES, min_size=1, max_size=20), QUERIES, st.sampled_from([0.6, 0.8]))
def test_best_match_equals_brute_force(known: list[str], query: str, least: float) -> None:
    questions = Questions(least)
    questions.add(known)
    (found,) = questions.find([query])
    best = max(jaccard(query, one) for one in known)
    if best < least:
        assert found is None
    else:
        first = next(number for number, one in enumerate(known) if jaccard(query, one) == best)
        assert found == (first, best)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(QUERIES, max_size=40), st.integers(1, 40), st.sampled_from([EXACT, 0.8]), st.sampled_from([3, 7])
)
def test_duplicates_do_not_depend_on_the_size_of_blocks(
    queries: list[str], size: int, least: float, letters: int
) -> None:
    def found(step: int) -> list:
        questions = Questions(least)
        blocks = (queries[low : low + step] for low in range(0, len(queries), step))
        return [one for block in blocks for one in questions.find_or_add(block)]

    queries = ["".join(c if c in LETTERS[:letters] + " " else "a" for c in query) for query in queries]
    assert found(size) == found(len(queries) or 1)
    kept = [query for query, one in zip(queries, found(size), strict=True) if one is None]
    assert len({" ".join(words(query)) for query in kept}) == len(kept)


# Evaluation questions


def test_match_has_question_file_and_similarity(tmp_path: Path) -> None:
    first = written(tmp_path / "nq.jsonl", [{"question": "who was ada lovelace"}])
    second = written(tmp_path / "dev.jsonl", [{"id": "7", "question": QUESTION}])
    cleaner = Cleaner(CleanConfig(decontaminate=(first, second), deduplicate="near"))
    texts = [
        QUESTION.lower(),
        "Who was Ada?",
        "who was she",
        "Who was the tall Ada Lovelace?",
        "was she who?",
    ]
    exact, _, stays, near, again = cleaner.queries(texts)
    assert stays is None
    assert exact == {
        "reason": "exact match of an evaluation question",
        "problem": "contaminated",
        "match": {"kind": "exact", "question": QUESTION, "similarity": 1.0, "query_id": "7", "file": second},
    }
    assert near["match"]["kind"] == "near"
    assert near["match"]["similarity"] == 0.8
    assert near["match"]["file"] == first
    assert again["problem"] == "duplicate"
    assert again["match"] == {"kind": "near", "question": "who was she", "similarity": 1.0}


PASSAGE = (
    "The Panthers defense gave up just 308 points, ranking sixth in the league, and led it in interceptions."
)


@pytest.mark.parametrize(
    ("answer", "document", "left_out"),
    [
        ("The 308.", PASSAGE, True),
        ("308", f"In 2015: {PASSAGE} They won.", True),
        ("308", "gave up just 308 points, ranking sixth in the league", True),
        ("They gave up 308 points.", f"{PASSAGE[30:]} And so on, over the end of the paragraph.", True),
        ("They gave up 3080 points.", PASSAGE, False),
        ("308", "308 points", False),
        ("308", "The Broncos led the league in sacks and gave up 308 points in all that year.", False),
        ("sixth", PASSAGE, False),
        ("308", "", False),
    ],
)
def test_record_with_answer_and_passage_of_a_question_is_left_out(
    answer: str, document: str, left_out: bool, tmp_path: Path
) -> None:
    row = {"id": "7", "question": QUESTION, "context": PASSAGE, "answers": {"text": ["308"]}}
    file = written(tmp_path / "dev.jsonl", [{"question": "who?", "answer": "308"}, row])
    cleaner = Cleaner(CleanConfig(decontaminate=(file,), decontaminate_answers=True))
    cleaner.check()
    found = cleaner.answer(answer, ["Other text.", document])
    assert bool(found) == left_out
    if found:
        assert found["match"] == {
            **{"kind": "answer", "question": QUESTION, "answer": "308", "query_id": "7", "file": file}
        }
    assert Cleaner(CleanConfig(decontaminate=(file,))).answer(answer, [document]) is None


def test_decontaminate_answers_needs_passages(tmp_path: Path) -> None:
    file = written(tmp_path / "nq.jsonl", [{"question": "who?", "answer": ["a"]}])
    with pytest.raises(InputError, match="--decontaminate_answers: no question .* has both"):
        Cleaner(CleanConfig(decontaminate=(file,), decontaminate_answers=True)).check()


def test_contradicting_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="--decontaminate_answers needs --decontaminate"):
        CleanConfig(decontaminate_answers=True)
    with pytest.raises(UsageError, match="--deduplicate fuzzy: use one of exact, near"):
        CleanConfig(deduplicate="fuzzy")


# In a run


def records(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


def quarantined(work: Path, stage: str) -> list[dict]:
    lines = (
        path.read_text(encoding="utf-8").splitlines()
        for path in sorted((work / "quarantine").glob(f"{stage}-*"))
    )
    return [json.loads(line) for found in lines for line in found]


def test_run_leaves_out_and_reports_evaluation_questions(prepare, queries, tmp_path, capsys) -> None:
    asked = queries.read_text().splitlines()
    queries.write_text("\n".join([*asked, "what is  photosynthesis", "the tower is how tall"]) + "\n")
    evaluation = [{"id": "x", "question": "So what causes tides?"}, {"id": "y", "question": "???"}]
    file = written(tmp_path / "dev.jsonl", evaluation)
    flags = ("--top_k_retrieval", "2", "--decontaminate", file, "--deduplicate", "near")
    assert prepare(*flags, "--strict") == 0
    assert [record["query"] for record in records(prepare.output)] == asked[:3]
    out = capsys.readouterr().out
    assert "3 queries, 1 contaminated, 2 duplicates, 1 evaluation rows unread" in out
    assert "passed over: 1 rows of --decontaminate hold no question" in out
    assert f"left out: 3 queries or answers, each with what it matches, in {prepare.work}" in out
    contaminated, exact, near = quarantined(prepare.work, "queries")
    assert contaminated["query_id"] == "q4"
    assert contaminated["match"] == {
        **{"kind": "near", "question": "So what causes tides?", "similarity": 0.75},
        **{"query_id": "x", "file": file},
    }
    assert (exact["query"], exact["match"]["question"]) == ("what is photosynthesis", asked[0])
    assert (exact["match"]["kind"], near["match"]["kind"]) == ("exact", "near")
    manifest = json.loads((prepare.work / "manifest.json").read_text())
    assert manifest["parameters"]["decontaminate"] == [file]
    assert len(manifest["inputs"]["evaluation"]) == 1
    assert manifest["stages"]["queries"]["counts"]["contaminated"] == 1
    before = prepare.output.read_bytes()
    assert prepare("--config", str(prepare.work / "manifest.json"), inputs=False) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert cli.main(["plan", "--config", str(prepare.work / "manifest.json")]) == 0
    assert prepare.output.read_bytes() == before


def test_changed_evaluation_file_repeats_only_dependent_stages(prepare, tmp_path, monkeypatch) -> None:
    assert prepare("--top_k_retrieval", "2") == 0
    whole = prepare.output.read_bytes()
    file = tmp_path / "dev.jsonl"
    flags = ("--top_k_retrieval", "2", "--decontaminate", str(file))
    written(file, [{"question": "Who wrote it?"}])
    assert prepare(*flags) == 0
    assert len(records(prepare.output)) == 3
    assert len(list((prepare.work / "vectors").iterdir())) == 1
    written(file, [{"question": "Who?"}])  # another content under the same name
    assert prepare(*flags) == 0
    assert len(records(prepare.output)) == 4
    monkeypatch.setattr(
        "scaledown.data.session.teachers.load_teacher", lambda *_: pytest.fail("a model was loaded again")
    )
    monkeypatch.setattr(command, "load_encoder", lambda *_: pytest.fail("a model was loaded again"))
    assert prepare("--top_k_retrieval", "2") == 0
    assert prepare.output.read_bytes() == whole


@pytest.mark.parametrize("crash_at", [0, 1, 2, 5])
def test_run_after_a_crash_has_the_same_output_and_quarantine(
    crash_at: int, prepare, queries, tmp_path, monkeypatch
) -> None:
    queries.write_text("".join(f"{line}\n" * 3 for line in queries.read_text().splitlines()))
    file = written(tmp_path / "dev.jsonl", [{"question": "Who wrote it?"}])
    flags = ("--top_k_retrieval", "2", "--queries_per_shard", "1", "--decontaminate", file)
    flags += ("--deduplicate", "exact")
    whole = tmp_path / "whole.json"
    assert prepare(*flags, "--output_file", str(whole)) == 0
    write, shards = Stage.write, []

    def dying(self, *arguments, **keywords):
        if len(shards) == crash_at:
            raise KeyboardInterrupt
        shards.append(self.name)
        write(self, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "write", dying)
        assert prepare(*flags) == 130
    assert prepare(*flags) == 0
    assert prepare.output.read_bytes() == whole.read_bytes()
    left = quarantined(prepare.work, "queries")
    assert left == quarantined(tmp_path / "whole.json.work", "queries")
    assert len(left) == 9


def test_run_leaves_out_answers_from_evaluation_passages(prepare, tmp_path, monkeypatch, capsys) -> None:
    flags = ("--top_k_retrieval", "2", "--passages", "paragraph")
    assert prepare(*flags) == 0
    first = records(prepare.output)[0]
    passage = first["documents"][0].partition("\n")[2]
    row = {"question": "Is it?", "context": passage, "answer": first["answer"]}
    file = written(tmp_path / "dev.jsonl", [row])
    flags += ("--decontaminate", file)
    assert prepare(*flags) == 0
    assert len(records(prepare.output)) == 4
    for name in ("prepare_dataset.load_encoder", "session.teachers.load_teacher"):
        monkeypatch.setattr(f"scaledown.data.{name}", lambda *_: pytest.fail("a model was loaded again"))
    assert prepare(*flags, "--decontaminate_answers", "--strict") == 0
    kept = [record["query"] for record in records(prepare.output)]
    assert first["query"] not in kept
    assert kept
    assert "1 contaminated" in capsys.readouterr().out
    (left,) = quarantined(prepare.work, "reviewed")
    assert left["match"]["question"] == "Is it?"
    assert left["reason"] == "answer and passage of an evaluation question"


def test_run_without_remaining_queries_is_an_error(prepare, queries, capsys) -> None:
    assert prepare("--decontaminate", str(queries)) == 1
    assert "all 4 queries are left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "there is no such file"),
        ("empty.jsonl", b"", "holds no question"),
        ("binary.jsonl", bytes(range(256)) * 9, "is not text in UTF-8"),
        ("packed.zip", b"PK\x03\x04rest", "is a zip archive"),
        ("cut.jsonl", b"\x1f\x8b\x08\x00", "cut short"),
        ("list.json", b'[{"question": "cut', "holds no question"),
        ("map.json", b'{"Who wrote Emma?": "Jane Austen"}', 'call one question, as in {"question": '),
        ("table.parquet", b"PAR1", "Parquet"),
    ],
)
@pytest.mark.parametrize("where", ["prepare", "plan", "merge"])
def test_unreadable_evaluation_file_is_a_one_line_error_before_any_work(
    where: str, name: str, content: bytes | None, message: str, prepare, tmp_path, capsys, corpus, queries
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    if where == "merge":
        part = tmp_path / "part.json"
        part.write_text(json.dumps([{"query": "q", "documents": ["d"], "answer": "a"}]))
        status = cli.main(
            ["merge", str(part), "--output_file", str(prepare.output), "--decontaminate", str(path)]
        )
    elif where == "plan":
        flags = ["--corpus_path", str(corpus), "--queries_file", str(queries)]
        status = cli.main(
            ["plan", *flags, "--output_file", str(prepare.output), "--decontaminate", str(path)]
        )
    else:
        status = prepare("--decontaminate", str(path))
    assert status == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert name in line
    assert not prepare.output.exists()
    assert not list(prepare.work.glob("passages/*"))


# Finished training files


def example(query: str, answer: str = "a", document: str = "d") -> dict:
    return {"query": query, "documents": [document], "answer": answer}


def test_merge_records_removed_records_with_their_match(tmp_path: Path, capsys) -> None:
    made = [
        *(example("Who wrote Hamlet, the play?"), example("how many points did panthers defense surrender")),
        *(example("Who wrote Hamlet the play"), example("Who wrote Hamlet, the play?"), example("Why?")),
        *(example("When?", "308", f"Panthers\n{PASSAGE}"), example("Where?")),
    ]
    (tmp_path / "part.json").write_text(json.dumps(made))
    row = {"id": "7", "question": QUESTION, "context": PASSAGE, "answers": {"text": ["308"]}}
    file = written(tmp_path / "dev.jsonl", [row])
    output = tmp_path / "clean.json"
    flags = ["--decontaminate", file, "--decontaminate_answers", "--deduplicate", "near"]
    merge = ["merge", str(tmp_path / "part.json"), "--output_file", str(output)]
    assert cli.main([*merge, *flags]) == 0
    assert [record["query"] for record in records(output)] == [made[0]["query"], "Why?", "Where?"]
    removed = tmp_path / "clean.json.removed.jsonl"
    left = [json.loads(line) for line in removed.read_text().splitlines()]
    assert [(one["query"], one["problem"], one["match"]["kind"]) for one in left] == [
        (made[1]["query"], "contaminated", "exact"),
        (made[2]["query"], "duplicate", "exact"),
        (made[3]["query"], "duplicate", "exact"),
        ("When?", "contaminated", "answer"),
    ]
    out = capsys.readouterr().out
    assert "3 records from 1 file, 2 repeated queries left out, 2 records of evaluation sets" in out
    assert str(removed) in out
    before = output.read_bytes(), removed.read_bytes()
    assert cli.main([*merge, *flags]) == 0
    assert (output.read_bytes(), removed.read_bytes()) == before


def test_merge_without_cleaning_flags_writes_no_removed_file(tmp_path: Path) -> None:
    (tmp_path / "part.json").write_text(json.dumps([example("Who?"), example("who?"), example("Who? ")]))
    output = tmp_path / "full.json"
    assert cli.main(["merge", str(tmp_path / "part.json"), "--output_file", str(output)]) == 0
    assert len(records(output)) == 2
    assert not list(tmp_path.glob("*.removed.jsonl"))


def test_merge_refuses_contradicting_flags(tmp_path: Path, capsys) -> None:
    (tmp_path / "part.json").write_text(json.dumps([example("Who?")]))
    merge = ["merge", str(tmp_path / "part.json"), "--output_file", str(tmp_path / "full.json")]
    assert cli.main([*merge, "--decontaminate_answers"]) == 2
    assert "--decontaminate_answers needs --decontaminate" in capsys.readouterr().err
    dev = written(tmp_path / "dev.json", [{"question": "Who?"}])
    assert cli.main([*merge[:-1], dev, "--decontaminate", dev]) == 2
    assert "is also read" in capsys.readouterr().err


# Real questions


@pytest.mark.skipif(not (SHARED / "data").exists(), reason="needs ../shared/data")
def test_real_questions_have_no_false_match() -> None:
    def read(name: str) -> list[str]:
        lines = (SHARED / "data" / name).read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["question"] for line in lines]

    evaluation, others = read("xquad-dev/questions.jsonl"), read("nq-open-dev.jsonl")
    known = Questions(0.6)
    known.add(evaluation)
    assert len(others) == 3610
    hits = [(text, found) for text, found in zip(others, known.find(others), strict=True) if found]
    assert hits == []
    planted = [text.rstrip("?").upper() + " ..." for text in evaluation]
    assert all(found and found.similarity == 1 for found in known.find(planted))

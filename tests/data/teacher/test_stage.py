import json
import os
import time
from pathlib import Path

import pytest

from scaledown.data import prepare_dataset as command
from scaledown.data.prompts import answer_prompt
from scaledown.data.teacher.answer_log import AnswerLog, answer_prompts
from scaledown.data.teacher.base import Rejection
from scaledown.devices.halving import Halving
from scaledown.errors import ModelError
from scaledown.records import Answer
from scaledown.run.storage import Storage

PROMPTS = [answer_prompt(str(n), f"Question {n}?", ["a document"], 0.0) for n in range(5)]


def answer(text: str = "yes") -> Answer:
    return Answer(text, "stop", 10, 2, 0)


def test_answer_log_returns_written_answers(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "log.jsonl", 60, Storage(tmp_path))
    with log.writing() as writer:
        writer.add(3, PROMPTS[3], answer("line\n\u2028 \U0001f600"))
        assert log.read(PROMPTS) == {3: answer("line\n\u2028 \U0001f600")}  # at once, not at the end
    with log.writing() as writer:
        writer.add(0, PROMPTS[0], answer())
    assert log.read(PROMPTS) == {
        3: answer("line\n\u2028 \U0001f600"),
        0: answer(),
    }
    assert log.tokens() == 24


def test_a_line_cut_short_and_foreign_lines_do_not_count(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "log.jsonl", 60, Storage(tmp_path))
    with log.writing() as writer:
        writer.add(0, PROMPTS[0], answer())
        writer.add(1, PROMPTS[1], answer())
    with log.path.open("ab") as file:
        file.write(
            b'[1]\n{"place": 99}\n{"place": 2, "prompt_hash": "other", "text": "x"}\n{"place": 4, "pro'
        )
    with log.writing() as writer:
        writer.add(3, PROMPTS[3], answer("after the crash"))
    assert log.read(PROMPTS) == {0: answer(), 1: answer(), 3: answer("after the crash")}


def test_answers_are_synced_within_the_seconds_given(tmp_path: Path, monkeypatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    log = AnswerLog(tmp_path / "log.jsonl", 0.01, Storage(tmp_path))
    with log.writing() as writer:
        writer.add(0, PROMPTS[0], answer())
        deadline = time.monotonic() + 10
        while not synced and time.monotonic() < deadline:
            time.sleep(0.01)
        assert synced  # while the engine is still at work


class Recorded:
    """Answers "… of document" and remembers what it was asked; dies after `lives` answers."""

    halving = Halving("--teacher_batch_size")

    def __init__(self, lives: int = 10**9) -> None:
        self.asked: list[str] = []
        self.lives = lives

    def answers(self, prompts, have=()):
        for place, prompt in reversed(list(enumerate(prompts))):
            if place in have:
                continue
            if self.lives == 0:
                raise KeyboardInterrupt
            self.lives -= 1
            self.asked.append(prompt.key)
            yield place, self.say(prompt)

    def say(self, prompt):
        return Answer(f"Something of {prompt.documents[0].split()[0]}.", "stop", 100, 5, 0)


@pytest.mark.parametrize("lives", [1, 3])
def test_answered_prompts_are_not_asked_again(lives: int, prepare, monkeypatch, tmp_path) -> None:
    whole = tmp_path / "whole.json"
    monkeypatch.setattr("scaledown.data.session.teachers.load_teacher", lambda *_: Recorded())
    assert prepare("--output_file", str(whole)) == 0
    dying, living = Recorded(lives), Recorded()
    monkeypatch.setattr("scaledown.data.session.teachers.load_teacher", lambda *_: dying)
    assert prepare() == 130
    (log,) = (prepare.work / "answers").glob("*/*.part.jsonl")
    assert len(log.read_text().splitlines()) == lives
    monkeypatch.setattr("scaledown.data.session.teachers.load_teacher", lambda *_: living)
    assert prepare() == 0
    assert not set(dying.asked) & set(living.asked)
    assert prepare.output.read_bytes() == whole.read_bytes()
    assert not log.exists()


def test_tokens_are_counted_and_their_cost_is_shown(prepare, monkeypatch, caplog) -> None:
    monkeypatch.setattr("scaledown.data.session.teachers.load_teacher", lambda *_: Recorded())
    with caplog.at_level("INFO", "scaledown"):
        monkeypatch.setattr("scaledown.command.start_logging", lambda *_: None)
        assert prepare("--input_price", "1000", "--output_price", "2000") == 0
    count = len(json.loads(prepare.output.read_text()))
    stage = json.loads((prepare.work / "manifest.json").read_text())["stages"]["answers"]["counts"]
    assert stage["prompt_tokens"] == 100 * count
    assert stage["answer_tokens"] == 5 * count
    assert f"cost so far {0.11 * count:.2f}" in caplog.text
    assert "tokens/s" in caplog.text


class Difficult(Recorded):
    """Refuses, echoes, says nothing, or stops in the middle; does better when asked again."""

    def say(self, prompt):
        text, reason = "Something of it.", "stop"
        if not prompt.key.endswith(":again"):
            kind = int.from_bytes(prompt.digest.encode(), "little") % 4
            text = ("I cannot answer this.", prompt.after.rpartition("Question: ")[2], "", "Whole. Not who")[
                kind
            ]
            reason = "length" if kind == 3 else "stop"
        return Answer(text, reason, 10, 5, 0)


def kinds(prepare) -> dict[str, int]:
    return json.loads((prepare.work / "manifest.json").read_text())["stages"]["reviewed"]["counts"]


@pytest.fixture
def difficult(prepare, queries, monkeypatch):
    text = "".join(f"what is the long question number {n}\n" for n in range(40))
    queries.write_text(text)
    monkeypatch.setattr("scaledown.data.session.teachers.load_teacher", lambda *_: Difficult())
    return prepare


def test_refusals_and_echoes_are_counted_dropped_or_asked_again(difficult, monkeypatch) -> None:
    columns = ("--columns", "problem", "--columns", "finish_reason")
    assert difficult(*columns) == 0
    found = json.loads(difficult.output.read_text())
    problems = [record["problem"] for record in found]
    assert kinds(difficult)["refusals"] == problems.count("refusal") > 0
    assert kinds(difficult)["echoes"] == problems.count("echo") > 0
    assert {record["answer"] for record in found if record["finish_reason"] == "length"} == {"Whole."}
    empty = 40 - len(found)
    assert kinds(difficult)["rejected"] == empty > 0

    assert difficult(*columns, "--bad_answers", "drop", "--truncated_answers", "keep") == 0
    kept = json.loads(difficult.output.read_text())
    assert {record["problem"] for record in kept} == {""}
    assert {record["answer"] for record in kept} == {"Whole. Not who"}
    reasons = "".join(path.read_text() for path in (difficult.work / "quarantine").glob("reviewed-*"))
    assert "a refusal" in reasons
    assert "an echo of the prompt" in reasons

    # Only those with a problem are asked once more.
    teacher = Difficult()
    monkeypatch.setattr("scaledown.data.session.teachers.load_teacher", lambda *_: teacher)
    assert difficult(*columns, "--bad_answers", "retry") == 0
    again = json.loads(difficult.output.read_text())
    assert len(again) == 40
    assert {record["answer"] for record in again} == {"Whole.", "Something of it."}
    assert len(teacher.asked) == 40 - len(kept)
    assert all(key.endswith(":again") for key in teacher.asked)
    stages = json.loads((difficult.work / "manifest.json").read_text())["stages"]
    assert stages["retried"]["counts"] == {
        "answers": 40,
        "retried": len(teacher.asked),
        "mended": len(teacher.asked),
    }


def test_the_teacher_that_answered_is_asked_again(difficult, monkeypatch) -> None:
    """A second one beside it would not fit on its GPU."""
    loaded: list[Difficult] = []

    def load(*_: object) -> Difficult:
        loaded.append(Difficult())
        return loaded[-1]

    monkeypatch.setattr("scaledown.data.session.teachers.load_teacher", load)
    assert difficult("--bad_answers", "retry") == 0
    (teacher,) = loaded
    assert len({key.endswith(":again") for key in teacher.asked}) == 2


def test_other_limits_ask_nothing_again(difficult, monkeypatch) -> None:
    assert difficult() == 0
    monkeypatch.setattr(
        "scaledown.data.session.teachers.load_teacher", lambda *_: pytest.fail("a model was loaded again")
    )
    assert difficult("--bad_answers", "drop") == 0
    assert difficult("--min_groundedness", "0.01", "--truncated_answers", "keep") == 0


def test_ungrounded_answers_are_dropped_and_reported(prepare, monkeypatch) -> None:
    class Half(Recorded):
        def say(self, prompt):
            text = prompt.documents[0].split()[0] if len(self.asked) % 2 else "Xylophone zebras"
            return Answer(text, "stop", 10, 5, 0)

    monkeypatch.setattr("scaledown.data.session.teachers.load_teacher", lambda *_: Half())
    assert prepare("--columns", "groundedness") == 0
    everything = json.loads(prepare.output.read_text())
    assert {record["groundedness"] for record in everything} == {0.0, 1.0}
    assert prepare("--columns", "groundedness", "--min_groundedness", "0.5") == 0
    assert [r for r in everything if r["groundedness"] == 1] == json.loads(prepare.output.read_text())
    measured = json.loads((prepare.work / "manifest.json").read_text())["stages"]["reviewed"]["measured"]
    assert measured["groundedness"] == 1.0


def test_a_second_teacher_answers_too(prepare, models, capsys) -> None:
    flags = ("--second_teacher_model", str(models["causal_lm"]))
    assert prepare(*flags, "--columns", "second_answer", "--columns", "agreement") == 0
    found = json.loads(prepare.output.read_text())
    assert found
    assert all(record["second_answer"] == record["answer"] for record in found)  # it is the same model
    assert all(record["agreement"] == 1 for record in found)
    assert "agreement 1.0000" in capsys.readouterr().out
    assert prepare() == 0
    assert set(json.loads(prepare.output.read_text())[0]) == {"query", "documents", "answer"}


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
def test_every_column_can_be_written(ending: str, prepare, models, tmp_path) -> None:
    import datasets

    from scaledown.config.prepare import COLUMNS

    output = tmp_path / f"all{ending}"
    flags = [word for name in COLUMNS for word in ("--columns", name)]
    flags += ["--second_teacher_model", str(models["causal_lm"]), "--output_file", str(output)]
    assert prepare(*flags) == 0
    kind = {".parquet": "parquet", ".jsonl": "json"}[ending]
    table = datasets.load_dataset(kind, data_files=str(output), cache_dir=str(tmp_path / "c"), split="train")
    assert set(table.column_names) == {"query", "documents", "answer", *COLUMNS}
    assert table[0]["prompt_tokens"] > 10
    assert len(table[0]["prompt_hash"]) == 16


def test_prompt_and_document_budget_change_the_shown_text(prepare, tmp_path, monkeypatch) -> None:
    assert prepare("--columns", "prompt_tokens") == 0
    whole = [record["prompt_tokens"] for record in json.loads(prepare.output.read_text())]
    assert prepare("--columns", "prompt_tokens", "--teacher_document_tokens", "4") == 0
    short = [record["prompt_tokens"] for record in json.loads(prepare.output.read_text())]
    assert all(a > b for a, b in zip(whole, short, strict=True))
    (tmp_path / "prompt.txt").write_text("{documents}\n\n{question}")
    assert prepare("--prompt", str(tmp_path / "prompt.txt"), "--columns", "prompt_tokens") == 0
    own = [record["prompt_tokens"] for record in json.loads(prepare.output.read_text())]
    assert all(a > b for a, b in zip(whole, own, strict=True))
    (tmp_path / "bad.txt").write_text("no place for anything")
    monkeypatch.setattr(command, "load_encoder", lambda *_: pytest.fail("work began"))
    assert prepare("--prompt", str(tmp_path / "bad.txt"), "--output_file", str(tmp_path / "o.json")) == 2


def test_a_group_with_a_whole_shard_asks_only_for_the_rest(prepare, queries, monkeypatch) -> None:
    """Engines that schedule by themselves get many shards at once; one of these may be written already."""
    from scaledown.run.stage import Stage

    queries.write_text("".join(f"what is question {number}\n" for number in range(10)))
    monkeypatch.setattr("scaledown.data.session.teachers.choose_backend", lambda *_: "vllm")
    monkeypatch.setattr("scaledown.data.session.teachers.preflight", lambda *_: None)
    monkeypatch.setattr(command, "together", lambda _, most: most)  # as of a run of many shards
    first, second = Recorded(), Recorded()
    monkeypatch.setattr("scaledown.data.session.teachers.load_teacher", lambda *_: first)
    write = Stage.write

    def dying(self, shard, *arguments, **keywords):
        if self.name == "answers" and shard == 1:
            raise KeyboardInterrupt
        write(self, shard, *arguments, **keywords)

    small = ("--queries_per_shard", "4")
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "write", dying)
        assert prepare(*small) == 130
    (log,) = (prepare.work / "answers").glob("*/*.part.jsonl")
    assert log.with_name("000000.arrow").exists()
    lines = log.read_text().splitlines(keepends=True)
    lost = [line for line in lines if json.loads(line)["place"] in {0, 9}]
    log.write_text("".join(line for line in lines if line not in lost))
    monkeypatch.setattr("scaledown.data.session.teachers.load_teacher", lambda *_: second)
    assert prepare(*small) == 0
    assert len(first.asked) == 10
    assert len(second.asked) == 1, "the first shard's answers are in its file, the others in the log"
    assert len(json.loads(prepare.output.read_text())) == 10


def test_auto_keeps_the_engine_of_a_run_that_began(prepare, monkeypatch) -> None:
    chosen = []

    def choose(engine, *_):
        chosen.append(engine.backend)
        return "transformers" if engine.backend == "auto" else engine.backend

    monkeypatch.setattr("scaledown.data.session.teachers.choose_backend", choose)
    monkeypatch.setattr("scaledown.data.session.teachers.load_teacher", lambda *_: Recorded(1))
    assert prepare() == 130
    monkeypatch.setattr("scaledown.data.session.teachers.load_teacher", lambda *_: Recorded())
    assert prepare() == 0
    assert chosen == ["auto", "transformers"]


def test_a_second_teacher_that_rejects_loses_no_record(prepare, models, monkeypatch) -> None:
    class Mute(Recorded):
        def answers(self, prompts, have=()):
            for place in range(len(prompts)):
                yield place, Rejection("no")

    teachers = iter([Recorded(), Mute()])
    monkeypatch.setattr("scaledown.data.session.teachers.load_teacher", lambda *_: next(teachers))
    flags = ("--second_teacher_model", str(models["causal_lm"]), "--columns", "second_answer", "--strict")
    assert prepare(*flags) == 0
    assert {record["second_answer"] for record in json.loads(prepare.output.read_text())} == {None}


def test_batches_partly_on_disk_give_the_same_answers(models) -> None:
    from scaledown.data.teacher.api import load_teacher
    from scaledown.data.teacher.base import TeacherSettings
    from scaledown.models.sources import resolve

    teacher = load_teacher(
        resolve(str(models["causal_lm"])), "cpu", "float32", TeacherSettings(max_new_tokens=8, batch_size=2)
    )
    prompts = [answer_prompt(str(n), "Why? " * (n + 1), ["a document " * n], 0.0) for n in range(6)]
    whole = dict(teacher.answers(prompts))
    for have in ({0}, {0, 1, 2}, {1, 3, 5}):
        some = dict(teacher.answers(prompts, have))
        assert set(range(6)) - have <= set(some)
        assert some == {place: whole[place] for place in some}
    assert not dict(teacher.answers(prompts, set(range(6))))


def test_edited_prompt_is_asked_again(prepare, tmp_path, capsys) -> None:
    own = tmp_path / "prompt.txt"
    own.write_text("{documents} {question}")
    assert prepare("--prompt", str(own)) == 0

    def repeat(name: str) -> str:
        flags = (
            "--config",
            str(prepare.work / "manifest.json"),
            "--work_dir",
            str(tmp_path / f"{name}.work"),
        )
        capsys.readouterr()
        assert prepare(*flags, "--output_file", str(tmp_path / name), inputs=False) == 0
        return capsys.readouterr().err

    assert "this run does not repeat" not in repeat("again.json")
    assert (tmp_path / "again.json").read_bytes() == prepare.output.read_bytes()
    own.write_text("{documents}\n{question}")
    assert "json: these inputs differ: prompt" in repeat("other.json")


class Faulty:
    """An engine that breaks what engines promise."""

    halving = Halving("--teacher_batch_size")

    def __init__(self, *yields) -> None:
        self.yields = yields

    def answers(self, prompts, have=()):
        yield from self.yields


@pytest.mark.parametrize(
    ("yields", "message"),
    [
        ([(0, answer()), (2, answer())], "Faulty.answers ended without an answer to 2 of 5 .* place 1: "),
        ([(0, "yes")], "Faulty.answers yielded str for place 0 of 5 prompts: "),
        ([(0, None)], "yielded NoneType for place 0"),
        ([(5, answer())], "yielded Answer for place 5 of 5 prompts: an engine yields .*docs/extending.md"),
        ([("q0", answer())], "yielded Answer for place 'q0'"),
    ],
)
def test_engine_that_breaks_its_promise_is_named(yields, message, tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "log.jsonl", 60, Storage(tmp_path))
    have = {4: answer("known")}
    with pytest.raises(ModelError, match=message):
        answer_prompts(Faulty(*yields), PROMPTS, log, have=have)
    complete = ((place, answer()) for place in range(5))  # it may answer again what is known
    assert len(answer_prompts(Faulty(*complete), PROMPTS, log, have=have)) == 5

"""Log probabilities of the teacher's answers: their values, storing them, cutting them with the answer."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from scaledown import cli
from scaledown.config.prepare import PrepareConfig
from scaledown.data import logprobs as own
from scaledown.data.input.training_files import problems, validate
from scaledown.data.logprobs import for_answer, from_ids, from_server
from scaledown.data.manifest import compared_settings
from scaledown.data.prompts import answer_prompt
from scaledown.data.teacher.api import check_options, choose_backend, load_teacher
from scaledown.data.teacher.base import EngineSettings, TeacherSettings, answer_all
from scaledown.devices.halving import Halving
from scaledown.errors import UsageError
from scaledown.models.sources import resolve
from scaledown.records import Answer, Logprobs


def teacher(path: Path, **generation: Any) -> Any:
    settings = {"max_new_tokens": 8, "logprobs": 5} | generation
    return load_teacher(resolve(str(path)), "cpu", "float32", TeacherSettings(**settings))


def prompts(count: int, temperature: float = 0.0) -> list[Any]:
    return [
        answer_prompt(str(n), "How tall? " * (n + 1), ["The tower is 300 metres tall."] * n, temperature)
        for n in range(count)
    ]


def logprobs_of(text: str) -> Logprobs:
    """Log probabilities with a token for each word, as from an engine that returns ids."""
    words = re.findall(r"\s*\S+", text)
    ids = [len(word) for word in words]
    return {
        "tokens": words,
        "token_ids": ids,
        "top_tokens": None,
        "top_ids": [[each, 0] for each in ids],
        "top_logprobs": [[-0.1, -2.5 - place] for place in range(len(ids))],
    }


def test_values_equal_a_forward_pass_over_the_whole_text(models) -> None:
    import torch

    one = teacher(models["causal_lm"], batch_size=3)  # of different lengths, padded on the left
    asked = prompts(3)
    for prompt, answer in zip(asked, answer_all(one, asked), strict=True):
        found = answer.answer_logprobs
        ids, _ = one._context.fit(prompt)
        with torch.inference_mode():
            logits = one._model(torch.tensor([ids + found["token_ids"]])).logits[0].float()
        expected = torch.log_softmax(logits, -1)[len(ids) - 1 : -1]  # [T, vocabulary]: each from those before
        assert len(expected) == answer.answer_tokens == len(found["tokens"]) > 0
        values, likeliest = expected.topk(5)
        assert likeliest.tolist() == found["top_ids"]
        assert torch.tensor(found["top_logprobs"]).allclose(values, atol=2e-4)
        assert [row[0] for row in found["top_ids"]] == found["token_ids"], "greedy takes the likeliest"
        assert "".join(found["tokens"]).strip() == answer.text
        assert not own.logprobs_problem(found, answer.text)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_values_do_not_depend_on_the_batch_size(temperature: float, models) -> None:
    import numpy as np

    asked = prompts(4, temperature)
    alone, together = (answer_all(teacher(models["causal_lm"], batch_size=size), asked) for size in (1, 4))
    for one, other in zip(alone, together, strict=True):
        assert one.answer_logprobs["token_ids"] == other.answer_logprobs["token_ids"]
        values = [answer.answer_logprobs["top_logprobs"] for answer in (one, other)]
        assert np.allclose(*values, atol=2e-4)


def test_sampled_answer_has_values_without_temperature(models) -> None:
    import torch

    one = teacher(models["causal_lm"])
    (prompt,) = prompts(1, temperature=5.0)
    (answer,) = answer_all(one, [prompt])
    found = answer.answer_logprobs
    ids, _ = one._context.fit(prompt)
    with torch.inference_mode():
        logits = one._model(torch.tensor([ids + found["token_ids"]])).logits[0].float()
    expected = torch.log_softmax(logits, -1)[len(ids) - 1 : -1].topk(5).values
    assert torch.tensor(found["top_logprobs"]).allclose(expected, atol=2e-4)
    assert [row[0] for row in found["top_ids"]] != found["token_ids"]


def test_answers_do_not_change_with_logprobs(models) -> None:
    asked = prompts(3)
    bare = answer_all(teacher(models["causal_lm"], logprobs=0), asked)
    assert [
        answer._replace(answer_logprobs=None) for answer in answer_all(teacher(models["causal_lm"]), asked)
    ] == bare


def test_character_of_several_tokens_is_in_the_text_of_the_last(models) -> None:
    tokenizer = teacher(models["causal_lm"])._tokenizer
    text = "Café 中文 \U0001f600."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = from_ids(tokenizer, ids, [[0]] * len(ids), [[-1.0]] * len(ids))
    assert len(ids) > len(text), "the tokenizer knows only their bytes"
    assert "".join(found["tokens"]) == text
    ids = tokenizer("\u4e2d", add_special_tokens=False)["input_ids"]
    assert from_ids(tokenizer, ids, [], [])["tokens"] == [*[""] * (len(ids) - 1), "\u4e2d"]
    assert from_ids(tokenizer, [], [], [])["tokens"] == []


def test_values_are_rounded_and_finite() -> None:
    assert [own.rounded(value) for value in (-1.23456789, 1e-7)] == [-1.2346, 0]
    assert [own.rounded(float(value)) for value in ("-inf", "nan")] == [-9999, -9999]


def test_for_answer_cuts_to_the_tokens_of_the_answer() -> None:
    whole = logprobs_of("One sentence. And not a wh")
    cut = for_answer(whole, "One sentence.")
    assert cut == {name: values and values[:2] for name, values in whole.items()}
    assert for_answer(whole, "One sentence. And not a wh") == whole
    assert for_answer(whole, "One sent") is None, "it ends inside a token"
    assert for_answer(whole, "Another") is None


def server_token(text: str, *top: tuple[str, float], **more: Any) -> dict[str, Any]:
    return {
        "token": text,
        "logprob": -1.0,
        "top_logprobs": [{"token": t, "logprob": p} for t, p in top],
        **more,
    }


def test_server_tokens_are_decoded_from_their_bytes() -> None:
    grin = "\U0001f600".encode()
    content = [
        server_token(" Hi", ("Hi", -2.0), (" Hi", -0.123456), ("!", -9.0)),
        server_token("bytes", ("x", -0.5), bytes=list(grin[:2])),
        server_token("bytes", ("\ud83d", -0.5), bytes=list(grin[2:])),
    ]
    assert from_server(content, 2) == {
        "tokens": [" Hi", "", "\U0001f600"],
        "token_ids": None,
        "top_tokens": [[" Hi", "Hi"], ["x"], ["?"]],
        "top_ids": None,
        "top_logprobs": [[-0.1235, -2.0], [-0.5], [-0.5]],
    }
    for nothing in (None, [], [{"token": "a", "logprob": -1.0, "top_logprobs": []}], [{"token": "a"}]):
        assert from_server(nothing, 2) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, ""),
        ({"token_ids": None, "top_ids": None, "top_tokens": [["a", "b"], ["c", "d"]]}, ""),
        ({"tokens": ["Two", " word"]}, "is of another text"),
        ({"tokens": [1, 2]}, "lacks tokens"),
        ({"top_logprobs": None}, "lacks tokens"),
        ({"top_logprobs": [[-1.0, float("nan")], [-1.0, -2.0]]}, "lacks tokens"),
        ({"top_logprobs": [[-1.0, 10**400], [-1.0, -2.0]]}, "lacks tokens"),
        ({"top_logprobs": [[-1.0, -2.0]]}, "different lengths"),
        ({"token_ids": [1]}, "different lengths"),
        ({"token_ids": [1, 1 << 40]}, "token_ids is not a list of ids"),
        ({"top_ids": [[1], [2, 3]]}, "top_ids does not have the shape"),
        ({"top_tokens": [["a", "b"], "c"]}, "top_tokens does not have the shape"),
        ({"mine": 1}, "is not an object of tokens, token_ids"),
    ],
)
def test_invalid_logprobs_column_is_reported(change: dict[str, Any], message: str) -> None:
    value = logprobs_of("Two words") | change
    found = own.logprobs_problem(value, "Two words")
    assert message in found
    assert bool(message) == bool(found)
    record = {"query": "q", "documents": ["d"], "answer": "Two words", "answer_logprobs": value}
    assert (f"answer_logprobs {found}" in problems(record)) == bool(message)
    assert not problems({**record, "answer_logprobs": None})
    assert "is not an object" in problems({**record, "answer_logprobs": "x"})[0]


class Sure:
    """Two sentences, the second truncated, with log probabilities; fails after `lives` answers."""

    halving = Halving("--teacher_batch_size")

    def __init__(self, lives: int = 10**9) -> None:
        self.lives = lives
        self.asked: list[str] = []

    def answers(self, prompts, have=()):
        for place, prompt in enumerate(prompts):
            if place in have:
                continue
            if self.lives == 0:
                raise KeyboardInterrupt
            self.lives -= 1
            self.asked.append(prompt.key)
            text = self.say(prompt)
            yield place, Answer(text, "length", 9, len(text.split()), 0, logprobs_of(text))

    def say(self, prompt) -> str:
        return f"Something of {prompt.documents[0].split()[0]}. And then not wh"


FLAGS = ("--teacher_logprobs", "2")


def written(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".parquet"])
def test_run_writes_logprobs_of_the_teacher(ending: str, prepare, tmp_path) -> None:
    import datasets

    output = tmp_path / f"data{ending}"
    assert prepare(*FLAGS, "--output_file", str(output)) == 0
    found = written(output)
    assert len(found) == 4
    for record in found:
        assert set(record) == {"query", "documents", "answer", "answer_logprobs"}
        assert not own.logprobs_problem(record["answer_logprobs"], record["answer"])
        assert {len(row) for row in record["answer_logprobs"]["top_ids"]} == {2}
    assert not validate(output).problems
    kind = "parquet" if ending == ".parquet" else "json"
    table = datasets.load_dataset(kind, data_files=str(output), cache_dir=str(tmp_path / "c"), split="train")
    assert table[0]["answer_logprobs"]["top_ids"] == found[0]["answer_logprobs"]["top_ids"]
    manifest = json.loads((tmp_path / f"data{ending}.work" / "manifest.json").read_text())
    assert manifest["parameters"]["teacher_logprobs"] == 2
    assert manifest["stages"]["answers"]["settings"]["teacher"] == manifest["models"]["teacher"]


@pytest.mark.parametrize("backend", ["transformers", "vllm"])  # one shard at a time, and several
def test_killed_run_keeps_logprobs(backend: str, prepare, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("scaledown.data.session.teachers.choose_backend", lambda *_: backend)
    monkeypatch.setattr("scaledown.data.session.teachers.preflight", lambda *_: None)
    whole = tmp_path / "whole.jsonl"
    flags = (*FLAGS, "--queries_per_shard", "2")
    monkeypatch.setattr("scaledown.data.session.teachers.load_teacher", lambda *_: Sure())
    assert prepare(*flags, "--output_file", str(whole)) == 0
    output = tmp_path / "killed.jsonl"
    first, second = Sure(3), Sure()
    for one, status in ((first, 130), (second, 0)):
        monkeypatch.setattr("scaledown.data.session.teachers.load_teacher", lambda *_, one=one: one)
        assert prepare(*flags, "--output_file", str(output)) == status
    assert len(first.asked) == 3
    assert len(second.asked) == 1
    assert output.read_bytes() == whole.read_bytes()
    assert all(record["answer_logprobs"] for record in written(output))


def test_truncated_answer_has_cut_logprobs(prepare, monkeypatch) -> None:
    teachers = []
    monkeypatch.setattr(
        "scaledown.data.session.teachers.load_teacher", lambda *_: teachers.append(Sure()) or teachers[-1]
    )
    assert prepare(*FLAGS) == 0
    for record in written(prepare.output):
        assert record["answer"].endswith(".")
        assert record["answer_logprobs"] == logprobs_of(record["answer"])
    assert prepare(*FLAGS, "--truncated_answers", "keep") == 0
    for record in written(prepare.output):
        assert record["answer"].endswith(" wh")
        assert record["answer_logprobs"] == logprobs_of(record["answer"])
    assert len(teachers) == 1, "another cut asks nothing again"


def test_answer_cut_inside_a_token_has_no_logprobs_and_is_counted(prepare, monkeypatch) -> None:
    class Joined(Sure):
        def say(self, prompt) -> str:
            return "\u5357\u6781\u3002\u7136\u540e"  # one token, its sentence ends inside

    monkeypatch.setattr("scaledown.data.session.teachers.load_teacher", lambda *_: Joined())
    assert prepare(*FLAGS) == 0
    assert [(r["answer"], r["answer_logprobs"]) for r in written(prepare.output)] == [
        ("\u5357\u6781\u3002", None)
    ] * 4
    counts = json.loads((prepare.work / "manifest.json").read_text())["stages"]["reviewed"]["counts"]
    assert counts["without_logprobs"] == 4
    assert not validate(prepare.output).problems


def test_retried_answer_has_logprobs_of_the_second_try(prepare, monkeypatch) -> None:
    class Unwilling(Sure):
        def say(self, prompt) -> str:
            again = prompt.key.endswith(":again")
            return "Better now." if again else "I cannot answer this."

    asked = []

    def load(_source, _device, _dtype, generation, *_):
        asked.append(generation.logprobs)
        return Unwilling()

    monkeypatch.setattr("scaledown.data.session.teachers.load_teacher", load)
    assert prepare(*FLAGS, "--bad_answers", "retry") == 0
    found = written(prepare.output)
    assert [record["answer_logprobs"] for record in found] == [logprobs_of("Better now.")] * 4
    assert asked == [2], "the teacher that is there asks again"


def test_logprobs_are_requested_for_written_answers_only(prepare, models, monkeypatch) -> None:
    asked = []

    def load(_source, _device, _dtype, generation, *_):
        asked.append(generation.logprobs)
        return Sure()

    monkeypatch.setattr("scaledown.data.session.teachers.load_teacher", load)
    flags = ("--second_teacher_model", str(models["causal_lm"]), "--columns", "second_answer")
    assert prepare(*FLAGS, *flags) == 0
    assert asked == [2, 0]
    assert set(written(prepare.output)[0]) == {
        "query",
        "documents",
        "answer",
        "second_answer",
        "answer_logprobs",
    }


def test_run_without_logprobs_has_unchanged_settings_and_shards(prepare, monkeypatch) -> None:
    monkeypatch.setattr("scaledown.data.session.teachers.load_teacher", lambda *_: Sure())
    assert prepare() == 0

    def answers() -> tuple[str, dict[str, Any]]:
        stage = json.loads((prepare.work / "manifest.json").read_text())["stages"]["answers"]
        return stage["fingerprint"], stage["settings"]

    fingerprint, settings = answers()
    assert "logprobs" not in settings
    (shard,) = (prepare.work / "answers" / fingerprint).glob("*.arrow")
    import pyarrow as pa

    with shard.open("rb") as file:
        assert "answer_logprobs" not in pa.ipc.open_stream(file).schema.names
    config = PrepareConfig(output_file="a.json", queries_file=("q.txt",))
    assert "teacher_logprobs" not in compared_settings(config)
    assert prepare("--teacher_logprobs", "0") == 0
    assert answers()[0] == fingerprint
    assert prepare("--teacher_logprobs", "2") == 0
    other, settings = answers()
    assert other != fingerprint
    assert settings["logprobs"] == 2


def test_merge_and_export_keep_logprobs(prepare, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("scaledown.data.session.teachers.load_teacher", lambda *_: Sure())
    output = tmp_path / "data.jsonl"
    assert prepare(*FLAGS, "--output_file", str(output)) == 0
    merged, back = tmp_path / "merged.parquet", tmp_path / "back.jsonl"
    assert cli.main(["merge", str(output), "--output_file", str(merged)]) == 0
    assert cli.main(["merge", str(merged), "--output_file", str(back)]) == 0
    assert (
        cli.main(["export", str(merged), "--format", "parquet", "--output_dir", str(tmp_path / "shared")])
        == 0
    )
    for path in (merged, back, tmp_path / "shared" / "train.parquet"):
        assert [record["answer_logprobs"] for record in written(path)] == [
            record["answer_logprobs"] for record in written(output)
        ]
    assert cli.main(["validate", str(merged), str(back)]) == 0


def test_plan_counts_bytes_of_logprobs(prepare) -> None:
    def disk(*flags: str) -> dict[str, int]:
        assert prepare("--dry_run", *flags) == 0
        plan = json.loads((prepare.work / "plan.json").read_text())
        return {stage["name"]: stage["disk"] for stage in plan["stages"]}

    bare, more = disk(), disk("--teacher_logprobs", "20")
    for name in ("answers", "reviewed", "output"):
        assert more[name] - bare[name] > 4 * 20 * 8, "some tokens of each of four answers"
    assert more["candidates"] == bare["candidates"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"teacher_logprobs": 21}, "--teacher_logprobs 21: must lie between 0 and 20"),
        ({"teacher_logprobs": -1}, "--teacher_logprobs -1: must lie between 0 and 20"),
    ],
)
def test_number_of_logprobs_out_of_range_is_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PrepareConfig(output_file="a.json", queries_file=("q.txt",), **flags)


def test_engine_without_logprobs_is_refused() -> None:
    with pytest.raises(UsageError, match="openvino gives none: use one of transformers, vllm, endpoint"):
        check_options(EngineSettings("openvino"), TeacherSettings(logprobs=5))


def test_auto_takes_an_engine_with_logprobs(models, monkeypatch) -> None:
    import importlib.util

    from scaledown.data.teacher.engines import openvino as module

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    monkeypatch.setattr(module, "is_exported", lambda _: True)
    source = resolve(str(models["causal_lm"]))
    assert choose_backend(EngineSettings(), source, "cpu", TeacherSettings()) == "openvino"
    assert choose_backend(EngineSettings(), source, "cpu", TeacherSettings(logprobs=5)) == "transformers"

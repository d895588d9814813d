import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT
from scaledown.cli import main
from scaledown.config.train import PretrainConfig, TrainConfig
from scaledown.data.prompts import CONTINUE, REPEAT
from scaledown.errors import InputError, ModelError, UsageError
from scaledown.student.batch import plain_ids
from scaledown.student.model import ScaleDownModel
from scaledown.student.training.origin import find_origin
from scaledown.student.training.pretraining_data import _LeftOut, pretraining_examples, pretraining_parts
from scaledown.student.training.run import train
from scaledown.student.training.summary import training_summary
from web import Server

Setting = Callable[..., PretrainConfig]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Six articles of some passages each, and one line that is no article."""
    lines = [
        json.dumps(
            {
                "id": number,
                "title": f"House {number}",
                "text": "\n".join(
                    f"Room {number}.{room} is {colour}. It has a window to the north and a door."
                    for room, colour in enumerate(("red", "blue", "green", "white"))
                ),
            }
        )
        for number in range(6)
    ]
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join([*lines[:2], "{no", *lines[2:]]))
    return path


@pytest.fixture
def setting(models: dict[str, Path], corpus: Path, tmp_path: Path) -> Setting:
    def make(output: str = "out", **changes: Any) -> PretrainConfig:
        settings: dict[str, Any] = {
            "corpus_path": (str(corpus),),
            "generator_model": str(models["causal_lm"]),
            "num_layers": 1,
            "doc_max_length": 40,
            "batch_size": 4,
            "eval_fraction": 0.2,
            "report_to": "none",
            "device": "cpu",
        }
        return PretrainConfig(output_dir=str(tmp_path / output), **settings | changes)

    return make


def examples(config: PretrainConfig) -> tuple[list[tuple[str, Any]], list[str]]:
    bad: list[str] = []
    tokenizer = find_origin(config).compressor_tokenizer()
    return list(pretraining_examples(config, tokenizer, bad)), bad


def test_passages_are_repeated_or_continued(setting: Setting, models: dict[str, Path]) -> None:
    config = setting()
    found, bad = examples(config)
    tokenizer = find_origin(config).compressor_tokenizer()
    tasks = {REPEAT: 0, CONTINUE: 0}
    for (name, example), (_, following) in itertools.zip_longest(found, found[1:], fillvalue=("", None)):
        (document,) = example.documents
        assert 0 < len(plain_ids(tokenizer, document)) <= 40
        tasks[example.query] += 1
        if example.query == REPEAT:
            assert example.answer == document
        else:
            assert following is not None
            title, _, text = following.documents[0].partition("\n")
            assert example.answer == text
            assert document.startswith(f"{title}\n"), f"{name} goes on in another article"
    assert min(tasks.values()) >= 3
    assert len({name for name, _ in found}) == len(found)
    assert len(bad) == 1
    assert re.match(r".*corpus\.jsonl:3: invalid JSON", bad[0])


def test_tasks_depend_on_the_seed_alone(setting: Setting) -> None:
    assert examples(setting()) == examples(setting("other", batch_size=2))
    tasks = [[example.query for _, example in examples(setting(seed=seed))[0]] for seed in (0, 1)]
    assert tasks[0] != tasks[1]


def test_articles_of_held_out_records_are_left_out(
    setting: Setting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held = tmp_path / "held_out.json"
    documents = ["House 1\nRoom 1 is red.", "House 4\nRoom 2 is blue.", "Elsewhere\nA garden."]
    held.write_text(json.dumps([{"query": "Which room?", "documents": documents, "answer": "red"}]))

    def articles(**changes: Any) -> tuple[set[str], str]:
        config = setting(**changes)
        caplog.clear()
        with caplog.at_level("INFO", "scaledown"):
            parts = pretraining_parts(config, find_origin(config).compressor_tokenizer(), tmp_path)
        found = parts.train.examples
        return {found[row].documents[0].partition("\n")[0] for row in range(len(found))}, caplog.text

    everything, _ = articles()
    left, log = articles(leave_out=(str(held),))
    assert everything - left == {"House 1", "House 4"}
    assert "--leave_out: 2 of the 6 articles that were read are left out" in log
    held.write_text(json.dumps([{"query": "Which room?", "documents": ["A text."], "answer": "red"}]))
    left, log = articles(leave_out=(str(held),))
    assert left == everything
    assert "--leave_out: 1 documents have no title line" in log
    most = [f"House {number}\nA room." for number in range(4)]
    held.write_text(json.dumps([{"query": "Which room?", "documents": most, "answer": "red"}]))
    left, log = articles(leave_out=(str(held),))
    assert left <= {"House 4", "House 5"}
    assert "WARNING  scaledown:pretraining_data.py" in log
    assert "4 of the 6 articles that were read are left out" in log
    held.write_text(
        json.dumps([{"query": "q", "documents": [f"House {n}\nA." for n in range(6)], "answer": "red"}])
    )
    with pytest.raises(InputError, match="no article with text after those of --leave_out"):
        articles(leave_out=(str(held),))


def test_long_titles_are_left_out_though_passages_shorten_them(tmp_path: Path) -> None:
    long = [f"word{number}" for number in range(20)]
    held = tmp_path / "held_out.json"

    def has(known: int, met: int) -> bool:
        documents = [" ".join(long[:known]) + "\nA text."]
        held.write_text(json.dumps([{"query": "q", "documents": documents, "answer": "a"}]))
        return _LeftOut([str(held)]).has(" ".join(long[:met]))

    assert has(20, 20)
    assert has(20, 11)
    assert has(11, 20)
    assert has(3, 3)
    assert not has(3, 20)
    assert not has(20, 3)


def test_only_the_needed_part_of_the_corpus_is_read(setting: Setting, tmp_path: Path) -> None:
    config = setting(max_steps=2, eval_fraction=0.0)
    parts = pretraining_parts(config, find_origin(config).compressor_tokenizer(), tmp_path)
    assert len(parts.train.examples) == 8
    few, _ = examples(setting(max_corpus_size=2))
    assert {example.documents[0].partition("\n")[0] for _, example in few} == {"House 0", "House 1"}


def test_articles_are_on_one_side(setting: Setting, tmp_path: Path) -> None:
    config = setting()
    tokenizer = find_origin(config).compressor_tokenizer()
    taught, held, shared = pretraining_parts(config, tokenizer, tmp_path)
    assert held is not None
    titles = [
        {part.examples[row].documents[0].partition("\n")[0] for row in part.rows} for part in (taught, held)
    ]
    assert titles[0]
    assert titles[1]
    assert not titles[0] & titles[1]
    assert shared == 0


def test_a_login_in_the_url_of_a_corpus_is_not_kept(
    setting: Setting, corpus: Path, server: Server, tmp_path: Path
) -> None:
    server.files["corpus.jsonl"] = corpus.read_bytes()
    url = server.url("corpus.jsonl?signature=secret", "user:secret@")
    result = train(setting(corpus_path=(url,), max_steps=1))
    assert "127.0.0.1" in (Path(result.output) / "settings.json").read_text()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"secret" in path.read_bytes()]


def test_corpus_without_text(setting: Setting, corpus: Path, tmp_path: Path) -> None:
    corpus.write_text('{"text": " "}\n')
    config = setting()
    with pytest.raises(InputError, match=r"--corpus_path .*: no article with text; check the file"):
        pretraining_parts(config, find_origin(config).compressor_tokenizer(), tmp_path)
    with pytest.raises(InputError, match="there is no such file"):
        train(setting(corpus_path=(str(tmp_path / "nowhere.jsonl"),)))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"corpus_path": ()}, "no text: give --corpus_path"),
        ({"doc_max_length": 8}, "--doc_max_length 8: must be at least 16"),
        ({"max_corpus_size": -1}, "--max_corpus_size -1: must not be negative"),
    ],
)
def test_contradictions_name_their_flags(setting: Setting, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        setting(**changes)


def test_pretraining_lowers_the_loss(setting: Setting, tmp_path: Path) -> None:
    """By heart, from the memory tokens alone: the question is the same for both passages."""
    short = tmp_path / "short.jsonl"
    short.write_text('{"id": 1, "text": "The red house."}\n{"id": 2, "text": "A blue tower stands."}\n')
    result = train(
        setting(
            corpus_path=(str(short),),
            doc_max_length=16,
            compression_rate=4,
            batch_size=2,
            max_steps=200,
            eval_fraction=0.0,
            save_steps=200,
            generator_training="full",
            learning_rate_generator=2e-3,
            learning_rate_compressor=2e-3,
        )
    )
    model = ScaleDownModel.from_pretrained(result.output)
    texts = ["The red house.", "A blue tower stands."]
    assert model.answer([REPEAT] * 2, [[text] for text in texts], max_new_tokens=20) == texts


@pytest.fixture
def pretrained(setting: Setting, models: dict[str, Path]) -> str:
    """With a separate compressor."""
    return train(setting("pretrained", compressor=str(models["splade"]), max_steps=2)).output


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "train_data.jsonl"
    record = {"query": "Who?", "documents": ["A\ntext", "B\nother"], "answer": "me"}
    path.write_text("".join(json.dumps({**record, "reranking_scores": [2.0, 1.0]}) + "\n" for _ in range(6)))
    return str(path)


def training(data: str, pretrained: str, tmp_path: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {"batch_size": 2, "max_steps": 1, "eval_fraction": 0.0, "device": "cpu"}
    return TrainConfig(
        train_data=(data,),
        pretrained_model=pretrained,
        report_to="none",
        **{"output_dir": str(tmp_path / "trained")} | settings | changes,
    )


def test_data_that_pretraining_has_learned_is_reported(
    setting: Setting, data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    varied = tmp_path / "varied.jsonl"
    lines = [{"query": f"Who {n}?", "documents": [f"A{n}\nme {n}"], "answer": f"me {n}"} for n in range(6)]
    varied.write_text("".join(json.dumps(line) + "\n" for line in lines))
    pretrained = train(
        setting("pointer", compressor="pointer", max_steps=1, train_data=(str(varied),))
    ).output
    message = "the pretrained model has learned from the same --train_data"
    for known, fraction in ((True, 0.3), (False, 0.3), (True, 0.0)):
        caplog.clear()
        name = tmp_path / f"trained-{known}-{fraction}"
        file = str(varied) if known else data
        config = training(file, pretrained, tmp_path, eval_fraction=fraction, output_dir=str(name))
        with caplog.at_level("WARNING", "scaledown"):
            train(config)
        assert (message in caplog.text) == (known and fraction > 0)


def test_training_begins_with_pretrained_weights(pretrained: str, data: str, tmp_path: Path) -> None:
    config = training(data, pretrained, tmp_path, max_steps=3)
    begun = find_origin(config).load(torch.float32, "cpu").state_dict()
    saved = load_file(Path(pretrained) / "model.safetensors")
    assert saved.keys() <= begun.keys()
    assert all(torch.equal(begun[name], value) for name, value in saved.items())
    result = train(config)
    after = load_file(Path(result.output) / "model.safetensors")
    assert after.keys() == saved.keys()
    assert not torch.equal(after["memory"], saved["memory"])
    model = ScaleDownModel.from_pretrained(result.output)
    assert model.config.doc_max_length == 40
    assert model.config.compressor_name is not None
    assert isinstance(model.answer("Who?", ["A\ntext"], max_new_tokens=3), str)


def test_reranking_head_is_added_to_a_pretrained_model(pretrained: str, data: str, tmp_path: Path) -> None:
    result = train(training(data, pretrained, tmp_path, enable_reranking=True))
    model = ScaleDownModel.from_pretrained(result.output)
    assert len(model.rerank("Who?", ["A\ntext", "B\nother"])) == 2


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_dropout_of_lora_is_kept_from_pretraining(
    share: float, setting: Setting, data: str, tmp_path: Path
) -> None:
    pretrained = train(setting(lora_dropout=share, max_steps=1)).output
    trained = train(training(data, pretrained, tmp_path)).output
    parts = ScaleDownModel.from_pretrained(trained).generator.named_modules()
    left_out = {getattr(part, "p", 0.0) for name, part in parts if name.endswith("lora_dropout.default")}
    assert left_out == {share}
    parameters = json.loads((Path(trained) / "settings.json").read_text())["parameters"]
    settled = {name: parameters[name] for name in ("lora_dropout", "compression_rate", "doc_max_length")}
    assert settled == {"lora_dropout": share, "compression_rate": 16, "doc_max_length": 40}


def test_pretraining_that_is_asked_for_again_changes_nothing(
    setting: Setting, data: str, tmp_path: Path
) -> None:
    """The pretrained model is still the same one, whatever stands beside it."""
    config = setting(max_steps=1, resume=True)
    trained = train(training(data, train(config).output, tmp_path, resume=True))
    again = train(config)
    assert again.already_done
    (Path(again.output) / ".train" / "note").write_text("x")
    assert train(training(data, again.output, tmp_path, resume=True)).already_done
    assert not trained.already_done


def test_run_that_recorded_defaults_of_settled_flags_continues(
    pretrained: str, data: str, tmp_path: Path
) -> None:
    """As those of earlier versions did."""
    config = training(data, pretrained, tmp_path, resume=True)
    path = Path(train(config).output) / "settings.json"
    content = json.loads(path.read_text())
    assert content["parameters"]["doc_max_length"] == 40
    content["parameters"] |= {"doc_max_length": 0, "num_layers": 8}
    path.write_text(json.dumps(content))
    assert train(config).already_done


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compressor": "bert", "num_layers": 3}, "--num_layers has no effect"),
        ({"generator_training": "frozen", "lora_dropout": 0.0}, "--lora_dropout has no effect"),
        ({"generator_training": "frozen", "learning_rate_generator": 1e-3}, "--learning_rate_generator has"),
        ({"max_steps": 3, "num_epochs": 2.0}, "--num_epochs has no effect"),
        ({"eval_data": ("-",), "eval_fraction": 0.1}, "--eval_fraction has no effect"),
        ({"generator_training": "frozen", "max_steps": 3, "eval_data": ("-",)}, ""),
    ],
)
def test_a_flag_without_effect_is_named(
    settings: dict[str, Any], message: str, models: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    if "compressor" in settings:
        settings = settings | {"compressor": str(models["modernbert"])}
    find_origin(TrainConfig(train_data=("-",), generator_model=str(models["causal_lm"]), **settings))
    assert message in caplog.text
    assert bool(message) == bool(caplog.text)


def test_settings_of_pretraining_cannot_be_changed(
    pretrained: str, data: str, tmp_path: Path, models: dict[str, Path]
) -> None:
    with pytest.raises(UsageError, match=r"--compression_rate 4: .* was made with 16; leave the flag out"):
        train(training(data, pretrained, tmp_path, compression_rate=4))
    with pytest.raises(UsageError, match=r"--generator_model .*phi: .* was made with .*causal_lm"):
        train(training(data, pretrained, tmp_path, generator_model=str(models["phi"])))
    train(training(data, pretrained, tmp_path, generator_model=str(models["causal_lm"])))


def test_default_learning_rate_of_a_separate_compressor(pretrained: str, data: str, tmp_path: Path) -> None:
    result = train(training(data, pretrained, tmp_path, max_steps=3))
    state = json.loads((Path(result.output) / "checkpoint-3" / "training.json").read_text())
    rates = next(entry for entry in state["log"] if "learning_rate_compressor" in entry)
    assert rates["learning_rate_compressor"] == rates["learning_rate_generator"] == pytest.approx(1e-4)


def test_flags_that_pretraining_settled_are_refused(
    pretrained: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even a default, which would not be what it says."""
    words = ["--train_data", data, "--output_dir", str(tmp_path / "out"), "--pretrained_model", pretrained]
    assert main(["train", *words, "--compression_rate", "16"]) == 2
    assert "--compression_rate is settled by --pretrained_model" in capsys.readouterr().err


def test_no_scaledown_model(data: str, tmp_path: Path, models: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="is not a ScaleDown model"):
        train(training(data, str(models["causal_lm"]), tmp_path))


def test_another_pretrained_model_is_another_run(pretrained: str, data: str, tmp_path: Path) -> None:
    train(training(data, pretrained, tmp_path))
    moved = tmp_path / "moved"
    Path(pretrained).rename(moved)
    assert train(training(data, str(moved), tmp_path)).already_done


def test_summary_names_the_next_command(setting: Setting) -> None:
    result = train(setting(max_steps=1))
    last = training_summary(result, pretrained=True).splitlines()[-1]
    assert f"train --pretrained_model {result.output} --train_data FILE" in last
    last = training_summary(result).splitlines()[-1]
    assert f"evaluate --model {result.output} --data FILE" in last


@pytest.mark.slow
def test_command_line(setting: Setting, forked: None) -> None:
    config = setting()
    words = [sys.executable, "-m", "scaledown", "pretrain", "--corpus-path", *config.corpus_path]
    words += ["--output_dir", config.output_dir, "--generator_model", config.generator_model]
    words += ["--num_layers", "1", "--doc_max_length", "40", "--batch_size", "4", "--max_steps", "2"]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d+ examples, 2 steps\n", done.stdout)
    assert "train --pretrained_model" in done.stdout.splitlines()[-1]
    assert re.search(r"corpus\.jsonl:3: invalid JSON .*; skipped", done.stderr)

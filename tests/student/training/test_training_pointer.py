"""A pointer is pretrained on cloze questions, trained on records, interrupted and resumed."""

import json
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scaledown.config.train import PretrainConfig, TrainConfig
from scaledown.errors import InputError, RunDirectoryError, UsageError
from scaledown.models.sources import resolve
from scaledown.student.batch import collate
from scaledown.student.compressors.pointer import RATES
from scaledown.student.labels import copied_spans
from scaledown.student.model import LOSS_WEIGHTS, ScaleDownModel, load_tokenizer
from scaledown.student.settings import ScaleDownConfig
from scaledown.student.training.checkpoints import newest_checkpoint
from scaledown.student.training.cloze import CLOZE_PROMPT
from scaledown.student.training.encoded_examples import EncodedExamples
from scaledown.student.training.origin import find_origin
from scaledown.student.training.passes import Passes
from scaledown.student.training.pretraining_data import pretraining_parts
from scaledown.student.training.run import Trained, train
from scaledown.student.training.setup import make_trainer
from scaledown.student.training.training_data import load_parts

THINGS = ["tower", "river", "city", "tree", "bird", "stone", "book", "bridge"]
COLOURS = ["red", "blue", "green", "white", "black", "yellow"]


def records(count: int) -> list[dict[str, Any]]:
    """Each asks for the colour of a thing; one of two documents tells it."""
    random = Random(0)
    found = []
    for number in range(count):
        thing, other = random.sample(THINGS, 2)
        colours = random.sample(COLOURS, 2)
        documents = [
            f"Article {number}\nThe old {own} by the road is {colour} and very tall today."
            for own, colour in zip((thing, other), colours, strict=True)
        ]
        random.shuffle(documents)
        found.append(
            {"query": f"Which colour has the {thing} {number}?", "documents": documents, "answer": colours[0]}
        )
    return found


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pointer") / "train_data.json"
    path.write_text(json.dumps(records(24)))
    return path


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """So that equal means equal on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


Setting = Callable[..., TrainConfig]


@pytest.fixture
def setting(models: dict[str, Path], data: Path, tmp_path: Path) -> Setting:
    def make(output: str = "out", **changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {
            "train_data": (str(data),),
            "generator_model": str(models["causal_lm"]),
            "compressor": "pointer",
            "num_layers": 1,
            "compression_rate": 8,
            "batch_size": 6,
            "micro_batch_size": 3,
            "num_epochs": 2.0,
            "eval_fraction": 0.2,
            "eval_steps": 3,
            "text_fraction": 0.2,
            "closed_book_fraction": 0.1,
            "report_to": "none",
            "device": "cpu",
        }
        return TrainConfig(output_dir=str(tmp_path / output), **settings | changes)

    return make


def history(result: Trained) -> list[dict[str, Any]]:
    newest = newest_checkpoint(Path(result.output))
    assert newest is not None
    found: list[dict[str, Any]] = json.loads((newest / "training.json").read_text())["log"]
    return found


def test_a_resumed_pointer_is_the_undisturbed_one(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = train(setting("undisturbed"))
    original, seen = Passes._losses, 0

    def interrupted(self: Any, *arguments: Any) -> Any:
        nonlocal seen
        seen += self.model.training
        if seen == 9:
            raise KeyboardInterrupt
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Passes, "_losses", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(setting("resumed"))
    resumed = train(setting("resumed", resume=True))
    left, right = (load_file(Path(one.output) / "model.safetensors") for one in (undisturbed, resumed))
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert {"pointer.linear.weight", "pointer.words", "pointer.carry.weight"} <= left.keys()
    assert "memory" not in left
    assert history(undisturbed) == history(resumed)


def test_pointer_training_lowers_the_loss(setting: Setting) -> None:
    result = train(
        setting(
            num_epochs=40.0,
            learning_rate_compressor=3e-3,
            learning_rate_generator=3e-3,
            text_fraction=0.0,
            closed_book_fraction=0.0,
        )
    )
    logged = history(result)
    steps = [entry["pointer_loss"] for entry in logged if "pointer_loss" in entry]
    assert sum(steps[-5:]) < sum(steps[:5]) / 2
    assert any("eval_pointer_loss" in entry for entry in logged)
    assert all(
        entry["loss"] == pytest.approx(entry["answer_loss"] + entry["pointer_loss"])
        for entry in logged
        if "answer_loss" in entry
    )
    model = ScaleDownModel.from_pretrained(result.output)
    kept = 0
    for record in records(24):
        picked = model.pick(record["query"], record["documents"], compression_rate=8, budget="shared")
        kept += record["answer"] in "".join(map("".join, picked))
    assert kept >= 18


@pytest.mark.parametrize("micro", [1, 4, 10])
def test_gradients_do_not_depend_on_micro_batches(micro: int, setting: Setting, tmp_path: Path) -> None:
    config = setting(generator_training="full", batch_size=10, micro_batch_size=micro, text_fraction=0.3)
    parts = load_parts(config, tmp_path)
    torch.manual_seed(0)
    settings = ScaleDownConfig(
        compressor="pointer", num_layers=1, doc_max_length=32, generator_training="full", compression_rate=8
    )
    model = ScaleDownModel.build(settings, resolve(config.generator_model))
    trainer = make_trainer(model, config, parts.train, None, "cpu")
    examples = [trainer.batches.examples[row] for row in parts.train.rows[:10]]
    assert {bool(example.documents) for example in examples} == {True, False}
    expected = model(**collate(examples)).loss
    expected.backward()
    wanted = {name: own.grad.clone() for name, own in model.named_parameters() if own.grad is not None}
    model.zero_grad()
    losses = trainer.passes.gradients(examples)
    loss = sum(LOSS_WEIGHTS[name] * value for name, value in losses.items())
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, own in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(own.grad, wanted[name], rtol=1e-3, atol=1e-5)


def test_examples_are_compressed_at_all_rates_or_read_or_asked_without_documents(
    setting: Setting, models: dict[str, Path], tmp_path: Path
) -> None:
    config = setting(eval_fraction=0.0, text_fraction=0.3, closed_book_fraction=0.2)
    path = tmp_path / "many.json"
    path.write_text(json.dumps(records(400)))
    examples = load_parts(setting(train_data=(str(path),), eval_fraction=0.0), tmp_path).train.examples
    settings = ScaleDownConfig(compressor="pointer", num_layers=1, doc_max_length=32)
    model = ScaleDownModel.build(settings, resolve(str(models["causal_lm"])))
    encoded = EncodedExamples(examples, model, config, trains=True)
    read = [encoded[row] for row in range(400)]
    assert [encoded[row] for row in range(400)] == read, "the same every time"
    again = [encoded[400 + row] for row in range(400)]
    assert sum(one != other for one, other in zip(read, again, strict=True)) > 200, (
        "and drawn anew in each pass"
    )
    texts = [example for example in read if not example.documents]
    tower = [example for example in texts if "road" in model.tokenizer.decode(example.prompt_parts[0])]
    assert 90 < len(tower) < 150
    assert 50 < len(texts) - len(tower) < 110
    rates = dict.fromkeys(RATES, 0)
    for example in read:
        for document in example.documents[:1]:
            tokens = document.stop - document.start
            rates[next(rate for rate in RATES if document.memory == -(-tokens // rate))] += 1
    assert min(rates.values()) > 20
    held = EncodedExamples(examples, model, config, trains=False)
    assert all(held[row].documents for row in range(400)), "what is held out is always compressed"


def test_gold_of_other_questions_is_an_error(setting: Setting, tmp_path: Path) -> None:
    gold = tmp_path / "gold.jsonl"
    gold.write_text(json.dumps({"question": "Who wrote Emma?", "answers": ["Jane Austen"]}))
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records(4)))
    config = setting(train_data=(str(path),), gold=(str(gold),), eval_fraction=0.0)
    with pytest.raises(InputError, match="none of 4 records of .* give the gold of these questions"):
        load_parts(config, tmp_path)


def test_right_answers_take_the_teachers_place(
    setting: Setting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = records(4)
    gold = tmp_path / "gold.jsonl"
    right = [{"question": content[0]["query"], "answers": ["nowhere", content[0]["answer"].upper()]}]
    right += [{"question": content[1]["query"].upper(), "answers": ["none of these"]}]
    gold.write_text("\n".join(map(json.dumps, right)))
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{**record, "answer": "The teacher's."} for record in content]))
    config = setting(train_data=(str(path),), gold=(str(gold),), eval_fraction=0.0)
    with caplog.at_level("INFO", "scaledown"):
        examples = load_parts(config, tmp_path).train.examples
    assert "2 of 4 questions have a right answer in --gold" in caplog.text
    assert [examples[row].answer for row in range(4)] == [
        content[0]["answer"].upper(),
        "none of these",
        "The teacher's.",
        "The teacher's.",
    ]


@pytest.fixture
def pretraining(models: dict[str, Path], corpus: Path, tmp_path: Path) -> PretrainConfig:
    return PretrainConfig(
        corpus_path=(str(corpus),),
        generator_model=str(models["causal_lm"]),
        compressor="pointer",
        num_layers=1,
        doc_max_length=64,
        max_steps=6,
        batch_size=4,
        learning_rate_compressor=3e-3,
        output_dir=str(tmp_path / "pretrained"),
        report_to="none",
        device="cpu",
    )


@pytest.fixture
def pretrained(pretraining: PretrainConfig) -> Trained:
    return train(pretraining)


def test_pretraining_asks_cloze_questions_and_leaves_the_generator(
    pretrained: Trained, setting: Setting, models: dict[str, Path]
) -> None:
    after = load_file(Path(pretrained.output) / "model.safetensors")
    torch.manual_seed(0)
    generator = load_file(models["causal_lm"] / "model.safetensors")
    same = {
        name
        for name in generator
        if torch.equal(generator[name], after.get(f"generator.{name}", torch.empty(0)))
    }
    assert any("embed_tokens" in name for name in same)
    assert not any(after[name].abs().sum() for name in after if "lora_B" in name)
    assert after["pointer.carry.weight"].abs().sum() == 0
    assert after["pointer.linear.weight"].abs().sum() > 0
    assert pretrained.held_out_loss is not None
    assert 0 < pretrained.loss < 10
    names = ("generator_model", "compressor", "num_layers", "compression_rate")
    defaults = {item.name: item.default for item in fields(TrainConfig) if item.name in names}
    result = train(setting(pretrained_model=pretrained.output, **defaults))
    trained = ScaleDownModel.from_pretrained(result.output)
    assert trained.config.kind.picks_tokens
    assert trained.config.doc_max_length == 64


def test_pretraining_learns_from_records_too(
    pretraining: PretrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, gold = tmp_path / "records.json", tmp_path / "gold.jsonl"
    content = records(40)
    silent = {"query": "What is nowhere?", "documents": ["Bees\nfly far."], "answer": "an unrelated remark"}
    data.write_text(json.dumps([content[0], silent, *content[1:]]))
    asked = content[0]["query"]
    gold.write_text(json.dumps({"question": asked, "answers": ["Bees", content[0]["answer"]]}) + "\n")
    config = replace(
        pretraining,
        train_data=(str(data),),
        gold=(str(gold),),
        output_dir=str(tmp_path / "both"),
        max_steps=0,
        max_corpus_size=3,
    )
    tokenizer = load_tokenizer(resolve(config.generator_model))
    parts = pretraining_parts(config, tokenizer, tmp_path)
    examples = parts.train.examples
    found = [examples[row] for row in range(len(examples))]
    cloze = [place for place, one in enumerate(found) if one.query.startswith(CLOZE_PROMPT)]
    count = len(cloze)
    assert 0 < count < 40
    assert cloze == list(range(0, 2 * count, 2)), "one of each in turn, then the rest"
    asked_records = [one.query for one in found if not one.query.startswith(CLOZE_PROMPT)]
    assert asked_records == [record["query"] for record in content], "what is copied from nowhere is left out"
    spans = copied_spans(asked, content[0]["documents"], content[0]["answer"])
    assert examples[1].documents == [
        text for text, own in zip(content[0]["documents"], spans, strict=True) if own
    ]
    held = {found[row].query for row in parts.held_out.rows} if parts.held_out else set()
    assert not held & {found[row].query for row in parts.train.rows}
    caplog.set_level("INFO")
    result = train(replace(config, max_steps=3))
    assert "1 of 41 questions have a right answer" in caplog.text
    assert result.steps == 3
    data.write_text(json.dumps(content[1:]))
    with pytest.raises(RunDirectoryError, match="another --train_data"):
        train(replace(config, max_steps=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_data": ("x.json",), "compressor": "n_layers"}, "give --compressor pointer"),
        ({"gold": ("x.json",)}, "give --train_data too"),
    ],
)
def test_records_are_for_a_pointer(
    pretraining: PretrainConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        find_origin(replace(pretraining, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_fraction": 1.2}, "must lie between 0 and 1"),
        ({"text_fraction": 0.6, "closed_book_fraction": 0.5}, "add up to more than 1"),
        ({"compression_rate": 64}, "takes 4 to 32"),
        ({"generator_training": "frozen"}, "have no effect on a frozen generator"),
        ({"enable_reranking": True}, "by its own scores"),
    ],
)
def test_contradictions_name_their_flags(setting: Setting, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train(setting(**changes))


@pytest.mark.parametrize(("silent", "level"), [(2, "INFO"), (7, "WARNING")])
def test_examples_whose_answers_copy_nothing_are_counted(
    silent: int, level: str, setting: Setting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "records.json"
    others = [
        {"query": f"What is {number}?", "documents": ["Bees fly far."], "answer": "an unrelated remark"}
        for number in range(silent)
    ]
    path.write_text(json.dumps([*records(6), *others]))
    caplog.set_level("INFO")
    train(setting(train_data=(str(path),), eval_fraction=0.0, max_steps=1))
    (record,) = [one for one in caplog.records if "copies nothing" in one.getMessage()]
    assert f"of {6 + silent} examples checked, {silent} have" in record.getMessage()
    assert record.levelname == level


def test_a_long_answer_does_not_end_training(setting: Setting, tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    path.write_text(json.dumps([{**record, "answer": "tide " * 9000} for record in records(4)]))
    config = setting(train_data=(str(path),), eval_fraction=0.0, text_fraction=0.5, closed_book_fraction=0.4)
    assert train(replace(config, max_steps=1)).steps == 1


def test_a_generator_can_learn_from_text_alone(setting: Setting, tmp_path: Path) -> None:
    config = setting(text_fraction=0.9, closed_book_fraction=0.1, max_steps=2)
    before = train(replace(config, max_steps=1, learning_rate_generator=1e-9, output_dir=str(tmp_path / "b")))
    after = train(config)
    weights = [load_file(Path(result.output) / "model.safetensors") for result in (before, after)]
    for name, value in weights[1].items():
        if not name.startswith("generator."):
            assert torch.equal(value, weights[0][name]), f"{name}: nothing was compressed"
    lora = [name for name in weights[1] if ".lora_B." in name]
    assert any(not torch.allclose(weights[0][name], weights[1][name]) for name in lora)


def test_run_without_these_flags_continues(setting: Setting) -> None:
    config = setting(text_fraction=0.0, closed_book_fraction=0.0)
    result = train(config)
    path = Path(result.output) / "settings.json"
    content = json.loads(path.read_text())
    for name in ("text_fraction", "closed_book_fraction", "gold"):
        del content["parameters"][name]
    del content["inputs"]["gold"]
    path.write_text(json.dumps(content))
    assert train(config).already_done


def test_a_pretrained_pointer_has_no_reranking_head(pretrained: Trained, setting: Setting) -> None:
    names = ("generator_model", "compressor", "num_layers", "compression_rate")
    defaults = {item.name: item.default for item in fields(TrainConfig) if item.name in names}
    with pytest.raises(UsageError, match="by its own scores"):
        train(setting(pretrained_model=pretrained.output, enable_reranking=True, **defaults))


def test_another_gold_file_is_another_run(setting: Setting, data: Path, tmp_path: Path) -> None:
    gold = tmp_path / "gold.jsonl"
    gold.write_text(json.dumps({"question": records(1)[0]["query"], "answers": ["red"]}))
    train(setting(gold=(str(gold),), max_steps=1))
    with pytest.raises(RunDirectoryError, match="another --gold"):
        train(setting(max_steps=1))

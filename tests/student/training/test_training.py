import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT
from scaledown.config.flags import from_flags
from scaledown.config.train import TrainConfig
from scaledown.errors import InputError, MissingExtraError, ModelError, RunDirectoryError, UsageError
from scaledown.models.sources import resolve
from scaledown.student.batch import collate
from scaledown.student.model import LOSS_WEIGHTS, ScaleDownModel
from scaledown.student.settings import ScaleDownConfig
from scaledown.student.train import main
from scaledown.student.training import setup
from scaledown.student.training.checkpoints import delete_old, newest_checkpoint
from scaledown.student.training.learning_rates import parameter_groups
from scaledown.student.training.passes import Passes, Size
from scaledown.student.training.run import Trained, train
from scaledown.student.training.run import _device as device_of
from scaledown.student.training.schedule import Schedule
from scaledown.student.training.setup import make_trainer, reporters
from scaledown.student.training.summary import training_summary
from scaledown.student.training.trainer import StudentTrainer
from scaledown.student.training.training_data import load_parts
from web import Server

WORDS = ["red", "blue", "green", "tall", "small", "river", "city", "tree", "bird", "stone", "wind", "fire"]


def records(count: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [
        {
            "query": f"What is {' '.join(rng.choices(WORDS, k=rng.randint(1, 5)))} {number}?",
            "documents": [
                f"Article {number // 2}\n{' '.join(rng.choices(WORDS, k=rng.randint(2, 20)))}"
                for _ in range(rng.randint(1, 3))
            ],
            "answer": " ".join(rng.choices(WORDS, k=rng.randint(1, 6))),
        }
        for number in range(count)
    ]


def with_scores(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**record, "reranking_scores": [2.5, -1.0, 0.5][: len(record["documents"])]} for record in content
    ]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("training") / "train_data.json"
    path.write_text(json.dumps(with_scores(records(24))))
    return path


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """So that equal means equal on a busy machine, and tiny products are not slowed by their threads."""
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
            "num_layers": 1,
            "batch_size": 6,
            "micro_batch_size": 3,
            "num_epochs": 2.0,
            "eval_fraction": 0.2,
            "eval_steps": 3,
            "report_to": "none",
            "device": "cpu",
        }
        return TrainConfig(output_dir=str(tmp_path / output), **settings | changes)

    return make


def weights(result: Trained) -> dict[str, torch.Tensor]:
    return load_file(Path(result.output) / "model.safetensors")


def history(result: Trained) -> list[dict[str, Any]]:
    newest = newest_checkpoint(Path(result.output))
    assert newest is not None
    found: list[dict[str, Any]] = json.loads((newest / "training.json").read_text())["log"]
    return found


def assert_same(one: Trained, other: Trained) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert history(one) == history(other)


@pytest.fixture
def undisturbed(setting: Setting) -> Trained:
    return train(setting("undisturbed"))


def interrupt_at(monkeypatch: pytest.MonkeyPatch, call: int, *, training: bool) -> None:
    """Ctrl-C during the n-th forward pass in training, or in evaluation."""
    original = Passes._losses
    seen = 0

    def losses(self: Any, *rest: Any) -> Any:
        nonlocal seen
        seen += self.model.training is training
        if seen == call and self.model.training is training:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *rest)

    monkeypatch.setattr(Passes, "_losses", losses)


# Two passes a step and an evaluation, and one that tries the largest examples first: the 10th is in the
# middle of step 5, the 3rd in that of evaluation 2.
@pytest.mark.parametrize(("call", "training"), [(10, True), (3, False)])
def test_resumed_run_is_the_undisturbed_one(
    call: int,
    training: bool,
    undisturbed: Trained,
    setting: Setting,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = setting("disturbed", resume=True)
    with monkeypatch.context() as patch, caplog.at_level("WARNING", "scaledown"):
        interrupt_at(patch, call, training=training)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    folder = newest_checkpoint(Path(config.output_dir))
    assert folder is not None
    assert folder.name == ("checkpoint-4" if training else "checkpoint-3")
    assert f"kept in {folder}: the same command with --resume goes on from there" in caplog.text
    assert not (Path(config.output_dir) / "model.safetensors").exists()
    resumed = train(config)
    assert_same(undisturbed, resumed)
    assert resumed.loss == undisturbed.loss
    assert resumed.held_out_loss == undisturbed.held_out_loss


def test_run_is_repeated_by_its_seed(undisturbed: Trained, setting: Setting) -> None:
    assert_same(undisturbed, train(setting("again")))
    other = train(setting("other", seed=1))
    assert history(undisturbed)[0] != history(other)[0]


def test_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for step in (5, 20, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-5" / "training.json").write_text('{"step": 5}')
    (tmp_path / "checkpoint-20" / "training.json").write_text('{"step": 20}')
    (tmp_path / "checkpoint-100" / "training.json").write_text('{"st')
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.name == "checkpoint-20"


def test_checkpoint_of_an_earlier_version_is_refused(undisturbed: Trained, setting: Setting) -> None:
    output = Path(undisturbed.output)
    for place in output.glob("checkpoint-*"):
        (place / "training.json").rename(place / "trainer_state.json")
    memory = json.loads((output / "settings.json").read_text())
    del memory["result"]
    (output / "settings.json").write_text(json.dumps(memory))
    for resume in (True, False):
        with pytest.raises(
            RunDirectoryError, match=r"checkpoint-7 was written by version 0\.6, .* to start again"
        ):
            train(setting("undisturbed", resume=resume))


def test_nothing_in_a_checkpoint_is_a_pickle(undisturbed: Trained) -> None:
    newest = newest_checkpoint(Path(undisturbed.output))
    assert newest is not None
    assert {"optimizer.safetensors", "random-0.safetensors"} < {path.name for path in newest.iterdir()}
    kinds = {path.suffix for path in newest.rglob("*") if path.is_file()}
    assert kinds <= {".safetensors", ".json", ".jinja", ".md", ".txt"}
    model = ScaleDownModel.from_pretrained(newest)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights(undisturbed).items())


@pytest.mark.parametrize(("best", "left"), [(0, {90, 100}), (20, {20, 90}), (90, {90, 100}), (7, {90, 100})])
def test_the_newest_checkpoint_and_the_best_are_kept(best: int, left: set[int], tmp_path: Path) -> None:
    for step in (20, 80, 90, 100):  # the last one, of before a crash, was not finished
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-of-mine").mkdir()
    delete_old(tmp_path, 90, best)
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint-of-mine",
        *(f"checkpoint-{step}" for step in left),
    }


def test_early_stopping_waits_for_so_many_evaluations_in_vain() -> None:
    def stops(*losses: float) -> bool:
        log = [{"eval_loss": loss, "step": step} for step, loss in enumerate(losses)]
        return Schedule(100, patience=2).is_finished(len(losses), log)

    assert [stops(), stops(3.0), stops(3.0, 3.0), stops(3.0, 2.0, 2.5)] == [False] * 4
    assert [stops(3.0, 3.0, 3.0), stops(3.0, 2.0, float("nan"), 2.5), stops(2.0, 1.0, 3.0, 1.0)] == [True] * 3
    assert not stops(float("nan"), float("nan"), 2.0)


def test_run_that_finds_no_model_leaves_no_folder(setting: Setting, tmp_path: Path) -> None:
    config = setting(generator_model=str(tmp_path / "no" / "model"))
    with pytest.raises(ModelError, match="there is no such folder or file"):
        train(config)
    assert not Path(config.output_dir).exists()


def test_interruption_before_the_first_step_keeps_nothing(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch, caplog.at_level("WARNING", "scaledown"):
        interrupt_at(patch, 1, training=True)
        with pytest.raises(KeyboardInterrupt):
            train(setting())
    assert "nothing was saved" in caplog.text
    assert train(setting()).steps == 7


def test_folder_is_held_from_the_first_checkpoint_on(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    for batch, call in ((6, 1), (8, 10)):  # before the first step, and after some
        with monkeypatch.context() as patch:
            interrupt_at(patch, call, training=True)
            with pytest.raises(KeyboardInterrupt):
                train(setting(batch_size=batch))
    with pytest.raises(RunDirectoryError, match="holds a run with another --batch_size: 8 there, 6 here"):
        train(setting())


@pytest.mark.parametrize("name", [".", "/dev/stdin"])
def test_training_data_that_is_no_file_is_refused_at_once(name: str, setting: Setting) -> None:
    with pytest.raises(InputError, match="is a folder|can be read only once"):
        train(setting(train_data=(name,)))
    assert not Path(setting().output_dir).exists()


def trainer_of(config: TrainConfig, folder: Path) -> StudentTrainer:
    torch.manual_seed(0)
    settings = ScaleDownConfig(
        num_layers=1,
        doc_max_length=40,
        compression_rate=8,
        enable_reranking=config.enable_reranking,
        generator_training=config.generator_training,
    )
    model = ScaleDownModel.build(settings, resolve(config.generator_model))
    folder.mkdir(exist_ok=True)
    taught, held, _ = load_parts(config, folder)
    return make_trainer(model, config, taught, held, "cpu")


@pytest.mark.parametrize("micro", [1, 4, 5])
def test_accumulated_gradients_are_those_of_one_batch(micro: int, setting: Setting, tmp_path: Path) -> None:
    config = setting(enable_reranking=True, generator_training="full", batch_size=10, micro_batch_size=micro)
    trainer = trainer_of(config, tmp_path / "work")
    examples = [trainer.batches.examples[place] for place in trainer.batches.places[0]]
    assert len(examples) == 10
    model = trainer.model.train()
    expected = model(**collate(examples)).loss
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    losses = trainer.passes.gradients(examples, rehearses=True)
    loss = sum(LOSS_WEIGHTS[name] * value for name, value in losses.items())
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)


def test_a_process_with_fewer_examples_goes_along_and_adds_nothing(setting: Setting, tmp_path: Path) -> None:
    """As one of several that share a model."""
    passes = trainer_of(setting(generator_training="full", micro_batch_size=2), tmp_path / "work").passes
    examples = [passes._stand_in] * 3
    found = []
    for is_shared, most in ((False, 3), (True, 3), (True, 7)):
        passes.is_shared = is_shared
        passes.optimizer.zero_grad()
        losses = passes._pass(examples, most, Size(3 * len(examples[0].answer_ids), 3))
        found.append((losses, {name: p.grad for name, p in passes.model.named_parameters()}))
    for losses, gradients in found[1:]:
        torch.testing.assert_close(losses, found[0][0])
        torch.testing.assert_close(gradients, found[0][1])


def test_out_of_memory_halves_micro_batches_and_changes_nothing_else(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small = train(setting("small", micro_batch_size=1, eval_steps=2))
    original = ScaleDownModel.forward

    def forward(self: Any, groups: Any, ids: torch.Tensor, *rest: Any, **more: Any) -> Any:
        if len(ids) > (1 if self.training else 2):
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return original(self, groups, ids, *rest, **more)

    monkeypatch.setattr(ScaleDownModel, "forward", forward)
    with caplog.at_level("WARNING", "scaledown"):
        large = train(setting("large", micro_batch_size=6, eval_steps=2))
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        "out of memory: micro batches of 3 from here on",
        "out of memory: micro batches of 2 from here on",
        "out of memory: micro batches of 1 from here on",
    ]
    one, other = weights(small), weights(large)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_one_example_that_does_not_fit_is_an_error(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, **_: Any) -> Any:
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(ScaleDownModel, "forward", forward)
    with pytest.raises(ModelError, match="out of memory with --micro_batch_size 1: .*--gradient_checkpoint"):
        train(setting(eval_fraction=0.0))


def test_evaluation_does_not_change_training(setting: Setting) -> None:
    often, never = train(setting("often", eval_steps=1)), train(setting("never", eval_steps=1000))
    one, other = weights(often), weights(never)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert often.held_out_loss == never.held_out_loss


def test_learning_rates_reach_their_parameters(setting: Setting, tmp_path: Path) -> None:
    config = setting(enable_reranking=True, learning_rate_generator=0.2, learning_rate_compressor=0.1)
    trainer = trainer_of(config, tmp_path / "work")
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    seen = set()
    for group in trainer.passes.optimizer.param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            seen.add(name)
            assert parameter.dtype is torch.float32
            assert group["lr"] == (0.2 if name.startswith("generator.") else 0.1)
            plain = parameter.ndim < 2 or name in {"memory", "rerank_token"}
            assert group["weight_decay"] == (0.0 if plain else 0.1)
    assert seen == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {"memory", "rerank_token", "score.weight", "score.bias"} <= seen
    assert any("lora_A" in name for name in seen)


def test_frozen_generator_has_no_group(setting: Setting, tmp_path: Path) -> None:
    trainer = trainer_of(setting(generator_training="frozen"), tmp_path / "work")
    groups = parameter_groups(trainer.model, 1.0, 2.0)
    assert {group["name"] for group in groups} == {"compressor"}


def test_schedule_is_linear_with_warm_up(setting: Setting) -> None:
    result = train(
        setting(max_steps=40, batch_size=1, micro_batch_size=1, eval_fraction=0.0, generator_training="full")
    )
    rates = [entry["learning_rate_compressor"] for entry in history(result) if "loss" in entry]
    assert rates[:3] == pytest.approx([0.0, 2.5e-5, 5e-5])
    assert rates[2:] == pytest.approx([5e-5 * (40 - step) / 38 for step in range(2, 40)])
    generator = [entry["learning_rate_generator"] for entry in history(result) if "loss" in entry]
    assert generator == pytest.approx([2 * rate for rate in rates])


def test_saved_model_is_the_trained_one_and_reranks(setting: Setting) -> None:
    result = train(setting(enable_reranking=True))
    assert result.held_out_loss is not None
    model = ScaleDownModel.from_pretrained(result.output)
    saved = weights(result)
    loaded = model.state_dict()
    assert saved.keys() <= loaded.keys()
    assert all(torch.equal(loaded[name].float(), saved[name].float()) for name in saved)
    assert len(model.rerank("What?", ["one", "two"])) == 2
    logged = [entry for entry in history(result) if "loss" in entry]
    assert all(
        entry["loss"] == pytest.approx(entry["answer_loss"] + 0.05 * entry["rerank_loss"]) for entry in logged
    )


def test_training_lowers_the_loss(setting: Setting) -> None:
    result = train(
        setting(
            max_steps=60,
            eval_fraction=0.0,
            generator_training="full",
            learning_rate_generator=3e-3,
            learning_rate_compressor=3e-3,
        )
    )
    assert result.loss < result.loss_before / 2


@pytest.mark.parametrize("save_steps", [0, 7])
def test_early_stopping_keeps_the_best(save_steps: int, setting: Setting) -> None:
    config = setting(
        early_stopping_patience=2,
        eval_steps=2,
        save_steps=save_steps,
        max_steps=60,
        generator_training="full",
        learning_rate_generator=0.05,
        learning_rate_compressor=0.05,
    )
    result = train(config)
    assert result.steps < result.planned_steps == 60
    losses = {entry["step"]: entry["eval_loss"] for entry in history(result) if "eval_loss" in entry}
    assert "stopped early" in training_summary(result)
    best = min((loss, step) for step, loss in losses.items())
    if best[1]:
        assert result.held_out_loss == best[0]
        kept = load_file(Path(result.output) / f"checkpoint-{best[1]}" / "model.safetensors")
        assert all(torch.equal(kept[name], value) for name, value in weights(result).items())


def test_training_that_only_loses_is_reported(setting: Setting, caplog: pytest.LogCaptureFixture) -> None:
    rates = {"learning_rate_generator": 5.0, "learning_rate_compressor": 5.0}
    with caplog.at_level("WARNING", "scaledown"):
        result = train(setting(early_stopping_patience=1, eval_steps=1, max_steps=30, **rates))
    losses = [entry["eval_loss"] for entry in history(result) if "eval_loss" in entry]
    assert min(losses) == losses[0], "otherwise this test shows nothing"
    assert "no evaluation had a lower held-out loss than the one before training" in caplog.text


def test_gradient_checkpointing_and_bfloat16_train(setting: Setting) -> None:
    plain = train(setting("plain", max_steps=2))
    again = train(setting("again", max_steps=2, gradient_checkpointing=True))
    assert again.loss == pytest.approx(plain.loss, rel=1e-4)
    half = train(setting("half", max_steps=2, dtype="bfloat16"))
    assert half.loss == pytest.approx(plain.loss, rel=0.05)
    trained = {value.dtype for name, value in weights(half).items() if "compressor" in name or "lora" in name}
    assert trained == {torch.float32}


def test_gradients_reach_the_compressor_through_layers_computed_again(
    setting: Setting, tmp_path: Path
) -> None:
    """Through a frozen generator with LoRA that is given embeddings."""
    found = []
    for recomputes in (False, True):
        trainer = trainer_of(setting(gradient_checkpointing=recomputes), tmp_path / "work")
        examples = [trainer.batches.examples[place] for place in trainer.batches.places[0]]
        trainer.passes.gradients(examples)
        layers = [module for module in trainer.model.modules() if hasattr(module, "gradient_checkpointing")]
        assert any(module.gradient_checkpointing for module in layers) is recomputes
        found.append({name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad})
    kept, again = found
    for name, gradient in kept.items():
        assert gradient is not None
        torch.testing.assert_close(again[name], gradient, msg=name)
    reached = {name for name, gradient in again.items() if gradient is not None and gradient.abs().sum() > 0}
    assert {"memory", "compressor.layers.0.self_attn.q_proj.weight"} < reached
    assert any("lora_B" in name for name in reached)


def test_large_models_compute_activations_again(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recomputes(**changes: Any) -> bool:
        model = trainer_of(setting(**changes), tmp_path / "work").model
        return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())

    assert not recomputes()
    monkeypatch.setattr(setup, "LARGE", 1000)
    assert recomputes()
    assert not recomputes(gradient_checkpointing=False)


def test_run_resumes_with_gradient_checkpointing(setting: Setting) -> None:
    """As where memory did not suffice; a run of before has the old default in its settings."""
    assert train(setting(max_steps=1, gradient_checkpointing=False)).steps == 1
    assert train(setting(max_steps=1)).already_done
    assert train(setting(max_steps=1, gradient_checkpointing=True)).already_done


@pytest.mark.parametrize(("value", "found"), [("null", None), ("true", True), ("false", False)])
def test_gradient_checkpointing_in_a_settings_file(value: str, found: bool | None, tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(f'{{"parameters": {{"train_data": ["x"], "gradient_checkpointing": {value}}}}}')
    assert from_flags({"config": str(path)}, TrainConfig).gradient_checkpointing is found
    path.write_text('{"gradient_checkpointing": 1}')
    with pytest.raises(UsageError, match="gradient_checkpointing must be bool, not 1"):
        from_flags({"config": str(path)}, TrainConfig)


def test_idle_gpus_are_reported(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with caplog.at_level("WARNING", "scaledown"):
        assert device_of(setting(device="auto")) == "cuda"
    assert "7 are idle; to train on all, stop and run torchrun --nproc_per_node 8 -m" in caplog.text
    assert " -m scaledown train, with the same flags" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING", "scaledown"):
        device_of(setting(device="auto"), "train --config a.json")
    again = "; then repeat this command"
    assert f"torchrun --nproc_per_node 8 -m scaledown train --config a.json{again}" in caplog.text
    caplog.clear()
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    with caplog.at_level("WARNING", "scaledown"):
        assert device_of(setting(device="auto")) == "cuda:3"
    assert not caplog.text


def test_separate_compressor_trains(setting: Setting, models: dict[str, Path]) -> None:
    result = train(setting(compressor=str(models["splade"]), eval_fraction=0.0, max_steps=2))
    assert result.steps == 2
    assert any(name.startswith("mapping.") for name in weights(result))


@pytest.mark.slow
def test_real_small_encoder_trains(setting: Setting) -> None:
    """SPLADE-tiny, a BERT, stands for the separate encoders that a hub has."""
    result = train(
        setting(
            compressor="bundled:splade-tiny",
            eval_fraction=0.0,
            max_steps=25,
            generator_training="full",
            learning_rate_generator=3e-3,
            learning_rate_compressor=1e-3,
        )
    )
    assert result.loss < 0.8 * result.loss_before
    model = ScaleDownModel.from_pretrained(result.output)
    assert model.compressor.config.model_type == "bert"
    assert isinstance(model.answer("Why?", ["Because."], max_new_tokens=3), str)


def test_curves_for_tensorboard(setting: Setting) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(setting(report_to="tensorboard", max_steps=4))
    (events,) = {path.parent for path in Path(result.output).rglob("events.out.tfevents.*")}
    curves = EventAccumulator(str(events)).Reload()
    assert len(curves.Scalars("train/loss")) == 4
    assert {"train/learning_rate_compressor", "eval/loss"} <= set(curves.Tags()["scalars"])


def test_held_out_file(setting: Setting, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "held.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records(4)))
    with caplog.at_level("WARNING", "scaledown"):
        result = train(setting(eval_data=(str(path),), max_steps=1))
    assert (result.examples, result.held_out, result.shared) == (24, 4, 4)
    assert result.held_out_loss is not None
    assert "4 of 4 records of --eval_data share an article or the question with training" in caplog.text


def test_large_held_out_part_is_evaluated_in_part(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scaledown.student.training.setup.EVALUATED", 3)
    trainer = trainer_of(setting(eval_fraction=0.4, batch_size=2, micro_batch_size=1), tmp_path / "work")
    _, held, _ = load_parts(setting(eval_fraction=0.4), tmp_path / "work")
    assert held is not None
    count = len(held.rows)
    assert count > 6
    assert trainer._held_out is not None
    places = trainer._held_out.places
    assert places == [[held.rows[0], held.rows[count // 3]], [held.rows[2 * count // 3]]]


def test_gold_need_not_have_answers_to_held_out_data(setting: Setting, tmp_path: Path) -> None:
    gold, held = tmp_path / "gold.jsonl", tmp_path / "held.jsonl"
    taught = json.loads(Path(setting().train_data[0]).read_text())
    gold.write_text(json.dumps({"question": taught[0]["query"], "answers": ["Ada"]}))
    held.write_text(json.dumps({"query": "Another?", "documents": ["Z\ntext"], "answer": "x"}))
    parts = load_parts(setting(eval_data=(str(held),), gold=(str(gold),)), tmp_path)
    assert parts.held_out is not None
    assert parts.held_out.examples[0].answer == "x"


def test_question_too_long_for_a_text_prompt_is_compressed(setting: Setting, tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    content = records(8)
    content[0]["query"] = "who " * 20_000
    path.write_text(json.dumps(content))
    config = setting(train_data=(str(path),), text_fraction=0.5, closed_book_fraction=0.5, eval_fraction=0.0)
    examples = trainer_of(config, tmp_path / "work").batches.examples
    assert examples[0].documents
    assert not examples[1].documents


def test_micro_batch_and_checkpoints_may_change_in_a_run(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a run that no longer fits into memory continues."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 10, training=True)
        train(setting("stopped"))
    result = train(setting("stopped", micro_batch_size=1, save_steps=1, resume=True))
    assert result.steps == result.planned_steps
    assert history(result)[-2]["micro_batch_size"] == 1


def test_batch_that_processes_cannot_share_is_refused_at_once(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(
        "scaledown.student.training.run.load_parts", lambda *_: pytest.fail("the data was read")
    )
    with pytest.raises(UsageError, match="--batch_size 6 must be a multiple of the 4 processes: give 8"):
        train(setting())


def test_checkpoint_that_only_some_processes_have_is_refused(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(setting(), tmp_path / "work")
    monkeypatch.setattr(trainer.passes, "sum", lambda *_: [7])  # another process is at step 7
    with pytest.raises(RunDirectoryError, match="must be on a disk that all machines share"):
        trainer.run(None)


def test_cut_documents_are_reported(setting: Setting, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "scaledown"):
        result = train(setting(doc_max_length=10, max_steps=1, eval_fraction=0.0))
    assert result.documents.cut > 0
    assert re.search(r"\d+ of \d+ documents have more than --doc_max_length 10 tokens", caplog.text)
    assert "cut to 10" in training_summary(result)
    config = json.loads((Path(result.output) / "config.json").read_text())
    assert config["doc_max_length"] == 10


def test_one_long_document_is_reported(
    setting: Setting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = records(60)
    content[7]["documents"][0] = "word " * 300
    path = tmp_path / "long.json"
    path.write_text(json.dumps(content))
    with caplog.at_level("WARNING", "scaledown"):
        result = train(setting(train_data=(str(path),), max_steps=1, eval_fraction=0.0))
    assert result.doc_max_length == result.documents.longest > 300
    most = result.documents.most
    memory = -(-result.documents.longest // 16)
    assert f"so each document gets {memory} memory tokens; 99% have at most {most} tokens" in caplog.text
    assert f"at most {most / memory:.1f}x: --doc_max_length {most} cuts the others" in caplog.text


def test_progress_does_not_exceed_the_examples(
    setting: Setting, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scaledown.run.progress.LINE_EVERY_SECONDS", 0.0)
    with caplog.at_level("INFO", "scaledown"):
        train(setting(max_steps=1, batch_size=6, micro_batch_size=4))  # the first step tries its longest part
    shown = re.findall(r"train: (\d+)/(\d+) examples", caplog.text)
    assert shown[-1] == ("6", "6")
    assert all(int(done) <= int(total) for done, total in shown)


def test_summary_has_the_size_of_checkpoints(setting: Setting) -> None:
    result = train(setting(max_steps=1))
    assert re.search(r"MB in .*/checkpoint-\*, which you can delete now", training_summary(result))
    for folder in Path(result.output).glob("checkpoint-*"):
        shutil.rmtree(folder)
    assert "checkpoint-" not in training_summary(result)
    assert train(setting(max_steps=1)).already_done


def test_finished_run_is_left_alone(
    undisturbed: Trained, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scaledown.student.training.run._train", lambda *_: pytest.fail("it trains again"))
    again = train(setting("undisturbed"))
    assert again == undisturbed._replace(already_done=True)
    assert training_summary(again).startswith("nothing to do: this run is finished")


def test_other_settings_in_the_same_folder_are_refused(
    undisturbed: Trained, setting: Setting, tmp_path: Path
) -> None:
    with pytest.raises(RunDirectoryError, match=r"another --batch_size: 6 there, 3 here: use the same, or"):
        train(setting("undisturbed", batch_size=3))
    other = tmp_path / "other.json"
    other.write_text(json.dumps(records(8)))
    with pytest.raises(RunDirectoryError, match=r"--train_data \(other files, or their content"):
        train(setting("undisturbed", train_data=(str(other),)))


def test_folder_with_something_else_is_refused(setting: Setting, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(RunDirectoryError, match=r"holds config\.json but not a run: choose another"):
        train(setting())


def test_unfinished_run_needs_resume(undisturbed: Trained, setting: Setting) -> None:
    path = Path(undisturbed.output) / "settings.json"
    memory = json.loads(path.read_text())
    del memory["result"]
    path.write_text(json.dumps(memory))
    with pytest.raises(RunDirectoryError, match="has checkpoint-7 of this run: --resume goes on from there"):
        train(setting("undisturbed"))
    again = train(setting("undisturbed", resume=True))
    assert (again.steps, again.loss) == (undisturbed.steps, undisturbed.loss)


def test_reporter_that_is_not_installed_is_refused(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    assert reporters("auto") == reporters("none") == []
    with pytest.raises(MissingExtraError, match="--report_to wandb needs it: pip install wandb"):
        reporters("wandb")


def test_training_data_behind_a_url(
    undisturbed: Trained,
    setting: Setting,
    data: Path,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SCALEDOWN_CACHE", str(tmp_path / "cache"))
    server.files["train.json"] = data.read_bytes()
    url = server.url("train.json?signature=secret", "user:secret@")
    result = train(setting("remote", train_data=(url,)))
    assert_same(result, undisturbed)
    assert train(setting("remote", train_data=(url,))).already_done
    settings = (Path(result.output) / "settings.json").read_text()
    assert "127.0.0.1" in settings
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"secret" in path.read_bytes()]


def test_reranking_without_scores_is_refused(setting: Setting, tmp_path: Path) -> None:
    path = tmp_path / "plain.json"
    path.write_text(json.dumps(records(8)))
    with pytest.raises(UsageError, match="--enable_reranking needs reranking_scores"):
        train(setting(train_data=(str(path),), enable_reranking=True))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"train_data": ()}, "no training data: give --train_data"),
        ({"batch_size": 0}, "--batch_size 0: must be at least 1"),
        ({"max_steps": -1}, "--max_steps -1: must not be negative"),
        ({"micro_batch_size": 7}, "--micro_batch_size 7 is above --batch_size 6"),
        ({"eval_fraction": 1.0}, "--eval_fraction 1.0"),
        ({"num_epochs": 0.0}, "--num_epochs 0.0: must be above 0"),
        ({"generator_training": "some"}, "--generator_training some: use one of lora, full, frozen"),
        ({"lora_dropout": 1.0}, "--lora_dropout 1.0: must be at least 0 and below 1"),
        ({"early_stopping_patience": 1, "eval_fraction": 0.0}, "needs held-out data"),
    ],
)
def test_contradictions_name_their_flags(setting: Setting, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        setting(**changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_layers": 3}, "--num_layers 3"),
        ({"compression_rate": 2}, "--compression_rate 2: use 4 to 128"),
        ({"device": "cuda:1"}, "--device cuda:1"),
        ({"dtype": "float16"}, "--dtype float16 trains on CUDA only"),
    ],
)
def test_unusable_settings_and_data_are_refused(
    setting: Setting, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises((UsageError, ModelError), match=match):
        train(setting(**changes))


def flags(config: TrainConfig, *more: str) -> list[str]:
    return [
        *("--train_data", config.train_data[0], "--generator-model", config.generator_model),
        *("--output_dir", config.output_dir, "--num_layers", "1", "--device", "cpu", "--batch_size", "6"),
        *("--report_to", "none", "--eval_fraction", "0.2"),
        *more,
    ]


def test_errors_of_the_command_are_one_line(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--train_data", "/none.json", "--output_dir", setting().output_dir]) in {1, 2}
    assert main([*flags(setting()), "--bad", "1"]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 2
    assert printed[1].endswith("(see scaledown train --help)")


def test_settings_file_repeats_a_run(
    undisturbed: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = str(Path(undisturbed.output) / "settings.json")
    assert main(["--config", settings, "--log_level", "error"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(["--config", settings, "--output_dir", str(tmp_path / "copy"), "--log_level", "error"]) == 0
    assert_same(undisturbed, undisturbed._replace(output=str(tmp_path / "copy")))


@pytest.fixture
def environment(forked: None) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_command_line_end_to_end(setting: Setting, environment: dict[str, str]) -> None:
    words = [sys.executable, str(ROOT / "train.py"), *flags(setting(), "--max_steps", "3")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"20 examples, 3 steps\n", done.stdout)
    assert re.search(r"held out +\d+\.\d+ before training, \d+\.\d+ after; 4 examples", done.stdout)
    assert "3 steps are not enough to learn from: --max_steps N takes more" in done.stdout
    assert f"evaluate --model {setting().output_dir} --data FILE" in done.stdout.splitlines()[-1]
    assert "%|" not in done.stderr, "no bars where nobody looks"
    assert all(re.match(r"\d{4}-\d\d-\d\d ", line) for line in done.stderr.splitlines()), done.stderr


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LAUNCH = ["accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]


def by_two(
    script: Path, words: list[str], environment: dict[str, str], launcher: Sequence[str] = TORCHRUN
) -> subprocess.CompletedProcess[str]:
    """Run a script as two processes."""
    start = [sys.executable, "-m", *launcher, str(script), *words]
    return subprocess.run(start, capture_output=True, text=True, timeout=180, env=environment, check=False)


def assert_close(one: Trained, other: Trained) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, [*LAUNCH, "--cpu"]], ids=["torchrun", "accelerate"])
def test_two_processes_train_as_one(
    launcher: list[str], setting: Setting, environment: dict[str, str]
) -> None:
    alone = train(setting("alone", enable_reranking=True, generator_training="full", num_epochs=1.0))
    words = flags(setting("together"), "--eval_steps", "3", "--enable_reranking")
    done = by_two(ROOT / "train.py", [*words, "--generator_training", "full"], environment, launcher)
    assert done.returncode == 0, done.stderr
    together = alone._replace(output=setting("together").output_dir)
    assert done.stdout.count("20 examples, 4 steps") == 1
    assert_close(alone, together)
    losses = [
        [entry.get("loss", entry.get("eval_loss")) for entry in history(run)] for run in (alone, together)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_control_c_leaves_a_checkpoint(setting: Setting, environment: dict[str, str]) -> None:
    words = [sys.executable, str(ROOT / "train.py"), *flags(setting(), "--max_steps", "20000")]
    words += ["--eval_steps", "10000"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "held-out loss" in line:  # before the first step
                break
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        printed = process.stderr.read()
        assert process.wait(timeout=30) == 130, printed
    found = re.search(
        r"stopped after step (\d+) of 20000, kept in (\S+): the same command with --resume", printed
    )
    assert found, printed
    assert (Path(found[2]) / "training.json").exists()
    assert printed.splitlines()[-1] == "interrupted"
    shutil.rmtree(setting().output_dir)


@pytest.mark.slow
def test_two_processes_stop_together_and_resume_bit_for_bit(
    setting: Setting, environment: dict[str, str]
) -> None:
    def words(output: str) -> list[str]:
        return flags(setting(output), "--max_steps", "60", "--eval_steps", "1000", "--save_steps", "10")

    done = by_two(ROOT / "train.py", words("undisturbed"), environment)
    assert done.returncode == 0, done.stderr
    start = [sys.executable, "-m", *TORCHRUN, str(ROOT / "train.py"), *words("stopped")]
    with subprocess.Popen(start, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        while not (Path(setting("stopped").output_dir) / "checkpoint-10" / "training.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
        printed = process.stderr.read()
        process.wait(timeout=60)
    stopped = Path(setting("stopped").output_dir)
    assert not (stopped / "model.safetensors").exists(), printed
    done = by_two(ROOT / "train.py", [*words("stopped"), "--resume"], environment)
    assert done.returncode == 0, done.stderr
    undisturbed = Path(setting("undisturbed").output_dir)
    names = ("model.safetensors", "checkpoint-60/optimizer.safetensors", "checkpoint-60/training.json")
    for name in names:
        assert (stopped / name).read_bytes() == (undisturbed / name).read_bytes(), name


FULL_GPU = """
import os, sys, torch
from scaledown.student.model import ScaleDownModel
from scaledown.student.train import main

original, calls = ScaleDownModel.forward, 0

def forward(self, *arguments, **keywords):
    global calls
    calls += self.training
    if self.training and os.environ["RANK"] == "1" and calls == 3:
        raise torch.OutOfMemoryError("HIP out of memory")
    return original(self, *arguments, **keywords)

ScaleDownModel.forward = forward
sys.exit(main())
"""


@pytest.mark.slow
def test_all_processes_halve_when_one_is_full(
    setting: Setting, environment: dict[str, str], tmp_path: Path
) -> None:
    """In the second pass of the first step, when it has gradients; the largest examples were tried before."""
    changes: dict[str, Any] = {"generator_training": "full", "num_epochs": 1.0, "micro_batch_size": 1}
    alone = train(setting("alone", **changes))
    script = tmp_path / "full.py"
    script.write_text(FULL_GPU)
    words = flags(setting("together"), "--eval_steps", "3", "--generator_training", "full")
    done = by_two(script, [*words, "--micro_batch_size", "2"], environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("out of memory: micro batches of 1 from here on") == 1
    together = alone._replace(output=setting("together").output_dir)
    assert_close(alone, together)
    assert {entry["micro_batch_size"] for entry in history(together) if "loss" in entry} == {1}


# As on a machine with two GPUs, but for the arithmetic, which the CPU does.
TWO_GPUS = """
import os, sys, torch
from accelerate.state import DistributedType, PartialState
from scaledown.student import train
from scaledown.student.training import run

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
{}
sys.exit(train.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, [*LAUNCH, "--multi_gpu"]], ids=["torchrun", "accelerate"])
def test_two_processes_on_two_gpus_train(
    launcher: list[str], setting: Setting, environment: dict[str, str], tmp_path: Path
) -> None:
    script = tmp_path / "two_gpus.py"
    believes = "torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 2"
    script.write_text(TWO_GPUS.format(believes))
    alone = train(setting("alone", num_epochs=1.0, generator_training="full"))
    words = flags(setting("together"), "--eval_steps", "3", "--generator_training", "full")
    words[words.index("--device") + 1] = "auto"
    done = by_two(script, [*words, "--dtype", "float32"], environment, launcher)
    assert done.returncode == 0, done.stderr
    assert "cuda:0, float32" in done.stderr
    assert_close(alone, alone._replace(output=setting("together").output_dir))


FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
SHARING = {
    "fsdp": FSDP,
    "zero2": DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}
# DeepSpeed would compile a part of its own that a CPU uses.
QUICK_DEEPSPEED = """
if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
    import deepspeed.comm.torch
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", SHARING)
def test_two_processes_share_a_model(
    way: str, setting: Setting, environment: dict[str, str], tmp_path: Path
) -> None:
    """As `accelerate launch` puts it into the environment; resumed before the last step."""
    if way != "fsdp":
        pytest.importorskip("deepspeed", reason="no DeepSpeed: DS_BUILD_OPS=0 pip install deepspeed")
    script = tmp_path / "shared.py"
    script.write_text(TWO_GPUS.format(f"run.choose_device = lambda _: 'cuda:0'{QUICK_DEEPSPEED}"))
    environment |= SHARING[way]
    alone = train(setting("alone", num_epochs=1.0, generator_training="full"))
    words = flags(
        setting("together"), "--eval_steps", "3", "--generator_training", "full", "--dtype", "float32"
    )
    words[words.index("--device") + 1] = "auto"
    done = by_two(script, words, environment)
    assert done.returncode == 0, done.stderr
    output = Path(setting("together").output_dir)
    together = alone._replace(output=str(output))
    assert_close(alone, together)
    before = weights(together)
    shutil.rmtree(output / "checkpoint-4")
    (output / "model.safetensors").unlink()
    memory = json.loads((output / "settings.json").read_text())
    del memory["result"]
    (output / "settings.json").write_text(json.dumps(memory))
    done = by_two(script, [*words, "--resume"], environment)
    assert done.returncode == 0, done.stderr
    assert all(torch.equal(value, before[name]) for name, value in weights(together).items())


@pytest.mark.slow
@pytest.mark.parametrize("way", SHARING)
@pytest.mark.parametrize("kind", ["n_layers", "pointer"])
def test_processes_that_share_a_model_run_the_compressor_equally_often(
    kind: str, way: str, setting: Setting, environment: dict[str, str], tmp_path: Path
) -> None:
    """Although some documents are long, and some passes have none."""
    if way != "fsdp":
        pytest.importorskip("deepspeed", reason="no DeepSpeed: DS_BUILD_OPS=0 pip install deepspeed")
    content = with_scores(records(24))
    for record in content[::3]:
        record["documents"][0] = "Tides. " + "iron tower " * 200
    (data := tmp_path / "mixed.json").write_text(json.dumps(content))
    script = tmp_path / "shared.py"
    script.write_text(TWO_GPUS.format(f"run.choose_device = lambda _: 'cuda:0'{QUICK_DEEPSPEED}"))
    changes = {"compressor": kind, "text_fraction": 0.3, "closed_book_fraction": 0.2, "micro_batch_size": 1}
    if kind == "n_layers":
        changes["enable_reranking"] = True
    settings = {"train_data": (str(data),), "num_epochs": 1.0, "generator_training": "full"}
    alone = train(setting("alone", **settings, **changes))
    words = flags(setting("together", train_data=(str(data),)), "--eval_steps", "3", "--dtype", "float32")
    for name, value in changes.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    words[words.index("--device") + 1] = "auto"
    done = by_two(script, [*words, "--generator_training", "full"], environment | SHARING[way])
    assert done.returncode == 0, done.stderr
    assert_close(alone, alone._replace(output=setting("together").output_dir))


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--generator_4bit", "--optimizer=adamw8bit"])
def test_shared_models_have_no_4_or_8_bits(
    flag: str, setting: Setting, environment: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra: quantization")
    script = tmp_path / "shared.py"
    script.write_text(TWO_GPUS.format("run.choose_device = lambda _: 'cuda:0'"))
    words = flags(setting(), "--dtype", "float32", flag)
    words[words.index("--device") + 1] = "auto"
    # Both processes have written their error before torchrun looks, and ends the other.
    done = by_two(script, words, environment | FSDP, [*TORCHRUN, "--monitor-interval", "3"])
    assert done.returncode != 0
    assert f"{flag.replace('=', ' ')}: not with FSDP or DeepSpeed" in done.stderr


@pytest.mark.slow
def test_killed_run_resumes_bit_for_bit(setting: Setting, environment: dict[str, str]) -> None:
    changes: dict[str, Any] = {"max_steps": 60, "eval_steps": 20, "micro_batch_size": 0, "num_epochs": 1.0}
    undisturbed = train(setting("undisturbed", **changes))
    words = flags(setting("killed"), "--max_steps", "60", "--eval_steps", "20")
    words = [sys.executable, str(ROOT / "train.py"), *words]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL, env=environment) as process:
        while not (Path(setting("killed").output_dir) / "checkpoint-20" / "training.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    killed = setting("killed", resume=True, **changes)
    assert not (Path(killed.output_dir) / "model.safetensors").exists()
    assert_same(undisturbed, train(killed))

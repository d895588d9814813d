"""A student whose generator has its frozen weights in 4 bits, and whose optimiser has its moments in 8."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("bitsandbytes", reason="needs the extra: quantization")

from scaledown.config.train import TrainConfig
from scaledown.errors import MissingExtraError, UsageError
from scaledown.models.sources import resolve
from scaledown.student.batch import collate
from scaledown.student.model import ScaleDownModel
from scaledown.student.settings import ScaleDownConfig
from scaledown.student.training import run as command
from scaledown.student.training import setup
from scaledown.student.training.encoded_examples import EncodedExamples
from scaledown.student.training.memory import memory_of
from scaledown.student.training.quantization import FourBitLinear, quantize
from scaledown.student.training.run import Trained, train
from scaledown.student.training.training_data import load_parts

RECORDS = [
    {
        "query": f"What is red or tall {number}?",
        "documents": [f"Article {number}\nThe tower is red.", f"Article {number}\nIt was built in {number}."],
        "answer": f"The tower {number}",
    }
    for number in range(12)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("training") / "train_data.json"
    path.write_text(json.dumps(RECORDS))
    return path


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """So that equal means equal on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def setting(models: dict[str, Path], data: Path, output: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "train_data": (str(data),),
        "generator_model": str(models["causal_lm"]),
        "num_layers": 1,
        "batch_size": 4,
        "eval_fraction": 0.0,
        "report_to": "none",
        "device": "cpu",
        "generator_4bit": True,
        "optimizer": "adamw8bit",
    }
    return TrainConfig(output_dir=str(output), **settings | changes)


def student(generator: Path, *, in_4bit: bool) -> ScaleDownModel:
    torch.manual_seed(0)
    settings = ScaleDownConfig(num_layers=1, doc_max_length=40, compression_rate=8, lora_dropout=0.0)
    model = ScaleDownModel.build(settings, resolve(str(generator)))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:  # which begin at zero, and nothing would reach LoRA's other half
            torch.nn.init.normal_(parameter, std=0.05)
    if in_4bit:
        quantize(model.generator)
    return model


def gradients(model: ScaleDownModel, config: TrainConfig, folder: Path) -> dict[str, torch.Tensor]:
    taught, _, _ = load_parts(config, folder)
    examples = EncodedExamples(taught.examples, model, config, trains=True)
    model.train()(**collate([examples[row] for row in range(4)])).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_those_of_the_same_values_in_float32(
    models: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    config = setting(models, data, tmp_path)
    rounded = student(models["causal_lm"], in_4bit=True)
    same = student(models["causal_lm"], in_4bit=False)
    same.load_state_dict(rounded.state_dict())
    found, expected = (gradients(model, config, tmp_path) for model in (rounded, same))
    assert found.keys() == expected.keys()
    assert {"memory", "compressor.layers.0.self_attn.q_proj.weight"} < found.keys()
    assert sum("lora_" in name for name in found) == 28, "two layers, seven products, two matrices"
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_frozen_layers_but_the_head_are_in_4_bits_and_nothing_trained_is(models: dict[str, Path]) -> None:
    plain, model = (student(models["causal_lm"], in_4bit=held) for held in (False, True))
    found = {name: module for name, module in model.named_modules() if isinstance(module, FourBitLinear)}
    assert len(found) == 14, "two layers, seven products"
    assert all(name.endswith(".base_layer") for name in found)
    assert not any(p.requires_grad and p.dtype is torch.uint8 for p in model.parameters())
    weights = sum(layer.in_features * layer.out_features for layer in found.values())
    saved = memory_of(plain).frozen - memory_of(model).frozen
    assert 0.86 < saved / (4 * weights) < 0.875, "half a byte and a scale for 64 weights, of 4 bytes each"
    assert memory_of(model).trained == memory_of(plain).trained


def test_moments_in_8_bits_are_counted_as_they_are(
    models: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    result = train(setting(models, data, tmp_path / "out", max_steps=1, generator_4bit=False))
    kept = load_file(tmp_path / "out" / "checkpoint-1" / "optimizer.safetensors")
    model = ScaleDownModel.from_pretrained(result.output)
    moments = sum(value.nbytes for name, value in kept.items() if not name.endswith("/step"))
    assert memory_of(model.float(), "adamw8bit").moments == moments < 0.7 * memory_of(model).moments


def weights(result: Trained) -> dict[str, torch.Tensor]:
    return load_file(Path(result.output) / "model.safetensors")


def test_quantized_run_resumes_bit_for_bit_and_saved_model_needs_no_bitsandbytes(
    models: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"max_steps": 4, "save_steps": 1, "eval_fraction": 0.3, "eval_steps": 1}
    undisturbed = train(setting(models, data, tmp_path / "one", **changes))
    stopped = setting(models, data, tmp_path / "two", resume=True, **changes)
    with monkeypatch.context() as patch:
        step = setup.StudentTrainer._step

        def dies(self: Any) -> None:
            if self.step == 2:
                raise MemoryError
            step(self)

        patch.setattr(setup.StudentTrainer, "_step", dies)
        with pytest.raises(MemoryError):
            train(stopped)
    resumed = train(stopped)
    one, two = weights(undisturbed), weights(resumed)
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    for name in ("optimizer.safetensors", "training.json"):
        files = [Path(run.output) / "checkpoint-4" / name for run in (undisturbed, resumed)]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    moments = load_file(files[0].with_name("optimizer.safetensors"))
    assert {str(value.dtype) for value in moments.values()} >= {"torch.uint8", "torch.float32"}
    assert {value.dtype for value in one.values()} == {torch.float32}, "what is saved are plain weights"
    assert "values of 4 bits (NF4)" in (Path(resumed.output) / "README.md").read_text()
    reloaded = ScaleDownModel.from_pretrained(resumed.output)
    assert not any(isinstance(module, FourBitLinear) for module in reloaded.modules())
    assert reloaded.config.generator_4bit
    assert isinstance(reloaded.answer("Why?", ["The tower is red."], max_new_tokens=3), str)


def test_saved_model_computes_the_trained_function(models: dict[str, Path], tmp_path: Path) -> None:
    model = student(models["causal_lm"], in_4bit=True).eval()
    model.save_pretrained(tmp_path)
    ids = torch.arange(30)[None]
    reloaded = ScaleDownModel.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            reloaded.generator(ids).logits, model.generator(ids).logits, rtol=1e-4, atol=1e-5
        )


def test_a_pretrained_student_is_held_in_4_bits_too(
    models: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    before = train(setting(models, data, tmp_path / "before", max_steps=1, generator_4bit=False))
    flags = {"generator_model": TrainConfig.generator_model, "num_layers": TrainConfig.num_layers}
    after = setting(models, data, tmp_path / "after", max_steps=1, pretrained_model=before.output, **flags)
    train(after)
    assert json.loads((tmp_path / "after" / "config.json").read_text())["generator_4bit"]


def test_quantized_training_lowers_the_loss(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    rates = {"learning_rate_generator": 3e-3, "learning_rate_compressor": 3e-3}
    result = train(setting(models, data, tmp_path / "out", max_steps=60, num_epochs=1.0, **rates))
    assert result.loss < result.loss_before / 2


def test_contradictions_and_a_missing_extra_are_reported(
    models: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="--generator_4bit: weights in 4 bits are not trained"):
        setting(models, data, tmp_path, generator_training="full")
    with pytest.raises(UsageError, match="--optimizer sgd: use one of"):
        setting(models, data, tmp_path, optimizer="sgd")
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match="--optimizer adamw8bit needs bitsandbytes: pip install"):
        train(setting(models, data, tmp_path / "out", generator_4bit=False))


def test_moments_are_paged_on_cuda_alone(
    models: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the driver moves them to the host's memory when the GPU's is full."""
    model = student(models["causal_lm"], in_4bit=True)
    config = setting(models, data, tmp_path)
    assert not setup._optimizer(model, config, "cpu").is_paged
    assert setup._optimizer(model, config, "cuda:0").is_paged

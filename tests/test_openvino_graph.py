"""A causal LM as OpenVINO's graph computes what the model does; a graph that does not is refused."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
)

from scaledown.devices.openvino import SignalStack
from scaledown.errors import ModelError
from scaledown.models import openvino as graphs
from scaledown.models.openvino import can_run, compiled, write_graph

pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install -e '.[openvino]'")


def loaded(models: dict[str, Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(models["causal_lm"], dtype=torch.float32).eval()


def read(graph: Path, ids: torch.Tensor) -> torch.Tensor:
    """The scores at each position of prompts without padding, [rows, length, vocabulary]."""
    rows, length = ids.shape
    given = {
        "input_ids": ids.numpy(),
        "attention_mask": np.ones((rows, length), np.int64),
        "position_ids": np.tile(np.arange(length), (rows, 1)),
        "beam_idx": np.arange(rows, dtype=np.int32),
    }
    return torch.from_numpy(
        compiled(graph, torch.float32).create_infer_request().infer(given)["logits"].copy()
    )


@pytest.mark.parametrize(("eight_bits", "least", "most"), [(False, 0.0, 1e-4), (True, 1e-3, 0.15)])
def test_scores_of_ids_are_those_of_the_model_with_and_without_rounding(
    eight_bits: bool, least: float, most: float, models: dict[str, Path], tmp_path: Path
) -> None:
    model, ids = loaded(models), torch.arange(40).reshape(2, 20) * 7 % 800
    write_graph(model, tmp_path / "model.xml", reads="ids", eight_bits=eight_bits)
    with torch.inference_mode():
        expected = model(ids).logits
    error = (read(tmp_path / "model.xml", ids) - expected).pow(2).mean().sqrt() / expected.std()
    assert least <= error < most


def test_rounded_weights_take_a_quarter(models: dict[str, Path], tmp_path: Path) -> None:
    for name, eight_bits in (("whole", False), ("rounded", True)):
        write_graph(loaded(models), tmp_path / f"{name}.xml", reads="ids", eight_bits=eight_bits)
    whole, rounded = ((tmp_path / f"{name}.bin").stat().st_size for name in ("whole", "rounded"))
    assert rounded < 0.4 * whole


def signal_stack() -> tuple[int | None, int]:
    """Where this thread handles signals, and the size."""
    found = SignalStack()
    found.exchange()
    return found.start, found.size


def test_models_that_end_in_any_order_leave_the_signal_stack(models: dict[str, Path], tmp_path: Path) -> None:
    """Otherwise the next Ctrl-C is a segmentation fault."""
    before = signal_stack()
    write_graph(loaded(models), tmp_path / "model.xml", reads="ids")
    alive = [compiled(tmp_path / "model.xml", torch.float32).create_infer_request() for _ in range(3)]
    assert signal_stack() == before
    for place in (0, 1, 0):
        del alive[place]
        gc.collect()
        assert signal_stack() == before


def far(self: Any, read: Any, mask: Any, places: Any, *tensors: Any) -> Any:
    return STEP(self, read, mask, places * 3, *tensors)


def blind(self: Any, read: Any, mask: Any, places: Any, *tensors: Any) -> Any:
    return STEP(self, read, torch.ones_like(mask), places, *tensors)


STEP = graphs._Step.forward


@pytest.mark.parametrize("wrong", [far, blind])
def test_graph_that_computes_something_else_is_refused(
    wrong: Any, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has other positions, or reads padding."""
    write_graph(loaded(models), tmp_path / "right.xml", reads="embeddings")
    monkeypatch.setattr(graphs._Step, "forward", wrong)
    with pytest.raises(ModelError, match=r"other scores.*use the engine transformers"):
        write_graph(loaded(models), tmp_path / "wrong.xml", reads="embeddings")
    assert not (tmp_path / "wrong.xml").exists()


def test_any_error_is_one_of_ours(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"OpenVINO cannot run a LlamaForCausalLM \(\w+: .+use the engine"):
        write_graph(loaded(models), tmp_path / "missing" / "folder" / "\0.xml", reads="ids")


def test_models_with_windows_or_without_positions_cannot_run() -> None:
    assert can_run(LlamaConfig())
    assert can_run(MistralConfig(sliding_window=None))
    assert not can_run(MistralConfig(sliding_window=4096))
    assert not can_run(BloomConfig())
    assert not can_run(Gemma2Config())
    assert not can_run(Gemma3TextConfig())

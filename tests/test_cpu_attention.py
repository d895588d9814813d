"""Attention by matrix products, for training in bfloat16 on a CPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from scaledown.config.train import TrainConfig
from scaledown.devices import cpu_attention as attention
from scaledown.models.sources import resolve
from scaledown.student.model import ScaleDownModel
from scaledown.student.settings import ScaleDownConfig
from scaledown.student.training import setup

LAYER: Any = SimpleNamespace(num_key_value_groups=3, is_causal=True)


def inputs(tokens: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, tokens, 8, requires_grad=True) for heads in (6, 2, 2))
    hidden = torch.ones(tokens, tokens).triu(1).bool() | (torch.arange(tokens) < 2)
    mask = torch.zeros(2, 1, tokens, tokens)
    mask[0] = mask[0].masked_fill(torch.ones(tokens, tokens).triu(1).bool(), torch.finfo().min)
    mask[1] = mask[1].masked_fill(hidden & ~torch.eye(tokens).bool(), torch.finfo().min)  # with padding
    return query, key, value, mask


@pytest.mark.parametrize("scaling", [None, 0.3])
def test_matrix_products_equal_torchs_attention(scaling: float | None) -> None:
    *tensors, mask = inputs(11)
    found = []
    for compute in (attention.attention, sdpa_attention_forward):
        read, _ = compute(LAYER, *tensors, mask, scaling=scaling)
        found.append([read, *torch.autograd.grad(read.square().sum(), tensors)])
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected)


def test_long_texts_and_passes_without_gradients_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def noted(_layer: Any, query: torch.Tensor, *_rest: Any, **_options: Any) -> tuple[torch.Tensor, None]:
        asked.append(query.shape[2])
        return query, None

    monkeypatch.setattr(attention, "sdpa_attention_forward", noted)
    for tokens in (256, 257):
        attention.attention(LAYER, *inputs(tokens))
    *tensors, mask = inputs(5)
    attention.attention(LAYER, *tensors, None)
    attention.attention(LAYER, *tensors, mask, dropout=0.1)
    attention.attention(LAYER, *tensors, mask, softcap=1.0)
    with torch.no_grad():
        attention.attention(LAYER, *(one.detach() for one in tensors), mask)
    assert asked == [257, 5, 5, 5, 5]


@pytest.mark.parametrize(("dtype", "name"), [("bfloat16", attention._ATTENTION_NAME), ("float32", "sdpa")])
def test_training_in_bfloat16_on_a_cpu_uses_them(
    dtype: str, name: str, models: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    class Stop(Exception):  # noqa: N818
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise Stop

    monkeypatch.setattr(setup, "_accelerator", stop)
    config = TrainConfig(train_data=("x.json",), generator_model=str(models["causal_lm"]), dtype=dtype)
    model = ScaleDownModel.build(ScaleDownConfig(num_layers=1), resolve(str(models["causal_lm"])))
    with pytest.raises(Stop):
        setup.make_trainer(model, config, None, None, "cpu")  # type: ignore[arg-type]
    assert {part.config._attn_implementation for part in (model.generator, model.compressor)} == {name}
    model.save_pretrained(tmp_path / "saved")
    loaded = ScaleDownModel.from_pretrained(str(tmp_path / "saved"))
    assert loaded.generator.config._attn_implementation == "sdpa"

"""Linear layers on a CPU are packed once; the model computes the same."""

import platform

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from scaledown.devices import packing
from scaledown.devices.packing import pack_linear_layers

X86 = platform.machine().lower() in {"x86_64", "amd64"}
CONFIG = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def classifier(dtype: torch.dtype = torch.float32) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(num_labels=1, **CONFIG)).to(dtype).eval()


IDS = torch.randint(0, 60, (5, 11), generator=torch.Generator().manual_seed(0))
EXAMPLE = {"input_ids": IDS[:2]}


@pytest.mark.skipif(not X86, reason="only x86 processors pack")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@torch.inference_mode()
def test_packed_model_computes_the_same_without_its_plain_weights(dtype, tolerance) -> None:
    model = classifier(dtype)
    expected = model(input_ids=IDS).logits
    assert pack_linear_layers(model, EXAMPLE)
    assert torch.allclose(model(input_ids=IDS).logits, expected, atol=tolerance)
    linear = [layer for layer in model.modules() if type(layer) is torch.nn.Linear]
    assert len(linear) == 2 * 6 + 2
    assert {layer.weight.device.type for layer in linear} == {"meta"}
    assert {layer.weight.dtype for layer in linear} == {dtype}
    activations = {type(layer.intermediate.intermediate_act_fn) for layer in model.bert.encoder.layer}
    assert activations == {torch.nn.Identity}


@pytest.mark.skipif(not X86, reason="only x86 processors pack")
@pytest.mark.parametrize("name", ["gelu_new", "gelu_python", "relu"])
@torch.inference_mode()
def test_other_activations_stay(name: str) -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(num_labels=1, hidden_act=name, **CONFIG)).eval()
    expected = model(input_ids=IDS).logits
    assert pack_linear_layers(model, EXAMPLE)
    assert torch.allclose(model(input_ids=IDS).logits, expected, atol=1e-5)
    assert type(model.bert.encoder.layer[0].intermediate.intermediate_act_fn) is not torch.nn.Identity


@pytest.mark.skipif(not X86, reason="only x86 processors pack")
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(1024, 16), (1024, 1024), (768, 64), (384, 384)])
@torch.inference_mode()
def test_packed_products_have_the_same_bits_with_any_number_of_threads(
    inputs: int, outputs: int, gelu: bool
) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=draw)
    assert packing._can_pack(weight)
    packed = packing._packed(weight, torch.randn(outputs, generator=draw), gelu=gelu)
    threads = torch.get_num_threads()
    try:
        for rows in (1, 3, 16, 64):
            states, found = torch.randn(rows, inputs, generator=draw), []
            for count in (1, 2, 4, 8):
                torch.set_num_threads(count)
                found.append(packed(states))
            assert all(torch.equal(found[0], other) for other in found[1:])
    finally:
        torch.set_num_threads(threads)


def test_sums_that_threads_may_divide_are_left_to_torch() -> None:
    assert not packing._can_pack(torch.ones(64, 1025))


@pytest.mark.skipif(not X86, reason="only x86 processors pack")
@torch.inference_mode()
def test_output_layer_that_the_embeddings_share_keeps_its_weight() -> None:
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**CONFIG)).eval()
    expected = model(input_ids=IDS).logits
    assert pack_linear_layers(model, EXAMPLE)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.allclose(model(input_ids=IDS).logits, expected, atol=1e-5)


@pytest.mark.parametrize("reason", ["processor", "dtype", "no function", "wrong products", "reads a weight"])
@torch.inference_mode()
def test_model_stays_as_it_is_where_weights_cannot_be_packed(reason: str, monkeypatch) -> None:
    model = classifier(torch.float64 if reason == "dtype" else torch.float32)
    if reason == "reads a weight":
        pooler = model.bert.pooler

        def read(states: torch.Tensor) -> torch.Tensor:
            return torch.tanh(states[:, 0] @ pooler.dense.weight.T + pooler.dense.bias)

        pooler.forward = read
    expected = model(input_ids=IDS).logits
    if reason == "processor":
        monkeypatch.setattr(platform, "machine", lambda: "arm64")
    elif reason == "no function":
        monkeypatch.setattr(torch, "ops", object())
    elif reason == "wrong products":
        monkeypatch.setattr(packing, "_packed", lambda weight, _, gelu: lambda states: 2 * states @ weight.T)
    assert not pack_linear_layers(model, EXAMPLE)
    assert all(weight.device.type == "cpu" for weight in model.parameters())
    assert torch.equal(model(input_ids=IDS).logits, expected)

"""The fast SPLADE head against the slow, obvious one."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling
from transformers import (
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

import tiny
from scaledown.data.encoders import load_encoder
from scaledown.data.splade import SpladeEncoder, max_logits_tiled
from scaledown.models import resolve

TEXTS = [
    "The Moon pulls the water of the oceans.",
    "Yeast makes dough rise.",
    "",
    "The queen is the strongest piece on the board. " * 30,
    "Tides",
]
SMALL = {"vocab_size": 900, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
MODELS = {
    "bert": lambda: BertForMaskedLM(tiny._bert()),
    "distilbert": lambda: DistilBertForMaskedLM(
        DistilBertConfig(vocab_size=900, dim=32, n_heads=2, n_layers=2, hidden_dim=64)
    ),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SMALL, intermediate_size=64, pad_token_id=0)),
    "deberta": lambda: DebertaV2ForMaskedLM(DebertaV2Config(**SMALL, intermediate_size=64)),
    "modernbert": lambda: ModernBertForMaskedLM(
        ModernBertConfig(**SMALL, intermediate_size=64, pad_token_id=0, cls_token_id=2, sep_token_id=3)
    ),
}


def save(folder: Path, architecture: str) -> Path:
    torch.manual_seed(6)
    tiny.word_pieces(folder)
    model = MODELS[architecture]()
    with torch.no_grad():  # random models hardly activate any term: make their logits spread
        for weight in model.get_output_embeddings().parameters():
            weight.mul_(20)
    model.save_pretrained(folder)
    return folder


def expected(folder: Path) -> np.ndarray:
    model = SparseEncoder(str(folder), device="cpu")
    return model.encode_document(TEXTS, convert_to_sparse_tensor=False, show_progress_bar=False).numpy()


@pytest.mark.parametrize("architecture", MODELS)
def test_every_masked_language_model_has_the_vectors_of_sentence_transformers(
    architecture, tmp_path, caplog
) -> None:
    folder = save(tmp_path, architecture)
    encoder = load_encoder(resolve(str(folder)), "cpu", "float32", 2)
    found = encoder.documents(TEXTS, lambda _: None).toarray()
    assert found.any()
    np.testing.assert_allclose(found, expected(folder), atol=1e-4)
    assert "fast SPLADE head does not serve" not in caplog.text


def test_token_ids_give_what_texts_give(models) -> None:
    encoder = SpladeEncoder(resolve(str(models["splade"])), "cpu", "float32", 2)
    tokens = encoder._fast.tokenised(TEXTS)
    by_tokens = encoder.documents([""] * len(TEXTS), lambda _: None, tokens)
    assert (by_tokens != encoder.documents(TEXTS, lambda _: None)).nnz == 0


@pytest.mark.parametrize("pooling", [("sum", "relu"), ("max", "log1p_relu")])
def test_other_poolings_have_their_vectors_too(pooling, models, tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    modules = [MLMTransformer(str(models["splade"])), SpladePooling(*pooling)]
    SparseEncoder(modules=modules, device="cpu").save(str(tmp_path))
    encoder = SpladeEncoder(resolve(str(tmp_path)), "cpu", "float32", 2)
    found = encoder.documents(TEXTS, lambda _: None).toarray()
    np.testing.assert_allclose(found, expected(tmp_path), rtol=1e-4, atol=1e-4)
    assert ("its pooling is sum" in caplog.text) == (pooling[0] == "sum")


def test_a_head_that_does_more_after_the_decoder_falls_back_and_says_so(models, monkeypatch, caplog) -> None:
    caplog.set_level("INFO")
    forward = BertForMaskedLM.forward

    def scaled(self: BertForMaskedLM, *words: object, **keywords: object) -> object:
        output = forward(self, *words, **keywords)
        output.logits = output.logits.clamp(max=0.5)
        return output

    monkeypatch.setattr(BertForMaskedLM, "forward", scaled)
    encoder = SpladeEncoder(resolve(str(models["splade"])), "cpu", "float32", 2)
    assert "its vectors differ by" in caplog.text
    found = encoder.documents(TEXTS, lambda _: None).toarray()
    np.testing.assert_allclose(found, expected(models["splade"]), atol=1e-5)


def obvious(
    hidden: torch.Tensor, length: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return torch.stack(
        [
            (states[:real].float() @ weight.float().T).amax(0) + bias
            for states, real in zip(hidden, length, strict=True)
        ]
    )


@pytest.mark.parametrize(
    ("batch", "longest", "width", "vocabulary"), [(11, 70, 48, 900), (1, 1, 8, 70), (9, 33, 16, 5000)]
)
def test_tiles_give_the_maximum_over_real_tokens_only(batch, longest, width, vocabulary) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(batch, longest, width), torch.randn(vocabulary, width)
    bias, length = torch.randn(vocabulary), torch.randint(1, longest + 1, (batch,))
    hidden[torch.arange(longest) >= length[:, None]] = 1e9  # padding must not matter
    found = max_logits_tiled(hidden, length, weight, bias)
    torch.testing.assert_close(found, obvious(hidden, length, weight, bias), atol=1e-4, rtol=1e-4)


def test_the_kernel_agrees_in_tritons_interpreter(tmp_path) -> None:
    """In a process of its own: the interpreter is chosen when Triton is imported.

    bfloat16 is left out: the interpreter multiplies it wrongly.
    """
    pytest.importorskip("triton", reason="Triton has wheels for Linux")
    program = """
        import torch
        from scaledown.data.splade import max_logits_tiled
        from scaledown.data.splade_triton import max_logits_fused

        torch.manual_seed(0)
        for batch, longest, width, vocabulary in ((3, 70, 128, 300), (2, 5, 96, 131), (1, 129, 32, 128)):
            for dtype, error in ((torch.float32, 1e-4), (torch.float16, 0.05)):
                hidden = torch.randn(batch, longest, width).to(dtype)
                weight = torch.randn(vocabulary, width).to(dtype)
                length = torch.randint(1, longest + 1, (batch,))
                hidden[torch.arange(longest) >= length[:, None]] = 1000.0
                for bias in (None, torch.randn(vocabulary)):
                    found = max_logits_fused(hidden, length, weight, bias)
                    torch.testing.assert_close(
                        found, max_logits_tiled(hidden, length, weight, bias), atol=error, rtol=error
                    )
        print("agrees")
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    words = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "agrees", done.stderr

"""The fast SPLADE head, compared with sentence-transformers and with the definition."""

import contextlib
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
from scaledown.data.retrieval.encoders import load_encoder
from scaledown.data.retrieval.splade import SpladeEncoder, max_logits_tiled
from scaledown.errors import ModelError
from scaledown.models.sources import resolve

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
def test_vectors_equal_sentence_transformers(architecture, tmp_path, caplog) -> None:
    folder = save(tmp_path, architecture)
    encoder = load_encoder(resolve(str(folder)), "cpu", "float32", 2)
    found = encoder.documents(TEXTS, lambda _: None).toarray()
    assert found.any()
    np.testing.assert_allclose(found, expected(folder), atol=1e-4)
    assert "fast SPLADE head cannot be used" not in caplog.text


def test_fast_head_does_not_import_sentence_transformers(models, tmp_path) -> None:
    modules = [MLMTransformer(str(models["splade"])), SpladePooling("max", "relu")]
    SparseEncoder(modules=modules, device="cpu").save(str(tmp_path))
    program = """
        import sys
        from scaledown.data.retrieval.encoders import load_encoder
        from scaledown.models.sources import resolve

        bare, saved = (
            load_encoder(resolve(folder), "cpu", "float32", 2).documents(["Tides"], lambda _: None)
            for folder in sys.argv[1:]
        )
        print((bare != saved).nnz, bare.nnz > 0, "sentence_transformers" in sys.modules)
    """
    words = [sys.executable, "-c", textwrap.dedent(program), str(models["splade"]), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["0", "True", "False"], done.stderr


def test_vectors_of_token_ids_equal_vectors_of_texts(models) -> None:
    encoder = SpladeEncoder(resolve(str(models["splade"])), "cpu", "float32", 2)
    tokens = encoder._fast.tokenised(TEXTS)
    by_tokens = encoder.documents([""] * len(TEXTS), lambda _: None, tokens)
    assert (by_tokens != encoder.documents(TEXTS, lambda _: None)).nnz == 0


@pytest.mark.parametrize("pooling", [("sum", "relu"), ("max", "log1p_relu")])
def test_other_poolings_equal_sentence_transformers(pooling, models, tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    modules = [MLMTransformer(str(models["splade"])), SpladePooling(*pooling)]
    SparseEncoder(modules=modules, device="cpu").save(str(tmp_path))
    encoder = SpladeEncoder(resolve(str(tmp_path)), "cpu", "float32", 2)
    found = encoder.documents(TEXTS, lambda _: None).toarray()
    np.testing.assert_allclose(found, expected(tmp_path), rtol=1e-4, atol=1e-4)
    assert ("its pooling is sum" in caplog.text) == (pooling[0] == "sum")


def test_model_that_changes_logits_after_the_decoder_falls_back(models, monkeypatch, caplog) -> None:
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


def by_definition(
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
def test_tiled_maximum_ignores_padding(batch, longest, width, vocabulary) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(batch, longest, width), torch.randn(vocabulary, width)
    bias, length = torch.randn(vocabulary), torch.randint(1, longest + 1, (batch,))
    hidden[torch.arange(longest) >= length[:, None]] = 1e9  # padding must not matter
    found = max_logits_tiled(hidden, length, weight, bias)
    torch.testing.assert_close(found, by_definition(hidden, length, weight, bias), atol=1e-4, rtol=1e-4)


def test_kernel_equals_tiles_in_the_interpreter_of_triton(tmp_path) -> None:
    """In its own process, because the interpreter is chosen when Triton is imported.

    bfloat16 is left out because the interpreter multiplies it wrongly.
    """
    pytest.importorskip("triton", reason="Triton has wheels for Linux")
    program = """
        import torch
        from scaledown.data.retrieval.splade import max_logits_tiled
        from scaledown.data.retrieval.splade_triton import max_logits_fused

        torch.manual_seed(0)
        shapes = (3, 70, 128, 300), (2, 5, 96, 131), (1, 129, 32, 128), (1, 97, 16, 40), (1, 64, 64, 130)
        for batch, longest, width, vocabulary in shapes:
            for dtype, error in ((torch.float32, 1e-4), (torch.float16, 0.05)):
                hidden = torch.randn(batch, longest, width).to(dtype)
                weight = torch.randn(vocabulary, width).to(dtype)
                length = torch.randint(1, longest + 1, (batch,))
                length[0] = longest
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


SHARED = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227}
"""KiB of shared memory that a block may use, by compute capability."""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("capability", SHARED)
def test_kernel_compiles_for_each_compute_capability(capability, dtype, tmp_path, monkeypatch) -> None:
    triton = pytest.importorskip("triton", reason="Triton has wheels for Linux")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from scaledown.data.retrieval.splade_triton import OPTIONS, TILES, kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {"hidden": f"*{dtype}", "length": "*i32", "weight": f"*{dtype}", "result": "*fp32"}
    numbers = dict.fromkeys(("batch", "longest", "width", "vocabulary"), "i32")
    aligned = {(place,): [["tt.divisibility", 16]] for place in (0, 1, 2, 3, 6)}  # as those of BERT-base
    signature = pointers | numbers | dict.fromkeys(TILES, "constexpr")
    source = ASTSource(kernel, signature, constexprs=dict(TILES), attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=OPTIONS)
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= SHARED[capability] * 1024


@pytest.mark.parametrize(
    ("length", "rows"), [(1, 16), (16, 16), (32, 32), (33, 64), (64, 64), (96, 96), (97, 128), (130, 144)]
)
def test_rest_of_a_text_is_covered_by_small_tiles(length, rows) -> None:
    pytest.importorskip("triton", reason="Triton has wheels for Linux")
    from scaledown.data.retrieval.splade_triton import TILES, whole

    end = whole.fn(length, TILES["TOKENS"], TILES["REST"])
    assert end + len(range(end, length, TILES["REST"])) * TILES["REST"] == rows


def test_kernel_is_probed_and_a_failing_one_is_replaced_with_a_warning(monkeypatch, caplog) -> None:
    pytest.importorskip("triton", reason="Triton has wheels for Linux")
    from scaledown.data.retrieval import splade_triton
    from scaledown.data.retrieval.splade import _fused, max_logits_tiled

    seen = []

    def right(hidden, length, weight, bias):
        seen.append((hidden.device, hidden.dtype, weight.dtype, hidden.shape[2]))
        return max_logits_tiled(hidden, length, weight, bias)

    def failing(*_: object) -> None:
        raise RuntimeError("no compiler")

    states = torch.device("cpu"), torch.bfloat16, 96
    _fused.cache_clear()
    monkeypatch.setattr(splade_triton, "max_logits_fused", right)
    assert _fused(*states) is right
    assert seen == [(states[0], torch.bfloat16, torch.bfloat16, 96)]
    assert not caplog.records
    wrong_result = (lambda *_: torch.zeros(2, 2)), "result is wrong"
    for wrong, reason in ((failing, "RuntimeError: no compiler"), wrong_result):
        _fused.cache_clear()
        monkeypatch.setattr(splade_triton, "max_logits_fused", wrong)
        assert _fused(*states) is None
        assert caplog.records[-1].levelname == "WARNING"
        assert reason in caplog.text
    _fused.cache_clear()


def test_kernel_is_launched_on_the_device_of_its_input(monkeypatch) -> None:
    pytest.importorskip("triton", reason="Triton has wheels for Linux")
    from scaledown.data.retrieval import splade_triton

    hidden, order = torch.ones(1, 1, 16), []

    @contextlib.contextmanager
    def device_of(tensor: torch.Tensor):
        assert tensor is hidden
        order.append("device")
        yield
        order.append("left")

    class Kernel:
        def __getitem__(self, programs):
            return lambda *_, **__: order.append("launched")

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(splade_triton, "kernel", Kernel())
    splade_triton.max_logits_fused(hidden, torch.ones(1), hidden[0], None)
    assert order == ["device", "launched", "left"]


def test_states_too_large_for_float16_are_refused(tmp_path) -> None:
    folder = save(tmp_path, "bert")
    model = BertForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        model.cls.predictions.transform.LayerNorm.weight.fill_(1e5)
    model.save_pretrained(folder)
    with pytest.raises(ModelError, match="too large for float16: give --dtype float32"):
        SpladeEncoder(resolve(str(folder)), "cpu", "float16", 2)
    assert SpladeEncoder(resolve(str(folder)), "cpu", "float32", 2).documents(TEXTS, lambda _: None).nnz

"""Models on a GPU are read directly to it, and released by `OnDevice`."""

import weakref
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from scaledown.data.reranker.cross_encoder import CrossEncoderReranker
from scaledown.data.reranker.query_likelihood import QueryLikelihoodReranker
from scaledown.data.retrieval.encoders import DenseEncoder
from scaledown.data.retrieval.splade import SpladeEncoder, _from_sentence_transformers
from scaledown.data.teacher.base import Generation
from scaledown.data.teacher.engines.transformers import TransformersTeacher
from scaledown.devices.gpus import GIB, OnDevice
from scaledown.errors import ModelError
from scaledown.models import resolve
from scaledown.student.compressors.layers import load_compressor
from scaledown.student.model import ScaleDownModel
from scaledown.student.settings import ScaleDownConfig
from scaledown.student.training.origin import Origin


class Model:
    """A model that refers to itself, as models of libraries do."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The free memory of a fake GPU, in bytes: one value for each call; the last stays."""
    free_bytes = [80 * GIB]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(
        torch.cuda,
        "mem_get_info",
        lambda number: (free_bytes.pop(0) if len(free_bytes) > 1 else free_bytes[0], 80 * GIB),
    )
    return free_bytes


def test_released_model_has_no_reference_left(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    made: list[weakref.ref[Model]] = []

    def load() -> Model:
        model = Model()
        made.append(weakref.ref(model))
        return model

    model = OnDevice("the model", "cpu", load)
    model.release()
    assert not made
    assert model() is model()
    model.release()
    assert made[0]() is None, "without gc.collect() it lives on"
    assert emptied == [True]
    model()
    assert len(made) == 2


def test_release_closes_an_engine_with_its_own_processes(free: list[int]) -> None:
    class Engine(Model):
        closed = 0

        def close(self) -> None:
            Engine.closed += 1

    model = OnDevice("the teacher", "cuda:1", Engine)
    model()
    model.release()
    model.release()
    assert Engine.closed == 1


@pytest.mark.parametrize(("after", "warns"), [(79.5, False), (60.0, True)])
def test_memory_that_is_not_freed_is_reported(after: float, warns: bool, free: list[int], caplog) -> None:
    free.append(int(after * GIB))
    model = OnDevice("the reranker", "cuda", Model)
    model()
    model.release()
    assert ("the reranker is released, but 20.0 GiB" in caplog.text) == warns


@pytest.fixture(scope="module")
def student(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("student")
    ScaleDownModel.build(settings(), resolve(str(models["causal_lm"]))).save_pretrained(folder)
    return folder


def settings() -> ScaleDownConfig:
    return ScaleDownConfig(num_layers=1, doc_max_length=32, query_max_length=32, compression_rate=8)


LOADERS = {
    "teacher": (
        "causal_lm",
        lambda source, device: TransformersTeacher(source, device, "bfloat16", Generation()),
    ),
    "encoder": ("splade", lambda source, device: SpladeEncoder(source, device, "bfloat16", 4)),
    "sparse encoder": (
        "splade",
        lambda source, device: _from_sentence_transformers(source, device, "bfloat16"),
    ),
    "dense encoder": ("dense", lambda source, device: DenseEncoder(source, device, "bfloat16", 4)),
    "cross-encoder": (
        "cross_encoder",
        lambda source, device: CrossEncoderReranker(source, device, "bfloat16", 4),
    ),
    "reranker": ("causal_lm", lambda source, device: QueryLikelihoodReranker(source, device, "bfloat16", 4)),
    "generator": (
        "causal_lm",
        lambda source, device: ScaleDownModel.build(settings(), source, device=device),
    ),
    "compressor": (
        "modernbert",
        lambda source, device: load_compressor(settings(), source, torch.bfloat16, device),
    ),
    "pretrained": (
        "student",
        lambda source, device: Origin(settings(), source, is_pretrained=True).load(torch.bfloat16, device),
    ),
}


@pytest.mark.parametrize("which", LOADERS)
def test_weights_are_read_directly_to_the_device_with_a_hint_if_they_do_not_fit(
    which: str, student: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, load = LOADERS[which]
    source = resolve(str({**models, "student": student}[kind]))

    def full(cls: type, *_: object, **keywords: object) -> None:
        assert keywords["device_map"] == {"": "cuda:1"}, "they are held by the host first"
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 112.00 MiB")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(full))
    with pytest.raises(ModelError, match="out of memory while loading; use"):
        load(source, "cuda:1")


def test_model_that_does_not_fit_after_loading_has_the_hint_too(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 112.00 MiB")

    monkeypatch.setattr(ScaleDownModel, "to", full)
    with pytest.raises(ModelError, match="out of memory while loading; use"):
        ScaleDownModel.build(settings(), resolve(str(models["causal_lm"])))


def test_model_read_directly_to_a_device_is_the_same(student: Path) -> None:
    one = ScaleDownModel.from_pretrained(str(student))
    other = ScaleDownModel.from_pretrained(str(student), device_map={"": "cpu"})
    for (name, left), (_, right) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(left, right), name
    asked = (["Why?"], [["The tower is red.", "Many came."]])
    assert one.answer(*asked, max_new_tokens=4) == other.answer(*asked, max_new_tokens=4)

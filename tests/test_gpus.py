"""Models on a GPU are read directly to it, and released by `OnDevice`."""

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from scaledown.data.reranker import cross_encoder
from scaledown.data.reranker.base import Pair
from scaledown.data.reranker.cross_encoder import CrossEncoderReranker
from scaledown.data.reranker.query_likelihood import QueryLikelihoodReranker
from scaledown.data.retrieval import splade
from scaledown.data.retrieval.encoders import DenseEncoder
from scaledown.data.retrieval.splade import SpladeEncoder, _from_sentence_transformers
from scaledown.data.teacher.base import TeacherSettings
from scaledown.data.teacher.engines.transformers import TransformersTeacher
from scaledown.devices.gpus import GIB, OnDevice
from scaledown.devices.halving import Halving
from scaledown.errors import ModelError, NoRoomError
from scaledown.models.sources import resolve
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


def test_deleted_models_are_collected_before_a_model_is_loaded(free: list[int]) -> None:
    deleted = weakref.ref(Model())
    assert deleted() is not None, "it refers to itself"
    OnDevice("the teacher", "cuda", lambda: deleted)()
    assert deleted() is None


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


def test_processes_of_an_engine_end_after_an_error() -> None:
    class Engine(Model):
        closed = 0

        def close(self) -> None:
            Engine.closed += 1

    with pytest.raises(ValueError, match="stop"), OnDevice("the teacher", "cpu", Engine) as model:
        model()
        raise ValueError("stop")
    assert Engine.closed == 1
    with pytest.raises(ValueError, match="stop"), OnDevice("the teacher", "cpu", Engine):
        raise ValueError("stop")
    assert Engine.closed == 1, "it was not loaded"


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
        lambda source, device: TransformersTeacher(source, device, "bfloat16", TeacherSettings()),
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


def test_the_next_batch_is_launched_before_one_is_read_back() -> None:
    launched = [threading.Event() for _ in range(5)]

    def launch(batch: list[int]) -> list[int]:
        launched[batch[0]].set()
        return batch

    def read(batch: list[int]) -> int:
        following = launched[min(batch[0] + 1, 4)]
        assert following.wait(60), "it is launched when this one is read"
        return batch[0]

    found = list(Halving("--batch_size").each([[n] for n in range(5)], launch, read, "cuda:1"))
    assert found == [([n], [n]) for n in range(5)]


def test_on_a_cpu_one_batch_comes_after_the_other() -> None:
    done: list[str] = []
    halving = Halving("--batch_size")
    batches = ([n] for n in range(2))
    for batch, _ in halving.each(batches, lambda b: done.append(f"launch {b}"), done.append, "cpu"):
        done.append(f"given {batch}")
    assert done == ["launch [0]", None, "given [0]", "launch [1]", None, "given [1]"]


def test_a_batch_without_room_beside_another_is_done_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parts have other last bits, so it is not halved for the other's sake."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    both = threading.Barrier(2, timeout=60)
    tried: list[str] = []

    def launch(batch: list[int]) -> list[int]:
        tried.append(f"launch {batch}")
        return batch

    def read(batch: list[int]) -> int:
        if threading.current_thread() is not threading.main_thread():
            both.wait()  # until two are under way
            if batch == [0, 1]:
                raise torch.OutOfMemoryError("CUDA out of memory")
            time.sleep(0.2)
        tried.append(f"read {batch}")
        return sum(batch)

    halving = Halving("--batch_size")
    found = list(halving.each([[0, 1], [2, 3]], launch, read, "cuda"))
    assert found == [([0, 1], [1]), ([2, 3], [5])]
    assert tried[2:] == ["read [2, 3]", "launch [0, 1]", "read [0, 1]"]
    assert halving.count == 0


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), NoRoomError),
        (RuntimeError("device-side assert triggered"), RuntimeError),
    ],
)
def test_failure_on_a_gpu_ends_the_work(
    error: Exception, raised: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def launch(batch: list[int]) -> list[int]:
        if 1 in batch:
            raise error
        return batch

    halving = Halving("--batch_size")
    with pytest.raises(raised):
        list(halving.each([[0, 1], [2, 3]], launch, len, "cuda"))
    assert halving.count == (raised is NoRoomError)


TEXTS = ["The tower is red.", "Many came.", "It was built long ago, and it is still there.", "Why?", ""]
AHEAD = {
    "encoder": lambda made: made.documents(TEXTS, lambda _: None).toarray(),
    "other encoder": lambda made: made.documents(TEXTS, lambda _: None).toarray(),
    "dense encoder": lambda made: made.documents(TEXTS, lambda _: None),
    "cross-encoder": lambda made: made.score([Pair("who", text) for text in TEXTS], lambda _: None),
    "other cross-encoder": lambda made: made.score([Pair("who", text) for text in TEXTS], lambda _: None),
    "reranker": lambda made: made.score([Pair("who", text) for text in TEXTS], lambda _: None),
}


@pytest.mark.parametrize("which", AHEAD)
def test_each_model_is_a_batch_ahead_on_a_gpu(
    which: str, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is launched is a tensor of the device; what is read back is what a CPU gives, to the bit."""
    name = which.removeprefix("other ")
    if name != which:  # those of sentence-transformers, for models that ours do not serve
        monkeypatch.setattr(splade, "_fast", lambda _: ("in this test", None))
        monkeypatch.setattr(cross_encoder, "_pair_tokens", lambda _: (None, "in this test"))
    kind, load = LOADERS[name]
    made = load(resolve(str(models[kind])), "cpu")
    made._batch_size = 1
    work = AHEAD[which]
    expected = work(made)
    each, order = Halving.each, []

    def on_a_gpu(
        self: Halving,
        batches: Any,
        launch: Callable[..., Any],
        read: Callable[..., Any],
        device: str,
        *_: int,
    ) -> Iterator[Any]:
        assert device == "cpu"
        batches = list(batches)
        launched = [threading.Event() for _ in batches]

        def noted(batch: Any) -> Any:
            found = launch(batch)
            assert any(isinstance(part, torch.Tensor) for part in [found, *found]), "it is read back"
            order.append(f"launch {len(order)}")
            launched[sum(one.is_set() for one in launched)].set()
            return found, sum(one.is_set() for one in launched)

        def late(found: Any) -> Any:
            tensor, following = found
            assert following == len(launched) or launched[following].wait(60)
            return read(tensor)

        yield from each(self, batches, noted, late, "cuda")

    monkeypatch.setattr(Halving, "each", on_a_gpu)
    np.testing.assert_array_equal(work(made), expected)
    assert len(order) == len(TEXTS)

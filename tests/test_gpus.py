"""Models on a GPU are given back: one place drops them and looks whether their memory is free again."""

import weakref

import pytest
import torch

from scaledown.gpus import GIB, OnDevice


class Model:
    """Refers to itself, as libraries' models do."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What a GPU says of its free memory, one call after the other; and what was asked of torch."""
    said = [80 * GIB]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda number: (said.pop(0) if len(said) > 1 else said[0], 80 * GIB)
    )
    return said


def test_a_model_is_loaded_once_and_nobody_else_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_what_has_processes_of_its_own_ends_them(free: list[int]) -> None:
    class Engine(Model):
        closed = 0

        def close(self) -> None:
            Engine.closed += 1

    model = OnDevice("the teacher", "cuda:1", Engine)
    model()
    model.release()
    model.release()
    assert Engine.closed == 1


@pytest.mark.parametrize(("after", "told"), [(79.5, False), (60.0, True)])
def test_memory_that_does_not_come_back_is_told(after: float, told: bool, free: list[int], caplog) -> None:
    free.append(int(after * GIB))
    model = OnDevice("the reranker", "cuda", Model)
    model()
    model.release()
    assert ("the reranker is released, but 20.0 GiB" in caplog.text) == told

"""On a CPU each thread computes a batch of its own."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from scaledown.data.reranker.base import Pair
from scaledown.data.reranker.cross_encoder import CrossEncoderReranker
from scaledown.data.retrieval.splade import SpladeEncoder
from scaledown.devices.halving import Halving
from scaledown.errors import NoRoomError
from scaledown.models.sources import resolve

TEXTS = [
    f"The {word} is {'very ' * length}red." for length, word in enumerate(["tower", "river", "otter"] * 5)
]


@pytest.fixture
def three_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3, "it is as before"
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("three_threads")
def test_as_many_batches_as_threads_are_computed_at_once_by_one_thread_each() -> None:
    together = threading.Barrier(3, timeout=60)

    def launch(batch: list[int]) -> list[int]:
        together.wait()
        assert torch.get_num_threads() == 1
        return batch

    batches = [[n] for n in range(6)]
    found = list(Halving("--batch_size").each(batches, launch, sum, "cpu", at_once=3))
    assert found == [([n], [n]) for n in range(6)]


@pytest.mark.usefixtures("three_threads")
def test_batch_without_room_beside_others_is_computed_alone_and_halved_only_then() -> None:
    alone = threading.local()
    alone.here = True

    def launch(batch: list[int]) -> list[int]:
        is_alone = getattr(alone, "here", False)
        if batch == [4, 5] or (batch == [2, 3] and not is_alone):
            raise MemoryError
        return batch

    halving = Halving("--batch_size")
    found = list(halving.each([[0, 1], [2, 3], [4, 5]], launch, sum, "cpu", at_once=3))
    assert found == [([0, 1], [1]), ([2, 3], [5]), ([4, 5], [4, 5])]
    assert halving.count == 1


@pytest.mark.usefixtures("three_threads")
def test_text_without_room_alone_is_an_error_that_names_the_flag() -> None:
    def launch(batch: list[int]) -> list[int]:
        raise MemoryError

    with pytest.raises(NoRoomError, match="--batch_size 1"):
        list(Halving("--batch_size").each([[0], [1]], launch, sum, "cpu", at_once=3))


@pytest.mark.usefixtures("three_threads")
def test_an_error_in_a_thread_ends_the_work() -> None:
    def launch(batch: list[int]) -> list[int]:
        raise ValueError(str(batch))

    with pytest.raises(ValueError, match="0"):
        list(Halving("--batch_size").each([[0], [1]], launch, sum, "cpu", at_once=3))


@pytest.mark.usefixtures("three_threads")
def test_threads_are_as_before_when_the_caller_stops_early() -> None:
    def threads(batch: list[int]) -> int:
        return torch.get_num_threads()

    made = Halving("--batch_size").each([[n] for n in range(9)], threads, float, "cpu", at_once=2)
    assert next(made) == ([0], [1.0])
    made.close()
    assert list(Halving("--batch_size").each([[0]], threads, float, "cpu", at_once=1)) == [([0], [3.0])]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.usefixtures("three_threads")
def test_vectors_and_scores_do_not_depend_on_the_number_of_threads(
    dtype: str, models: dict[str, Path]
) -> None:
    encoder = SpladeEncoder(resolve(str(models["splade"])), "cpu", dtype, 2)
    reranker = CrossEncoderReranker(resolve(str(models["cross_encoder"])), "cpu", dtype, 2)
    pairs = [Pair(query, text) for query in ("which tower", "why") for text in TEXTS]
    done: list[int] = []
    found = []
    for threads in (3, 1):
        torch.set_num_threads(threads)
        found.append((encoder.documents(TEXTS, done.append).toarray(), reranker.score(pairs, done.append)))
    torch.set_num_threads(3)
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert len(set(found[0][1])) > len(TEXTS), "pairs have scores of their own"
    assert sum(done) == 2 * (len(TEXTS) + len(pairs))

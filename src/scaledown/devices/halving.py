"""Runs batches; one that runs out of memory is halved until its parts fit."""

import collections
import concurrent.futures
import contextlib
import logging
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, Final, TypeVar

from scaledown.devices.gpus import give_back
from scaledown.errors import NoRoomError

log = logging.getLogger("scaledown")

_BATCHES_AT_ONCE: Final = 8
"""Batches computed at the same time on a CPU: each needs memory, and a share of Python's lock."""

Item = TypeVar("Item")
Launched = TypeVar("Launched")
Done = TypeVar("Done")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device has too little memory."""
    # CUDA raises OutOfMemoryError; MPS, the CPU's allocator and OpenVINO raise RuntimeError with a message.
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        sign in message for sign in ("out of memory", "can't allocate memory", "bad_alloc")
    )


class Halving:
    """Runs batches. A batch that runs out of memory is halved until its parts fit.

    `count` is the number of times that a batch was halved.

    Args:
        flag: The flag or argument that sets the size of batches, for messages.
    """

    def __init__(self, flag: str) -> None:
        self.flag = flag
        self.count = 0

    def __call__(self, work: Callable[[Sequence[Item]], Done], batch: Sequence[Item]) -> list[Done]:
        """Run a batch, or its parts if it does not fit into memory.

        Args:
            work: Computes the result of a batch. It may be called again with parts of the batch.
            batch: At least one item.

        Returns:
            The results of `work` for the batch or its parts, in order.

        Raises:
            NoRoomError: One item alone does not fit.
        """
        try:
            return [work(batch)]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise NoRoomError(
                    f"out of memory with one text at a time ({self.flag} 1): use a smaller model, shorter "
                    "texts or a larger machine"
                ) from error
        self.count += 1
        middle = (len(batch) + 1) // 2
        log.warning(
            "out of memory: a batch of %s texts was halved; a lower %s avoids this", len(batch), self.flag
        )
        give_back()
        return self(work, batch[:middle]) + self(work, batch[middle:])

    def each(
        self,
        batches: Iterable[Sequence[Item]],
        launch: Callable[[Sequence[Item]], Launched],
        read: Callable[[Launched], Done],
        device: str,
        at_once: int = 1,
    ) -> Generator[tuple[Sequence[Item], list[Done]], None, None]:
        """Yield the batches, each with its results, in order.

        On CUDA the next batch is launched before one is read back. On a CPU several batches are computed at
        the same time, with an equal share of torch's threads each: many threads for one product wait for each
        other. A batch that does not fit beside others is run again alone, and halved only if that fails, too.

        Args:
            batches: May be made while earlier ones are computed.
            launch: Starts to compute a batch.
            read: Waits for a launched batch, and fetches its result.
            device: The device that computes.
            at_once: For a CPU: the number of batches, if several threads may call `launch` at the same time.
                Tokenizers must not.

        Yields:
            A batch and the results of its parts; there is one part unless the batch was halved.

        Raises:
            NoRoomError: Even one item does not fit.
        """

        def work(batch: Sequence[Item]) -> Done:
            return read(launch(batch))

        pool: contextlib.AbstractContextManager[concurrent.futures.Executor]
        turn: contextlib.AbstractContextManager[Any]
        if (workers := min(at_once, batches_at_once(device))) > 1:
            pool, turn = _sharing_threads(workers), contextlib.nullcontext()
        elif device.startswith("cuda"):
            workers, turn = 2, threading.Lock()
            pool = concurrent.futures.ThreadPoolExecutor(workers)
        else:
            yield from ((batch, self(work, batch)) for batch in batches)
            return

        def beside_others(batch: Sequence[Item]) -> list[Done] | None:
            try:
                with turn:
                    launched = launch(batch)
                return [read(launched)]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                return None

        under_way: collections.deque[tuple[Sequence[Item], Any]] = collections.deque()

        def first() -> tuple[Sequence[Item], list[Done]]:
            batch, future = under_way.popleft()
            if (found := future.result()) is None:
                concurrent.futures.wait([other for _, other in under_way])
                give_back()
                found = self(work, batch)
            return batch, found

        with pool as threads:
            for batch in batches:
                under_way.append((batch, threads.submit(beside_others, batch)))
                if len(under_way) == workers + (device == "cpu"):  # one waits, so that no thread does
                    yield first()
            while under_way:
                yield first()


def batches_at_once(device: str) -> int:
    """Return how many batches `Halving.each` computes at the same time on a CPU; 1 on other devices."""
    if device != "cpu":
        return 1
    import torch

    return min(_BATCHES_AT_ONCE, torch.get_num_threads())


@contextlib.contextmanager
def _sharing_threads(workers: int) -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    """Yield a pool whose workers have an equal share of torch's threads each."""
    import torch

    threads = torch.get_num_threads()
    begin, shares = torch.set_num_threads, (max(1, threads // workers),)
    try:
        with concurrent.futures.ThreadPoolExecutor(workers, initializer=begin, initargs=shares) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)  # those of later threads, too

"""The engine that sends prompts to OpenAI-compatible servers."""

import asyncio
import contextlib
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from scaledown.data.prompts import Prompt
from scaledown.data.teacher.base import Rejection, Setup, TeacherEngine
from scaledown.data.teacher.dispatch import Dispatcher
from scaledown.data.teacher.servers import Servers
from scaledown.devices.halving import Halving
from scaledown.errors import UsageError
from scaledown.records import Answer


class EndpointTeacher(Servers):
    """A model behind one or more OpenAI-compatible servers.

    There is no tokenizer here: four characters count as a token where documents are shortened.
    """

    halving = Halving("--teacher_batch_size")  # not used: a server manages its memory itself

    def answers(
        self, prompts: Sequence[Prompt], have: Collection[int] = ()
    ) -> Iterator[tuple[int, Answer | Rejection]]:
        """Yield answers as they arrive.

        Documents of a prompt that is too long lose their ends, from the last one on. `dropped_tokens` is then
        the number of dropped characters divided by 4.

        Args:
            prompts: The prompts.
            have: Places that are answered already. They are not asked again, since each request costs money.

        Yields:
            A place in `prompts` with its answer or rejection.

        Raises:
            ModelError: The tokens are used up or no server is left. Requests that run are waited for first,
                and their answers are yielded.
        """
        todo = [number for number in range(len(prompts)) if number not in have]
        if not todo:
            return
        with _loop() as run:
            requests = Dispatcher(self, [(number, prompts[number]) for number in reversed(todo)])
            try:
                while result := run(requests.next()):
                    yield result
            finally:
                run(requests.close())


@contextlib.contextmanager
def _loop() -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    """Yield a function that runs coroutines, one after the other, on a separate event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        with asyncio.Runner() as runner:
            yield runner.run
        return
    runner = asyncio.Runner()  # a notebook runs a loop in this thread, and a thread has only one
    with ThreadPoolExecutor(1) as thread:
        try:
            yield lambda work: thread.submit(runner.run, work).result()
        finally:
            thread.submit(runner.close).result()


def _load(setup: Setup) -> EndpointTeacher:
    engine = setup.engine
    if not engine.endpoints:
        raise UsageError("--teacher_backend endpoint: give --teacher_endpoint URL, too")
    return EndpointTeacher(
        setup.source.name,
        engine.endpoints,
        setup.generation,
        max_total_tokens=engine.max_total_tokens,
        max_requests_per_minute=engine.max_requests_per_minute,
        request_timeout=engine.request_timeout,
        spent_tokens=setup.spent_tokens,
    )


def _preflight(setup: Setup) -> None:
    """Check the server, the key and the model."""
    _load(setup)


ENGINE: Final = TeacherEngine(
    _load,
    preflight=_preflight,
    suits=lambda setup: bool(setup.engine.endpoints),
    served=True,
    has_logprobs=True,
)

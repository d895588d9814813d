"""The GPUs that this process sees: their names in its environment, and how much of their memory is free."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

GIB: Final = 1 << 30

_MOST: Final = 0.92  # of a GPU, which is what vLLM takes of one that is free


def index(device: str) -> int:
    """The number of a CUDA device among those that this process sees; the first where it has none."""
    return int(device.partition(":")[2] or 0)


def only(environment: Mapping[str, str], numbers: Iterable[int]) -> dict[str, str]:
    """The variables that show a process these GPUs alone, of those that the environment shows.

    What the environment names them by, be it an index, a UUID or a part of a GPU, stays their name.
    """
    import torch

    known = ["HIP_VISIBLE_DEVICES"] if torch.version.hip else []  # the first that is set counts
    known.append("CUDA_VISIBLE_DEVICES")
    names = [name for name in known if environment.get(name)] or known[-1:]
    there = [gpu.strip() for gpu in environment.get(names[0], "").split(",") if gpu.strip()]
    shown = ",".join(there[number] if there else str(number) for number in numbers)
    return dict.fromkeys(names, shown)


@contextlib.contextmanager
def showing(numbers: Iterable[int]) -> Iterator[None]:
    """Let processes that start inside see these GPUs alone."""
    before = dict(os.environ)
    changed = only(before, numbers)
    os.environ.update(changed)
    try:
        yield
    finally:
        for name in changed:
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


def free_share(numbers: Iterable[int]) -> float:
    """The share of its GPUs that a process may take which is yet to start: what is free of each, less 1 GiB.

    The GiB is what it needs before it counts.
    """
    import torch

    known = [torch.cuda.mem_get_info(number) for number in numbers]
    return max(0.0, min(_MOST, *((free - GIB) / total for free, total in known)))

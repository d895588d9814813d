"""Workers that share a run: where they run, how many there are, their settings."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from scaledown.config.index import IndexConfig
from scaledown.devices.choice import choose_device
from scaledown.errors import UsageError
from scaledown.run.directory import RunDirectory
from scaledown.run.executor import LocalPool, Pool, supervise
from scaledown.run.heartbeat import supervising
from scaledown.run.logs import start_logging, style
from scaledown.run.overview import Overview

AnyIndexConfig = TypeVar("AnyIndexConfig", bound=IndexConfig)


def supervised(config: IndexConfig) -> bool:
    """Whether workers do the work, while this process starts and supervises them."""
    asked = config.workers or config.task_timeout or config.executor != "local"
    return bool(asked) or gpus_here(config.device) // _gpus_each(config) > 1


def share_teachers(config: IndexConfig) -> bool:
    """Whether several GPUs share each teacher. Before the teacher is loaded, each can have its own worker."""
    least = 2 if config.executor == "local" else 1  # the others are on other nodes
    return _gpus_each(config) > 1 and gpus_here(config.device) >= least


def share_work(config: IndexConfig, target: str, runs: Sequence[RunDirectory], gpus_each: int = 0) -> None:
    """Let workers call `target` until all work is done.

    If the run is in an object store and the workers are on Ray, they share no disk. Each then makes a part of
    the queries.

    Args:
        config: The settings of the workers.
        target: The function that they call, `module:function`.
        runs: The run directory, and the directory of the index if it is another one.
        gpus_each: GPUs of a worker; 0: as many as share a teacher.

    Raises:
        UsageError: The settings contradict each other.
        ScaleDownError: A worker failed; this is its error.
    """
    apart = config.executor == "ray" and runs[0].storage.in_bucket
    if apart and config.task_timeout:
        raise UsageError(
            "--task_timeout: in a bucket the time of a shard on another machine is not known: leave out this "
            "flag"
        )
    pool, count = pool_of(config, runs[0], gpus_each)
    limits = [flag for flag, about in config.options().items() if about.per_process and getattr(config, flag)]
    if limits and count > 1 and not gpus_each:
        raise UsageError(
            f"--{limits[0]} applies to one process: leave out --workers, a server does not need them"
        )
    settings = {"config": asdict(config) | config.of_worker(count), "log": style()._asdict()}
    leases = [] if apart else [run.leases for run in runs]
    with supervising(), contextlib.closing(Overview(runs[0].path)) as overview:
        supervise(pool, target, settings, count, leases, config.task_timeout, overview.look)


def settings_of(kind: type[AnyIndexConfig], settings: Mapping[str, Any], worker: str) -> AnyIndexConfig:
    """Restore a worker's config from its settings, and log as the process that started it does.

    Args:
        kind: The class of the config.
        settings: The settings of an `Order`: `config`, `log`, and `shard` if the worker makes a part.
        worker: The worker's name.
    """
    start_logging(**{**settings["log"], "worker": worker})
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings["config"].items()
    }
    return kind(**given | ({"shard": settings["shard"]} if "shard" in settings else {}))


def pool_of(config: IndexConfig, run: RunDirectory, gpus_each: int = 0) -> tuple[Pool, int]:
    """Choose the pool of workers.

    Args:
        config: The settings.
        run: The run directory, which has the workers' logs.
        gpus_each: GPUs of a worker; 0: as many as share a teacher.

    Returns:
        The pool, and its number of workers.

    Raises:
        UsageError: There are too few GPUs, or settings contradict each other.
        MissingExtraError: Ray is not installed.
    """
    together = _gpus_each(config)
    each = gpus_each or together
    asked = config.workers * together // each
    if config.executor == "ray":
        from scaledown.run.ray_pool import RayPool

        if config.device.startswith("cuda:"):
            raise UsageError(f"--device {config.device}: Ray gives each worker a GPU: leave out the number")
        ray = RayPool(config.ray_address, asked, 0 if config.device == "cpu" else each)
        if ray.has_gpus and not choose_device(config.device).startswith("cuda"):
            raise UsageError(
                "--executor ray: the cluster has GPUs, but this machine has none: start the command on a "
                "node with a GPU, or give --device cpu"
            )
        return ray, ray.workers
    seen = gpus_here(config.device)
    least = config.workers or 1
    if seen and least * together > seen:
        raise UsageError(
            f"--workers {least}: there are {seen} GPUs"
            + (f", and --tensor_parallel needs {together} for each worker" if together > 1 else "")
            + (f": give at most {seen // together}" if seen >= together else ": lower it")
        )
    count = asked or max(1, seen // each)
    return LocalPool(count, run.path / "live", each if seen else 0), count


def gpu_workers(config: IndexConfig, gpus_each: int = 0) -> int:
    """Return the number of workers by the GPUs of this machine, at least 1.

    Args:
        config: The settings.
        gpus_each: GPUs of a worker; 0: as many as share a teacher.
    """
    together = _gpus_each(config)
    each = gpus_each or together
    seen, asked = gpus_here(config.device) // each, config.workers * together // each
    return max(1, min(asked, seen) if asked and config.executor == "local" else seen)


def gpus_here(device: str) -> int:
    """The number of GPUs that workers can share; 0 if `device` is a single GPU or a CPU."""
    if device not in {"auto", "cuda"} or not choose_device(device).startswith("cuda"):
        return 0
    import torch

    count: int = torch.cuda.device_count()
    return count


def _gpus_each(config: IndexConfig) -> int:
    return getattr(config, "tensor_parallel", 1)

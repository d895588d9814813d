"""A run shared by workers: where they are, how many, and what they are told."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from scaledown.config.prepare import IndexConfig
from scaledown.errors import UsageError
from scaledown.models import choose_device
from scaledown.run.directory import RunDirectory
from scaledown.run.executor import LocalPool, Pool, supervise
from scaledown.run.heartbeat import supervising
from scaledown.run.logs import start_logging, style
from scaledown.run.overview import Overview

Config = TypeVar("Config", bound=IndexConfig)


def supervised(config: IndexConfig) -> bool:
    """Whether workers do the work, and this process looks after them."""
    asked = config.workers or config.task_timeout or config.executor != "local"
    return bool(asked) or gpus_here(config.device) // _gpus_each(config) > 1


def share(config: IndexConfig, target: str, runs: Sequence[RunDirectory]) -> None:
    """Let workers carry out `target`, `module:function`, until all is done; `runs` is where they work."""
    pool, count = pool_of(config, runs[0])
    limits = [flag for flag in ("max_total_tokens", "max_requests_per_minute") if getattr(config, flag, 0)]
    if limits and count > 1:
        raise UsageError(
            f"--{limits[0]} holds for one process: leave out --workers, which a server needs not"
        )
    alone = {"workers": count, "executor": "local", "task_timeout": 0.0, "metrics_file": ""}
    settings = {"config": asdict(config) | alone, "log": style()._asdict()}
    leases = [run.leases for run in runs]
    with supervising(), contextlib.closing(Overview(runs[0].path)) as overview:
        supervise(pool, target, settings, count, leases, config.task_timeout, overview.look)


def settings_of(kind: type[Config], settings: Mapping[str, Any], worker: str) -> Config:
    """What a worker was told, as settings again; it logs like the one who told it."""
    start_logging(**{**settings["log"], "worker": worker})
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings["config"].items()
    }
    return kind(**given)


def pool_of(config: IndexConfig, run: RunDirectory) -> tuple[Pool, int]:
    """The pool that `config` asks for, and its number of workers."""
    each = _gpus_each(config)
    if config.executor == "ray":
        from scaledown.run.ray_pool import RayPool

        if config.device.startswith("cuda:"):
            raise UsageError(f"--device {config.device}: Ray gives each worker its GPU: leave out its number")
        ray = RayPool(config.ray_address, config.workers, 0 if config.device == "cpu" else each)
        if ray.has_gpus and not choose_device(config.device).startswith("cuda"):
            raise UsageError(
                "--executor ray: the cluster has GPUs and this machine has none: start the command on a node "
                "that has one, or give --device cpu"
            )
        return ray, ray.workers
    seen = gpus_here(config.device)
    count = config.workers or max(1, seen // each)
    if seen and count * each > seen:
        raise UsageError(
            f"--workers {count}: there are {seen} GPUs"
            + (f", and --tensor_parallel takes {each} for each worker" if each > 1 else "")
        )
    return LocalPool(count, run.path / "live", each if seen else 0), count


def gpu_workers(config: IndexConfig) -> int:
    """Workers that have a GPU each, as far as this machine knows; at least this process."""
    seen = gpus_here(config.device) // _gpus_each(config)
    return max(1, min(config.workers, seen) if config.workers and config.executor == "local" else seen)


def gpus_here(device: str) -> int:
    """GPUs of which workers could have one each: none where `device` names one, or a CPU."""
    if device not in {"auto", "cuda"} or not choose_device(device).startswith("cuda"):
        return 0
    import torch

    count: int = torch.cuda.device_count()
    return count


def _gpus_each(config: IndexConfig) -> int:
    return getattr(config, "tensor_parallel", 1)

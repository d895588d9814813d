"""Workers as tasks on a Ray cluster; each gets its GPUs on any node that has them free."""

import logging
import math
import os
import socket
from typing import Any, Final

from scaledown.errors import MissingExtraError, ScaleDownError, UsageError, install_command
from scaledown.run.executor import Ending, Order

log = logging.getLogger("scaledown")

_KNOCK_SECONDS: Final = 10
# Environment variables for workers. API keys are not passed on, since Ray shows these variables: set keys
# where the nodes are started.
_VARIABLES: Final = (
    *("OMP_NUM_THREADS", "MKL_CBWR", "SCALEDOWN_CACHE"),
    *("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "TRANSFORMERS_OFFLINE"),
)


class RayPool:
    """A Ray cluster. Its nodes need this package, and access to corpus, run directory and output.

    Args:
        address: The value of `--ray_address`.
        workers: Number of workers; with 0, one for each group of `gpus_each` GPUs, or one for each node if
            the cluster has no GPU.
        gpus_each: GPUs of each worker; 0 if it works on a CPU.

    Raises:
        MissingExtraError: Ray is not installed.
        UsageError: No cluster answers at the address, or no node has `gpus_each` GPUs.
    """

    def __init__(self, address: str, workers: int, gpus_each: int) -> None:
        try:
            import ray
        except ImportError as error:
            raise MissingExtraError(
                f"--executor ray needs Ray: {install_command('ray')}, or leave out --executor"
            ) from error
        self._ray: Any = ray
        if not ray.is_initialized():
            try:
                _knock(address)
                ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
            except (OSError, ValueError, RuntimeError) as error:
                raise UsageError(
                    f"--ray_address {address}: no Ray cluster answers there ({error}): start one with `ray "
                    "start --head`, or give --ray_address local"
                ) from error
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        self.has_gpus = bool(gpus_each) and any(node.get("GPU", 0) for node in nodes)
        self._gpus_each = gpus_each if self.has_gpus else 0
        room = [int(node.get("GPU", 0)) // gpus_each if self.has_gpus else 1 for node in nodes]
        if not any(room):
            raise UsageError(f"--tensor_parallel {gpus_each}: no node of the cluster has that many GPUs")
        self.workers = workers or sum(room)
        """By default one for each GPU; if the cluster has no GPU, one for each node."""
        a_node = math.ceil(self.workers / len(nodes))
        cores = min(int(node.get("CPU", 1)) for node, fits in zip(nodes, room, strict=True) if fits)
        self._threads = max(1, cores // (max(room) if self.has_gpus else a_node))
        self._cores_each = (
            1 if self.has_gpus else self._threads
        )  # with GPUs, their number decides how many workers fit
        log.info("Ray: %s nodes, %s workers", len(nodes), self.workers)
        free = self._ray.available_resources().get("GPU" if self.has_gpus else "CPU", 0)
        if free < self.workers * (gpus_each if self.has_gpus else self._cores_each):
            log.warning("Ray: not all workers can start at once; they wait for room on the cluster")

    def start(self, order: Order, place: int) -> "_Task":
        """Submit a worker; it waits until a node has room for it."""
        own = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
        own.setdefault("OMP_NUM_THREADS", str(self._threads))
        remote = self._ray.remote(_carry_out).options(
            num_cpus=self._cores_each,
            num_gpus=self._gpus_each,
            max_retries=0,  # `supervise` starts another
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": own},
            name=f"scaledown {order.worker}",
        )
        return _Task(self._ray, remote.remote(order._asdict()))


def _knock(address: str) -> None:
    """Raise `OSError` if nothing listens at the address: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_KNOCK_SECONDS).close()


def _carry_out(order: dict[str, Any]) -> tuple[str, str] | None:
    """Run a worker. Returns class and message if it ends with a `ScaleDownError`."""
    try:
        Order(**order).carry_out()
    except ScaleDownError as error:
        return type(error).__name__, str(error)
    return None


class _Task:
    """A worker on the cluster."""

    def __init__(self, ray: Any, reference: Any) -> None:
        self._ray, self._reference = ray, reference

    def ended(self) -> Ending | None:
        if not self._ray.wait([self._reference], timeout=0)[0]:
            return None
        try:
            error = self._ray.get(self._reference)
        except self._ray.exceptions.RayError as death:
            return Ending(well=False, reason=" ".join(str(death).split())[-200:])
        return Ending.failed(*error) if error else Ending(well=True)

    def kill(self) -> None:
        self._ray.cancel(self._reference, force=True)

"""Settings that several commands share: what is left out, what runs a teacher, who does the work."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from scaledown.config.options import Checked, option
from scaledown.errors import UsageError
from scaledown.extensions import TEACHER_ENGINES
from scaledown.urls import is_url

DTYPES: Final = ("auto", "float32", "bfloat16", "float16")
AUTO_DTYPE: Final = "auto is bfloat16 on CUDA, float16 on its GPUs before compute capability 8, else float32"
BACKENDS: Final = ("auto", *TEACHER_ENGINES)
EXECUTORS: Final = ("local", "ray")
BATCHES: Final = {"batch_size": (32, 256), "reranker_batch_size": (16, 128), "teacher_batch_size": (8, 32)}
"""What is taken at once where nothing is given, and on CUDA, which smaller batches leave idle."""
DUPLICATES: Final = ("exact", "near")
CLEANING: Final = "cleaning (docs/cleaning.md)"
ENGINE: Final = "what runs the teacher"
ENDPOINT: Final = "teacher behind an OpenAI-compatible server"
MACHINE: Final = "machine"
WORKERS: Final = "workers (docs/scaling.md)"


def batch_for(name: str, given: int, device: str) -> int:
    """What is taken at once: what was given, or for 0 what suits the device."""
    return given or BATCHES[name][device.startswith("cuda")]


@dataclass(frozen=True)
class Part:
    """Which part of the queries this process makes: number `number`, from 0, of `count`."""

    number: int
    count: int

    def of(self, shards: int) -> range:
        """Its shards, of so many: as many as those of any other part, but for one."""
        return range(shards * self.number // self.count, shards * (self.number + 1) // self.count)


WHOLE: Final = Part(0, 1)


@dataclass(frozen=True, kw_only=True)
class WorkersConfig(Checked):
    """Who does the work of a run, and where its metrics go."""

    metrics_file: str = option(
        "",
        MACHINE,
        "keep the run's metrics there, for the textfile collector of Prometheus' node_exporter",
        metavar="FILE.prom",
    )
    workers: int = option(
        0,
        WORKERS,
        "processes that share the work; 0: one a GPU where there are several, else this process alone",
        "processes",
        metavar="N",
    )
    executor: str = option(
        "local", WORKERS, "where workers run: processes here, or on Ray", choices=EXECUTORS
    )
    ray_address: str = option(
        "auto",
        WORKERS,
        "of --executor ray: auto is the cluster that this machine is in; else HOST:PORT, or local: a new one",
        metavar="HOST",
    )
    task_timeout: float = option(
        0.0,
        WORKERS,
        "kill a worker that is at one shard for longer, and let another make it; 0: wait for ever",
        "seconds",
        metavar="S",
    )

    def _check_workers(self) -> None:
        self._check_at_least(0, "workers", "task_timeout")
        if self.metrics_file and not self.metrics_file.endswith(".prom"):
            raise UsageError(
                f"--metrics_file {self.metrics_file}: must end in .prom, else no collector reads it"
            )
        if is_url(self.metrics_file):
            raise UsageError("--metrics_file is a URL: give a local path")


@dataclass(frozen=True, kw_only=True)
class CleanConfig(Checked):
    """What `scaledown prepare` and `scaledown merge` leave out."""

    decontaminate: tuple[str, ...] = option(
        (),
        CLEANING,
        "leave out queries that are, exactly or nearly, questions of this evaluation file; a path, folder or "
        "URL; may be given several times",
        metavar="FILE",
    )
    decontaminate_answers: bool = option(
        False,
        CLEANING,
        "with --decontaminate: leave out records with an evaluation question's answer and its passage, too",
    )
    deduplicate: str = option(
        "",
        CLEANING,
        "of queries that are the same, keep the first; near: but for a word or so",
        choices=DUPLICATES,
    )

    def __post_init__(self) -> None:
        self._check_files("decontaminate")
        self._check_choices()
        if self.decontaminate_answers and not self.decontaminate:
            raise UsageError("--decontaminate_answers needs --decontaminate FILE: give both")


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Checked):
    """What runs a teacher, or a judge."""

    teacher_8bit: bool = option(False, ENGINE, "load the teacher in 8 bits (extra: quantization)")
    teacher_4bit: bool = option(False, ENGINE, "load the teacher in 4 bits (extra: quantization)")
    teacher_batch_size: int = option(
        0, ENGINE, "prompts answered at once; 0 is 8, on CUDA 32", "prompts", metavar="N"
    )
    teacher_backend: str = option(
        "auto",
        ENGINE,
        "what runs the teacher; auto: endpoint with --teacher_endpoint, vllm on CUDA and openvino on a CPU "
        "where they are installed, else transformers",
        choices=BACKENDS,
    )
    teacher_context: int = option(
        0, ENGINE, "longest prompt and answer together; 0 is what the teacher takes", "tokens", metavar="N"
    )
    teacher_lora: str = option("", ENGINE, "folder of a LoRA adapter, with vllm", metavar="DIR")
    tensor_parallel: int = option(1, ENGINE, "GPUs that share the teacher, with vllm", "GPUs", metavar="N")
    teacher_memory: float = option(
        0.0, ENGINE, "share of its GPU that vllm takes; 0 is what is free", "0..1", metavar="X"
    )
    flush_seconds: float = option(
        5.0, ENGINE, "answers are on disk after so long at most", "seconds", metavar="S"
    )
    teacher_endpoint: tuple[str, ...] = option(
        (),
        ENDPOINT,
        "base URL (http://localhost:8000/v1); may be given several times, to share the load; a key is read "
        "from OPENAI_API_KEY",
        metavar="URL",
    )
    max_total_tokens: int = option(
        0,
        ENDPOINT,
        "stop each teacher after so many tokens, prompts and answers; the same command with more "
        "goes on; 0: no limit",
        "tokens",
        metavar="N",
    )
    max_requests_per_minute: int = option(0, ENDPOINT, "0: no limit", "requests", metavar="N")
    request_timeout: float = option(
        120.0, ENDPOINT, "a request is tried again after so long", "seconds", metavar="S"
    )
    input_price: float = option(
        0.0, ENDPOINT, "of a million prompt tokens: the cost so far is shown", metavar="X"
    )
    output_price: float = option(0.0, ENDPOINT, "of a million answer tokens", metavar="X")

    def _check_engine(self) -> None:
        self._check_at_least(1, "tensor_parallel")
        self._check_at_least(0, "teacher_batch_size", "teacher_context")
        self._check_at_least(0, "max_total_tokens", "max_requests_per_minute")
        self._check_positive("flush_seconds", "request_timeout")
        self._check_share("teacher_memory")
        self._check_finite("input_price", "output_price")
        if self.teacher_endpoint and (self.teacher_8bit or self.teacher_4bit):
            raise UsageError(
                "--teacher_8bit and --teacher_4bit: a server loads its model itself, leave them out"
            )
        if self.teacher_lora and not (Path(self.teacher_lora).expanduser() / "adapter_config.json").is_file():
            raise UsageError(f"--teacher_lora {self.teacher_lora} is no folder with an adapter_config.json")
        for url in self.teacher_endpoint:
            if not re.match(r"https?://[^/@]+(/[^?#]*)?$", url):
                raise UsageError(
                    "--teacher_endpoint: expected http(s)://HOST[:PORT]/v1, without a key: it goes into "
                    "OPENAI_API_KEY"
                )
        if self.teacher_8bit and self.teacher_4bit:
            raise UsageError("--teacher_8bit and --teacher_4bit exclude each other: give one")

"""Settings that several commands share: cleaning, the teacher's engine, workers."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from scaledown.config.options import SHARE, Options, Range, option
from scaledown.errors import UsageError
from scaledown.extensions import STUDENT_ENGINES, TEACHER_ENGINES

DTYPES: Final = ("auto", "float32", "bfloat16", "float16")
AUTO_DTYPE: Final = (
    "auto is bfloat16 on CUDA and on CPUs with AVX512-BF16 or AMX, float16 on GPUs before compute capability "
    "8, else float32"
)
BACKENDS: Final = ("auto", *TEACHER_ENGINES)
ENGINES: Final = ("auto", *STUDENT_ENGINES)
ENGINES_HELP: Final = (
    "engine that writes the answers; auto: vllm if it is installed for the device, else on a CPU openvino if "
    "it is installed and can run the generator, else transformers"
)
EXECUTORS: Final = ("local", "ray")
DUPLICATES: Final = ("exact", "near")
AUTO: Final = "auto"
MODEL: Final = "model"
CLEANING: Final = "cleaning (docs/cleaning.md)"
TEACHER_ENGINE: Final = "what runs the teacher"
ENDPOINT: Final = "teacher behind an OpenAI-compatible server"
OUTPUT: Final = "output and run"
MACHINE: Final = "machine"
WORKERS: Final = "workers (docs/scaling.md)"


@dataclass(frozen=True)
class QueryPart:
    """The part of the queries that this process makes: part `number`, counted from 0, of `count` parts."""

    number: int
    count: int

    def of(self, shards: int) -> range:
        """Return the shards of this part. The sizes of parts differ by at most one.

        Args:
            shards: Number of shards of all parts together.
        """
        return range(shards * self.number // self.count, shards * (self.number + 1) // self.count)


WHOLE: Final = QueryPart(0, 1)


@dataclass(frozen=True, kw_only=True)
class WorkersConfig(Options):
    """Which processes work on a run, and where its metrics go."""

    metrics_file: str = option(
        "",
        MACHINE,
        "write the run's metrics to this file, for the textfile collector of Prometheus' node_exporter",
        role="place",
        local=True,
        metavar="FILE.prom",
    )
    workers: int = option(
        0,
        WORKERS,
        "processes that share the work; 0: one for each GPU if there are several, else this process alone",
        "processes",
        role="operation",
        within=Range(0),
    )
    executor: str = option(
        "local",
        WORKERS,
        "where workers run: as processes on this machine, or on Ray",
        role="operation",
        choices=EXECUTORS,
    )
    ray_address: str = option(
        "auto",
        WORKERS,
        "address of the Ray cluster: auto is the cluster of this machine; HOST:PORT; local starts a new one",
        role="operation",
        metavar="HOST",
    )
    task_timeout: float = option(
        0.0,
        WORKERS,
        "stop a worker that needs longer than this for one shard, and let another make it; 0: no limit",
        "seconds",
        role="operation",
        within=Range(0),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metrics_file and not self.metrics_file.endswith(".prom"):
            raise UsageError(
                f"--metrics_file {self.metrics_file}: must end in .prom, otherwise no collector reads it"
            )

    def of_worker(self, workers: int) -> dict[str, Any]:
        """Return the settings that differ for a worker, which starts no workers itself.

        Args:
            workers: Number of workers.
        """
        return {item.name: item.default for item in fields(WorkersConfig)} | {"workers": workers}


@dataclass(frozen=True, kw_only=True)
class CleanConfig(Options):
    """Settings of `scaledown prepare` and `scaledown merge` for queries and records to leave out."""

    decontaminate: tuple[str, ...] = option(
        (),
        CLEANING,
        "leave out queries that are exactly or nearly questions of this evaluation file; a path, folder or "
        "URL; may be given several times",
        role="input",
        metavar="FILE",
    )
    decontaminate_answers: bool = option(
        False,
        CLEANING,
        "with --decontaminate: also leave out records that have the answer of an evaluation question and a "
        "passage that holds it",
        role="result",
    )
    deduplicate: str = option(
        "",
        CLEANING,
        "keep only the first of equal queries; near: also of queries that differ by about one word",
        role="result",
        choices=DUPLICATES,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decontaminate_answers and not self.decontaminate:
            raise UsageError("--decontaminate_answers needs --decontaminate FILE: give both")


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Options):
    """The engine of a teacher or a judge."""

    teacher_8bit: bool = option(
        False,
        TEACHER_ENGINE,
        "load the teacher in 8 bits (extra: quantization)",
        role="result",
        in_records=True,
    )
    teacher_4bit: bool = option(
        False,
        TEACHER_ENGINE,
        "load the teacher in 4 bits (extra: quantization)",
        role="result",
        in_records=True,
    )
    teacher_batch_size: int = option(
        0,
        TEACHER_ENGINE,
        "prompts answered at once",
        "prompts",
        role="result",
        automatic=(8, 32),
        within=Range(0),
    )
    teacher_backend: str = option(
        "auto",
        TEACHER_ENGINE,
        "engine that runs the teacher; auto: endpoint with --teacher_endpoint, vllm on CUDA if it is "
        "installed, on a CPU openvino if it is installed and the teacher is already exported, or vllm if it "
        "is installed, else transformers",
        role="result",
        choices=BACKENDS,
    )
    teacher_context: int = option(
        0,
        TEACHER_ENGINE,
        "longest prompt and answer together; 0: as long as the teacher allows",
        "tokens",
        role="result",
        within=Range(0),
    )
    teacher_lora: str = option(
        "", TEACHER_ENGINE, "folder of a LoRA adapter, for vllm", role="result", path=True, metavar="DIR"
    )
    tensor_parallel: int = option(
        1, TEACHER_ENGINE, "GPUs that share the teacher, for vllm", "GPUs", role="result", within=Range(1)
    )
    teacher_memory: float = option(
        0.0,
        TEACHER_ENGINE,
        "share of the GPU's memory that vllm uses; 0: all that is free",
        role="operation",
        within=SHARE,
    )
    flush_seconds: float = option(
        5.0,
        TEACHER_ENGINE,
        "write answers to disk at least this often",
        "seconds",
        role="operation",
        within=Range(above=0),
    )
    teacher_endpoint: tuple[str, ...] = option(
        (),
        ENDPOINT,
        "base URL (http://localhost:8000/v1); may be given several times, to share the load; a key is read "
        "from OPENAI_API_KEY",
        role="operation",
        metavar="URL",
    )
    max_total_tokens: int = option(
        0,
        ENDPOINT,
        "stop each teacher after this many tokens of prompts and answers; the same command with a higher "
        "limit continues; 0: no limit",
        "tokens",
        role="operation",
        within=Range(0),
        per_process=True,
    )
    max_requests_per_minute: int = option(
        0,
        ENDPOINT,
        "send at most this many requests a minute; 0: no limit",
        "requests",
        role="operation",
        within=Range(0),
        per_process=True,
    )
    request_timeout: float = option(
        120.0,
        ENDPOINT,
        "send a request again if it takes longer than this",
        "seconds",
        role="operation",
        within=Range(above=0),
    )
    input_price: float = option(
        0.0,
        ENDPOINT,
        "price of a million prompt tokens, to show the cost so far",
        role="report",
        within=Range(0),
    )
    output_price: float = option(
        0.0, ENDPOINT, "price of a million answer tokens", role="report", within=Range(0)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_endpoint and (self.teacher_8bit or self.teacher_4bit):
            raise UsageError(
                "--teacher_8bit and --teacher_4bit: a server loads its model itself, leave them out"
            )
        if self.teacher_lora and not (Path(self.teacher_lora).expanduser() / "adapter_config.json").is_file():
            raise UsageError(
                f"--teacher_lora {self.teacher_lora} is not a folder with an adapter_config.json"
            )
        for url in self.teacher_endpoint:
            if not re.match(r"https?://[^/@]+(/[^?#]*)?$", url):
                raise UsageError(
                    "--teacher_endpoint: expected http(s)://HOST[:PORT]/v1, without a key: it goes into "
                    "OPENAI_API_KEY"
                )
        if self.teacher_8bit and self.teacher_4bit:
            raise UsageError("--teacher_8bit and --teacher_4bit exclude each other: give one")

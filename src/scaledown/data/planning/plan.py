"""What a run will take here, before it starts: its inputs are counted or sampled, its models tried briefly.

A plan is of a whole run: what an earlier one left in the run directory or the index is not looked at.
"""

import itertools
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import pyarrow as pa
from tokenizers import Tokenizer, models, pre_tokenizers

from scaledown.config.prepare import PrepareConfig
from scaledown.data.input import files
from scaledown.data.input.corpus import ROWS_AT_ONCE, cutting_processes, load_retriever_tokenizer
from scaledown.data.input.queries import MS_MARCO_QUERIES, dataset_size, from_dataset, from_files
from scaledown.data.planning.sample import CorpusSample, sample_corpus, sample_index
from scaledown.data.planning.trial import UNKNOWN_COST, StageCost, Trials, listing_missing, peak
from scaledown.data.retrieval.stages import TokenLists
from scaledown.data.teacher.api import find_teacher
from scaledown.data.teacher.base import EngineSettings
from scaledown.data.workers import gpu_workers
from scaledown.devices.choice import choose_device
from scaledown.errors import InputError
from scaledown.models.sources import resolve
from scaledown.records import Passage
from scaledown.run.atomic import write_json
from scaledown.run.directory import RunDirectory, fingerprint
from scaledown.run.executor import cores
from scaledown.run.locations import index_of, output_of, run_of
from scaledown.run.progress import duration
from scaledown.run.stage import StageResult

_MOST_QUERIES: Final = 1000  # the most queries that are read
_BYTES_A_WORKER: Final = 200_000_000  # memory of a process that cuts passages: libraries and a cache of words
_COPIES_OF_A_SHARD: Final = 3  # texts or vectors as read, in work, and packed
_LONG_RUN_SECONDS: Final = 24 * 3600.0
_SHOWN_AS: Final = {
    "synthetic": "prompts",
    "passages": "passages",
    "vectors": "passages",
    "output": "records",
}
_ON_GPUS: Final = {"vectors": 1, "ranked": 1, "synthetic": 0, "answers": 0}
"""Stages on a GPU, and the GPUs of a worker that makes them; 0: as many as share the teacher."""


class StagePlan(NamedTuple):
    """The plan of a stage. None is not known."""

    name: str
    """The stage's name, or `output`."""
    rows: int | None
    """Number of rows."""
    shards: int | None
    """Number of shards."""
    disk: int | None
    """Bytes on disk."""
    memory: int | None
    """The peak of memory, in bytes."""
    seconds: float | None
    """Planned time, in seconds."""


class Plan(NamedTuple):
    """The resources that a run will need, by stage."""

    stages: list[StagePlan]
    """The stages, in order."""
    missing: list[str]
    """Models, disk space and devices that the run lacks here."""
    sampled: str
    """The rows that the plan is based on, in words."""
    device: str
    """The device of the run."""


class Queries(NamedTuple):
    """The number of queries if it is known, the first queries, and the seconds for reading."""

    number: int | None
    texts: list[str]
    seconds: float | None


def make_plan(config: PrepareConfig, corpus: Sequence[files.Source]) -> Plan:  # noqa: PLR0915
    """Plan a run. Each model is tried on a sample for some seconds; missing models are listed.

    Args:
        config: The run's settings.
        corpus: The files and folders of the corpus; empty for a run over an existing index.

    Raises:
        InputError: An input is one that a run would refuse.
    """
    missing: list[str] = []
    device = "cpu"
    with listing_missing(missing):
        device = choose_device(config.device)
    queries = _count_queries(config, missing)
    reading = StageCost(math.inf if queries.seconds is None else queries.seconds, 0, peak("cpu"))
    tokenizer = _word_tokenizer()
    with listing_missing(missing):
        tokenizer = load_retriever_tokenizer(resolve(config.retriever_model), config)
    sample = sample_corpus(config, corpus, tokenizer) if corpus else sample_index(config)
    table = sample.cut.passages
    passages = round(table.num_rows * sample.whole)
    size = sum(map(files.size_of, files.every(corpus, "--corpus_path")))
    processes = cutting_processes(size)
    workers = processes * _BYTES_A_WORKER if processes > 1 else 0
    cutting = StageCost(0, sample.seconds / table.num_rows / processes, peak("cpu") + workers)
    found = [Passage(**record) for record in table.select(Passage._fields).to_pylist()]
    trials = Trials(
        config=config.sized(device),
        texts=queries.texts
        or [f"What is {passage.title or passage.text[:40]}?" for passage in found[:_MOST_QUERIES]],
        passages=found,
        tokens=TokenLists(table.column("tokens")),
        top_k=min(config.top_k_retrieval, passages),
        documents_per_query=min(config.documents_per_query, passages),
        most=_MOST_QUERIES if queries.number is None else queries.number,
        missing=missing,
    )

    def of_queries(name: str, like: pa.Table, cost: StageCost) -> StagePlan:
        return _planned_stage(name, queries.number, config.queries_per_shard, like, cost)

    stages = []
    if wanted := config.num_synthetic_queries:
        written, cost = trials.questions()
        usable = sum(map(bool, written.column("question").to_pylist())) if written else 0
        asked = round(wanted * len(written) / usable) if written and usable else None
        stages.append(
            _planned_stage("synthetic", asked, min(config.queries_per_shard, wanted), written, cost)
        )
    stages.append(of_queries("queries", trials.queries(), reading))
    per_shard = _passages_a_shard(config, sample)
    stages.append(_planned_stage("passages", passages, per_shard, table, cutting))
    vectors, encoding, searching = trials.vectors(math.ceil(passages / per_shard))
    stages.append(_planned_stage("vectors", passages, per_shard, vectors, encoding))
    searching = searching._replace(each=searching.each * passages)
    stages.append(of_queries("candidates", trials.candidates(trials.top_k), searching))
    if config.reranks:
        stages.append(of_queries("ranked", *trials.ranked()))
    answers, cost = trials.answers()
    stages.append(of_queries("answers", answers, cost))
    if config.second_teacher_model:
        with listing_missing(missing):
            find_teacher(config.second_teacher_model, EngineSettings.of(config))
        stages.append(
            of_queries(
                "second", answers.select(sorted({*answers.column_names} - {"answer_logprobs"})), UNKNOWN_COST
            )
        )
    stages.append(of_queries("reviewed", trials.reviewed(answers), StageCost(0, 0, peak("cpu"))))
    output = None if queries.number is None else queries.number * trials.record_bytes(answers)
    stages.append(StagePlan("output", queries.number, 1, output, 0, 0.0))
    on_gpus = device.startswith("cuda")
    workers = gpu_workers(config) if on_gpus else 1
    stages = [_shared(stage, config) for stage in stages] if on_gpus else stages
    missing += _missing_disk(config, stages)
    missing += _missing_gpu(stages, device)
    bad = len(sample.cut.rejected)
    share = "all" if sample.whole == 1 else f"{1 / sample.whole:.2%} of the {sample.of}:"
    malformed = f" ({bad / sample.cut.rows:.1%} malformed)" if bad else ""
    tried = f"models tried on {device}, {cores()} cores" + (f", for {workers} workers" if workers > 1 else "")
    sampled = f"{share} {sample.cut.rows:,} rows{malformed}; {tried}"
    return Plan(stages, missing, sampled, device)


def _planned_stage(
    name: str, rows: int | None, per_shard: int, like: pa.Table | None, cost: StageCost
) -> StagePlan:
    """Plan a stage of `rows` rows like those of `like`."""
    if rows is None:
        return StagePlan(name, None, None, None, cost.memory or None, None)
    shards = math.ceil(rows / per_shard)
    disk = memory = None
    if like is not None:
        frame = _stored(like.slice(0, 0))
        each = (_stored(like) - frame) / max(1, like.num_rows)
        disk = round(each * rows + frame * shards)
        memory = (
            cost.memory + round(each * min(rows, per_shard) * _COPIES_OF_A_SHARD) if cost.memory else None
        )
    seconds = cost.start + cost.each * rows
    return StagePlan(name, rows, shards, disk, memory, seconds if math.isfinite(seconds) else None)


def _shared(stage: StagePlan, config: PrepareConfig) -> StagePlan:
    """Plan a stage on GPUs; its shards are divided among workers."""
    if stage.name not in _ON_GPUS or not stage.seconds or not stage.shards:
        return stage
    workers = gpu_workers(config, _ON_GPUS[stage.name])
    return stage._replace(seconds=stage.seconds / min(workers, stage.shards))


def _stored(table: pa.Table) -> int:
    """Return the size in bytes of a table, written as a shard."""
    sink = pa.MockOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return int(sink.size())


# Counting and sampling


def _count_queries(config: PrepareConfig, missing: list[str]) -> Queries:
    """Count the queries, by reading those that are on this machine. Raises `InputError` like a run."""
    if config.num_synthetic_queries:
        return Queries(config.num_synthetic_queries, [], 0.0)
    started = time.perf_counter()
    intake = files.Intake("the queries", config.max_bad_fraction)
    source = from_files(config, intake, fetch=False)
    elsewhere = config.query_dataset and not Path(config.query_dataset).exists()
    if not elsewhere:
        source = itertools.chain(source, from_dataset(config, intake))
    texts = [query.text for query in itertools.islice(source, _MOST_QUERIES)]
    number = len(texts) + sum(1 for _ in source) + (MS_MARCO_QUERIES if config.download_ms_marco else 0)
    intake.close()
    if elsewhere:
        size = None
        with listing_missing(missing):
            size = dataset_size(config)
        return Queries(None if size is None else number + size, texts, None)
    if not number:
        raise InputError("there are no queries in what was given: expected one query a line")
    return Queries(number, texts, time.perf_counter() - started)


def _word_tokenizer() -> Tokenizer:
    """Return a function that counts words and punctuation, to replace a missing tokenizer."""
    words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))  # noqa: S106
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return words


def _passages_a_shard(config: PrepareConfig, sample: CorpusSample) -> int:
    """Passages of a shard: a shard is whole batches of rows, and ends with the one that fills it."""
    batch = float(sample.cut.passages.num_rows / sample.cut.rows * ROWS_AT_ONCE)
    return max(1, round(math.ceil(config.passages_per_shard / batch) * batch))


# What is missing besides models


def _missing_disk(config: PrepareConfig, stages: Sequence[StagePlan]) -> list[str]:
    """List file systems with less free space than the stages on them need."""
    places = {stage.name: run_of(config).root for stage in stages}
    places["output"] = output_of(config).path
    if config.index_dir:
        places |= dict.fromkeys(("passages", "vectors"), index_of(config).root)
    needed: dict[int, int] = {}
    where: dict[int, Path] = {}
    for stage in stages:
        path = places[stage.name].resolve()
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        system = there.stat().st_dev
        needed[system] = needed.get(system, 0) + (stage.disk or 0)
        where.setdefault(system, there)
    return [
        f"disk: {_bytes_shown(needed[system])} needed in {folder}, {_bytes_shown(free)} free: free some, or "
        "put --work_dir, --index_dir, --output_file or --cache_dir elsewhere"
        for system, folder in where.items()
        if (free := shutil.disk_usage(folder).free) < needed[system]
    ]


def _missing_gpu(stages: Sequence[StagePlan], device: str) -> list[str]:
    seconds = {stage.name: stage.seconds for stage in stages if stage.seconds is not None}
    if device != "cpu" or total_seconds(seconds) < _LONG_RUN_SECONDS:
        return []
    slowest = max(seconds, key=lambda name: seconds[name])
    return [f"a GPU: {slowest} alone takes {duration(seconds[slowest])} here"]


def total_seconds(seconds: Mapping[str, float]) -> float:
    """Add up the seconds of a run's stages; passages and vectors are made at the same time."""
    return sum(seconds.values()) - min(seconds.get("passages", 0.0), seconds.get("vectors", 0.0))


# Output


def report(plan: Plan) -> str:
    """Format the plan as a table, and list what is missing."""
    rows = [("stage", "rows", "shards", "disk", "peak memory", "time")]
    for stage in plan.stages:
        gpu = " GPU" if plan.device.startswith("cuda") and stage.name in _ON_GPUS else ""
        output = stage.name == "output"
        rows.append(
            (
                stage.name,
                "unknown" if stage.rows is None else f"{stage.rows:,} {_SHOWN_AS.get(stage.name, 'queries')}",
                "" if output else "unknown" if stage.shards is None else f"{stage.shards:,}",
                "unknown" if stage.disk is None else _bytes_shown(stage.disk),
                "" if output else "unknown" if stage.memory is None else _bytes_shown(stage.memory) + gpu,
                "" if output else "unknown" if stage.seconds is None else duration(stage.seconds),
            )
        )
    known = {stage.name: stage.seconds for stage in plan.stages if stage.seconds is not None}
    disk = sum(stage.disk or 0 for stage in plan.stages)
    at_least = "" if len(known) == len(plan.stages) else "at least "
    rows.append(("total", "", "", _bytes_shown(disk), "", at_least + duration(total_seconds(known))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"from {plan.sampled}", ""]
    for name, *cells in rows:
        right = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append(f"  {name.ljust(widths[0])}  {right}".rstrip())
    lines += ["", *(f"missing: {item}" for item in plan.missing)]
    return "\n".join(lines if plan.missing else lines[:-1])


def _bytes_shown(count: int) -> str:
    unit, name = next(
        ((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if count >= unit), (1e3, "kB")
    )
    return f"{count / unit:,.1f} {name}"


def keep_plan(plan: Plan, config: PrepareConfig) -> None:
    """Write the plan into the run directory, for the run's summary.

    Args:
        plan: The plan.
        config: The settings of the run.

    Raises:
        RunDirectoryError: The folder has other things in it.
        OutputError: It cannot be written.
    """
    run = RunDirectory(run_of(config))
    content = plan._asdict() | {"stages": [stage._asdict() for stage in plan.stages]}
    write_json(run.path / "plan.json", {"command": _command(config), **content})
    run.storage.publish(run.path / "plan.json")


def planned_seconds(config: PrepareConfig) -> dict[str, float]:
    """Return the planned seconds of each stage, if `plan` was run with the same command before."""
    run = run_of(config)
    content = run.read_json(run.root / "plan.json")
    if not isinstance(content, dict) or content.get("command") != _command(config):
        return {}
    return {stage["name"]: stage["seconds"] for stage in content["stages"] if stage["seconds"] is not None}


def _command(config: PrepareConfig) -> str:
    """Return a fingerprint of the command's settings and of the times of its files, which may be huge."""
    named = config.named("result", "input", "model", "operation")
    paths = [Path(name).expanduser() for name in (*config.queries_file, *config.corpus_path)]
    changed = [path.stat().st_mtime_ns for path in paths if path.exists()]
    return fingerprint({name: getattr(config, name) for name in named} | {"changed": changed})


def compared(planned: Mapping[str, float], stages: Mapping[str, StageResult]) -> str:
    """Compare planned and actual seconds, in a sentence; stages without a plan do not count.

    Args:
        planned: Planned seconds, by stage.
        stages: The records of the finished stages.
    """
    both = planned.keys() & stages.keys()
    expected = total_seconds({name: planned[name] for name in both})
    took = total_seconds({name: stages[name].seconds for name in both})
    off = f"{abs(took / expected - 1):.0%} {'more' if took > expected else 'less'}" if expected else "more"
    unplanned = [name for name in stages if name not in both]
    without = f", without {', '.join(unplanned)}" if unplanned else ""
    return f"the plan said {duration(expected)}, it took {duration(took)} ({off}){without}"

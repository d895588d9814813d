"""The main command: queries + corpus -> train_data.json.

queries ─┐
         ├─> retrieve ─> rerank ─> teach ─> export ─> train_data.json
corpus ──┘ (passages, vectors)
"""

import sys
from functools import partial
from importlib import import_module

from scaledown.errors import OutputError, UsageError, run_command

if __name__ == "__main__":  # before the imports that take long: Ctrl-C is one line during them, too
    start = partial(run_command, debug="--debug" in sys.argv, resumes=True)
    raise SystemExit(start(lambda: import_module("scaledown.data.prepare_dataset").main()))

import contextlib
import functools
import logging
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import scaledown
from scaledown.config import PrepareConfig, is_url
from scaledown.data.build_index import (
    Index,
    corpus_identity,
    file_identity,
    machine,
    open_index,
)
from scaledown.data.encoders import load_encoder
from scaledown.data.export import examples, write_examples
from scaledown.data.formats import validate
from scaledown.data.inputs import Sources, find, find_inputs
from scaledown.data.plan import Plan, keep, make_plan, report
from scaledown.data.prompts import VERSION as PROMPT_VERSION
from scaledown.data.queries import collect_queries, write_questions
from scaledown.data.remote import Remote, redacted
from scaledown.data.reranker import LIKELIHOOD_PREFIX, load_reranker, rerank
from scaledown.data.retrieval import retrieve
from scaledown.data.summary import Result, program_name, summary
from scaledown.data.teacher import load_teacher, teach
from scaledown.data.teachers import Generation, Teacher
from scaledown.flags import build_parser, from_flags, underscored
from scaledown.models import choose_device
from scaledown.progress import start_logging
from scaledown.store import (
    SCHEMA,
    RunDirectory,
    Stage,
    StageResult,
    check_writable,
    fingerprint,
    read_json,
    write_json,
)

log = logging.getLogger("scaledown")


def prepare_dataset(config: PrepareConfig, repeats: Path | None = None) -> Result:
    """Make training data as `config` says, or continue a run that was interrupted.

    Each stage leaves its shards in the run directory; what is there is not made again. `repeats` is the
    manifest of a run to be repeated: inputs that differ from its are named in the log. Raises
    `ScaleDownError`, each with a message that says what to do.
    """
    output = Path(config.output_file)
    check_writable(output)
    sources = find(config, output)
    run = RunDirectory(config.run_directory)
    home = RunDirectory(Path(config.index_dir)) if config.index_dir else run
    identities = {name: model.identity(run.content_hash) for name, model in sources.models().items()}
    inputs = {
        "corpus": corpus_identity(home, sources.corpus),
        "queries": [
            path.identity() if isinstance(path, Remote) else file_identity(run, path)
            for path in sources.queries
        ],
    }
    if repeats:
        _name_differences(repeats, identities, inputs)
    request = fingerprint(
        {"schema": SCHEMA, "parameters": _compared(config), "models": identities, "inputs": inputs}
    )
    with run.claim(request), home.claim("index") if config.index_dir else contextlib.nullcontext():
        if finished := _finished(run, request, output):
            return finished
        _check_ours(run, output)
        index = open_index(home, config, sources.corpus, sources.retriever, identities["retriever"])
        stages = _run_stages(run, config, index=index, sources=sources, identities=identities, inputs=inputs)
        results = {name: stage.finished() for name, stage in stages.items()}
        with stages["answers"].lease("export", wait=True):
            if finished := _finished(run, request, output):  # by a process that helped
                return finished
            target = output.resolve()
            for half_written in target.parent.glob(f".{target.name}.*.tmp"):  # by a process that was killed
                half_written.unlink(missing_ok=True)
            score_scale = config.reranking_score_scale if config.enable_reranking else None
            count = write_examples(output, examples(stages["answers"], stages["passages"], score_scale))
            write_json(
                run.manifest,
                {
                    "schema": SCHEMA,
                    "version": scaledown.__version__,
                    "finished": datetime.now(UTC).isoformat(timespec="seconds"),
                    "request": request,
                    "parameters": _repeatable(config, sources),
                    "models": identities,
                    "inputs": inputs,
                    "stages": {
                        name: {
                            "fingerprint": stage.fingerprint,
                            "settings": stage.settings,
                            "counts": results[name].counts,
                            "seconds": results[name].seconds,
                            "measured": results[name].measured,
                        }
                        for name, stage in stages.items()
                    },
                    "output": {
                        "path": str(output.resolve()),
                        "examples": count,
                        "sha256": run.content_hash(output),
                    },
                    "environment": _environment(),
                },
            )
    return Result(output, count, results, _quarantined(results), already_done=False)


def _repeatable(config: PrepareConfig, sources: Sources) -> dict[str, Any]:
    """The settings such that `--config` repeats the run from any folder: full paths, pinned revisions.

    A URL loses its secrets: with `--config` it has to be given again.
    """
    settings = asdict(config)
    for name in ("corpus_path", "work_dir", "index_dir", "output_file"):
        settings[name] = _full(settings[name]) if settings[name] else ""
    settings["queries_file"] = [_full(name) for name in config.queries_file]
    if Path(config.query_dataset).exists() and config.query_dataset:
        settings["query_dataset"] = str(Path(config.query_dataset).resolve())
    for name, model in sources.models().items():
        if model.revision and "@" not in model.name:
            settings[f"{name}_model"] = f"{model.name}@{model.revision}"
    return settings


def _full(name: str) -> str:
    return redacted(name) if is_url(name) else str(Path(name).resolve())


def _name_differences(repeats: Path, identities: Mapping[str, str], inputs: Mapping[str, Any]) -> None:
    manifest = read_json(repeats)
    before = manifest if isinstance(manifest, dict) else {}
    then = {**(before.get("models") or {}), **(before.get("inputs") or {})}
    now = {**identities, **inputs}
    different = [name for name in sorted(then.keys() & now.keys()) if then[name] != now[name]]
    if different:
        log.warning("not a repetition of %s: other %s", repeats, ", ".join(different))


def plan_dataset(config: PrepareConfig) -> Plan:
    """Plan the run that `config` describes, and keep the plan in the run directory for its summary.

    Makes nothing else. Models that are missing are in the plan; raises `ScaleDownError` for all else that
    `prepare_dataset` refuses before its work.
    """
    output = Path(config.output_file)
    check_writable(output)
    corpus, _ = find_inputs(config, output, fetch=False)
    plan = make_plan(config, corpus)
    keep(plan, config)
    return plan


def _compared(config: PrepareConfig) -> dict[str, Any]:
    """The settings that two runs in one directory must share; where things lie is not among them."""
    apart = {"output_file", "work_dir", "index_dir", "corpus_path", "queries_file", "strict", "workers"}
    if config.search == "exact":
        apart |= {"search_memory", "min_recall"}
    apart |= {"retriever_model", "reranker_model", "teacher_model"}  # their identities are compared
    settings = {name: value for name, value in asdict(config).items() if name not in apart}
    return settings | {
        "format": Path(config.output_file).suffix,
        "device": config.device.partition(":")[0],
        "likelihood": config.reranker_model.startswith(LIKELIHOOD_PREFIX),
    }


def _run_stages(
    run: RunDirectory,
    config: PrepareConfig,
    *,
    index: Index,
    sources: Sources,
    identities: Mapping[str, str],
    inputs: Mapping[str, Any],
) -> dict[str, Stage]:
    """The picture at the top, in order. A stage's settings hold all that its shards depend on."""
    device = choose_device(config.device)
    machine_kind = machine(config)
    teacher = functools.cache(lambda: _teacher(config, sources, device))
    encoder = functools.cache(
        lambda: load_encoder(sources.retriever, device, config.dtype, config.batch_size)
    )

    teaching = {
        "teacher": identities["teacher"],
        "bits": 8 if config.teacher_8bit else 4 if config.teacher_4bit else 0,
        "prompt": PROMPT_VERSION,
        "max_new_tokens": config.max_new_tokens,
        "batch_size": config.teacher_batch_size,
        **machine_kind,
    }
    stages: dict[str, Stage] = {}
    questions: dict[str, Any] = {
        "files": inputs["queries"],
        "dataset": config.query_dataset,
        "split": config.query_split,
        "column": config.query_column,
        "queries_per_shard": config.queries_per_shard,
    }
    if config.num_synthetic_queries:
        index.cut()
        number = {
            "number": config.num_synthetic_queries,
            "seed": config.seed,
            "queries_per_shard": config.queries_per_shard,
        }
        written = Stage(run, "synthetic", {"passages": index.passages.fingerprint, **teaching, **number})
        write_questions(written, index.passages, teacher, config)
        teacher.cache_clear()  # memory for the retriever and reranker
        stages["synthetic"] = written
        questions["synthetic"] = written.fingerprint
    queries = Stage(run, "queries", questions)
    collect_queries(queries, config, stages.get("synthetic"))

    index.fill(encoder)
    passages, vectors = index.passages, index.vectors
    searching: dict[str, Any] = {"top_k": config.top_k_retrieval}
    if config.search == "approximate":
        searching |= {"search": config.search, "min_recall": config.min_recall}
    if index.is_dense or config.search == "approximate":  # memory decides on what is searched together
        searching["search_memory"] = config.search_memory
    candidates = Stage(
        run,
        "candidates",
        {"vectors": vectors.fingerprint, "queries": queries.fingerprint, **searching},
    )
    retrieve(candidates, queries, vectors, encoder, config=config, approximate=index.approximate)
    encoder.cache_clear()
    stages |= {"queries": queries, "passages": passages, "vectors": vectors, "candidates": candidates}

    ranked = candidates
    if sources.reranker:
        source = sources.reranker
        likelihood = source.name.startswith(LIKELIHOOD_PREFIX)
        ranked = Stage(
            run,
            "ranked",
            {
                "candidates": candidates.fingerprint,
                "reranker": identities["reranker"],
                "likelihood_prompt": PROMPT_VERSION if likelihood else None,
                "batch_size": config.reranker_batch_size,
                **machine_kind,
            },
        )
        reranker = functools.cache(
            lambda: load_reranker(source, device, config.dtype, config.reranker_batch_size)
        )
        rerank(ranked, candidates, passages, reranker)
        reranker.cache_clear()
        stages["ranked"] = ranked

    sampling = {"temperature": config.temperature, "seed": config.seed} if config.temperature else {}
    shown = {"ranked": ranked.fingerprint, "documents": config.documents_per_query}
    answers = Stage(run, "answers", {**shown, **teaching, **sampling})
    teach(
        answers,
        ranked,
        passages,
        teacher,
        documents_per_query=config.documents_per_query,
        temperature=config.temperature,
    )
    return stages | {"answers": answers}


def _teacher(config: PrepareConfig, sources: Sources, device: str) -> Teacher:
    return load_teacher(sources.teacher, device, config.dtype, Generation.of(config))


def _finished(run: RunDirectory, request: str, output: Path) -> Result | None:
    """The result of an earlier run with these settings whose output is still as it was written."""
    manifest = read_json(run.manifest)
    if not isinstance(manifest, dict) or manifest.get("request") != request or not output.is_file():
        return None
    written = manifest["output"]
    if run.content_hash(output) != written["sha256"]:
        if written["path"] != str(output.resolve()):
            return None
        if validate(output).problems:
            log.warning("%s is damaged: writing it again", output)
            return None
        log.warning("%s was changed since it was written and is left so; delete it to have it again", output)
    stages = {
        name: StageResult([], stage["counts"], stage["seconds"], stage["measured"])
        for name, stage in manifest["stages"].items()
    }
    return Result(output, manifest["output"]["examples"], stages, _quarantined(stages), already_done=True)


def _check_ours(run: RunDirectory, output: Path) -> None:
    """Raise `OutputError` where `output` exists and was not written by a run of this directory."""
    if not output.exists():
        return
    manifest = read_json(run.manifest)
    written = manifest.get("output") if isinstance(manifest, dict) else None
    if isinstance(written, dict):
        ours = str(output.resolve()) == written.get("path") or run.content_hash(output) == written.get(
            "sha256"
        )
    else:  # a run that was killed after it wrote the output and before the manifest
        ours = any(run.path.glob("answers/*/done.json"))
    if not ours:
        raise OutputError(
            f"--output_file {output} exists, and {run.path} does not know it: delete or rename it, or "
            "choose another"
        )


def _quarantined(stages: Mapping[str, StageResult]) -> int:
    return sum(result.counts.get("bad", 0) + result.counts.get("rejected", 0) for result in stages.values())


def _environment() -> dict[str, str | int | None]:
    from importlib.metadata import version

    libraries = ("torch", "transformers", "sentence-transformers", "tokenizers", "numpy")
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processors": os.cpu_count(),
        **{name: version(name) for name in libraries},
    }


def main(argv: Sequence[str] | None = None, program: str = "python -m scaledown.data.prepare_dataset") -> int:
    """The command line; gives the exit status."""
    parser = build_parser(program, PrepareConfig)

    def refuse(message: str) -> None:
        raise UsageError(f"{message} (see {program} --help)")

    parser.error = refuse  # type: ignore[method-assign, assignment]
    words = underscored(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        flags = vars(parser.parse_args(words))
        flags.pop("debug", None)
        start_logging(flags.pop("log_level", "info"))
        repeats = Path(flags["config"]).expanduser() if "config" in flags else None
        dry_run = flags.pop("dry_run", False)
        config = from_flags(flags, PrepareConfig)
        if dry_run:
            plan = plan_dataset(config)
            same = shlex.join(word for word in words if word != "--dry_run")
            print(f"{report(plan)}\n\nnext: {program_name()} prepare {same}")
            return 1 if plan.missing else 0
        result = prepare_dataset(config, repeats)
        print(summary(result, config))
        if not config.strict or not result.quarantined:
            return 0
        number = (
            "1 line or query is"
            if result.quarantined == 1
            else f"{result.quarantined:,} lines or queries are"
        )
        where = config.run_directory / "quarantine"
        print(f"error: --strict: {number} in {where}, each with its reason: mend them", file=sys.stderr)
        return 1

    return run_command(command, debug="--debug" in words, resumes="--dry_run" not in words)

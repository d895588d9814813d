"""The main command: queries + corpus -> train_data.json.

queries ─┐
         ├─> retrieve ─> rerank ─> teach ─> export ─> train_data.json
corpus ──┘ (passages, vectors)
"""

import sys
from functools import partial
from importlib import import_module

from scaledown.errors import run_command, tell
from scaledown.run.locations import output_of, run_of

if __name__ == "__main__":  # before the imports that take long: Ctrl-C is one line during them, too
    start = partial(run_command, debug="--debug" in sys.argv, resumes=True)
    raise SystemExit(start(lambda: import_module("scaledown.data.prepare_dataset").main()))

import functools
import logging
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from scaledown.config.flags import build_parser, from_flags, underscored
from scaledown.config.prepare import PrepareConfig
from scaledown.data.build_index import (
    machine,
    open_index,
)
from scaledown.data.cleaning.decontaminate import VERSION as CLEAN_VERSION
from scaledown.data.cleaning.decontaminate import Cleaner
from scaledown.data.input import tables
from scaledown.data.input.queries import collect_queries
from scaledown.data.manifest import Sources, write_manifest
from scaledown.data.output.writers import examples, write_examples
from scaledown.data.planning.plan import Plan, keep, make_plan, report
from scaledown.data.prompts import VERSION as PROMPT_VERSION
from scaledown.data.prompts import Template, load_template
from scaledown.data.reranker import LIKELIHOOD_PREFIX, load_reranker, rerank
from scaledown.data.retrieval.encoders import load_encoder
from scaledown.data.retrieval.stages import retrieve, searched
from scaledown.data.session.enter import Entered, enter
from scaledown.data.session.resolve import find_inputs
from scaledown.data.session.result import earlier_result, is_ours, quarantined, report_of
from scaledown.data.session.summary import Result, program_name, summary
from scaledown.data.teacher.api import choose_backend, load_teacher
from scaledown.data.teacher.base import Engine, Generation, Teacher
from scaledown.data.teacher.questions import write_questions
from scaledown.data.teacher.review import VERSION as REVIEW_VERSION
from scaledown.data.teacher.review import review_answers
from scaledown.data.teacher.stage import Teaching, retry, spent_tokens, teach
from scaledown.data.workers import settings_of, share, supervised
from scaledown.gpus import OnDevice
from scaledown.models import ModelSource, choose_device
from scaledown.records import Example
from scaledown.run.atomic import write_json
from scaledown.run.directory import RunDirectory
from scaledown.run.logs import start_logging
from scaledown.run.outputs import check_free
from scaledown.run.prometheus import metrics_file
from scaledown.run.stage import Stage, together

log = logging.getLogger("scaledown")

WORK: Final = "scaledown.data.prepare_dataset:work"
"""What workers carry out."""

_SHARDS_AT_ONCE: Final = 16  # for engines that schedule by themselves: they never run dry
_WITH_LOGPROBS_AT_ONCE: Final = 4  # whose answers, held until their shards are whole, are large


def prepare_dataset(config: PrepareConfig, repeats: Path | None = None, *, overwrite: bool = False) -> Result:
    """Make training data as `config` says, or continue a run that was interrupted.

    Each stage leaves its shards in the run directory; what is there is not made again. `repeats` is the
    manifest of a run to be repeated: inputs that differ from its are named in the log. With `overwrite` the
    output takes the place of what no run of this directory made. Raises `ScaleDownError`, each with a
    message that says what to do.
    """
    output = output_of(config)
    output.storage.check_writable(output.path)
    metrics = metrics_file(config.metrics_file, run_of(config).root, overwrite=overwrite)
    with metrics, enter(config, repeats) as entered:
        run, request = entered.run, entered.request
        homes = [run, entered.home] if config.index_dir else [run]
        if finished := earlier_result(run, request, output):
            return finished
        ours = functools.partial(is_ours, run, output)
        check_free("--output_file", output, ours, overwrite=overwrite)
        if supervised(config):
            share(config, WORK, homes)
        stages = _run_stages(entered)
        given_up = sum(home.given_up() for home in homes)
        if stages["reviewed"].done() is None:  # this was a part
            if missing := stages["reviewed"].missing():
                done = {name: result for name, stage in stages.items() if (result := stage.done())}
                own = sum(home.given_up(own=True) for home in homes)
                return Result(output.path, 0, done, quarantined(done), given_up=own, missing=missing)
            stages = _run_stages(replace(entered, run=RunDirectory(run.storage)))
        results = {name: stage.finished() for name, stage in stages.items()}
        with stages["answers"].lease("export", wait=True):
            if finished := earlier_result(run, request, output):  # by a process that helped
                return finished
            target = output.path.resolve()
            for half_written in target.parent.glob(f".{target.name}.*.tmp"):  # by a process that was killed
                half_written.unlink(missing_ok=True)
            score_scale = config.reranking_score_scale if config.enable_reranking else None
            records = examples(stages["reviewed"], stages["passages"], score_scale, config.extra_columns)
            documents: set[int] = set()
            count = write_examples(output.path, _measured(records, documents))
            documents = {min(documents), max(documents)} if documents else set()
            output.storage.publish(output.path)
            told = {name: (stage, results[name]) for name, stage in stages.items()}
            written = {
                "path": output.storage.address(output.path),
                "examples": count,
                "documents": sorted(documents),
                "sha256": run.content_hash(output.path),
                "state": output.storage.state(output.path),
            }
            write_manifest(
                run, config, entered.sources, request, entered.identities, entered.inputs, told, written
            )
            report_of(run, output)
    return Result(
        output.path,
        count,
        results,
        quarantined(results),
        given_up=given_up,
        documents=sorted(documents),
    )


def _measured(records: Iterable[Example], numbers: set[int]) -> Iterator[Example]:
    """Records as they are; how many documents they have is added to `numbers`."""
    for record in records:
        numbers.add(len(record["documents"]))
        yield record


def work(settings: Mapping[str, Any], worker: str) -> None:
    """What a worker does: make the stages of a run, together with others."""
    with enter(settings_of(PrepareConfig, settings, worker), worker=worker) as entered:
        _run_stages(entered)


def plan_dataset(config: PrepareConfig, *, overwrite: bool = False) -> Plan:
    """Plan the run that `config` describes, and keep the plan in the run directory for its summary.

    Makes nothing else. Models that are missing are in the plan; raises `ScaleDownError` for all else that
    `prepare_dataset` refuses before its work.
    """
    output = output_of(config)
    output.storage.check_writable(output.path)
    corpus, _ = find_inputs(config, fetch=False)
    ours = functools.partial(is_ours, RunDirectory(run_of(config)), output)
    check_free("--output_file", output, ours, overwrite=overwrite)
    load_template(config.prompt)
    plan = make_plan(config, corpus)
    keep(plan, config)
    return plan


class _Asking(NamedTuple):
    """How teachers are loaded and asked: what their answers depend on is in `settings`."""

    engine: Engine
    generation: Generation
    template: Template
    device: str
    dtype: str
    settings: dict[str, Any]

    @classmethod
    def of(  # noqa: PLR0917
        cls,
        run: RunDirectory,
        request: str,
        config: PrepareConfig,
        sources: Sources,
        identities: Mapping[str, str],
        device: str,
    ) -> "_Asking":
        """With the engine that is best here, where the settings leave it open."""
        engine, generation = Engine.of(config), Generation.of(config)
        engine = engine._replace(backend=_keep_backend(run, request, engine, sources, device, generation))
        template = load_template(config.prompt)
        settings = {
            "backend": engine.backend,
            "bits": 8 if config.teacher_8bit else 4 if config.teacher_4bit else 0,
            "lora": identities.get("lora"),
            "prompt": [PROMPT_VERSION, *template],
            "document_tokens": config.teacher_document_tokens,
            "context": config.teacher_context,
            "max_new_tokens": config.max_new_tokens,
        }
        if engine.backend != "endpoint":
            settings |= machine(config)
        if engine.backend == "transformers":
            settings |= {"batch_size": config.teacher_batch_size}
        asking = cls(engine, generation, template, device, config.dtype, settings)
        if engine.backend == "endpoint" and not run.storage.glob(run.path, "answers/*/done.json"):
            for model in filter(None, (sources.teacher, sources.second_teacher)):
                asking.load(model)  # looks for the server, the key and the model, before any work
        return asking

    def load(self, model: ModelSource, spent_tokens: int = 0, logprobs: int = 0) -> Teacher:
        """A teacher that gives so many log probabilities with each answer token."""
        generation = self.generation._replace(logprobs=logprobs)
        return load_teacher(model, self.device, self.dtype, generation, self.engine, spent_tokens)


def _keep_backend(  # noqa: PLR0917
    run: RunDirectory,
    request: str,
    engine: Engine,
    sources: Sources,
    device: str,
    generation: Generation,
) -> str:
    """The engine that `auto` chose when this run began, else the best one; both teachers must fit it.

    One that was installed or exported in between would begin the answers again.
    """
    path = run.path / "engine.json"
    kept = run.storage.read_json(path)
    if engine.backend == "auto" and isinstance(kept, dict) and kept.get("request") == request:
        engine = engine._replace(backend=str(kept.get("backend")))
    backend = choose_backend(engine, sources.teacher, device, generation)
    if sources.second_teacher:
        choose_backend(engine._replace(backend=backend), sources.second_teacher, device, generation)
    write_json(path, {"request": request, "backend": backend})
    run.storage.publish(path)
    return backend


def _run_stages(entered: Entered) -> dict[str, Stage]:
    """The picture at the top, in order. A stage's settings hold all that its shards depend on."""
    device = choose_device(entered.config.device)
    run, config, sources = entered.run, entered.config.sized(device), entered.sources
    identities, inputs = entered.identities, entered.inputs
    index = open_index(entered.home, config, sources.corpus, sources.retriever, identities["retriever"])
    machine_kind = machine(config)
    asking = _Asking.of(run, entered.request, config, sources, identities, device)
    teacher = OnDevice("the teacher", device, lambda: asking.load(sources.teacher))
    encoder = OnDevice(
        "the retriever",
        device,
        lambda: load_encoder(sources.retriever, device, config.dtype, config.batch_size),
    )

    stages: dict[str, Stage] = {}
    questions: dict[str, Any] = {
        "files": inputs["queries"],
        "dataset": config.query_dataset,
        "split": config.query_split,
        "column": config.query_column,
        "queries_per_shard": config.queries_per_shard,
        **tables.version_of(sources.queries),
    }
    if config.num_synthetic_queries:
        index.cut()
        number = {
            "passages": index.passages.fingerprint,
            "teacher": identities["teacher"],
            "number": config.num_synthetic_queries,
            "seed": config.seed,
            "queries_per_shard": config.queries_per_shard,
        }
        written = Stage(run, "synthetic", {**asking.settings, **number})
        write_questions(written, index.passages, teacher, config)
        teacher.release()
        stages["synthetic"] = written
        questions["synthetic"] = written.fingerprint
    cleaning = {"clean": CLEAN_VERSION, "evaluation": inputs.get("evaluation")}
    if config.decontaminate or config.deduplicate:
        questions |= {**cleaning, "deduplicate": config.deduplicate}
    queries = Stage(run, "queries", questions)
    collect_queries(queries, config, stages.get("synthetic"), Cleaner(config).queries)

    index.fill(encoder)
    passages, vectors = index.passages, index.vectors
    searching: dict[str, Any] = {"top_k": config.top_k_retrieval}
    if config.search == "approximate":
        searching |= {"search": config.search, "min_recall": config.min_recall}
    if lost := vectors.lost():
        searching["without"] = lost
    if index.is_dense or config.search == "approximate":  # memory decides on what is searched together
        searching["search_memory"] = config.search_memory
    candidates = Stage(
        run,
        "candidates",
        {"vectors": vectors.fingerprint, "queries": queries.fingerprint, **searching},
        [queries],
    )
    retrieve(candidates, queries, passages, vectors, encoder, config=config, approximate=index.approximate)
    encoder.release()
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
                **({} if likelihood or machine_kind["dtype"] == "torch.float32" else {"head": "float32"}),
                **machine_kind,
            },
            [candidates],
        )
        reranker = OnDevice(
            "the reranker",
            device,
            lambda: load_reranker(source, device, config.dtype, config.reranker_batch_size),
        )
        rerank(
            ranked,
            candidates,
            passages,
            reranker,
            min(config.top_k_retrieval, searched(vectors)),
        )
        reranker.release()
        stages["ranked"] = ranked

    shared = cleaning if config.decontaminate_answers else {}
    return stages | _run_teachers(run, config, ranked, passages, sources, identities, asking, shared)


def _run_teachers(  # noqa: PLR0917
    run: RunDirectory,
    config: PrepareConfig,
    ranked: Stage,
    passages: Stage,
    sources: Sources,
    identities: Mapping[str, str],
    asking: _Asking,
    cleaning: Mapping[str, Any],
) -> dict[str, Stage]:
    """Ranked passages -> answers of one teacher or two -> those that are kept."""
    sampling = {"temperature": config.temperature, "seed": config.seed} if config.temperature else {}
    shown = {"ranked": ranked.fingerprint, "documents": config.documents_per_query}
    most = _WITH_LOGPROBS_AT_ONCE if config.teacher_logprobs else _SHARDS_AT_ONCE
    at_once = together(len(config.part.of(len(ranked.planned()))), most)
    teaching = Teaching(
        documents_per_query=config.documents_per_query,
        temperature=config.temperature,
        template=asking.template,
        shards_at_once=1 if asking.engine.backend == "transformers" else at_once,
        flush_seconds=config.flush_seconds,
        prices=(config.input_price, config.output_price),
    )

    def counted(stage: Stage) -> int:
        return spent_tokens(stage) if config.max_total_tokens else 0

    stages: dict[str, Stage] = {}
    for name, part in (("answers", "teacher"), ("second", "second_teacher")):
        if (model := sources.models().get(part)) is None:
            continue
        settings = {**shown, **asking.settings, **sampling, "teacher": identities[part]}
        logprobs = config.teacher_logprobs if name == "answers" else 0
        if logprobs:
            settings["logprobs"] = logprobs
        stage = stages[name] = Stage(run, name, settings, [ranked])

        def load(model: ModelSource = model, stage: Stage = stage, logprobs: int = logprobs) -> Teacher:
            return asking.load(model, counted(stage), logprobs)

        teacher = OnDevice(f"the teacher {model.name}", asking.device, load)
        teach(stage, ranked, passages, teacher, teaching._replace(logprobs=bool(logprobs)))
        if name == "answers" and config.bad_answers == "retry":
            sampled = {"answers": stage.fingerprint, "seed": config.seed, "review": REVIEW_VERSION}
            stages["retried"] = Stage(run, "retried", sampled, [stage])
            retry(stages["retried"], stage, passages, teacher, teaching)
        teacher.release()
    answers, second = stages.get("retried", stages["answers"]), stages.get("second")
    limits = {
        "review": REVIEW_VERSION,
        "answers": answers.fingerprint,
        "second": second.fingerprint if second else None,
        "truncated": config.truncated_answers,
        "bad": config.bad_answers,
        "min_groundedness": config.min_groundedness,
        **cleaning,
    }
    stages["reviewed"] = Stage(run, "reviewed", limits, [answers, *filter(None, [second])])
    review_answers(stages["reviewed"], answers, second, passages, config, Cleaner(config).answer)
    return stages


def main(argv: Sequence[str] | None = None, program: str = "python -m scaledown.data.prepare_dataset") -> int:
    """The command line; gives the exit status."""
    parser = build_parser(program, PrepareConfig)

    words = underscored(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        flags = vars(parser.parse_args(words))
        flags.pop("debug", None)
        start_logging(flags.pop("log_level", "info"), flags.pop("log_format", "text"))
        repeats = Path(flags["config"]).expanduser() if "config" in flags else None
        overwrite = flags.pop("overwrite", False)
        dry_run = flags.pop("dry_run", False)
        config = from_flags(flags, PrepareConfig)
        if dry_run:
            plan = plan_dataset(config, overwrite=overwrite)
            same = shlex.join(word for word in words if word != "--dry_run")
            print(f"{report(plan)}\n\nnext: {program_name()} prepare {same}")
            return 1 if plan.missing else 0
        result = prepare_dataset(config, repeats, overwrite=overwrite)
        print(summary(result, config))
        if result.given_up:
            lacking = f"part {config.shard}" if result.missing else result.output
            tell(
                f"error: {lacking} lacks what was given up: mend its cause, which the logs in "
                f"{run_of(config).root / 'live'} show, and run the same command again: it tries again"
            )
            return 1
        if not config.strict or not result.quarantined:
            return 0
        number = (
            "1 line or query is"
            if result.quarantined == 1
            else f"{result.quarantined:,} lines or queries are"
        )
        where = run_of(config).shown(run_of(config).root / "quarantine")
        tell(f"error: --strict: {number} in {where}, each with its reason: mend them")
        return 1

    return run_command(command, debug="--debug" in words, resumes="--dry_run" not in words)

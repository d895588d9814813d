"""The main command: makes train_data.json from queries and a corpus.

queries ─┐
         ├─> retrieve ─> rerank ─> teach ─> review ─> export ─> train_data.json
corpus ──┘ (passages, vectors)

Each arrow is a stage. Its shards are in the run directory, under a fingerprint of everything they depend on.
A finished shard is not made again. `scaledown.data.session` has the code around the stages.
"""

import sys
from functools import partial
from importlib import import_module

from scaledown.errors import run_command

if __name__ == "__main__":  # before the slow imports: Ctrl-C prints one line during them too
    start = partial(run_command, debug="--debug" in sys.argv, resumes=True)
    raise SystemExit(start(lambda: import_module("scaledown.data.prepare_dataset").main()))

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from scaledown.command import CommandHelp, program_name, run_cli
from scaledown.config.flags import Parser, underscored
from scaledown.config.prepare import PrepareConfig
from scaledown.data.build_index import Index, open_index
from scaledown.data.cleaning.decontaminate import Cleaner
from scaledown.data.input import tables
from scaledown.data.input.queries import collect_queries
from scaledown.data.output.writers import examples, write_examples
from scaledown.data.planning.plan import Plan, keep_plan, make_plan, report
from scaledown.data.prompts import PROMPT_VERSION, load_template
from scaledown.data.reranker import api as reranker
from scaledown.data.reranker.query_likelihood import SCORING
from scaledown.data.retrieval import stages as retrieval
from scaledown.data.retrieval.encoders import load_encoder
from scaledown.data.retrieval.parts import began_with
from scaledown.data.session.enter import Session, open_session
from scaledown.data.session.resolve import find_inputs
from scaledown.data.session.result import earlier_or_free, is_ours, part_result, write_output
from scaledown.data.session.summary import PrepareResult, run_failure, run_summary
from scaledown.data.session.teachers import Teachers, find_teachers
from scaledown.data.teacher import review as reviewing
from scaledown.data.teacher import stage as teaching
from scaledown.data.teacher.api import engine_of
from scaledown.data.teacher.base import Teacher
from scaledown.data.teacher.questions import write_questions
from scaledown.data.workers import settings_of
from scaledown.devices.gpus import OnDevice
from scaledown.models.sources import ModelSource
from scaledown.run.directory import RunDirectory
from scaledown.run.locations import output_of, run_of
from scaledown.run.outputs import check_free
from scaledown.run.stage import Stage, together

WORK: Final = "scaledown.data.prepare_dataset:work"
ASK: Final = "scaledown.data.prepare_dataset:ask"
FIND: Final = "scaledown.data.prepare_dataset:find"
"""The functions that workers call."""

_WITH_LOGPROBS_AT_ONCE: Final = 4  # shards; answers with log probabilities need much memory


def prepare_dataset(
    config: PrepareConfig, repeats: Path | None = None, *, overwrite: bool = False, worker: str = ""
) -> PrepareResult:
    """Make training data, or continue an interrupted run.

    Args:
        config: The settings.
        repeats: The manifest of a run to be repeated; the log has the inputs that differ from it.
        overwrite: Whether to replace an output that no run of this directory made.
        worker: The name of this process if another one started it to help. It makes shards, but no output.

    Returns:
        The path of the output, the number of records, and the counts and seconds of each stage.

    Raises:
        UsageError: Settings contradict each other.
        InputError: An input cannot be used, or no query was answered.
        ModelError: A model cannot be loaded, or does not fit into memory.
        MissingExtraError: A setting needs an extra that is not installed.
        OutputError: The output cannot be written.
        RunDirectoryError: The run directory is in use with other settings, or has other things in it.
    """
    with open_session(config, repeats, overwrite=overwrite, worker=worker) as session:
        if finished := earlier_or_free(session, overwrite=overwrite):
            return finished
        session.let_workers_help(WORK, ASK, FIND)
        for part in session.parts():
            teachers = find_teachers(part)
            index = find_index(part)
            queries = collect(part, index, teachers)
            candidates = retrieve(part, queries, index)
            ranked = rerank(part, candidates, index)
            answers = teach(part, ranked, index, teachers)
            reviewed = review(part, answers, index)
        return export(session, reviewed, index)


def work(settings: Mapping[str, Any], worker: str) -> None:
    """Work as a worker: make shards of a run, together with others."""
    prepare_dataset(settings_of(PrepareConfig, settings, worker), worker=worker)


def ask(settings: Mapping[str, Any], worker: str) -> None:
    """Work as a worker until the queries are there."""
    with open_session(settings_of(PrepareConfig, settings, worker), worker=worker) as session:
        collect(session, find_index(session), find_teachers(session))


def find(settings: Mapping[str, Any], worker: str) -> None:
    """Work as a worker until the documents of the queries are ranked."""
    with open_session(settings_of(PrepareConfig, settings, worker), worker=worker) as session:
        index = find_index(session)
        queries = collect(session, index, find_teachers(session))
        rerank(session, retrieve(session, queries, index), index)


def find_index(session: Session) -> Index:
    """Return the stages of passages and vectors, finished or not."""
    sources, identity = session.sources, session.identities["retriever"]
    index = open_index(session.home, session.indexing, sources.corpus, sources.retriever, identity)
    return index.at(began_with(session.run, index.present())) if session.config.index_dir else index


def collect(session: Session, index: Index, teachers: Teachers) -> Stage:
    """Read queries from files and datasets, or let the teacher write them, into shards of queries.

    Args:
        session: The run.
        index: The index; synthetic queries are about its passages.
        teachers: Write synthetic queries.

    Returns:
        The finished stage of queries: columns `query_id` and `query`.

    Raises:
        InputError: There is no query, or an input cannot be used.
    """
    config, cleaner = session.config, Cleaner(session.config)
    settings: dict[str, Any] = {
        "files": session.inputs["queries"],
        "dataset": config.query_dataset,
        "split": config.query_split,
        "column": config.query_column,
        "queries_per_shard": config.queries_per_shard,
        **tables.version_of(session.sources.queries),
    }
    written = None
    if config.num_synthetic_queries:
        written = write(session, index, teachers)
        settings["synthetic"] = written.fingerprint
    if config.decontaminate or config.deduplicate:
        settings |= {**session.cleaning, "deduplicate": config.deduplicate}
    queries = session.stage("queries", settings)
    collect_queries(queries, config, written, cleaner.queries, cleaner.counts)
    return queries


def write(session: Session, index: Index, teachers: Teachers) -> Stage:
    """Let the teacher write questions about passages.

    Args:
        session: The run.
        index: The index. Its missing passages are made first.
        teachers: Load the teacher.

    Returns:
        The finished stage of questions: columns `row` of the passage, `text` and `question`.
    """
    config = session.config
    index.cut()
    settings = {
        **teachers.settings,
        "passages": index.passages.fingerprint,
        "teacher": session.identities["teacher"],
        "number": config.num_synthetic_queries,
        "seed": config.seed,
        "queries_per_shard": config.queries_per_shard,
    }
    written = session.stage("synthetic", settings)
    load = partial(teachers.load, session.sources.teacher)
    with OnDevice("the teacher", session.device, load) as teacher:
        write_questions(written, index.passages, teacher, config)
    return written


def retrieve(session: Session, queries: Stage, index: Index) -> Stage:
    """Make passages and vectors of the corpus, and find the best passages of each query.

    Args:
        session: The run.
        queries: The finished stage of queries.
        index: The index. Its missing passages and vectors are made first.

    Returns:
        The stage of candidates, see `candidates_table`. Shards of other parts may be missing.
    """
    config, device = session.config, session.device
    dtype = session.indexing.dtype
    load = partial(load_encoder, session.sources.retriever, device, dtype, config.batch_size)
    with OnDevice("the retriever", device, load) as encoder:
        index.fill(encoder)
        if config.index_dir:
            index.record()
        session.stages.update(passages=index.passages, vectors=index.vectors)
        settings: dict[str, Any] = {
            "vectors": index.vectors.fingerprint,
            "queries": queries.fingerprint,
            "top_k": config.top_k_retrieval,
        }
        if config.search == "approximate":
            settings |= {"search": config.search, "min_recall": config.min_recall}
        if lost := index.vectors.lost():
            settings["without"] = lost
        if index.is_dense or config.search == "approximate":
            # The result depends on how many shards are searched together, and memory decides their number.
            settings["search_memory"] = config.search_memory
        candidates = session.stage("candidates", settings, [queries])
        retrieval.rank_passages(
            *(candidates, queries, index.passages, index.vectors, encoder),
            config=config,
            approximate=index.approximate,
        )
    return candidates


def rerank(session: Session, candidates: Stage, index: Index) -> Stage:
    """Score the candidates by the reranker and sort them. Without a reranker, return them unchanged.

    Args:
        session: The run.
        candidates: The stage of candidates.
        index: The index with the passages.

    Returns:
        The stage of ranked candidates: with the column `reranking_scores`, best first.
    """
    source, config, device = session.sources.reranker, session.config, session.device
    if source is None:
        return candidates
    likelihood = source.name.startswith(reranker.LIKELIHOOD_PREFIX)
    settings = {
        "candidates": candidates.fingerprint,
        "reranker": session.identities["reranker"],
        "likelihood_prompt": PROMPT_VERSION if likelihood else None,
        "batch_size": config.reranker_batch_size,
        **session.machine,
    }
    if likelihood:
        settings["likelihood"] = SCORING
    elif settings["dtype"] != "torch.float32":
        settings["head"] = "float32"
    ranked = session.stage("ranked", settings, [candidates])
    load = partial(reranker.load_reranker, source, device, config.dtype, config.reranker_batch_size)
    per_query = min(config.top_k_retrieval, retrieval.searched(index.vectors))
    with OnDevice("the reranker", device, load) as loaded:
        reranker.rerank_candidates(ranked, candidates, index.passages, loaded, per_query)
    return ranked


class Answers(NamedTuple):
    """The stages of answers of each teacher."""

    first: Stage
    second: Stage | None


def teach(session: Session, ranked: Stage, index: Index, teachers: Teachers) -> Answers:
    """Let one or two teachers answer each query from its first documents.

    Args:
        session: The run.
        ranked: The stage of candidates in their final order.
        index: The index with the passages.
        teachers: Load the teachers.

    Returns:
        The stages of answers. The first one has second attempts at bad answers, if the settings want them.

    Raises:
        InputError: No query was answered.
    """
    config, models = session.config, session.sources.models()
    most = engine_of(teachers.engine.backend).shards_at_once
    if config.teacher_logprobs:
        most = min(most, _WITH_LOGPROBS_AT_ONCE)
    at_once = together(len(config.part.of(len(ranked.planned()))), most)
    asking = teaching.Teaching(
        documents_per_query=config.documents_per_query,
        temperature=config.temperature,
        template=teachers.template,
        shards_at_once=at_once,
        flush_seconds=config.flush_seconds,
        prices=(config.input_price, config.output_price),
    )
    made: dict[str, Stage] = {}
    for name, part in (("answers", "teacher"), ("second", "second_teacher")):
        if (model := models.get(part)) is None:
            continue
        settings = {
            "ranked": ranked.fingerprint,
            "documents": config.documents_per_query,
            **teachers.settings,
            **({"temperature": config.temperature, "seed": config.seed} if config.temperature else {}),
            "teacher": session.identities[part],
        }
        logprobs = config.teacher_logprobs if name == "answers" else 0
        if logprobs:
            settings["logprobs"] = logprobs
        stage = made[name] = session.stage(name, settings, [ranked])

        def load(model: ModelSource = model, stage: Stage = stage, logprobs: int = logprobs) -> Teacher:
            spent = teaching.spent_tokens(stage) if config.max_total_tokens else 0
            return teachers.load(model, spent, logprobs)

        with OnDevice(f"the teacher {model.name}", session.device, load) as teacher:
            teaching.answer_queries(
                stage, ranked, index.passages, teacher, asking._replace(logprobs=bool(logprobs))
            )
            if name == "answers" and config.bad_answers == "retry":
                sampled = {
                    "answers": stage.fingerprint,
                    "seed": config.seed,
                    "review": reviewing.REVIEW_VERSION,
                }
                made[name] = session.stage("retried", sampled, [stage])
                teaching.retry(made[name], stage, index.passages, teacher, asking)
    return Answers(made["answers"], made.get("second"))


def review(session: Session, answers: Answers, index: Index) -> Stage:
    """Keep the good answers, cut truncated ones after a sentence, and add the second teacher's answers.

    Args:
        session: The run.
        answers: The stages of answers.
        index: The index with the passages.

    Returns:
        The stage of answers that are kept.
    """
    config, (first, second) = session.config, answers
    settings = {
        "review": reviewing.REVIEW_VERSION,
        "answers": first.fingerprint,
        "second": second.fingerprint if second else None,
        "truncated": config.truncated_answers,
        "bad": config.bad_answers,
        "min_groundedness": config.min_groundedness,
        **(session.cleaning if config.decontaminate_answers else {}),
    }
    reviewed = session.stage("reviewed", settings, [first, *filter(None, [second])])
    reviewing.review_answers(reviewed, first, second, index.passages, config, Cleaner(config).answer)
    return reviewed


def export(session: Session, reviewed: Stage, index: Index) -> PrepareResult:
    """Write training data, manifest and report from the reviewed answers, when all parts are finished.

    Args:
        session: The run.
        reviewed: The stage of answers that are kept.
        index: The index with the passages.

    Returns:
        The result; while other parts are unfinished, with the number of shards that are missing.
    """
    if unfinished := part_result(session):
        return unfinished
    config = session.given
    score_scale = config.reranking_score_scale if config.enable_reranking else None
    records = examples(reviewed, index.passages, score_scale, config.extra_columns)
    return write_output(session, records, write_examples)


def plan_dataset(config: PrepareConfig, *, overwrite: bool = False) -> Plan:
    """Plan a run, and keep the plan in the run directory for the run's summary. Nothing else is made.

    Args:
        config: The settings of the run.
        overwrite: Whether the run may replace an output that no run of its directory made.

    Returns:
        The plan. It lists missing models.

    Raises:
        ScaleDownError: `prepare_dataset` would refuse the settings or inputs before its work.
    """
    output = output_of(config)
    output.storage.check_writable(output.path)
    corpus, _ = find_inputs(config, fetch=False)
    ours = partial(is_ours, RunDirectory(run_of(config)), output)
    check_free("--output_file", output, ours, overwrite=overwrite)
    load_template(config.prompt)
    plan = make_plan(config, corpus)
    keep_plan(plan, config)
    return plan


def main(argv: Sequence[str] | None = None, program: str = "python -m scaledown.data.prepare_dataset") -> int:
    """Run the command line. Returns the exit status."""
    words = underscored(sys.argv[1:] if argv is None else argv)
    usage = CommandHelp(
        program,
        "--queries_file FILE --output_file FILE",
        "Make OSCAR training data: retrieve, rerank, let a teacher answer. The same command again continues "
        "an interrupted run.",
    )
    if "--dry_run" in words:
        return run_cli(
            PrepareConfig,
            _plan,
            lambda plan, _: f"{report(plan)}\n\nnext: {program_name()} prepare {_without_dry_run(words)}",
            failure=lambda plan, _: "" if plan.missing else None,
            usage=usage,
            argv=words,
            add=_add_dry_run,
        )
    return run_cli(
        PrepareConfig,
        prepare_dataset,
        run_summary,
        failure=run_failure,
        usage=usage,
        argv=words,
        add=_add_dry_run,
        resumes=True,
        repeats=True,
    )


def _add_dry_run(parser: Parser) -> None:
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="only print the plan of the run and what is missing, like scaledown plan [default: off]",
    )


def _without_dry_run(words: Sequence[str]) -> str:
    return shlex.join(word for word in words if word != "--dry_run")


def _plan(config: PrepareConfig, *, dry_run: bool, overwrite: bool = False) -> Plan:
    return plan_dataset(config, overwrite=overwrite)

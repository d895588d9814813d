"""One evaluation: answers of a model and its baselines, or rankings, are measured into `results.json`."""

import contextlib
import functools
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from scaledown.config.evaluate import SYSTEMS, EvaluateConfig
from scaledown.data.input.download import fetched
from scaledown.data.input.files import locate
from scaledown.data.input.gold import read_gold
from scaledown.data.input.remote import Remote
from scaledown.data.prompts import PROMPT_VERSION
from scaledown.data.reranker.api import LIKELIHOOD_PREFIX, load_reranker, resolve_reranker
from scaledown.data.reranker.query_likelihood import SCORING
from scaledown.data.retrieval.encoders import is_sparse
from scaledown.data.teacher.api import find_teacher
from scaledown.data.teacher.base import EngineSettings
from scaledown.devices.choice import choose_device, dtype_to_run
from scaledown.devices.gpus import OnDevice
from scaledown.errors import ModelError, OutputError, RunDirectoryError, UsageError
from scaledown.evaluation import questions, ranking, systems
from scaledown.evaluation.baselines import ECHOES
from scaledown.evaluation.judge import Judging, judge
from scaledown.evaluation.pages import evaluation_page
from scaledown.evaluation.pruning import TokenCodec, prune
from scaledown.evaluation.results import (
    RESULTS_FILE,
    RESULTS_LAYOUT,
    Results,
    conclude,
    read_results,
    write_results,
)
from scaledown.evaluation.scoring import score
from scaledown.extensions import MEASURES
from scaledown.models.sources import ModelSource, resolve
from scaledown.models.weights import onto, quiet_libraries
from scaledown.report.page import html
from scaledown.run.atomic import atomic, read_json
from scaledown.run.directory import RunDirectory, fingerprint
from scaledown.run.heartbeat import publishing
from scaledown.run.outputs import check_output
from scaledown.run.stage import Stage
from scaledown.urls import without_secrets

if TYPE_CHECKING:
    from scaledown.student.settings import ScaleDownConfig

log = logging.getLogger("scaledown")

ANSWERS_FILE: Final = "answers.jsonl"
REPORT_FILE: Final = "report.html"
QUERIES_FILE: Final = "queries.jsonl"

_ROWS_PER_SHARD: Final = 64  # in a shard; a crash loses at most one shard
WORK_FOLDER: Final = "work"  # in the output: a run directory
_RERANKER_BATCH: Final = 16
_MODEL_FACTS: Final = (
    *("generator_name", "compressor", "num_layers", "doc_max_length"),
    *("enable_reranking", "generator_training"),
)


class EvaluationModels(NamedTuple):
    """The models of an evaluation, found but not loaded."""

    model: ModelSource
    reranker: ModelSource | None
    """For the system `pruned`; None without it."""
    keyword_model: ModelSource | None
    """For the system `keywords`; None without it."""
    judge: ModelSource | None
    """None if answers are not judged."""


def evaluate(config: EvaluateConfig, *, overwrite: bool = False) -> Results:
    """Evaluate into `config.output_dir`, or continue an evaluation there.

    Answers and verdicts that were made with the same settings are kept. A finished evaluation is only read.

    Args:
        config: What is evaluated, and how.
        overwrite: Replace files in the output folder that no evaluation has written.

    Returns:
        The results, as in `results.json`.

    Raises:
        ScaleDownError: An input, a model or the output folder cannot be used.
    """
    output = Path(config.output_dir)
    reads = (config.data, *config.gold, *config.run, config.qrels)
    for name in (RESULTS_FILE, REPORT_FILE, ANSWERS_FILE if config.model else QUERIES_FILE):
        ours = functools.partial(_is_ours, output)
        check_output("--output_dir", output / name, reads, made=ours, overwrite=overwrite)
    given = config
    if config.data:
        config = replace(config, data=str(fetched(config.data, "--data")))
    sources = None if config.run else _find(config)
    try:
        run = RunDirectory(output / WORK_FOLDER)
    except (OutputError, RunDirectoryError) as error:
        raise OutputError(f"--output_dir {output} cannot be used ({error}): choose another") from error
    inputs = _input_hashes(config, run)
    identities = _identities(config, run, sources)
    depends = {
        "schema": RESULTS_LAYOUT,
        "settings": config.compared(),
        "models": identities,
        "inputs": inputs,
    }
    if config.model and MEASURES.outside:  # a finished evaluation gets the values of a new measure
        depends["measures"] = sorted(MEASURES.outside)
    request = fingerprint(depends)
    with run.claim(request) as place, publishing(place, "", run):
        if finished := _finished(output, run, request):
            return finished
        known = {
            "request": request,
            "parameters": without_secrets(asdict(given)),
            "inputs": inputs,
            "models": identities,
        }
        results = (
            _evaluate_model(config, run, sources, known)
            if sources
            else _evaluate_rankings(config, run, known)
        )
        if results.kind == "answers":
            text = html(evaluation_page(results, output / ANSWERS_FILE))
            with atomic(output / REPORT_FILE) as temporary:
                temporary.write_text(text, encoding="utf-8")
        write_results(output, results)
    return results


def _is_ours(output: Path) -> bool:
    """Whether a folder holds an evaluation, finished or not."""
    if not (output / RESULTS_FILE).exists():
        return (output / WORK_FOLDER).is_dir()
    there = read_json(output / RESULTS_FILE)
    return isinstance(there, dict) and "scaledown" in there


def _input_hashes(config: EvaluateConfig, run: RunDirectory) -> dict[str, list[str]]:
    """Return the hashes of the input files."""

    def known(flag: str, file: str) -> str:
        source = locate(file, flag)
        return str(source.identity()) if isinstance(source, Remote) else run.content_hash(source)

    given = {name: getattr(config, name) for name in config.named("input")}
    files = {name: own if isinstance(own, tuple) else (own,) for name, own in given.items() if own}
    return {name: [known(f"--{name}", file) for file in own] for name, own in files.items()}


def _find(config: EvaluateConfig) -> EvaluationModels:
    """Find the models before any work begins. Raises `ModelError`."""
    model, reranker, keywords, judging = resolve(config.model), None, None, None
    if "pruned" in config.systems:
        with _or_without("pruned", "pruning_reranker"):
            reranker = resolve_reranker(config.pruning_reranker)
    if "keywords" in config.systems:
        with _or_without("keywords", "keyword_model"):
            keywords = resolve(config.keyword_model)
            if not is_sparse(keywords):
                raise ModelError(f"{config.keyword_model} is not a SPLADE model")
    if config.judge_model:
        judging = find_teacher(config.judge_model, EngineSettings.of(config))
    return EvaluationModels(model, reranker, keywords, judging)


@contextlib.contextmanager
def _or_without(system: str, flag: str) -> Iterator[None]:
    """Add to a `ModelError` that the system which needs this model can be left out."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{error}; or leave {system} out of --systems, or give --{flag}") from error


def _identities(
    config: EvaluateConfig, run: RunDirectory, sources: EvaluationModels | None
) -> dict[str, str]:
    """Return what identifies the exact weights of each model."""
    found = {}
    if sources:
        for name, source in sources._asdict().items():
            if source:
                likelihood = LIKELIHOOD_PREFIX if source.name.startswith(LIKELIHOOD_PREFIX) else ""
                found[name] = likelihood + source.identity(run.content_hash)
    if config.teacher_lora:
        found["lora"] = run.content_hash(Path(config.teacher_lora).expanduser())
    return found


def _finished(output: Path, run: RunDirectory, request: str) -> Results | None:
    """Return the results of an earlier call with these settings; None if one of its files has changed."""
    content = read_json(output / RESULTS_FILE)
    if not isinstance(content, dict) or content.get("request") != request:
        return None
    for name, known in content["files"].items():
        if not (output / name).is_file() or run.content_hash(output / name) != known:
            return None
    return read_results(output)


def _evaluate_model(
    config: EvaluateConfig, run: RunDirectory, sources: EvaluationModels, known: dict[str, Any]
) -> Results:
    """Make questions, answers of each system, verdicts, scores and means; each step is a stage."""
    quiet_libraries()
    from scaledown.student.engine_choice import choose_engine
    from scaledown.student.model import ScaleDownModel
    from scaledown.student.settings import ScaleDownConfig

    settings = ScaleDownConfig.read(sources.model)
    rate = config.compression_rate or settings.compression_rate
    settings.check_rate(rate)
    settings.check_budget(config.budget)
    picks = settings.kind.picks_tokens
    if not picks and (echoes := [system for system in config.systems if system in ECHOES]):
        raise UsageError(
            f"--systems {echoes[0]}: only a pointer picks tokens: evaluate a model trained with --compressor "
            f"pointer, or leave {' and '.join(echoes)} out"
        )
    device = choose_device(config.device)
    engine = choose_engine(config.engine, device, sources.model)
    given, config = config, replace(config, dtype=run.dtype(config.dtype, device))
    machine = {"device": device.partition(":")[0], "dtype": str(dtype_to_run(config.dtype, device))}
    identities = known["models"]
    judging = Judging.of(given, sources.judge, identities, machine) if sources.judge else None

    asked = _questions_stage(config, run, known["inputs"])
    sentences = _sentences(run, config, sources, settings, asked, identities, machine)

    def load() -> Any:
        log.info("model: %s on %s, %s", sources.model.name, device, machine["dtype"])
        dtype = dtype_to_run(config.dtype, device)
        model = ScaleDownModel.from_pretrained(sources.model.name, dtype=dtype, **onto(device))
        model.engine, _ = engine.start(model, sources.model, device, config.batch_size, asked=config.engine)
        return model

    answering = {
        "questions": asked.fingerprint,
        "model": identities["model"],
        "prompts": PROMPT_VERSION,
        "max_new_tokens": config.max_new_tokens,
        "batch_size": config.batch_size,
        **machine,
        **({"engine": config.engine} if engine.generation else {}),
    }
    answers: dict[str, Stage] = {}
    with OnDevice("the model", device, load) as model:  # it ends before the judge is loaded
        for system in config.systems:
            pruned = sentences if system == "pruned" else None
            depends: dict[str, Any] = {"sentences": pruned.fingerprint} if pruned else {}
            if settings.kind.rates and SYSTEMS[system].has_rate and not pruned:  # its sentences depend on it
                depends["compression_rate"] = rate
            if settings.kind.rates and SYSTEMS[system].has_budget:
                depends["budget"] = config.budget
            if system == "keywords":
                depends["keyword_model"] = identities["keyword_model"]
            if system == "random":
                depends["seed"] = config.seed
            answers[system] = Stage(run, system, answering | depends)
            systems.answer_shards(answers[system], asked, pruned, model, config)
            _check_whole(run)
    against = config.baseline if config.pairwise else None
    verdicts = judge(run, asked, answers, against, judging) if judging else {}
    _check_whole(run)

    written = Path(config.output_dir) / ANSWERS_FILE
    scored = score(written, asked, answers, verdicts)
    counts = {system: {"errors": stage.finished().counts["errors"]} for system, stage in answers.items()}
    for system, stages in verdicts.items():
        for name, stage in stages.items():
            counts[system][f"no_verdict_{name}"] = stage.finished().counts["no_verdict"]
    facts = {name: getattr(settings, name) for name in _MODEL_FACTS}
    facts |= {
        "compression_rate": rate,
        "memory_tokens": settings.memory_tokens_of(settings.doc_max_length, rate),
        "budget": config.budget,
    }
    return Results(
        kind="answers",
        **known,
        model={"name": sources.model.name, **facts},
        right_answers="gold" if config.gold else "teacher",
        counts=asked.finished().counts
        | {"articles": len(set(scored.articles)), "held": sum(scored.held)}
        | _of_training(sources.model, known["inputs"], len(scored.articles)),
        baseline=config.baseline,
        systems=conclude(
            scored.values, scored.articles, config.baseline, counts, seed=config.seed, held=scored.held
        ),
        files={ANSWERS_FILE: run.content_hash(written)},
    )


def _of_training(model: ModelSource, inputs: dict[str, list[str]], number: int) -> dict[str, int]:
    """Return facts about the model's training for the remarks, from the record in its folder."""
    from scaledown.student.training.folder import training_of  # here: --help needs no transformers

    training = training_of(model)
    facts = {
        "trained_on": number if training.data & set(inputs["data"]) else 0,
        "trained_without_text": number if training.read_text is False else 0,
    }
    return {name: count for name, count in facts.items() if count}


def _check_whole(run: RunDirectory) -> None:
    """Raise an error if shards were given up: a mean over the other answers would be misleading."""
    if lost := run.given_up():
        raise RunDirectoryError(
            f"{lost:,} shards of answers crashed each process that tried them: see {run.quarantine}, fix the "
            "cause, and run the same command again to retry them"
        )


def _questions_stage(config: EvaluateConfig, run: RunDirectory, inputs: dict[str, Any]) -> Stage:
    """Return the finished stage of questions."""
    shards = {"limit": config.num_examples, "rows_per_shard": max(_ROWS_PER_SHARD, config.batch_size)}
    stage = Stage(run, "questions", {"data": inputs["data"], "gold": inputs.get("gold"), **shards})
    gold = functools.partial(read_gold, config.gold, "--gold") if config.gold else None
    questions.collect_questions(stage, Path(config.data), gold, **shards)
    return stage


def _sentences(  # noqa: PLR0917
    run: RunDirectory,
    config: EvaluateConfig,
    sources: EvaluationModels,
    settings: "ScaleDownConfig",
    asked: Stage,
    identities: dict[str, str],
    machine: dict[str, str],
) -> Stage | None:
    """Return the finished stage of documents that are pruned to as many tokens as compression keeps."""
    if not sources.reranker:
        return None
    from scaledown.student.batch import plain_ids
    from scaledown.student.model import load_tokenizer

    source = sources.reranker
    rate = config.compression_rate or settings.compression_rate
    scoring = {"reranker": identities["reranker"], "prompts": PROMPT_VERSION, "batch_size": _RERANKER_BATCH}
    budget: dict[str, Any] = {"tokenizer": identities["model"], "tokens": settings.memory_tokens}
    if settings.kind.rates:
        budget["compression_rate"] = rate
    if source.name.startswith(LIKELIHOOD_PREFIX):
        budget["likelihood"] = SCORING
    stage = Stage(run, "sentences", {"questions": asked.fingerprint, **scoring, **budget, **machine})
    tokenizer = functools.cache(lambda: load_tokenizer(sources.model))
    tokens = TokenCodec(
        lambda text: tokenizer()(text, add_special_tokens=False, verbose=False)["input_ids"],
        lambda ids: tokenizer().decode(ids, skip_special_tokens=True),
    )
    device = choose_device(config.device)
    reranker = OnDevice(
        "the reranker", device, lambda: load_reranker(source, device, config.dtype, _RERANKER_BATCH)
    )

    def memory(document: str) -> int:
        read = min(len(plain_ids(tokenizer(), document)), settings.doc_max_length)
        return settings.memory_tokens_of(read, rate)

    prune(stage, asked, reranker, tokens, memory)
    reranker.release()
    return stage


def _evaluate_rankings(config: EvaluateConfig, run: RunDirectory, known: dict[str, Any]) -> Results:
    measures = ranking.parse_measures(config.measures)
    judged: Counter[str] = Counter()
    qrels = ranking.read_qrels(Path(config.qrels), judged)
    short = [Path(name).name for name in config.run]
    names = short if len(set(short)) == len(short) else list(config.run)
    values, counts = {}, {}
    for name, path in zip(names, config.run, strict=True):
        faults: Counter[str] = Counter()
        found = ranking.read_run(Path(path), faults)
        values[name] = ranking.per_query(found, qrels, measures)
        counts[name] = {"missing": len(qrels.keys() - found.keys()), **faults}
    written = Path(config.output_dir) / QUERIES_FILE
    ranking.write_queries(written, list(qrels), values)
    return Results(
        kind="rankings",
        **known,
        model={},
        right_answers="qrels",
        counts={"queries": len(qrels), **judged},
        baseline=names[0],
        systems=conclude(values, None, names[0], counts, seed=config.seed),
        files={QUERIES_FILE: run.content_hash(written)},
    )

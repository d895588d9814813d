"""The command `scaledown compare`: the quality and the cost of several models' answers."""

import csv
import io
import json
import logging
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import orjson

from scaledown.command import CommandHelp, program_name, run_cli
from scaledown.config.compare import GROUPS, CompareConfig
from scaledown.config.evaluate import COMPRESSED, SYSTEMS, EvaluateConfig
from scaledown.config.flags import Parser, from_flags, path_or_url, read_settings
from scaledown.config.train import TrainConfig
from scaledown.data.input.download import fetched
from scaledown.data.input.gold import read_gold
from scaledown.data.input.training_files import check_file
from scaledown.data.reranker.api import resolve_reranker
from scaledown.devices.choice import choose_device, dtype_to_run
from scaledown.devices.gpus import OnDevice
from scaledown.errors import InputError, UsageError
from scaledown.evaluation.baselines import ECHOES
from scaledown.evaluation.efficiency import AS_THE_PAPER, Cost, Seconds, Shape, costs, describe_machine
from scaledown.evaluation.results import Comparison, Results, Run
from scaledown.evaluation.run import ANSWERS_FILE, WORK_FOLDER, evaluate
from scaledown.evaluation.statistics import Difference, difference
from scaledown.extensions import MEASURES
from scaledown.models.sources import resolve
from scaledown.models.weights import onto, quiet_libraries
from scaledown.run.atomic import atomic, read_json, write_json
from scaledown.run.directory import RunDirectory, fingerprint
from scaledown.run.outputs import check_output

if TYPE_CHECKING:
    from scaledown.student.settings import ScaleDownConfig

log = logging.getLogger("scaledown")

PAGE_FILE: Final = "comparison.html"
TABLE_FILE: Final = "comparison.md"
NUMBERS_FILE: Final = "comparison.csv"
_EVALUATIONS: Final = "evaluations"  # a folder in the output


def _shape(config: CompareConfig) -> Shape:
    """Return the sizes of queries, documents and answers that are timed."""
    return Shape(
        config.cost_query_tokens, config.cost_documents, config.cost_document_tokens, config.cost_new_tokens
    )


def compare(names: Sequence[str], config: CompareConfig, *, overwrite: bool = False) -> Comparison:
    """Evaluate and time each run, and write the page and the tables.

    Work that an earlier call finished is not repeated.

    Args:
        names: The runs. Each is the folder of a trained model, a name on the hub, or a JSON file with
            settings of `scaledown train`, which is trained first.
        config: Data, systems, sizes to time, output folder.
        overwrite: Replace files in the output folder that no comparison has written.

    Returns:
        The results of all runs.

    Raises:
        ScaleDownError: An input, a model or the output folder cannot be used.
    """
    from scaledown.student.training.run import train  # here, so that --help needs no torch

    quiet_libraries()
    output = Path(config.output_dir)
    reads = (config.data, *config.gold, *(name for name in names if name.endswith(".json")))
    for name in (PAGE_FILE, TABLE_FILE, NUMBERS_FILE):
        ours = (output / _EVALUATIONS).is_dir
        check_output("--output_dir", output / name, reads, made=ours, overwrite=overwrite)
    short = _names(names)
    settings = [_settings(Path(name), output) if name.endswith(".json") else None for name in names]
    _check_runs(names, settings, config)
    folders = [
        str(train(own, command=_train_command(name, own)).output) if own else name
        for name, own in zip(names, settings, strict=True)
    ]
    config = _sized(config, folders)
    runs: list[Run] = []
    ways = list(_ways(short, folders, config))
    first = RunDirectory(output / _EVALUATIONS / ways[0].name / WORK_FOLDER)
    config = replace(config, dtype=first.dtype(config.dtype, choose_device(config.device)))  # one for all
    for name, folder, rate, budget in ways:
        log.info("compare: %s", name)
        baselines = config.baselines
        if runs:  # baselines use the first model alone; those that no rate changes are evaluated once
            baselines = tuple(name for name in baselines if SYSTEMS[name].has_rate and folder == folders[0])
        results = evaluate(
            EvaluateConfig(
                model=folder,
                data=config.data,
                gold=config.gold,
                systems=(COMPRESSED, *baselines),
                compression_rate=rate,
                budget=budget,
                keyword_model=config.keyword_model,
                pruning_reranker=config.pruning_reranker,
                num_examples=config.num_examples,
                max_new_tokens=config.max_new_tokens,
                batch_size=config.batch_size,
                output_dir=str(output / _EVALUATIONS / name),
                seed=config.seed,
                device=config.device,
                dtype=config.dtype,
            ),
            overwrite=overwrite,
        )
        measured = _costs(output / "costs" / f"{name}.json", results, config)
        runs.append(Run(name, Path(folder), results, measured, {}))
    reference = runs[0].results.baseline
    answered = [_read_scores(output / _EVALUATIONS / run.name / ANSWERS_FILE) for run in runs]
    for run, own in zip(runs, answered, strict=True):
        if run is not runs[0] or reference != COMPRESSED:
            run.differences.update(_paired_differences(own, answered[0], reference, config.seed))
    batches = sorted({int(size) for size in config.cost_batches})
    comparison = Comparison(runs, reference, describe_machine(), _shape(config), batches)
    _write_comparison(output, comparison)
    return comparison


def _sized(config: CompareConfig, folders: Sequence[str]) -> CompareConfig:
    """Replace lengths of 0 by the paper's, or by the longest that each model compresses."""
    from scaledown.student.settings import ScaleDownConfig

    models = [ScaleDownConfig.read(resolve(folder)) for folder in folders]
    return replace(
        config,
        cost_document_tokens=config.cost_document_tokens
        or min(AS_THE_PAPER.document_tokens, *(model.doc_max_length for model in models)),
        cost_query_tokens=config.cost_query_tokens
        or min(AS_THE_PAPER.query_tokens, *(model.query_max_length for model in models)),
    )


class _Way(NamedTuple):
    """A model with a rate and a budget of compression."""

    name: str
    folder: str
    rate: int
    """0 is the model's own rate."""
    budget: str


def _ways(names: Sequence[str], folders: Sequence[str], config: CompareConfig) -> Iterator[_Way]:
    """Yield each model once, and a pointer once for each of `--compression_rates`."""
    from scaledown.student.settings import ScaleDownConfig

    for name, folder in zip(names, folders, strict=True):
        rates = ScaleDownConfig.read(resolve(folder)).kind.rates
        budget = config.budget if rates else "each"
        if not rates or not config.compression_rates:
            yield _Way(name, folder, 0, budget)
        else:
            yield from (_Way(f"{name}-{n}x", folder, int(n), budget) for n in config.compression_rates)


def _names(names: Sequence[str]) -> list[str]:
    """Return short, unique names of the runs. Runs of the same name get their parent folder as a prefix."""
    paths = [
        Path(name).resolve().with_suffix("") if name.endswith(".json") else Path(name).resolve()
        for name in names
    ]
    if len(set(paths)) < len(paths):
        raise UsageError("one of the runs is named twice: name each once")
    short = [path.name for path in paths]
    return [
        name if short.count(name) == 1 else f"{path.parent.name}-{name}"
        for path, name in zip(paths, short, strict=True)
    ]


def _settings(path: Path, output: Path) -> TrainConfig:
    """Read settings of `scaledown train` from a file. The output folder's name has a hash of the settings."""
    found = read_settings(path, TrainConfig)
    digest = blake2b(json.dumps(found, sort_keys=True).encode(), digest_size=4).hexdigest()
    folder = output / "models" / f"{path.stem}-{digest}"
    return from_flags({"config": str(path), "output_dir": str(folder), "resume": True}, TrainConfig)


def _train_command(name: str, config: TrainConfig) -> str:
    """Return the command that makes the training run of a file of settings."""
    return shlex.join(["train", "--config", name, "--output_dir", config.output_dir, "--resume"])


def _check_runs(names: Sequence[str], settings: Sequence[TrainConfig | None], config: CompareConfig) -> None:
    """Check before any training what would otherwise fail after it. Raises `ScaleDownError`."""
    from scaledown.student.settings import ScaleDownConfig

    check_file(fetched(config.data, "--data"))
    if config.gold:
        read_gold(config.gold, "--gold")
    if "pruned" in config.baselines:
        resolve_reranker(config.pruning_reranker)
    trained = [name for name, own in zip(names, settings, strict=True) if own is None]
    models = {name: ScaleDownConfig.read(resolve(name)) for name in trained}
    for name, model in models.items():
        _check_shape(name, model, _shape(config))
        for rate in config.compression_rates if model.kind.rates else ():
            model.check_rate(int(rate))
    if (
        config.compression_rates
        and not any(settings)
        and not any(model.kind.rates for model in models.values())
    ):
        raise UsageError(
            "--compression_rates: no run is a pointer, and other models have only one rate: leave it out"
        )
    if (
        settings[0] is None
        and not models[names[0]].kind.picks_tokens
        and (found := set(config.baselines) & set(ECHOES))
    ):
        raise UsageError(f"--baselines {min(found)}: the first run is not a pointer: leave it out")


def _check_shape(name: str, model: "ScaleDownConfig", shape: Shape) -> None:
    """Raise `InputError` if a model would compress fewer tokens than its generator reads as text."""
    for flag, asked, most in (
        ("document", shape.document_tokens, model.doc_max_length),
        ("query", shape.query_tokens, model.query_max_length),
    ):
        if asked > most:
            raise InputError(
                f"--cost_{flag}_tokens {asked}: {name} compresses {most} tokens of a {flag} and cuts the "
                f"rest: give --cost_{flag}_tokens {most}, or less"
            )


class _AnswerScores(NamedTuple):
    """The scores of all answers, by system and question."""

    queries: list[str]
    articles: list[str]
    scores: dict[str, list[dict[str, Any]]]


def _read_scores(path: Path) -> _AnswerScores:
    found = _AnswerScores([], [], {})
    with path.open("rb") as file:
        for record in map(orjson.loads, file):
            found.queries.append(record["query"])
            found.articles.append(record["article"])
            for system, answer in record["answers"].items():
                found.scores.setdefault(system, []).append(answer)
    return found


def _paired_differences(
    own: _AnswerScores, first: _AnswerScores, reference: str, seed: int
) -> dict[str, Difference]:
    """Return paired differences for the measures that every answer has; empty if the questions differ."""
    if own.queries != first.queries:
        return {}
    left, right = own.scores[COMPRESSED], first.scores[reference]
    return {
        measure: difference(
            [one[measure] for one in left], [one[measure] for one in right], own.articles, seed=seed
        )
        for measure in MEASURES
    }


def _costs(path: Path, results: Results, config: CompareConfig) -> list[Cost]:
    """Measure the costs of a model, or read those that were measured earlier on this machine."""
    batches = [int(size) for size in config.cost_batches]
    device = choose_device(config.device)
    dtype = dtype_to_run(config.dtype, device)
    shape = _shape(config)
    of = [
        results.models["model"],
        batches,
        shape,
        config.cost_repeats,
        device,
        str(dtype),
        describe_machine(),
    ]
    way = {name: results.parameters[name] for name in ("compression_rate", "budget")}
    request = fingerprint({"of": [*of, way]})
    kept = read_json(path)
    if isinstance(kept, dict) and kept.get("request") == request:
        return [_cost(one) for one in kept["costs"]]
    from scaledown.student.model import ScaleDownModel

    log.info("cost: batches of %s, %s", ", ".join(config.cost_batches), shape)
    name = results.model["name"]
    model = OnDevice(name, device, lambda: ScaleDownModel.from_pretrained(name, dtype=dtype, **onto(device)))
    _check_shape(name, model().config, shape)
    _check_room(model(), shape)
    measured = costs(model(), batches, shape=shape, repeats=config.cost_repeats, **way)
    model.release()
    write_json(
        path,
        {"request": request, "machine": describe_machine(), "costs": [one._asdict() for one in measured]},
    )
    return measured


def _cost(kept: dict[str, Any]) -> Cost:
    times = {name: Seconds(*kept[name]) for name in ("compression", "generation")}
    return Cost(**kept | times)


def _check_room(model: Any, shape: Shape) -> None:
    """Raise `InputError` if the text to time does not fit into the generator's context."""
    needed = shape.query_tokens + shape.documents * (shape.document_tokens + 2) + shape.new_tokens + 128
    if needed > model.reader.context:
        raise InputError(
            f"{shape.documents} documents of {shape.document_tokens} tokens do not fit the generator's "
            f"{model.reader.context:,}: lower --cost_documents or --cost_document_tokens"
        )


def _write_comparison(output: Path, comparison: Comparison) -> None:
    from scaledown.evaluation.pages import comparison_page
    from scaledown.report.page import html, markdown

    page = comparison_page(comparison)
    for name, text in (
        (PAGE_FILE, html(page)),
        (TABLE_FILE, markdown(page)),
        (NUMBERS_FILE, numbers(comparison)),
    ):
        with atomic(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def numbers(comparison: Comparison) -> str:
    """Return all numbers of a comparison as CSV.

    Args:
        comparison: Its runs and their costs.

    Returns:
        A line of headings and a line for each number: run, settings of the model, system, batch, measure,
        value, ends of the 95% interval (of the quartiles for seconds), number of questions.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    made = ("compressor", "num_layers", "compression_rate", "memory_tokens", "enable_reranking")
    writer.writerow(("run", *made, "system", "batch", "measure", "value", "low", "high", "n"))
    for run in comparison.runs:
        facts = run.results.model
        layers = facts["num_layers"] if run.kind.of_generator else ""
        model = [layers if name == "num_layers" else facts.get(name, "") for name in made]
        mine = [run.name, *model, COMPRESSED, ""]
        for system, own in run.results.systems.items():
            for measure, estimate in own.measures.items():
                writer.writerow([run.name, *model, system, "", measure, *estimate])
        for measure, found in run.differences.items():
            name = f"{measure} against {comparison.reference}"
            writer.writerow([*mine, name, found.mean, found.low, found.high, found.n])
            writer.writerow([*mine, f"{name}, p", found.p_value, "", "", found.n])
        for cost in run.costs:
            place = [run.name, *model, cost.system, cost.batch]
            for name in ("compression", "generation"):
                writer.writerow([*place, f"{name} FLOPs", getattr(cost, f"{name}_flops"), "", "", ""])
                writer.writerow([*place, f"{name} seconds", *getattr(cost, name), ""])
            writer.writerow([*place, "peak bytes", cost.peak_bytes, "", "", ""])
    return file.getvalue()


def comparison_summary(comparison: Comparison, config: CompareConfig) -> str:
    """Return what the finished command prints: a line for each run, and the path of the page.

    Args:
        comparison: The result of `compare`.
        config: The settings of the command.
    """
    from scaledown.evaluation.pages import quality_rows

    columns, rows = quality_rows(comparison)
    cells = [list(columns), *([str(value) for value in row] for row in rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    lines = [
        "  " + "  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    output = config.output_dir
    return "\n".join(
        [
            f"{output}: {len(comparison.runs)} runs",
            "",
            *lines,
            "",
            f"look: {output}/{PAGE_FILE}, {output}/{TABLE_FILE}, {output}/{NUMBERS_FILE}",
            f"next: {program_name()} serve --model {comparison.runs[0].folder}",
        ]
    )


def main(argv: Sequence[str] | None = None, program: str = "scaledown compare") -> int:
    """Run the command line.

    Args:
        argv: The arguments after the command's name; None for those of this process.
        program: The name of the command in its help.

    Returns:
        The exit status, see `run_command`.
    """
    usage = CommandHelp(
        program,
        "RUN... --data FILE",
        "Compare models by the quality and the cost of their answers. To continue an interrupted comparison, "
        "run the same command again.",
        GROUPS,
    )
    return run_cli(
        CompareConfig, _compare, comparison_summary, usage=usage, argv=argv, add=_add_runs, resumes=True
    )


def _add_runs(parser: Parser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        type=path_or_url,
        metavar="RUN",
        help="folder of a trained model, name on the hub, or JSON with settings of scaledown train, which is "
        "trained first",
    )


def _compare(config: CompareConfig, *, runs: Sequence[str], overwrite: bool = False) -> Comparison:
    return compare(runs, config, overwrite=overwrite)

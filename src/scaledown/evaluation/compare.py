"""`scaledown compare`: models side by side, what their answers are worth and what they cost."""

import csv
import io
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import orjson

from scaledown.config.evaluate import SYSTEMS, EvaluateConfig
from scaledown.config.flags import command_parser, from_flags, path_or_url, read_settings, underscored
from scaledown.config.options import Checked, option
from scaledown.config.prepare import OUTPUT
from scaledown.config.shared import AUTO_DTYPE, DTYPES, MACHINE
from scaledown.config.train import BUDGETS, TrainConfig
from scaledown.data.input.download import fetched
from scaledown.data.input.gold import read_gold
from scaledown.data.reranker import resolve_reranker
from scaledown.data.session.summary import program_name
from scaledown.errors import InputError, UsageError, run_command
from scaledown.evaluation.baselines import ECHOES, OF_A_RATE
from scaledown.evaluation.efficiency import Cost, Seconds, Shape, costs, machine
from scaledown.evaluation.evaluate import ANSWERS, evaluate
from scaledown.evaluation.results import Comparison, Results, Run
from scaledown.evaluation.scoring import MEASURES
from scaledown.evaluation.statistics import Difference, difference
from scaledown.gpus import OnDevice
from scaledown.models import choose_device, dtype_to_run, onto, quiet_libraries, resolve
from scaledown.run.atomic import atomic, read_json, write_json
from scaledown.run.directory import fingerprint
from scaledown.run.logs import start_logging
from scaledown.run.outputs import check_output
from scaledown.student.train import train
from scaledown.urls import is_url

if TYPE_CHECKING:
    from scaledown.student.settings import ScaleDownConfig

log = logging.getLogger("scaledown")

QUALITY: Final = "quality"
COST: Final = "cost"
GROUPS: Final = (QUALITY, COST, OUTPUT, MACHINE)

PAGE: Final = "comparison.html"
TABLE: Final = "comparison.md"
NUMBERS: Final = "comparison.csv"
_EVALUATIONS: Final = "evaluations"  # a folder in the output


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Checked):
    """Settings of `scaledown compare`."""

    data: str = option(
        "", QUALITY, "held-out questions with documents, as for scaledown evaluate", metavar="FILE"
    )
    gold: tuple[str, ...] = option((), QUALITY, "right answers, as for scaledown evaluate", metavar="FILE")
    baselines: tuple[str, ...] = option(
        ("uncompressed", "closed_book"),
        QUALITY,
        "what the first run's generator does without compression, for comparison",
        choices=tuple(system for system in SYSTEMS if system != "compressed"),
    )
    compression_rates: tuple[str, ...] = option(
        (),
        QUALITY,
        "compare a pointer at each of these, 4 to 32 document tokens to one memory token; nothing is its own",
        "tokens",
        metavar="N",
    )
    budget: str = option("each", QUALITY, "of pointers, as for scaledown evaluate", choices=BUDGETS)
    keyword_model: str = option(
        EvaluateConfig.keyword_model, QUALITY, "of keywords, as for scaledown evaluate", metavar="MODEL"
    )
    pruning_reranker: str = option(
        EvaluateConfig.pruning_reranker, QUALITY, "of pruned, as for scaledown evaluate", metavar="MODEL"
    )
    num_examples: int = option(0, QUALITY, "take only the first so many", "questions", metavar="N")
    max_new_tokens: int = option(128, QUALITY, "longest answer", "tokens", metavar="N")
    batch_size: int = option(8, QUALITY, "questions answered at once", "questions", metavar="N")
    cost_batches: tuple[str, ...] = option(
        ("1", "8"), COST, "sizes of the batches that are timed", "queries", metavar="N"
    )
    cost_documents: int = option(10, COST, "documents to a query", "documents", metavar="N")
    cost_document_tokens: int = option(128, COST, "of each document", "tokens", metavar="N")
    cost_query_tokens: int = option(128, COST, "of the query", "tokens", metavar="N")
    cost_new_tokens: int = option(32, COST, "that are generated", "tokens", metavar="N")
    cost_repeats: int = option(3, COST, "how often each is timed", "times", metavar="N")
    output_dir: str = option(
        "comparison", OUTPUT, "page, tables, and what goes on after a crash", metavar="DIR"
    )
    seed: int = option(0, OUTPUT, "seed of resampling", metavar="N")
    device: str = option("auto", MACHINE, "auto, cpu, cuda, cuda:N or mps", metavar="DEVICE")
    dtype: str = option("auto", MACHINE, AUTO_DTYPE, choices=DTYPES)

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_files("gold")
        if not self.data:
            raise UsageError("no held-out questions: give --data FILE")
        if is_url(self.output_dir) or Path(self.output_dir).is_file():
            raise UsageError("--output_dir: name a local folder")
        sizes = ("cost_documents", "cost_document_tokens", "cost_query_tokens", "cost_new_tokens")
        self._check_at_least(1, "max_new_tokens", "batch_size", "cost_repeats", *sizes)
        self._check_at_least(0, "num_examples", "seed")
        for name in ("cost_batches", "compression_rates"):
            for number in getattr(self, name):
                if not number.isdecimal() or not int(number):
                    raise UsageError(f"--{name} {number}: must be whole numbers, at least 1")
        if len(set(self.compression_rates)) < len(self.compression_rates):
            raise UsageError("--compression_rates: name each once")

    @property
    def shape(self) -> Shape:
        """What is timed."""
        return Shape(
            self.cost_query_tokens, self.cost_documents, self.cost_document_tokens, self.cost_new_tokens
        )


def compare(names: Sequence[str], config: CompareConfig, *, overwrite: bool = False) -> Comparison:
    """Evaluate and time each run, training first those that are settings, and write page and tables.

    A run is the folder of a trained model, a name on the hub, or a JSON file with settings of `scaledown
    train`. What was done once is not done again. With `overwrite` files that no comparison made are replaced.
    Raises `ScaleDownError`.
    """
    quiet_libraries()
    output = Path(config.output_dir)
    reads = (config.data, *config.gold, *(name for name in names if name.endswith(".json")))
    for name in (PAGE, TABLE, NUMBERS):
        ours = (output / _EVALUATIONS).is_dir
        check_output("--output_dir", output / name, reads, made=ours, overwrite=overwrite)
    short = _names(names)
    settings = [_settings(Path(name), output) if name.endswith(".json") else None for name in names]
    _check(names, settings, config)
    folders = [str(train(own).output) if own else name for name, own in zip(names, settings, strict=True)]
    runs: list[Run] = []
    for name, folder, rate, budget in _ways(short, folders, config):
        log.info("compare: %s", name)
        baselines = config.baselines
        if runs:  # of the first model alone, and once if the rate does not matter to them
            baselines = tuple(one for one in baselines if one in OF_A_RATE and folder == folders[0])
        results = evaluate(
            EvaluateConfig(
                model=folder,
                data=config.data,
                gold=config.gold,
                systems=("compressed", *baselines),
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
    answered = [_answered(output / _EVALUATIONS / run.name / ANSWERS) for run in runs]
    for run, own in zip(runs, answered, strict=True):
        if run is not runs[0] or reference != "compressed":
            run.differences.update(_differences(own, answered[0], reference, config.seed))
    batches = sorted({int(size) for size in config.cost_batches})
    comparison = Comparison(runs, reference, machine(), config.shape, batches)
    _write(output, comparison)
    return comparison


class _Way(NamedTuple):
    """A model, and how it compresses."""

    name: str
    folder: str
    rate: int
    """0 is the model's own."""
    budget: str


def _ways(names: Sequence[str], folders: Sequence[str], config: CompareConfig) -> Iterator[_Way]:
    """Each model once, a pointer once for each rate."""
    from scaledown.student.model import read_settings as read_model

    for name, folder in zip(names, folders, strict=True):
        is_pointer = read_model(resolve(folder)).is_pointer
        budget = config.budget if is_pointer else "each"
        if not is_pointer or not config.compression_rates:
            yield _Way(name, folder, 0, budget)
        else:
            yield from (_Way(f"{name}-{n}x", folder, int(n), budget) for n in config.compression_rates)


def _names(names: Sequence[str]) -> list[str]:
    """Short names of the runs, which differ: of two that are called alike, with the folder they are in."""
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
    """The run of `scaledown train` that a file describes, into a folder that no other settings have."""
    found = read_settings(path, TrainConfig)
    digest = blake2b(json.dumps(found, sort_keys=True).encode(), digest_size=4).hexdigest()
    folder = output / "models" / f"{path.stem}-{digest}"
    return from_flags({"config": str(path), "output_dir": str(folder), "resume": True}, TrainConfig)


def _check(names: Sequence[str], settings: Sequence[TrainConfig | None], config: CompareConfig) -> None:
    """Find out before any training what would fail after it. Raises `ScaleDownError`."""
    from scaledown.student.model import read_settings as read_model

    if not fetched(config.data, "--data").is_file():
        raise InputError(f"--data {config.data}: there is no such file; check the path")
    if config.gold:
        read_gold(config.gold, "--gold")
    if "pruned" in config.baselines:
        resolve_reranker(config.pruning_reranker)
    trained = [name for name, own in zip(names, settings, strict=True) if own is None]
    models = {name: read_model(resolve(name)) for name in trained}
    for name, model in models.items():
        _check_shape(name, model, config.shape)
        for rate in config.compression_rates if model.is_pointer else ():
            model.check_rate(int(rate))
    if (
        config.compression_rates
        and not any(settings)
        and not any(model.is_pointer for model in models.values())
    ):
        raise UsageError(
            "--compression_rates: no run is a pointer, and others have but one rate: leave it out"
        )
    if (
        settings[0] is None
        and not models[names[0]].is_pointer
        and (found := set(config.baselines) & set(ECHOES))
    ):
        raise UsageError(f"--baselines {min(found)}: the first run is no pointer: leave it out")


def _check_shape(name: str, model: "ScaleDownConfig", shape: Shape) -> None:
    """Raise `InputError` where a model would be timed on less than what its generator reads as text."""
    for flag, asked, most in (
        ("document", shape.document_tokens, model.doc_max_length),
        ("query", shape.query_tokens, model.query_max_length),
    ):
        if asked > most:
            raise InputError(
                f"--cost_{flag}_tokens {asked}: {name} compresses {most} tokens of a {flag}, the rest would "
                "be cut: lower the flag"
            )


class _Answered(NamedTuple):
    """The scores of all answers, by system and question."""

    queries: list[str]
    articles: list[str]
    scores: dict[str, list[dict[str, Any]]]


def _answered(path: Path) -> _Answered:
    found = _Answered([], [], {})
    with path.open("rb") as file:
        for record in map(orjson.loads, file):
            found.queries.append(record["query"])
            found.articles.append(record["article"])
            for system, answer in record["answers"].items():
                found.scores.setdefault(system, []).append(answer)
    return found


def _differences(own: _Answered, first: _Answered, reference: str, seed: int) -> dict[str, Difference]:
    """Paired, of the measures that every answer has. None where not the same questions were asked."""
    if own.queries != first.queries:
        return {}
    left, right = own.scores["compressed"], first.scores[reference]
    return {
        measure: difference(
            [one[measure] for one in left], [one[measure] for one in right], own.articles, seed=seed
        )
        for measure in MEASURES
    }


def _costs(path: Path, results: Results, config: CompareConfig) -> list[Cost]:
    """Measured, or as they were measured here before."""
    batches = [int(size) for size in config.cost_batches]
    device = choose_device(config.device)
    dtype = dtype_to_run(config.dtype, device)
    of = [results.models["model"], batches, config.shape, config.cost_repeats, device, str(dtype), machine()]
    way = {name: results.parameters[name] for name in ("compression_rate", "budget")}
    of += [way] if way["compression_rate"] else []
    request = fingerprint({"of": of})
    kept = read_json(path)
    if isinstance(kept, dict) and kept.get("request") == request:
        return [_cost(one) for one in kept["costs"]]
    from scaledown.student.model import ScaleDownModel

    log.info("cost: batches of %s, %s", ", ".join(config.cost_batches), config.shape)
    name = results.model["name"]
    model = OnDevice(name, device, lambda: ScaleDownModel.from_pretrained(name, dtype=dtype, **onto(device)))
    _check_shape(name, model().config, config.shape)
    _check_room(model(), config.shape)
    measured = costs(model(), batches, shape=config.shape, repeats=config.cost_repeats, **way)
    model.release()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"request": request, "machine": machine(), "costs": [one._asdict() for one in measured]})
    return measured


def _cost(kept: dict[str, Any]) -> Cost:
    times = {name: Seconds(*kept[name]) for name in ("compression", "generation")}
    return Cost(**kept | times)


def _check_room(model: Any, shape: Shape) -> None:
    """Raise `InputError` where the text that is to be timed does not fit the generator."""
    needed = shape.query_tokens + shape.documents * (shape.document_tokens + 2) + shape.new_tokens + 128
    if needed > model.reader.context:
        raise InputError(
            f"{shape.documents} documents of {shape.document_tokens} tokens do not fit the generator's "
            f"{model.reader.context:,}: lower --cost_documents or --cost_document_tokens"
        )


def _write(output: Path, comparison: Comparison) -> None:
    from scaledown.evaluation.pages import comparison_page
    from scaledown.report.page import html, markdown

    page = comparison_page(comparison)
    for name, text in ((PAGE, html(page)), (TABLE, markdown(page)), (NUMBERS, numbers(comparison))):
        with atomic(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def numbers(comparison: Comparison) -> str:
    """CSV with a line for each number: run, model, system, what, value, interval, how many questions."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    made = ("compressor", "num_layers", "compression_rate", "memory_tokens", "enable_reranking")
    writer.writerow(("run", *made, "system", "batch", "measure", "value", "low", "high", "n"))
    for run in comparison.runs:
        facts = run.results.model
        layers = facts["num_layers"] if facts["compressor"] in {"n_layers", "pointer"} else ""
        model = [layers if name == "num_layers" else facts.get(name, "") for name in made]
        mine = [run.name, *model, "compressed", ""]
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


def main(argv: Sequence[str] | None = None, program: str = "scaledown compare") -> int:
    """The command line; gives the exit status."""
    parser, _ = command_parser(
        program,
        CompareConfig,
        "RUN... --data FILE",
        "Compare models by what their answers are worth and what they cost. The same command again continues "
        "an interrupted one.",
        GROUPS,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=path_or_url,
        metavar="RUN",
        help="folder of a trained model, name on the hub, or JSON with settings of scaledown train, which is "
        "trained first",
    )
    words = underscored(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        flags = vars(parser.parse_args(words))
        flags.pop("debug", None)
        overwrite = flags.pop("overwrite", False)
        start_logging(flags.pop("log_level", "info"), flags.pop("log_format", "text"))
        runs = flags.pop("runs")
        flags = {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
        config = from_flags(flags, CompareConfig)
        print(summary(compare(runs, config, overwrite=overwrite), config))
        return 0

    return run_command(command, debug="--debug" in words, resumes=True)


def summary(comparison: Comparison, config: CompareConfig) -> str:
    """What a finished command prints: a line for each run, where the page is."""
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
            f"look: {output}/{PAGE}, {output}/{TABLE}, {output}/{NUMBERS}",
            f"next: {program_name()} answer --model {comparison.runs[0].folder} --help",
        ]
    )

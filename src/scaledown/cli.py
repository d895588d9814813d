"""`scaledown COMMAND`: all commands. Each imports its libraries when it runs."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Final, NamedTuple

import scaledown
from scaledown.config.flags import (
    Parser,
    add_flags,
    add_log_flags,
    add_overwrite,
    from_flags,
    local_path,
    path_or_url,
    underscored,
)
from scaledown.config.shared import CleanConfig
from scaledown.errors import UsageError, one_line, run_command
from scaledown.extensions import OUTPUT_FORMATS


class _Command(NamedTuple):
    """A command with its own parser."""

    module: str
    help: str
    flags: tuple[str, ...] = ()
    """Flags that are added to the command line."""


_COMMANDS: Final = {
    "prepare": _Command("scaledown.data.prepare_dataset", "make training data (scaledown prepare --help)"),
    "plan": _Command(
        "scaledown.data.prepare_dataset",
        "estimate what prepare needs, and list what is missing",
        ("--dry_run",),
    ),
    "index": _Command("scaledown.data.build_index", "make passages and vectors once, for many runs"),
    "pretrain": _Command("scaledown.student.pretrain", "train a compressor on any text, before training"),
    "train": _Command("scaledown.student.train", "train a compressor on training data"),
    "answer": _Command("scaledown.student.answer", "answer a question with a trained model"),
    "serve": _Command("scaledown.serving.serve", "serve a trained model to OpenAI clients"),
    "evaluate": _Command("scaledown.evaluation.evaluate", "measure answers or rankings, with intervals"),
    "compare": _Command("scaledown.evaluation.compare", "compare quality and cost of several models"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments without the program's name; None for those of this process.

    Returns:
        The exit status, see `run_command`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    resumes = words[:1] in (["prepare"], ["index"], ["evaluate"], ["compare"])

    def command() -> int:  # it imports, so that Ctrl-C during imports prints one line, too
        name = words[0].replace("_", "-") if words else ""
        if name in _COMMANDS:
            own = _COMMANDS[name]
            status: int = import_module(own.module).main([*own.flags, *words[1:]], f"scaledown {name}")
            return status
        return _run(underscored(words))

    return run_command(command, debug="--debug" in words, resumes=resumes)


def _run(words: list[str]) -> int:
    parser = Parser(
        prog="scaledown",
        description="Make training data for a compressor of retrieved documents (OSCAR); train, measure and "
        "serve it.",
    )
    parser.add_argument("--version", action="version", version=f"scaledown {scaledown.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for name, own in _COMMANDS.items():
        commands.add_parser(name, help=own.help, add_help=False)

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.set_defaults(run=run)
        return command

    report = add("report", _report, "make a page and a dataset card for training data")
    report.add_argument("data", type=local_path, metavar="FILE", help=".json, .jsonl or .parquet")
    report.add_argument(
        "--output",
        type=local_path,
        default=Path("report.html"),
        metavar="FILE",
        help="the page (default: report.html)",
    )
    report.add_argument(
        "--card",
        type=local_path,
        metavar="FILE",
        help="the dataset card (default: as --output, ending in .md)",
    )
    report.add_argument(
        "--gold",
        action="append",
        type=path_or_url,
        default=[],
        metavar="FILE",
        help="questions with right answers, for R@k and accuracy; may be given several times (default: the "
        "run's queries, where they have answers)",
    )
    add_overwrite(report)

    openvino = add(
        "export-openvino",
        _export_openvino,
        "convert a teacher for --teacher_backend openvino, which its first run does otherwise",
    )
    openvino.add_argument("model", type=path_or_url, metavar="MODEL", help="what --teacher_model takes")

    validate = add("validate", _validate, "check all records of training files")
    validate.add_argument(
        "files", nargs="+", type=local_path, metavar="FILE", help=".json, .jsonl or .parquet"
    )

    merge = add("merge", _merge, "merge training files, without repeated queries")
    merge.add_argument("files", nargs="+", type=local_path, metavar="FILE", help=".json, .jsonl or .parquet")
    merge.add_argument(
        "--output_file", required=True, type=local_path, metavar="FILE", help="the merged file to write"
    )
    merge.add_argument(
        "--allow_different_settings",
        action="store_true",
        help="merge files of runs with different settings, too",
    )
    add_overwrite(merge)
    add_flags(lambda _: merge, CleanConfig)

    split = add("split", _split, "hold out a part of training files, by article")
    split.add_argument("files", nargs="+", type=local_path, metavar="FILE", help=".json, .jsonl or .parquet")
    split.add_argument("--output_dir", required=True, type=local_path, metavar="DIR", help="a new folder")
    split.add_argument(
        "--fraction",
        type=_share,
        metavar="SHARE",
        help="the share to hold out (default: a tenth, at most 1,000 records)",
    )
    split.add_argument("--seed", type=_seed, default=0, metavar="N", help="chooses the articles (default: 0)")
    add_overwrite(split)

    export = add("export", _export, "write training files or a model's generator for other programs")
    export.add_argument(
        "files",
        nargs="+",
        type=local_path,
        metavar="FILE",
        help=".json, .jsonl or .parquet; with --format generator the folder of a trained model",
    )
    export.add_argument(
        "--format",
        required=True,
        choices=(*OUTPUT_FORMATS, "pisco", "trec", "generator"),
        help="json, jsonl or parquet: a dataset with a card, for datasets.load_dataset; pisco: a dataset on "
        "disk, for the trainer of OSCAR's authors (github.com/naver/pisco); trec: the rankings of a run; "
        "generator: a trained model's generator as an ordinary causal LM, with LoRA merged, for your own "
        "vLLM (docs/serving.md)",
    )
    export.add_argument("--output_dir", required=True, type=local_path, metavar="DIR", help="a new folder")
    export.add_argument(
        "--push_to_hub",
        metavar="NAME",
        help="upload the dataset to the hub as org/name; log in by hf auth login",
    )
    export.add_argument(
        "--private", action="store_true", help="make the dataset on the hub private to its organisation"
    )
    add_overwrite(export)

    status = add("status", _status, "show the progress of a run, finished or not")
    status.add_argument(
        "path", type=path_or_url, metavar="WORK_DIR", help="directory of a run or an index, or an output"
    )
    status.add_argument("--json", action="store_true", help="print JSON, with times in seconds")
    for command in (report, openvino, validate, merge, split, export, status):
        add_log_flags(command)

    arguments = parser.parse_args(words)
    run: Callable[[argparse.Namespace], int] = arguments.run
    from scaledown.run.logs import start_logging

    start_logging(arguments.log_level, arguments.log_format)
    return run(arguments)


def _report(arguments: argparse.Namespace) -> int:
    from scaledown.data.report.page import report_summary, write_report
    from scaledown.run.outputs import check_output, lies_in, note_made

    page: Path = arguments.output
    card: Path = arguments.card or page.with_suffix(".md")
    if lies_in(str(page), str(card)):
        raise UsageError(f"--output {page} and --card are one file: name two")
    for flag, path in (("--output", page), ("--card", card)):
        reads = (arguments.data, *arguments.gold)
        check_output(flag, path, reads, made="report", overwrite=arguments.overwrite)
    report = write_report(arguments.data, page, card, arguments.gold)
    for path in (page, card):
        note_made(path, "report")
    print(report_summary(report))
    return 0


def _export_openvino(arguments: argparse.Namespace) -> int:
    from scaledown.data.teacher.engines.openvino import export_teacher, is_exported
    from scaledown.models.sources import resolve
    from scaledown.models.weights import quiet_libraries

    quiet_libraries()
    source = resolve(arguments.model)
    there = is_exported(source)
    print(f"{export_teacher(source)}: {'already exists' if there else 'exported'}")
    print(f"next: scaledown prepare --teacher_backend openvino --teacher_model {shlex.quote(source.name)} …")
    return 0


def _validate(arguments: argparse.Namespace) -> int:
    from scaledown.data.input.training_files import validate

    failed = False
    for path in arguments.files:
        result = validate(path)
        for message in result.messages:
            print(one_line(message))
        if result.problems > len(result.messages):
            print(f"… and {result.problems - len(result.messages):,} more")
        failed |= bool(result.problems)
        verdict = f"{result.bad_records:,} with problems" if result.problems else "all sound"
        if result.duplicates:
            repeated = _count_of(result.duplicates, "repeated query", "repeated queries")
            verdict += f", {repeated} (merge leaves them out)"
        print(f"{path}: {_count_of(result.records + result.bad_records, 'record', 'records')}, {verdict}")
    return 1 if failed else 0


def _count_of(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _merge(arguments: argparse.Namespace) -> int:
    from scaledown.data.output.merge import merge, removed_file

    given = {item.name: getattr(arguments, item.name) for item in fields(CleanConfig)}
    cleaning = from_flags({name: value for name, value in given.items() if value is not None}, CleanConfig)
    output: Path = arguments.output_file
    merged = merge(
        arguments.files,
        output,
        allow_different_settings=arguments.allow_different_settings,
        cleaning=cleaning,
        overwrite=arguments.overwrite,
    )
    text = (
        f"{output}: {_count_of(merged.records, 'record', 'records')} from "
        f"{_count_of(len(arguments.files), 'file', 'files')}, "
        f"{_count_of(merged.duplicates, 'repeated query', 'repeated queries')} left out"
    )
    if cleaning.decontaminate:
        text += f", {_count_of(merged.contaminated, 'record', 'records')} of evaluation sets left out"
    if merged.unread:
        text += f", {_count_of(merged.unread, 'row', 'rows')} of evaluation sets without a question skipped"
    if cleaning != CleanConfig():
        text += f"\nrecords left out, each with its match: {removed_file(output)}"
    print(text)
    return 0


def _share(text: str) -> float:
    value = float(text)  # argparse reports a `ValueError`
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def _split(arguments: argparse.Namespace) -> int:
    from scaledown.command import program_name
    from scaledown.student.split import HELD_OUT, TRAIN, split_files

    output, ending = arguments.output_dir, arguments.files[0].suffix
    parts = split_files(
        arguments.files,
        output,
        fraction=arguments.fraction,
        seed=arguments.seed,
        overwrite=arguments.overwrite,
    )
    train, held_out = (shlex.quote(f"{output / name}{ending}") for name in (TRAIN, HELD_OUT))
    print(f"{train}: {_count_of(len(parts.train), 'record', 'records')}")
    print(f"{held_out}: {_count_of(len(parts.held_out), 'record', 'records')}, held out by {parts.by}")
    if parts.shared:
        print(f"{parts.shared:,} of them have a document of an article that training records have, too")
    model, evaluation = (shlex.quote(str(output.parent / name)) for name in ("model", "evaluation"))
    training = f"train --train_data {train} --output_dir {model}"
    print(f"\nnext, with the flags that prepare named: {program_name()} {training}")
    print(f"then: {program_name()} evaluate --model {model} --data {held_out} --output_dir {evaluation}")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from scaledown.run.overview import status_table
    from scaledown.run.status import status_at

    status = status_at(arguments.path)
    print(json.dumps(status.as_json(), indent=2) if arguments.json else status_table(status))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    output: Path = arguments.output_dir
    if arguments.push_to_hub and arguments.format not in OUTPUT_FORMATS:
        raise UsageError(
            f"--push_to_hub cannot upload --format {arguments.format}: use one of {', '.join(OUTPUT_FORMATS)}"
        )
    if arguments.private and not arguments.push_to_hub:
        raise UsageError("--private needs --push_to_hub: give both")
    if arguments.format == "generator":
        return _export_generator(arguments.files, output, overwrite=arguments.overwrite)
    if arguments.format == "trec":
        return _export_trec(arguments.files, output, overwrite=arguments.overwrite)
    if arguments.format == "pisco":
        from scaledown.data.output.pisco import export_pisco

        count = export_pisco(arguments.files, output, overwrite=arguments.overwrite)
        following = (
            "in a checkout of naver/pisco, after its pretraining: python pisco/train.py "
            f"--config-name=finetune data.training_dataset={output.resolve()} "
            "++model_name_or_path=PRETRAINED ++collator_kwargs.query_dependent=True "
            "++collator_kwargs.compressor_max_length=256"
        )
    else:
        from scaledown.data.output.hub_dataset import export_dataset, push

        count = export_dataset(arguments.files, arguments.format, output, overwrite=arguments.overwrite)
        following = (
            f'datasets.load_dataset("{output}"), or --push_to_hub org/name; report: {output}/report.html'
        )
        if arguments.push_to_hub:
            address = push(output, arguments.push_to_hub, private=arguments.private)
            following = f'datasets.load_dataset("{arguments.push_to_hub}"); dataset: {address}'
    print(f"{output}: {_count_of(count, 'record', 'records')}\n\nnext: {following}")
    return 0


def _export_generator(paths: Sequence[Path], output: Path, *, overwrite: bool) -> int:
    if len(paths) > 1:
        raise UsageError("--format generator takes one model: give one folder")
    import_module("scaledown.student.export").export_generator(str(paths[0]), output, overwrite=overwrite)
    print(f"{output}: the generator of {paths[0]}\n\nnext: vllm serve {output} --enable-prompt-embeds")
    return 0


def _export_trec(paths: Sequence[Path], output: Path, *, overwrite: bool) -> int:
    from scaledown.data.output.trec import export_trec

    if len(paths) > 1:
        raise UsageError("--format trec takes one file: give the output of one run")
    written = export_trec(paths[0], output, overwrite=overwrite)
    for name, lines in written.items():
        print(f"{name}: {_count_of(lines, 'line', 'lines')}")
    print(f"\nnext: scaledown evaluate --run {' '.join(written)} --qrels QRELS --output_dir rankings")
    return 0

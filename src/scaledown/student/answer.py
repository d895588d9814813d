"""`scaledown answer`: one query on the terminal, or a file of them, through a trained model."""

import argparse
import itertools
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import orjson

from scaledown.atomic import atomic, check_writable
from scaledown.data.formats import Entry, entries, problems
from scaledown.errors import InputError, UsageError, run_command
from scaledown.flags import Parser, add_log_flags, underscored
from scaledown.logs import start_logging
from scaledown.models import choose_device, dtype_to_run, onto
from scaledown.progress import track
from scaledown.student.train_settings import BUDGETS

log = logging.getLogger("scaledown")

Item = TypeVar("Item")
Done = TypeVar("Done")

_AT_ONCE: Final = 256  # records that are held


def main(argv: Sequence[str], program: str = "scaledown answer") -> int:
    """The command line; gives the exit status."""
    words = underscored(argv)
    parser = Parser(
        prog=program,
        allow_abbrev=False,
        description="Answer a query about documents, or the queries of a file, with a trained model.",
    )
    add = parser.add_argument
    add(
        "--model", required=True, metavar="DIR", help="folder that scaledown train made, or a name on the hub"
    )
    add("--query", metavar="TEXT", help="answer this, as it is written")
    add("--document", action="append", default=[], metavar="TEXT", help="may be given several times")
    add("--data", metavar="FILE", help="answer the records of a training file (.json, .jsonl, .parquet)")
    add(
        "--output_file",
        metavar="FILE",
        help="JSON lines: query and answer or error, and scores if trained for it",
    )
    add("--uncompressed", action="store_true", help="let the generator read the documents' text")
    add(
        "--compression_rate",
        type=int,
        default=0,
        metavar="N",
        help="of a pointer: 4 to 32 document tokens to one memory token [tokens; default: the model's own]",
    )
    add(
        "--budget",
        default="each",
        choices=BUDGETS,
        help="of a pointer: each document has memory tokens by its length, or those of a query share them by "
        "score [default: each]",
    )
    add("--max_new_tokens", type=int, default=128, metavar="N", help="longest answer [tokens; default: 128]")
    add("--batch_size", type=int, default=8, metavar="N", help="queries at once [default: 8]")
    add("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add_log_flags(parser)

    def command() -> int:
        options = parser.parse_args(words)
        start_logging(options.log_level, options.log_format)
        if bool(options.query) == bool(options.data):
            raise UsageError("give --query TEXT, or --data FILE with --output_file FILE")
        if options.uncompressed and (options.compression_rate or options.budget != "each"):
            raise UsageError(
                "--uncompressed leaves --compression_rate and --budget no meaning: leave them out"
            )
        if options.data and not options.output_file:
            raise UsageError("--data needs --output_file FILE for the answers")
        if options.data:
            check_writable(Path(options.output_file))
        model = _load(options)
        if options.query:
            pieces = model.stream(
                options.query,
                options.document,
                max_new_tokens=options.max_new_tokens,
                **_way(options),
            )
            for piece in pieces:
                print(piece, end="", flush=True)
            print()
            return 0
        records, failed = _answer_file(model, options)
        told = f", {failed:,} of them errors, which their records tell" if failed else ""
        print(f"{options.output_file}: {records:,} records{told}")
        return 1 if failed == records else 0

    return run_command(command, debug="--debug" in words)


def _load(options: argparse.Namespace) -> Any:
    from scaledown.student.model import ScaleDownModel

    device = choose_device(options.device)
    dtype = dtype_to_run(options.dtype, device)
    return ScaleDownModel.from_pretrained(options.model, dtype=dtype, **onto(device))


def _way(options: argparse.Namespace) -> dict[str, Any]:
    """How the model reads documents."""
    names = ("compression_rate", "budget")
    return {"compressed": not options.uncompressed} | {name: getattr(options, name) for name in names}


class Answered(NamedTuple):
    """A file of answers."""

    records: int
    failed: int
    """Records that say `error` instead of an answer."""


def _answer_file(model: Any, options: argparse.Namespace) -> Answered:
    """Answer the records of a file, some at a time, into a file that appears when it is whole."""
    path, count, failed = Path(options.data), 0, 0
    source = entries(path)
    with (
        track("answer", "answers", None) as tracker,
        atomic(Path(options.output_file).resolve()) as temporary,
        temporary.open("wb") as file,
    ):
        while block := list(itertools.islice(source, _AT_ONCE)):
            wrong = {place: reason for place, entry in enumerate(block) if (reason := unanswerable(entry))}
            sound = [entry.record for place, entry in enumerate(block) if place not in wrong]
            made = iter(_answers(model, sound, options))
            for place, entry in enumerate(block):
                record = {"error": wrong[place]} if place in wrong else next(made)
                if "error" in record:
                    failed += 1
                    log.warning("%s:%s: %s", path, entry.line, record["error"])
                query = entry.record.get("query") if isinstance(entry.record, dict) else None
                record = {"query": query if isinstance(query, str) else None} | record
                file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
            count += len(block)
            tracker.advance(len(block))
    return Answered(count, failed)


def _answers(model: Any, records: list[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """For each record its answer and scores, or the error."""

    def answers(part: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        queries = [record["query"] for record in part]
        documents = [record["documents"] for record in part]
        written = model.answer(
            queries,
            documents,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            **_way(options),
        )
        made: list[dict[str, Any]] = [{"answer": answer} for answer in written]
        if model.config.is_pointer and not options.uncompressed:
            rate = options.compression_rate or model.config.compression_rate
            made = [own | {"compression_rate": rate, "budget": options.budget} for own in made]
        if not model.config.ranks:
            return made
        scores = model.rerank(queries, documents, batch_size=options.batch_size)
        return [own | {"reranking_scores": row} for own, row in zip(made, scores, strict=True)]

    found = each(answers, records)
    return [{"error": str(own)} if isinstance(own, InputError) else own for own in found]


def each(work: Callable[[Sequence[Item]], list[Done]], items: Sequence[Item]) -> list[Done | InputError]:
    """`work(items)`, where one that cannot be worked on takes no other with it: its error is in its place."""
    if not items:
        return []
    try:
        return [*work(items)]
    except InputError as error:
        if len(items) == 1:
            return [error]
    middle = len(items) // 2
    return each(work, items[:middle]) + each(work, items[middle:])


def unanswerable(entry: Entry) -> str:
    """Why there is nothing to answer; there may be no documents."""
    if entry.problem:
        return entry.problem
    record = entry.record
    if not isinstance(record, dict) or not isinstance(record.get("documents"), list):
        return "expected a query and documents"
    asked = {name: record[name] for name in ("query", "documents") if record.get(name)}
    found = problems({"documents": ["-"], "answer": "-"} | asked)  # nothing is asked of the rest
    return found[0] if found else ""


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

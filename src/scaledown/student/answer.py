"""`scaledown answer`: one query on the terminal, or a file of them, through a trained model."""

import argparse
import itertools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import pyarrow as pa

from scaledown.config.flags import Parser, add_log_flags, add_overwrite, local_path, path_or_url, underscored
from scaledown.config.options import check_ending
from scaledown.config.train import BUDGETS
from scaledown.data.input.training_files import Entry, entries, is_unicode, problems
from scaledown.data.output.writers import write_examples
from scaledown.errors import InputError, UsageError, run_command
from scaledown.models import choose_device, dtype_to_run, onto
from scaledown.run.logs import start_logging
from scaledown.run.outputs import check_output, note_made
from scaledown.run.progress import track

log = logging.getLogger("scaledown")

Item = TypeVar("Item")
Done = TypeVar("Done")

_AT_ONCE: Final = 256  # records that are held
_COLUMNS: Final = pa.schema(
    {
        "query": pa.string(),
        "answer": pa.string(),
        "error": pa.string(),
        "compression_rate": pa.int64(),
        "budget": pa.string(),
        "reranking_scores": pa.list_(pa.float64()),
    }
)


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
        "--model",
        required=True,
        type=path_or_url,
        metavar="DIR",
        help="folder that scaledown train made, or a name on the hub",
    )
    add("--query", metavar="TEXT", help="answer this, as it is written")
    add("--document", action="append", default=[], metavar="TEXT", help="may be given several times")
    add(
        "--data",
        type=local_path,
        metavar="FILE",
        help="answer the records of a training file (.json, .jsonl, .parquet)",
    )
    add(
        "--output_file",
        type=local_path,
        metavar="FILE",
        help="query and answer or error, and scores if trained for it: .json, .jsonl or .parquet",
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
    add_overwrite(parser)
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
        if options.output_file:
            check_ending("--output_file", options.output_file)
            reads = filter(None, [options.data])
            check_output(
                "--output_file", options.output_file, reads, made="answer", overwrite=options.overwrite
            )
        model = _load(options)
        if not options.output_file:
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
        print(f"{options.output_file}: {records:,} {'record' if records == 1 else 'records'}{told}")
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
    """Answer the records of a file, or one query, into a file that appears when it is whole."""
    failed = 0
    if options.data:
        source = entries(options.data)
    else:
        source = iter([Entry(1, {"query": options.query, "documents": options.document})])

    def answered() -> Iterator[dict[str, Any]]:
        nonlocal failed
        while block := list(itertools.islice(source, _AT_ONCE)):
            wrong = {place: reason for place, entry in enumerate(block) if (reason := unanswerable(entry))}
            sound = [entry.record for place, entry in enumerate(block) if place not in wrong]
            made = iter(_answers(model, sound, options))
            for place, entry in enumerate(block):
                record = {"error": wrong[place]} if place in wrong else next(made)
                if "error" in record:
                    failed += 1
                    log.warning("%s:%s: %s", options.data or "--query", entry.line, record["error"])
                query = entry.record.get("query") if isinstance(entry.record, dict) else None
                yield {"query": query if isinstance(query, str) and is_unicode(query) else None} | record
            tracker.advance(len(block))

    with track("answer", "answers", None) as tracker:
        count = write_examples(options.output_file, answered(), _COLUMNS)
    note_made(options.output_file, "answer")
    return Answered(count, failed)


def _answers(model: Any, records: list[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """For each record its answer and scores, or the error."""

    def answers(part: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        queries = [record["query"] for record in part]
        documents = [record["documents"] for record in part]
        given, scores = documents, None
        if model.config.ranks and not options.uncompressed:
            chosen = {"compression_rate": options.compression_rate, "budget": options.budget}
            read = model.compress_and_rerank(queries, documents, batch_size=options.batch_size, **chosen)
            given, scores = [embeddings for embeddings, _ in read], [relevance for _, relevance in read]
        elif model.config.ranks:
            scores = model.rerank(queries, documents, batch_size=options.batch_size)
        written = model.answer(
            queries,
            given,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            **_way(options),
        )
        made: list[dict[str, Any]] = [{"answer": answer} for answer in written]
        if model.config.kind.rates and not options.uncompressed:
            rate = options.compression_rate or model.config.compression_rate
            made = [own | {"compression_rate": rate, "budget": options.budget} for own in made]
        if scores is None:
            return made
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

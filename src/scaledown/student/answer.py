"""`scaledown answer`: one query on the terminal, or a file of them, through a trained model."""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import orjson

from scaledown.data.formats import entries
from scaledown.errors import InputError, UsageError, run_command
from scaledown.flags import Parser, underscored
from scaledown.models import choose_device, choose_dtype
from scaledown.progress import start_logging, track
from scaledown.store import atomic, check_writable

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
    add("--output_file", metavar="FILE", help="JSON lines: query, answer and, if trained for it, scores")
    add("--uncompressed", action="store_true", help="let the generator read the documents' text")
    add("--max_new_tokens", type=int, default=128, metavar="N", help="longest answer [tokens; default: 128]")
    add("--batch_size", type=int, default=8, metavar="N", help="queries at once [default: 8]")
    add("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add("--log_level", default="info", choices=("debug", "info", "warning", "error"))
    add("--debug", action="store_true", help="show tracebacks")

    def command() -> int:
        options = parser.parse_args(words)
        start_logging(options.log_level)
        if bool(options.query) == bool(options.data):
            raise UsageError("give --query TEXT, or --data FILE with --output_file FILE")
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
                compressed=not options.uncompressed,
            )
            for piece in pieces:
                print(piece, end="", flush=True)
            print()
            return 0
        count = _answer_file(model, options)
        print(f"{options.output_file}: {count:,} answers")
        return 0

    return run_command(command, debug="--debug" in words)


def _load(options: argparse.Namespace) -> Any:
    from scaledown.student.model import ScaleDownModel

    device = choose_device(options.device)
    model = ScaleDownModel.from_pretrained(options.model, dtype=choose_dtype(options.dtype, device))
    return model.to(device).eval()


def _answer_file(model: Any, options: argparse.Namespace) -> int:
    """Answer the records of a file, some at a time, into a file that appears when it is whole."""
    path, count = Path(options.data), 0
    source = _records(path)
    with (
        track("answer", "answers", None) as tracker,
        atomic(Path(options.output_file).resolve()) as temporary,
        temporary.open("wb") as file,
    ):
        while block := list(itertools.islice(source, _AT_ONCE)):
            queries = [record["query"] for record in block]
            documents = [record["documents"] for record in block]
            answers = model.answer(
                queries,
                documents,
                max_new_tokens=options.max_new_tokens,
                batch_size=options.batch_size,
                compressed=not options.uncompressed,
            )
            scores: list[list[float] | None] = [None] * len(block)
            if model.config.enable_reranking:
                scores = model.rerank(queries, documents, batch_size=options.batch_size)
            for query, answer, own in zip(queries, answers, scores, strict=True):
                record: dict[str, Any] = {"query": query, "answer": answer}
                if own is not None:
                    record["reranking_scores"] = own
                file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
            count += len(block)
            tracker.advance(len(block))
    return count


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Queries with documents; an answer may be missing. Raises `InputError` naming a line without them."""
    for entry in entries(path):
        record = entry.record
        if (
            not isinstance(record, dict)
            or not isinstance(record.get("query"), str)
            or not isinstance(record.get("documents"), list)
        ):
            raise InputError(f"{path}, line {entry.line}: expected a query and documents: mend or remove it")
        yield record


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

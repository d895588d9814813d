"""Settings of `scaledown answer`. The text of each field is its `--help`."""

from dataclasses import dataclass
from typing import Final

from scaledown.config.options import Options, Range, check_ending, option
from scaledown.config.shared import AUTO_DTYPE, DTYPES, ENGINES, ENGINES_HELP, MACHINE, MODEL, OUTPUT
from scaledown.config.train import BUDGETS
from scaledown.errors import UsageError

QUESTIONS: Final = "questions"
GROUPS: Final = (QUESTIONS, MODEL, OUTPUT, MACHINE)


@dataclass(frozen=True, kw_only=True)
class AnswerConfig(Options):
    """Settings of `scaledown answer`."""

    query: str = option("", QUESTIONS, "answer this query", role="result", metavar="TEXT")
    document: tuple[str, ...] = option(
        (), QUESTIONS, "a document about it; may be given several times", role="result", metavar="TEXT"
    )
    data: str = option(
        "",
        QUESTIONS,
        "answer the records of a training file (.json, .jsonl, .parquet)",
        role="input",
        local=True,
        metavar="FILE",
    )
    model: str = option(
        "", MODEL, "folder of a trained model, or a name on the hub", role="model", metavar="DIR"
    )
    uncompressed: bool = option(False, MODEL, "let the generator read the documents' text", role="result")
    compression_rate: int = option(
        0,
        MODEL,
        "for a pointer: 4 to 32 document tokens for one memory token; 0: the model's own",
        "tokens",
        role="result",
        within=Range(0),
    )
    budget: str = option(
        "each",
        MODEL,
        "for a pointer: each document has memory tokens by its length, or the documents of a query share "
        "theirs by score",
        role="result",
        choices=BUDGETS,
    )
    max_new_tokens: int = option(128, MODEL, "longest answer", "tokens", role="result", within=Range(1))
    output_file: str = option(
        "",
        OUTPUT,
        "query and answer or error, and scores if the model was trained for them: .json, .jsonl or .parquet",
        role="place",
        local=True,
        metavar="FILE",
    )
    engine: str = option("auto", MACHINE, ENGINES_HELP, role="operation", choices=ENGINES)
    generator_8bit: bool = option(
        False,
        MACHINE,
        "round the generator's weights to 8 bits: faster, and some answers differ (engine openvino)",
        role="result",
    )
    batch_size: int = option(
        0,
        MACHINE,
        "queries answered at once; 0: 8, with vllm 256",
        "queries",
        role="result",
        within=Range(0),
        metavar="N",
    )
    device: str = option("auto", MACHINE, "auto, cpu, cuda, cuda:N or mps", role="result", metavar="DEVICE")
    dtype: str = option("auto", MACHINE, AUTO_DTYPE, role="result", choices=DTYPES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise UsageError("give --model DIR, the folder of a trained model")
        if bool(self.query) == bool(self.data):
            raise UsageError("give --query TEXT, or --data FILE with --output_file FILE")
        if self.uncompressed and (self.compression_rate or self.budget != "each"):
            raise UsageError(
                "--compression_rate and --budget have no effect with --uncompressed: leave them out"
            )
        if self.data and self.document:
            raise UsageError("--document belongs to --query; --data has documents of its own: leave it out")
        if self.data and not self.output_file:
            raise UsageError("--data needs --output_file FILE for the answers")
        if self.output_file:
            check_ending("--output_file", self.output_file)

"""Settings of `scaledown compare`. The text of each field is its `--help`."""

from dataclasses import dataclass
from typing import Final

from scaledown.config.evaluate import COMPRESSED, SYSTEMS, UNCOMPRESSED, EvaluateConfig
from scaledown.config.options import Options, Range, check_output_dir, option
from scaledown.config.shared import AUTO_DTYPE, DTYPES, MACHINE, OUTPUT
from scaledown.config.train import BUDGETS
from scaledown.errors import UsageError

QUALITY: Final = "quality"
COST: Final = "cost"
GROUPS: Final = (QUALITY, COST, OUTPUT, MACHINE)


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Options):
    """Settings of `scaledown compare`."""

    data: str = option(
        "",
        QUALITY,
        "held-out questions with documents, as for scaledown evaluate",
        role="input",
        metavar="FILE",
    )
    gold: tuple[str, ...] = option(
        (), QUALITY, "right answers, as for scaledown evaluate", role="input", metavar="FILE"
    )
    baselines: tuple[str, ...] = option(
        (UNCOMPRESSED, "closed_book"),
        QUALITY,
        "baselines, answered by the first run's model",
        role="result",
        choices=tuple(system for system in SYSTEMS if system != COMPRESSED),
    )
    compression_rates: tuple[str, ...] = option(
        (),
        QUALITY,
        "compare a pointer at each of these rates: 4 to 32 document tokens for one memory token; without it, "
        "at its own",
        "tokens",
        role="result",
        metavar="N",
    )
    budget: str = option(
        "each", QUALITY, "for pointers, as for scaledown evaluate", role="result", choices=BUDGETS
    )
    keyword_model: str = option(
        EvaluateConfig.keyword_model,
        QUALITY,
        "SPLADE model for keywords, as for scaledown evaluate",
        role="model",
    )
    pruning_reranker: str = option(
        EvaluateConfig.pruning_reranker,
        QUALITY,
        "reranker for pruned, as for scaledown evaluate",
        role="model",
    )
    num_examples: int = option(
        0, QUALITY, "take only the first N questions", "questions", role="result", within=Range(0)
    )
    max_new_tokens: int = option(128, QUALITY, "longest answer", "tokens", role="result", within=Range(1))
    batch_size: int = option(
        8, QUALITY, "questions answered at once", "questions", role="result", within=Range(1)
    )
    cost_batches: tuple[str, ...] = option(
        ("1", "8"), COST, "sizes of the batches that are timed", "queries", role="result", metavar="N"
    )
    cost_documents: int = option(
        10, COST, "documents for each query", "documents", role="result", within=Range(1)
    )
    cost_document_tokens: int = option(
        0,
        COST,
        "length of each document; 0: 128, or fewer if a model compresses fewer",
        "tokens",
        role="result",
        within=Range(0),
    )
    cost_query_tokens: int = option(
        0,
        COST,
        "length of the query; 0: 128, or fewer if a model reads fewer",
        "tokens",
        role="result",
        within=Range(0),
    )
    cost_new_tokens: int = option(32, COST, "length of the answer", "tokens", role="result", within=Range(1))
    cost_repeats: int = option(
        3, COST, "how often each batch is timed", "times", role="result", within=Range(1)
    )
    output_dir: str = option(
        "comparison",
        OUTPUT,
        "folder for the page, the tables, and the work that a later call continues",
        role="place",
        local=True,
        metavar="DIR",
    )
    seed: int = option(0, OUTPUT, "seed of resampling", role="result", within=Range(0))
    device: str = option("auto", MACHINE, "auto, cpu, cuda, cuda:N or mps", role="result", metavar="DEVICE")
    dtype: str = option("auto", MACHINE, AUTO_DTYPE, role="result", choices=DTYPES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise UsageError("no held-out questions: give --data FILE")
        check_output_dir(self.output_dir)
        for name in ("cost_batches", "compression_rates"):
            for number in getattr(self, name):
                if not number.isdecimal() or not int(number):
                    raise UsageError(f"--{name} {number}: must be whole numbers, at least 1")
        if len(set(self.compression_rates)) < len(self.compression_rates):
            raise UsageError("--compression_rates: name each once")

"""Settings of `scaledown evaluate`. Each field is documented once, for the `--help`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from scaledown.config.options import option
from scaledown.config.prepare import OUTPUT, PrepareConfig
from scaledown.config.shared import AUTO_DTYPE, DTYPES, ENDPOINT, ENGINE, MACHINE, EngineConfig, batch_for
from scaledown.config.train import BUDGETS
from scaledown.errors import UsageError
from scaledown.urls import is_url

MODEL: Final = "answers of a model"
RANKINGS: Final = "or rankings"
JUDGE: Final = "judge, run as a teacher is"
GROUPS: Final = (MODEL, RANKINGS, JUDGE, ENGINE, ENDPOINT, OUTPUT, MACHINE)

# Not compared between two runs: where things lie, which are known by their contents, and how fast a judge is.
_APART: Final = {
    *("model", "data", "gold", "run", "qrels", "pruning_reranker", "keyword_model", "judge_model"),
    "output_dir",
    *("flush_seconds", "teacher_endpoint", "max_total_tokens", "max_requests_per_minute", "request_timeout"),
    *("input_price", "output_price", "teacher_memory"),
}

DEFAULT_SYSTEMS: Final = ("compressed", "uncompressed", "closed_book", "pruned")
"""What `scaledown evaluate` compares where nothing else is asked for."""
SYSTEMS: Final = (*DEFAULT_SYSTEMS, "first", "keywords", "random", "echo", "echo_span")
"""What it can compare: each answers in a stage of its own."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(EngineConfig):
    """Settings of `scaledown evaluate`."""

    model: str = option("", MODEL, "folder that scaledown train made, or a name on the hub", metavar="DIR")
    data: str = option(
        "",
        MODEL,
        "held-out questions with documents, as scaledown prepare writes them: .json, .jsonl or .parquet; "
        "also a URL",
        metavar="FILE",
    )
    gold: tuple[str, ...] = option(
        (),
        MODEL,
        "right answers, in any shape that data sets have, found by the question's words; without it, the "
        "teacher's answers in --data are the right ones",
        metavar="FILE",
    )
    systems: tuple[str, ...] = option(
        DEFAULT_SYSTEMS,
        MODEL,
        "what answers: the model, its generator with the documents' text, without documents, and with the "
        "sentences that a reranker keeps of them in as many tokens as compression takes; with the first of "
        "each document's tokens, those of the most weight for the query, or random ones, as many; or no "
        "generator: what a pointer picks, and its best span",
        choices=SYSTEMS,
    )
    pruning_reranker: str = option(
        PrepareConfig.reranker_model,
        MODEL,
        "of pruned: a cross-encoder, or ql:NAME for query likelihood under a causal LM",
        metavar="MODEL",
    )
    keyword_model: str = option(
        PrepareConfig.retriever_model,
        MODEL,
        "of keywords: a SPLADE model",
        metavar="MODEL",
    )
    compression_rate: int = option(
        0,
        MODEL,
        "of a pointer: 4 to 32 document tokens to one memory token; the number of tokens that pruned and the "
        "baselines read follows; 0 is the model's own",
        "tokens",
        metavar="N",
    )
    budget: str = option(
        "each",
        MODEL,
        "of a pointer: each document has memory tokens by its length, or those of a question share them by "
        "score",
        choices=BUDGETS,
    )
    num_examples: int = option(0, MODEL, "take only the first so many", "questions", metavar="N")
    max_new_tokens: int = option(128, MODEL, "longest answer", "tokens", metavar="N")
    batch_size: int = option(8, MODEL, "questions answered at once", "questions", metavar="N")
    run: tuple[str, ...] = option(
        (), RANKINGS, "TREC run (qid Q0 docid rank score tag), plain or compressed", metavar="FILE"
    )
    qrels: str = option("", RANKINGS, "TREC relevance judgements (qid 0 docid relevance)", metavar="FILE")
    measures: tuple[str, ...] = option(
        ("nDCG@10", "R@20", "RR@10"), RANKINGS, "by their names in ir_measures", metavar="NAME"
    )
    judge_model: str = option(
        "",
        JUDGE,
        "let this causal LM grade each answer 1, 0.5 or 0, as the paper's judge does",
        metavar="MODEL",
    )
    pairwise: bool = option(
        False,
        JUDGE,
        "let the judge also choose between each system's answer and the baseline's, in both orders",
    )
    output_dir: str = option(
        "evaluation", OUTPUT, "results.json, answers.jsonl, and what goes on after a crash", metavar="DIR"
    )
    seed: int = option(0, OUTPUT, "seed of resampling, and of random", metavar="N")
    device: str = option("auto", MACHINE, "auto, cpu, cuda, cuda:N or mps", metavar="DEVICE")
    dtype: str = option("auto", MACHINE, AUTO_DTYPE, choices=DTYPES)

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_engine()
        self._check_files("gold", "run", "systems", "measures")
        self._check_at_least(1, "max_new_tokens", "batch_size")
        self._check_at_least(0, "num_examples", "seed", "compression_rate")
        answers, rankings = (self.model, self.data), (self.run, self.qrels)
        if (all(answers) and not any(rankings)) == (all(rankings) and not any(answers)):
            raise UsageError("give --model DIR and --data FILE, or --run FILE and --qrels FILE")
        if self.gold and self.run:
            raise UsageError("--gold is for answers: rankings are compared with --qrels")
        if not self.systems or len(set(self.systems)) < len(self.systems):
            raise UsageError("--systems: name each once, and at least one")
        if self.pairwise and not self.judge_model:
            raise UsageError("--pairwise needs a judge: give --judge_model MODEL")
        if self.pairwise and len(self.systems) == 1:
            raise UsageError("--pairwise needs two --systems")
        if not self.output_dir:
            raise UsageError("no output: give --output_dir DIR")
        for name in ("output_dir", "qrels"):
            if is_url(getattr(self, name)):
                raise UsageError(f"--{name} is a URL: give a local path")
        if Path(self.output_dir).is_file():
            raise UsageError(f"--output_dir {self.output_dir} is a file: name a folder")

    @property
    def baseline(self) -> str:
        """The system that all others are compared with."""
        return "uncompressed" if "uncompressed" in self.systems else self.systems[0]

    def compared(self) -> dict[str, Any]:
        """The settings that two runs must share to be one; files and models are known by their contents."""
        kept = {name: value for name, value in asdict(self).items() if name not in _APART}
        kept["teacher_batch_size"] = batch_for("teacher_batch_size", self.teacher_batch_size, "")
        return kept | {"served": bool(self.teacher_endpoint), "device": self.device.partition(":")[0]}

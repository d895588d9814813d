"""Settings of `scaledown evaluate`. The text of each field is its `--help`."""

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from scaledown.config.options import Range, check_output_dir, option
from scaledown.config.prepare import PrepareConfig
from scaledown.config.shared import (
    AUTO_DTYPE,
    DTYPES,
    ENDPOINT,
    MACHINE,
    OUTPUT,
    TEACHER_ENGINE,
    EngineConfig,
)
from scaledown.config.train import BUDGETS
from scaledown.errors import UsageError
from scaledown.extensions import STUDENT_ENGINES

MODEL_ANSWERS: Final = "answers of a model"
RANKINGS: Final = "or rankings"
JUDGE: Final = "judge, run as a teacher is"
GROUPS: Final = (MODEL_ANSWERS, RANKINGS, JUDGE, TEACHER_ENGINE, ENDPOINT, OUTPUT, MACHINE)

COMPRESSED: Final = "compressed"
UNCOMPRESSED: Final = "uncompressed"


class System(NamedTuple):
    """What answers the questions of an evaluation: a way to read the documents."""

    has_rate: bool = False
    """Whether the number of tokens that are read depends on the compression rate."""
    has_budget: bool = False
    """Whether documents can share a budget of tokens."""
    reads_tokens: bool = False
    """Whether the generator reads some tokens of the documents, chosen without the model's compressor."""
    echoes: bool = False
    """Whether the answer is text that a pointer picks, without a generator."""
    is_default: bool = False
    """Whether `scaledown evaluate` measures it by default."""


SYSTEMS: Final = {
    COMPRESSED: System(has_rate=True, has_budget=True, is_default=True),
    UNCOMPRESSED: System(is_default=True),
    "closed_book": System(is_default=True),
    "pruned": System(has_rate=True, is_default=True),
    "first": System(has_rate=True, reads_tokens=True),
    "keywords": System(has_rate=True, reads_tokens=True),
    "random": System(has_rate=True, reads_tokens=True),
    "echo": System(has_rate=True, has_budget=True, echoes=True),
    "echo_span": System(echoes=True),
}
"""All systems by name; the answers of each are a stage."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(EngineConfig):
    """Settings of `scaledown evaluate`."""

    model: str = option(
        "", MODEL_ANSWERS, "folder of a trained model, or a name on the hub", role="model", metavar="DIR"
    )
    data: str = option(
        "",
        MODEL_ANSWERS,
        "held-out questions with documents, as scaledown prepare writes them: .json, .jsonl or .parquet; "
        "also a URL",
        role="input",
        metavar="FILE",
    )
    gold: tuple[str, ...] = option(
        (),
        MODEL_ANSWERS,
        "right answers, in any shape that data sets have, found by the question's words; without it, the "
        "teacher's answers in --data are taken as right",
        role="input",
        metavar="FILE",
    )
    systems: tuple[str, ...] = option(
        tuple(name for name, system in SYSTEMS.items() if system.is_default),
        MODEL_ANSWERS,
        "systems that answer: the model (compressed); its generator with the documents' text (uncompressed), "
        "without documents (closed_book), with sentences that a reranker keeps, in as many tokens as there "
        "are memory tokens (pruned), or with as many of each document's tokens: the first, those with the "
        "highest weight for the query (keywords), or random ones; without a generator, the tokens that a "
        "pointer picks (echo), or its best span (echo_span)",
        role="result",
        choices=tuple(SYSTEMS),
    )
    pruning_reranker: str = option(
        PrepareConfig.reranker_model,
        MODEL_ANSWERS,
        "reranker for pruned: a cross-encoder, or ql:NAME for query likelihood under a causal LM",
        role="model",
    )
    keyword_model: str = option(
        PrepareConfig.retriever_model, MODEL_ANSWERS, "SPLADE model for keywords", role="model"
    )
    compression_rate: int = option(
        0,
        MODEL_ANSWERS,
        "for a pointer: 4 to 32 document tokens for one memory token; pruned and the other baselines read as "
        "many tokens; 0: the model's own",
        "tokens",
        role="result",
        within=Range(0),
    )
    budget: str = option(
        "each",
        MODEL_ANSWERS,
        "for a pointer: each document has memory tokens by its length, or the documents of a question share "
        "theirs by score",
        role="result",
        choices=BUDGETS,
    )
    num_examples: int = option(
        0, MODEL_ANSWERS, "take only the first N questions", "questions", role="result", within=Range(0)
    )
    max_new_tokens: int = option(
        128, MODEL_ANSWERS, "longest answer", "tokens", role="result", within=Range(1)
    )
    batch_size: int = option(
        8, MODEL_ANSWERS, "questions answered at once", "questions", role="result", within=Range(1)
    )
    run: tuple[str, ...] = option(
        (),
        RANKINGS,
        "TREC run (qid Q0 docid rank score tag), plain or compressed",
        role="input",
        metavar="FILE",
    )
    qrels: str = option(
        "",
        RANKINGS,
        "TREC relevance judgements (qid 0 docid relevance)",
        role="input",
        local=True,
        metavar="FILE",
    )
    measures: tuple[str, ...] = option(
        ("nDCG@10", "R@20", "RR@10"),
        RANKINGS,
        "measures of rankings, by their names in ir_measures",
        role="result",
        metavar="NAME",
    )
    judge_model: str = option(
        "", JUDGE, "let this causal LM grade each answer 1, 0.5 or 0, as the paper's judge does", role="model"
    )
    pairwise: bool = option(
        False,
        JUDGE,
        "let the judge also choose between each system's answer and the baseline's, in both orders",
        role="result",
    )
    output_dir: str = option(
        "evaluation",
        OUTPUT,
        "folder for results.json, answers.jsonl, and the work that a later call continues",
        role="place",
        local=True,
        metavar="DIR",
    )
    seed: int = option(0, OUTPUT, "seed of resampling, and of random", role="result", within=Range(0))
    device: str = option("auto", MACHINE, "auto, cpu, cuda, cuda:N or mps", role="result", metavar="DEVICE")
    dtype: str = option("auto", MACHINE, AUTO_DTYPE, role="result", choices=DTYPES)
    engine: str = option(
        "transformers",
        MACHINE,
        "engine that writes the answers of all systems",
        role="result",
        choices=tuple(STUDENT_ENGINES),
        only_with="engine",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        answers, rankings = (self.model, self.data), (self.run, self.qrels)
        if (all(answers) and not any(rankings)) == (all(rankings) and not any(answers)):
            raise UsageError("give --model DIR and --data FILE, or --run FILE and --qrels FILE")
        if self.gold and self.run:
            raise UsageError("--gold is for answers: rankings are compared with --qrels")
        if self.judge_model and self.run:
            raise UsageError("--judge_model is for answers: rankings are compared with --qrels")
        if not self.systems or len(set(self.systems)) < len(self.systems):
            raise UsageError("--systems: name each once, and at least one")
        if self.pairwise and not self.judge_model:
            raise UsageError("--pairwise needs a judge: give --judge_model MODEL")
        if self.pairwise and len(self.systems) == 1:
            raise UsageError("--pairwise needs two --systems")
        check_output_dir(self.output_dir)

    @property
    def baseline(self) -> str:
        """The system that all others are compared with."""
        return UNCOMPRESSED if UNCOMPRESSED in self.systems else self.systems[0]

    def compared(self) -> dict[str, Any]:
        """Return the settings that must be equal for two evaluations in one directory."""
        machine = {"served": bool(self.teacher_endpoint), "device": self.device.partition(":")[0]}
        return super().compared() | machine

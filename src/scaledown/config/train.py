"""Settings of `scaledown train` and `scaledown pretrain`. Each field is documented once, for the `--help`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from scaledown.config.options import Checked, option
from scaledown.config.prepare import OUTPUT
from scaledown.config.shared import DTYPES, MACHINE
from scaledown.errors import UsageError
from scaledown.urls import is_url

GENERATOR_TRAINING: Final = ("lora", "full", "frozen")
BUDGETS: Final = ("each", "shared")
"""A document has memory tokens by its own length, or those of a question share them by score (pointer)."""
REPORTERS: Final = ("auto", "none", "tensorboard", "wandb", "trackio")

DATA: Final = "data"
MODEL: Final = "model"
TRAINING: Final = "training"
GROUPS: Final = (DATA, MODEL, TRAINING, OUTPUT, MACHINE)

# Settings that a run may change when it goes on. Files and models are known by their contents.
FREE: Final = (
    *("resume", "report_to", "device", "output_dir", "gradient_checkpointing"),
    *("train_data", "eval_data", "gold", "corpus_path", "generator_model", "compressor", "pretrained_model"),
)


@dataclass(frozen=True, kw_only=True)
class StudentConfig(Checked):
    """What training and pretraining share; defaults are the paper's (arXiv 2504.07109, table 7)."""

    eval_fraction: float = option(
        0.02,
        DATA,
        "hold out this share of the data, split by article so that nothing leaks",
        "0..1",
        metavar="X",
    )
    generator_model: str = option(
        "mistralai/Mistral-7B-Instruct-v0.2",
        MODEL,
        "causal LM that answers: a name, a folder or a .gguf file",
        metavar="MODEL",
    )
    compressor: str = option(
        "n_layers",
        MODEL,
        "n_layers or pointer (the generator's first layers), modernbert, or any encoder or decoder by name",
        metavar="MODEL",
    )
    num_layers: int = option(8, MODEL, "of an n_layers or pointer compressor", "layers", metavar="N")
    compression_rate: int = option(
        16,
        MODEL,
        "document tokens to one memory token, 4 to 128; of a pointer 4 to 32, where none is asked for",
        "tokens",
        metavar="N",
    )
    doc_max_length: int = option(
        0,
        MODEL,
        "longest document by the compressor's tokenizer, the rest is cut; 0: the longest of the data",
        "tokens",
        metavar="N",
    )
    query_max_length: int = option(
        128, MODEL, "longest query that the compressor reads, the rest is cut", "tokens", metavar="N"
    )
    generator_training: str = option(
        "lora",
        MODEL,
        "what is trained of the generator: LoRA on its linear layers, all of it, or nothing",
        choices=GENERATOR_TRAINING,
    )
    lora_dropout: float = option(
        0.1,
        MODEL,
        "share of LoRA's inputs that a step leaves out",
        metavar="X",
    )
    batch_size: int = option(128, TRAINING, "examples to one step, over all devices", "examples", metavar="N")
    micro_batch_size: int = option(
        0,
        TRAINING,
        "examples at once on a device, gradients are accumulated; 0: as many as fit (4 on a CPU)",
        "examples",
        metavar="N",
    )
    num_epochs: float = option(1.0, TRAINING, "passes over the data", "epochs", metavar="X")
    max_steps: int = option(0, TRAINING, "so many steps instead of --num_epochs", "steps", metavar="N")
    learning_rate_generator: float = option(1e-4, TRAINING, "of the generator", metavar="X")
    learning_rate_compressor: float = option(
        0.0,
        TRAINING,
        "of all else; 0: 5e-5 for n_layers, 3e-4 for a pointer's layers, 1e-4 for a separate compressor",
        metavar="X",
    )
    eval_steps: int = option(
        0, TRAINING, "evaluate every so many; 0: ten times in a run", "steps", metavar="N"
    )
    early_stopping_patience: int = option(
        0,
        TRAINING,
        "stop when the held-out loss has not fallen for so many evaluations, and keep the best; 0: never",
        "evaluations",
        metavar="N",
    )
    gradient_checkpointing: bool | None = option(
        None,
        TRAINING,
        "compute activations again instead of keeping them: less memory, a third slower; auto is on from a "
        "billion trained weights on",
    )
    seed: int = option(0, TRAINING, "seed of every random choice", metavar="N")
    output_dir: str = option("model", OUTPUT, "the model, and checkpoints on the way", metavar="DIR")
    save_steps: int = option(
        0, OUTPUT, "checkpoint every so many; 0: with every evaluation", "steps", metavar="N"
    )
    resume: bool = option(False, OUTPUT, "go on from the newest checkpoint in --output_dir, if there is one")
    report_to: str = option(
        "auto", OUTPUT, "auto is tensorboard where it is installed, else none", choices=REPORTERS
    )
    device: str = option("auto", MACHINE, "auto, cpu, cuda or mps", metavar="DEVICE")
    dtype: str = option(
        "auto",
        MACHINE,
        "of matrix products and frozen weights, trained weights are float32; auto is bfloat16 on CUDA, "
        "float32 elsewhere",
        choices=DTYPES,
    )

    def __post_init__(self) -> None:
        self._check_choices()
        if not self.output_dir:
            raise UsageError("no output: give --output_dir DIR")
        if is_url(self.output_dir):
            raise UsageError("--output_dir is a URL: give a local path")
        if Path(self.output_dir).is_file():
            raise UsageError(f"--output_dir {self.output_dir} is a file: name a folder")
        self._check_at_least(1, "batch_size", "num_layers", "query_max_length")
        self._check_at_least(
            0,
            *("doc_max_length", "micro_batch_size", "max_steps", "eval_steps", "save_steps"),
            *("early_stopping_patience", "seed"),
        )
        self._check_positive("num_epochs", "learning_rate_generator")
        self._check_finite("learning_rate_compressor")
        if not 0 <= self.lora_dropout < 1:
            raise UsageError(f"--lora_dropout {self.lora_dropout}: must be at least 0 and below 1")
        if self.micro_batch_size > self.batch_size:
            raise UsageError(
                f"--micro_batch_size {self.micro_batch_size} is above --batch_size {self.batch_size}: "
                "lower it"
            )
        if not 0 <= self.eval_fraction < 1:
            raise UsageError(f"--eval_fraction {self.eval_fraction}: must be at least 0 and below 1")
        if self.early_stopping_patience and not self.holds_out:
            raise UsageError("--early_stopping_patience needs held-out data: --eval_data or --eval_fraction")

    @property
    def holds_out(self) -> bool:
        """Whether anything is held out."""
        return self.eval_fraction > 0

    def compressor_rate(self, default: float) -> float:
        """Learning rate of the compressor; `default` is that of its kind."""
        return self.learning_rate_compressor or default


@dataclass(frozen=True, kw_only=True)
class TrainConfig(StudentConfig):
    """Settings of `scaledown train`."""

    train_data: tuple[str, ...] = option(
        (),
        DATA,
        "training data as scaledown prepare writes it: .json, .jsonl or .parquet; also a URL; may be given "
        "several times",
        metavar="FILE",
    )
    eval_data: tuple[str, ...] = option(
        (),
        DATA,
        "held-out data in the same format, in place of --eval_fraction; may be given several times",
        metavar="FILE",
    )
    gold: tuple[str, ...] = option(
        (),
        DATA,
        "right answers, in any shape that data sets have, found by the question's words: learned in place of "
        "the teacher's",
        metavar="FILE",
    )
    text_fraction: float = option(
        0.0,
        TRAINING,
        "share of examples whose documents the generator reads as text, so that it does not forget how",
        "0..1",
        metavar="X",
    )
    closed_book_fraction: float = option(
        0.0, TRAINING, "share of examples without documents", "0..1", metavar="X"
    )
    pretrained_model: str = option(
        "",
        MODEL,
        "start from what scaledown pretrain made; the flags about the model are settled there",
        metavar="DIR",
    )
    enable_reranking: bool = option(False, MODEL, "learn to rerank, too; the data needs reranking_scores")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.train_data:
            raise UsageError("no training data: give --train_data train_data.json")
        self._check_files("train_data", "eval_data", "gold")
        for name in ("text_fraction", "closed_book_fraction"):
            self._check_share(name)
        if self.generator_training == "frozen" and self.text_fraction + self.closed_book_fraction:
            raise UsageError(
                "--text_fraction and --closed_book_fraction teach a frozen generator nothing: leave them out"
            )
        if self.text_fraction + self.closed_book_fraction > 1:
            raise UsageError(
                "--text_fraction and --closed_book_fraction are more than all examples: lower them"
            )

    @property
    def holds_out(self) -> bool:
        """Whether anything is held out."""
        return bool(self.eval_data) or super().holds_out


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(StudentConfig):
    """Settings of `scaledown pretrain`."""

    corpus_path: tuple[str, ...] = option(
        (),
        DATA,
        "any text: KILT JSON lines, JSONL / Parquet / CSV with id, title, text, or a folder of such or of "
        "text files; also a URL; may be given several times; with --max_steps no more is tokenised than "
        "needed",
        metavar="PATH",
    )
    max_corpus_size: int = option(
        0, DATA, "read only this many articles from the start", "articles", metavar="N"
    )
    train_data: tuple[str, ...] = option(
        (),
        DATA,
        "a pointer learns from these records, too: one after each cloze question; as for scaledown train",
        metavar="FILE",
    )
    gold: tuple[str, ...] = option(
        (), DATA, "right answers to the questions of --train_data, as for scaledown train", metavar="FILE"
    )
    doc_max_length: int = option(
        160,
        MODEL,
        "longest passage by the compressor's tokenizer, and longest document ever after: 128 tokens of a "
        "retriever are some 142 of a generator",
        "tokens",
        metavar="N",
    )

    output_dir: str = option("pretrained", OUTPUT, "the model, and checkpoints on the way", metavar="DIR")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.corpus_path:
            raise UsageError("no text: give --corpus_path PATH")
        self._check_files("corpus_path", "train_data", "gold")
        if self.train_data and self.compressor != "pointer":
            raise UsageError(
                "--train_data: only a pointer is pretrained on records: give --compressor pointer"
            )
        if self.gold and not self.train_data:
            raise UsageError("--gold answers the questions of --train_data: give that, too")
        self._check_at_least(16, "doc_max_length")
        self._check_at_least(0, "max_corpus_size")

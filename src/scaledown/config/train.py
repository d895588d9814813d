"""Settings of `scaledown train` and `scaledown pretrain`. The text of each field is its `--help`."""

from dataclasses import dataclass
from typing import Final

from scaledown.config.options import SHARE, Options, Range, check_output_dir, option
from scaledown.config.shared import DTYPES, MACHINE, MODEL, OUTPUT
from scaledown.errors import UsageError
from scaledown.extensions import COMPRESSORS

GENERATOR_TRAINING: Final = ("lora", "full", "frozen")
BUDGETS: Final = ("each", "shared")
"""With `each`, a document has memory tokens by its length; with `shared` (pointer only), the documents of a
question share them by score."""
OPTIMIZERS: Final = ("adamw", "adamw8bit")
REPORTERS: Final = ("auto", "none", "tensorboard", "wandb", "trackio")

DATA: Final = "data"
TRAINING: Final = "training"
GROUPS: Final = (DATA, MODEL, TRAINING, OUTPUT, MACHINE)


@dataclass(frozen=True, kw_only=True)
class StudentConfig(Options):
    """Settings of training and pretraining; the defaults are the paper's (arXiv 2504.07109, table 7)."""

    eval_fraction: float = option(
        0.02,
        DATA,
        "hold out this share of the data, split by article so that no article is on both sides",
        "0..1",
        role="result",
        within=Range(0, below=1),
    )
    generator_model: str = option(
        "mistralai/Mistral-7B-Instruct-v0.2",
        MODEL,
        "causal LM that answers: a name, a folder or a .gguf file",
        role="model",
        settled_by="pretrained_model",
    )
    compressor: str = option(
        "n_layers",
        MODEL,
        f"{', '.join(COMPRESSORS)}, or any encoder or decoder by name; n_layers and pointer are made of the "
        "generator's first layers",
        role="model",
        settled_by="pretrained_model",
    )
    num_layers: int = option(
        8,
        MODEL,
        "layers of an n_layers or pointer compressor",
        "layers",
        role="result",
        settled_by="pretrained_model",
        within=Range(1),
    )
    compression_rate: int = option(
        16,
        MODEL,
        "document tokens for one memory token, 4 to 128; for a pointer 4 to 32, used if a request names no "
        "other rate",
        "tokens",
        role="result",
        settled_by="pretrained_model",
    )
    doc_max_length: int = option(
        0,
        MODEL,
        "longest document by the compressor's tokenizer, the rest is cut; 0: the longest of the data",
        "tokens",
        role="result",
        settled_by="pretrained_model",
        within=Range(0),
    )
    query_max_length: int = option(
        128,
        MODEL,
        "longest query that the compressor reads, the rest is cut",
        "tokens",
        role="result",
        settled_by="pretrained_model",
        within=Range(1),
    )
    generator_training: str = option(
        "lora",
        MODEL,
        "trained weights of the generator: LoRA on its linear layers, all weights, or none",
        role="result",
        settled_by="pretrained_model",
        choices=GENERATOR_TRAINING,
    )
    generator_4bit: bool = option(
        False,
        MODEL,
        "keep the generator's frozen weights in 4 bits during training (extra quantization); they are saved "
        "as ordinary weights with the same values",
        role="result",
        only_with="generator_4bit",
    )
    lora_dropout: float = option(
        0.1,
        MODEL,
        "dropout of LoRA's inputs",
        role="result",
        settled_by="pretrained_model",
        within=Range(0, below=1),
    )
    batch_size: int = option(
        128, TRAINING, "examples for one step, over all devices", "examples", role="result", within=Range(1)
    )
    micro_batch_size: int = option(
        0,
        TRAINING,
        "examples at once on a device, gradients are accumulated; 0: as many as fit (4 on a CPU)",
        "examples",
        role="operation",
        within=Range(0),
    )
    num_epochs: float = option(
        1.0, TRAINING, "passes over the data", "epochs", role="result", within=Range(above=0)
    )
    max_steps: int = option(
        0, TRAINING, "train this many steps, instead of --num_epochs", "steps", role="result", within=Range(0)
    )
    optimizer: str = option(
        "adamw",
        TRAINING,
        "adamw8bit keeps its moments in 8 bits, and in host memory if the GPU is full (extra quantization)",
        role="result",
        only_with="optimizer",
        choices=OPTIMIZERS,
    )
    learning_rate_generator: float = option(
        1e-4, TRAINING, "learning rate of the generator", role="result", within=Range(above=0)
    )
    learning_rate_compressor: float = option(
        0.0,
        TRAINING,
        "learning rate of all other weights; 0: 5e-5 for n_layers, 3e-4 for a pointer's layers, 1e-4 for a "
        "separate compressor",
        role="result",
        within=Range(0),
    )
    eval_steps: int = option(
        0,
        TRAINING,
        "evaluate after every N steps; 0: ten times in a run",
        "steps",
        role="result",
        within=Range(0),
    )
    early_stopping_patience: int = option(
        0,
        TRAINING,
        "stop if the held-out loss has not fallen for this many evaluations, and keep the best; 0: never",
        "evaluations",
        role="result",
        within=Range(0),
    )
    gradient_checkpointing: bool | None = option(
        None,
        TRAINING,
        "recompute activations instead of keeping them: less memory, a third slower; by default on from a "
        "billion trained weights",
        role="operation",
    )
    seed: int = option(0, TRAINING, "seed of every random choice", role="result", within=Range(0))
    output_dir: str = option(
        "model",
        OUTPUT,
        "folder for the model and its checkpoints",
        role="place",
        local=True,
        metavar="DIR",
    )
    save_steps: int = option(
        0,
        OUTPUT,
        "write a checkpoint after every N steps; 0: with every evaluation",
        "steps",
        role="operation",
        within=Range(0),
    )
    resume: bool = option(
        False,
        OUTPUT,
        "continue from the newest checkpoint in --output_dir, if there is one",
        role="operation",
    )
    report_to: str = option(
        "auto",
        OUTPUT,
        "where curves are shown; auto is tensorboard if it is installed, else none",
        role="report",
        choices=REPORTERS,
    )
    device: str = option("auto", MACHINE, "auto, cpu, cuda or mps", role="operation", metavar="DEVICE")
    dtype: str = option(
        "auto",
        MACHINE,
        "type of matrix products and frozen weights, trained weights are float32; auto is bfloat16 on CUDA "
        "and on CPUs with AVX512-BF16 or AMX, float32 on GPUs before compute capability 8 and elsewhere",
        role="result",
        choices=DTYPES,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_output_dir(self.output_dir)
        if self.generator_4bit and self.generator_training == "full":
            raise UsageError(
                "--generator_4bit: weights in 4 bits are not trained; use --generator_training lora"
            )
        if self.micro_batch_size > self.batch_size:
            raise UsageError(
                f"--micro_batch_size {self.micro_batch_size} is above --batch_size {self.batch_size}: "
                "lower it"
            )
        if self.early_stopping_patience and not self.holds_out:
            raise UsageError("--early_stopping_patience needs held-out data: --eval_data or --eval_fraction")

    @property
    def holds_out(self) -> bool:
        """Whether examples are held out."""
        return self.eval_fraction > 0

    @property
    def needs_bitsandbytes(self) -> str:
        """The flag that needs bitsandbytes; empty if none does."""
        if self.generator_4bit:
            return "--generator_4bit"
        return "--optimizer adamw8bit" if self.optimizer == "adamw8bit" else ""

    def compressor_rate(self, default: float) -> float:
        """Return the learning rate of the compressor.

        Args:
            default: The rate of the kind of compressor, used without `--learning_rate_compressor`.
        """
        return self.learning_rate_compressor or default


@dataclass(frozen=True, kw_only=True)
class TrainConfig(StudentConfig):
    """Settings of `scaledown train`."""

    train_data: tuple[str, ...] = option(
        (),
        DATA,
        "training data as scaledown prepare writes it: .json, .jsonl or .parquet; also a URL; may be given "
        "several times",
        role="input",
        metavar="FILE",
    )
    eval_data: tuple[str, ...] = option(
        (),
        DATA,
        "held-out data in the same format, instead of --eval_fraction; may be given several times",
        role="input",
        metavar="FILE",
    )
    gold: tuple[str, ...] = option(
        (),
        DATA,
        "right answers, in any shape that data sets have, found by the question's words; they are learned "
        "instead of the teacher's answers",
        role="input",
        metavar="FILE",
    )
    text_fraction: float = option(
        0.0,
        TRAINING,
        "share of examples whose documents the generator reads as text, so that it keeps this ability",
        role="result",
        within=SHARE,
    )
    closed_book_fraction: float = option(
        0.0, TRAINING, "share of examples without documents", role="result", within=SHARE
    )
    pretrained_model: str = option(
        "",
        MODEL,
        "start from the output of scaledown pretrain, whose model flags are kept",
        role="model",
        metavar="DIR",
    )
    enable_reranking: bool = option(
        False, MODEL, "also learn to rerank; the data needs reranking_scores", role="result"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.train_data:
            raise UsageError("no training data: give --train_data train_data.json")
        if self.text_fraction + self.closed_book_fraction > 1:
            raise UsageError("--text_fraction and --closed_book_fraction add up to more than 1: lower them")

    @property
    def holds_out(self) -> bool:
        """Whether examples are held out."""
        return bool(self.eval_data) or super().holds_out


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(StudentConfig):
    """Settings of `scaledown pretrain`."""

    corpus_path: tuple[str, ...] = option(
        (),
        DATA,
        "any text: KILT JSON lines, JSONL / Parquet / CSV with id, title, text, or a folder of such or of "
        "text files; also a URL; may be given several times; with --max_steps only as much as needed is "
        "tokenized",
        role="input",
        metavar="PATH",
    )
    max_corpus_size: int = option(
        0, DATA, "read only this many articles from the start", "articles", role="result", within=Range(0)
    )
    train_data: tuple[str, ...] = option(
        (),
        DATA,
        "a pointer also learns from these records, one after each cloze question; as for scaledown train",
        role="input",
        metavar="FILE",
    )
    leave_out: tuple[str, ...] = option(
        (),
        DATA,
        "held-out records, as scaledown split writes them: the articles of their documents, found by title, "
        "are left out of the corpus; may be given several times",
        role="input",
        metavar="FILE",
    )
    gold: tuple[str, ...] = option(
        (),
        DATA,
        "right answers to the questions of --train_data, as for scaledown train",
        role="input",
        metavar="FILE",
    )
    doc_max_length: int = option(
        160,
        MODEL,
        "longest passage by the compressor's tokenizer, and longest document of the model: 128 tokens of a "
        "retriever are about 142 of a generator",
        "tokens",
        role="result",
        settled_by="pretrained_model",
        within=Range(16),
    )

    output_dir: str = option(
        "pretrained",
        OUTPUT,
        "folder for the model and its checkpoints",
        role="place",
        local=True,
        metavar="DIR",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.corpus_path:
            raise UsageError("no text: give --corpus_path PATH")
        if self.gold and not self.train_data:
            raise UsageError("--gold has answers to the questions of --train_data: give --train_data too")

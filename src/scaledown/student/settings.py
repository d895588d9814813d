"""What a compressed generator is made of, as `config.json` keeps it."""

import math
from typing import Any, ClassVar, Final

from transformers import AutoConfig, PretrainedConfig

from scaledown.config.train import BUDGETS, GENERATOR_TRAINING
from scaledown.data.prompts import PAPER, QUESTION, Template
from scaledown.errors import ModelError, UsageError
from scaledown.extensions import COMPRESSORS
from scaledown.student.compressor import Compressor

LOWEST_RATE: Final = 4
HIGHEST_RATE: Final = 128


class ScaleDownConfig(PretrainedConfig):  # type: ignore[misc]  # transformers has no types
    """Settings of a `ScaleDownModel`; defaults are those of OSCAR (arXiv 2504.07109, table 7).

    Raises `UsageError` for values out of range.
    """

    model_type: ClassVar[str] = "scaledown"

    generator: dict[str, Any] | None = None
    """The generator's own configuration."""
    generator_name: str = ""
    compressor: str = "n_layers"
    """A name in `COMPRESSORS`, or that of any encoder or decoder."""
    compressor_config: dict[str, Any] | None = None
    """The configuration of a compressor that is a model of its own."""
    num_layers: int = 8
    """Layers of a compressor that is made of the generator's first layers."""
    compression_rate: int = 16
    """Tokens to one memory token: of the longest document, 4 to 128; of a pointer, of each document, 4 to 32
    where no other rate is asked for."""
    doc_max_length: int = 128
    """Longest document in tokens of the compressor; what is longer is cut."""
    query_max_length: int = 128
    """Longest query in tokens of the compressor, which alone reads it cut."""
    mapping_width: int = 8096
    """Hidden units of the mapping from a separate compressor to the generator."""
    enable_reranking: bool = False
    generator_training: str = "lora"
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.1
    system: str = PAPER.system
    before: str = PAPER.before
    after: str = PAPER.after

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not LOWEST_RATE <= self.compression_rate <= HIGHEST_RATE:
            raise UsageError(
                f"--compression_rate {self.compression_rate}: use {LOWEST_RATE} to {HIGHEST_RATE} tokens a "
                "memory token"
            )
        self.check_reranking()
        self.check_rate(self.compression_rate)
        for name in ("num_layers", "doc_max_length", "query_max_length", "mapping_width", "lora_rank"):
            if (value := getattr(self, name)) < 1:
                raise UsageError(f"--{name} {value}: use at least 1")
        if self.generator_training not in GENERATOR_TRAINING:
            raise UsageError(
                f"--generator_training {self.generator_training}: use {', '.join(GENERATOR_TRAINING)}"
            )
        if QUESTION not in self.before + self.after:
            raise UsageError(f"the prompt asks no question: put {QUESTION} before or after the documents")

    @property
    def memory_tokens(self) -> int:
        """Memory tokens that stand for one document; of a pointer, for the longest."""
        return math.ceil(self.doc_max_length / self.compression_rate)

    @property
    def kind(self) -> Compressor:
        """The kind of compressor. Raises `UsageError` where it cannot be imported."""
        found: Compressor = COMPRESSORS.find(self.compressor)
        return found

    def check_reranking(self) -> None:
        """Raise `UsageError` for a reranking head that the compressor does not have."""
        if self.enable_reranking and self.kind.ranks:
            raise UsageError(
                f"--enable_reranking: a {self.compressor} ranks documents by its own scores: leave it out"
            )
        if self.enable_reranking and not self.kind.has_head:
            raise UsageError(f"--enable_reranking: --compressor {self.compressor} has no head: leave it out")

    @property
    def ranks(self) -> bool:
        """Whether the model tells how relevant documents are."""
        return self.enable_reranking or self.kind.ranks

    def check_rate(self, rate: int) -> None:
        """Raise `UsageError` where the model cannot compress at `rate` tokens a memory token."""
        rates = self.kind.rates
        if not rates:
            if rate != self.compression_rate:
                raise UsageError(
                    f"--compression_rate {rate}: this model is trained for {self.compression_rate} alone; "
                    "only a pointer compresses at other rates"
                )
        elif not rates[0] <= rate <= rates[-1]:
            raise UsageError(
                f"--compression_rate {rate}: a {self.compressor} takes {rates[0]} to {rates[-1]} tokens a "
                "memory token"
            )

    def check_budget(self, budget: str) -> None:
        """Raise `UsageError` where the model does not have this way to give memory tokens to documents."""
        if budget not in BUDGETS:
            raise UsageError(f"--budget {budget}: use {' or '.join(BUDGETS)}")
        if budget == "shared" and not self.kind.rates:
            raise UsageError("--budget shared: only a pointer shares memory tokens; use each")

    def memory_tokens_of(self, tokens: int, rate: int) -> int:
        """Memory tokens that stand for a document of `tokens` tokens at `rate`; a pointer's may be none."""
        return math.ceil(tokens / rate) if self.kind.rates else self.memory_tokens

    @property
    def compressor_name(self) -> str | None:
        """The model to load as the compressor; None where it is made of the generator."""
        return None if self.kind.of_generator else self.kind.model_name or self.compressor

    @property
    def template(self) -> Template:
        """How the generator is asked; `before` and `after` stand around the documents."""
        return Template(self.system, self.before, self.after)

    @staticmethod
    def architecture(settings: dict[str, Any] | None) -> Any:
        """The transformers configuration that `generator` or `compressor_config` describes."""
        if settings is None:
            raise ModelError("the configuration lacks a part's own: make the model with ScaleDownModel.build")
        return AutoConfig.for_model(**settings)


AutoConfig.register(ScaleDownConfig.model_type, ScaleDownConfig)

"""The settings of a `ScaleDownModel`, as in its `config.json`."""

import math
from typing import Any, ClassVar, Final

from transformers import AutoConfig, PretrainedConfig

from scaledown.config.train import BUDGETS, GENERATOR_TRAINING
from scaledown.data.prompts import PAPER, QUESTION, Template
from scaledown.errors import ModelError, UsageError
from scaledown.extensions import COMPRESSORS
from scaledown.models.sources import ModelSource
from scaledown.models.weights import loading, read_config_file
from scaledown.student.compressor import Compressor

LOWEST_RATE: Final = 4
HIGHEST_RATE: Final = 128


class ScaleDownConfig(PretrainedConfig):  # type: ignore[misc]  # transformers has no types
    """Settings of a `ScaleDownModel`. The defaults are OSCAR's (arXiv 2504.07109, table 7).

    Raises:
        UsageError: A value is out of range.
    """

    model_type: ClassVar[str] = "scaledown"

    generator: dict[str, Any] | None = None
    """The generator's own configuration."""
    generator_name: str = ""
    """The name that the generator was loaded by: of the hub, a folder or a file."""
    compressor: str = "n_layers"
    """A name in `COMPRESSORS`, or the name of any encoder or decoder."""
    compressor_config: dict[str, Any] | None = None
    """The configuration of a compressor that is a separate model."""
    num_layers: int = 8
    """Layers of a compressor that is made of the generator's first layers."""
    compression_rate: int = 16
    """Document tokens for each memory token. With memory tokens it is for the longest document, 4 to 128; a
    pointer applies it to each document, 4 to 32, and uses it when no other rate is given."""
    doc_max_length: int = 128
    """Longest document, in tokens of the compressor; longer documents are cut."""
    query_max_length: int = 128
    """Longest query, in tokens of the compressor. It is cut for the compressor, not for the generator."""
    mapping_width: int = 8096
    """Hidden units of the mapping from a separate compressor to the generator."""
    enable_reranking: bool = False
    """Whether the model has a reranking head. A pointer ranks without one."""
    generator_training: str = "lora"
    """What is trained of the generator: `lora`, `full` or `frozen`."""
    generator_4bit: bool = False
    """Whether the generator's frozen weights had 4 bits in training; the saved weights have these values."""
    lora_rank: int = 16
    """Rank of LoRA's matrices; at least 1."""
    lora_alpha: int = 32
    """LoRA's scale: its product is multiplied by `lora_alpha / lora_rank`."""
    lora_dropout: float = 0.1
    """Dropout before LoRA's matrices in training, 0 to 1."""
    system: str = PAPER.system
    """The system message of the generator's prompt."""
    before: str = PAPER.before
    """The text before the documents."""
    after: str = PAPER.after
    """The text after the documents; this text or the one before has a place for the question."""

    @classmethod
    def read(cls, source: ModelSource) -> "ScaleDownConfig":
        """Read the settings of a saved model.

        Args:
            source: The model; its weights are not read.

        Raises:
            ModelError: They cannot be read, or it is not a ScaleDown model.
        """
        settings = read_config_file(source, "config.json") or {}
        if settings.get("model_type") != cls.model_type:
            raise ModelError(
                f"{source.name} is not a ScaleDown model: make one of it with python train.py "
                f"--generator_model {source.name}"
            )
        with loading(source):
            found: ScaleDownConfig = cls.from_dict(settings)
        return found

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
            raise UsageError(f"the prompt has no question: put {QUESTION} before or after the documents")

    @property
    def memory_tokens(self) -> int:
        """Number of memory tokens of a document; for a pointer, of the longest document."""
        return math.ceil(self.doc_max_length / self.compression_rate)

    @property
    def kind(self) -> Compressor:
        """The kind of compressor. Raises `UsageError` if it cannot be imported."""
        found: Compressor = COMPRESSORS.find(self.compressor)
        return found

    def check_reranking(self) -> None:
        """Raise `UsageError` if a reranking head is enabled and the kind of compressor cannot have one."""
        if self.enable_reranking and self.kind.ranks:
            raise UsageError(
                f"--enable_reranking: a {self.compressor} ranks documents by its own scores: leave it out"
            )
        if self.enable_reranking and not self.kind.has_head:
            raise UsageError(f"--enable_reranking: --compressor {self.compressor} has no head: leave it out")

    @property
    def ranks(self) -> bool:
        """Whether the model computes the relevance of documents."""
        return self.enable_reranking or self.kind.ranks

    def check_rate(self, rate: int) -> None:
        """Raise an error if the model cannot compress at a rate.

        Args:
            rate: Document tokens for each memory token.

        Raises:
            UsageError: A pointer does not take this rate, or the rate is not the one that the model has.
        """
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
        """Raise an error if the model does not support a budget of memory tokens.

        Args:
            budget: `each` or `shared`.

        Raises:
            UsageError: The budget is unknown, or it is `shared` and the model is not a pointer.
        """
        if budget not in BUDGETS:
            raise UsageError(f"--budget {budget}: use {' or '.join(BUDGETS)}")
        if budget == "shared" and not self.kind.rates:
            raise UsageError("--budget shared: only a pointer shares memory tokens; use each")

    def memory_tokens_of(self, tokens: int, rate: int) -> int:
        """Return the number of memory tokens of a document.

        Args:
            tokens: Length of the document, in tokens of the compressor.
            rate: Document tokens for each memory token; only a pointer uses it.

        Returns:
            For a pointer `tokens / rate`, rounded up, so 0 for an empty document; else `memory_tokens`.
        """
        return math.ceil(tokens / rate) if self.kind.rates else self.memory_tokens

    @property
    def compressor_name(self) -> str | None:
        """Name of the model to load as the compressor; None if it is made of the generator."""
        return None if self.kind.of_generator else self.kind.model_name or self.compressor

    @property
    def template(self) -> Template:
        """The generator's prompt: `before` precedes the documents, `after` follows them."""
        return Template(self.system, self.before, self.after)

    @staticmethod
    def architecture(settings: dict[str, Any] | None) -> Any:
        """Return the transformers configuration that saved settings describe.

        Args:
            settings: `generator` or `compressor_config`.

        Raises:
            ModelError: The settings are None.
        """
        if settings is None:
            raise ModelError(
                "the configuration of the generator or the compressor is missing: make the model with "
                "ScaleDownModel.build"
            )
        return AutoConfig.for_model(**settings)


AutoConfig.register(ScaleDownConfig.model_type, ScaleDownConfig)

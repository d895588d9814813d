"""The model that a training run starts from: separate parts, or a model from `scaledown pretrain`."""

import logging
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from scaledown.config.train import PretrainConfig, StudentConfig
from scaledown.errors import UsageError
from scaledown.models.sources import ModelSource, resolve
from scaledown.models.weights import onto

if TYPE_CHECKING:
    import torch

    from scaledown.student.model import ScaleDownModel
    from scaledown.student.settings import ScaleDownConfig

log = logging.getLogger("scaledown")

# Flags that define a model; with a pretrained model they are already decided.
MODEL_FLAGS: Final = tuple(name for name, about in StudentConfig.options().items() if about.settled_by)


class Origin(NamedTuple):
    """The parts of a model to train, found but not loaded."""

    settings: "ScaleDownConfig"
    """`doc_max_length` is 0 if the longest document of the data decides it."""
    source: ModelSource
    """The generator, or the whole model if it `is_pretrained`."""
    compressor: ModelSource | None = None
    """The compressor, if it is a separate model."""
    is_pretrained: bool = False
    """Whether the run starts from a model of `scaledown pretrain`."""
    in_4bit: bool = False
    """Whether the generator's frozen weights are kept in 4 bits."""

    @property
    def settled(self) -> dict[str, Any]:
        """The values of `MODEL_FLAGS` that a pretrained model was made with; else empty."""
        there = {**self.settings.to_dict(), "generator_model": self.settings.generator_name}
        return {flag: there[flag] for flag in MODEL_FLAGS} if self.is_pretrained else {}

    def identity(self, content_hash: Callable[[Path], str]) -> dict[str, str]:
        """Return the identities of the exact weights of each part.

        Args:
            content_hash: Returns the hash of a file or folder.

        Returns:
            By the name of the flag, a commit or a hash; for a compressor made of the generator, its name.
        """
        weights = self.source.identity(content_hash)
        if self.is_pretrained:
            return {"pretrained_model": weights}
        compressor = self.compressor.identity(content_hash) if self.compressor else self.settings.compressor
        return {"generator_model": weights, "compressor": compressor}

    def compressor_tokenizer(self) -> Any:
        """Load the compressor's tokenizer. Raises `ModelError`."""
        from scaledown.student.model import COMPRESSOR_FOLDER, load_tokenizer

        if self.is_pretrained and self.settings.compressor_name is not None:
            return load_tokenizer(self.source, COMPRESSOR_FOLDER)
        return load_tokenizer(self.compressor or self.source)

    def load(self, dtype: "torch.dtype", device: str) -> "ScaleDownModel":
        """Load or build the model, in its state before training.

        Args:
            dtype: Of the weights.
            device: `cpu`, `cuda`, `cuda:N` or `mps`.

        Returns:
            The `ScaleDownModel`; with `in_4bit`, frozen linear layers of the generator are in 4 bits.

        Raises:
            ModelError: A part cannot be loaded, or the parts do not fit together.
            UsageError: The generator has nothing to keep in 4 bits, or fewer layers than the settings need.
        """
        from scaledown.student.model import ScaleDownModel

        if self.is_pretrained:
            model: ScaleDownModel = ScaleDownModel.from_pretrained(
                self.source.name, dtype=dtype, **onto(device)
            )
            if self.settings.enable_reranking and not model.config.enable_reranking:
                model.add_reranking()
        else:
            model = ScaleDownModel.build(
                self.settings, self.source, self.compressor, dtype=dtype, device=device
            )
        if self.in_4bit:
            from scaledown.student.training.quantization import quantize

            quantize(model.generator)
            model.config.generator_4bit = True
        return model


def find_origin(config: StudentConfig) -> Origin:
    """Find the models of a run, without loading them.

    Args:
        config: The settings of `scaledown train` or `scaledown pretrain`.

    Returns:
        The models and the settings of the model to train.

    Raises:
        ModelError: A model cannot be found, or the pretrained one is not a ScaleDown model.
        UsageError: Flags contradict each other or the pretrained model.
    """
    from scaledown.student.settings import ScaleDownConfig

    reranks = getattr(config, "enable_reranking", False)
    if name := getattr(config, "pretrained_model", ""):
        return _pretrained(config, name, reranks=reranks)
    settings = ScaleDownConfig(
        compressor=config.compressor,
        num_layers=config.num_layers,
        compression_rate=config.compression_rate,
        query_max_length=config.query_max_length,
        generator_training=config.generator_training,
        lora_dropout=config.lora_dropout,
        enable_reranking=reranks,
    )
    settings.doc_max_length = config.doc_max_length
    if isinstance(config, PretrainConfig) and config.train_data and not settings.kind.picks_tokens:
        raise UsageError("--train_data: only a pointer is pretrained on records: give --compressor pointer")
    generator = resolve(config.generator_model)
    compressor = resolve(settings.compressor_name) if settings.compressor_name else None
    _check_effects(config, settings)
    return Origin(settings, generator, compressor, in_4bit=config.generator_4bit)


def _pretrained(config: StudentConfig, name: str, *, reranks: bool) -> Origin:
    from scaledown.student.settings import ScaleDownConfig

    source = resolve(name)
    settings = ScaleDownConfig.read(source)
    settings.enable_reranking |= reranks
    settings.check_reranking()
    origin = Origin(settings, source, is_pretrained=True, in_4bit=config.generator_4bit)
    if config.generator_4bit and settings.generator_training == "full":
        raise UsageError(
            f"--generator_4bit: all weights of the generator of {name} are trained; leave the flag out"
        )
    _check_effects(config, settings)
    defaults = _defaults(config)
    for flag, there in origin.settled.items():
        value = getattr(config, flag)
        if value not in {defaults[flag], there}:
            raise UsageError(
                f"--{flag} {value}: --pretrained_model {name} was made with {there}; leave the flag out"
            )
    return origin


def _check_effects(config: StudentConfig, settings: "ScaleDownConfig") -> None:
    """Warn of flags that change nothing. Raises `UsageError` for examples that would train nothing."""
    is_frozen = settings.generator_training == "frozen"
    if is_frozen and getattr(config, "text_fraction", 0) + getattr(config, "closed_book_fraction", 0):
        raise UsageError(
            "--text_fraction and --closed_book_fraction have no effect on a frozen generator: leave them out"
        )
    trains_pointer_alone = isinstance(config, PretrainConfig) and settings.kind.picks_tokens
    unused = {
        "num_layers": not settings.kind.of_generator,
        "lora_dropout": settings.generator_training != "lora",
        "learning_rate_generator": is_frozen or trains_pointer_alone,
        "eval_fraction": bool(getattr(config, "eval_data", ())),
        "num_epochs": config.max_steps > 0,
    }
    defaults = _defaults(config)
    for name, has_no_effect in unused.items():
        if has_no_effect and getattr(config, name) != defaults[name]:
            log.warning("--%s has no effect here", name)


def _defaults(config: StudentConfig) -> dict[str, Any]:
    return {item.name: item.default for item in fields(config)}

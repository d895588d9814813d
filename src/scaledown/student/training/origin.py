"""What a run starts from: parts to be joined, or a model that `scaledown pretrain` joined before."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from scaledown.config.train import PretrainConfig, StudentConfig
from scaledown.errors import UsageError
from scaledown.models import ModelSource, onto, resolve

if TYPE_CHECKING:
    import torch

    from scaledown.student.model import ScaleDownModel
    from scaledown.student.settings import ScaleDownConfig

# Flags that say what a model is made of: a pretrained one has settled them.
MODEL_FLAGS: Final = tuple(name for name, about in StudentConfig.options().items() if about.settled_by)


class Origin(NamedTuple):
    """What a model that is to be trained is made of, found but not loaded."""

    settings: "ScaleDownConfig"
    """`doc_max_length` is 0 where the data is to tell."""
    source: ModelSource
    """The generator, or the whole model where it `is_pretrained`."""
    compressor: ModelSource | None = None
    """A compressor that is a model of its own."""
    is_pretrained: bool = False
    in_4bit: bool = False
    """Whether the generator's frozen weights are held in 4 bits."""

    @property
    def settled(self) -> dict[str, Any]:
        """The flags of a model that is pretrained, as it was made, whatever their defaults are."""
        there = {**self.settings.to_dict(), "generator_model": self.settings.generator_name}
        return {flag: there[flag] for flag in MODEL_FLAGS} if self.is_pretrained else {}

    def identity(self, content_hash: Callable[[Path], str]) -> dict[str, str]:
        """What names the exact weights of each part."""
        weights = self.source.identity(content_hash)
        if self.is_pretrained:
            return {"pretrained_model": weights}
        own = self.compressor.identity(content_hash) if self.compressor else self.settings.compressor
        return {"generator_model": weights, "compressor": own}

    def compressor_tokenizer(self) -> Any:
        """What documents are measured by. Raises `ModelError`."""
        from scaledown.student.model import COMPRESSOR_FOLDER, load_tokenizer

        if self.is_pretrained and self.settings.compressor_name is not None:
            return load_tokenizer(self.source, COMPRESSOR_FOLDER)
        return load_tokenizer(self.compressor or self.source)

    def load(self, dtype: "torch.dtype", device: str) -> "ScaleDownModel":
        """The model as training begins with it. Raises `ModelError`."""
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
    """Where the model of a run comes from. Raises `ModelError`, `UsageError`."""
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
    return Origin(settings, generator, compressor, in_4bit=config.generator_4bit)


def _pretrained(config: StudentConfig, name: str, *, reranks: bool) -> Origin:
    from scaledown.student.model import read_settings

    source = resolve(name)
    settings = read_settings(source)
    settings.enable_reranking |= reranks
    settings.check_reranking()
    origin = Origin(settings, source, is_pretrained=True, in_4bit=config.generator_4bit)
    defaults = {item.name: item.default for item in fields(config)}
    for flag, there in origin.settled.items():
        value = getattr(config, flag)
        if value not in {defaults[flag], there}:
            raise UsageError(
                f"--{flag} {value}: --pretrained_model {name} is made with {there}; leave the flag out"
            )
    return origin

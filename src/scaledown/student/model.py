"""The compressor, the generator and the reranking head as one model that saves into one folder."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from scaledown.data.teacher.context import context_tokens
from scaledown.errors import ModelError
from scaledown.models.hub import hub_errors
from scaledown.models.sources import ModelSource, resolve
from scaledown.models.weights import loadable, loading, onto
from scaledown.student.batch import IGNORED, Group, Reader
from scaledown.student.card import model_card
from scaledown.student.compressor import Compressed
from scaledown.student.compressors import layers
from scaledown.student.inference.answering import Answering
from scaledown.student.settings import ScaleDownConfig

LOSS_WEIGHTS: Final = {"answer_loss": 1.0, "rerank_loss": 0.05, "pointer_loss": 1.0}
"""Weights of the losses; those of answers and of the reranking head are from arXiv 2504.07109, section 3."""
COMPRESSOR_FOLDER: Final = "compressor"  # the tokenizer of a separate compressor, in a model's folder


@dataclass
class Output(ModelOutput):  # type: ignore[misc]  # transformers has no types
    """Losses of one batch, scalars. A loss that the model does not have is 0."""

    loss: torch.Tensor | None = None
    """The sum of the others, weighted by `LOSS_WEIGHTS`."""
    answer_loss: torch.Tensor | None = None
    """Cross-entropy on the answers' tokens; the mean over the tokens of the batch."""
    rerank_loss: torch.Tensor | None = None
    """Squared differences to the teacher's scores, summed over documents; the mean over queries."""
    pointer_loss: torch.Tensor | None = None
    """The compressor's own loss. For a pointer: cross-entropy on the tokens that answers copy, summed over
    the queries with such tokens and divided by the number of all queries."""


class ScaleDownModel(Answering, PreTrainedModel):  # type: ignore[misc]  # transformers has no types
    """OSCAR (arXiv 2504.07109): a compressor that reads documents with their query, and a generator.

    `build` makes a model of pretrained parts; `from_pretrained` loads one that `save_pretrained` wrote.
    """

    config_class = ScaleDownConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # required by transformers; each part chooses its own attention

    def __init__(self, config: ScaleDownConfig, generator: Any = None, compressor: Any = None) -> None:
        super().__init__(config)
        self.generator = generator or AutoModelForCausalLM.from_config(config.architecture(config.generator))
        self.compressor = compressor or layers.new_compressor(config)
        config.kind.add_parts(self)
        self._keep_in_fp32_modules_strict = set(config.kind.float32_parts)
        self.post_init()
        if (
            config.generator_training == "lora"
        ):  # after post_init, which would overwrite LoRA's initial values
            self._add_lora()
        self._set_trained()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            for parameter in self.parameters(recurse=False):
                nn.init.normal_(parameter, std=0.02)

    def _add_lora(self) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        settings = LoraConfig(
            r=self.config.lora_rank,
            lora_alpha=self.config.lora_alpha,
            lora_dropout=self.config.lora_dropout,
            target_modules="all-linear",  # the output layer is not among them
        )
        inject_adapter_in_model(settings, self.generator)

    def merge_lora(self) -> None:
        """Merge LoRA into the generator's weights, which makes generation faster.

        The model computes the same function, except for rounding. LoRA cannot be trained any more, and is not
        saved.
        """
        from peft.tuners.lora import LoraLayer

        for name, module in list(self.generator.named_modules()):
            if isinstance(module, LoraLayer):
                module.merge()
                self.generator.set_submodule(name, module.get_base_layer())
        self.config.generator_training = "frozen"
        self._set_trained()

    def save_generator(self, folder: Path) -> None:
        """Write the generator alone as an ordinary causal LM, with its tokenizer.

        LoRA is merged first, see `merge_lora`.

        Args:
            folder: Created if it does not exist.
        """
        if self.config.generator_training == "lora":
            self.merge_lora()
        self.generator.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def forget_generator(self) -> None:
        """Delete the generator except for its token embeddings: another engine writes the answers."""
        self.generator = _Embeddings(self.generator)

    def _set_trained(self) -> None:
        """Choose the trained weights of the generator. All weights of the other parts are trained."""
        training = self.config.generator_training
        for name, parameter in self.generator.named_parameters():
            parameter.requires_grad_(training == "full" or (training == "lora" and ".lora_" in name))

    @classmethod
    def build(
        cls,
        config: ScaleDownConfig,
        generator_source: ModelSource,
        compressor_source: ModelSource | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> Self:
        """Build an untrained model of pretrained parts; memory tokens, mapping and head are new.

        Args:
            config: The settings; the configurations of the parts are added to it.
            generator_source: The generator.
            compressor_source: `resolve(config.compressor_name)`, or None if that name is None.
            dtype: Of the weights.
            device: `cpu`, `cuda`, `cuda:N` or `mps`.

        Returns:
            The model.

        Raises:
            ModelError: A part cannot be loaded, or the parts do not fit together.
        """
        name, pinned = loadable(generator_source)
        with loading(generator_source):
            tokenizer = AutoTokenizer.from_pretrained(name, **pinned)
            generator = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **pinned, **onto(device))
            generation = generator.generation_config
        if tokenizer.eos_token_id is None:
            raise ModelError(f"{generator_source.name} has no end token: use another generator")
        config.generator = layers.architecture_of(generator)
        config.generator_name = generator_source.name
        if compressor_source is None:
            with hub_errors(generator_source.name):
                compressor, compressor_tokenizer = layers.first_layers(config, generator), tokenizer
        else:
            compressor = layers.load_compressor(config, compressor_source, dtype, device)
            config.compressor_config = layers.architecture_of(compressor)
            compressor_tokenizer = load_tokenizer(compressor_source)
        model = cls(config, generator, compressor)
        config.kind.start(model, tokenizer)
        model._attach(tokenizer, compressor_tokenizer, generation)
        with hub_errors(generator_source.name):
            model.to(device=device, dtype=dtype)
        for part in config.kind.float32_parts:
            getattr(model, part).float()
        return model

    def add_reranking(self) -> None:
        """Add an untrained reranking head to a model that has none."""
        rows = layers.token_like(self.compressor, 1)
        self.rerank_token = nn.Parameter(rows[0].to(self.memory))
        self.score = nn.Linear(len(rows[0]), 1).to(self.memory)
        self.config.enable_reranking = True

    def _attach(self, tokenizer: Any, compressor_tokenizer: Any, generation: Any) -> None:
        self.tokenizer = tokenizer
        self.compressor_tokenizer = compressor_tokenizer
        context = context_tokens(self.generator.config, tokenizer)
        self.reader = Reader(self.config, tokenizer, compressor_tokenizer, context)
        stops = generation.eos_token_id
        stops = stops if isinstance(stops, list) else [stops]
        # Greedy decoding; of the generator's own settings only the stop tokens are kept.
        self.generator.generation_config = GenerationConfig(
            do_sample=False,
            eos_token_id=sorted({stop for stop in [*stops, tokenizer.eos_token_id] if stop is not None}),
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        )

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the generator's token embeddings."""
        embeddings: nn.Embedding = self.generator.get_input_embeddings()
        return embeddings

    def compress_ids(self, groups: Sequence[Group], shared: Sequence[int] = ()) -> Compressed:
        """Compress tokenized documents.

        Args:
            groups: Groups of documents of similar length, see `batch.group`.
            shared: Number of documents of each question, if these share their memory tokens; else empty.

        Returns:
            All documents in the order of their `places`.
        """
        return self.config.kind.compress(self, groups, shared)

    def embed(
        self, ids: torch.Tensor, is_memory: torch.Tensor, embeddings: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the generator's input: embeddings of tokens and of compressed documents.

        Args:
            ids: [batch, length]: the generator's tokens.
            is_memory: [batch, length] bool: positions of the documents' embeddings.
            embeddings: [memory tokens of all documents, width], in the order of these positions; None if
                there are none.

        Returns:
            [batch, length, width].
        """
        embedded: torch.Tensor = self.generator.get_input_embeddings()(ids)
        if embeddings is None:
            return embedded
        return embedded.masked_scatter(is_memory[..., None], embeddings.to(embedded.dtype))

    def forward(  # noqa: PLR0917
        self,
        groups: Sequence[Group],
        ids: torch.Tensor,
        is_memory: torch.Tensor,
        labels: torch.Tensor,
        scores: torch.Tensor | None = None,
        copied: torch.Tensor | None = None,
        sizes: torch.Tensor | None = None,
    ) -> Output:
        """Compute the losses of a batch that `collate` made; `Batch` says more about each tensor.

        Args:
            groups: The documents of all examples, in groups of similar length.
            ids: [batch, length]: prompt and answer. With a length of 0 there is no loss on answers.
            is_memory: [batch, length] bool: positions of the documents' embeddings.
            labels: [batch, length]: the answer's tokens, -100 at other positions.
            scores: [documents]: the teacher's scores, NaN if unknown; None for no loss on relevance.
            copied: [documents, longest document]: 1 for tokens that the answer copies, else 0; None for no
                loss on these tokens.
            sizes: [batch]: number of documents of each example; needed with `copied`.

        Returns:
            The losses, scalars.
        """
        compressed = self.compress_ids(groups)
        zero = torch.zeros((), device=ids.device)
        losses = dict.fromkeys(LOSS_WEIGHTS, zero)
        if ids.shape[1]:
            losses["answer_loss"] = self._answer_loss(compressed.embeddings, ids, is_memory, labels)
        if self.config.enable_reranking and compressed.relevance is not None and scores is not None:
            relevance = compressed.relevance[: len(scores)].float()  # without a document that stands in
            differences = torch.where(scores.isnan(), 0.0, relevance - scores.nan_to_num())
            losses["rerank_loss"] = differences.square().sum() / len(ids)
        if copied is not None and sizes is not None:
            own = self.config.kind.loss(compressed, copied, sizes.tolist())
            if own is not None:
                losses["pointer_loss"] = own / len(ids)
        weighted = [LOSS_WEIGHTS[name] * value for name, value in losses.items()]
        return Output(loss=torch.stack(weighted).sum(), **losses)

    def _answer_loss(
        self, embeddings: torch.Tensor, ids: torch.Tensor, is_memory: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        # Logits are computed only for the positions that predict an answer's token: the vocabulary is large.
        columns = (labels != IGNORED).any(0).nonzero()[:, 0]  # [answers' positions]
        # No mask is needed: padding is on the right, and causal attention does not look there.
        logits = self.generator(
            inputs_embeds=self.embed(ids, is_memory, embeddings),
            logits_to_keep=columns - 1,
            use_cache=False,
        ).logits  # [batch, answers' positions, vocabulary]
        return nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels[:, columns].flatten(), ignore_index=IGNORED
        )

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, **keywords: Any) -> None:
        """Write weights (safetensors), configuration, tokenizers, stop tokens and model card to a folder.

        Args:
            save_directory: The folder; created if it does not exist.
            is_main_process: Of several processes that train one model, only the main one writes files.
            keywords: As in transformers: `state_dict`, `max_shard_size`, ...
        """
        super().save_pretrained(save_directory, is_main_process=is_main_process, **keywords)
        if not is_main_process:
            return
        folder = Path(save_directory)
        self.generator.generation_config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if self.config.compressor_name is not None:
            self.compressor_tokenizer.save_pretrained(folder / COMPRESSOR_FOLDER)
        (folder / "README.md").write_text(model_card(self.config), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, name: Any, *arguments: Any, **keywords: Any) -> Any:
        """Load a saved model from a folder or from the hub, in eval mode.

        Args:
            name: The folder, `org/name` or `org/name@revision`.
            arguments: As in transformers.
            keywords: As in transformers: `dtype`, `device_map`, ...

        Returns:
            The model.

        Raises:
            ModelError: It cannot be read, or is not a ScaleDown model.
        """
        if revision := keywords.pop("revision", None):
            name = f"{name}@{revision}"
        source = resolve(str(name))
        location, pinned = loadable(source)
        ScaleDownConfig.read(source)
        with loading(source):
            model, info = super().from_pretrained(
                location, *arguments, **keywords, revision=pinned["revision"], output_loading_info=True
            )
            if missing := sorted(info["missing_keys"]):
                raise ModelError(f"{name} lacks weights ({missing[0]}, {len(missing)} in all): save it again")
            generation = GenerationConfig.from_pretrained(location, revision=pinned["revision"])
        tokenizer = compressor_tokenizer = load_tokenizer(source)
        if model.config.compressor_name is not None:
            compressor_tokenizer = load_tokenizer(source, COMPRESSOR_FOLDER)
        model.config.kind.loaded(model)
        model._set_trained()  # loading makes all weights trainable
        model._attach(tokenizer, compressor_tokenizer, generation)
        return model

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload ScaleDownModel",
    ) -> str:
        """Save to a repository of the hub, which is created if it does not exist.

        Unlike the method of transformers, this one keeps the model card that `save_pretrained` writes.

        Args:
            repo_id: `org/name`, or `name` for a repository of the user.
            private: Whether a new repository is private; None is the default of the organisation or user.
            token: The token of the hub; None is the one of the login.
            revision: The branch; None is `main`.
            create_pr: Whether to open a pull request instead of writing to the branch.
            commit_message: The first line of the commit's message.

        Returns:
            The address of the upload on the hub.

        Raises:
            ModelError: The hub cannot be reached or refuses the upload.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with hub_errors(repo_id), tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return str(
                api.upload_folder(
                    repo_id=repository,
                    folder_path=folder,
                    revision=revision,
                    create_pr=create_pr,
                    commit_message=commit_message,
                )
            )


class _Embeddings(nn.Module):
    """The parts of a generator that are needed to make prompts for another engine."""

    def __init__(self, generator: Any) -> None:
        super().__init__()
        self.embeddings = generator.get_input_embeddings()
        self.config = generator.config
        self.generation_config = generator.generation_config

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the token embeddings."""
        embeddings: nn.Embedding = self.embeddings
        return embeddings


def load_tokenizer(source: ModelSource, folder: str = "") -> Any:
    """Load the tokenizer of a model.

    Args:
        source: The model.
        folder: The subfolder that has the tokenizer; empty for the model's own folder.

    Returns:
        A tokenizer of transformers.

    Raises:
        ModelError: It cannot be loaded.
    """
    name, pinned = loadable(source)
    with loading(source):
        return AutoTokenizer.from_pretrained(name, **pinned, subfolder=folder)


AutoModel.register(ScaleDownConfig, ScaleDownModel)

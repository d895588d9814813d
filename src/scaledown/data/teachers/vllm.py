"""The teacher on vLLM: continuous batching, shared prefixes cached, several GPUs. CUDA only."""

import importlib.util
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from scaledown.data.logprobs import from_ids
from scaledown.data.prompts import Prompt
from scaledown.data.teachers import Generation, Rejection, seed_of
from scaledown.data.teachers.context import Context
from scaledown.errors import MissingExtraError, ModelError, install_command
from scaledown.models import Halving, ModelSource, loadable, loading
from scaledown.records import Answer, Logprobs

_WAITING: Final = 1024  # requests that the engine holds: it never runs dry, and memory stays bounded


def check_vllm() -> None:
    """Raise `MissingExtraError` where the library is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtraError(f"--teacher_backend vllm needs vLLM: {install_command('vllm')} (CUDA)")


class VllmTeacher:
    """A causal LM under vLLM's engine, which schedules by itself. Quantised checkpoints load as they are."""

    def __init__(
        self,
        source: ModelSource,
        device: str,
        dtype: str,
        generation: Generation,
        *,
        lora: str,
        tensor_parallel: int,
    ) -> None:
        check_vllm()
        if not device.startswith("cuda"):
            raise ModelError(
                f"--teacher_backend vllm on --device {device}: it is for CUDA, use --device cuda"
            )
        if number := device.removeprefix("cuda").removeprefix(":"):
            os.environ["CUDA_VISIBLE_DEVICES"] = number  # the engine takes no device
        from transformers import AutoTokenizer
        from vllm import EngineArgs, LLMEngine
        from vllm.lora.request import LoRARequest

        name, pinned = loadable(source)
        with loading(source):
            tokenizer = AutoTokenizer.from_pretrained(name, **pinned)
            arguments = EngineArgs(
                model=name,
                revision=pinned.get("revision"),
                tokenizer_revision=pinned.get("revision"),
                dtype=dtype,
                seed=generation.seed,
                tensor_parallel_size=tensor_parallel,
                enable_prefix_caching=True,
                max_model_len=generation.context or None,
                enable_lora=bool(lora),
                max_lora_rank=_rank(lora),
                trust_remote_code=False,
            )
            self._engine = LLMEngine.from_engine_args(arguments)
        self._tokenizer = tokenizer
        self._ends = frozenset(tokenizer.all_special_ids)
        self._lora = LoRARequest("teacher", 1, lora) if lora else None
        self._generation = generation
        self._context = Context(source.name, tokenizer, self._engine.model_config.max_model_len, generation)
        self.halving = Halving("--teacher_batch_size")

    def answers(
        self, prompts: Sequence[Prompt], have: Collection[int] = ()
    ) -> Iterator[tuple[int, Answer | Rejection]]:
        """Answers as they finish; a prompt that the engine refuses is a `Rejection`, the rest goes on."""
        waiting = iter([place for place in range(len(prompts)) if place not in have])
        dropped: dict[str, int] = {}
        try:
            while True:
                while len(dropped) < _WAITING and (place := next(waiting, None)) is not None:
                    fitted = self._context.fit(prompts[place])
                    if isinstance(fitted, Rejection):
                        yield place, fitted
                        continue
                    try:
                        self._ask(place, fitted[0], prompts[place])
                    except ValueError as error:
                        yield place, Rejection(f"vLLM refused the prompt: {error}")
                        continue
                    dropped[str(place)] = fitted[1]
                if not dropped:
                    return
                for output in self._engine.step():
                    if output.finished and output.request_id in dropped:
                        yield int(output.request_id), self._answer(output, dropped.pop(output.request_id))
        finally:
            if dropped:  # whoever asked has gone
                self._engine.abort_request(list(dropped))

    def _ask(self, place: int, ids: list[int], prompt: Prompt) -> None:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=prompt.temperature,
            seed=seed_of(self._generation.seed, prompt.key) if prompt.temperature else None,
            max_tokens=self._generation.max_new_tokens,
            logprobs=self._generation.logprobs or None,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._engine.add_request(
            str(place), TokensPrompt(prompt_token_ids=ids), sampling, lora_request=self._lora
        )

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
        return Answer(text, written.finish_reason, prompt_tokens, len(tokens), dropped, logprobs)

    def _logprobs(self, tokens: list[int], steps: Sequence[Mapping[int, Any]]) -> Logprobs:
        """From what the engine gives at each token: the likeliest ones, and the token itself besides."""
        most = self._generation.logprobs
        best = [sorted(step.items(), key=lambda item: -item[1].logprob)[:most] for step in steps]
        ids = [[token for token, _ in step] for step in best]
        return from_ids(self._tokenizer, tokens, ids, [[each.logprob for _, each in step] for step in best])


def _rank(lora: str) -> int:
    """The rank that the engine makes room for: the adapter's, as one of those that it knows."""
    if not lora:
        return 16
    rank = int(json.loads((Path(lora) / "adapter_config.json").read_text(encoding="utf-8")).get("r", 16))
    return next((known for known in (8, 16, 32, 64, 128, 256, 320, 512) if rank <= known), rank)

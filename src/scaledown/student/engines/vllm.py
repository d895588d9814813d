"""The engine that runs a student's generator in vLLM, which takes embeddings of prompts."""

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from scaledown.devices.gpus import give_back
from scaledown.devices.vllm import VllmEngine, check_vllm, runs_on
from scaledown.models.sources import ModelSource, kept_folder, written_once
from scaledown.models.weights import loading
from scaledown.student.batch import EncodedQuestion
from scaledown.student.engines.base import Sampling, StudentEngine

log = logging.getLogger("scaledown")

_CPU_CONTEXT: Final = 1 << 14  # tokens: on a CPU vLLM reserves memory for a whole prompt of this length


class VllmGeneration:
    """A `Generation` by vLLM. The compressor stays in this process; vLLM loads the generator."""

    def __init__(self, model: Any, source: ModelSource, device: str, batch_size: int) -> None:
        """Start vLLM with the generator, which the first call writes to the cache folder.

        Args:
            model: A `ScaleDownModel`. Afterwards it keeps only the token embeddings of its generator.
            source: Where the model comes from.
            device: `cpu`, `cuda` or `cuda:N`.
            batch_size: The most answers written at the same time.

        Raises:
            NoRoomError: The device has too little free memory.
            ModelError: vLLM does not know the generator's architecture, or cannot load it.
        """
        folder = generator_folder(model, source)
        model.forget_generator()
        give_back()  # before vLLM measures the free memory
        self._model = model
        with loading(source):
            self._engine = VllmEngine(
                source.name,
                device,
                {
                    "model": str(folder),
                    "dtype": str(model.dtype).removeprefix("torch."),
                    # On a GPU -1: as long as the model reads and memory allows.
                    "max_model_len": min(model.reader.context, _CPU_CONTEXT) if device == "cpu" else -1,
                    "max_num_seqs": batch_size,
                    "enable_prompt_embeds": True,
                    # The key of vLLM's cache does not say which positions of a mixed prompt are embeddings.
                    # Our prompts are never mixed: all tokens or all embeddings, which have different keys.
                    "enable_prefix_caching": True,
                    "trust_remote_code": False,
                },
            )
        model.reader.context = min(model.reader.context, self._engine.context)
        self._numbers = itertools.count()
        self._rows: list[str] = []
        self._refused: dict[str, Exception] = {}
        self._finished: set[str] = set()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def can_grow(self) -> bool:
        """True: vLLM schedules requests itself."""
        return True

    def join(self, questions: Sequence[EncodedQuestion], samplings: Sequence[Sampling]) -> None:
        """Request answers, which become the last rows. `tokens` returns the error of a refused prompt.

        Raises:
            ModelError: vLLM has ended.
        """
        for question, sampling in zip(questions, samplings, strict=True):
            key = str(next(self._numbers))
            self._rows.append(key)
            try:
                self._engine.add(key, self._prompt(question), self._params(sampling))
            except ValueError as error:
                self._refused[key] = error

    def tokens(self) -> list[Sequence[int] | Exception]:
        """Let vLLM do one step, and return the new tokens of each row; a row may have none."""
        found: dict[str, Sequence[int] | Exception] = {}
        if not self._refused:
            for output in self._engine.step():
                (written,) = output.outputs
                found[output.request_id] = list(written.token_ids)
                if output.finished:
                    self._finished.add(output.request_id)
                    if written.finish_reason not in {"stop", "length"}:
                        found[output.request_id] = RuntimeError(f"vLLM: {written.finish_reason}")
        found |= self._refused
        self._refused = {}
        return [found.get(key, ()) for key in self._rows]

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows; other requests that are not finished are cancelled."""
        kept = [self._rows[place] for place in rows]
        if gone := set(self._rows) - set(kept) - self._finished:
            self._engine.abort(sorted(gone))
        self._rows = kept
        self._finished &= set(kept)

    def check(self) -> None:
        """Raise `ModelError` if vLLM has ended."""
        self._engine.check()

    def close(self) -> None:
        """End vLLM."""
        self._engine.close()

    def _prompt(self, question: EncodedQuestion) -> Any:
        from vllm import TokensPrompt
        from vllm.inputs import EmbedsPrompt

        if question.embeddings is None:
            return TokensPrompt(prompt_token_ids=[i for part in question.encoded.prompt_parts for i in part])
        with self._model.using():
            embedded, _ = self._model.prompts([question])
        return EmbedsPrompt(prompt_embeds=embedded[0].cpu())

    def _params(self, sampling: Sampling) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop_token_ids=list(self._model.stops),
            ignore_eos=True,  # the model's own list of end tokens is used instead
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )


def generator_folder(model: Any, source: ModelSource) -> Path:
    """Return the folder of the model's generator in the cache; the first call writes it, with LoRA merged.

    Args:
        model: A `ScaleDownModel`.
        source: Where the model comes from.
    """
    folder = kept_folder("generators", source, str(model.dtype))

    def write(temporary: Path) -> None:
        log.info("the generator is written once for vLLM: %s", folder)
        model.save_generator(temporary)

    return written_once(folder, source, write)


ENGINE: Final = StudentEngine(
    "vLLM",
    generation=VllmGeneration,
    suits=lambda device, source: runs_on(device),
    check=lambda device: check_vllm(device, "--engine vllm"),
    batch=256,
)

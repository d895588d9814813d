"""Costs of compression and generation: FLOPs, time and peak memory (OSCAR, arXiv 2504.07109, table 5)."""

import contextlib
import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from scaledown.config.evaluate import COMPRESSED, UNCOMPRESSED

if TYPE_CHECKING:
    import torch

    from scaledown.student.model import ScaleDownModel

log = logging.getLogger("scaledown")


class Shape(NamedTuple):
    """Sizes of a timed query, in tokens of the generator. The defaults are the paper's."""

    query_tokens: int = 128
    documents: int = 10
    """Number of documents."""
    document_tokens: int = 128
    """Tokens of each document."""
    new_tokens: int = 32
    """Tokens of the answer."""


AS_THE_PAPER: Final = Shape()

_ATTENTION: Final = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
"""Kernels of torch's attention; each is named `aten::_scaled_dot_product_` and this."""


class Seconds(NamedTuple):
    """Seconds of one query, over several repetitions of a batch."""

    median: float
    low: float
    """The first quartile."""
    high: float
    """The third quartile."""

    @classmethod
    def of(cls, seconds: Sequence[float], queries: int) -> "Seconds":
        """Compute the seconds of one query.

        Args:
            seconds: Seconds of each repetition of a whole batch; at least one.
            queries: Number of queries in the batch.
        """
        each = [value / queries for value in seconds]
        low, _, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
        return cls(statistics.median(each), low, high)


class Cost(NamedTuple):
    """Costs of one query in a batch. Without compression, the FLOPs and seconds of compression are 0."""

    system: str
    """`compressed` or `uncompressed`."""
    batch: int
    """Number of queries in the batch."""
    compression_flops: float
    """Floating-point operations; a multiply-add is two."""
    generation_flops: float
    """Of the generator, for the prompt and the answer."""
    compression: Seconds
    generation: Seconds
    peak_bytes: int | None
    """On a CPU the memory of the whole process, on a GPU the memory that torch allocated; None if unknown."""

    @property
    def flops(self) -> float:
        """FLOPs of compression and generation together."""
        return self.compression_flops + self.generation_flops

    @property
    def seconds(self) -> float:
        """Sum of the median seconds of compression and of generation."""
        return self.compression.median + self.generation.median


def costs(
    model: "ScaleDownModel",
    batches: Sequence[int],
    *,
    shape: Shape = AS_THE_PAPER,
    repeats: int = 3,
    compression_rate: int = 0,
    budget: str = "each",
) -> list[Cost]:
    """Measure the costs of answering from compressed documents and from their text.

    Both are run alternately, once to warm up and then `repeats` times. LoRA is merged into the weights first,
    and no answer ends early.

    Args:
        model: The model; its LoRA weights are merged in place.
        batches: Sizes of batches. If one does not fit into memory, it and all larger ones are left out.
        shape: Sizes of a query, its documents and its answer, in tokens.
        repeats: Timed repetitions.
        compression_rate: Of a pointer; 0 is its own rate.
        budget: Of a pointer, see `ScaleDownModel.answer`.

    Returns:
        Two costs for each size of batch: compressed and uncompressed.
    """
    import torch

    model = model.eval()
    if model.config.generator_training == "lora":
        model.merge_lora()
    stops, model.generator.generation_config.eos_token_id = model.generator.generation_config.eos_token_id, []
    found: list[Cost] = []
    way = {"compression_rate": compression_rate, "budget": budget}
    try:
        with model.reading():  # one warning, if the documents are cut
            for batch in sorted(set(batches)):
                before = model.halving.count
                measured: list[Cost] = []
                with contextlib.suppress(torch.OutOfMemoryError):
                    measured = _of_batch(model, batch, shape, repeats, way)
                if not measured or model.halving.count > before:  # half a batch is not of this size
                    log.warning("batches of %s and more do not fit into memory", batch)
                    break
                found += measured
    finally:
        model.generator.generation_config.eos_token_id = stops
    return found


def _of_batch(
    model: "ScaleDownModel", batch: int, shape: Shape, repeats: int, way: dict[str, Any]
) -> list[Cost]:
    queries, documents = inputs(model, batch, shape)
    embeddings = model.compress(queries, documents, batch_size=batch, **way)

    def compress() -> object:
        return model.compress(queries, documents, batch_size=batch, **way)

    def generate() -> object:
        return model.answer(queries, embeddings, max_new_tokens=shape.new_tokens, batch_size=batch)

    def read() -> object:
        return model.answer(
            queries, documents, max_new_tokens=shape.new_tokens, batch_size=batch, compressed=False
        )

    steps: dict[str, Callable[[], object]] = {"compress": compress, "generate": generate, "read": read}
    counted = {name: flops(step) / batch for name, step in steps.items()}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, int | None] = {}
    for _ in range(repeats):
        for name, step in steps.items():
            with _peak(model.device, peaks, name):
                started = time.perf_counter()
                step()
                _wait(model.device)
                taken[name].append(time.perf_counter() - started)
    seconds = {name: Seconds.of(values, batch) for name, values in taken.items()}
    parts = [peaks["compress"], peaks["generate"]]
    both = max(part for part in parts if part is not None) if None not in parts else None
    return [
        Cost(
            COMPRESSED,
            batch,
            counted["compress"],
            counted["generate"],
            seconds["compress"],
            seconds["generate"],
            both,
        ),
        Cost(
            UNCOMPRESSED, batch, 0.0, counted["read"], Seconds(0.0, 0.0, 0.0), seconds["read"], peaks["read"]
        ),
    ]


def inputs(model: "ScaleDownModel", batch: int, shape: Shape) -> tuple[list[str], list[list[str]]]:
    """Make queries with documents, of words that are one token each. They are the same in each call.

    Args:
        model: Its tokenizer is used.
        batch: Number of queries.
        shape: Lengths, in words.

    Returns:
        The queries, and for each query its documents.
    """
    import torch

    words = one_token_words(model.tokenizer)
    random = torch.Generator().manual_seed(0)

    def text(tokens: int) -> str:
        return " ".join(words[place] for place in torch.randint(len(words), (tokens,), generator=random))

    queries = [text(shape.query_tokens) for _ in range(batch)]
    return queries, [[text(shape.document_tokens) for _ in range(shape.documents)] for _ in range(batch)]


def one_token_words(tokenizer: Any) -> list[str]:
    """Return at most 1,000 words that are one token after a space; `["a"]` if the tokenizer has none."""
    found = []
    for number in range(len(tokenizer)):
        word = tokenizer.decode([number]).strip()
        if word.isascii() and word.isalpha() and word.islower():
            ids = tokenizer(f"a {word} {word}", add_special_tokens=False)["input_ids"]
            if len(ids) == 3 and ids[1] == ids[2] == number:
                found.append(word)
                if len(found) == 1000:
                    break
    return found or ["a"]


def flops(call: Callable[[], object]) -> float:
    """Count the FLOPs of matrix products and attention in a call, by torch.

    Args:
        call: Is called once.

    Returns:
        Floating-point operations; a multiply-add is two.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    # torch has no formula for attention on a CPU; those of torch 2.11 for GPUs fail if heads share keys.
    def count_attention(query: Any, _: Any, value: Any, *__: Any, **___: Any) -> int:
        batch, heads, tokens, width = query
        read, carried = value[-2:]
        return int(2 * batch * heads * tokens * read * (width + carried))

    # It has none either for cuDNN's recurrent layers, whose input is packed, [tokens, width]. On a CPU these
    # layers are matrix products, which torch counts.
    def count_recurrent(read: Any, weights: Any, *_: Any, **__: Any) -> int:
        return int(2 * read[0] * sum(math.prod(shape) for shape in weights if len(shape) == 2))

    aten = torch.ops.aten
    known: dict[Any, Callable[..., int]] = {aten._cudnn_rnn: count_recurrent}
    known |= {getattr(aten, f"_scaled_dot_product_{name}"): count_attention for name in _ATTENTION}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        call()
    return float(counter.get_total_flops())


def describe_machine() -> str:
    """Describe processor or GPU, cores and versions; every figure is reported with this."""
    import torch

    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{cores} cores of {name}, Python {platform.python_version()}, torch {torch.__version__}"


@contextlib.contextmanager
def _peak(device: "torch.device", peaks: dict[str, int | None], name: str) -> Iterator[None]:
    """Record the peak of memory inside the block, if it is higher than the peak recorded before."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield
        peak: int | None = torch.cuda.max_memory_allocated(device)
    else:
        reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
        with contextlib.suppress(OSError):  # macOS, or not permitted: the peak is then since the start
            reset.write_text("5", encoding="ascii")
        yield
        lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
        peak = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
    before = peaks.get(name)
    peaks[name] = peak if before is None or peak is None else max(before, peak)


def _wait(device: "torch.device") -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""A student's generator by transformers and by OpenVINO: seconds to read a prompt, milliseconds a step.

SmolLM2-135M; prompts of 150 positions: 10 documents at 16x, a query and the instructions; one answer and 8 at
a time; in float32 and, where the processor multiplies it, bfloat16. The bar for one answer is 20 ms a step.
"""

import statistics
import time
from collections.abc import Callable

import torch
from common import arguments, close, fast_dtype, machine, verdict

from scaledown.models.sources import resolve
from scaledown.models.weights import quiet_libraries
from scaledown.student.decoding import Decoding
from scaledown.student.engines.openvino import OpenVINODecoding, generator_graph
from scaledown.student.engines.steps import RowDecoding
from scaledown.student.model import ScaleDownModel
from scaledown.student.settings import ScaleDownConfig

GENERATOR = "bundled:smollm2-135m"
POSITIONS, STEPS, BATCHES, REPEATS = 150, 32, (1, 8), 5
BAR = 20.0  # ms


def seconds(call: Callable[[], None]) -> float:
    """Of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@torch.inference_mode()
def measure(decoding: RowDecoding, embedded: torch.Tensor, steps: int) -> tuple[float, float]:
    """Seconds to read prompts, and the median of a step after them."""
    mask = torch.ones(embedded.shape[:2], dtype=torch.long)
    read = seconds(lambda: decoding.join(embedded, mask))
    tokens = torch.full((len(embedded),), 7)
    taken = [seconds(lambda: decoding.step(tokens)) for _ in range(steps)]
    decoding.keep([])
    return read, statistics.median(taken)


def main() -> None:
    options = arguments(__doc__)
    quiet_libraries()
    print(f"{machine()}\n{GENERATOR}, prompts of {POSITIONS} positions")
    print("  dtype     answers  engine            s to read  ms a step")
    best: dict[tuple[int, str], float] = {}
    for dtype in dict.fromkeys(("float32", fast_dtype())):
        config = ScaleDownConfig(num_layers=5)
        model = ScaleDownModel.build(config, resolve(GENERATOR), dtype=getattr(torch, dtype)).eval()
        model.merge_lora()
        graph, rounded = (
            generator_graph(model, resolve(GENERATOR), eight_bits=eight) for eight in (False, True)
        )
        embeddings = model.get_input_embeddings()
        engines = {
            "transformers": Decoding(model.generator),
            "openvino": OpenVINODecoding(graph, embeddings, model.dtype),
            "openvino, 8 bits": OpenVINODecoding(rounded, embeddings, model.dtype),
        }
        for batch in BATCHES:
            ids = torch.randint(1000, 40_000, (batch, POSITIONS), generator=torch.Generator().manual_seed(0))
            embedded = embeddings(ids).detach()
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
            for _ in range(1 + (1 if options.quick else REPEATS)):
                for name, decoding in engines.items():
                    found[name].append(measure(decoding, embedded, 4 if options.quick else STEPS))
            for name, rounds in found.items():
                read, step = map(statistics.median, zip(*rounds[1:], strict=True))
                best[batch, name] = min(best.get((batch, name), step), step)
                print(f"  {dtype:<9} {batch:>6}  {name:<17} {read:>9.2f}  {1000 * step:>9.1f}", flush=True)
    met = True
    for name in ("openvino", "openvino, 8 bits"):
        step = 1000 * best[1, name]
        met &= verdict(f"one answer, {name}", f"{step:.1f} ms a step", f"{BAR:.0f} ms", met=step <= BAR)
    close("student_decode", best[1, "transformers"] / best[1, "openvino"], 1.0, also=met or options.quick)


if __name__ == "__main__":
    main()

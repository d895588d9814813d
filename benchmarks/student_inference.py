"""Compression and generation against the documents' text, same model and inputs: FLOPs and time.

10 documents of 128 tokens, 32 new tokens (arXiv 2504.07109, table 5), SmolLM2-135M, in bfloat16 where the
processor multiplies it; --device cuda on a GPU. FLOPs are those of matrix products and attention, as torch
counts them. The model is untrained: what it answers does not matter here.
"""

import functools
import itertools
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from common import close, fast_dtype, machine, paired, parser, verdict
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula, sdpa_flop_count

from scaledown.models.sources import resolve
from scaledown.models.weights import quiet_libraries
from scaledown.student.engines.openvino import OpenVINODecoding, generator_graph
from scaledown.student.engines.steps import StepGeneration
from scaledown.student.model import ScaleDownModel
from scaledown.student.settings import ScaleDownConfig

GENERATOR = "bundled:smollm2-135m"
DOCUMENTS = 10
DOCUMENT_TOKENS = 128
NEW_TOKENS = 32
LAYERS = (5, 8)
QUERIES = (16, 128)
BATCHES = (4, 8, 16, 32, 64, 128, 256)  # the last is the paper's
LONGEST_STEP = 30.0  # seconds, after which a CPU is not asked for larger ones
BAR = 2.2
REPEATS = 3


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def attention_on_cpu(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """torch does not count this one."""
    return sdpa_flop_count(query, key, value)


def build(layers: int, device: str) -> ScaleDownModel:
    config = ScaleDownConfig(num_layers=layers, doc_max_length=DOCUMENT_TOKENS)
    dtype = torch.bfloat16 if device.startswith("cuda") else getattr(torch, fast_dtype())
    model = ScaleDownModel.build(config, resolve(GENERATOR), dtype=dtype, device=device).eval()
    model.merge_lora()
    model.generator.generation_config.eos_token_id = []  # no answer ends early
    return model


@functools.cache
def words(tokenizer: Any) -> list[str]:
    """That are one token each."""
    return sorted(token for token in tokenizer.get_vocab() if re.fullmatch("Ġ[a-z]+", token))


def text(model: ScaleDownModel, tokens: int, seed: int) -> str:
    """So many words, and tokens."""
    known = words(model.tokenizer)
    chosen = torch.randint(len(known), (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    return "".join(known[number].replace("Ġ", " ") for number in chosen)


def question(model: ScaleDownModel, tokens: int, batch: int) -> Callable[..., list[str]]:
    queries = [text(model, tokens, number) for number in range(batch)]
    documents = [
        [text(model, DOCUMENT_TOKENS, 1000 * number + place) for place in range(1, DOCUMENTS + 1)]
        for number in range(batch)
    ]
    (read,) = model.reader.read(queries[0], documents[0][:1])
    assert len(read.ids) == tokens + DOCUMENT_TOKENS + 1, (
        "each word is a token, and a line end stands between"
    )

    def answer(*, compressed: bool) -> list[str]:
        asked = [
            model._question(query, own, NEW_TOKENS, compressed=compressed)
            for query, own in zip(queries, documents, strict=True)
        ]
        found = model._generate(asked, NEW_TOKENS)  # `answer` would halve a batch that does not fit
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return found

    return answer


def flops(call: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def largest_batch(model: ScaleDownModel) -> int:
    """The largest batch that fits and pays: with it, text is read at nine tenths of the best rate or more."""
    rates: dict[int, float] = {}
    for batch in BATCHES:
        side = functools.partial(question(model, max(QUERIES), batch), compressed=False)
        try:
            seconds = paired({"text": side}, 1)["text"].seconds
        except torch.OutOfMemoryError:
            break
        rates[batch] = batch / seconds
        print(f"  batch {batch}: {rates[batch]:.2f} queries/s of text", flush=True)
        if model.device.type == "cpu" and seconds > LONGEST_STEP:
            break
    return max(batch for batch, rate in rates.items() if rate >= 0.9 * max(rates.values()))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options.add_argument(
        "--engine",
        default="transformers",
        choices=("transformers", "openvino"),
        help="what writes the answers",
    )
    options = options.parse_args()
    quiet_libraries()
    print(f"{machine()}\n{GENERATOR}, bfloat16, {options.device}, {options.engine}")
    layers, queries = (LAYERS[:1], QUERIES[1:]) if options.quick else (LAYERS, QUERIES)
    figures = {}
    largest = 4 if options.quick else largest_batch(build(LAYERS[0], options.device))
    print("  layers  query  batch    FLOPs: text  compressed  ratio      time: text  compressed  ratio")
    for depth in layers:
        model, writer = build(depth, options.device), None
        if options.engine == "openvino":
            graph = generator_graph(model, resolve(GENERATOR))
            decoding = OpenVINODecoding(graph, model.get_input_embeddings(), model.dtype)
            writer = StepGeneration(model, decoding)
        for tokens, batch in itertools.product(queries, (1, largest)):
            answer = question(model, tokens, batch)
            sides = {
                "text": functools.partial(answer, compressed=False),
                "compressed": functools.partial(answer, compressed=True),
            }
            model.engine = None  # torch counts its own products alone
            counted = {name: flops(side) for name, side in sides.items()}
            model.engine = writer
            timed = paired(sides, 1 if options.quick else REPEATS)
            ratios = (
                counted["text"] / counted["compressed"],
                timed["text"].seconds / timed["compressed"].seconds,
            )
            figures[depth, tokens, batch] = ratios
            print(
                f"  {depth:>6}  {tokens:>5}  {batch:>5}  {counted['text'] / 1e9:>9,.0f} G  "
                f"{counted['compressed'] / 1e9:>8,.0f} G  {ratios[0]:>5.2f}  "
                f"{timed['text'].seconds:>12.2f} s  {timed['compressed'].seconds:>8.2f} s  {ratios[1]:>5.2f}",
                flush=True,
            )
    counted, alone = figures[5, 128, 1]
    many = figures[5, 128, largest][1]
    met = [
        verdict("FLOPs, 5 layers, query of 128", f"{counted:.2f}x", f"{BAR}x", met=counted >= BAR),
        verdict("time, batch of 1", f"{alone:.2f}x", f"{BAR}x", met=alone >= BAR),
    ]
    close("student_inference", many, BAR, also=all(met))


if __name__ == "__main__":
    sys.exit(main())

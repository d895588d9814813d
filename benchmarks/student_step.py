"""A training step against a plain loop that pads every document to the maximum, same model and examples.

SmolLM2-135M with 8 layers as its compressor and LoRA, 5 real passages a question; bfloat16 on CPU.
"""

import random
import sys

import torch
from common import SHARED, arguments, close, machine, paired, questions
from torch import nn

from scaledown.data import files
from scaledown.data.chunking import Chunker
from scaledown.data.corpus import cut_rows, plain
from scaledown.models import quiet_libraries, resolve
from scaledown.records import full_text
from scaledown.student.batch import IGNORED, Encoded, collate, longest_document
from scaledown.student.model import ScaleDownModel, load_tokenizer
from scaledown.student.settings import ScaleDownConfig

GENERATOR = "bundled:smollm2-135m"
FOLDERS = ("xquad-dev", "qed-dev", "cmu-dev")
DOCUMENTS = 5
BATCH = 8
MICRO = 4
STEPS = 4
REPEATS = 3
BAR = 1.5


def passages() -> list[str]:
    """Of at most 128 tokens of SPLADE's, as the pipeline cuts them."""
    chunker = Chunker(plain(load_tokenizer(resolve("bundled:splade-tiny"))), "tokens", 128)
    found = []
    for folder in FOLDERS:
        path = SHARED / folder / "kilt.jsonl"
        table = cut_rows(list(files.rows(path)), chunker, str(path), False).passages
        found += [full_text(passage["title"], passage["text"]) for passage in table.to_pylist()]
    return found


def plain_losses(model: ScaleDownModel, examples: list[Encoded], longest: int, prompt: int) -> torch.Tensor:
    """As a straightforward loop has it: all padded to the longest of the data, logits everywhere."""
    batch = collate(examples, model.config.memory_tokens)
    documents = [ids for example in examples for ids in example.document_ids]
    ids = torch.zeros(len(documents), longest, dtype=torch.long)
    for row, own in enumerate(documents):
        ids[row, : len(own)] = torch.tensor(own)
    group = {
        "ids": ids,
        "lengths": torch.tensor([len(own) for own in documents]),
        "places": torch.arange(len(documents)),
    }
    embeddings, _ = model.compress_ids([group])
    missing = prompt - batch["ids"].shape[1]
    padded = {name: nn.functional.pad(batch[name], (0, missing)) for name in ("ids", "is_memory")}
    labels = nn.functional.pad(batch["labels"], (0, missing), value=IGNORED)
    logits = model.generator(
        inputs_embeds=model.embed(padded["ids"], padded["is_memory"], embeddings), use_cache=False
    ).logits
    return nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
    )


def main() -> None:
    options = arguments(__doc__)
    quiet_libraries()
    torch.manual_seed(0)
    rng = random.Random(0)
    texts, asked = passages(), questions(FOLDERS)
    limit = longest_document(load_tokenizer(resolve(GENERATOR)), texts)
    model = ScaleDownModel.build(
        ScaleDownConfig(doc_max_length=limit), resolve(GENERATOR), dtype=torch.bfloat16
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    steps = 1 if options.quick else STEPS
    examples = [
        model.reader.encode(question, rng.sample(texts, DOCUMENTS), "It was so, as the passage says.")
        for question in rng.sample(asked, BATCH * steps)
    ]
    every = [model.reader.document_ids(question, [""])[0] for question in asked]
    longest = max(map(len, every)) + limit
    prompt = max(
        example.prompt_length(model.config.memory_tokens) + len(example.answer_ids) for example in examples
    )
    lengths = [len(ids) for example in examples for ids in example.document_ids]
    print(
        f"{machine()}\n{GENERATOR}, bfloat16, 8 layers, LoRA; {steps} steps of {BATCH} examples, "
        f"{MICRO} at a time\n"
        f"  {len(lengths)} documents with their query: {sum(lengths) / len(lengths):.0f} tokens on average, "
        f"{max(lengths)} at most here, {longest} in the data"
    )

    def run(losses) -> float:
        total = 0.0
        for start in range(0, len(examples), BATCH):
            for first in range(start, start + BATCH, MICRO):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = losses(sorted(examples[first : first + MICRO], key=lambda e: len(e.answer_ids)))
                (loss * MICRO / BATCH).backward()
                total += float(loss)
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return total

    model.eval()  # without dropout, so that both sides compute the same
    sides = {
        "ours": lambda: run(lambda part: model(**collate(part, model.config.memory_tokens)).loss),
        "plain": lambda: run(lambda part: plain_losses(model, part, longest, prompt)),
    }
    timed = paired(sides, 1 if options.quick else REPEATS)
    for name, side in timed.items():
        print(f"  {name:<6} {side.seconds / steps:.2f} s a step, loss {side.result:.4f}")
    close("student_step", timed["plain"].seconds / timed["ours"].seconds, BAR)


if __name__ == "__main__":
    sys.exit(main())

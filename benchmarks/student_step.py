"""A training step against a plain loop that pads every document to the maximum, same model and examples.

SmolLM2-135M with 8 layers as its compressor and LoRA, 5 passages retrieved for each real question, bfloat16.
The plain loop also pads prompts and has logits at every position, as loops do. A third side is ours with only
the documents' padding changed, and a fourth ours with torch's attention, which these two have as well.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import SHARED, close, machine, paired, parser
from torch import nn

from scaledown.config.train import TrainConfig
from scaledown.data.input import tables
from scaledown.data.input.chunking import Chunker
from scaledown.data.input.corpus import cut_rows, plain
from scaledown.data.retrieval import SPLADERetriever
from scaledown.devices.cpu_attention import use_matrix_products
from scaledown.models.sources import resolve
from scaledown.models.weights import quiet_libraries
from scaledown.student.batch import IGNORED, Batch, Encoded, EncodedDocument, Group, collate, group
from scaledown.student.model import ScaleDownModel, load_tokenizer
from scaledown.student.settings import ScaleDownConfig
from scaledown.student.training.setup import make_trainer
from scaledown.student.training.training_data import load_parts, measure_documents

GENERATOR = "bundled:smollm2-135m"
RETRIEVER = "bundled:splade-tiny"
FOLDERS = ("xquad-dev", "qed-dev")
DOCUMENTS = 5
BATCH = 8
STEPS = 3
REPEATS = 3
BAR = 1.5


def training_data(path: Path, folders: tuple[str, ...]) -> None:
    """Real questions with passages as the pipeline retrieves them; gold answers, for want of a teacher."""
    chunker = Chunker(plain(load_tokenizer(resolve(RETRIEVER))), "tokens", 128)
    corpus, asked = [], []
    for folder in folders:
        source = SHARED / folder / "kilt.jsonl"
        table = cut_rows(list(tables.rows(source, tables.CORPUS)), chunker).passages
        corpus += [
            {"id": row["passage_id"], "title": row["title"], "text": row["text"]} for row in table.to_pylist()
        ]
        lines = (SHARED / folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()
        asked += [json.loads(line) for line in lines]
    asked = asked[:: max(1, len(asked) // 200)]
    found = SPLADERetriever(RETRIEVER).retrieve([one["question"] for one in asked], corpus, top_k=DOCUMENTS)
    with path.open("w", encoding="utf-8") as file:
        for one, documents in zip(asked, found, strict=True):
            record = {"query": one["question"], "documents": documents, "answer": one["answers"][0]}
            file.write(json.dumps(record) + "\n")


def one_group(documents: list[list[int]], longest: int) -> list[Group]:
    """All documents padded to the same length."""
    ids = torch.zeros(len(documents), longest, dtype=torch.long)
    for row, own in enumerate(documents):
        ids[row, : len(own)] = torch.tensor(own)
    lengths = torch.tensor([len(own) for own in documents])
    (alone,) = group([EncodedDocument([0], 0, 1, 1)] * len(documents))
    return [{**alone, "ids": ids, "lengths": lengths}]


def plain_loss(model: ScaleDownModel, batch: Batch, prompt: int) -> torch.Tensor:
    """As a straightforward loop has it: prompts padded to the longest of the data, logits everywhere."""
    missing = prompt - batch["ids"].shape[1]
    ids, is_memory = (nn.functional.pad(batch[name], (0, missing)) for name in ("ids", "is_memory"))
    labels = nn.functional.pad(batch["labels"], (0, missing), value=IGNORED)
    embeddings = model.compress_ids(batch["groups"]).embeddings
    inputs = model.embed(ids.to(model.device), is_memory.to(model.device), embeddings)
    logits = model.generator(inputs_embeds=inputs, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels[:, 1:].flatten().to(model.device), ignore_index=IGNORED
    )


def measure(options: argparse.Namespace, folder: Path) -> float:
    """The ratio of the plain loop's time to the trainer's."""
    data = folder / "train.jsonl"
    training_data(data, FOLDERS[:1] if options.quick else FOLDERS)
    config = TrainConfig(
        train_data=(str(data),),
        output_dir=str(folder / "model"),
        generator_model=GENERATOR,
        batch_size=BATCH,
        eval_fraction=0.0,
        report_to="none",
        dtype="bfloat16",
        device=options.device,
    )
    parts = load_parts(config, folder)
    generator = resolve(GENERATOR)
    tokenizer = load_tokenizer(generator)
    limit = measure_documents([parts.train.examples], tokenizer, 0).longest
    settings = ScaleDownConfig(doc_max_length=limit, lora_dropout=0.0)  # so that all sides compute the same
    model = ScaleDownModel.build(settings, generator, dtype=torch.bfloat16, device=options.device)
    passes = make_trainer(model, config, parts.train, None, options.device).passes
    steps = 1 if options.quick else STEPS
    everything = [model.reader.encode(*parts.train.examples[row]) for row in parts.train.rows]
    chosen = everything[:: len(everything) // (BATCH * steps)][: BATCH * steps]
    longest = max(len(one.ids) for example in everything for one in example.documents)
    prompt = max(example.prompt_length + len(example.answer_ids) for example in everything)
    lengths = [len(one.ids) for example in chosen for one in example.documents]
    print(
        f"{machine()}\n{GENERATOR}, bfloat16, {options.device}; {steps} steps of {BATCH} examples\n"
        f"  {len(lengths)} documents with their query: {sum(lengths) / len(lengths):.0f} tokens on average, "
        f"the longest of the data {longest}"
    )

    def update() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        passes.optimizer.step()
        passes.optimizer.zero_grad()

    def ours(examples: list[Encoded]) -> float:
        return passes.gradients(examples)["answer_loss"]

    def padded(examples: list[Encoded], loss: Callable[[Batch], torch.Tensor]) -> float:
        total = 0.0
        tokens = sum(len(example.answer_ids) for example in examples)
        for start in range(0, BATCH, passes.micro_batch):
            part = examples[start : start + passes.micro_batch]
            documents = [one.ids for example in part for one in example.documents]
            batch: Batch = {**collate(part), "groups": one_group(documents, longest)}
            with torch.autocast(options.device, torch.bfloat16):
                mine = loss(batch) * (sum(len(example.answer_ids) for example in part) / tokens)
            mine.backward()
            total += float(mine.detach())
        return total

    def run(step: Callable[[list[Encoded]], float]) -> float:
        total = 0.0
        for start in range(0, len(chosen), BATCH):
            total += step(chosen[start : start + BATCH])
            update()
        return total / steps

    def by_torch(step: Callable[[list[Encoded]], float]) -> float:
        for part in (model.generator, model.compressor):
            part.set_attn_implementation("sdpa")
        total = run(step)
        if options.device == "cpu":
            use_matrix_products(model.generator, model.compressor)
        return total

    for own in passes.optimizer.param_groups:
        own["lr"] = 0.0  # so that every run computes the same
    sides = {
        "ours": lambda: run(ours),
        "ours, torch's attention": lambda: by_torch(ours),
        "ours, documents padded": lambda: by_torch(
            lambda part: padded(part, lambda batch: model(**moved(batch, options.device)).loss)
        ),
        "plain loop": lambda: by_torch(
            lambda part: padded(part, lambda batch: plain_loss(model, batch, prompt))
        ),
    }
    timed = paired(sides, 1 if options.quick else REPEATS)
    for name, side in timed.items():
        ratio = side.seconds / timed["ours"].seconds
        print(f"  {name:<24} {side.seconds / steps:6.2f} s a step  {ratio:5.2f}x   loss {side.result:.4f}")
    return timed["plain loop"].seconds / timed["ours"].seconds


def moved(batch: Batch, device: str) -> Batch:
    """With its tensors on the device; groups move by themselves."""
    return {name: value if name == "groups" else value.to(device) for name, value in batch.items()}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = options.parse_args()
    quiet_libraries()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        ratio = measure(options, Path(folder))
    close("student_step", ratio, BAR)


if __name__ == "__main__":
    sys.exit(main())

"""The loss of right answers, in nats per token, of trained pointers. It has less noise than accuracy.

`--work_dir` is the folder of a finished `benchmarks/learns.py`; each model answers its development questions.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from common import fast_dtype, machine, parser
from learns import records

from scaledown.student.batch import Encoded, collate
from scaledown.student.model import ScaleDownModel

BATCH = 12


def loss(model: ScaleDownModel, examples: Sequence[Encoded]) -> float:
    """The mean over all tokens of the answers, end tokens included."""
    total, tokens = 0.0, sum(len(one.answer_ids) for one in examples)
    for start in range(0, len(examples), BATCH):
        part = examples[start : start + BATCH]
        with torch.no_grad():
            own = float(model(**collate(part))["answer_loss"])
        total += own * sum(len(one.answer_ids) for one in part)
    return total / tokens


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("models", nargs="+", help="folders of trained pointers")
    flags.add_argument(
        "--work_dir", default="learns.work", help="where benchmarks/learns.py left its results"
    )
    options = flags.parse_args()
    work = Path(options.work_dir)
    asked = records(work / "development.queries.jsonl")
    gold = records(work / "development.gold.jsonl")
    right = {query["id"]: own["answers"][0] for query, own in zip(asked, gold, strict=True)}
    known = records(work / "development.jsonl")[: BATCH if options.quick else None]
    print(f"{machine()}, {fast_dtype()}; {len(known)} questions")
    for folder in options.models:
        model = ScaleDownModel.from_pretrained(folder, dtype=getattr(torch, fast_dtype()))
        found = {}
        for rate in (4, 16):
            found[f"{rate}x"] = [
                model.reader.encode(one["query"], one["documents"], right[one["query_id"]], rate=rate)
                for one in known
            ]
        for name, shown in (("text", True), ("closed book", False)):
            found[name] = []
            for one in known:
                ids = model.reader.answer_ids(right[one["query_id"]])
                documents = one["documents"] if shown else []
                read = model.reader.encode_text(one["query"], documents, len(ids))
                found[name].append(read._replace(answer_ids=ids))
        losses = ", ".join(f"{name} {loss(model, own):.3f}" for name, own in found.items())
        print(f"  {Path(folder).name}: {losses}", flush=True)


if __name__ == "__main__":
    main()

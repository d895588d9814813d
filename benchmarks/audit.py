"""Peak memory of `scaledown report` on a million training records with scores and right answers."""

import json
import random
import sys
import tempfile
import time
from pathlib import Path

from common import child, close, machine, parser

BAR = 1.0  # GB
RECORDS = 1_000_000
DOCUMENTS = 5
WORDS = [f"word{number}" for number in range(20_000)]


def write(folder: Path, count: int) -> tuple[Path, Path]:
    """Records that share a fiftieth of their documents, and right answers to a tenth of the queries."""
    draw = random.Random(0)
    shared = [" ".join(draw.choices(WORDS, k=60)) for _ in range(1000)]
    data, gold = folder / "train.jsonl", folder / "gold.jsonl"
    with data.open("w") as file, gold.open("w") as answers:
        for number in range(count):
            query = " ".join(draw.choices(WORDS, k=9)) + "?"
            documents = [" ".join(draw.choices(WORDS, k=60)) for _ in range(DOCUMENTS - 1)]
            own = " ".join(draw.choices(WORDS, k=60))
            documents.append(draw.choice(shared) if number % 10 == 0 else own)
            answer = " ".join(documents[draw.randrange(DOCUMENTS)].split()[10:14])
            scores = sorted((draw.gauss(0, 3) for _ in documents), reverse=True)
            record = {"query": query, "documents": documents, "answer": answer, "reranking_scores": scores}
            file.write(json.dumps(record) + "\n")
            if number % 10 == 0:
                answers.write(json.dumps({"question": query, "answer": [answer]}) + "\n")
    return data, gold


def report(folder: Path) -> dict[str, float]:
    """In a process of its own."""
    from scaledown.data.report.page import write_report

    started = time.perf_counter()
    names = (folder / "train.jsonl", folder / "report.html", folder / "card.md")
    made = write_report(*names, gold=[str(folder / "gold.jsonl")])
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return {
        "seconds": time.perf_counter() - started,
        "gigabytes": peak * 1024 / 1e9,
        "records": made.audit.records,
        "read": made.audit.sampled,
        "page": names[1].stat().st_size / 1e6,
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--child", help="folder of the data")
    options = options.parse_args()
    if options.child:
        print(json.dumps(report(Path(options.child))))
        return
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in (RECORDS // 20,) if options.quick else (RECORDS // 20, RECORDS):
            data, _ = write(folder, count)
            found = child([__file__, "--child", name])
            print(
                f"  {found['records']:>9,.0f} records, {data.stat().st_size / 1e9:.2f} GB: "
                f"{found['gigabytes']:.2f} GB, {found['seconds']:.0f} s; {found['read']:,.0f} read word for "
                f"word, a page of {found['page']:.1f} MB",
                flush=True,
            )
    close("audit", found["gigabytes"], BAR, lower=True)


if __name__ == "__main__":
    sys.exit(main())

"""A server that fails at 30% of its requests, and a killed run (SIGKILL): nothing is lost or paid twice."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from common import arguments, close, machine, verdict

from scaledown.data.prompts import Prompt
from scaledown.data.teacher.base import Rejection, TeacherSettings
from scaledown.data.teacher.engines.endpoint import EndpointTeacher
from scaledown.errors import one_line

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from misbehaving import Misbehaving, mark, mixture  # noqa: E402

KEPT_BEFORE_THE_KILL = 6


def faults(count: int) -> tuple[int, bool]:
    """Prompts answered or quarantined with a reason, and whether none was paid twice."""
    server = Misbehaving(mixture(seed=7))
    server.retry_after = "0.2"
    prompts = [
        Prompt(f"q{number}", "Be brief.", "Background:\n", (f"Document {number}.",), f"\n\nQuestion {number}")
        for number in range(count)
    ]
    started = time.perf_counter()
    teacher = EndpointTeacher(server.model, [server.url], TeacherSettings(), request_timeout=1.0)
    results = dict(teacher.answers(prompts))
    seconds = time.perf_counter() - started
    server.stop()
    reasons = Counter(result.reason for result in results.values() if isinstance(result, Rejection))
    twice = sum(times - 1 for times in server.paid.values())
    print(f"  {count} prompts, {server.asked.total()} requests, 30% of them fail: {seconds:.0f} s")
    print(f"  {len(results) - reasons.total()} answered, {reasons.total()} quarantined")
    for reason, times in reasons.most_common():
        print(f"    {times}: {one_line(reason, 90)}")
    return len(results), verdict("answers paid twice", str(twice), "0", met=not twice)


def words(output: Path, url: str) -> list[str]:
    """The command: all of it real but the server."""
    examples = ROOT / "examples"
    return [
        *(sys.executable, "-m", "scaledown.data.prepare_dataset", "--device", "cpu"),
        *("--corpus_path", str(examples / "corpus.jsonl"), "--queries_file", str(examples / "queries.txt")),
        *("--retriever_model", "bundled:splade-tiny", "--top_k_retrieval", "3", "--flush_seconds", "0.2"),
        *("--teacher_model", "wise-owl", "--teacher_endpoint", url, "--output_file", str(output)),
    ]


def kept(work: Path) -> set[str]:
    """Marks of the answers on disk, whole lines only."""
    marks = set()
    for path in work.glob("answers/*/*.part.jsonl"):
        for line in path.read_bytes().split(b"\n")[:-1]:
            if found := re.search(r"\b[0-9a-f]{16}\b", json.loads(line).get("text", "")):
                marks.add(found[0])
    return marks


def killed(folder: Path) -> bool:
    """Whether a run that is killed and started again asks for no answer that was on disk."""
    server = Misbehaving(mixture(seed=3, faults=("429", "500", "json")))
    server.delay = 0.5  # so that many are in flight at the kill
    output = folder / "train_data.json"
    work = output.with_name(output.name + ".work")
    process = subprocess.Popen(words(output, server.url), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and len(kept(work)) < KEPT_BEFORE_THE_KILL:
        time.sleep(0.02)
    if process.poll() is not None:
        raise SystemExit(f"the run ended before it could be killed: {process.stderr.read().decode()[-500:]}")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    while server.running:
        time.sleep(0.02)
    on_disk, before = kept(work), Counter(server.asked)
    again = subprocess.run(words(output, server.url), capture_output=True, text=True, check=False)
    server.stop()
    if again.returncode:
        raise SystemExit(f"the run did not go on: {again.stderr[-500:]}")
    repeated = sum(times for question, times in (server.asked - before).items() if mark(question) in on_disk)
    records = len(json.loads(output.read_text(encoding="utf-8")))
    paid = sum(times - 1 for times in server.paid.values())
    print(f"  killed with {len(on_disk)} answers on disk; the next run wrote all {records}")
    print(f"  paid again, as they were in flight at the kill: {paid}")
    return verdict("requests repeated for an answer on disk", str(repeated), "0", met=not repeated)


def main() -> None:
    options = arguments(__doc__)
    count = 100 if options.quick else 500
    print(machine())
    done, once = faults(count)
    with tempfile.TemporaryDirectory() as temporary:
        never = killed(Path(temporary))
    close("endpoint_faults", done / count, 1.0, also=once and never)


if __name__ == "__main__":
    main()

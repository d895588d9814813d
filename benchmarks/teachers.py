"""Teachers on a CPU: answers a second of each engine against transformers one prompt at a time, and accuracy.

Real questions with the three passages that SPLADE-tiny retrieves; an answer is right when it holds the gold
answer. Transformers and vLLM run in bfloat16, OpenVINO on the same weights at 8 bits, exported first where
need be; vLLM in an environment of its own (`make test-vllm`), where there is one.
"""

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import SHARED, close, machine, parser, verdict

from scaledown.data.prompts import Prompt, answer_prompt
from scaledown.data.retrieval import SPLADERetriever
from scaledown.data.teacher.base import Teacher, TeacherSettings
from scaledown.data.teacher.engines.openvino import OpenVINOTeacher, export_teacher
from scaledown.data.teacher.engines.transformers import TransformersTeacher
from scaledown.errors import install_command
from scaledown.metrics import accuracy
from scaledown.models.sources import resolve
from scaledown.records import Answer, DocumentDict, full_text

MODEL, DTYPE, BATCH, NEW_TOKENS, TOP = "bundled:smollm2-135m", "bfloat16", 16, 48, 3
RESAMPLES = 2000
OF_VLLM = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"


def real_prompts() -> tuple[list[Prompt], list[str]]:
    """A prompt for each question, and the gold answers."""
    folder = SHARED / "xquad-dev"
    passages: list[DocumentDict] = []
    for line in (folder / "kilt.jsonl").read_text(encoding="utf-8").splitlines():
        article = json.loads(line)
        title = article["wikipedia_title"]
        passages += [{"title": title, "text": text.strip()} for text in article["text"][1:]]
    asked = [
        json.loads(line) for line in (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    retriever = SPLADERetriever("bundled:splade-tiny", device="cpu")
    found = retriever.retrieve([one["question"] for one in asked], passages, TOP)
    prompts = [
        answer_prompt(one["id"], one["question"], [full_text(p["title"], p["text"]) for p in own], 0.0)
        for one, own in zip(asked, found, strict=True)
    ]
    return prompts, [one["answers"][0] for one in asked]


def spread(count: int, of: int) -> list[int]:
    """So many of the numbers below `of`, at even distances."""
    return np.linspace(0, of - 1, count).astype(int).tolist()


def run(name: str, teacher: Teacher, prompts: Sequence[Prompt]) -> tuple[float, list[str]]:
    """Answers a second, which are printed, and the answers."""
    # With the longest, for which vLLM starts.
    longest = sorted(prompts, key=lambda prompt: sum(map(len, prompt.documents)))[-4:]
    warm_up = [prompt._replace(documents=prompt.documents[::-1]) for prompt in longest]
    list(teacher.answers(warm_up))
    started = time.perf_counter()
    given = dict(teacher.answers(prompts))
    rate = len(prompts) / (time.perf_counter() - started)
    tokens = np.mean([one.answer_tokens for one in given.values() if isinstance(one, Answer)])
    print(f"  {name:<26} {rate:6.2f} answers/s  ({len(prompts)} questions, {tokens:.0f} tokens an answer)")
    return rate, [one.text if isinstance(one, Answer) else "" for _, one in sorted(given.items())]


def right(answers: Sequence[str], gold: Sequence[str]) -> np.ndarray:
    return np.array([accuracy(answer, [one]) for answer, one in zip(answers, gold, strict=True)])


def by_vllm(*, quick: bool) -> list[str]:
    """Answers of vLLM; its line is printed as it comes."""
    words = [str(OF_VLLM), __file__, "--vllm", *(["--quick"] if quick else [])]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        *lines, last = process.stdout.read().splitlines() or [""]
    print("\n".join(lines))
    if process.returncode:
        sys.exit("vLLM failed")
    return json.loads(last)


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--vllm", action="store_true", help="measure vLLM alone, here")
    options = flags.parse_args()
    source = resolve(MODEL)
    prompts, gold = real_prompts()
    chosen = spread(60 if options.quick else len(prompts), len(prompts))
    prompts, gold = [prompts[n] for n in chosen], [gold[n] for n in chosen]
    if options.vllm:
        from scaledown.data.teacher.api import load_teacher
        from scaledown.data.teacher.base import EngineSettings

        teacher = load_teacher(
            source, "cpu", DTYPE, TeacherSettings(NEW_TOKENS), EngineSettings(backend="vllm")
        )
        _, answers = run("vllm", teacher, prompts)
        teacher.close()  # type: ignore[attr-defined]
        print(json.dumps(answers))
        return
    some = [prompts[n] for n in spread(12 if options.quick else 200, len(prompts))]
    print(
        f"{machine()}\n{MODEL}, {DTYPE} on transformers, {len(prompts)} real questions ({len(some)} of "
        f"them one at a time), {TOP} retrieved passages each, at most {NEW_TOKENS} new tokens"
    )

    def transformers(batch: int) -> Teacher:
        return TransformersTeacher(source, "cpu", DTYPE, TeacherSettings(NEW_TOKENS, batch_size=batch))

    base, _ = run("transformers, batch 1", transformers(1), some)
    batched, answers = run(f"transformers, batch {BATCH}", transformers(BATCH), prompts)
    theirs = right(answers, gold)
    ratio = batched / base
    fast = verdict(f"transformers, batch {BATCH}", f"{ratio:.2f}x", "1.4x", met=ratio >= 1.4)
    if OF_VLLM.exists():
        print(f"  accuracy of vllm: {right(by_vllm(quick=options.quick), gold).mean():.3f}")
    else:
        print("  not measured: vllm (make test-vllm)")
    print("  not measured: endpoint (its server's speed)")
    if importlib.util.find_spec("openvino_genai") is None:
        print(f"  not measured: openvino ({install_command('openvino')}); accuracy {theirs.mean():.3f}")
        close("teachers", ratio, 1.4)
    export_teacher(source)
    teacher = OpenVINOTeacher(source, TeacherSettings(NEW_TOKENS))
    rate, answers = run("openvino", teacher, prompts)
    ours = right(answers, gold)
    draws = np.random.default_rng(0).integers(0, len(gold), (RESAMPLES, len(gold)))
    low, high = np.quantile((ours - theirs)[draws].mean(axis=1), [0.025, 0.975])
    print(f"  accuracy: transformers {theirs.mean():.3f}, openvino {ours.mean():.3f}")
    same = verdict(
        "openvino - transformers, 95% interval",
        f"{ours.mean() - theirs.mean():+.3f} [{low:+.3f}, {high:+.3f}]",
        "contains 0",
        met=low <= 0 <= high,
    )
    close("teachers", rate / base, 4, also=fast and same)


if __name__ == "__main__":
    main()

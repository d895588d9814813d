"""`make demo`: the whole product in small, from the sample corpus to the answer of a trained student.

    python examples/demo.py [FOLDER]

It makes training data, keeps some questions apart, trains a pointer student on the right answers to the
others, measures what a question's own documents and another question's are worth to the student, and lets it
answer one question.
Each command is printed before it runs; what it logs goes to FOLDER/COMMAND.log. What is finished is kept:
after Ctrl-C, run it again.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, NamedTuple

from scaledown.command import program_name
from scaledown.devices.choice import choose_device
from scaledown.run.atomic import read_json, write_json

EXAMPLES = Path(os.path.relpath(Path(__file__).parent))
RIGHT = EXAMPLES / "queries.jsonl"
"""Right answers to the questions."""
WIDTH = 100


class Size(NamedTuple):
    """How much of everything."""

    data: tuple[str, ...] = ("--preset", "demo")
    generator: str = "bundled:smollm2-135m"
    layers: int = 4
    cloze_steps: int = 40
    cloze_batch: int = 8
    steps: int = 12
    batch: int = 4
    new_tokens: int = 32


class Stopped(Exception):  # noqa: N818 (no error of ours)
    """A command did not end well; the exit status."""


def main(folder: Path, size: Size) -> None:
    """All steps. Those that are finished answer at once."""
    data, model = folder / "train_data.json", folder / "model"
    folder.mkdir(parents=True, exist_ok=True)

    print("Training data: passages are found and reranked, a teacher answers", flush=True)
    flags: tuple[object, ...] = ("--queries_file", EXAMPLES / "queries.txt", "--output_file", data)
    print(run(folder, "prepare", *size.data, *fast(size), *flags))

    print("\nSplit: some questions are kept for the end")
    print(run(folder, "split", data, "--fraction", 0.25, "--output_dir", folder / "split"))
    taught, held_out = folder / "split" / "train.json", folder / "split" / "held_out.json"
    small = ("--gold", RIGHT, "--eval_fraction", 0, "--save_steps", 1000, "--report_to", "none", "--resume")

    print("\nPretraining: a student learns to find the names and numbers that questions leave out")
    flags = ("--compressor", "pointer", "--num_layers", size.layers, "--compression_rate", 4)
    flags += ("--generator_model", size.generator, "--lora_dropout", 0, "--train_data", taught)
    flags += ("--corpus_path", EXAMPLES / "corpus.jsonl", "--leave_out", held_out)
    flags += ("--max_steps", size.cloze_steps, "--batch_size", size.cloze_batch)
    print(run(folder, "pretrain", *flags, *small, "--output_dir", folder / "pretrained"))

    print("\nTraining: it learns to answer from the tokens that it picks of the documents")
    flags = ("--pretrained_model", folder / "pretrained", "--train_data", taught)
    flags += ("--learning_rate_generator", 5e-4, "--max_steps", size.steps, "--batch_size", size.batch)
    print(run(folder, "train", *flags, *small, "--output_dir", model))
    for checkpoint in [*folder.glob("*/checkpoint-*")]:  # both runs are finished: nothing goes on from these
        shutil.rmtree(checkpoint)

    found = read_json(folder / "taste.json")
    if not found or found["of"] != (model / "settings.json").stat().st_mtime_ns:
        print("\nWhat it has learned (this loads the student)", flush=True)
        found = taste(model, with_right_answers(read_json(held_out)), size.new_tokens)
        write_json(folder / "taste.json", found)
    print(summary(found, size, folder))


def fast(size: Size) -> tuple[str, ...]:
    """The teacher's engine: OpenVINO on a CPU. `auto` does not choose it before the teacher is exported."""
    there = importlib.util.find_spec("openvino_genai") is not None
    if size == Size() and there and choose_device("auto") == "cpu":
        return ("--teacher_backend", "openvino")
    return ()


def run(folder: Path, command: str, *flags: object) -> str:
    """Run a command of the product; gives what it prints at its end, without the next command."""
    words = [command, *map(str, flags)]
    shown = textwrap.wrap(f"$ {program_name()} {shlex.join(words)}", WIDTH, break_on_hyphens=False)
    print(" \\\n    ".join(shown), flush=True)
    log = folder / f"{command}.log"
    with log.open("a") as errors:
        process = subprocess.Popen(  # noqa: S603 (our own words)
            [sys.executable, "-m", "scaledown", *words], stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            printed = watched(process, log)
        except KeyboardInterrupt:  # the command has it, too, and keeps what is done
            process.wait()
            raise
    if process.returncode:
        print(*log.read_text().splitlines()[-3:], f"to begin anew: rm -r {folder}", sep="\n", file=sys.stderr)
        raise Stopped(process.returncode)
    return textwrap.indent(printed.partition("\nnext")[0].strip(), "  ")


def watched(process: subprocess.Popen[str], log: Path) -> str:
    """What a process prints until its end; on a terminal, its progress is shown in one line."""
    started = time.monotonic()
    while True:
        try:
            printed, _ = process.communicate(timeout=1)
        except subprocess.TimeoutExpired:
            (*_, last) = ["", *log.read_text().splitlines()]
            replace(f"  {time.monotonic() - started:.0f} s  {last.partition(' INFO ')[2]}")
        else:
            replace("")
            return printed


def replace(line: str) -> None:
    """On a terminal, one line in place of the one before; elsewhere nothing."""
    if sys.stdout.isatty():
        print(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)


def with_right_answers(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records whose question has a right answer, with it instead of the teacher's."""
    from scaledown.data.input.gold import read_gold

    gold = read_gold([str(RIGHT)], "--gold")
    found = ((one, gold.answers(one["query"])) for one in records)
    return [one | {"answer": answers[0]} for one, answers in found if answers]


def taste(model_folder: Path, held: list[dict[str, Any]], new_tokens: int) -> dict[str, Any]:
    """What the student makes of questions that it has not seen."""
    import torch

    from scaledown.student.batch import collate
    from scaledown.student.model import ScaleDownModel

    model = ScaleDownModel.from_pretrained(model_folder)
    own = [record["documents"] for record in held]
    losses = []  # [own documents, another question's][question]: nats a token of the right answer
    for documents in (own, [*own[1:], own[0]]):
        read = [
            model.reader.encode(record["query"], texts, record["answer"])
            for record, texts in zip(held, documents, strict=True)
        ]
        with torch.no_grad():
            losses.append([float(model(**collate([one]))["answer_loss"]) for one in read])
    gains = [others - mine for mine, others in zip(*losses, strict=True)]
    asked = held[gains.index(max(gains))]
    query, documents = asked["query"], asked["documents"]
    read = model.reader.read(query, documents)
    return {
        "of": (model_folder / "settings.json").stat().st_mtime_ns,
        "questions": len(held),
        "losses": [sum(own) / len(own) for own in losses],
        "query": query,
        "right": asked["answer"],
        "tokens": sum(one.stop - one.start for one in read),
        "embeddings": sum(one.memory for one in read),
        "student": model.answer(query, documents, max_new_tokens=new_tokens),
        "text": model.answer(query, documents, max_new_tokens=new_tokens, compressed=False),
        "nothing": model.answer(query, [], max_new_tokens=new_tokens),
    }


def summary(found: dict[str, Any], size: Size, folder: Path) -> str:
    """The summary, in plain words."""
    own, others = found["losses"]
    answers = {
        f"the student, {found['embeddings']:,} embeddings": found["student"],
        f"the text, {found['tokens']:,} tokens": found["text"],
        "no documents": found["nothing"],
    }
    lines = "\n".join(f"    {name:<28} {' '.join(text.split())}" for name, text in answers.items())
    learned = f"{size.cloze_steps} steps of {size.cloze_batch} and {size.steps} of {size.batch} examples"
    scaledown, model = program_name(), folder / "model"
    held_out = folder / "split" / "held_out.json"
    return f"""
This was a taste. {learned}: a student that has learned so little
makes many mistakes. docs/results.md shows what longer training does.

  {found["questions"]} questions were kept out of training. The student's loss over the right answers to
  them, in nats a token (less is better):

    with a question's own documents   {own:.2f}
    with another question's           {others:.2f}

  What the embeddings tell the generator about a question is the difference, {others - own:.2f}.
  The question whose documents helped most:

  {found["query"]} ({found["right"]}) One generator, reading:

{lines}

look: {folder / "train_data.json.work" / "report.html"}
next: {scaledown} evaluate --model {model} --data {held_out} --gold {RIGHT} \\
        --systems compressed uncompressed closed_book --output_dir {folder / "evaluation"}
      {scaledown} answer --model {model} --data {held_out} --output_file {folder / "answers.jsonl"}
      {scaledown} serve --model {model}
"""


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"), Size())
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except Stopped as stopped:
        sys.exit(stopped.args[0])

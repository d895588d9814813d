"""What a GPU alone can show: a table of checks, what is expected beside what is found.

Weights are random and of the real shapes; nothing is downloaded. Status 1 when a check falls short. The same
rows as JSON are for an issue. Rows that a CPU can do are done in the tests, by this code at tiny shapes.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
)

from scaledown.config.evaluate import COMPRESSED, UNCOMPRESSED
from scaledown.config.prepare import PrepareConfig
from scaledown.config.train import TrainConfig
from scaledown.data.prompts import answer_prompt
from scaledown.data.reranker.api import load_reranker
from scaledown.data.reranker.base import Pair
from scaledown.data.retrieval.encoders import load_encoder
from scaledown.data.retrieval.splade import max_logits, max_logits_tiled
from scaledown.data.teacher.base import Rejection, TeacherSettings, answer_all
from scaledown.data.teacher.engines.transformers import TransformersTeacher
from scaledown.devices.choice import choose_device, dtype_to_run, dtype_to_train
from scaledown.devices.gpus import GIB, OnDevice, give_back, index
from scaledown.errors import ModelError
from scaledown.evaluation.efficiency import Shape, costs, describe_machine
from scaledown.models.sources import resolve
from scaledown.models.weights import loadable
from scaledown.student.model import ScaleDownModel
from scaledown.student.settings import ScaleDownConfig
from scaledown.student.training.memory import memory_of
from scaledown.student.training.origin import find_origin
from scaledown.student.training.setup import make_trainer
from scaledown.student.training.training_data import load_parts

ROOT = Path(__file__).resolve().parents[1]
WORDS = ("tower", "river", "moon", "bread", "queen", "glass", "winter", "paper", "stone", "music")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Of the largest logit. Tiles round their products; the kernel does not."""


class Check(NamedTuple):
    """A row of the table."""

    name: str
    expected: str
    found: str
    met: bool


class Scale(NamedTuple):
    """The models and the work: as users have them, or so small that a test does them on a CPU."""

    device: str
    encoder: dict[str, Any]
    reranker: dict[str, Any]
    teacher: dict[str, Any]
    kernel_batch: int = 256
    kernel_widths: tuple[int, ...] = (128, 768)
    kernel_longest: int = 512
    texts: int = 2048
    pairs: int = 512
    prompts: int = 64
    new_tokens: int = 32
    batches: tuple[int, ...] = (32, 128, 256, 512)
    demo: tuple[str, ...] = ("--preset", "demo")
    kill_after: float = 20.0  # seconds
    student: str = "bundled:smollm2-135m"
    layers: int = 8
    examples: int = 8
    answered: tuple[int, ...] = (1, 8, 64)
    shape: Shape = Shape()
    small_gpu: int = 24 * GIB
    backend: str = "vllm"


REAL = Scale(
    device="cuda",
    encoder={},  # BERT-base is what the configuration says
    reranker={"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    | {"intermediate_size": 4096, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    | {"position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True},
    teacher={},  # and Mistral-7B
)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TINY = Scale(
    device="cpu",
    kill_after=2.0,
    encoder=SMALL,
    reranker=SMALL,
    teacher=SMALL | {"num_key_value_heads": 2, "head_dim": 16},
    kernel_batch=4,
    kernel_widths=(16,),
    kernel_longest=70,
    texts=12,
    pairs=12,
    prompts=4,
    new_tokens=4,
    batches=(2, 4),
    layers=1,
    examples=4,
    answered=(1, 2),
    shape=Shape(query_tokens=4, documents=2, document_tokens=16, new_tokens=3),
    backend="transformers",  # a CPU has vLLM only in a build of its own
)


# Models of random weights


def save(model: Any, tokenizer: str, folder: Path) -> Path:
    """A model beside the tokenizer of a bundled one."""
    name, pinned = loadable(resolve(tokenizer))
    AutoTokenizer.from_pretrained(name, **pinned).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


class Models(dict[str, Path]):
    """Encoder, reranker and teacher, each in a folder; made when it is first asked for."""

    def __init__(self, scale: Scale, folder: Path) -> None:
        super().__init__()
        self._scale = scale
        self._folder = folder

    def __missing__(self, name: str) -> Path:
        before = torch.get_default_dtype()
        torch.manual_seed(0)
        torch.set_default_dtype(dtype_to_run("auto", self._scale.device))
        try:
            with torch.device(self._scale.device):
                model = MADE[name](self._scale)
        finally:
            torch.set_default_dtype(before)
        tokenizer = "bundled:smollm2-135m" if name == "teacher" else "bundled:splade-tiny"
        self[name] = save(model, tokenizer, self._folder / name)
        del model
        give_back()
        return self[name]


def new_encoder(scale: Scale) -> BertForMaskedLM:
    model = BertForMaskedLM(BertConfig(vocab_size=30522, **scale.encoder))
    decoder = model.get_output_embeddings()  # without this bias, half of the vocabulary is in each vector
    decoder.bias.data.fill_(-0.06 * decoder.weight.shape[1] ** 0.5)
    return model


def new_reranker(scale: Scale) -> DebertaV2ForSequenceClassification:
    return DebertaV2ForSequenceClassification(
        DebertaV2Config(vocab_size=30522, num_labels=1, **scale.reranker)
    )


def new_teacher(scale: Scale) -> MistralForCausalLM:
    settings = {"vocab_size": 49152, "eos_token_id": 2, "bos_token_id": 1} | scale.teacher
    return MistralForCausalLM(MistralConfig(**settings))


MADE: dict[str, Callable[[Scale], Any]] = {
    "encoder": new_encoder,
    "reranker": new_reranker,
    "teacher": new_teacher,
}


def text(number: int, words: int) -> str:
    """Some words that differ from those of other numbers."""
    return " ".join(WORDS[(number * 7 + place * (number % 5 + 1)) % len(WORDS)] for place in range(words))


# The checks. Each gives its rows; one that raises is a row, too.


def of_device(scale: Scale, models: dict[str, Path]) -> Iterator[Check]:
    device = choose_device(scale.device)
    found = float(torch.ones(2, device=device).sum())
    yield Check("device", f"computes on {scale.device}", describe_machine(), found == 2)
    dtype = dtype_to_run("auto", device)
    code = f"import torch; print(torch.ones(2, device={device!r}).sum().item())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    yield Check(
        "a process started after the device was chosen",
        "computes there",
        child.stdout.strip(),
        not child.returncode,
    )
    compiler = importlib.util.find_spec("triton") is not None
    yield Check(
        "dtype, compiler", "told", f"{dtype}, Triton {'is' if compiler else 'is not'} there", met=True
    )


def of_kernel(scale: Scale, models: dict[str, Path]) -> Iterator[Check]:
    torch.manual_seed(0)
    for width in scale.kernel_widths:
        length = torch.randint(1, scale.kernel_longest + 1, (scale.kernel_batch,), device=scale.device)
        length[:3] = torch.tensor([1, scale.kernel_longest, min(130, scale.kernel_longest)])[
            : len(length[:3])
        ]
        for dtype, error in TOLERANCE.items():
            hidden = torch.randn(
                scale.kernel_batch, scale.kernel_longest, width, device=scale.device, dtype=dtype
            )
            weight = torch.randn(4096, width, device=scale.device, dtype=dtype)
            exact = torch.stack(
                [
                    (states[:real].double() @ weight.double().T).amax(0)
                    for states, real in zip(hidden, length.tolist(), strict=True)
                ]
            )
            found = max_logits(hidden, length, weight, None)
            off = float((found.double() - exact).abs().max() / exact.abs().max())
            name = f"SPLADE head, width {width}, {dtype}"
            yield Check(name, f"within {error:g} of float64", f"{off:.1e}", off <= error)
            if hidden.is_cuda:
                faster = ratio(hidden, length, weight)
                yield Check(f"{name}, against tiles", "2x", f"{faster:.1f}x", faster >= 2)


def ratio(hidden: torch.Tensor, length: torch.Tensor, weight: torch.Tensor) -> float:
    """How many times as fast as in tiles."""
    slow, fast = (
        seconds(lambda head=head: head(hidden, length, weight, None))
        for head in (max_logits_tiled, max_logits)
    )
    return slow / fast


def of_encoding(scale: Scale, models: dict[str, Path]) -> Iterator[Check]:
    texts = [text(number, 100) for number in range(scale.texts)]
    source = resolve(str(models["encoder"]))
    yield from used(
        *(scale, "encoding", "texts", len(texts), PrepareConfig.batch_for("batch_size", 0, scale.device)),
        lambda size: load_encoder(source, scale.device, "auto", size),
        lambda encoder: encoder.documents(texts, nothing),
    )


def of_reranking(scale: Scale, models: dict[str, Path]) -> Iterator[Check]:
    pairs = [Pair(text(number, 8), text(number + 1, 120)) for number in range(scale.pairs)]
    source = resolve(str(models["reranker"]))
    own = PrepareConfig.batch_for("reranker_batch_size", 0, scale.device)
    yield from used(
        *(scale, "reranking", "pairs", len(pairs), own),
        lambda size: load_reranker(source, scale.device, "auto", size),
        lambda reranker: reranker.score(pairs, nothing),
    )


def used(
    scale: Scale,
    name: str,
    items: str,
    count: int,
    own: int,
    load: Callable[[int], Any],
    work: Callable[[Any], object],
) -> Iterator[Check]:
    """A model with several batches: its rates, how busy the device is, what comes back of its memory."""
    rates: dict[int, float] = {}
    busy = lost = 0.0
    for size in sorted({*scale.batches, own}):
        free = free_memory(scale.device)
        model = OnDevice(name, scale.device, lambda size=size: load(size))
        rates[size] = count / seconds(lambda model=model: work(model()))
        if size == own:
            busy = share_busy(lambda model=model: work(model()), scale.device)
        model.release()
        lost = max(lost, free - free_memory(scale.device))
    yield share(name, items, rates, own)
    yield Check(f"{name}, the device in batches of {own}", "a busy rate of 60%", f"{busy:.0%}", busy >= 0.6)
    yield Check(
        f"{name}, released", "free memory back within 1 GiB", f"{lost / GIB:.2f} GiB are not", lost <= GIB
    )


def share_busy(work: Callable[[], object], device: str) -> float:
    """Which share of the time the device computes: its kernels; on a CPU, torch's functions."""
    kind, time_of = "CPU", "self_cpu_time_total"
    if device.startswith("cuda"):
        kind, time_of = "CUDA", "self_device_time_total"
    with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, kind)]) as profile:
        wait()
        started = time.perf_counter()
        work()
        wait()
        taken = time.perf_counter() - started
    own = [event for event in profile.key_averages() if event.device_type == getattr(DeviceType, kind)]
    return float(sum(getattr(event, time_of) for event in own)) / 1e6 / taken  # from microseconds


def share(name: str, items: str, rates: dict[int, float], own: int) -> Check:
    """How near the default batch comes to the best one."""
    best = max(rates.values())
    told = ", ".join(f"{size}: {rate:,.0f}" for size, rate in sorted(rates.items()))
    found = f"{rates[own] / best:.0%} at {own}; {items}/s by batch: {told}"
    return Check(name, "60% of the best batch's rate", found, rates[own] >= 0.6 * best)


def of_teacher(scale: Scale, models: dict[str, Path]) -> Iterator[Check]:
    source = resolve(str(models["teacher"]))
    size = sum(file.stat().st_size for file in models["teacher"].glob("*.safetensors"))
    documents = [text(number, 100) for number in range(5)]
    prompts = [answer_prompt(str(n), text(n, 8), documents, 0.0) for n in range(scale.prompts)]
    kinds: dict[str, dict[str, Any]] = {"": {}}
    if importlib.util.find_spec("bitsandbytes") and scale.device.startswith("cuda"):
        kinds |= {" in 8 bits": {"load_in_8bit": True}, " in 4 bits": {"load_in_4bit": True}}
    for kind, bits in kinds.items():
        for batch in scale.batches[:2]:
            generation = TeacherSettings(scale.new_tokens, batch_size=batch, **bits)
            teacher = OnDevice(
                "the teacher",
                scale.device,
                lambda given=generation: TransformersTeacher(source, scale.device, "auto", given),
            )
            free = free_memory(scale.device)
            with host_memory() as peak:
                teacher()
            if not kind and batch == scale.batches[0]:
                most = max(GIB, size // 2)
                yield Check(
                    "teacher, host memory while loading",
                    f"at most {most / GIB:.1f} GiB of {size / GIB:.1f}",
                    f"{peak[0] / GIB:.1f} GiB",
                    peak[0] <= most,
                )
            started = time.perf_counter()
            answers = answer_all(teacher(), prompts)
            rate = len(answers) / (time.perf_counter() - started)
            halved = teacher().halving.count
            whole = not any(isinstance(answer, Rejection) for answer in answers)
            found = f"{rate:.2f}/s, {halved} halvings"
            yield Check(f"teacher{kind}, batches of {batch}", "answers", found, whole)
            teacher.release()
            lost = free - free_memory(scale.device)
            yield Check(
                f"teacher{kind}, batches of {batch}, released",
                "free memory back within 1 GiB",
                f"{lost / GIB:.2f} GiB are not",
                lost <= GIB,
            )


def of_capped_memory(scale: Scale, models: dict[str, Path]) -> Iterator[Check]:
    if not scale.device.startswith("cuda"):
        return
    source = resolve(str(models["teacher"]))
    told = "nothing"
    with at_most(GIB, scale.device):
        try:
            TransformersTeacher(source, scale.device, "auto", TeacherSettings())
        except ModelError as error:
            told = str(error)
    yield Check("a teacher that does not fit", "a hint", told[-90:], "--teacher_4bit" in told)
    encoder = load_encoder(resolve(str(models["encoder"])), scale.device, "auto", 512)
    texts = [text(number, 300) for number in range(512)]
    whole = encoder.documents(texts, nothing)
    with at_most(torch.cuda.memory_allocated() + GIB, scale.device):
        halved = encoder.documents(texts, nothing)
    off = abs(whole - halved).max()
    found = f"{encoder.halving.count} halvings, vectors differ by {off:.2g}"
    yield Check(
        "encoding in too little memory", "halved batches", found, encoder.halving.count > 0 and off < 0.5
    )


def of_demo(scale: Scale, models: dict[str, Path]) -> Iterator[Check]:
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"{name}.json" for name in ("one", "two", "killed")]
        prepare(scale, outputs[0], "--dry_run").wait()
        for output in outputs[:2]:
            prepare(scale, output).wait()
        yield plan(outputs[0].with_suffix(".log").read_text())
        killed = prepare(scale, outputs[2])
        try:
            killed.wait(timeout=scale.kill_after)
        except subprocess.TimeoutExpired:
            os.killpg(killed.pid, signal.SIGKILL)
            killed.wait()
            prepare(scale, outputs[2]).wait()
        made = [output.read_bytes() if output.exists() else b"" for output in outputs]
        for name, output, found in zip(("again", "killed and again"), outputs[1:], made[1:], strict=True):
            told = f"{len(found):,} bytes" if found else output.with_suffix(".log").read_text()[-90:]
            yield Check(f"a run, {name}", "the same bytes", told, bool(found) and found == made[0])


def plan(log: str) -> Check:
    """How far the plan of a run was off, as the run's log has it."""
    found = re.search(r"the plan said .*, it took .* \((\d+)% (more|less)\)", log)
    most = {"more": 100, "less": 50}
    met = found is not None and int(found[1]) <= most[found[2]]
    return Check("a run and its plan", "within 2x, a rate", found[0] if found else log[-90:], met)


def prepare(scale: Scale, output: Path, *flags: str) -> "subprocess.Popen[bytes]":
    """A run of `scaledown prepare` by itself; what it says is beside its output."""
    words = [sys.executable, "-m", "scaledown.data.prepare_dataset", *scale.demo, "--device", scale.device]
    words += ["--queries_file", str(ROOT / "examples" / "queries.txt"), "--teacher_backend", "transformers"]
    words += ["--output_file", str(output), *flags]
    with output.with_suffix(".log").open("wb") as said:
        return subprocess.Popen(words, stdout=said, stderr=said, start_new_session=True)


def of_training(scale: Scale, models: dict[str, Path]) -> Iterator[Check]:
    """A student by torchrun, in one process: the steps of `train.py` as many processes would take them."""
    with tempfile.TemporaryDirectory() as folder:
        data = records(Path(folder), 24, 60)
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
        words += [str(ROOT / "train.py"), "--train_data", str(data), "--generator_model", scale.student]
        words += ["--device", scale.device, "--num_layers", "1", "--batch_size", "8", "--eval_fraction", "0"]
        ways = {
            "": ["--max_steps", "3"],
            ", checkpointed": ["--max_steps", "3", "--gradient_checkpointing"],
            ", gone on with": ["--max_steps", "3", "--save_steps", "1", "--resume"],
        }
        for way, flags in ways.items():
            output = Path(folder) / f"model{len(way)}"
            command = [*words, *flags, "--output_dir", str(output)]
            if "--resume" in flags:
                stop_after_a_step(command, output)
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            made = (output / "model.safetensors").exists()
            told = "made" if made else (done.stderr or done.stdout).strip()[-90:]
            yield Check(f"training by torchrun{way}", "a model after 3 steps", told, made)


def records(folder: Path, count: int, words: int) -> Path:
    """Training data: questions with five documents of so many words."""
    data = folder / "train.json"
    documents = [text(number, words) for number in range(5)]
    data.write_text(
        json.dumps(
            [{"query": text(n, 6), "documents": documents, "answer": text(n, 4)} for n in range(count)]
        )
    )
    return data


def of_student(scale: Scale, models: dict[str, Path]) -> Iterator[Check]:
    """Steps of the paper's student; also with the memory of a small GPU."""
    ways: dict[str, tuple[int, dict[str, Any]]] = {"": (0, {})}
    if importlib.util.find_spec("bitsandbytes"):
        small = {"generator_4bit": True, "optimizer": "adamw8bit"}
        ways[f" in {scale.small_gpu // GIB} GiB, in 4 bits"] = (scale.small_gpu, small)
    for way, (room, flags) in ways.items():
        with tempfile.TemporaryDirectory() as folder, at_most(room, scale.device):
            config = TrainConfig(
                train_data=(str(records(Path(folder), scale.examples, 120)),),
                generator_model=str(models["teacher"]),
                num_layers=scale.layers,
                doc_max_length=128,
                batch_size=scale.examples,
                eval_fraction=0.0,
                max_steps=3,
                report_to="none",
                device=scale.device,
                output_dir=folder,
                **flags,
            )
            yield from steps(f"a student{way}", config)
        give_back()


def steps(name: str, config: TrainConfig) -> list[Check]:
    """Three steps: what is held besides activations, how many examples fit, how long one takes."""
    model = find_origin(config).load(dtype_to_train(config.dtype, config.device), config.device)
    taught, _, _ = load_parts(config, Path(config.output_dir))
    trainer = make_trainer(model, config, taught, None, config.device)
    passes, taken, found = trainer.passes, [], 0
    for places in trainer.batches.places:
        wait()
        started = time.perf_counter()
        passes.gradients([trainer.batches.examples[place] for place in places], rehearses=not taken)
        passes.optimizer.step()
        wait()
        taken.append(time.perf_counter() - started)
        found = held(model, passes.optimizer)
        passes.optimizer.zero_grad()
    memory = memory_of(model, config.optimizer)
    is_paged = getattr(passes.optimizer.optimizer, "is_paged", False)  # torch does not count such memory
    expected = sum(memory) - is_paged * memory.moments
    fits = f"micro-batches of {passes.micro_batch}, {statistics.median(taken):.2f} s"
    return [
        Check(
            f"{name}, memory",
            f"{expected / 1e9:.1f} GB within 10%",
            f"{found / 1e9:.1f} GB",
            abs(found - expected) <= 0.1 * expected,
        ),
        Check(f"{name}, a step of {config.batch_size}", "micro-batches of at least 1", fits, met=True),
    ]


def held(model: Any, optimizer: Any) -> int:
    """Bytes of all tensors on a GPU; on a CPU those of training."""
    if model.device.type == "cuda":
        return int(torch.cuda.memory_allocated(model.device))
    scales = [state for p in model.parameters() if (state := getattr(p, "quant_state", None))]
    tensors = [one for p in model.parameters() for one in (p, p.grad) if one is not None]
    tensors += [one for state in scales for one in (state.absmax, state.state2.absmax)]
    for state in optimizer.state.values():
        kept = (value for name, value in state.items() if not name.startswith("qmap"))
        tensors += [value for value in kept if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def of_answers(scale: Scale, models: dict[str, Path]) -> Iterator[Check]:
    """A student that answers, from compressed documents and from their text."""
    settings = ScaleDownConfig(num_layers=scale.layers, doc_max_length=scale.shape.document_tokens)
    source, dtype = resolve(str(models["teacher"])), dtype_to_run("auto", scale.device)
    student = OnDevice(
        "the student",
        scale.device,
        lambda: ScaleDownModel.build(settings, source, dtype=dtype, device=scale.device),
    )
    found = costs(student(), scale.answered, shape=scale.shape, repeats=1)
    student.release()
    for batch in scale.answered:
        rates = {cost.system: scale.shape.new_tokens / cost.seconds for cost in found if cost.batch == batch}
        told = ", ".join(f"{system} {rate:,.0f} tokens/s" for system, rate in rates.items())
        faster = bool(rates) and rates[COMPRESSED] > rates[UNCOMPRESSED]
        name = f"answers of a student, batches of {batch}"
        if batch == max(scale.answered):
            yield Check(name, "a higher rate than from text", told or "they do not fit", faster)
        else:
            yield Check(name, "answers", told or "they do not fit", bool(told))


def stop_after_a_step(command: Sequence[str], output: Path) -> None:
    """Begin to train, and kill it when its first checkpoint is there."""
    begun = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while begun.poll() is None and not list(output.glob("checkpoint-*")):
        time.sleep(0.1)
    if begun.poll() is None:
        os.killpg(begun.pid, signal.SIGKILL)
    begun.wait()


def of_vllm(scale: Scale, models: dict[str, Path]) -> Iterator[Check]:
    """The engine beside others that use the GPU, each in a process of its own, with a small model."""
    if importlib.util.find_spec(scale.backend) is None:
        return
    answer = f"""
        from scaledown.data.teacher import generate_teacher_answers
        records = [{{"query": "What is red?", "documents": ["The tower is red."]}}] * 4
        print("answers:", len(generate_teacher_answers(
            records, {scale.student!r}, max_new_tokens=8, backend={scale.backend!r}, device={scale.device!r}
        )))
    """
    encode = f"""
        from scaledown.data.retrieval import SPLADERetriever
        retriever = SPLADERetriever({str(models["encoder"])!r}, device={scale.device!r})
        retriever.retrieve(["red"], [{{"text": "The tower is red."}}])
        del retriever
    """
    uuid = first_uuid() if scale.device.startswith("cuda") else ""
    engine = ["--teacher_backend", scale.backend, "--device", scale.device, "--max_new_tokens", "8"]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "queries.txt").write_text("What is red?\nWhat is tall?\n")
        settings = ScaleDownConfig(num_layers=1, doc_max_length=128)
        ScaleDownModel.build(settings, resolve(scale.student)).save_pretrained(place / "student")
        for name, lines in (("first", answer), ("after", encode + answer)):
            (place / f"{name}.py").write_text('if __name__ == "__main__":\n' + lines)
        retry = ["-m", "scaledown", "prepare", *scale.demo, "--queries_file", str(place / "queries.txt")]
        retry += ["--output_file", str(place / "made.json"), "--teacher_model", scale.student]
        judge = ["-m", "scaledown", "evaluate", "--model", str(place / "student"), "--systems", "compressed"]
        judge += ["--data", str(records(place, 4, 20)), "--output_dir", str(place / "evaluation")]
        ways: dict[str, tuple[list[str], dict[str, str]]] = {
            "first in its process": ([str(place / "first.py")], {}),
            "after an encoder": ([str(place / "after.py")], {}),
            "under a UUID": ([str(place / "first.py")], {"CUDA_VISIBLE_DEVICES": uuid} if uuid else {}),
            "after a retry": ([*retry, *engine, "--bad_answers", "retry"], {}),
            "as a judge after a student": ([*judge, *engine, "--judge_model", scale.student], {}),
        }
        for way, (words, variables) in ways.items():
            environment = {**os.environ, **variables}
            done = subprocess.run(
                [sys.executable, *words], env=environment, capture_output=True, text=True, check=False
            )
            said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
            told = said[0] if said and done.returncode == 0 else "".join(said[-1:])[-90:]
            yield Check(f"{scale.backend}, {way}", "answers", told, done.returncode == 0)


def first_uuid() -> str:
    """Of the first GPU, or nothing where nvidia-smi does not tell."""
    words = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    shown = subprocess.run(words, capture_output=True, text=True, check=False).stdout.split()
    return shown[0] if shown else ""


CHECKS: tuple[Callable[[Scale, dict[str, Path]], Iterator[Check]], ...] = (
    *(
        of_device,
        of_kernel,
        of_encoding,
        of_reranking,
        of_teacher,
        of_capped_memory,
        of_demo,
        of_training,
        of_student,
        of_answers,
        of_vllm,
    ),
)


# What they measure with


def seconds(work: Callable[[], object]) -> float:
    """Of the second time."""
    for _ in range(2):
        wait()
        started = time.perf_counter()
        work()
        wait()
        taken = time.perf_counter() - started
    return taken


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free_memory(device: str) -> int:
    """Of a GPU, in bytes."""
    return torch.cuda.mem_get_info(index(device))[0] if device.startswith("cuda") else 0


@contextlib.contextmanager
def at_most(size: int, device: str) -> Iterator[None]:
    """Let torch take so many bytes of a GPU at most; 0 is all of it."""
    if not size or not device.startswith("cuda"):
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info(index(device))[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / total), index(device))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index(device))


@contextlib.contextmanager
def host_memory() -> Iterator[list[int]]:
    """The most memory that was taken inside beyond what was there, in bytes; mapped files do not count."""
    taken, done = [0], threading.Event()
    status = Path("/proc/self/status")

    def now() -> int:
        lines = status.read_text().splitlines() if status.exists() else []
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)

    before = now()

    def look() -> None:
        while not done.wait(0.02):
            taken[0] = max(taken[0], now() - before)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield taken
    finally:
        done.set()
        thread.join()


def nothing(_: int) -> None:
    pass


def run(
    scale: Scale, checks: Sequence[Callable[[Scale, dict[str, Path]], Iterator[Check]]] = CHECKS
) -> list[Check]:
    """All rows, printed as they come."""
    rows: list[Check] = []
    with tempfile.TemporaryDirectory() as folder:
        models = Models(scale, Path(folder))
        for check in checks:
            try:
                for row in check(scale, models):
                    rows.append(row)
                    tell(row)
            except Exception as error:  # a check that cannot end is one that fell short
                rows.append(
                    Check(
                        check.__name__.removeprefix("of_"),
                        "no error",
                        f"{type(error).__name__}: {error}",
                        met=False,
                    )
                )
                tell(rows[-1])
    return rows


def tell(row: Check) -> None:
    print(f"{'ok  ' if row.met else 'MISS'}  {row.name:<44}  {row.expected:<36}  {row.found}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", default="gpu.json", help="the same rows for an issue", metavar="FILE")
    known = {check.__name__.removeprefix("of_"): check for check in CHECKS}
    parser.add_argument(
        "--checks", nargs="+", choices=known, default=list(known), help="only these, in this order"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu: there is no CUDA device here; the tests do what a CPU can", file=sys.stderr)
        return 1
    started = time.perf_counter()
    rows = run(REAL, [known[name] for name in options.checks])
    content = {
        "machine": describe_machine(),
        "chosen": options.checks,
        "checks": [row._asdict() for row in rows],
    }
    Path(options.json).write_text(json.dumps(content, indent=1) + "\n")
    short = sum(not row.met for row in rows)
    minutes = (time.perf_counter() - started) / 60
    print(f"gpu: {len(rows)} checks in {minutes:.1f} minutes, {short} fell short; {options.json}")
    return 1 if short else 0


if __name__ == "__main__":
    raise SystemExit(main())

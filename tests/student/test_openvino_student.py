"""A student's answers by OpenVINO are those of its own generator, and its graph is made once."""

import copy
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_decoding import ROWS, alone, check_rows_that_join_and_leave, prompt
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from scaledown.cli import main
from scaledown.devices import openvino as devices
from scaledown.devices.halving import is_out_of_memory
from scaledown.errors import MissingExtraError, ModelError, UsageError, install_command
from scaledown.extensions import STUDENT_ENGINES
from scaledown.models.openvino import write_graph
from scaledown.models.sources import resolve
from scaledown.student.decoding import Decoding
from scaledown.student.engine_choice import choose_engine
from scaledown.student.engines import openvino as engine
from scaledown.student.engines.base import Sampling
from scaledown.student.engines.openvino import OpenVINODecoding, OpenVINOGeneration
from scaledown.student.model import ScaleDownModel
from scaledown.student.settings import ScaleDownConfig

pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install -e '.[openvino]'")

QUERIES = ["What about the tower?", "Why is it old?", "Who was here, and when, and with whom?", "So?"]
DOCUMENTS = [["A tower by the river is old."], ["Old.", "And tall, by the tree."], [], ["It is not."] * 3]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SCALEDOWN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def folder(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student whose LoRA changes what the generator writes."""
    made = ScaleDownModel.build(
        ScaleDownConfig(num_layers=1, doc_max_length=48), resolve(str(models["causal_lm"]))
    )
    torch.manual_seed(1)
    for name, weight in made.generator.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    path = tmp_path_factory.mktemp("student")
    made.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> ScaleDownModel:
    """The student on its own generator."""
    found: ScaleDownModel = ScaleDownModel.from_pretrained(folder)
    return found


def on_openvino(folder: Path) -> ScaleDownModel:
    found: ScaleDownModel = ScaleDownModel.from_pretrained(folder)
    found.engine = OpenVINOGeneration(found, resolve(str(folder)), "cpu", 8)
    return found


def decodings(models: dict[str, Path], folder: Path, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """A generator, its decoding by transformers, and the one by OpenVINO."""
    generator = AutoModelForCausalLM.from_pretrained(models["causal_lm"], dtype=dtype).eval()
    graph = folder / "generator.xml"
    write_graph(copy.deepcopy(generator).float(), graph, reads="embeddings")
    return generator, Decoding(generator), OpenVINODecoding(graph, generator.get_input_embeddings(), dtype)


@torch.no_grad()
def test_rows_that_join_and_leave_are_written_as_alone(models: dict[str, Path], tmp_path: Path) -> None:
    generator, _, decoding = decodings(models, tmp_path, torch.float32)
    check_rows_that_join_and_leave(decoding, generator)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.5)])
def test_scores_are_those_of_transformers(
    dtype: torch.dtype, tolerance: float, models: dict[str, Path], tmp_path: Path
) -> None:
    """Rows change places, leave, and others join that are shorter and longer."""
    generator, *both = decodings(models, tmp_path, dtype)

    def same(act: Callable[[Any], None]) -> None:
        for decoding in both:
            act(decoding)
        expected, found = (decoding.logits.float() for decoding in both)
        assert len(both[1]) == len(found) == len(expected)
        assert float((found - expected).abs().max()) <= tolerance * float(expected.std())

    same(lambda decoding: decoding.join(*prompt(generator, *ROWS[:3])))
    same(lambda decoding: decoding.step(torch.tensor([5, 6, 7])))
    same(lambda decoding: decoding.keep([2, 1]))
    same(lambda decoding: decoding.join(*prompt(generator, ROWS[3])))  # right after rows have left
    same(lambda decoding: decoding.step(torch.tensor([8, 9, 10])))
    same(lambda decoding: decoding.keep([1]))
    same(lambda decoding: decoding.join(*prompt(generator, ROWS[2] * 3, ROWS[0])))
    same(lambda decoding: decoding.step(torch.tensor([11, 12, 13])))
    for decoding in both:
        decoding.keep([])
    same(lambda decoding: decoding.join(*prompt(generator, ROWS[1])))


@torch.no_grad()
def test_cache_does_not_grow_with_rows_that_have_left(models: dict[str, Path], tmp_path: Path) -> None:
    generator, _, decoding = decodings(models, tmp_path, torch.float32)
    decoding.join(*prompt(generator, ROWS[1]))
    for _ in range(20):
        decoding.join(*prompt(generator, ROWS[0]))
        decoding.keep([1])
        decoding.step(torch.tensor([4]))
    assert decoding._mask.shape[1] <= len(ROWS[0]) + 2
    assert decoding._request.query_state()[0].state.shape[2] == decoding._mask.shape[1]


@pytest.mark.parametrize("compressed", [True, False])
def test_answers_are_those_of_the_own_generator(
    compressed: bool, folder: Path, model: ScaleDownModel
) -> None:
    expected = model.answer(QUERIES, DOCUMENTS, max_new_tokens=12, compressed=compressed)
    assert len(set(expected)) == len(QUERIES)
    found = on_openvino(folder).answer(QUERIES, DOCUMENTS, max_new_tokens=12, compressed=compressed)
    assert found == expected
    streamed = "".join(
        on_openvino(folder).stream(QUERIES[1], DOCUMENTS[1], max_new_tokens=12, compressed=compressed)
    )
    assert streamed.strip() == expected[1]


def test_chance_depends_on_the_seed_alone(folder: Path) -> None:
    student = on_openvino(folder)

    def written(seed: int) -> list[int]:
        assert student.engine is not None
        question = student._question("Why?", ["No."], 6, compressed=True)
        student.engine.join([question], [Sampling(6, temperature=1.5, seed=seed)])
        tokens = []
        for _ in range(6):
            (own,) = student.engine.tokens()
            assert not isinstance(own, Exception)
            tokens += own
            student.engine.keep([0])
        student.engine.keep([])
        return tokens

    assert written(1) == written(1)
    assert len({tuple(written(seed)) for seed in range(6)}) > 3


def test_model_keeps_its_precision(folder: Path) -> None:
    """The graph is made in float32; the compressor and the embeddings go on in bfloat16."""
    student = ScaleDownModel.from_pretrained(folder, dtype=torch.bfloat16)
    before = {name: weight.clone() for name, weight in student.compressor.state_dict().items()}
    student.engine = OpenVINOGeneration(student, resolve(str(folder)), "cpu", 8)
    assert student.get_input_embeddings().weight.dtype == torch.bfloat16
    after = student.compressor.state_dict()
    assert before.keys() == after.keys()
    assert all(
        weight.dtype == torch.bfloat16 and weight.equal(before[name]) for name, weight in after.items()
    )
    assert student.answer(QUERIES, DOCUMENTS, max_new_tokens=4)


def test_one_thread_with_amx_computes_in_float32(models, tmp_path, monkeypatch, caplog) -> None:
    """In bfloat16 OpenVINO would divide by zero there, which ends the process."""
    chosen: list[torch.dtype] = []
    compiled = engine.compiled

    def seen(graph: Path, dtype: torch.dtype) -> Any:
        chosen.append(dtype)
        return compiled(graph, torch.float32)

    monkeypatch.setattr(engine, "compiled", seen)
    for amx, threads in ((True, 2), (False, 1), (True, 1)):
        monkeypatch.setattr(devices, "has_amx", lambda amx=amx: amx)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, threads=threads: range(threads))
        decodings(models, tmp_path, torch.bfloat16)
    assert chosen == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert caplog.text.count("OpenVINO computes in float32: with one thread") == 1


def test_graph_is_made_once_for_the_same_weights(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    on_openvino(folder)
    (made,) = cache.glob("openvino-generators/*/generator.xml")
    when = made.stat().st_mtime_ns
    on_openvino(folder)
    assert made.stat().st_mtime_ns == when
    assert caplog.text.count("written once for OpenVINO") == 1
    assert not list(cache.glob("openvino-generators/*.tmp"))


def test_interrupted_export_is_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(model: Any, file: Path, **_: Any) -> None:
        file.write_text("<half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "write_graph", half)
        with pytest.raises(KeyboardInterrupt):
            on_openvino(folder)
    assert on_openvino(folder).answer("Why?", ["No."], max_new_tokens=3)


def test_auto_answers_without_an_engine_that_cannot_run_the_generator(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    student = ScaleDownModel.from_pretrained(folder, dtype=torch.float16)
    chosen = STUDENT_ENGINES["openvino"]
    start = functools.partial(chosen.start, student, resolve(str(folder)), "cpu", 8)
    assert start(asked="auto") == (None, "transformers")
    assert "not in torch.float16" in caplog.text
    assert caplog.text.rstrip().endswith("transformers writes the answers")
    assert student.answer("Why?", ["No."], max_new_tokens=2)
    with pytest.raises(ModelError, match="float32 or bfloat16"):
        start(asked="openvino")


def test_models_whose_names_differ_after_a_dot_do_not_share_a_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export that is not finished must not be taken for that of another model, or be taken over by it."""
    written: list[Path] = []
    write = engine.write_graph

    def noted(model: Any, file: Path, **options: Any) -> None:
        assert not [*file.parent.iterdir()]
        written.append(file.parent)
        write(model, file, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "write_graph", noted)
    for name in ("student-1.2", "student-1.3"):
        shutil.copytree(folder, tmp_path / name)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                on_openvino(tmp_path / name)
    assert len(set(written)) == 2


@torch.no_grad()
@pytest.mark.parametrize("method", ["join", "step"])
def test_error_while_prompts_are_read_keeps_the_other_rows(
    method: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, reference, decoding = decodings(models, tmp_path, torch.float32)
    for one in (reference, decoding):
        one.join(*prompt(generator, ROWS[0]))

    def full(*_: object) -> None:
        raise RuntimeError("std::bad_alloc")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_forward", full)
        with pytest.raises(RuntimeError) as raised:
            decoding.join(*prompt(generator, ROWS[1])) if method == "join" else decoding.step(
                torch.tensor([3])
            )
    assert is_out_of_memory(raised.value)
    assert len(decoding) == (method == "join")
    if method == "join":
        for one in (reference, decoding):
            one.step(torch.tensor([3]))
        assert torch.allclose(reference.logits, decoding.logits, atol=1e-4)
    else:
        decoding.join(*prompt(generator, ROWS[1]))
        assert decoding.logits.argmax(-1).tolist() == alone(generator, ROWS[1], 1)


@pytest.fixture
def windowed(folder: Path, models: dict[str, Path], tmp_path: Path) -> Path:
    """A student whose generator reads a sliding window."""
    torch.manual_seed(0)
    tokenizer = ScaleDownModel.from_pretrained(folder).tokenizer
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=4,
        bos_token_id=0,
        eos_token_id=1,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path / "generator")
    tokenizer.save_pretrained(tmp_path / "generator")
    settings = ScaleDownConfig(num_layers=1, doc_max_length=48)
    made = ScaleDownModel.build(settings, resolve(str(tmp_path / "generator")))
    made.save_pretrained(tmp_path / "windowed")
    return tmp_path / "windowed"


def test_choice_of_engine_by_model_and_device(
    folder: Path, windowed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scaledown.devices.vllm.importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("scaledown.student.engines.openvino.is_installed", lambda: True)
    assert choose_engine("auto", "cpu", resolve(str(folder))) is STUDENT_ENGINES["openvino"]
    assert choose_engine("auto", "cuda", resolve(str(folder))) is STUDENT_ENGINES["transformers"]
    assert choose_engine("auto", "cpu", resolve(str(windowed))) is STUDENT_ENGINES["transformers"]
    with pytest.raises(UsageError, match="runs on a CPU only"):
        choose_engine("openvino", "cuda", resolve(str(folder)))
    monkeypatch.setattr("scaledown.student.engines.openvino.is_installed", lambda: False)
    assert choose_engine("auto", "cpu", resolve(str(folder))) is STUDENT_ENGINES["transformers"]


def test_weights_of_8_bits_are_another_graph_and_need_openvino(
    folder: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["answer", "--model", str(folder), "--device", "cpu", "--query", "Why?", "--document", "No."]
    for flags in ([], ["--generator_8bit"]):
        assert main([*words, "--engine", "openvino", *flags]) == 0
    sizes = sorted(file.stat().st_size for file in cache.glob("openvino-generators/*/generator.bin"))
    assert len(sizes) == 2
    assert sizes[0] < 0.5 * sizes[1]
    assert main([*words, "--engine", "transformers", "--generator_8bit"]) == 2
    assert "use --engine openvino" in capsys.readouterr().err
    monkeypatch.setattr("scaledown.student.engines.openvino.is_installed", lambda: False)
    assert main([*words, "--generator_8bit"]) == 2
    assert install_command("openvino") in capsys.readouterr().err


def test_generator_with_a_window_is_refused(windowed: Path) -> None:
    with pytest.raises(ModelError, match="does not keep all positions.*use the engine transformers"):
        on_openvino(windowed)


def test_without_the_library_the_error_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=re.escape(install_command("openvino"))):
        choose_engine("openvino", "cpu", resolve(str(folder)))


def test_command_takes_the_engine(
    folder: Path, model: ScaleDownModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["answer", "--model", str(folder), "--engine", "openvino", "--device", "cpu"]
    words += ["--max_new_tokens", "8"]
    assert main([*words, "--query", QUERIES[0], "--document", DOCUMENTS[0][0]]) == 0
    assert capsys.readouterr().out.strip() == model.answer(QUERIES[0], DOCUMENTS[0], max_new_tokens=8)
    records = [
        {"query": q, "documents": d or ["-"], "answer": "-"} for q, d in zip(QUERIES, DOCUMENTS, strict=True)
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    flags = ["--data", str(tmp_path / "data.json"), "--output_file", str(tmp_path / "answers.json")]
    assert main([*words, *flags]) == 0
    found = [row["answer"] for row in json.loads((tmp_path / "answers.json").read_text())]
    assert found == model.answer(QUERIES, [d or ["-"] for d in DOCUMENTS], max_new_tokens=8)


@pytest.mark.slow
def test_server_logs_its_engine_and_ends(folder: Path, cache: Path) -> None:
    words = [sys.executable, "-m", "scaledown", "serve", "--model", str(folder), "--port", "0"]
    environment = os.environ | {"SCALEDOWN_CACHE": str(cache)}
    with subprocess.Popen(
        [*words, "--device", "cpu", "--engine", "openvino"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stderr is not None
        try:
            ready = next(line for line in iter(process.stderr.readline, "") if "ready" in line)
            assert "by OpenVINO on cpu" in ready
            process.send_signal(signal.SIGTERM)
            rest = process.stderr.read()
            assert process.wait(60) == 0
            assert "Traceback" not in rest
        finally:
            process.kill()


def test_evaluate_writes_the_same_answers_with_openvino(folder: Path, tmp_path: Path) -> None:
    pairs = zip(QUERIES, DOCUMENTS, strict=True)
    records = [{"query": query, "documents": own or ["-"], "answer": "old"} for query, own in pairs]
    data = tmp_path / "held_out.json"
    data.write_text(json.dumps(records))
    found = []
    for name in ("transformers", "openvino"):
        output = tmp_path / name
        flags = ["--model", str(folder), "--data", str(data), "--output_dir", str(output), "--engine", name]
        flags += ["--systems", "compressed", "uncompressed", "closed_book", "--max_new_tokens", "6"]
        assert main(["evaluate", *flags, "--device", "cpu", "--dtype", "float32"]) == 0
        lines = (output / "answers.jsonl").read_text().splitlines()
        found.append([json.loads(line)["answers"] for line in lines])
        results = json.loads((output / "results.json").read_text())
        assert results["parameters"]["engine"] == name
    assert found[0] == found[1]
    written = {own["answer"] for one in found[0] for own in one.values()}
    assert len(written) > len(QUERIES), "answers differ"

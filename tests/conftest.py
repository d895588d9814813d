"""Fixtures of all tests: no network except loopback, a hub cache of tiny models, paths, servers, buckets."""

import functools
import gc
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # as commands do, before anything is multiplied here
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the cores are busy with other tests

_CACHE = Path(tempfile.mkdtemp(prefix="scaledown-tests-"))
# Before any library reads them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_CACHE=str(_CACHE / "hub"),
    HF_DATASETS_CACHE=str(_CACHE / "datasets"),
    HF_XET_CACHE=str(_CACHE / "xet"),
    TOKENIZERS_PARALLELISM="false",
    COLUMNS="100",
    GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT="false",  # else gcsfs asks for the kind of bucket by gRPC
)

# As `scaledown.devices.openvino` does: tests that import OpenVINO first would send usage data, each graph in
# many processes of 0.1 s.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

import pytest  # noqa: E402

import forks  # noqa: E402
import gs_server as google  # noqa: E402
import web  # noqa: E402
from scaledown.data import prepare_dataset  # noqa: E402
from scaledown.devices import choice  # noqa: E402
from scaledown.report import plots  # noqa: E402
from scaledown.run import locations, object_store  # noqa: E402
from scaledown.run.directory import RunDirectory  # noqa: E402

# Fewer collections: each looks at all objects of the libraries, which took an eighth of the suite's time.
gc.set_threshold(200_000, 100, 100)

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"

_MODELS = {"transformers.modeling_utils", "sentence_transformers", "openvino_genai"}
"""Modules that are imported before a model is made or loaded."""
_STARTS = {"subprocess.Popen", "os.fork"}
"""The interpreter's audit events for the start of a process."""


def load_script(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a file that is not in a package, without running it as a program."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="skip tests that need a process, server or model")


def pytest_configure(config: pytest.Config) -> None:
    """With `--fast`, skip a test when it starts a process or a server, or imports a library for models."""
    if not config.getoption("--fast") or config.getoption("numprocesses", None):
        return  # with xdist its workers run the tests
    platform.platform()  # pytest-xdist's workers ask for it, and it starts a process the first time

    def skip(why: str) -> None:
        pytest.skip(f"--fast: it {why}", allow_module_level=True)

    class Models:
        @staticmethod
        def find_spec(name: str, *_: Any) -> None:
            if name in _MODELS:
                skip("needs a model")

    sys.meta_path.insert(0, Models)
    sys.addaudithook(lambda event, _: skip("starts a process") if event in _STARTS else None)
    socket.socket.listen = lambda *_: skip("starts a server")  # type: ignore[method-assign]


def pytest_unconfigure() -> None:
    gc.unfreeze()  # see `_frozen`; libraries report objects that are left at the end


def _not_with_fast(request: pytest.FixtureRequest) -> None:
    """Skip the test with `--fast`, since what starts its server is a thread that cannot skip."""
    if request.config.getoption("--fast"):
        pytest.skip("--fast: it starts a process or a server")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow tests first, so that they do not run alone at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> None:
    """A connection to another machine fails the test that makes it."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        local = self.family == socket.AF_UNIX or address[0] in {"127.0.0.1", "::1", "localhost"}
        if not local:
            raise AssertionError(f"a test reached for the network: {address}")
        connect(self, address)

    socket.socket.connect = guarded  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def _log_reaches_pytest() -> Any:
    """Commands send the log to standard error; after each test the log is pytest's again."""
    import logging

    logger = logging.getLogger("scaledown")
    yield
    logger.handlers[:] = []
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    """A run collects garbage after each stage: not among the libraries, which are imported by now."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _float32() -> Iterator[None]:
    """`--dtype auto` is float32 on a CPU, on all machines, since tests compare with exact values."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "multiplies_bfloat16", lambda: False)
        yield


@pytest.fixture(autouse=True)
def _plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw plots only in tests marked `plots`, because they take most of the time of such small runs."""
    if request.node.get_closest_marker("plots") is None:
        for name in ("bars", "histogram", "curves", "intervals", "plane"):
            monkeypatch.setattr(plots, name, lambda *_, **__: "<svg></svg>")


@pytest.fixture(scope="module")
def browser(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Chromium. Not for a whole session: its event loop is in the way of tests that have their own."""
    _not_with_fast(request)
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not found:
        pytest.skip("needs Chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=found, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models by kind."""
    import tiny

    folder = tmp_path_factory.mktemp("models")
    return {
        make.__name__: make(folder / make.__name__)
        for make in (
            *(tiny.splade, tiny.dense, tiny.cross_encoder, tiny.causal_lm, tiny.instruct, tiny.phi),
            tiny.modernbert,
        )
    }


@pytest.fixture(scope="session")
def hub_cache() -> Path:
    """A hub cache with a tiny model under every name in the guide."""
    import tiny

    cache = Path(os.environ["HF_HUB_CACHE"])
    if not cache.exists():
        tiny.fill_hub_cache(cache)
    return cache


@pytest.fixture(scope="session")
def _fork_server() -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    forks.Popen.server = forks.Server()
    yield
    forks.Popen.server.close()


@pytest.fixture
def forked(_fork_server: None) -> Iterator[None]:
    """Commands of Python are forks of a process that has imported everything."""
    with pytest.MonkeyPatch.context() as patch:
        if forks.Popen.server:
            patch.setattr(subprocess, "Popen", forks.Popen)
        yield


@pytest.fixture
def tiny_flags(models: dict[str, Path]) -> list[str]:
    """Flags that name tiny models for all stages."""
    return [
        *("--retriever_model", str(models["splade"])),
        *("--reranker_model", str(models["cross_encoder"])),
        *("--teacher_model", str(models["causal_lm"])),
        *("--max_new_tokens", "8"),
        *("--device", "cpu"),
        *("--dtype", "float32"),  # also in processes of their own
    ]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """The first 12 articles of the sample corpus."""
    path = tmp_path / "corpus.jsonl"
    lines = (ROOT / "examples" / "corpus.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:12]), encoding="utf-8")
    return path


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    path = tmp_path / "queries.txt"
    path.write_text("What is photosynthesis?\nWho wrote it?\nHow tall is the tower?\nWhat causes tides?\n")
    return path


@pytest.fixture
def prepare(tiny_flags: list[str], corpus: Path, queries: Path, tmp_path: Path) -> Any:
    """Run the command with tiny models; the given flags come last. Returns the exit status."""

    class Outcome:
        def __init__(self) -> None:
            self.output = tmp_path / "train_data.json"
            self.work = tmp_path / "train_data.json.work"

        def __call__(self, *flags: str, inputs: bool = True) -> int:
            standard = ["--corpus_path", str(corpus), "--queries_file", str(queries)] if inputs else []
            standard += ["--output_file", str(self.output), *tiny_flags]
            given = {flag.partition("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")}
            pairs = zip(standard[::2], standard[1::2], strict=True)
            standard = [word for pair in pairs if pair[0].replace("-", "_") not in given for word in pair]
            return prepare_dataset.main([*standard, *flags])

    return Outcome()


@pytest.fixture
def server() -> Iterator[web.Server]:
    """A server of files on loopback."""
    server = web.Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def s3_server(request: pytest.FixtureRequest) -> Iterator[Any]:
    """An S3 server on loopback; its content stays when it is stopped and started."""
    moto = pytest.importorskip("moto.server", reason="no S3 server: pip install 'moto[server]'")
    pytest.importorskip("s3fs", reason="no s3fs: pip install s3fs")
    _not_with_fast(request)
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    server._port = server.get_host_and_port()[1]
    yield server
    server.stop()


@pytest.fixture(scope="session")
def gs_server() -> Iterator[str]:
    """The address of a server with Google's protocol on loopback."""
    pytest.importorskip("gcsfs", reason="no gcsfs: pip install gcsfs")
    with google.gs_server() as address:
        yield address


@pytest.fixture
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty bucket, of the kind in the parameter (default: s3); keys are in the environment."""
    make = {"s3": _s3_bucket, "gs": _gs_bucket, "memory": _memory_bucket}[getattr(request, "param", "s3")]
    return make(f"runs-{uuid.uuid4().hex[:8]}", request, monkeypatch)


def _s3_bucket(name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    import fsspec

    host, port = request.getfixturevalue("s3_server").get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-tests")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(name)
    return f"s3://{name}"


def _gs_bucket(name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    import fsspec

    monkeypatch.setenv("STORAGE_EMULATOR_HOST", request.getfixturevalue("gs_server"))
    monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")  # which fsspec reads when it is imported
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    fsspec.filesystem("gs", skip_instance_cache=True).mkdir(name)
    return f"gs://{name}"


def _memory_bucket(name: str, _request: pytest.FixtureRequest, _patch: pytest.MonkeyPatch) -> str:
    return f"memory://{name}"


@pytest.fixture
def machine(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], RunDirectory]:
    """The run directory on a machine with a given name. Listings of the bucket are not cached."""
    monkeypatch.setattr(object_store, "_LISTED_SECONDS", 0)
    monkeypatch.setattr(object_store, "file_system", functools.cache(object_store.file_system))
    return lambda name: RunDirectory(locations.storage_at(f"{bucket}/run", str(tmp_path / name)))

"""The installed package: the wheel, the command, the API reference."""

import ast
import importlib
import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import scaledown
from conftest import ROOT
from scaledown.cli import _COMMANDS, main
from scaledown.errors import DISTRIBUTION, install_command


@pytest.mark.slow
def test_wheel_installs_and_is_typed(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("scaledown/py.typed", "scaledown/examples/corpus.jsonl", "scaledown/cli.py"):
        assert name in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith("tests/")]
    target = tmp_path / "installed"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
    ]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    code = (
        "import scaledown.data.input.corpus as corpus, scaledown; print(scaledown.__file__); "
        "print(corpus.bundled_corpus()); assert corpus.bundled_corpus().exists()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(target), "PATH": ""},
        check=True,
        capture_output=True,
        text=True,
    )
    assert all(line.startswith(str(target)) for line in done.stdout.splitlines())


def test_benchmarks_and_examples_import_names_that_exist() -> None:
    missing = []
    for path in [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("scaledown"):
                module = importlib.import_module(node.module or "")
                names = [name.name for name in node.names]
                missing += [
                    f"{path.name}: {node.module}.{name}" for name in names if not hasattr(module, name)
                ]
    assert missing == []


def test_version_and_help_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"scaledown {scaledown.__version__}\n"
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    for name in ("prepare", "validate", "merge"):
        assert name in out
    with pytest.raises(SystemExit):
        main(["prepare", "--help"])
    assert "--top_k_retrieval" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [[], ["no-such-command"], ["validate"], ["validate", ""], ["merge", "a.json"]]
)
def test_wrong_usage_is_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_file_may_be_named_like_a_flag(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("--my-data.json").write_text("[]")
    assert main(["validate", "--", "--my-data.json"]) == 1
    assert "--my-data.json: holds no records" in capsys.readouterr().out
    assert main(["merge", "a.json", "--output_file", ""]) == 2


@pytest.mark.parametrize(
    "words", [["scaledown", "prepare"], ["scaledown", "validate", "x"], ["scaledown.data.prepare_dataset"]]
)
def test_ctrl_c_during_imports_is_one_line(words: list[str], tmp_path: Path) -> None:
    interrupt = (
        "import os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs begin without\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
    )
    (tmp_path / "pyarrow.py").write_text(interrupt)
    done = subprocess.run(
        [sys.executable, "-m", *words],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT / 'src'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (130, 1), done.stderr
    assert done.stderr.startswith("interrupted")


def test_versions_agree() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{scaledown.__version__}"' in text
    assert f"## {scaledown.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_extra_is_detected_by_its_packages(monkeypatch) -> None:
    needed = {
        "scaledown-rag": [
            "torch>=2.6",
            'ray>=2.40; extra == "ray"',
            "pyseismic-lsr>=0.5; (sys_platform == 'linux') and extra == 'approximate'",
            "one>=1; extra == 'both'",
            "two; extra == 'both'",
        ]
    }

    def requires(name: str) -> list[str]:
        if name not in needed:
            raise importlib.metadata.PackageNotFoundError(name)
        return needed[name]

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert install_command("ray") == "pip install 'ray>=2.40'"
    assert install_command("approximate") == "pip install 'pyseismic-lsr>=0.5'"
    assert install_command("both") == "pip install 'one>=1' two"
    needed.clear()
    assert install_command("ray") == "pip install -e '.[ray]' in a checkout"


def test_no_page_recommends_the_package_of_another_project() -> None:
    assert f'name = "{DISTRIBUTION}"' in (ROOT / "pyproject.toml").read_text()
    pages = [ROOT / "README.md", ROOT / "tests" / "conftest.py", *(ROOT / "docs").glob("*.md")]
    for path in [*pages, *(ROOT / "src").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        text = path.read_text()
        assert "scaledown[" not in text, path
        assert "pip install scaledown" not in text, path


def test_dependencies_have_reasons() -> None:
    """Each dependency has a reason in CONTRIBUTING and a version in constraints.txt."""
    import re
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = [re.split(r"[><=\[;]", requirement)[0] for group in groups for requirement in group]
    reasons = (ROOT / "CONTRIBUTING.md").read_text()
    pinned = (ROOT / "constraints.txt").read_text()
    names.remove("vllm")  # pins others itself
    for name in names:
        assert f"`{name}`" in reasons, name
        assert f"\n{name}==" in pinned, name


def test_reader_that_stops_early_is_not_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n" * 20000)
    words = f"{sys.executable} -m scaledown validate {' '.join([str(path)] * 40)} | head -1"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, check=False)
    assert done.stdout.startswith(f"{path}:1: record 1")
    assert done.stderr == ""


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(closed: str, tmp_path: Path) -> None:
    """A file that is opened later does not get the number of a closed stream."""
    (tmp_path / "a.json").write_text('[{"query": "q", "documents": ["d"], "answer": "a"}]')
    for words, status in (
        (f"merge {tmp_path}/a.json --output_file {tmp_path}/full.json", 0),
        (f"validate {tmp_path}/full.json", 0),
        (f"status {tmp_path}/nowhere", 1),
    ):
        command = f"{sys.executable} -m scaledown {words} {closed}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        assert "AttributeError" not in done.stderr
    assert (tmp_path / "full.json").read_text().startswith("[\n")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_site_builds_without_a_dead_link(site: Path) -> None:
    api = (site / "api.html").read_text(encoding="utf-8")
    assert "SPLADERetriever" in api
    assert "best first" in api
    assert "--top_k_retrieval" in (site / "commands.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1400])
def test_site_opened_from_a_folder_is_searched_without_a_network(site: Path, browser, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((site / "index.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width, "nothing is cut off on the right"
    page.click("label.md-header__button[for=__search]" if width < 960 else ".md-search__input")
    page.keyboard.type("memory tokens", delay=20)
    page.wait_for_selector(".md-search-result__item")
    assert "memory tokens" in page.inner_text(".md-search-result__list")
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    page.close()


@pytest.mark.parametrize(
    ("words", "light"),
    [
        ("--help", "numpy, torch, pyarrow, rich, jinja2, transformers, tokenizers"),
        ("--version", "numpy, torch, pyarrow, rich, jinja2, transformers, tokenizers"),
        *((f"{command} --help", "torch, transformers, jinja2, matplotlib") for command in _COMMANDS),
        *(
            (f"{command} --help", "numpy, torch, rich")
            for command in ("validate", "merge", "split", "export", "status")
        ),
        *((f"{command} --help", "numpy, pyarrow") for command in ("pretrain", "train", "serve")),
    ],
)
def test_help_imports_no_heavy_library(words: str, light: str) -> None:
    """Checks the imported modules, not the time."""
    code = (
        "import sys; from scaledown.cli import main\n"
        "try: main(sys.argv[2:])\n"
        "except SystemExit: pass\n"
        "sys.exit(' '.join(set(sys.argv[1].split(', ')) & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, light, *words.split()], capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() == ""
    assert "scaledown" in done.stdout

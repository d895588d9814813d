"""Nothing of the user's is overwritten: one rule for all commands."""

import json
import os
from pathlib import Path

import pytest

from scaledown.cli import main
from scaledown.config.compare import CompareConfig
from scaledown.config.evaluate import EvaluateConfig
from scaledown.config.flags import from_flags
from scaledown.config.index import IndexConfig
from scaledown.config.prepare import PrepareConfig
from scaledown.config.train import PretrainConfig, TrainConfig
from scaledown.errors import RunDirectoryError, UsageError
from scaledown.run.directory import RunDirectory
from scaledown.run.outputs import check_apart

RECORD = {"query": "What?", "documents": ["One."], "answer": "This."}
MINE = "my own words\n"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([RECORD]))
    return path


def words(command: str, data: Path, output: Path | str) -> list[str]:
    """A command that reads `data` and writes `output`."""
    return {
        "merge": ["merge", str(data), "--output_file", str(output)],
        "removed": ["merge", str(data), "--output_file", f"{output}.json", "--deduplicate", "exact"],
        "page": ["report", str(data), "--output", str(output), "--card", str(data.with_name("the.card"))],
        "card": ["report", str(data), "--output", str(data.with_name("the.page")), "--card", str(output)],
    }[command]


def written(command: str, output: Path) -> Path:
    return Path(f"{output}.json.removed.jsonl") if command == "removed" else output


COMMANDS = [("merge", "x.json"), ("merge", "x.jsonl"), ("merge", "x.parquet"), ("removed", "x")]
COMMANDS += [("page", "x.html"), ("card", "x.md")]


@pytest.mark.parametrize(("command", "name"), COMMANDS)
def test_files_of_others_are_not_replaced(
    command: str, name: str, data: Path, tmp_path: Path, capsys
) -> None:
    output = tmp_path / name
    mine = written(command, output)
    mine.write_text(MINE)
    assert main(words(command, data, output)) == 1
    assert (
        f"{mine} already exists, and this command has not written it: name another, or give --overwrite"
        in (capsys.readouterr().err)
    )
    assert mine.read_text() == MINE
    assert main([*words(command, data, output), "--overwrite"]) == 0
    assert mine.read_text(errors="replace") != MINE


@pytest.mark.parametrize(("command", "name"), COMMANDS)
def test_a_command_makes_its_own_file_again_until_that_is_changed(
    command: str, name: str, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / name
    assert main(words(command, data, output)) == 0
    made = written(command, output).read_bytes()
    assert main(words(command, data, output)) == 0
    assert written(command, output).read_bytes() == made
    with written(command, output).open("a") as file:
        file.write(MINE)
    assert main(words(command, data, output)) == 1
    assert written(command, output).read_text(errors="replace").endswith(MINE)


def test_files_of_another_command_are_not_replaced(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "full.json"
    assert main(words("merge", data, output)) == 0
    assert main(words("page", data, output)) == 1


def test_empty_file_may_be_replaced(data: Path, tmp_path: Path) -> None:
    (tmp_path / "full.json").touch()
    assert main(words("merge", data, tmp_path / "full.json")) == 0


@pytest.mark.parametrize("by", ["its name", "another way", "a link", "a hard link", "a URL"])
@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
@pytest.mark.parametrize("command", ["merge", "page", "card"])
def test_output_that_is_an_input_is_refused_under_any_name(
    command: str, flags: list[str], by: str, data: Path, tmp_path: Path, capsys
) -> None:
    before = data.read_bytes()
    other = tmp_path / "other.json"
    if by == "another way":
        (tmp_path / "deep").mkdir()
        other = tmp_path / "deep" / ".." / "data.json"
    elif by == "a link":
        other.symlink_to(data)
    elif by == "a hard link":
        os.link(data, other)
    elif by == "a URL":
        other = f"file://{data}"
    else:
        other = data
    assert main([*words(command, data, other), *flags]) == 2
    assert "is also read: name another, it would be overwritten" in capsys.readouterr().err
    assert data.read_bytes() == before


@pytest.mark.parametrize("command", ["merge", "page"])
def test_a_device_is_not_replaced(command: str, data: Path, tmp_path: Path, capsys) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    assert main([*words(command, data, pipe), "--overwrite"]) == 1
    assert "is a device or pipe" in capsys.readouterr().err
    assert pipe.is_fifo()


# export


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet", "pisco"])
@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_an_export_into_its_source_folder_is_refused(form: str, flags, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train.json").write_text(json.dumps([RECORD]))
    (folder / "secret.txt").write_text(MINE)
    command = ["export", str(folder / "train.json"), "--format", form, "--output_dir", str(folder), *flags]
    assert main(command) == 2
    assert (
        f"{folder} holds {folder / 'train.json'}, which is read: name a new folder" in capsys.readouterr().err
    )
    assert sorted(path.name for path in folder.iterdir()) == ["secret.txt", "train.json"]


@pytest.mark.parametrize("form", ["json", "parquet", "pisco"])
def test_only_an_export_is_replaced_by_another(form: str, data: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "shared"
    command = ["export", str(data), "--format", form, "--output_dir", str(output)]
    assert main(command) == 0
    data.write_text(json.dumps([RECORD, RECORD | {"query": "Why?"}]))
    assert main(command) == 1
    assert "or give --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert "2 records" in capsys.readouterr().out
    (output / "notes.txt").write_text(MINE)
    assert main([*command, "--overwrite"]) == 1
    assert (output / "notes.txt").read_text() == MINE


def test_rankings_do_not_replace_other_output(prepare, tmp_path: Path, capsys) -> None:
    assert prepare("--top_k_retrieval", "3") == 0
    mine = tmp_path / "retrieved.run"
    mine.write_text(MINE)
    command = ["export", str(prepare.output), "--format", "trec", "--output_dir", str(tmp_path)]
    assert main(command) == 1
    assert mine.read_text() == MINE
    assert main([*command, "--overwrite"]) == 0
    assert main(command) == 0, "its own"
    assert main([*command[:-1], str(prepare.work)]) == 2
    assert "which is read" in capsys.readouterr().err


# run directories and outputs of runs


def test_run_does_not_replace_other_output(prepare, capsys) -> None:
    prepare.output.write_text(MINE)
    for flags in (["--top_k_retrieval", "3"], ["--top_k_retrieval", "3", "--dry_run"]):
        assert prepare(*flags) == 1
        assert "this command has not written it" in capsys.readouterr().err
        assert prepare.output.read_text() == MINE
    assert prepare("--top_k_retrieval", "3", "--overwrite") == 0
    assert json.loads(prepare.output.read_text())
    manifest = json.loads((prepare.work / "manifest.json").read_text())
    assert "overwrite" not in manifest["parameters"], "it is not repeated"
    assert prepare("--top_k_retrieval", "3") == 0
    assert "nothing to do" in capsys.readouterr().out


def test_metrics_do_not_replace_other_files(prepare, tmp_path: Path, capsys) -> None:
    mine = tmp_path / "m.prom"
    mine.write_text(MINE)
    assert prepare("--metrics_file", str(mine)) == 1
    assert "--metrics_file" in capsys.readouterr().err
    assert mine.read_text() == MINE


@pytest.mark.parametrize("name", ["README.md", "report.html", "manifest.json"])
def test_folder_with_only_a_readme_is_not_a_run(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(MINE)
    with pytest.raises(RunDirectoryError, match="holds other things"):
        RunDirectory(tmp_path)


def test_output_inside_an_input_folder_is_refused(tmp_path: Path) -> None:
    check_apart("--output_dir", str(tmp_path / "a"), ["", tmp_path / "ab", "s3://b/a"])
    check_apart("--output_dir", "", [tmp_path])
    with pytest.raises(UsageError, match="lies in .*, which is read: put it elsewhere"):
        check_apart("--output_dir", str(tmp_path / "a"), [tmp_path])
    with pytest.raises(UsageError, match="lies in s3://b/a, which is read"):
        check_apart("--output_dir", "s3://b/a/c", ["s3://b/a"])


# ~


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "home"
    path.mkdir()
    (path / "data.json").write_text(json.dumps([RECORD]))
    monkeypatch.setenv("HOME", str(path))
    monkeypatch.chdir(tmp_path)
    return path


@pytest.mark.parametrize(
    ("command", "made"),
    [
        (["validate", "~/data.json"], ""),
        (["merge", "~/data.json", "--output-file=~/full.json"], "full.json"),
        (["merge", "~/data.json", "--output_file", "~/full.json"], "full.json"),
        (["export", "~/data.json", "--format=json", "--output-dir=~/shared"], "shared/train.json"),
        (["report", "~/data.json", "--output=~/page.html", "--card", "~/card.md"], "page.html"),
        (["report", "~/data.json", "--output=~/page.html", "--gold=~/data.json"], "page.md"),
    ],
)
def test_home_folder_is_expanded_in_every_path(
    command: list[str], made: str, home: Path, tmp_path: Path
) -> None:
    assert main(command) == 0
    assert (home / made).exists()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("config", "needed"),
    [
        (PrepareConfig, {"queries_file": ["~/q"], "output_file": "~/o.json"}),
        (IndexConfig, {}),
        (TrainConfig, {"train_data": ["~/t.json"]}),
        (PretrainConfig, {"corpus_path": ["~/c"]}),
        (EvaluateConfig, {"model": "~/m", "data": "~/d"}),
        (CompareConfig, {"data": "~/d"}),
    ],
)
def test_home_folder_is_expanded_in_every_setting(config, needed: dict, home: Path) -> None:
    made = from_flags(needed | {"keyword_model": "~/k"} if config in {EvaluateConfig} else needed, config)
    for name in needed:
        value = getattr(made, name)
        assert str(value[0] if isinstance(value, tuple) else value).startswith(str(home))

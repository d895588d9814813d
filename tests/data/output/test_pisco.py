import json
from pathlib import Path

import datasets
import pytest

from scaledown.cli import main
from scaledown.data.output.pisco import export_pisco
from scaledown.errors import InputError, OutputError

RECORDS = [
    {"query": f"Why {number}?", "documents": ["Title\nText", {"title": "T", "text": "x"}], "answer": "So."}
    for number in range(40)
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train_data.json"
    path.write_text(json.dumps(RECORDS))
    return path


def test_export_can_be_read_as_the_authors_trainer_does(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The calls of pisco/train.py: `load_from_disk`, `train_test_split`, `shuffle`; and its collator's."""
    output = tmp_path / "deep" / "pisco"
    assert main(["export", str(data), str(data), "--format", "pisco", "--output-dir", str(output)]) == 0
    assert "80 records" in capsys.readouterr().out
    found = datasets.load_from_disk(str(output))["train"]
    found = found.select(range(min(len(found), 60)))
    parts = found.train_test_split(test_size=min(64, len(found) // 10))
    example = parts["train"].shuffle(seed=42)[0]
    assert example.keys() == {"docs", "query", "mistral_label"}
    assert example["docs"][:5] == ["Title\nText", "T\nx"]
    assert example["query"].replace("<MEM>", "").startswith("Why ")
    assert example["mistral_label"].replace("<MEM>", "") == "So."
    assert [path.name for path in output.parent.iterdir()] == ["pisco"], "nothing is left beside it"


def test_unsound_record_is_reported(data: Path, tmp_path: Path) -> None:
    data.write_text(json.dumps([*RECORDS, {"query": "no documents"}]))
    with pytest.raises(InputError, match=r"train_data\.json:1: .*; `scaledown validate"):
        export_pisco([data], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train_data.json"]


def test_file_without_records_is_refused(data: Path, tmp_path: Path) -> None:
    data.write_text("[]")
    with pytest.raises(InputError, match="the file has no record"):
        export_pisco([data], tmp_path / "out")


def test_existing_folder_is_not_changed(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    assert export_pisco([data], output) == 40
    with pytest.raises(OutputError, match="already exists: name a new folder"):
        export_pisco([data], output)

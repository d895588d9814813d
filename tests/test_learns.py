"""The splits of the learning benchmark: by article, without articles that were used before."""

import json
from collections import Counter
from hashlib import blake2b
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from conftest import ROOT, load_script

FOLDER = ROOT / "benchmarks"


@pytest.fixture
def learns(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return load_script(FOLDER / "learns.py", monkeypatch)


def test_articles_held_out_before_are_not_in_the_test_split(learns: ModuleType) -> None:
    titles = [f"Article {number}" for number in range(3000)]
    sides = learns.split([*titles, *map(str.upper, titles)])
    assert [sides[title] for title in titles] == [sides[title.upper()] for title in titles]
    for title in sides:
        first = blake2b(f"0 {title}".encode(), digest_size=2).digest()[0]
        if first % 10 == 0 or first % 100 < 13:
            assert sides[title] != "test"
    shares = {name: count / len(titles) for name, count in Counter(learns.split(titles).values()).items()}
    assert 0.10 < shares["test"] < 0.18
    assert 0.05 < shares["development"] < 0.11


def test_training_split_has_no_article_of_the_other_splits(learns: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    articles = [
        {"wikipedia_id": str(n), "wikipedia_title": f"Article {n}", "text": [f"Article {n}\n", f"Text {n}."]}
        for n in range(200)
    ]
    questions = [
        {"id": f"{n} {m}", "question": f"What {n} {m}?", "answers": [answer], "wikipedia_id": str(n)}
        for n in range(200)
        for m, answer in enumerate(("red", "Yes.", "blah " * 20))
    ]
    for name, rows in (("kilt", articles), ("questions", questions)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    gold = learns.write_inputs([folder], tmp_path, learns.RECIPES["short"])
    assert len(gold) == 200, "open questions with short answers only"

    def ids(name: str, key: str) -> set[str]:
        lines = (tmp_path / name).read_text().splitlines()
        return {str(json.loads(line)[key]).partition(" ")[0] for line in lines}

    asked = {name: ids(f"{name}.queries.jsonl", "id") for name in ("train", "development", "test")}
    trained = ids("train.corpus.jsonl", "wikipedia_id")
    assert asked["train"] == trained
    assert not trained & (asked["development"] | asked["test"])
    assert not asked["development"] & asked["test"]
    assert ids("all.corpus.jsonl", "wikipedia_id") == {str(n) for n in range(200)}


def test_better_value_is_chosen_for_each_measure(learns: ModuleType) -> None:
    one = learns.Scores(*(np.array(values) for values in ([1, 0], [0, 0], [0.1, 0.2], [3, 3])))
    other = learns.Scores(*(np.array(values) for values in ([0, 0], [0, 1], [0.4, 0.1], [2, 2])))
    found = [values.tolist() for values in learns.better(one, other)]
    assert found == [[1, 0], [0, 1], [0.4, 0.1], [3, 3]]

from pathlib import Path

import pytest

from scaledown.data.prompts import GUIDE, PAPER, answer_prompt, load_template
from scaledown.errors import InputError, UsageError


def test_known_prompts_have_names() -> None:
    assert load_template("paper") == PAPER
    assert load_template("guide") == GUIDE
    prompt = answer_prompt("1", "Who {documents}?", ["a {question}", "b"], 0.0)
    assert prompt.user(prompt.documents) == "Background:\na {question}\n\nb\n\nQuestion: Who {documents}?"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Read:\n{documents}\nAnswer {question} in Czech.", "Read:\na\n\nb\nAnswer Why? in Czech."),
        ("{question}\n---\n{documents}", "Why?\n---\na\n\nb"),
    ],
)
def test_template_is_read_from_a_file(text: str, shown: str, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(text)
    prompt = answer_prompt("1", "Why?", ["a", "b"], 0.0, load_template(str(tmp_path / "prompt.txt")))
    assert prompt.system == ""
    assert prompt.user(prompt.documents) == shown


@pytest.mark.parametrize("text", ["{documents}", "{question}", "{documents} {question} {question}", ""])
def test_template_without_its_placeholders_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(text)
    with pytest.raises(UsageError, match="must be there once"):
        load_template(str(tmp_path / "prompt.txt"))


@pytest.mark.parametrize("content", [None, b"\xff\xfe{documents}"])
def test_template_that_cannot_be_read_is_refused(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "prompt.txt").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read"):
        load_template(str(tmp_path / "prompt.txt"))


def test_digest_depends_only_on_the_text_for_the_teacher() -> None:
    one = answer_prompt("1", "Why?", ["a"], 0.0)
    assert one.digest == answer_prompt("2", "Why?", ["a"], 0.0).digest
    others = [("Why not?", ["a"], 0.0), ("Why?", ["b"], 0.0), ("Why?", ["a"], 0.5), ("Why?", ["a", ""], 0.0)]
    assert len({one.digest, *(answer_prompt("1", *other).digest for other in others)}) == 5

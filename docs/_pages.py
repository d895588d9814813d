"""Pages of the site that are made from the code: the flags of every command, and the changelog."""

import contextlib
import io
import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from scaledown.cli import main

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    files.append(File.generated(config, "commands.md", content=commands()))
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "changelog.md", content=changes))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links to the code, which lies outside of the site, become plain text."""
    return re.sub(r"\[([^\]]*)\]\(\.\./[^)]*\)", r"\1", markdown)


def commands() -> str:
    """The help of every command, as the command prints it."""
    whole = help_of()
    names = re.findall(r"^    ([a-z][\w-]+)(?: |$)", whole, re.MULTILINE)
    parts = [f"# Commands\n\n```text\n{whole}```\n"]
    parts += [f"## scaledown {name}\n\n```text\n{help_of(name)}```\n" for name in names]
    return "\n".join(parts)


def help_of(*words: str) -> str:
    """What `scaledown WORDS --help` prints, 84 columns wide, without terminal colours."""
    os.environ["COLUMNS"] = "84"
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return re.sub(r"\x1b\[[\d;]*m", "", out.getvalue())

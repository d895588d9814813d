"""Into a run: its inputs found, its settings compared, this process one of those that work in it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaledown.config.prepare import PrepareConfig
from scaledown.data.build_index import corpus_identity, file_identity
from scaledown.data.input.files import Source
from scaledown.data.input.remote import Remote
from scaledown.data.manifest import Sources, compared_settings, name_differences
from scaledown.data.prompts import load_template
from scaledown.data.session.parts import check_parts, is_indexed
from scaledown.data.session.resolve import find
from scaledown.models import same_bits
from scaledown.run.directory import SCHEMA, RunDirectory, fingerprint
from scaledown.run.heartbeat import publishing
from scaledown.run.locations import index_of, run_of


@dataclass(frozen=True)
class Entered:
    """A run whose inputs are all found, in which this process may work."""

    run: RunDirectory
    config: PrepareConfig
    request: str
    home: RunDirectory
    """Where passages and vectors are."""
    sources: Sources
    identities: dict[str, str]
    inputs: dict[str, Any]


@contextlib.contextmanager
def enter(config: PrepareConfig, repeats: Path | None = None, worker: str = "") -> Iterator[Entered]:
    """Find all inputs and enter the run directory as one of its live processes."""
    same_bits()
    sources = find(config)
    run = RunDirectory(run_of(config), config.part, worker)
    home = RunDirectory(index_of(config), config.part, worker) if config.index_dir else run
    identities = {name: model.identity(run.content_hash) for name, model in sources.models().items()}

    def identity(path: Source) -> str:
        return path.identity() if isinstance(path, Remote) else file_identity(run, path)

    inputs: dict[str, Any] = {
        "corpus": corpus_identity(home, sources.corpus),
        "queries": [identity(path) for path in sources.queries],
        "prompt": fingerprint(load_template(config.prompt)._asdict()),
    }
    if sources.evaluation:
        inputs["evaluation"] = [identity(path) for path in sources.evaluation]
    if config.teacher_lora:
        identities["lora"] = run.content_hash(Path(config.teacher_lora).expanduser())
    if repeats:
        name_differences(repeats, identities, inputs)
    indexed = home.storage.in_bucket and is_indexed(config, sources, home, identities["retriever"])
    check_parts(config, run, home, indexed=indexed)
    request = fingerprint(
        {"schema": SCHEMA, "parameters": compared_settings(config), "models": identities, "inputs": inputs}
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(publishing(stack.enter_context(run.claim(request)), worker, run, home))
        if home is not run:
            place = stack.enter_context(home.claim("index", finished=indexed))
            stack.enter_context(publishing(place, worker, home))
        yield Entered(run, config, request, home, sources, identities, inputs)

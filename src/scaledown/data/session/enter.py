"""The session: the work of this process on a run, with checked inputs and settings."""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scaledown.config.prepare import PrepareConfig
from scaledown.data.build_index import corpus_identity, file_identity, machine_settings, settled
from scaledown.data.cleaning.decontaminate import MATCH_VERSION as CLEAN_VERSION
from scaledown.data.input.files import Source
from scaledown.data.input.remote import Remote
from scaledown.data.manifest import (
    Sources,
    compared_settings,
    warn_about_differences,
    warn_about_dtype,
)
from scaledown.data.prompts import load_template
from scaledown.data.retrieval.parts import warn_about_changes
from scaledown.data.session.parts import check_parts, is_indexed
from scaledown.data.session.resolve import find_sources
from scaledown.data.workers import share_teachers, share_work, supervised
from scaledown.devices.choice import choose_device, same_bits
from scaledown.run.directory import RUN_LAYOUT, RunDirectory, fingerprint
from scaledown.run.heartbeat import publishing
from scaledown.run.locations import index_of, output_of, run_of
from scaledown.run.prometheus import metrics_file
from scaledown.run.stage import Stage


@dataclass(frozen=True)
class Session:
    """A run that this process works on, alone or with others."""

    run: RunDirectory
    """The run directory."""
    given: PrepareConfig
    """The settings as the user gave them."""
    request: str
    """The fingerprint of the run's settings, models and inputs."""
    home: RunDirectory
    """The run directory of passages and vectors."""
    sources: Sources
    """The inputs and models."""
    identities: dict[str, str]
    """The identity of each model, by its role."""
    inputs: dict[str, Any]
    """The identity of each input, by its role."""
    worker: str = ""
    """The name of this process if another process started it as a worker."""
    repeats: Path | None = None
    """The manifest of the run that this one repeats."""
    stages: dict[str, Stage] = field(default_factory=dict)
    """The opened stages by name, in order."""

    @functools.cached_property
    def device(self) -> str:
        """The device of the models. A finished run does not use it, since choosing it loads torch."""
        return choose_device(self.given.device)

    @functools.cached_property
    def config(self) -> PrepareConfig:
        """The settings, with batch sizes and a dtype for the device."""
        found = settled(self.given, self.run, self.device, self.run)
        if self.repeats:
            warn_about_dtype(self.repeats, machine_settings(found))
        return found

    @functools.cached_property
    def indexing(self) -> PrepareConfig:
        """The settings for passages, vectors and the vectors of queries: with the dtype of the index."""
        # Without a corpus the index stays as it is, and nothing is written to its directory.
        keeper = self.home if self.sources.corpus else self.run
        return settled(self.given, self.home, self.device, keeper)

    @property
    def machine(self) -> dict[str, str]:
        """Device and dtype, which influence the last bits of a model's output."""
        return machine_settings(self.config)

    @property
    def cleaning(self) -> dict[str, Any]:
        """The settings that decide which evaluation questions are left out."""
        return {"clean": CLEAN_VERSION, "evaluation": self.inputs.get("evaluation")}

    def stage(self, name: str, settings: Mapping[str, Any], sources: Sequence[Stage] = ()) -> Stage:
        """Open a stage of the run.

        Args:
            name: Its name, one of `STAGES`.
            settings: Everything that its shards depend on.
            sources: The stages that it is made from, see `Stage`.
        """
        stage = self.stages[name] = Stage(self.run, name, settings, sources)
        return stage

    def let_workers_help(self, work: str, ask: str, find: str) -> None:
        """Start the workers that the settings ask for, and wait until they have made all shards.

        Args:
            work: The function that they call, `module:function`.
            ask: The same for workers that make only queries, also those that the teacher writes.
            find: The same for workers that stop before the teacher answers. If several GPUs share the
                teacher, each of them works alone until then.
        """
        if self.worker:
            return
        runs = [self.run] if self.home is self.run else [self.run, self.home]
        if share_teachers(self.given):
            if self.given.num_synthetic_queries:
                share_work(self.given, ask, runs)
            share_work(self.given, find, runs, gpus_each=1)
        if supervised(self.given):
            share_work(self.given, work, runs)

    def parts(self) -> Iterator["Session"]:
        """Yield the part of the queries that this process makes; then all parts, if the others are finished.

        In the second pass no shard is missing; each stage is marked as complete.
        """
        yield self
        last = next(reversed(self.stages.values()))
        if not self.worker and last.done() is None and not last.missing():
            whole = replace(self, run=RunDirectory(self.run.storage), stages={})
            yield whole
            self.stages.update(whole.stages)

    def given_up(self, *, own: bool = False) -> int:
        """Count the shards that were given up, because each worker that tried them died.

        Args:
            own: Count only the shards that this part gave up.
        """
        homes = [self.run] if self.home is self.run else [self.run, self.home]
        return sum(home.given_up(own=own) for home in homes)


@contextlib.contextmanager
def open_session(
    config: PrepareConfig, repeats: Path | None = None, *, overwrite: bool = False, worker: str = ""
) -> Iterator[Session]:
    """Find all inputs, and register in the run directory as one of its live processes.

    Args:
        config: The settings as the user gave them.
        repeats: The manifest of a run to be repeated.
        overwrite: Whether the metrics file may replace a file that is not a metrics file.
        worker: The name of this process if another one started it to help. A worker writes no metrics.

    Yields:
        The session. It ends with the block.

    Raises:
        ScaleDownError: An input, a model or the output cannot be used, or the run directory is in use with
            other settings.
    """
    with contextlib.ExitStack() as stack:
        if not worker:
            output = output_of(config)
            output.storage.check_writable(output.path)
            metrics = metrics_file(config.metrics_file, run_of(config).root, overwrite=overwrite)
            stack.enter_context(metrics)
        yield stack.enter_context(_entered(config, repeats, worker))


@contextlib.contextmanager
def _entered(config: PrepareConfig, repeats: Path | None, worker: str) -> Iterator[Session]:
    same_bits()
    sources = find_sources(config)
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
        warn_about_differences(repeats, identities, inputs)
    indexed = home.storage.in_bucket and is_indexed(config, sources, run, home, identities["retriever"])
    check_parts(config, run, home, indexed=indexed)
    request = fingerprint(
        {
            "schema": RUN_LAYOUT,
            "parameters": compared_settings(config),
            "models": identities,
            "inputs": inputs,
        }
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(publishing(stack.enter_context(run.claim(request)), worker, run, home))
        if home is not run:
            warn_about_changes(run, home)
            place = stack.enter_context(home.claim("index", finished=indexed))
            stack.enter_context(publishing(place, worker, home))
        yield Session(run, config, request, home, sources, identities, inputs, worker, repeats)

"""The extension points of ScaleDown: one table for each kind of extension (docs/extending.md).

An entry is written `module:object`, and the module is imported when the entry is used. To add one here, write
a line below and the module that it names. Another package adds one by an entry point in its pyproject.toml:

    [project.entry-points."scaledown.measures"]
    brevity = "my_package:brevity"

Each process finds the entry points of the installed packages, so workers have them, too.
"""

import functools
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, distributions
from pkgutil import resolve_name
from typing import Any, Final

from scaledown.errors import UsageError


class Table(Mapping[str, Any]):
    """The extensions of one kind, by name.

    Iteration yields the names of our own entries, then the names of other packages' entries. If both have a
    name, ours is used.

    Args:
        kind: The name of the table: other packages use the entry-point group `scaledown.<kind>`.
        declares: The class of every entry, as `module:Class`.
        entries: Our own entries, as `module:object`.
        otherwise: The entry that `find` returns for any other name, as `module:object`.
    """

    def __init__(self, kind: str, declares: str, entries: Mapping[str, str], otherwise: str = "") -> None:
        self._otherwise = otherwise
        self.group = f"scaledown.{kind}"
        self.declares = declares
        self._own = {name: EntryPoint(name, value, self.group) for name, value in entries.items()}

    @property
    def outside(self) -> dict[str, EntryPoint]:
        """The entries of other packages, by name. They are not imported."""
        found = _installed(tuple(sys.path), self.group)
        return {name: point for name, point in found.items() if name not in self._own}

    def __getitem__(self, name: str) -> Any:
        """Import an entry.

        Raises:
            KeyError: There is no entry with this name.
            UsageError: The entry cannot be imported, or it is not an instance of `declares`.
        """
        return _loaded(self._own.get(name) or self.outside[name], self.declares)

    def find(self, name: str) -> Any:
        """Import the entry with this name, or `otherwise` if there is none.

        Args:
            name: The name of an entry, or any other text.

        Raises:
            UsageError: The entry cannot be imported, or it is not an instance of `declares`.
        """
        if name in self:
            return self[name]
        return _loaded(EntryPoint(name, self._otherwise, self.group), self.declares)

    def __iter__(self) -> Iterator[str]:
        return iter([*self._own, *self.outside])

    def __len__(self) -> int:
        return len(self.outside) + len(self._own)

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self.outside  # without importing the entry


@functools.cache
def _installed(path: tuple[str, ...], group: str) -> dict[str, EntryPoint]:
    """The entry points of a group in all packages on `path`, which is `sys.path`."""
    return {point.name: point for point in _every_entry_point(path) if point.group == group}


@functools.cache
def _every_entry_point(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """The entry points of all packages on `path`. Finding them takes about 50 ms."""
    return tuple(point for package in distributions() for point in package.entry_points)


@functools.cache
def _loaded(point: EntryPoint, declares: str) -> Any:
    """Import the object of an entry point. Raises `UsageError`, see `Table.__getitem__`."""
    try:
        entry = point.load()
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"{point.group} {point.name} ({point.value}) cannot be imported ({error}): correct its package, "
            "or uninstall the package"
        ) from error
    if not isinstance(entry, resolve_name(declares)):
        raise UsageError(
            f"{point.group} {point.name} ({point.value}) is {type(entry).__name__}, expected {declares}: see "
            "docs/extending.md"
        )
    return entry


RETRIEVER_KINDS: Final = Table(
    "retriever_kinds",
    "scaledown.data.retrieval.encoders:RetrieverKind",
    {
        "dense": "scaledown.data.retrieval.encoders:DENSE",
        "splade": "scaledown.data.retrieval.encoders:SPLADE",
    },
)
"""Kinds of `--retriever_model`. A model is of the last kind that accepts it."""

TEACHER_ENGINES: Final = Table(
    "teacher_engines",
    "scaledown.data.teacher.base:TeacherEngine",
    {
        "transformers": "scaledown.data.teacher.engines.transformers:ENGINE",
        "vllm": "scaledown.data.teacher.engines.vllm:ENGINE",
        "openvino": "scaledown.data.teacher.engines.openvino:ENGINE",
        "endpoint": "scaledown.data.teacher.engines.endpoint:ENGINE",
    },
)
"""Engines that run the teacher, by `--teacher_backend`. `auto` uses the last one that suits."""

QUERY_SOURCES: Final = Table(
    "query_sources",
    "scaledown.data.input.query_sources:QuerySource",
    {
        "natural_questions": "scaledown.data.input.query_sources:NATURAL_QUESTIONS",
        "trivia_qa": "scaledown.data.input.query_sources:TRIVIA_QA",
        "squad": "scaledown.data.input.query_sources:SQUAD",
        "nq_open": "scaledown.data.input.query_sources:NQ_OPEN",
        "pisco": "scaledown.data.input.query_sources:PISCO",
    },
)
"""Names for `--query_dataset`, besides datasets of the hub and local paths."""

COMPRESSORS: Final = Table(
    "compressors",
    "scaledown.student.compressor:Compressor",
    {
        "n_layers": "scaledown.student.compressors.memory_tokens:N_LAYERS",
        "pointer": "scaledown.student.compressors.pointer:POINTER",
        "modernbert": "scaledown.student.compressors.memory_tokens:MODERNBERT",
    },
    otherwise="scaledown.student.compressors.memory_tokens:SEPARATE",
)
"""Kinds of `--compressor`. Any other name is the model of a separate encoder or decoder."""

STUDENT_ENGINES: Final = Table(
    "student_engines",
    "scaledown.student.engines.base:StudentEngine",
    {
        "transformers": "scaledown.student.engines.transformers:ENGINE",
        "openvino": "scaledown.student.engines.openvino:ENGINE",
        "vllm": "scaledown.student.engines.vllm:ENGINE",
    },
)
"""Engines that write a student's answers, by `--engine`. `auto` uses the last one that suits."""

MEASURES: Final = Table(
    "measures",
    "collections.abc:Callable",
    {
        "accuracy": "scaledown.metrics:accuracy",
        "EM": "scaledown.metrics:exact_match",
        "F1": "scaledown.metrics:f1",
        "ROUGE-L": "scaledown.metrics:rouge_l",
    },
)
"""Measures of answers, with the names that papers use. An evaluation computes all of them."""

OUTPUT_FORMATS: Final = Table(
    "output_formats",
    "scaledown.data.input.training_files:OutputFormat",
    {
        "json": "scaledown.data.output.writers:JSON_FORMAT",
        "jsonl": "scaledown.data.output.writers:JSONL_FORMAT",
        "parquet": "scaledown.data.output.writers:PARQUET_FORMAT",
    },
)
"""Formats of training data, by the suffix of the file without its dot."""

"""Datasets of questions: what `--query_dataset` may name."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

from scaledown.errors import InputError
from scaledown.extensions import QUERY_SOURCES
from scaledown.models.hub import hub_errors, reach_hub


@runtime_checkable
class QuerySource(Protocol):
    """An entry of `QUERY_SOURCES`."""

    @property
    def column(self) -> str:
        """The column of the question; dots reach into records. Empty: it is found by its name."""

    def load(self, split: str, revision: str) -> Iterable[Mapping[str, Any]]:
        """The records of a split, in the same order each time; they are read one by one.

        Args:
            split: The value of `--query_split`.
            revision: What follows an @ in `--query_dataset`, or nothing.

        Returns:
            A record for each question. Of one of the `datasets` library only the needed columns are read.
        """

    def size(self, split: str, revision: str) -> int | None:
        """How many records a split has; None where only reading them can tell."""


class HubDataset(NamedTuple):
    """A dataset of the hub, or a local one in any layout that `datasets` reads."""

    repository: str
    configuration: str | None = None
    column: str = ""

    def load(self, split: str, revision: str) -> Any:
        """The split as `datasets` has it, streamed unless it was saved by `save_to_disk`."""
        import datasets

        datasets.disable_progress_bars()
        path = Path(self.repository)
        if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
            loaded = datasets.load_from_disk(str(path))
            splits = loaded if isinstance(loaded, datasets.DatasetDict) else {split: loaded}
            if split not in splits:
                raise InputError(f"dataset {self.repository}: --query_split is one of {', '.join(splits)}")
            return splits[split]
        if not path.exists():
            reach_hub()
        return datasets.load_dataset(
            self.repository, self.configuration, split=split, streaming=True, revision=revision or None
        )

    def size(self, split: str, revision: str) -> int | None:
        """What the hub says of it."""
        import datasets

        with hub_errors(self.repository, "dataset"):
            reach_hub()
            builder = datasets.load_dataset_builder(
                self.repository, self.configuration, revision=revision or None
            )
        found = (builder.info.splits or {}).get(split)
        return found.num_examples if found else None


NATURAL_QUESTIONS: Final = HubDataset(
    "google-research-datasets/natural_questions", "default", "question.text"
)
TRIVIA_QA: Final = HubDataset("mandarjoshi/trivia_qa", "unfiltered.nocontext", "question")
SQUAD: Final = HubDataset("rajpurkar/squad", None, "question")
NQ_OPEN: Final = HubDataset("google-research-datasets/nq_open", None, "question")
PISCO: Final = HubDataset("maxoul/pisco_finetuning_data")


class Named(NamedTuple):
    """What a value of `--query_dataset` means."""

    name: str
    source: QuerySource
    revision: str


def named(dataset: str) -> Named:
    """A local path, an entry of `QUERY_SOURCES` or a dataset of the hub.

    A revision follows the last two after an @.
    """
    if Path(dataset).exists():
        return Named(dataset, HubDataset(dataset), "")
    name, _, revision = dataset.partition("@")
    return Named(name, QUERY_SOURCES[name] if name in QUERY_SOURCES else HubDataset(name), revision)

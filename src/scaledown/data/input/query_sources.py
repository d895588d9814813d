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
        """Load the records of a split, in the same order each time; they are read one by one.

        Args:
            split: The value of `--query_split`.
            revision: The text after an @ in `--query_dataset`; empty if there is none.

        Returns:
            A record for each question. If it is a dataset of the `datasets` library, only the needed columns
            are read.
        """

    def size(self, split: str, revision: str) -> int | None:
        """Return the number of records in a split.

        Args:
            split: The value of `--query_split`.
            revision: The text after an @ in `--query_dataset`; empty if there is none.

        Returns:
            The number; None if it is known only after reading.
        """


class HubDataset(NamedTuple):
    """A dataset of the hub, or a local one in any layout that `datasets` reads."""

    repository: str
    """The name on the hub, as `organisation/name`, or a folder."""
    configuration: str | None = None
    """The name of the dataset's configuration; None for its default."""
    column: str = ""
    """The column of the question; dots reach into records. If empty, it is found by its name."""

    def load(self, split: str, revision: str) -> Any:
        """Load a split with `datasets`. It is streamed, unless `save_to_disk` wrote the dataset.

        Args:
            split: The name of the split.
            revision: A revision on the hub; empty for the newest.

        Raises:
            InputError: A dataset on disk does not have the split.
        """
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
        """Return the number of records that the hub reports for a split; None if it reports none.

        Args:
            split: The name of the split.
            revision: A revision on the hub; empty for the newest.
        """
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
    """A value of `--query_dataset`."""

    name: str
    """The name without revision."""
    source: QuerySource
    """The dataset."""
    revision: str
    """The text after an @; empty if there is none."""


def named_dataset(dataset: str) -> Named:
    """Find the dataset that a value of `--query_dataset` names.

    Args:
        dataset: A local path, the name of an entry of `QUERY_SOURCES`, or a dataset of the hub. An @ and a
            revision may follow the last two.
    """
    if Path(dataset).exists():
        return Named(dataset, HubDataset(dataset), "")
    name, _, revision = dataset.partition("@")
    return Named(name, QUERY_SOURCES[name] if name in QUERY_SOURCES else HubDataset(name), revision)

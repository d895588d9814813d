"""Log answers to disk as they arrive, before their shard is complete: none is lost, none is paid twice."""

import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from scaledown.data.prompts import Prompt
from scaledown.data.teacher.base import Rejection, Teacher, answers_of
from scaledown.errors import OutputError
from scaledown.records import Answer
from scaledown.run.stage import Stage
from scaledown.run.storage import Storage

_LOG_ENDING: Final = ".part.jsonl"
_PUBLISH_SECONDS: Final = 30


_LOG_NAME: Final = re.compile(r"\d{6}(-\d{6})?\.part\.jsonl")


class AnswerLog:
    """JSON lines beside the shards of a stage: an answer on each line, with its place and its prompt's hash.

    A line is passed to the operating system at once, so that it survives the death of the process. It is on
    the disk within `flush_seconds`, so that it survives a crash of the machine, and in an object store half a
    minute later. In a store each process writes its own file, since objects cannot be appended to; all files
    are read.
    """

    def __init__(self, path: Path, flush_seconds: float, storage: Storage) -> None:
        self.path = path
        self._flush_seconds = flush_seconds
        self._storage = storage

    @classmethod
    def of(cls, stage: Stage, shards: range, flush_seconds: float) -> "AnswerLog":
        """Return the log of one shard, or of several that are asked together: `000000-000016.part.jsonl`.

        Args:
            stage: The stage of answers.
            shards: The numbers of the shards.
            flush_seconds: Seconds after which an answer is on the disk at the latest.
        """
        last = f"-{shards.stop:06d}" if len(shards) > 1 else ""
        return cls(stage.folder / f"{shards.start:06d}{last}{_LOG_ENDING}", flush_seconds, stage.storage)

    @classmethod
    def every(cls, stage: Stage) -> list["AnswerLog"]:
        """Return all logs of a stage, for reading."""
        logs = stage.storage.logs(stage.folder, f"*{_LOG_ENDING}")
        return [cls(path, 0, stage.storage) for path in sorted(logs) if _LOG_NAME.fullmatch(path.name)]

    @classmethod
    def others(cls, stage: Stage, shards: range, prompts: Sequence[Prompt]) -> dict[int, Answer]:
        """Return logged answers of other groups that share some shards with a group.

        Args:
            stage: The stage of answers.
            shards: The numbers of the group's shards.
            prompts: The prompts of the group.

        Returns:
            Answers to these prompts, by place in `prompts`. They are found by the hash of the prompt.
        """
        places: dict[str, list[int]] = {}
        for place, prompt in enumerate(prompts):
            places.setdefault(prompt.digest, []).append(place)
        found: dict[int, Answer] = {}
        for log in cls.every(stage):
            own = log.shards
            if own != shards and own.start < shards.stop and shards.start < own.stop:
                found |= log._found(lambda _, digest: places.get(digest, []))
        return found

    @property
    def shards(self) -> range:
        """The shards of its answers."""
        first, _, stop = self.path.name.removesuffix(_LOG_ENDING).partition("-")
        return range(int(first), int(stop or int(first) + 1))

    def read(self, prompts: Sequence[Prompt]) -> dict[int, Answer]:
        """Return the logged answers to prompts.

        Args:
            prompts: The prompts of the log's shards, in order.

        Returns:
            Answers by place in `prompts`; only those whose prompt has not changed.
        """

        def places(place: int, digest: str) -> list[int]:
            return [place] if 0 <= place < len(prompts) and digest == prompts[place].digest else []

        return self._found(places)

    def _found(self, places: Callable[[int, str], list[int]]) -> dict[int, Answer]:
        """Return the logged answers; `places` maps the logged place and hash to the wanted places."""
        found: dict[int, Answer] = {}
        for record in self._records():
            place, digest = record.pop("place", -1), record.pop("prompt_hash", "")
            if isinstance(place, int) and (own := places(place, digest)):
                with contextlib.suppress(TypeError):  # written by another version
                    found |= dict.fromkeys(own, Answer(**record))
        return found

    @contextlib.contextmanager
    def writing(self) -> Iterator["Writer"]:
        """Append answers. The shard's lease ensures that only one process at a time does so."""
        stop = threading.Event()
        failed: list[Exception] = []
        for path in self._storage.owned(self.path):  # logs of processes that were killed before publishing
            self._storage.send_log(path)
        path = self.path.with_name(self._storage.own(self.path.name))
        with path.open("ab+") as file:
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                file.write(b"\n")  # after a line that a crash cut short

            def sync() -> None:
                published = time.monotonic()
                try:
                    while not stop.wait(self._flush_seconds):
                        os.fsync(file.fileno())
                        if time.monotonic() - published > _PUBLISH_SECONDS:
                            published = time.monotonic()
                            self._storage.publish(path)
                except (OSError, OutputError) as error:  # raised at the next answer
                    failed.append(error)

            def write(line: bytes) -> None:
                if failed:
                    raise failed[0]
                file.write(line)
                file.flush()

            thread = threading.Thread(target=sync, daemon=True)
            thread.start()
            try:
                yield Writer(write)
            finally:
                stop.set()
                thread.join()
                os.fsync(file.fileno())
                self._storage.publish(path)

    def tokens(self, without: Collection[str] = ()) -> int:
        """Count the tokens of logged prompts and answers, except for prompts with hashes in `without`."""
        return sum(
            _token_count(record) for record in self._records() if record.get("prompt_hash") not in without
        )

    def remove(self) -> None:
        """Delete the log, when the shard is complete."""
        for path in self._storage.owned(self.path):
            self._storage.remove(path)

    def _records(self) -> Iterator[dict[str, Any]]:
        for path in self._storage.owned(self.path):
            self._storage.fetch_log(path)
            yield from _logged(path)


class Writer:
    """Appends answers to a log."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write

    def add(self, place: int, prompt: Prompt, answer: Answer) -> None:
        """Append an answer.

        Args:
            place: The place of its prompt in the log's shards.
            prompt: The prompt.
            answer: The answer.

        Raises:
            OSError, OutputError: An earlier answer could not be written to the disk or published.
        """
        usual = Answer._field_defaults
        own = {name: value for name, value in answer._asdict().items() if (name, value) not in usual.items()}
        record = {"place": place, "prompt_hash": prompt.digest, **own}
        self._write(json.dumps(record, ensure_ascii=True).encode() + b"\n")


def answer_prompts(
    teacher: Teacher,
    prompts: Sequence[Prompt],
    log: AnswerLog,
    came: Callable[[Answer | Rejection], None] = lambda _: None,
    have: Mapping[int, Answer] | None = None,
) -> list[Answer | Rejection]:
    """Answer prompts: from `have`, from the log, and by the teacher. New answers are logged.

    Args:
        teacher: Answers the other prompts.
        prompts: The prompts.
        log: Has earlier answers, and receives new ones. Rejections are not logged: a later call asks again.
        came: Called with each new answer or rejection.
        have: Answers that are known already, by place.

    Returns:
        Answers and rejections in the order of the prompts.
    """
    answers: dict[int, Answer | Rejection] = {**log.read(prompts), **(have or {})}
    known = frozenset(answers)
    with log.writing() as writer:
        for place, answer in answers_of(teacher, prompts, known):
            if place in known:
                continue
            if isinstance(answer, Answer):
                writer.add(place, prompts[place], answer)
            answers[place] = answer
            came(answer)
    return [answers[place] for place in range(len(prompts))]


def _logged(path: Path) -> Iterator[dict[str, Any]]:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):  # cut short by a crash
                if isinstance(record := json.loads(line), dict):
                    yield record


def _token_count(record: Mapping[str, Any]) -> int:
    return int(record.get("prompt_tokens", 0)) + int(record.get("answer_tokens", 0))

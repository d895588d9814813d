"""Answers on disk as they come, before the shard they belong to is whole: none is lost, none paid twice."""

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
from scaledown.data.teacher.base import Rejection, Teacher
from scaledown.errors import OutputError
from scaledown.records import Answer
from scaledown.run.stage import Stage
from scaledown.run.storage import Storage

_ENDING: Final = ".part.jsonl"
_PUBLISH_SECONDS: Final = 30


_NAME: Final = re.compile(r"\d{6}(-\d{6})?\.part\.jsonl")


class AnswerLog:
    """JSON lines beside the shards of a stage: one an answer, with its place and the hash of its prompt.

    A line is with the system at once, so that it survives the death of the process, and on the disk within
    `flush_seconds`, so that it survives that of the machine; in an object store half a minute later. There
    each process writes a file of its own, since none can be appended to; all are read.
    """

    def __init__(self, path: Path, flush_seconds: float, storage: Storage) -> None:
        self.path = path
        self._flush_seconds = flush_seconds
        self._storage = storage

    @classmethod
    def of(cls, stage: Stage, shards: range, flush_seconds: float) -> "AnswerLog":
        """That of a shard, or of several that are asked together: `000000-000016.part.jsonl`."""
        last = f"-{shards.stop:06d}" if len(shards) > 1 else ""
        return cls(stage.folder / f"{shards.start:06d}{last}{_ENDING}", flush_seconds, stage.storage)

    @classmethod
    def every(cls, stage: Stage) -> list["AnswerLog"]:
        """All that a stage has, to be read."""
        logs = stage.storage.logs(stage.folder, f"*{_ENDING}")
        return [cls(path, 0, stage.storage) for path in sorted(logs) if _NAME.fullmatch(path.name)]

    @classmethod
    def others(cls, stage: Stage, shards: range, prompts: Sequence[Prompt]) -> dict[int, Answer]:
        """What is kept for these prompts where these shards, or some, were asked together with others."""
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
        """The shards whose answers it holds."""
        first, _, stop = self.path.name.removesuffix(_ENDING).partition("-")
        return range(int(first), int(stop or int(first) + 1))

    def read(self, prompts: Sequence[Prompt]) -> dict[int, Answer]:
        """What is kept for these prompts, by their place."""

        def places(place: int, digest: str) -> list[int]:
            return [place] if 0 <= place < len(prompts) and digest == prompts[place].digest else []

        return self._found(places)

    def _found(self, places: Callable[[int, str], list[int]]) -> dict[int, Answer]:
        """The answers kept, by the places that `places` gives for the place and the hash they have here."""
        found: dict[int, Answer] = {}
        for record in self._records():
            place, digest = record.pop("place", -1), record.pop("prompt_hash", "")
            if isinstance(place, int) and (own := places(place, digest)):
                with contextlib.suppress(TypeError):  # written by another version
                    found |= dict.fromkeys(own, Answer(**record))
        return found

    @contextlib.contextmanager
    def writing(self) -> Iterator["Writer"]:
        """Append answers. One process at a time: the shard's lease sees to that."""
        stop = threading.Event()
        failed: list[Exception] = []
        for path in self._storage.owned(self.path):  # of one that was killed before it could
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
                except (OSError, OutputError) as error:  # told with the next answer
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
        """Tokens of prompts and answers that are kept, but for those with these hashes of prompts."""
        return sum(_tokens(record) for record in self._records() if record.get("prompt_hash") not in without)

    def remove(self) -> None:
        """Forget it: the shard is whole."""
        for path in self._storage.owned(self.path):
            self._storage.remove(path)

    def _records(self) -> Iterator[dict[str, Any]]:
        for path in self._storage.owned(self.path):
            self._storage.fetch_log(path)
            yield from _records(path)


class Writer:
    """Appends answers to a log."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write

    def add(self, place: int, prompt: Prompt, answer: Answer) -> None:
        """Keep an answer."""
        usual = Answer._field_defaults
        own = {name: value for name, value in answer._asdict().items() if (name, value) not in usual.items()}
        record = {"place": place, "prompt_hash": prompt.digest, **own}
        self._write(json.dumps(record, ensure_ascii=True).encode() + b"\n")


def ask(
    teacher: Teacher,
    prompts: Sequence[Prompt],
    log: AnswerLog,
    came: Callable[[Answer | Rejection], None] = lambda _: None,
    have: Mapping[int, Answer] | None = None,
) -> list[Answer | Rejection]:
    """Answers in the order of the prompts: those in `have`, those in the log, and new ones, which it keeps.

    Rejections are not kept: whoever comes again asks again. `came` is told of each new one.
    """
    answers: dict[int, Answer | Rejection] = {**log.read(prompts), **(have or {})}
    known = frozenset(answers)
    with log.writing() as writer:
        for place, answer in teacher.answers(prompts, known):
            if place in known:
                continue
            if isinstance(answer, Answer):
                writer.add(place, prompts[place], answer)
            answers[place] = answer
            came(answer)
    return [answers[place] for place in range(len(prompts))]


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):  # cut short by a crash
                if isinstance(record := json.loads(line), dict):
                    yield record


def _tokens(record: Mapping[str, Any]) -> int:
    return int(record.get("prompt_tokens", 0)) + int(record.get("answer_tokens", 0))

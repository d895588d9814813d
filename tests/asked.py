"""A request to the serving engine, and its answer."""

import queue
from typing import Any

from scaledown.serving.engine import Engine
from scaledown.serving.jobs import End, Event, Job, Piece


class Asked:
    """A request, and its answer."""

    def __init__(self, engine: Engine, query: str, documents: list[str], **changes: Any) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self.job = Job(query, documents, self.events.put, **{"rate": 16, "max_new_tokens": 6, **changes})
        engine.submit(self.job)

    def all(self) -> list[Event]:
        """The pieces of the answer, and its end."""
        found = [self.events.get(timeout=120)]
        while isinstance(found[-1], Piece):
            found.append(self.events.get(timeout=120))
        return found

    def text(self) -> str:
        """The whole answer."""
        *pieces, end = self.all()
        assert isinstance(end, End), end
        return "".join(piece.text for piece in pieces if isinstance(piece, Piece))

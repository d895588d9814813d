"""A request on its way through the engine, and what comes back."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from scaledown.serving.protocol import RequestError


class Usage(NamedTuple):
    """What a request took."""

    prompt: int = 0
    """Positions of the generator's prompt, tokens and embeddings."""
    completion: int = 0
    """Tokens written."""
    document_tokens: int = 0
    """Of the compressor's; those that were compressed."""
    embeddings: int = 0
    """That stand for them."""
    cut: int = 0
    """Documents that were longer than the model compresses."""


class Piece(NamedTuple):
    """Some more text of an answer."""

    text: str


class End(NamedTuple):
    """The answer is complete."""

    reason: str
    """`stop`, or `length` where it was cut."""
    usage: Usage


class Scores(NamedTuple):
    """The relevance of each document."""

    relevance: list[float]
    usage: Usage


Event = Piece | End | Scores | RequestError


@dataclass(eq=False)
class Job:
    """One request on its way through the engine."""

    query: str
    documents: list[str]
    send: Callable[[Event], None]
    """Called from the engine's thread."""
    system: str = ""
    compressed: bool = True
    ranks: bool = False
    """Whether the documents' relevance is asked for, and no answer."""
    rate: int = 0
    budget: str = "each"
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = ()
    cancelled: bool = False
    """Set by whoever no longer waits."""
    settled: bool = False
    """Whether its last event was sent."""
    arrived: float = field(default_factory=time.monotonic)

    def finish(self, event: Event) -> None:
        """Send the last event, once."""
        if not self.settled:
            self.settled = True
            self.send(event)

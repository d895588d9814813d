"""A request in the engine, and the events that the engine sends for it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from scaledown.serving.protocol import RequestError


class Usage(NamedTuple):
    """What a request used."""

    prompt: int = 0
    """Positions of the generator's prompt, tokens and embeddings."""
    completion: int = 0
    """Tokens written."""
    document_tokens: int = 0
    """Tokens of documents that were compressed, by the compressor's tokenizer."""
    embeddings: int = 0
    """Embeddings that replace these tokens."""
    cut_documents: int = 0
    """Documents that were cut because they are longer than the compressor's limit."""
    cut_queries: int = 0
    """1 if the query was cut for the compressor, else 0; the generator reads it whole."""
    cut_tokens: int = 0
    """Tokens of documents' text that were left out because the generator's context has no room."""


class Piece(NamedTuple):
    """The next piece of an answer's text."""

    text: str


class End(NamedTuple):
    """The answer is complete."""

    reason: str
    """`stop`, or `length` if the answer reached its limit."""
    usage: Usage


class Scores(NamedTuple):
    """The relevance of each document."""

    relevance: list[float]
    """[documents]: higher is better."""
    usage: Usage


Event = Piece | End | Scores | RequestError


@dataclass(eq=False)
class Job:
    """One request in the engine."""

    query: str
    """The question."""
    documents: list[str]
    """Texts; a title is on the first line. Without documents the generator answers from its own knowledge."""
    send: Callable[[Event], None]
    """Called from the engine's thread."""
    identity: str = ""
    """Its id, for the log."""
    system: str = ""
    """Replaces the system message of the model's prompt; empty keeps it."""
    compressed: bool = True
    """Whether documents are compressed; otherwise the generator reads their text."""
    ranks: bool = False
    """Whether the request asks for the documents' relevance instead of an answer."""
    rate: int = 0
    """Document tokens for each memory token; 0 is the model's own rate."""
    budget: str = "each"
    """`each` or `shared`, see `ScaleDownModel.answer`."""
    max_new_tokens: int = 128
    """The most tokens of the answer."""
    temperature: float = 0.0
    """0 takes the most probable token each time."""
    top_p: float = 1.0
    seed: int | None = None
    """None draws another answer each time."""
    stops: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    cancelled: bool = False
    """Set if the client no longer waits."""
    had_all_memory: bool = False
    """Set before the request is tried alone, with an empty cache, because memory did not suffice before."""
    settled: bool = False
    """Whether its last event was sent."""
    arrived: float = field(default_factory=time.monotonic)
    """Seconds of the monotonic clock."""

    def finish(self, event: Event) -> None:
        """Send the last event. Later calls do nothing.

        Args:
            event: The end of the answer, the scores, or the error.
        """
        if not self.settled:
            self.settled = True
            self.send(event)

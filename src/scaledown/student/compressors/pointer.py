"""The pointer picks the tokens of each document that matter for the query; the generator reads these.

Memory tokens must first learn to extract content from a document; a selection of tokens needs no such step.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import nn

from scaledown.student.batch import Group
from scaledown.student.compressor import Compressed, Compressor, document_order, no_documents
from scaledown.student.compressors.queries import states_after_queries

NO_WORD: Final = -1
_SCORED: Final = 128  # hidden units that read a state
_CONTEXT: Final = 96  # units of the recurrent layer, in each direction
_FEATURES: Final = 2
_WINDOW: Final = 11  # tokens over which matches with the query are averaged
_REACH: Final = 4  # tokens on each side that add to a token's probability
_DECAY: Final = 0.7  # factor of what they add, for each token of distance (docs/results.md)
RATES: Final = (4, 8, 16, 32)
"""Compression rates used in training. It compresses at any rate from the first to the last."""
PADDED: Final = -1e4  # the score of padding; finite, so that a softmax over it has gradients


class Pointer(nn.Module):
    """Scores the tokens of documents for a query, and makes embeddings of the best ones.

    The compressor's layers are causal: a token's state depends on the query, which is read first, and on the
    tokens before it. A small bidirectional recurrent layer over the states adds the tokens after it.
    """

    words: torch.Tensor

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        # The last layers have no biases: a bias would add the same number to all scores, without effect.
        self.linear = nn.Linear(width, 1, bias=False)
        self.score_state = nn.Sequential(
            nn.Linear(width, _SCORED), nn.GELU(), nn.Linear(_SCORED, 1, bias=False)
        )
        self.narrow = nn.Linear(width, _SCORED)
        read = _SCORED + _FEATURES
        self.context = nn.GRU(read, _CONTEXT, bidirectional=True, batch_first=True)
        self.score_context = nn.Sequential(
            nn.Linear(2 * _CONTEXT + read, _CONTEXT), nn.GELU(), nn.Linear(_CONTEXT, 1, bias=False)
        )
        self.carry = nn.Linear(width, width, bias=False)
        # The number of each token's word, see `same_words`: two tokens match if their numbers are equal.
        self.register_buffer("words", torch.arange(vocabulary))

    def start(self, tokenizer: Any) -> None:
        """Set initial values: the linear score is 0, and an embedding is the generator's for the token."""
        for layer in (self.linear, self.carry):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
        self.words.copy_(torch.tensor(same_words(tokenizer, len(self.words))))

    def forward(self, states: torch.Tensor, lengths: torch.Tensor, matches: torch.Tensor) -> torch.Tensor:
        """Score the tokens of documents.

        Args:
            states: [documents, tokens, width]: states of the documents' own tokens.
            lengths: [documents]: number of tokens without padding.
            matches: [documents, tokens]: 1 for tokens whose word occurs in the query.

        Returns:
            [documents, tokens] float32; `PADDED` at padding.
        """
        inside = torch.arange(states.shape[1], device=states.device) < lengths[:, None]  # [documents, tokens]
        with torch.autocast(states.device.type, enabled=False):
            dtype = self.linear.weight.dtype  # float32 in training
            states = normed(states).to(dtype)
            matches = matches.to(dtype) * inside
            near = nn.functional.avg_pool1d(matches[:, None], _WINDOW, 1, _WINDOW // 2)[:, 0]
            read = torch.cat(
                [nn.functional.gelu(self.narrow(states)), matches[..., None], near[..., None]], -1
            )  # [documents, tokens, 130]
            # Packed, so that the backward direction begins at a document's end and not in its padding. An
            # empty document cannot be packed: one of its padding tokens is read, and never picked.
            at_least_one = lengths.clamp(min=1).cpu()
            packed = nn.utils.rnn.pack_padded_sequence(read, at_least_one, True, enforce_sorted=False)
            around, _ = nn.utils.rnn.pad_packed_sequence(
                self.context(packed)[0], batch_first=True, total_length=states.shape[1]
            )  # [documents, tokens, 192]
            scores = (
                self.linear(states)
                + self.score_state(states)
                + self.score_context(torch.cat([around, read], -1))
            )
        masked: torch.Tensor = scores[..., 0].float().masked_fill(~inside, PADDED)
        return masked

    def embed(self, tokens: torch.Tensor, states: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
        """Make embeddings of the picked tokens: the generator's embedding plus a linear map of the state.

        Args:
            tokens: [documents, tokens, width]: the generator's embeddings of the tokens.
            states: [documents, tokens, width]: states of the tokens.
            picked: [documents, tokens] bool.

        Returns:
            [picked tokens, width].
        """
        carried = self.carry(normed(states[picked]).to(self.carry.weight.dtype))
        embeddings: torch.Tensor = tokens[picked] + carried.to(tokens.dtype)
        return embeddings


class _Scored(NamedTuple):
    """A group of documents with scores; only the documents' own tokens, without the query."""

    ids: torch.Tensor
    """[documents, tokens]."""
    states: torch.Tensor
    """[documents, tokens, width]."""
    scores: torch.Tensor
    """[documents, tokens] float32."""
    lengths: torch.Tensor
    """[documents]."""
    counts: torch.Tensor
    """[documents]: number of tokens to pick."""


class PicksTokens(Compressor):
    """The kind of compressor: a pointer over the generator's first layers."""

    label = "pointer"
    learning_rate = 3e-4
    betas = (0.9, 0.98)  # runs have hundreds of steps: with 0.999 the average would span a whole run
    # The scoring layers are new and learn faster. `carry` learns slower: a step at the full rate would change
    # what it adds to an embedding by the norm of an embedding.
    part_rates: Mapping[str, float] = {"pointer": 10 / 3, "pointer.carry": 1 / 15}
    reads_queries_once = True
    float32_parts = ("pointer",)  # small, and the order of tokens needs the precision
    rates = RATES
    ranks = True
    picks_tokens = True

    def add_parts(self, model: Any) -> None:
        """Add the pointer."""
        embeddings = model.compressor.get_input_embeddings()
        model.pointer = Pointer(embeddings.embedding_dim, embeddings.num_embeddings)

    def start(self, model: Any, tokenizer: Any) -> None:
        """Set the pointer's initial values."""
        model.pointer.start(tokenizer)

    def loaded(self, model: Any) -> None:
        """Convert the numbers of words to integers: loading makes them float32 with all other values."""
        model.pointer.words = model.pointer.words.long()

    def choose_pretrained(self, model: Any) -> None:
        """Train the layers that pick tokens, and nothing after them: pretraining needs no generator."""
        model.generator.requires_grad_(requires_grad=False)
        model.pointer.carry.requires_grad_(requires_grad=False)

    def loss(self, compressed: Compressed, copied: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor | None:
        """Compute the cross-entropy on the tokens that answers copy, see `pointer_loss`.

        Args:
            compressed: The result of `compress`.
            copied: [documents, longest document]: 1 for tokens that the answer copies, else 0.
            sizes: Number of documents of each question.

        Returns:
            The sum over questions, a scalar; None if there are no documents.
        """
        scores = compressed.token_scores
        return None if scores is None else pointer_loss(scores, copied, sizes)

    def compress(self, model: Any, groups: Sequence[Group], shared: Sequence[int]) -> Compressed:
        """Compress documents by picking tokens.

        Args:
            model: The `ScaleDownModel`.
            groups: Groups of documents of similar length.
            shared: Number of documents of each question, if these share their memory tokens; else empty.

        Returns:
            All documents in the order of their `places`. A document's relevance is its best token's score.
        """
        if not groups:
            return no_documents(model)
        scored = [_token_scores(model, group) for group in groups]
        order = document_order(groups)
        longest = max(own.scores.shape[1] for own in scored)
        scores = torch.cat(
            [
                nn.functional.pad(own.scores, (0, longest - own.scores.shape[1]), value=PADDED)
                for own in scored
            ]
        )
        counts, lengths = (
            torch.cat([getattr(own, name) for own in scored]) for name in ("counts", "lengths")
        )
        if shared:  # choose among all documents of a question, in their order
            chosen = torch.empty_like(scores, dtype=torch.bool)
            chosen[order] = choose_shared(scores[order], counts[order], lengths[order], shared)
        else:
            chosen = choose(scores, counts, lengths)
        picked: list[torch.Tensor] = []
        first = 0
        for own in scored:  # group by group: one tensor of all states would be padded to the longest document
            mine = chosen[first : first + len(own.ids), : own.ids.shape[1]]
            first += len(own.ids)
            words = model.get_input_embeddings()(own.ids)
            embeddings = model.pointer.embed(words, own.states, mine)
            picked += torch.split(embeddings, mine.sum(1).tolist())
        return Compressed(
            torch.cat([picked[place] for place in order.tolist()]),
            [len(picked[place]) for place in order.tolist()],
            scores[order].max(1).values,
            scores[order],
            chosen[order],
        )


def _token_scores(model: Any, group: Group) -> _Scored:
    ids, starts = group["ids"].to(model.device), group["starts"].to(model.device)
    lengths = group["stops"].to(model.device) - starts
    steps = torch.arange(max(1, int(lengths.max())), device=ids.device)
    places = (starts[:, None] + steps).clamp(max=ids.shape[1] - 1)  # [documents, tokens]
    if "queries" in group:
        states = states_after_queries(model.compressor, group)[:, : len(steps)]
    else:
        states = model.compressor(input_ids=ids).last_hidden_state  # causal: padding is on the right
        states = states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))
    found = matches(model.pointer.words[ids], starts, places)
    scores = model.pointer(states, lengths, found)
    return _Scored(ids.gather(1, places), states, scores, lengths, group["counts"].to(ids.device))


def matches(words: torch.Tensor, starts: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Find the document tokens whose word occurs in the query.

    Args:
        words: [documents, length]: numbers from `same_words` of query and document.
        starts: [documents]: index of the document's first token; the query is before it.
        places: [documents, tokens]: indices of the document's tokens.

    Returns:
        [documents, tokens] float32: 1 for a match, else 0.
    """
    before = torch.arange(words.shape[1], device=words.device) < starts[:, None]  # [documents, length]
    own = words.gather(1, places)  # [documents, tokens]
    same = (own[:, :, None] == words[:, None, :]) & before[:, None, :]
    return (same.any(-1) & (own != NO_WORD)).float()


def normed(states: torch.Tensor) -> torch.Tensor:
    """Scale states to a root mean square of 1: those of deep layers are far larger than embeddings.

    Args:
        states: [..., width], of any dtype.

    Returns:
        [..., width] float32.
    """
    wide = states.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)


def with_neighbours(scores: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Add to the probability of each token those of the tokens around it, the less the farther they are.

    The generator understands pieces of a text better than single tokens of it.

    Args:
        scores: [documents, tokens]: logarithms of probabilities, except for a constant.
        inside: [documents, tokens] bool: false at padding.

    Returns:
        Logarithms, [documents, tokens]; minus infinity at padding.
    """
    tokens = scores.shape[1]
    summed = scores.detach().masked_fill(~inside, -torch.inf)
    padded = nn.functional.pad(summed, (_REACH, _REACH), value=-torch.inf)
    for distance in range(1, _REACH + 1):
        before, after = (padded.narrow(1, _REACH + step, tokens) for step in (-distance, distance))
        both = torch.logaddexp(before, after)  # so that a token and its mirror image get the same sum
        summed = torch.logaddexp(summed, both + distance * math.log(_DECAY))
    return summed.masked_fill(~inside, -torch.inf)


def choose(scores: torch.Tensor, counts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Choose the best tokens of each document, by `with_neighbours`.

    Args:
        scores: [documents, tokens].
        counts: [documents]: number of tokens to choose.
        lengths: [documents]: number of tokens without padding.

    Returns:
        A bool mask, [documents, tokens]. Of tokens that are equally good the earlier is chosen.
    """
    inside = torch.arange(scores.shape[1], device=scores.device) < lengths[:, None]
    order = with_neighbours(scores, inside).argsort(dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(
        1, order, torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    )
    return (ranks < counts[:, None]) & inside


def choose_shared(
    scores: torch.Tensor, counts: torch.Tensor, lengths: torch.Tensor, sizes: Sequence[int]
) -> torch.Tensor:
    """Choose tokens like `choose`, but the documents of a question share the sum of their counts.

    Args:
        scores: [documents, tokens].
        counts: [documents]: each document's part of its question's number of tokens.
        lengths: [documents]: number of tokens without padding.
        sizes: Number of documents of each question.

    Returns:
        A bool mask, [documents, tokens].
    """
    inside = torch.arange(scores.shape[1], device=scores.device) < lengths[:, None]
    likely = with_neighbours(scores, inside)
    chosen = torch.zeros_like(inside)
    first = 0
    for size in sizes:
        rows = slice(first, first + size)
        total = int(counts[rows].sum())
        best = likely[rows].flatten().argsort(descending=True, stable=True)[:total]
        chosen[rows] = (
            torch.zeros_like(inside[rows]).flatten().scatter_(0, best, value=True).view_as(inside[rows])
        )
        first += size
    return chosen & inside


def pointer_loss(scores: torch.Tensor, targets: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Compute the cross-entropy over all tokens of a question's documents.

    The softmax is over all documents of a question, so that scores can be compared across documents (Clark &
    Gardner 2018, section 3.4).

    Args:
        scores: [documents, tokens].
        targets: [documents, tokens]: 1 for tokens that the answer copies.
        sizes: Number of documents of each question.

    Returns:
        The sum over questions that have targets, a scalar.
    """
    # Not a constant 0: the loss must have gradients even if no answer copies anything, since other processes
    # wait for them.
    loss = 0 * scores.sum()
    first = 0
    for size in sizes:
        wanted = targets[first : first + size].flatten()
        if total := float(wanted.sum()):
            likely = scores[first : first + size].flatten().log_softmax(0)
            loss = loss - (likely * wanted).sum() / total
        first += size
    return loss


def same_words(tokenizer: Any, vocabulary: int) -> list[int]:
    """Number the words of a vocabulary: tokens of the same word get the same number.

    Differences in case, in spaces around the word and in a plural s do not count.

    Args:
        tokenizer: The generator's tokenizer.
        vocabulary: Number of rows of the generator's embeddings; it may be above the tokenizer's size.

    Returns:
        A number for each token; `NO_WORD` for special tokens, punctuation and white space.
    """
    numbers: dict[str, int] = {}
    special = set(tokenizer.all_special_ids)
    found = []
    for token in range(vocabulary):
        word = tokenizer.decode([token]).strip().lower() if token < len(tokenizer) else ""
        if token in special or not re.search(r"\w", word):
            found.append(NO_WORD)
            continue
        if len(word) > 4 and word.endswith("s"):
            word = word[:-1]
        found.append(numbers.setdefault(word, len(numbers)))
    return found


POINTER: Final = PicksTokens()

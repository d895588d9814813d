"""Relevance of each document to its query: cross-encoders, and query likelihood under a causal LM."""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from scaledown.config.prepare import PrepareConfig
from scaledown.data.input.corpus import PassageTable
from scaledown.data.pair_tokens import PairTokens
from scaledown.data.prompts import LIKELIHOOD_AFTER, LIKELIHOOD_BEFORE
from scaledown.data.retrieval.splade import by_length
from scaledown.devices.gpus import OnDevice
from scaledown.errors import ModelError, UsageError
from scaledown.models import (
    Halving,
    ModelSource,
    choose_device,
    dtype_to_run,
    loadable,
    loading,
    onto,
    read_config_file,
    resolve,
)
from scaledown.records import QueryWithDocuments, check_records, document_text, full_text
from scaledown.run.progress import track, tracked
from scaledown.run.stage import Stage

log = logging.getLogger("scaledown")

LIKELIHOOD_PREFIX = "ql:"
SCORING: Final = 2
"""Version of how query likelihood is computed: scores depend on it in their last bits."""
_TOGETHER: Final = 256  # tokens of questions behind one passage: attention grows with their square
_CHECKED_ON: Final = ("The tower is 330 metres tall.", " How tall is the tower?", " Who built it?")
_ODD: Final = "Été: 東京's 🗼, x<y [SEP] 2.5%"
_TOLERANCE: Final = {"torch.float32": 1e-3, "torch.bfloat16": 0.1, "torch.float16": 0.05}


class Pair(NamedTuple):
    """A query and the text of a document, title included."""

    query: str
    document: str


class _Asked(NamedTuple):
    """A pair as token ids. Pairs whose prompt is the same object share it."""

    prompt: list[int]
    question: list[int]


class Reranker(Protocol):
    """Scores pairs; higher is more relevant. Scores are raw: logits, or mean log-probabilities."""

    halving: Halving

    def score(self, pairs: Sequence[Pair], advance: Callable[[int], None]) -> list[float]:
        """One score a pair, in the order given."""


class CrossEncoderReranker:
    """A cross-encoder with one output, as sentence-transformers reads it; scores are its logits.

    An ordinary sequence classifier is read without sentence-transformers, which takes longer to import than
    all else here. Each text is then tokenised once, while the model computes.
    """

    def __init__(self, source: ModelSource, device: str, dtype: str, batch_size: int) -> None:
        self.name = source.name
        self._device = device
        self._batch_size = batch_size
        self.halving = Halving("--reranker_batch_size")
        name, pinned = loadable(source)
        arguments: dict[str, Any] = {"dtype": dtype_to_run(dtype, device), **onto(device)}
        self._tokens, reason = _pair_tokens(source)
        if self._tokens:
            from transformers import AutoModelForSequenceClassification

            with loading(source):
                self._model = AutoModelForSequenceClassification.from_pretrained(name, **pinned, **arguments)
            model, labels = self._model.eval(), self._model.config.num_labels
        else:
            from sentence_transformers import CrossEncoder

            log.info("reranker: sentence-transformers reads its pairs (%s)", reason)
            with loading(source):
                self._model = CrossEncoder(name, device=device, **pinned, model_kwargs=arguments)
            model, labels = self._model.model, self._model.num_labels
        if labels != 1:
            raise ModelError(f"model {source.name} gives {labels} scores a pair; a reranker gives one")
        _score_in_float32(model)

    def score(self, pairs: Sequence[Pair], advance: Callable[[int], None]) -> list[float]:
        """Logits, in the order of `pairs`."""
        import torch

        order = by_length([pair.document + pair.query for pair in pairs]).tolist()
        size, tokens = self._batch_size, self._tokens
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        if tokens is None:

            def predict(batch: Sequence[int]) -> Any:
                return self._model.predict(
                    [tuple(pairs[i]) for i in batch],
                    batch_size=len(batch),
                    show_progress_bar=False,
                    activation_fn=torch.nn.Identity(),
                )

            return _in_batches(self, predict, batches, advance)

        def read(batch: Sequence[int]) -> Sequence[int]:
            tokens.read(itertools.chain.from_iterable(pairs[i] for i in batch))
            return batch

        @torch.inference_mode()
        def score(batch: Sequence[int]) -> Any:
            features = tokens.features([pairs[i] for i in batch])
            features = {name: values.to(self._device) for name, values in features.items()}
            return self._model(**features).logits.float()[:, 0].cpu().numpy()  # [batch]

        try:
            with ThreadPoolExecutor(1) as thread:
                return _in_batches(self, score, thread.map(read, batches), advance)
        finally:
            tokens.forget()


def _pair_tokens(source: ModelSource) -> tuple[PairTokens | None, str]:
    """What puts the pairs of an ordinary sequence classifier together; None, and why, for other models."""
    from transformers import AutoConfig, AutoTokenizer

    if any(read_config_file(source, name) for name in ("modules.json", "config_sentence_transformers.json")):
        return None, "it has settings of sentence-transformers"
    name, pinned = loadable(source)
    with loading(source):
        config = AutoConfig.from_pretrained(name, **pinned)
        tokenizer = AutoTokenizer.from_pretrained(name, **pinned)
    if not (config.architectures or [""])[0].endswith("ForSequenceClassification"):
        return None, "it is no sequence classifier"
    if tokenizer.chat_template is not None:
        return None, "it has a chat template"
    positions = getattr(config, "max_position_embeddings", -1)
    if positions != -1:
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    try:
        tokens = PairTokens(tokenizer)
        texts = ("a", "", _ODD, f"{_ODD}\n{_ODD}", f"{_ODD} " * (tokenizer.model_max_length // 8 + 1))
        pairs = list(itertools.product(texts, texts))
        tokens.read(texts)
        ones, others = map(list, zip(*pairs, strict=True))
        expected = tokenizer(ones, others, padding=True, truncation="longest_first", return_tensors="pt")
        made = tokens.features(pairs)
    except Exception as error:  # whatever a foreign tokenizer does
        return None, f"{type(error).__name__}: {error}"
    tokens.forget()
    if made.keys() != expected.keys() or any((made[key] != expected[key]).any() for key in made):
        return None, "its tokens of a pair are not those of its texts"
    return tokens, ""


class QueryLikelihoodReranker:
    """Mean log-probability of the question's tokens given the passage (UPR, Sachan et al. 2022).

    Works with any causal LM; needs no training for relevance. Questions about the same passage are packed
    behind it: it is read once, each of them sees it and itself. A model that heeds no such mask reads it once
    for each of them.
    """

    def __init__(self, source: ModelSource, device: str, dtype: str, batch_size: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        name, pinned = loadable(source)
        with loading(source):
            self._tokenizer = AutoTokenizer.from_pretrained(name, **pinned)
            model = AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype_to_run(dtype, device), **pinned, **onto(device)
            )
        self._model = model.eval()
        self.name = source.name
        self._device = device
        self._batch_size = batch_size
        self.halving = Halving("--reranker_batch_size")
        self._limit = int(getattr(model.config, "max_position_embeddings", 0) or 2048)
        self._after = self._ids([LIKELIHOOD_AFTER])[LIKELIHOOD_AFTER]
        self._together = _TOGETHER
        if reason := self._differs():
            self._together = 0
            log.info("reranker: each question is read with its own copy of the passage (%s)", reason)

    def _ids(self, texts: Iterable[str], *, special: bool = False) -> dict[str, list[int]]:
        """Token ids by text; a text that comes again is read once."""
        unique = list(dict.fromkeys(texts))
        found = self._tokenizer(unique, add_special_tokens=special, verbose=False) if unique else {}
        return dict(zip(unique, found.get("input_ids", ()), strict=True))

    def score(self, pairs: Sequence[Pair], advance: Callable[[int], None]) -> list[float]:
        """Mean log-probabilities, at most 0, in the order of `pairs`."""
        questions = self._ids(f" {pair.query.strip()}" for pair in pairs)
        passages = self._ids((LIKELIHOOD_BEFORE + pair.document for pair in pairs), special=True)
        prompts: dict[tuple[str, int], list[int]] = {}  # by passage, and how much of it there is room for
        asked = []
        for pair in pairs:
            question = questions[f" {pair.query.strip()}"][: self._limit // 2]
            passage = passages[LIKELIHOOD_BEFORE + pair.document]
            kept = min(len(passage), self._limit - len(question) - len(self._after))
            prompt = prompts.setdefault((pair.document, kept), passage[:kept] + self._after)
            asked.append(_Asked(prompt, question))

        def score(batch: Sequence[int]) -> list[float]:
            return self._batch([asked[i] for i in batch])

        return _in_batches(self, score, self._batches(asked), advance)

    def _batches(self, asked: Sequence["_Asked"]) -> list[list[int]]:
        """Places in `asked`, as many at once as the batch size, of rows with as many questions, by length."""
        by_prompt: dict[int, list[int]] = {}
        for i, one in enumerate(asked):
            by_prompt.setdefault(id(one.prompt), []).append(i)
        rows = self._rows(asked, itertools.chain.from_iterable(by_prompt.values()))
        tokens = [len(asked[row[0]].prompt) + sum(len(asked[i].question) for i in row) for row in rows]
        batches: list[list[int]] = []
        for n in sorted(range(len(rows)), key=lambda n: (-len(rows[n]), -tokens[n])):
            if batches and len(batches[-1]) + len(rows[n]) <= self._batch_size:
                batches[-1] += rows[n]
            else:
                batches.append(list(rows[n]))
        return batches

    def _rows(self, asked: Sequence["_Asked"], order: Iterable[int]) -> list[list[int]]:
        """Places in `asked`, in `order`, those together that share a passage and are read in one row."""
        rows: list[list[int]] = []
        tokens = 0
        for i in order:
            prompt, question = asked[i]
            fits = rows and len(rows[-1]) < self._batch_size and tokens + len(question) <= self._together
            if fits and asked[rows[-1][-1]].prompt is prompt:
                rows[-1].append(i)
            else:
                rows.append([i])
                tokens = 0
            tokens += len(question)
        return rows

    def _batch(self, asked: Sequence["_Asked"]) -> list[float]:
        """Scores of neighbours that share a prompt come from one row: prompt, question, question, ..."""
        import torch

        rows = [[asked[i] for i in row] for row in self._rows(asked, range(len(asked)))]
        lengths = [len(row[0].prompt) + sum(len(one.question) for one in row) for row in rows]
        longest = max(lengths)
        ids = np.zeros((len(rows), longest), np.int64)  # padded on the left
        position = np.zeros_like(ids)
        part = np.full_like(ids, -1)  # 0: the prompt, n: its nth question, -1: padding
        before: list[tuple[int, int]] = []  # row and place of what predicts each token of a question
        targets: list[int] = []
        for n, row in enumerate(rows):
            start = longest - lengths[n]
            behind = start + len(row[0].prompt)
            for number, tokens in enumerate([row[0].prompt, *(one.question for one in row)]):
                span = slice(start, start + len(tokens))
                ids[n, span] = tokens
                part[n, span] = number
                position[n, span] = np.arange(len(tokens)) + (len(row[0].prompt) if number else 0)
                if number:
                    targets += tokens
                    places = [behind - 1, *range(start, span.stop - 1)]
                    before += [(n, place) for place in places[: len(tokens)]]
                start = span.stop
        first = min((place for _, place in before), default=longest - 1)
        with torch.inference_mode():
            parts = torch.from_numpy(part).to(self._device)
            mask = (parts >= 0).long()  # [rows, longest]
            if len(rows) < len(asked):  # each sees the prompt and its own part: [rows, 1, longest, longest]
                mask = ((parts[:, None] == 0) | (parts[:, None] == parts[..., None])).tril()[:, None]
            logits = self._model(
                input_ids=torch.from_numpy(ids).to(self._device),
                attention_mask=mask,
                position_ids=torch.from_numpy(position).to(self._device),
                logits_to_keep=longest - first,
                use_cache=False,
            ).logits  # [rows, longest - first, vocabulary]
            at = torch.tensor(before, dtype=torch.long, device=self._device).reshape(-1, 2)
            logits = logits[at[:, 0], at[:, 1] - first].float()  # [tokens of questions, vocabulary]
            wanted = torch.tensor(targets, dtype=torch.long, device=self._device)[:, None]
            chosen = torch.log_softmax(logits, -1).gather(-1, wanted)[:, 0].cpu()
        each = torch.split(chosen, [len(one.question) for one in asked])
        return [float(found.mean()) if len(found) else -math.inf for found in each]

    def _differs(self) -> str:
        """Why questions must not share a row of this model; empty where their scores are the same."""
        prompt, *questions = self._ids([LIKELIHOOD_BEFORE + _CHECKED_ON[0], *_CHECKED_ON[1:]]).values()
        prompt = prompt + self._after
        asked = [_Asked(prompt, question) for question in (questions[0], *questions)]  # one of them twice
        try:
            together = self._batch(asked)
            alone = [self._batch([one])[0] for one in asked]
        except Exception as error:  # whatever a foreign model does
            return f"{type(error).__name__}: {error}"
        difference = max(abs(one - other) for one, other in zip(together, alone, strict=True))
        same = difference <= _TOLERANCE[str(self._model.dtype)]
        return "" if same else f"its scores differ by {difference:.2g}"


def _score_in_float32(model: Any) -> None:
    """Let the last layers of a classifier compute in float32: in bfloat16 many scores are the same number."""
    for name in ("classifier", "score"):
        if (head := getattr(model, name, None)) is not None:
            head.float()
            head.register_forward_pre_hook(lambda _, given: tuple(part.float() for part in given))


def _in_batches(
    reranker: "CrossEncoderReranker | QueryLikelihoodReranker",
    score: Callable[[Sequence[int]], Any],
    batches: Iterable[Sequence[int]],
    advance: Callable[[int], None],
) -> list[float]:
    """Scores of pairs, in their order; each pair is in one of the batches."""
    found: dict[int, float] = {}
    for batch in batches:
        found |= zip(batch, np.concatenate(reranker.halving(score, batch)), strict=True)
        advance(len(batch))
    scores = np.array([found[i] for i in range(len(found))], np.float32)
    if not np.isfinite(scores).all():
        raise ModelError(f"model {reranker.name} gave scores that are not numbers: try --dtype float32")
    return [float(value) for value in scores]


def score_once(reranker: Reranker, pairs: Sequence[Pair], advance: Callable[[int], None]) -> list[float]:
    """`reranker.score`, with pairs that come again scored once."""
    unique = list(dict.fromkeys(pairs))
    scores = dict(zip(unique, reranker.score(unique, advance), strict=True))
    advance(len(pairs) - len(unique))
    return [scores[pair] for pair in pairs]


def load_reranker(source: ModelSource, device: str, dtype: str, batch_size: int) -> Reranker:
    """The reranker behind `--reranker_model`. `source.name` begins with `ql:` for query likelihood."""
    likelihood = source.name.startswith(LIKELIHOOD_PREFIX)
    log.info("reranker: %s, %s", source.name, "query likelihood" if likelihood else "cross-encoder")
    kind = QueryLikelihoodReranker if likelihood else CrossEncoderReranker
    return kind(source, device, dtype, batch_size)


def resolve_reranker(name: str) -> ModelSource:
    """`resolve`, for names that may begin with `ql:`."""
    return resolve(name.removeprefix(LIKELIHOOD_PREFIX))._replace(name=name)


def scaled(score: float, scale: str) -> float:
    """A raw score on the scale asked for: as it is, or through the logistic function to 0..1."""
    if scale == "raw":
        return score
    return 1 / (1 + math.exp(-score)) if score >= 0 else math.exp(score) / (1 + math.exp(score))


def best_first(scores: Sequence[float], top_k: int) -> list[int]:
    """Positions of the `top_k` highest scores, best first; ties keep their order."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:top_k]


def add_reranking_scores(
    queries_with_docs: Sequence[QueryWithDocuments],
    reranker_model: str = PrepareConfig.reranker_model,
    *,
    top_k: int | None = None,
    score_scale: str = "raw",
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = PrepareConfig.reranker_batch_size,
) -> list[QueryWithDocuments]:
    """Add `reranking_scores` to each record, one a document, in the order of its documents.

    Documents stay in their order, or with `top_k` the best so many are kept, best first. Documents are
    strings or `{"title", "text"}`. The records given are not changed.
    """
    if top_k is not None and top_k < 1:
        raise UsageError(f"top_k {top_k}: must be at least 1")
    if batch_size < 0:
        raise UsageError(f"batch_size {batch_size}: must not be negative; 0 suits the device")
    queries_with_docs = list(queries_with_docs)
    if score_scale not in {"raw", "sigmoid"}:
        raise UsageError(f"score_scale {score_scale!r}: use raw or sigmoid")
    check_records(queries_with_docs)
    device, source = choose_device(device), resolve_reranker(reranker_model)
    batch_size = PrepareConfig.batch_for("reranker_batch_size", batch_size, device)
    reranker = OnDevice("the reranker", device, lambda: load_reranker(source, device, dtype, batch_size))
    pairs = [
        Pair(record["query"], document_text(document))
        for record in queries_with_docs
        for document in record["documents"]
    ]
    with track("rerank", "pairs", len(pairs)) as tracker:
        scores = iter(score_once(reranker(), pairs, tracker.advance))
    reranker.release()
    result = []
    for record in queries_with_docs:
        documents: list[Any] = list(record["documents"])
        own = [next(scores) for _ in documents]
        kept = range(len(own)) if top_k is None else best_first(own, top_k)
        changed = {
            **record,
            "documents": [documents[i] for i in kept],
            "reranking_scores": [scaled(own[i], score_scale) for i in kept],
        }
        result.append(changed)
    return result  # type: ignore[return-value]  # the record's own further keys stay


def rerank(
    stage: Stage, candidates: Stage, passages: Stage, load: Callable[[], Reranker], per_query: int
) -> None:
    """Score the candidates of each shard and sort them, best first.

    All are kept, so that another `--top_k_reranking` needs no scoring. Adds the column reranking_scores
    list<float32>, raw.
    """
    if stage.done():
        return
    rows = candidates.planned()
    with tracked(stage, "rerank", "pairs", rows, per_query) as tracker:

        def work(shard: int) -> pa.Table:
            texts = PassageTable(passages)
            table = candidates.table(shard)
            records = table.to_pylist()
            pairs = []
            for record in records:
                for row in record["rows"]:
                    passage = texts[row]
                    pairs.append(Pair(record["query"], full_text(passage.title, passage.text)))
            reranker = load()
            with stage.noting(shard, lambda: reranker.halving.count):
                scores = iter(score_once(reranker, pairs, tracker.advance))
            tracker.advance(len(records) * per_query - len(pairs))  # of queries with fewer
            columns: dict[str, list[Any]] = {"rows": [], "scores": [], "reranking_scores": []}
            for record in records:
                own = [next(scores) for _ in record["rows"]]
                kept = best_first(own, len(own))
                columns["rows"].append([record["rows"][i] for i in kept])
                columns["scores"].append([record["scores"][i] for i in kept])
                columns["reranking_scores"].append([own[i] for i in kept])
            return pa.table(
                {
                    "query_id": table.column("query_id"),
                    "query": table.column("query"),
                    "rows": pa.array(columns["rows"], pa.list_(pa.int64())),
                    "scores": pa.array(columns["scores"], pa.list_(pa.float32())),
                    "reranking_scores": pa.array(columns["reranking_scores"], pa.list_(pa.float32())),
                }
            )

        whole = stage.complete(len(rows), work)
    if whole:
        rows = stage.made()
        found = (stage.table(shard).column("rows").combine_chunks() for shard in range(len(rows)))
        stage.finish(rows, {"queries": sum(rows), "pairs": sum(len(lists.flatten()) for lists in found)})

"""Cross-encoders: a model that reads the query and the document together."""

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from scaledown.data.reranker.base import Pair, scores_of
from scaledown.data.reranker.pair_tokens import PairTokens
from scaledown.data.retrieval.splade import by_length, in_batches
from scaledown.devices.choice import dtype_to_run
from scaledown.devices.halving import Halving
from scaledown.devices.packing import pack_linear_layers
from scaledown.errors import ModelError
from scaledown.models.sources import ModelSource
from scaledown.models.weights import loadable, loading, onto, read_config_file

if TYPE_CHECKING:
    import torch

log = logging.getLogger("scaledown")

_SORTED: Final = 16
"""Batches whose pairs are sorted by their tokens. Sorted by characters alone, a fifth would be padding."""
_UNUSUAL_TEXT: Final = "Été: 東京's 🗼, x<y [SEP] 2.5%"


class CrossEncoderReranker:
    """A cross-encoder with one output; scores are its logits, the same as with sentence-transformers.

    An ordinary sequence classifier is loaded without sentence-transformers, whose import is slow. Then each
    text is tokenised once, in a thread beside the model.

    Args:
        source: The model.
        device: cpu, cuda, cuda:N or mps.
        dtype: auto, float32, bfloat16 or float16.
        batch_size: Pairs scored at once.

    Raises:
        ModelError: The model cannot be loaded, or gives several scores for a pair.
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
            raise ModelError(f"model {source.name} gives {labels} scores for a pair: use a model with one")
        _score_in_float32(model)
        if self._tokens:
            self._tokens.read(("", _UNUSUAL_TEXT))
            pack_linear_layers(
                model, self._tokens.features([("", _UNUSUAL_TEXT), (_UNUSUAL_TEXT, _UNUSUAL_TEXT)])
            )
            self._tokens.forget()

    def score(self, pairs: Sequence[Pair], advance: Callable[[int], None]) -> list[float]:
        """Return the logit of each pair, see `Reranker.score`.

        Args:
            pairs: Pairs of a query and a document.
            advance: Called with the number of pairs in each finished batch.

        Raises:
            ModelError: A logit is not finite, or one pair alone does not fit into memory.
        """
        import torch

        tokens = self._tokens
        order = by_length([pair.document + pair.query for pair in pairs])

        def read(scores: "torch.Tensor") -> Any:
            return scores.float().cpu().numpy()

        if tokens is None:

            def predict(batch: Sequence[int]) -> "torch.Tensor":
                return self._model.predict(  # type: ignore[no-any-return]
                    [tuple(pairs[i]) for i in batch],
                    batch_size=len(batch),
                    show_progress_bar=False,
                    activation_fn=torch.nn.Identity(),
                    convert_to_tensor=True,
                )

            given = in_batches(order, self._batch_size)
            return scores_of(self, given, predict, read, self._device, advance)

        def tokenise(part: Sequence[int]) -> list[list[int]]:
            tokens.read(itertools.chain.from_iterable(pairs[i] for i in part))
            lengths = np.array([tokens.length(pairs[i]) for i in part])
            return in_batches(np.array(part)[np.argsort(-lengths, kind="stable")], self._batch_size)

        @torch.inference_mode()
        def score(batch: Sequence[int]) -> "torch.Tensor":
            features = tokens.features([pairs[i] for i in batch])
            features = {name: values.to(self._device) for name, values in features.items()}
            return self._model(**features).logits[:, 0]  # type: ignore[no-any-return]  # [batch]

        parts = in_batches(order, _SORTED * self._batch_size)
        count = math.ceil(len(pairs) / self._batch_size)
        try:
            with ThreadPoolExecutor(1) as thread:
                batches = itertools.chain.from_iterable(thread.map(tokenise, parts))
                return scores_of(self, batches, score, read, self._device, advance, count)
        finally:
            tokens.forget()


def _pair_tokens(source: ModelSource) -> tuple[PairTokens | None, str]:
    """Return what tokenises pairs for an ordinary sequence classifier; else None and the reason."""
    from transformers import AutoConfig, AutoTokenizer

    if any(read_config_file(source, name) for name in ("modules.json", "config_sentence_transformers.json")):
        return None, "it has settings of sentence-transformers"
    name, pinned = loadable(source)
    with loading(source):
        config = AutoConfig.from_pretrained(name, **pinned)
        tokenizer = AutoTokenizer.from_pretrained(name, **pinned)
    if not (config.architectures or [""])[0].endswith("ForSequenceClassification"):
        return None, "it is not a sequence classifier"
    if tokenizer.chat_template is not None:
        return None, "it has a chat template"
    positions = getattr(config, "max_position_embeddings", -1)
    if positions != -1:
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    try:
        tokens = PairTokens(tokenizer)
        texts = (
            "a",
            "",
            _UNUSUAL_TEXT,
            f"{_UNUSUAL_TEXT}\n{_UNUSUAL_TEXT}",
            f"{_UNUSUAL_TEXT} " * (tokenizer.model_max_length // 8 + 1),
        )
        pairs = list(itertools.product(texts, texts))
        tokens.read(texts)
        ones, others = map(list, zip(*pairs, strict=True))
        expected = tokenizer(ones, others, padding=True, truncation="longest_first", return_tensors="pt")
        made = tokens.features(pairs)
    except Exception as error:  # any error of a tokenizer that we do not know
        return None, f"{type(error).__name__}: {error}"
    tokens.forget()
    if made.keys() != expected.keys() or any((made[key] != expected[key]).any() for key in made):
        return None, "its tokenizer changes the tokens of texts in a pair"
    return tokens, ""


def _score_in_float32(model: Any) -> None:
    """Compute the last layers of a classifier in float32: in bfloat16 many scores would be equal."""
    for name in ("classifier", "score"):
        if (head := getattr(model, name, None)) is not None:
            head.float()
            head.register_forward_pre_hook(lambda _, given: tuple(part.float() for part in given))

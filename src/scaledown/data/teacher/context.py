"""Turn a prompt into token ids that fit the teacher's context, with the model's own chat template."""

from collections.abc import Sequence
from typing import Any, Final

from scaledown.data.prompts import Prompt
from scaledown.data.teacher.base import Rejection, TeacherSettings
from scaledown.errors import ModelError

_SEPARATOR_TOKENS: Final = (
    4  # at most, between two documents; a wrong guess is corrected in the next iteration
)


class Context:
    """Turns prompts into token ids that fit the context of a model.

    Args:
        name: The model's name, for messages.
        tokenizer: The model's Hugging Face tokenizer.
        tokens: The model's limit of prompt and answer together, see `context_tokens`.
        generation: Its `context` may lower the limit, and its `document_tokens` limit each document.

    Raises:
        ModelError: Less than 32 tokens are left for a prompt.
    """

    def __init__(self, name: str, tokenizer: Any, tokens: int, generation: TeacherSettings) -> None:
        self._tokenizer = tokenizer
        self._document_tokens = generation.document_tokens
        tokens = min(tokens, generation.context or tokens)
        self.limit = tokens - generation.max_new_tokens
        if self.limit < 32:
            raise ModelError(
                f"model {name} has a context of {tokens} tokens, too few for --max_new_tokens "
                f"{generation.max_new_tokens}: lower it"
            )
        added = tokenizer.added_tokens_decoder.values()
        self._special = [str(token) for token in added if token.special]
        self._folds_system = self._template_refuses_system()

    def fit(self, prompt: Prompt) -> tuple[list[int], int] | Rejection:
        """Turn a prompt into token ids that fit the context.

        Each document is cut to `generation.document_tokens` first. Then the lowest-ranked documents lose
        their ends; question and instruction stay whole.

        Args:
            prompt: The prompt.

        Returns:
            The token ids, at most `limit`, and the number of document tokens that were cut. A `Rejection` if
            the prompt is too long even without documents, or the chat template refuses it.
        """
        from jinja2 import TemplateError

        try:
            return self._fit(prompt)
        except (ValueError, TemplateError) as error:
            return Rejection(str(error))

    def _fit(self, prompt: Prompt) -> tuple[list[int], int]:
        documents = [self.spelled_apart(document) for document in prompt.documents]
        prompt = prompt._replace(
            before=self.spelled_apart(prompt.before), after=self.spelled_apart(prompt.after)
        )
        dropped = 0
        if self._document_tokens:
            documents, dropped = self._cut(documents)
        ids = self._ids(prompt, documents)
        while len(ids) > self.limit and documents:
            overflow = len(ids) - self.limit
            while documents and overflow > 0:
                tokens = self._tokenizer(documents[-1], add_special_tokens=False, verbose=False)["input_ids"]
                kept = tokens[: max(0, len(tokens) - overflow)]
                dropped += len(tokens) - len(kept)
                # Decoding and encoding cut text may yield more tokens: cut at least one more in each
                # iteration.
                shortened = self._tokenizer.decode(kept, skip_special_tokens=True).rstrip()
                if kept and len(shortened) < len(documents[-1]):
                    documents[-1] = shortened
                    break
                documents.pop()
                overflow -= len(tokens) + _SEPARATOR_TOKENS
            ids = self._ids(prompt, documents)  # not exactly the sum of its parts
        if len(ids) > self.limit:
            raise ValueError(
                f"the prompt without documents has {len(ids):,} tokens; the model takes {self.limit:,}"
            )
        return ids, dropped

    def _cut(self, documents: Sequence[str]) -> tuple[list[str], int]:
        """Cut each document to `--teacher_document_tokens`. Returns them and the number of tokens cut."""
        kept, dropped = [], 0
        for document in documents:
            tokens = self._tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
            if len(tokens) > self._document_tokens:
                dropped += len(tokens) - self._document_tokens
                document = self._tokenizer.decode(tokens[: self._document_tokens]).rstrip()  # noqa: PLW2901
            kept.append(document)
        return kept, dropped

    def spelled_apart(self, text: str) -> str:
        """Break up special tokens in a text from data, so that it cannot end a turn of the chat."""
        for token in self._special:
            if token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def _ids(self, prompt: Prompt, documents: Sequence[str]) -> list[int]:
        user = prompt.user(documents)
        if self._tokenizer.chat_template is None:
            text, special = f"{prompt.system}\n\n{user}\nAnswer:".lstrip(), True
        else:
            # The template adds the special tokens itself.
            text, special = self._render(prompt.system, user, fold=self._folds_system), False
        ids: list[int] = self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def _render(self, system: str, user: str, *, fold: bool) -> str:
        if fold or not system:
            messages = [{"role": "user", "content": f"{system}\n\n{user}".lstrip()}]
        else:
            messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text

    def _template_refuses_system(self) -> bool:
        """Whether the chat template fails on a system message, or drops it silently."""
        from jinja2 import TemplateError

        if self._tokenizer.chat_template is None:
            return False
        try:
            return "probe-of-system" not in self._render("probe-of-system", "probe", fold=False)
        except (TemplateError, ValueError):
            return True


def context_tokens(config: Any, tokenizer: Any) -> int:
    """Return the most tokens of prompt and answer together that a model accepts.

    Args:
        config: The model's Hugging Face config.
        tokenizer: Its tokenizer, which may have a lower limit.
    """
    text_config = config.get_text_config()
    limits = [
        int(limit)
        for limit in (
            getattr(text_config, "max_position_embeddings", None),
            getattr(text_config, "n_positions", None),
            tokenizer.model_max_length,
        )
        if limit and limit < 10**9
    ]
    return min(limits, default=2048)

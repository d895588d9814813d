"""Extract the answer from a model's reply, without thoughts, chat markers and role names."""

import re
from typing import Final

from scaledown.data.logprobs import for_part
from scaledown.data.teacher.base import Rejection, TeacherSettings
from scaledown.records import Answer

CONTROL: Final = re.compile(
    r"<[|\uff5c][^|\uff5c<>\n]{1,40}[|\uff5c]>|\[/?INST\]|</?s>|<(?:start|end)_of_turn>|<</?SYS>>|<[be]os>|<EOT>|"
    r"<pad>|<EOS_TOKEN>|\[(?:EOS|BOS|PAD)\]"
)
"""Markers that begin or end a turn in the chat templates of common models."""

_QUOTE: Final = "[`'\"\u2018\u2019\u201c\u201d]"


def _unquoted(pattern: str) -> str:
    """Match only outside of quotes: an answer may be about thoughts and markers."""
    return f"(?:(?<!{_QUOTE})(?:{pattern})|(?:{pattern})(?!{_QUOTE}))"


_CHAT_MARKER: Final = f"(?:{CONTROL.pattern})"
_THINK: Final = r"(?:\w+:)?(?:think(?:ing)?|thoughts?|reasoning|reflection|analysis|scratchpad)"
# As R1 and most others, Magistral, Kimi, Cohere and OpenThinker, MedGemma, and Granite write it.
_OPENING_TAG: Final = _unquoted(
    rf"<{_THINK}(?:\s[^<>]*)?>|\[think\]|\u25c1think\u25b7|<\|(?:(?:begin|start)_(?:of_)?)?{_THINK}\|>|"
    r"<unused94>|Here is my thought process:"
)
_CLOSING_TAG: Final = _unquoted(
    rf"</{_THINK}\s*>|\[/think\]|\u25c1/think\u25b7|<\|(?:/|end_(?:of_)?){_THINK}\|>|"
    r"<unused95>|Here is my response:"
)
_FLAGS: Final = re.IGNORECASE | re.DOTALL
_THOUGHT: Final = re.compile(f"{_OPENING_TAG}.*?{_CLOSING_TAG}", _FLAGS)
_OPENED_BEFORE: Final = re.compile(rf"\A.*{_CLOSING_TAG}", _FLAGS)  # by the chat template, in the prompt
_UNENDED: Final = re.compile(rf"(?:\A|\n)\s*{_OPENING_TAG}.*", _FLAGS)
# gpt-oss: thoughts and answer are separate messages.
_CHANNELS: Final = re.compile(r".*<\|channel\|>|analysis(?=[A-Z\s]).*assistantfinal", re.DOTALL)
_FINAL: Final = re.compile(r".*(?:<\|channel\|>final.*?<\|message\|>|assistantfinal)", re.DOTALL)
_FRAME: Final = re.compile(r"\s*<(answer|final_answer|response|solution)>(.*?)(?:</\1>)?\s*", _FLAGS)
_BEGINNING: Final = re.compile(
    rf"((?:(?!{_OPENING_TAG}){_CHAT_MARKER}\s*)+)?"
    rf"(?:(?:assistant|model)[ \t]*(?:\n|(?={_CHAT_MARKER})|(?(1)\Z|(?!)))|[#*]* ?assistant[ \t]*:\**)?\s*"
    rf"(?:(?!{_OPENING_TAG}){_CHAT_MARKER}\s*)*",
    re.IGNORECASE,
)
_END: Final = re.compile(
    rf"(?<!\s)(?<!{_QUOTE})(?!<s>){_CHAT_MARKER}|"
    rf"{_unquoted(_CHAT_MARKER)}(?=\s*(?:\Z|\n|{_CHAT_MARKER}|(?:assistant|model|system|user)\b))|<[|\uff5c]\w*[|\uff5c]?\Z"
)


def spoken(text: str) -> str:
    """Return the answer in a reply, without thoughts, chat markers, and text after its turn."""
    rest = _BEGINNING.sub("", text, count=1)
    if _CHANNELS.match(text):
        rest = text[found.end() :] if (found := _FINAL.match(text)) else ""
    answer = rest
    if last := _OPENED_BEFORE.match(rest):
        answer = _OPENED_BEFORE.sub("", _THOUGHT.sub("", last[0])) + rest[last.end() :]
    answer = _UNENDED.sub("", answer)
    if answer != rest and (frame := _FRAME.fullmatch(answer)):
        answer = frame[2]
    answer = _BEGINNING.sub("", answer.strip(), count=1)
    return (answer[: end.start()] if (end := _END.search(answer)) else answer).strip()


def heard(answer: Answer, generation: TeacherSettings, *, thought: bool = False) -> Answer | Rejection:
    """Return the answer in a reply, with the log probabilities of its remaining tokens.

    Args:
        answer: The whole reply.
        generation: The settings of the request, for messages.
        thought: Whether the server sent the model's thoughts beside the reply.

    Returns:
        The answer; a `Rejection` if the reply has only thoughts or markers.
    """
    text = spoken(answer.text)
    if not text and (answer.text or thought or answer.finish_reason == "length"):
        if answer.finish_reason == "length":
            number = f" {answer.answer_tokens:,}" * bool(answer.answer_tokens)  # not in each reply
            return Rejection(
                f"all{number} tokens of the reply went into reasoning: {generation.if_cut_short}"
            )
        return Rejection("the reply holds reasoning or chat markers, and no answer")
    if text == answer.text:
        return answer
    logprobs = answer.answer_logprobs and for_part(answer.answer_logprobs, text)
    left_out = len(answer.text) - len(text)
    return answer._replace(text=text, answer_logprobs=logprobs, left_out=left_out)

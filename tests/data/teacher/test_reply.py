"""What of a reply is its answer."""

import time

import pytest

from scaledown.data.logprobs import for_part
from scaledown.data.teacher.base import Rejection, TeacherSettings
from scaledown.data.teacher.reply import heard, spoken
from scaledown.records import Answer


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("Paris.", "Paris."),
        ("<think>a\nb</think>\n\nParis", "Paris"),
        ("hm so\n</think>\n\nParis.<|im_end|>", "Paris."),
        ("<think>cut", ""),
        ("assistant\n\nParis", "Paris"),
        ("Assistant: Paris", "Paris"),
        ("Assistant professor of law", "Assistant professor of law"),
        ("assistant", "assistant"),
        ("<|im_start|>assistant", ""),
        ("<|im_start|>assistant\nParis<|im_end|>\n<|im_start|>user\nx", "Paris"),
        (
            "<|channel|>analysis<|message|>We<|end|><|start|>assistant<|channel|>final<|message|>Paris<|return|>",
            "Paris",
        ),
        ("<|channel|>analysis<|message|>We need", ""),
        ("analysisWe need to. assistantfinalParis", "Paris"),
        ("<|START_THINKING|>foo", ""),
        ("<|START_THINKING|>foo<|END_THINKING|>Paris", "Paris"),
        ('It is "Paris"<|im_end|>', 'It is "Paris"'),
        ('<think>x</think>"Paris" it is', '"Paris" it is'),
        ("Models end thoughts with `</think>`.", "Models end thoughts with `</think>`."),
        ("The `<|im_end|>` token", "The `<|im_end|>` token"),
        ("The token <|endoftext|> ends documents.", "The token <|endoftext|> ends documents."),
        ("Paris</s>Paris</s>", "Paris"),
        ("[THINK]a[/THINK]Paris", "Paris"),
        ("\u25c1think\u25b7a\u25c1/think\u25b7Paris", "Paris"),
        ("<seed:think>x</seed:think>Paris", "Paris"),
        ("<think></think>Paris", "Paris"),
        ("<think>x</think><answer>Paris</answer>", "Paris"),
        ("<answer>Paris</answer>", "<answer>Paris</answer>"),
        ("<think>a<think>b</think>c</think>Paris", "Paris"),
        ("Paris.\n<think>more", "Paris."),
        ("<|im_end|>", ""),
        ("Paris<\uff5cend\u2581of\u2581sentence\uff5c>", "Paris"),
        ("<start_of_turn>model\nParis<end_of_turn>", "Paris"),
        ("<|start_header_id|>assistant<|end_header_id|>\n\nParis<|eot_id|>", "Paris"),
        ("Paris<|im_en", "Paris"),
        ("a < b | c", "a < b | c"),
        ("Here is my thought process: x Here is my response: Paris", "Paris"),
        ("<THINK>x</THINK> Paris", "Paris"),
        ("ASSISTANT: Paris</s>", "Paris"),
        ("### Assistant: Paris", "Paris"),
        ("[/INST] Paris", "Paris"),
        ("<reasoning>x</reasoning>Paris", "Paris"),
        ("x = 3 <think>", "x = 3 <think>"),
        ("2 + 2 = 4.\n</think>\n4", "4"),
        ("", ""),
        ("assistant<|end_header_id|>\n\nParis", "Paris"),
        ("</think>Paris", "Paris"),
        ("[BOS]Paris[EOS]", "Paris"),
        ("Paris<EOS_TOKEN>", "Paris"),
        ("Paris<pad><pad>", "Paris"),
    ],
)
def test_thoughts_markers_and_roles_are_no_part_of_an_answer(reply: str, answer: str) -> None:
    assert spoken(reply) == answer


@pytest.mark.parametrize(
    "text", ["a" * 20000, "\n" * 5000 + "x", " <think " * 3000, "<|im_end|> x" * 2000, "<think>" * 3000]
)
def test_no_reply_takes_long(text: str) -> None:
    started = time.perf_counter()
    spoken(text)
    assert time.perf_counter() - started < 2


def test_an_empty_answer_stays_one_and_nothing_but_thoughts_is_none() -> None:
    empty = Answer("", "stop", 5, 0, 0)
    judge = TeacherSettings(if_cut_short="take another judge")
    assert heard(empty, judge) == empty
    assert isinstance(heard(empty, judge, thought=True), Rejection)
    assert heard(Answer("<think>Hm", "length", 5, 32, 0), judge) == Rejection(
        "all 32 tokens of the reply went into reasoning: take another judge"
    )
    hidden = "all tokens of the reply went into reasoning: take another judge"
    assert heard(Answer("", "length", 5, 0, 0), judge) == Rejection(hidden), "a server may keep its thoughts"


def test_log_probabilities_of_a_part_begin_at_a_token() -> None:
    tokens = ["<think>", "Tea", "</think>", "\n", " Tea", " now", "<|im_end|>"]
    given = {
        "tokens": tokens,
        "token_ids": list(range(7)),
        "top_tokens": None,
        "top_ids": [[n] for n in range(7)],
        "top_logprobs": [[-1.0]] * 7,
    }
    found = for_part(given, "Tea now")
    assert (found["tokens"], found["token_ids"], found["top_ids"]) == ([" Tea", " now"], [4, 5], [[4], [5]])
    assert for_part(given, "ea now") is None

"""Rows of an answer join and leave at any step, and each is written as if it were alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from scaledown.student.decoding import Decoding


@pytest.fixture(scope="module")
def generator(models: dict[str, Path]) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(models["causal_lm"], dtype=torch.float32).eval()


def prompt(generator: torch.nn.Module, *rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token ids, padded on the left, as embeddings and mask."""
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return generator.get_input_embeddings()(ids), mask


def alone(generator: torch.nn.Module, row: list[int], steps: int) -> list[int]:
    """Greedy, without any cache."""
    written: list[int] = []
    for _ in range(steps):
        logits = generator(input_ids=torch.tensor([row + written])).logits
        written.append(int(logits[0, -1].argmax()))
    return written


ROWS = [[5, 9, 200, 31, 8], [77, 3], [12, 400, 6, 6, 7, 90, 1, 44], [250]]


def check_rows_that_join_and_leave(decoding: Any, generator: torch.nn.Module) -> None:
    """Rows of different lengths join a decoding, longer ones after shorter and before, and leave it."""
    expected = {number: alone(generator, row, 9) for number, row in enumerate(ROWS)}
    assert len({tuple(tokens) for tokens in expected.values()}) == len(ROWS)
    joins = {0: [1], 2: [0, 3], 4: [2]}  # at which step which rows come
    present: list[int] = []
    written: dict[int, list[int]] = {number: [] for number in expected}
    for step in range(14):
        if step in joins:
            assert decoding.can_grow
            decoding.join(*prompt(generator, *(ROWS[number] for number in joins[step])))
            present += joins[step]
        if not present:
            break
        chosen = decoding.logits.argmax(-1)
        for number, token in zip(present, chosen.tolist(), strict=True):
            written[number].append(token)
        going = [place for place, number in enumerate(present) if len(written[number]) < 9]
        present = [present[place] for place in going]
        decoding.keep(going)
        assert len(decoding) == len(present)
        if going:
            decoding.step(chosen[going])
    assert written == expected


@torch.no_grad()
def test_rows_that_join_and_leave_are_written_as_alone(generator: torch.nn.Module) -> None:
    check_rows_that_join_and_leave(Decoding(generator), generator)


@torch.no_grad()
def test_cache_is_as_long_as_its_longest_row(generator: torch.nn.Module) -> None:
    decoding = Decoding(generator)
    decoding.join(*prompt(generator, *ROWS))
    assert decoding._cache.get_seq_length() == 8
    decoding.keep([3, 1])
    assert decoding._cache.get_seq_length() == 2
    decoding.step(torch.tensor([4, 4]))
    assert decoding._cache.get_seq_length() == 3
    decoding.keep([])
    assert len(decoding) == 0
    decoding.join(*prompt(generator, ROWS[0]))
    assert decoding.logits.argmax(-1).tolist() == alone(generator, ROWS[0], 1)


@torch.no_grad()
def test_rows_that_cannot_be_joined_leave_none(
    generator: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding = Decoding(generator)
    decoding.join(*prompt(generator, ROWS[0]))
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise torch.OutOfMemoryError

        patch.setattr("scaledown.student.decoding._join", full)
        with pytest.raises(torch.OutOfMemoryError):
            decoding.join(*prompt(generator, ROWS[1]))
    assert len(decoding) == 0
    decoding.join(*prompt(generator, ROWS[1]))
    assert decoding.logits.argmax(-1).tolist() == alone(generator, ROWS[1], 1)


@torch.no_grad()
def test_requests_do_not_join_rows_with_a_sliding_window_cache() -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=500,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=4,
    )
    generator = MistralForCausalLM(config).eval()
    decoding = Decoding(generator)
    assert decoding.can_grow
    decoding.join(*prompt(generator, ROWS[0], ROWS[2]))
    assert not decoding.can_grow
    decoding.keep([1])
    decoding.step(decoding.logits.argmax(-1))
    assert len(decoding) == 1
    decoding.keep([])
    assert decoding.can_grow

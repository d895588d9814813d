"""Queries that come again are known again, however many came between."""

import random

from scaledown.data.input.seen import Seen, UniqueIds


def test_it_is_a_set() -> None:
    draw = random.Random(0)
    seen, expected = Seen(), set[str]()
    for _ in range(60_000):
        query = f"What is number {draw.randrange(20_000)}?"
        assert seen.add(query) == (query not in expected)
        expected.add(query)
    assert len(expected) > 18_000


def test_spaces_around_a_query_do_not_count() -> None:
    seen = Seen()
    assert seen.add("Who?")
    assert not seen.add("  Who?\n")
    assert seen.add("who?")
    assert seen.add("")
    assert not seen.add(" ")


def test_each_gets_an_id_of_its_own() -> None:
    ids = UniqueIds()
    given = ["a", "b", "a", "a#2", "a", "x y", "x_y", "", "b"]
    assert [ids.own(one) for one in given] == ["a", "b", "a#2", "a#2#2", "a#3", "x y", "x_y#2", "", "b#2"]
    assert ids.renamed == 5
    assert [ids.own("n") for _ in range(20_000)][-1] == "n#20000"

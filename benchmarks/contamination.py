"""Evaluation questions planted among training queries are found, and nothing else; what a million costs."""

import json
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from common import SHARED, child, close, machine, parser, verdict

from scaledown.config.shared import CleanConfig
from scaledown.data.cleaning.decontaminate import Cleaner
from scaledown.text import words

EVALUATION = SHARED / "xquad-dev" / "questions.jsonl"
OTHERS = SHARED / "nq-open-dev.jsonl"
REAL = (OTHERS, EVALUATION, *(SHARED / name / "questions.jsonl" for name in ("qed-dev", "cmu-dev")))

# A word to say otherwise. In questions that have none of these, the longest word becomes one of `OTHERS`.
SYNONYMS = {
    **{"many": "numerous", "kind": "sort", "type": "kind", "main": "primary", "primary": "main"},
    **{"large": "big", "largest": "biggest", "name": "title", "called": "named", "named": "called"},
    **{"won": "claimed", "win": "claim", "beat": "defeat", "began": "started", "begin": "start"},
    **{"used": "employed", "use": "employ", "made": "created", "wrote": "penned", "written": "penned"},
    **{"established": "founded", "founded": "established", "happened": "occurred", "company": "firm"},
    **{"final": "last", "last": "final", "famous": "renowned", "considered": "deemed", "known": "familiar"},
    **{"often": "frequently", "generally": "usually", "increased": "grew", "percentage": "share"},
    **{"amount": "quantity", "area": "region", "region": "area", "oldest": "eldest", "method": "way"},
    **{"role": "part", "movie": "film", "problem": "question", "goal": "aim", "country": "nation"},
    **{"ended": "finished", "surrender": "concede", "register": "record", "lost": "missing"},
}


def texts(path: Path) -> list[str]:
    return [json.loads(line)["question"] for line in path.read_text(encoding="utf-8").splitlines()]


def dressed(question: str) -> str:
    """The same words with other case and punctuation, as search engines get them."""
    return " ".join(question.lower().translate({ord(mark): " " for mark in '?.,;:!"()-'}).split())


def reordered(question: str) -> str:
    """The end first: `when were the tapes lost` -> `the tapes lost when were`."""
    own = question.rstrip("? ").split()
    place = random.Random(question).randrange(1, len(own))
    return " ".join(own[place:] + own[:place])


def paraphrased(question: str, vocabulary: list[str]) -> str:
    """One word said otherwise, or simply another one: that shares no more with it."""
    own = question.split()
    places = [number for number, word in enumerate(own) if word.lower() in SYNONYMS]
    if places:
        own[places[0]] = SYNONYMS[own[places[0]].lower()]
        return " ".join(own)
    plain = [
        number for number, word in enumerate(own) if len(words(word)) == 1 and word.strip("?,.").isalpha()
    ]
    place = max(plain, key=lambda number: len(own[number]))
    own[place] = random.Random(question).choice(vocabulary)
    return " ".join(own)


def planted(questions: list[str]) -> bool:
    """Print how many questions are found again, by kind; whether that is enough."""
    vocabulary = sorted({word for text in texts(OTHERS) for word in words(text) if word.isalpha()})
    kinds: dict[str, tuple[Callable[[str], str], float]] = {
        "other case and punctuation": (dressed, 1.0),
        "one word paraphrased": (lambda question: paraphrased(question, vocabulary), 0.99),
        "reordered": (reordered, 1.0),
    }
    met = True
    cleaner = Cleaner(CleanConfig(decontaminate=(str(EVALUATION),)))
    for kind, (change, bar) in kinds.items():
        changed = [change(question) for question in questions]
        found = cleaner.queries(changed)
        missed = [pair for pair in zip(questions, changed, found, strict=True) if not pair[2]]
        caught = len(questions) - len(missed)
        met &= verdict(
            kind, f"{caught} of {len(questions)} caught", f"{bar:.0%}", met=caught >= bar * len(found)
        )
        for question, other, _ in missed:
            print(f"    missed: {question.strip()} -> {other.strip()}")
    return met


def false_hits() -> bool:
    """Print which questions of the other set are taken for one of these; whether there is none."""
    others = texts(OTHERS)
    found = Cleaner(CleanConfig(decontaminate=(str(EVALUATION),))).queries(others)
    hits = [(text, why["match"]) for text, why in zip(others, found, strict=True) if why]
    for text, match in hits:
        print(f"    {match['similarity']}: {text} | {match['question']}")
    what = f"false hits of {len(others):,} NQ-open questions against xquad-dev"
    return verdict(what, str(len(hits)), "0", met=not hits)


def relatives() -> None:
    """Two sets drawn from Natural Questions: how much of one is in the other."""
    qed = texts(SHARED / "qed-dev" / "questions.jsonl")
    found = Cleaner(CleanConfig(decontaminate=(str(OTHERS),))).queries(qed)
    kinds = Counter(why["match"]["kind"] for why in found if why)
    print(f"  of {len(qed):,} QED questions NQ-open has {kinds['exact']} exactly and {kinds['near']} nearly")


def deduplicate(count: int) -> dict[str, float]:
    """Seconds and peak memory, in MB, of leaving out near-duplicates among so many synthetic queries.

    Each begins with two words of a real question and goes on with words of all, by their frequency; one of
    twenty is a real question as it is.
    """
    real = [text for path in REAL for text in texts(path)]
    pool = [word for text in real for word in text.split()]
    chance = random.Random(0)

    def query(number: int) -> str:
        own = chance.choice(real).split()
        return " ".join(own if number % 20 == 0 else own[:2] + [chance.choice(pool) for _ in own[2:]])

    cleaner = Cleaner(CleanConfig(deduplicate="near"))
    queries = map(query, range(count))
    seconds, left_out = 0.0, 0
    while block := list(islice(queries, 4096)):
        started = time.perf_counter()
        left_out += sum(why is not None for why in cleaner.queries(block))
        seconds += time.perf_counter() - started
    unit = 1 if sys.platform == "darwin" else 1024
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    return {"seconds": seconds, "left_out": left_out, "memory": memory}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--child", type=int, default=0)
    options = made.parse_args()
    if options.child:
        print(json.dumps(deduplicate(options.child)))
        return
    count = 50_000 if options.quick else 1_000_000
    cost = child([__file__, "--child", str(count)])  # first: a process counts the memory of its parent, too
    print(machine())
    questions = texts(EVALUATION)[:: 4 if options.quick else 1]
    caught = planted(questions)
    none_false = false_hits()
    relatives()
    print(f"  {count:,} synthetic queries: {cost['left_out']:,} near-duplicates in {cost['seconds']:.0f} s")
    small = verdict("peak memory of that", f"{cost['memory']:.0f} MB", "1,000", met=cost["memory"] < 1000)
    close("contamination", float(caught and none_false), 1.0, also=small)


if __name__ == "__main__":
    main()

"""All real articles as one corpus, all real questions through retrieval: recall of the gold paragraph.

Then the top 10 of 500 questions (10 with --quick) are reranked by query likelihood under SmolLM2-135M.
"""

import json
import random
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import numpy as np
from common import SHARED, arguments, machine

from scaledown.config.index import IndexConfig
from scaledown.data.build_index import build_index
from scaledown.data.input.corpus import PassageTable
from scaledown.data.reranker.api import load_reranker, resolve_reranker
from scaledown.data.reranker.base import Pair
from scaledown.data.retrieval.encoders import load_encoder
from scaledown.data.retrieval.index import search
from scaledown.models.sources import resolve
from scaledown.records import full_text
from scaledown.run.directory import RunDirectory
from scaledown.run.stage import Stage

FOLDERS = ("xquad-dev", "qed-dev", "cmu-dev")
TOPS = (1, 5, 20)
TOP_RERANKED = 10


def lines(name: str, folders: tuple[str, ...] = FOLDERS) -> list[dict]:
    return [
        json.loads(line) | {"folder": folder}
        for folder in folders
        for line in (SHARED / folder / name).read_text(encoding="utf-8").splitlines()
    ]


def stage(folder: Path, name: str) -> Stage:
    """A finished stage of the index in `folder`."""
    (fingerprint,) = (folder / name).iterdir()
    found = Stage(RunDirectory(folder), name, {})
    found.folder = fingerprint
    return found


def main() -> None:
    options = arguments(__doc__)
    folders = ("xquad-dev",) if options.quick else FOLDERS
    articles, asked = lines("kilt.jsonl", folders), lines("questions.jsonl", folders)
    print(f"{machine()}\n{len(articles):,} articles, {len(asked):,} questions, bundled:splade-tiny, float32")
    with tempfile.TemporaryDirectory() as temporary:
        corpus, index = Path(temporary) / "kilt.jsonl", Path(temporary) / "index"
        corpus.write_text("".join(json.dumps(article) + "\n" for article in articles), encoding="utf-8")
        config = IndexConfig(
            corpus_path=(str(corpus),),
            index_dir=str(index),
            retriever_model="bundled:splade-tiny",
            device="cpu",
        )
        started = time.perf_counter()
        made = build_index(config)
        seconds = time.perf_counter() - started
        passages, vectors = stage(index, "passages"), stage(index, "vectors")
        rows = vectors.finished().rows
        postings = made.stages["vectors"].counts["postings"] / sum(rows)
        print(
            f"  index: {sum(rows):,} passages in {seconds:.0f} s ({sum(rows) / seconds:.0f}/s), "
            f"{made.size / 1e6:.0f} MB, {postings:.0f} postings each"
        )
        encoder = load_encoder(resolve("bundled:splade-tiny"), "cpu", "float32", 32)
        started = time.perf_counter()
        queries = encoder.queries([question["question"] for question in asked], lambda _: None)
        encoded = time.perf_counter() - started
        load = [lambda shard=shard: vectors.table(shard, check=True) for shard in range(len(rows))]
        search(queries[:2], load, rows, max(TOPS))
        started = time.perf_counter()
        ranking = search(queries, load, rows, max(TOPS))
        searched = time.perf_counter() - started
        print(f"  {len(asked):,} questions: encoded in {encoded:.1f} s, searched in {searched:.2f} s")
        table = PassageTable(passages)
        report(table, articles, asked, ranking.rows)
        count = 10 if options.quick else 500
        chosen = random.Random(0).sample([n for n, one in enumerate(asked) if "paragraph" in one], count)
        some, candidates = [asked[n] for n in chosen], ranking.rows[chosen, :TOP_RERANKED]
        reranker = load_reranker(resolve_reranker("ql:bundled:smollm2-135m"), "cpu", "bfloat16", 32)
        pairs = [
            Pair(one["question"], full_text(table[row].title, table[row].text))
            for one, rows in zip(some, candidates, strict=True)
            for row in rows.tolist()
        ]
        started = time.perf_counter()
        scores = np.array(reranker.score(pairs, lambda _: None)).reshape(candidates.shape)
        seconds = time.perf_counter() - started
        print(
            f"  {count} questions, top {TOP_RERANKED} reranked: {len(pairs) / seconds:.1f} pairs/s, bfloat16"
        )
        report(table, articles, some, candidates)
        best = np.argsort(-scores, axis=1, kind="stable")
        report(table, articles, some, np.take_along_axis(candidates, best, 1))


def report(table: PassageTable, articles: list[dict], asked: list[dict], found: np.ndarray) -> None:
    """R@k of a passage that holds sentences of the gold paragraph, where it is known."""
    tops = [top for top in TOPS if top <= found.shape[1]]
    texts = {(article["folder"], article["wikipedia_id"]): article["text"] for article in articles}
    of_article: dict[str, list[int]] = {}
    for row in range(len(table)):
        of_article.setdefault(table[row].doc_id, []).append(row)

    @cache
    def gold(folder: str, article: str, paragraph: int) -> frozenset[int]:
        text = texts[folder, article][paragraph]
        own = (row for row in of_article.get(article, ()))
        return frozenset(r for r in own if any(line and line in text for line in table[r].text.split("\n")))

    print(f"  {'questions of':<12} {'with gold':>9} " + " ".join(f"R@{top:<4}" for top in tops))
    for folder in dict.fromkeys(question["folder"] for question in asked):
        hits = []
        for question, rows in zip(asked, found, strict=True):
            if question["folder"] == folder and isinstance(question.get("paragraph"), int):
                own = gold(folder, question["wikipedia_id"], question["paragraph"])
                hits.append([not own.isdisjoint(rows[:top].tolist()) for top in tops])
        if hits:
            print(
                f"  {folder:<12} {len(hits):>9,} "
                + " ".join(f"{share:.3f} " for share in np.mean(hits, axis=0))
            )


if __name__ == "__main__":
    sys.exit(main())

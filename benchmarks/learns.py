"""Does a student learn? Data by the pipeline, training, and answers about articles that training never saw.

A pointer is pretrained on cloze questions and trained on records. Articles are split three ways: training,
development (all choices are made there) and test (looked at once, at the end). No step of training sees an
article of the other two. Every step leaves its result in --work_dir; the same command goes on from there.

--data takes folders with `kilt.jsonl` (KILT lines) and `questions.jsonl` (`id`, `question`, `answers`,
`wikipedia_id`). --recipe says how many steps are trained, --quick does little of each. --student trains
another student for as many steps: `n_layers`, the paper's compressor, one model a rate; or a control,
`first`, `keywords` or `random`: a generator that learns to read as many tokens as compression takes.
"""

import itertools
import json
import subprocess
import sys
import unicodedata
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any, Final, NamedTuple

import numpy as np
import scipy.sparse as sp
from common import SHARED, fast_dtype, machine, parser

from scaledown.config.evaluate import EvaluateConfig
from scaledown.evaluation.baselines import (
    ECHOES,
    READERS,
    highest,
    memory_tokens,
    text_of,
    tokenised,
    weighing,
)
from scaledown.evaluation.statistics import difference, estimate
from scaledown.metrics import accuracy, exact_match, f1
from scaledown.student.compressors.pointer import RATES as POINTER_RATES
from scaledown.text import normalized

POINTER: Final = "pointer"
N_LAYERS: Final = "n_layers"
TOP: Final = 3
PASSAGE_TOKENS: Final = 64
DOCUMENT_TOKENS: Final = 80  # of the generator's tokenizer, which cuts finer
NEW_TOKENS: Final = 24
GENERATOR: Final = "bundled:smollm2-135m"
RETRIEVER: Final = "bundled:splade-tiny"
TEXT, NONE = 0.12, 0.08  # shares of examples that the generator reads as text, and without documents
SPLIT_SEED: Final = 7
TEST_SHARE, DEVELOPMENT_SHARE = 18, 8  # of 100 articles
RATES: Final = (16, 4)
BATCH: Final = 8
DTYPE: Final = fast_dtype()
SHARED_FLAGS: Final = ("--eval_fraction", "0", "--dtype", DTYPE, "--report_to", "none", "--resume")


class Recipe(NamedTuple):
    """How much of everything."""

    name: str
    questions: int | None
    """On each side; None is all."""
    pretraining_steps: int
    """Of 16 cloze questions."""
    steps: int
    """Of 8 records."""
    systems: tuple[str, ...]
    """Beside the student, from as many tokens of the same documents."""


WHOLE: Final = ("uncompressed", "closed_book")  # the same at every rate
RECIPES: Final = {
    one.name: one
    for one in (
        Recipe("quick", 12, 2, 3, ()),
        Recipe("short", None, 200, 100, (*READERS, *ECHOES)),
        Recipe("long", None, 500, 450, ("pruned", *READERS, *ECHOES)),
    )
}


class Gold(NamedTuple):
    """What is right, and the article that it is about."""

    article: str
    answers: list[str]


def plain(title: str) -> str:
    """A title as it is compared: "Otter" and "otter" are one article in two data sets."""
    return unicodedata.normalize("NFKC", title.replace("_", " ")).casefold().strip()


def looked_at(title: str) -> bool:
    """Whether an earlier version of this benchmark, or its pilot, held an article out and chose by it."""
    number = blake2b(f"0 {title}".encode(), digest_size=2).digest()[0]
    return number % 10 == 0 or number % 100 < 13


def split(titles: Iterable[str]) -> dict[str, str]:
    """`train`, `development` or `test` for each title; what was looked at before is in no test."""
    titles = list(titles)
    before = {plain(title) for title in titles if looked_at(title)}
    found = {}
    for title in titles:
        name = plain(title)
        number = int.from_bytes(blake2b(f"{SPLIT_SEED} {name}".encode(), digest_size=4).digest(), "big") % 100
        if number < TEST_SHARE:
            found[title] = "train" if name in before else "test"
        else:
            found[title] = "development" if number < TEST_SHARE + DEVELOPMENT_SHARE else "train"
    return found


def is_open(answers: Iterable[str]) -> bool:
    """Whether a question has a short answer that is not yes or no, which many an answer holds by chance."""
    words = [normalized(answer).split() for answer in answers if normalized(answer)]
    return bool(words) and not any(own[0] in {"yes", "no"} for own in words) and min(map(len, words)) <= 8


def write_inputs(folders: list[Path], work: Path, recipe: Recipe) -> dict[str, Gold]:
    """Corpora, queries and right answers of each side; gives the right answers by query id."""
    gold: dict[str, Gold] = {}
    articles: dict[str, list[str]] = {"train": [], "development": [], "test": []}
    questions: dict[str, list[dict[str, Any]]] = {name: [] for name in articles}
    lines = {folder: (folder / "kilt.jsonl").read_text(encoding="utf-8").splitlines() for folder in folders}
    content = {folder: [json.loads(line) for line in own] for folder, own in lines.items()}
    sides = split(article["wikipedia_title"] for own in content.values() for article in own)
    for folder, own in content.items():
        names = {article["wikipedia_id"]: sides[article["wikipedia_title"]] for article in own}
        for line, name in zip(lines[folder], names.values(), strict=True):
            articles[name].append(line)
        for line in (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines():
            question = json.loads(line)
            if is_open(question["answers"]):
                gold[question["id"]] = Gold(f"{folder.name}/{question['wikipedia_id']}", question["answers"])
                questions[names[question["wikipedia_id"]]].append(question)
    for one, other in itertools.combinations(questions, 2):
        both = {plain(asked["question"]) for asked in questions[one]}
        if shared := both & {plain(asked["question"]) for asked in questions[other]}:
            sys.exit(f"{one} and {other} ask the same: {min(shared)!r}; take one of the two out")
    write(work / "all.corpus.jsonl", [line for lines in articles.values() for line in lines])
    write(work / "train.corpus.jsonl", articles["train"])
    for name, own in questions.items():
        count = min(recipe.questions or len(own), len(own))
        chosen = [own[place * len(own) // count] for place in range(count)]  # of as many articles as can be
        write(
            work / f"{name}.queries.jsonl",
            [json.dumps({"id": one["id"], "query": one["question"]}) for one in chosen],
        )
        write(
            work / f"{name}.gold.jsonl",
            [json.dumps({"question": one["question"], "answers": one["answers"]}) for one in chosen],
        )
        print(f"  {name}: {len(articles[name]):,} articles, {len(chosen):,} open questions")
    return gold


def write(path: Path, lines: Iterable[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def command(log: Path, *words: str) -> None:
    """Run a command of ours, print it, keep what it says."""
    print(f"  $ scaledown {' '.join(words)}", flush=True)
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, "-m", "scaledown", *words], stdout=file, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        sys.exit(f"it failed: see {log}")


def prepare(work: Path, name: str) -> Path:
    """Records of one side: passages retrieved from training articles, or from all, and teacher's answers."""
    output, corpus = work / f"{name}.jsonl", "train" if name == "train" else "all"
    command(
        work / "prepare.log",
        *(
            "prepare",
            "--corpus_path",
            str(work / f"{corpus}.corpus.jsonl"),
            "--index_dir",
            str(work / f"{corpus}.index"),
        ),
        *("--queries_file", str(work / f"{name}.queries.jsonl"), "--retriever_model", RETRIEVER),
        *("--passage_tokens", str(PASSAGE_TOKENS), "--top_k_retrieval", str(TOP)),
        *("--teacher_model", GENERATOR, "--teacher_batch_size", "16"),  # by OpenVINO where that is at hand
        *("--dtype", DTYPE),
        *("--max_new_tokens", str(NEW_TOKENS), "--columns", "query_id", "--output_file", str(output)),
    )
    return output


def pretrain(work: Path, recipe: Recipe, seed: int, labels: str, kind: str, rate: int) -> Path:
    """The compressor alone: a pointer on cloze questions and records, another on training articles' text."""
    output = work / f"pretrained-{recipe.name}-{named(kind, rate)}{labels}-{seed}"
    records = ("--train_data", str(work / "train.jsonl"), *right(work, labels)) if kind == POINTER else ()
    command(
        work / f"train-{seed}.log",
        *("pretrain", "--corpus_path", str(work / "train.corpus.jsonl"), "--output_dir", str(output)),
        *("--generator_model", GENERATOR, "--compressor", kind, "--num_layers", "8"),
        *("--compression_rate", str(rate), "--doc_max_length", str(DOCUMENT_TOKENS)),
        *("--lora_dropout", "0", "--max_steps", str(recipe.pretraining_steps), "--seed", str(seed)),
        *("--batch_size", "16", "--micro_batch_size", "16", *SHARED_FLAGS),
        *records,
    )
    return output


def right(work: Path, labels: str) -> list[str]:
    """The flags that give right answers, if they are what is learned."""
    return ["--gold", str(work / "train.gold.jsonl")] if labels == "right" else []


def train(work: Path, recipe: Recipe, seed: int, labels: str, student: str, rate: int) -> Path:
    """Compressor and generator on records, or the generator of a control; gives the model's folder."""
    kind = N_LAYERS if student == N_LAYERS else POINTER
    start = pretrain(work, recipe, seed, labels, kind, rate)
    output = work / f"trained-{recipe.name}-{named(student, rate)}{labels}-{seed}"
    data, text_fraction = work / "train.jsonl", TEXT
    if student in READERS:
        data = with_picks(work, start, data, student, share=1 - TEXT / (1 - NONE))
        text_fraction = 1 - NONE
    command(
        work / f"train-{seed}.log",
        *("train", "--train_data", str(data), *right(work, labels), "--output_dir", str(output)),
        *("--pretrained_model", str(start), "--learning_rate_generator", "5e-4"),  # few steps need high rates
        *("--text_fraction", str(text_fraction), "--closed_book_fraction", str(NONE)),
        *("--max_steps", str(recipe.steps), "--batch_size", str(BATCH), "--micro_batch_size", str(BATCH)),
        *("--seed", str(seed), *SHARED_FLAGS),
    )
    seconds = 0.0
    for folder in (start, output):
        result = json.loads((folder / "settings.json").read_text(encoding="utf-8"))["result"]
        seconds += result["steps"] * result["seconds_per_step"]
    print(f"  {output.name}: {seconds / 60:.0f} min of training")
    return output


def named(student: str, rate: int) -> str:
    """What tells a model of this student from others; a pointer serves every rate, as do controls."""
    return {POINTER: "", N_LAYERS: f"{student}-{rate}x-"}.get(student, f"{student}-")


def with_picks(
    work: Path, model: Path, data: Path, system: str, *, rate: int = 0, share: float = 1.0
) -> Path:
    """The same records, the documents of a `share` of them cut to the tokens that a baseline picks.

    A rate of 0 takes another for each record, as a pointer is trained.
    """
    output = data.with_name(f"{data.stem}.{system}-{rate}x.jsonl")
    if output.exists():
        return output
    from scaledown.student.model import ScaleDownModel

    loaded = ScaleDownModel.from_pretrained(str(model))
    weigh = weighing(system, EvaluateConfig(model=str(model), data=str(data), keyword_model=RETRIEVER))
    lines = []
    for record in records(data):
        random = Random(record["query_id"])
        chosen = rate or random.choice(POINTER_RATES)
        if random.random() < share:
            read = [tokenised(loaded, text) for text in record["documents"]]
            kept = [
                highest(weights, memory_tokens(loaded, one, chosen))
                for one, weights in zip(read, weigh(record["query"], read), strict=True)
            ]
            texts = [text_of(loaded, one.ids, places) for one, places in zip(read, kept, strict=True)]
            record["documents"] = [text or "-" for text in texts]
        lines.append(json.dumps(record))
    write(output, lines)
    return output


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def with_others(path: Path, gold: dict[str, Gold]) -> Path:
    """The same questions, each with the documents of the next, from the middle on, about another article."""
    output = path.with_name(path.stem + ".others.jsonl")
    content = records(path)
    articles = [gold[record["query_id"]].article for record in content]
    if len(set(articles)) < 2:
        sys.exit(f"{path}: all questions are about one article: give more --data")
    places = range(len(content))
    shifted = [
        next(
            content[(place + step) % len(content)]
            for step in (*places[len(content) // 2 :], *places)
            if articles[(place + step) % len(content)] != articles[place]
        )
        for place in places
    ]
    write(
        output,
        [
            json.dumps({**own, "documents": other["documents"]})
            for own, other in zip(content, shifted, strict=True)
        ],
    )
    return output


class Scores(NamedTuple):
    """Of each question."""

    accuracy: np.ndarray
    exact: np.ndarray
    f1: np.ndarray
    words: np.ndarray


def better(one: Scores, other: Scores) -> Scores:
    """Of each measure the values with the higher mean."""
    return Scores(*(max(pair, key=np.mean) for pair in zip(one, other, strict=True)))


class Judge(NamedTuple):
    """Right answers and articles of the questions, in their order."""

    right: list[list[str]]
    articles: list[str]
    held: np.ndarray
    """Whether a document of the question has a right answer."""

    def score(self, answers: list[str]) -> Scores:
        """Measure one answer to each question."""
        measures = (accuracy, exact_match, f1)
        found = [
            np.array([measure(*pair) for pair in zip(answers, self.right, strict=True)])
            for measure in measures
        ]
        return Scores(*found, np.array([len(answer.split()) for answer in answers]))

    def row(self, name: str, scores: Scores) -> None:
        """Print accuracy and F1 with intervals by article, EM, both groups' accuracy, length."""
        cells = [
            str(estimate(values.tolist(), self.articles, seed=0)) for values in (scores.accuracy, scores.f1)
        ]
        groups = [
            scores.accuracy[chosen].mean() if chosen.any() else float("nan")
            for chosen in (self.held, ~self.held)
        ]
        print(
            f"  {name:<34} {cells[0]:<22} {cells[1]:<22} {scores.exact.mean():.3f}  "
            f"{groups[0]:.3f} / {groups[1]:.3f}  {scores.words.mean():.1f}",
            flush=True,
        )

    def difference(self, name: str, one: Scores, other: Scores) -> float:
        """Print a paired difference of accuracy and F1; gives the p-value of the first."""
        found = [
            difference(left.tolist(), right.tolist(), self.articles, seed=0)
            for left, right in ((one.accuracy, other.accuracy), (one.f1, other.f1))
        ]
        print(f"  {name}: accuracy {found[0]}; F1 {found[1]}", flush=True)
        return found[0].p_value if found[0].mean > 0 else 1.0


def holds(text: str, answers: list[str]) -> bool:
    """Whether a text has a right answer, word for word."""
    return any(normalized(answer) in normalized(text) for answer in answers if normalized(answer))


def judge_of(data: Path, gold: dict[str, Gold]) -> Judge:
    """Who judges the answers to some questions."""
    asked = records(data)
    right = [gold[record["query_id"]] for record in asked]
    held = [
        any(holds(text, own.answers) for text in record["documents"])
        for own, record in zip(right, asked, strict=True)
    ]
    judge = Judge([own.answers for own in right], [own.article for own in right], np.array(held))
    print(
        f"  {len(asked)} questions about {len(set(judge.articles))} articles; the documents of {sum(held)} "
        "hold a right answer\n"
        f"  {'':<34} {'accuracy':<22} {'F1':<22} EM     held / not       words"
    )
    return judge


class Asked(NamedTuple):
    """Where a student's answers come from."""

    work: Path
    data: Path
    judge: Judge
    engine: str
    """What computes the generator."""

    def answers(
        self, model: Path, rate: int, *systems: str, data: Path | None = None, budget: str = "each"
    ) -> dict[str, Scores]:
        """The scores of each system's answers; `data` has other documents than the own."""
        data = data or self.data
        output = self.work / f"{model.name}-{data.stem}-{rate}x-{budget}"
        command(
            self.work / "evaluate.log",
            *("evaluate", "--model", str(model), "--data", str(data), "--output_dir", str(output)),
            *("--gold", str(self.work / f"{data.name.partition('.')[0]}.gold.jsonl")),
            *("--compression_rate", str(rate), "--budget", budget),
            *("--systems", *systems, "--keyword_model", RETRIEVER),
            *(("--pruning_reranker", f"ql:{GENERATOR}") if "pruned" in systems else ()),
            *("--max_new_tokens", str(NEW_TOKENS), "--batch_size", "16", "--dtype", DTYPE),
            *("--engine", self.engine),
        )
        found = records(output / "answers.jsonl")
        return {
            system: self.judge.score([record["answers"][system]["answer"] for record in found])
            for system in systems
        }


def report(
    asked: Asked, models: dict[int, Path], before: Path, systems: tuple[str, ...], others: Path
) -> float:
    """Print the table of one student, its model by rate; gives the p-value of 4x above closed-book.

    `before` is the model before training, `others` has other documents than the own; `systems` are baselines.
    """
    judge, p_value = asked.judge, 1.0
    whole: dict[Path, dict[str, Scores]] = {}
    untrained = asked.answers(before, 0, *WHOLE)
    for name, scores in untrained.items():
        judge.row(f"{name}, before training", scores)
    for rate, model in models.items():
        if model not in whole:
            whole[model] = asked.answers(model, 0, *WHOLE)
            for name, scores in whole[model].items():
                judge.row(name, scores)
        own_rate = 0 if N_LAYERS in model.name else rate
        found = asked.answers(model, own_rate, "compressed", *(systems if own_rate else ()))
        if own_rate and systems:
            found["budget shared"] = asked.answers(model, rate, "compressed", budget="shared")["compressed"]
        found["another's documents"] = asked.answers(model, own_rate, "compressed", data=others)["compressed"]
        for name, scores in found.items():
            judge.row(f"{rate}x {name}", scores)
        student, text = found.pop("compressed"), whole[model]["uncompressed"]
        none = better(untrained["closed_book"], whole[model]["closed_book"])
        for name, scores in {"closed_book": none, "text": text, **found}.items():
            value = judge.difference(f"{rate}x compressed - {name}", student, scores)
            if name == "closed_book":
                p_value = value
        print_ratios(f"{rate}x", student, none, text)
    return p_value


def report_ranking(asked: Asked, model: Path) -> None:
    """Print how often the first document holds a right answer, in the orders that scores give."""
    from scaledown.data.retrieval.encoders import load_encoder
    from scaledown.models.sources import resolve
    from scaledown.student.model import ScaleDownModel

    content = records(asked.data)
    queries, documents = ([record[key] for record in content] for key in ("query", "documents"))
    encoder = load_encoder(resolve(RETRIEVER), "cpu", DTYPE, batch_size=16)
    vectors = sp.csr_matrix(encoder.queries(queries, lambda _: None))
    pointed = ScaleDownModel.from_pretrained(str(model)).rerank(queries, documents)
    first: dict[str, list[bool]] = {}
    for row, (texts, right, points) in enumerate(zip(documents, asked.judge.right, pointed, strict=True)):
        found = (sp.csr_matrix(encoder.documents(texts, lambda _: None)) @ vectors[row].T).toarray()[:, 0]
        for name, scores in {"retriever": found, "pointer": points, "sum": found + np.array(points)}.items():
            first.setdefault(name, []).append(holds(texts[int(np.argmax(scores))], right))
    shares = ", ".join(f"{name} {np.mean(own):.3f}" for name, own in first.items())
    print(f"  R@1, the first document holds a right answer, by the scores of: {shares}", flush=True)


def print_ratios(name: str, student: Scores, none: Scores, text: Scores) -> None:
    """Print which share of what the documents' text is worth a student keeps."""
    for what in ("accuracy", "f1"):
        own, read, closed = (getattr(one, what).mean() for one in (student, text, none))
        ratio = (own - closed) / (read - closed)
        print(f"  {name}, {what}: (student - closed-book) / (text - closed-book) {ratio:.2f}")


def report_control(asked: Asked, model: Path, student: str) -> float:
    """Print the table of a generator that reads picked tokens; gives the p-value of 4x above closed-book."""
    whole = asked.answers(model, 0, *WHOLE)
    for name, scores in whole.items():
        asked.judge.row(name, scores)
    p_value = 1.0
    for rate in RATES:
        picks = with_picks(asked.work, model, asked.data, student, rate=rate)
        scores = asked.answers(model, 0, "uncompressed", data=picks)["uncompressed"]
        asked.judge.row(f"{rate}x {student}, trained to read it", scores)
        p_value = asked.judge.difference(f"{rate}x {student} - closed_book", scores, whole["closed_book"])
        print_ratios(f"{rate}x", scores, whole["closed_book"], whole["uncompressed"])
    return p_value


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--data", nargs="+", help="folders of articles and questions")
    flags.add_argument("--recipe", choices=RECIPES, default="long", help="how much training")
    flags.add_argument(
        "--labels", choices=("right", "teacher"), default="right", help="which answers are learned"
    )
    flags.add_argument("--student", choices=(POINTER, N_LAYERS, *READERS), default=POINTER)
    flags.add_argument("--seeds", type=int, nargs="+", default=[0], help="one student for each")
    flags.add_argument(
        "--split", choices=("development", "test"), default="development", help="what is asked about"
    )
    flags.add_argument(
        "--engine", choices=("transformers", "openvino"), default="transformers", help="what writes answers"
    )
    flags.add_argument("--work_dir", default="learns.work", help="where each step leaves its result")
    options = flags.parse_args()
    recipe, student = RECIPES["quick" if options.quick else options.recipe], options.student
    names = ("xquad-dev",) if options.quick else ("xquad-dev", "qed-dev", "cmu-dev")
    folders = [Path(name) for name in options.data] if options.data else [SHARED / name for name in names]
    work = Path(options.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    print(f"{machine()}, {DTYPE}")
    gold = write_inputs(folders, work, recipe)
    for name in ("train", options.split):
        prepare(work, name)
    data = work / f"{options.split}.jsonl"
    asked = Asked(work, data, judge_of(data, gold), options.engine)
    p_values = []
    for seed in options.seeds:
        rates = RATES if student == N_LAYERS else RATES[:1]
        trained = {rate: train(work, recipe, seed, options.labels, student, rate) for rate in rates}
        models = {rate: trained.get(rate, trained[RATES[0]]) for rate in RATES}
        if student in READERS:
            p_values.append(report_control(asked, models[RATES[0]], student))
        else:
            before = work / f"pretrained-{recipe.name}-{named(student, RATES[0])}{options.labels}-{seed}"
            p_values.append(report(asked, models, before, recipe.systems, with_others(data, gold)))
            if student == POINTER:
                report_ranking(asked, models[RATES[0]])
    worst = max(p_values)
    print(f"learns: p {worst:.4f} that 4x is not above closed-book (bar 0.05)")
    sys.exit(0 if worst < 0.05 or options.quick else 1)


if __name__ == "__main__":
    main()

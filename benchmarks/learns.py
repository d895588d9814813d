"""Does a student learn? Data by the pipeline, training, and answers about articles that training never saw.

A pointer is pretrained on cloze questions and trained on records. Articles are split three ways: training,
development (all choices are made there) and test (looked at once, at the end). No step of training sees an
article of the other two. Every step leaves its result in --work_dir; the same command goes on from there.

--data takes folders with `kilt.jsonl` (KILT lines) and `questions.jsonl` (`id`, `question`, `answers`,
`wikipedia_id`). --recipe says how many steps are trained, --quick does little of each.
"""

import itertools
import json
import subprocess
import sys
import unicodedata
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from common import SHARED, machine, parser

from scaledown.evaluation.statistics import difference, estimate
from scaledown.metrics import accuracy, exact_match, f1, normalized

TOP: Final = 3
PASSAGE_TOKENS: Final = 64
DOCUMENT_TOKENS: Final = 80  # of the generator's tokenizer, which cuts finer
NEW_TOKENS: Final = 24
GENERATOR: Final = "bundled:smollm2-135m"
SPLIT_SEED: Final = 7
TEST_SHARE, DEVELOPMENT_SHARE = 18, 8  # of 100 articles
RATES: Final = (16, 4)
BATCH: Final = 8
# Few steps need higher rates than the paper's.
SHARED_FLAGS: Final = ("--batch_size", str(BATCH), "--dtype", "bfloat16", "--report_to", "none", "--resume")


class Recipe(NamedTuple):
    """How much of everything."""

    questions: int | None
    """On each side; None is all."""
    pretraining_steps: int
    """Of 16 cloze questions."""
    steps: int
    """Of 8 records."""
    systems: tuple[str, ...]
    """Beside the student, from the same documents."""


BASELINES: Final = ("uncompressed", "closed_book", "first", "keywords", "random", "echo", "echo_span")
RECIPES: Final = {
    "quick": Recipe(12, 2, 3, ("uncompressed", "closed_book")),
    "short": Recipe(None, 200, 350, BASELINES),
    "long": Recipe(None, 500, 1500, BASELINES),
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
        *("--queries_file", str(work / f"{name}.queries.jsonl"), "--retriever_model", "bundled:splade-tiny"),
        *("--passage_tokens", str(PASSAGE_TOKENS), "--top_k_retrieval", str(TOP)),
        *("--teacher_model", GENERATOR, "--teacher_batch_size", "16"),  # by OpenVINO where that is at hand
        *("--max_new_tokens", str(NEW_TOKENS), "--columns", "query_id", "--output_file", str(output)),
    )
    return output


def pretrain(work: Path, recipe: Recipe, seed: int) -> Path:
    """The pointer alone, on cloze questions about training articles."""
    output = work / f"pretrained-{seed}"
    command(
        work / f"train-{seed}.log",
        *("pretrain", "--corpus_path", str(work / "train.corpus.jsonl"), "--output_dir", str(output)),
        *("--generator_model", GENERATOR, "--compressor", "pointer", "--num_layers", "8"),
        *("--compression_rate", str(RATES[0]), "--doc_max_length", str(DOCUMENT_TOKENS)),
        *("--lora_dropout", "0", "--max_steps", str(recipe.pretraining_steps), "--seed", str(seed)),
        *("--batch_size", "16", "--micro_batch_size", "16", "--eval_fraction", "0.01", *SHARED_FLAGS[2:]),
    )
    return output


def train(work: Path, recipe: Recipe, seed: int, labels: str) -> Path:
    """Pointer and generator on records; what is learned are right answers, or the teacher's."""
    output = work / f"trained-{labels}-{seed}"
    right = ("--gold", str(work / "train.gold.jsonl")) if labels == "right" else ()
    held = ("--gold", str(work / "development.gold.jsonl")) if labels == "right" else ()
    command(
        work / f"train-{seed}.log",
        *("train", "--train_data", str(work / "train.jsonl"), "--eval_data", str(work / "development.jsonl")),
        *(
            *right,
            *held,
            "--output_dir",
            str(output),
            "--pretrained_model",
            str(pretrain(work, recipe, seed)),
        ),
        *("--learning_rate_generator", "5e-4", "--text_fraction", "0.12", "--closed_book_fraction", "0.08"),
        *("--max_steps", str(recipe.steps), "--eval_steps", str(max(1, recipe.steps // 4))),
        *("--micro_batch_size", str(BATCH), "--seed", str(seed), *SHARED_FLAGS),
    )
    seconds = 0.0
    for folder in (work / f"pretrained-{seed}", output):
        result = json.loads((folder / "settings.json").read_text(encoding="utf-8"))["result"]
        seconds += result["steps"] * result["seconds_per_step"]
    print(f"  seed {seed}, {labels} answers: {seconds / 60:.0f} min of training")
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


def evaluate(
    work: Path, model: Path, data: Path, name: str, rate: int, systems: Iterable[str]
) -> list[dict[str, Any]]:
    """The answers of each system to each question."""
    output = work / f"{model.name}-{name}-{rate}x"
    command(
        work / "evaluate.log",
        *("evaluate", "--model", str(model), "--data", str(data), "--output_dir", str(output)),
        *("--gold", str(work / f"{data.name.partition('.')[0]}.gold.jsonl"), "--compression_rate", str(rate)),
        *("--systems", *systems, "--keyword_model", "bundled:splade-tiny"),
        *("--max_new_tokens", str(NEW_TOKENS), "--batch_size", "16", "--dtype", "bfloat16"),
    )
    return records(output / "answers.jsonl")


class Scores(NamedTuple):
    """Of each question."""

    accuracy: np.ndarray
    exact: np.ndarray
    f1: np.ndarray
    words: np.ndarray


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


def report(work: Path, model: Path, data: Path, gold: dict[str, Gold], recipe: Recipe) -> float:
    """Print the table of one student; gives the p-value of 4x above closed-book."""
    asked = records(data)
    right = [gold[record["query_id"]] for record in asked]
    held = [
        any(
            normalized(answer) in normalized(text)
            for answer in own.answers
            if normalized(answer)
            for text in record["documents"]
        )
        for own, record in zip(right, asked, strict=True)
    ]
    judge = Judge([own.answers for own in right], [own.article for own in right], np.array(held))
    print(
        f"  {len(asked)} questions about {len(set(judge.articles))} articles; the documents of {sum(held)} "
        "hold a right answer\n"
        f"  {'':<34} {'accuracy':<22} {'F1':<22} EM     held / not       words"
    )
    p_value = 1.0
    for rate in RATES:
        answers = evaluate(work, model, data, "own", rate, ("compressed", *recipe.systems))
        others = evaluate(work, model, with_others(data, gold), "others", rate, ("compressed",))
        found = {
            name: judge.score([record["answers"][name]["answer"] for record in answers])
            for name in ("compressed", *recipe.systems)
        }
        found["another's documents"] = judge.score(
            [record["answers"]["compressed"]["answer"] for record in others]
        )
        for name, scores in found.items():
            judge.row(f"{rate}x {name}", scores)
        for name in ("closed_book", "another's documents", "uncompressed"):
            value = judge.difference(f"{rate}x compressed - {name}", found["compressed"], found[name])
            if (rate, name) == (RATES[-1], "closed_book"):
                p_value = value
        for what in ("accuracy", "f1"):
            own, text, none = (
                getattr(found[name], what).mean() for name in ("compressed", "uncompressed", "closed_book")
            )
            ratio = (own - none) / (text - none)
            print(f"  {rate}x, {what}: (student - closed-book) / (text - closed-book) {ratio:.2f}")
    return p_value


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--data", nargs="+", help="folders of articles and questions")
    flags.add_argument("--recipe", choices=RECIPES, default="long", help="how much training")
    flags.add_argument(
        "--labels", choices=("right", "teacher"), default="right", help="which answers are learned"
    )
    flags.add_argument("--seeds", type=int, nargs="+", default=[0], help="one student for each")
    flags.add_argument(
        "--split", choices=("development", "test"), default="development", help="what is asked about"
    )
    flags.add_argument("--work_dir", default="learns.work", help="where each step leaves its result")
    options = flags.parse_args()
    recipe = RECIPES["quick" if options.quick else options.recipe]
    names = ("xquad-dev",) if options.quick else ("xquad-dev", "qed-dev", "cmu-dev")
    folders = [Path(name) for name in options.data] if options.data else [SHARED / name for name in names]
    work = Path(options.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    print(machine())
    gold = write_inputs(folders, work, recipe)
    for name in dict.fromkeys(("train", "development", options.split)):
        prepare(work, name)
    p_values = []
    for seed in options.seeds:
        model = train(work, recipe, seed, options.labels)
        p_values.append(report(work, model, work / f"{options.split}.jsonl", gold, recipe))
    worst = max(p_values)
    print(f"learns: p {worst:.4f} that 4x is not above closed-book (bar 0.05)")
    sys.exit(0 if worst < 0.05 or options.quick else 1)


if __name__ == "__main__":
    main()

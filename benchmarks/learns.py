"""Does the student learn? Data by the pipeline from real articles, training, answers about held-out articles.

An article and its questions are on one side: training retrieves from its own articles only. Every step leaves
its result in --work_dir, and the same command goes on from there. --quick does little of each on the smallest
of the data sets.
"""

import json
import subprocess
import sys
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import SHARED, machine, parser
from transformers import set_seed

from scaledown.evaluation.statistics import difference, estimate
from scaledown.metrics import accuracy, f1, normalized
from scaledown.models import quiet_libraries, resolve
from scaledown.student.batch import collate
from scaledown.student.model import ScaleDownModel
from scaledown.student.settings import ScaleDownConfig

TOP = 3
PASSAGE_TOKENS = 64
DOCUMENT_TOKENS = 80  # of the generator's tokenizer, which cuts finer
NEW_TOKENS = 32
GENERATOR = "bundled:smollm2-135m"
SEED = 0
# Few steps of small batches need higher rates than the paper's 1e-4 and 5e-5.
RATES_OF_LEARNING = ("--learning_rate_generator", "1e-3", "--learning_rate_compressor", "4e-4")


class Recipe(NamedTuple):
    """How much of everything."""

    folders: tuple[str, ...]
    questions: int | None
    """On each side; None is all."""
    pretraining_steps: int
    steps: int
    rates: tuple[int, ...]
    """Of compression."""


class Gold(NamedTuple):
    """What is right, and the article that it is about."""

    article: str
    answers: list[str]


FULL = Recipe(("xquad-dev", "qed-dev", "cmu-dev"), None, 320, 120, (16, 4))
QUICK = Recipe(("xquad-dev",), 12, 1, 2, (16,))


def held_out(title: str) -> bool:
    """Whether an article is held out: one of ten, by its title."""
    return blake2b(f"{SEED} {title}".encode(), digest_size=2).digest()[0] % 10 == 0


def write_inputs(work: Path, recipe: Recipe) -> dict[str, Gold]:
    """Corpora and queries of both sides; gives the right answers to each held-out query."""
    gold: dict[str, Gold] = {}
    corpora: dict[str, list[str]] = {"train": [], "held_out": []}
    queries: dict[str, list[str]] = {"train": [], "held_out": []}
    for folder in recipe.folders:
        side: dict[str, str] = {}
        for line in (SHARED / folder / "kilt.jsonl").read_text(encoding="utf-8").splitlines():
            article = json.loads(line)
            name = "held_out" if held_out(article["wikipedia_title"]) else "train"
            side[article["wikipedia_id"]] = name
            corpora["held_out"].append(line)  # is asked about held-out articles, among all others
            if name == "train":
                corpora["train"].append(line)
        for line in (SHARED / folder / "questions.jsonl").read_text(encoding="utf-8").splitlines():
            question = json.loads(line)
            name = side[question["wikipedia_id"]]
            queries[name].append(json.dumps({"id": question["id"], "query": question["question"]}))
            if name == "held_out":
                gold[question["id"]] = Gold(f"{folder}/{question['wikipedia_id']}", question["answers"])
    for name, articles in corpora.items():
        asked = queries[name][: recipe.questions]
        (work / f"{name}.corpus.jsonl").write_text("\n".join(articles) + "\n", encoding="utf-8")
        (work / f"{name}.queries.jsonl").write_text("\n".join(asked) + "\n", encoding="utf-8")
        print(f"  {name}: {len(articles):,} articles, {len(asked):,} questions")
    return gold


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
    output = work / f"{name}.jsonl"
    command(
        work / "prepare.log",
        *("prepare", "--corpus_path", str(work / f"{name}.corpus.jsonl")),
        *("--queries_file", str(work / f"{name}.queries.jsonl"), "--retriever_model", "bundled:splade-tiny"),
        *("--passage_tokens", str(PASSAGE_TOKENS), "--top_k_retrieval", str(TOP)),
        *("--teacher_model", GENERATOR, "--teacher_batch_size", "16"),  # by OpenVINO where that is at hand
        *("--max_new_tokens", str(NEW_TOKENS), "--columns", "query_id", "--output_file", str(output)),
    )
    return output


def train(work: Path, rate: int, data: Path, held: Path, recipe: Recipe) -> Path:
    """Pretrain on the training articles, then train; gives the model's folder."""
    log = work / f"train-{rate}x.log"
    shared = ("--batch_size", "8", "--dtype", "bfloat16", "--seed", str(SEED), "--resume", *RATES_OF_LEARNING)
    first, second = work / f"pretrained-{rate}x", work / f"trained-{rate}x"
    command(
        log,
        *("pretrain", "--corpus_path", str(work / "train.corpus.jsonl"), "--output_dir", str(first)),
        *("--generator_model", GENERATOR, "--num_layers", "8", "--compression_rate", str(rate)),
        *(
            "--doc_max_length",
            str(DOCUMENT_TOKENS),
            "--lora_dropout",
            "0",
            "--max_steps",
            str(recipe.pretraining_steps),
            *shared,
        ),
    )
    command(
        log,
        *("train", "--train_data", str(data), "--eval_data", str(held), "--output_dir", str(second)),
        *("--pretrained_model", str(first), "--max_steps", str(recipe.steps)),
        *("--eval_steps", str(recipe.steps), "--save_steps", str(max(1, recipe.steps // 4)), *shared),
    )
    seconds = 0.0
    for folder in (first, second):
        result = json.loads((folder / "settings.json").read_text(encoding="utf-8"))["result"]
        seconds += result["steps"] * result["seconds_per_step"]
    print(f"  {rate}x: {seconds / 60:.0f} min of training")
    return second


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Measured(NamedTuple):
    """Accuracy and F1 of each question."""

    accuracy: np.ndarray
    f1: np.ndarray


class Judge(NamedTuple):
    """Scores answers; yes/no questions apart, since "yes" and "no" are in many an answer by chance."""

    gold: list[list[str]]
    articles: list[str]
    is_open: np.ndarray
    """Which questions do not ask for yes or no."""

    def report(self, name: str, answers: list[str]) -> Measured:
        """Print a row of the table, intervals by article: questions about one article are alike."""
        found = Measured(
            *(
                np.array([measure(*pair) for pair in zip(answers, self.gold, strict=True)])
                for measure in (accuracy, f1)
            )
        )
        cells = [str(estimate(*self.asked(values), seed=SEED)) for values in found]
        yes_no = found.accuracy[~self.is_open]
        cells.append(f"{yes_no.mean():.3f}" if len(yes_no) else "none")
        print(f"  {name:<40} {'   '.join(cells)}", flush=True)
        return found

    def asked(self, values: np.ndarray) -> tuple[list[float], list[str]]:
        """Values of the open questions, and their articles."""
        articles = [name for name, own in zip(self.articles, self.is_open, strict=True) if own]
        return values[self.is_open].tolist(), articles

    def difference(self, name: str, one: Measured, other: Measured) -> None:
        """Print a paired difference with its interval."""
        for measure, left, right in zip(("accuracy", "F1"), one, other, strict=True):
            values, articles = self.asked(left)
            print(f"  {name}, {measure}: {difference(values, self.asked(right)[0], articles, seed=SEED)}")


def loss(
    model: ScaleDownModel, asked: list[dict[str, Any]], shift: int = 0, reads: str = "compressed"
) -> float:
    """Of the teacher's answers, nats a token; with a shift each question has another one's documents.

    The generator reads them `compressed`, their `text`, or `none`.
    """
    total = tokens = 0.0
    with torch.no_grad():
        for number, record in enumerate(asked):
            documents = asked[(number + shift) % len(asked)]["documents"]
            encoded = model.reader.encode(record["query"], documents, record["answer"])
            if reads != "compressed":
                text = model.reader.encode_text(
                    record["query"], documents if reads == "text" else [], NEW_TOKENS
                )
                encoded = text._replace(answer_ids=encoded.answer_ids)
            found = model(**collate([encoded])).answer_loss
            total += float(found) * len(encoded.answer_ids)
            tokens += len(encoded.answer_ids)
    return total / tokens


def load(folder: Path | None, rate: int) -> ScaleDownModel:
    """A trained model, or the untrained one that training began with."""
    if folder is not None:
        return ScaleDownModel.from_pretrained(str(folder), dtype=torch.bfloat16).eval()
    set_seed(SEED)
    settings = ScaleDownConfig(num_layers=8, compression_rate=rate, doc_max_length=DOCUMENT_TOKENS)
    return ScaleDownModel.build(settings, resolve(GENERATOR), dtype=torch.bfloat16).eval()


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--work_dir", default="learns.work", help="where each step leaves its result")
    options = flags.parse_args()
    recipe = QUICK if options.quick else FULL
    work = Path(options.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    quiet_libraries()
    print(machine())
    gold = write_inputs(work, recipe)
    data, held = prepare(work, "train"), prepare(work, "held_out")
    trained = {rate: train(work, rate, data, held, recipe) for rate in recipe.rates}
    asked = records(held)
    queries = [record["query"] for record in asked]
    documents = [record["documents"] for record in asked]
    others = documents[len(asked) // 2 :] + documents[: len(asked) // 2]  # about other articles
    right = [gold[record["query_id"]] for record in asked]
    is_open = np.array([not {"yes", "no"} & {normalized(one) for one in own.answers} for own in right])
    judge = Judge([own.answers for own in right], [own.article for own in right], is_open)

    def answers(model: ScaleDownModel, given: list[list[str]], *, compressed: bool = True) -> list[str]:
        return model.answer(queries, given, max_new_tokens=NEW_TOKENS, batch_size=16, compressed=compressed)

    print(
        f"  {is_open.sum()} open and {(~is_open).sum()} yes/no questions about held-out articles\n"
        f"  {'':<40} {'accuracy':<22} {'F1':<22} yes/no"
    )
    judge.report("always yes and no", ["yes no"] * len(asked))
    base = load(None, recipe.rates[0])
    text = judge.report("generator, text of the documents", answers(base, documents, compressed=False))
    judge.report("generator, no documents", answers(base, [[] for _ in asked]))
    some = asked[::3]
    read, closed = loss(base, some, reads="text"), loss(base, some, reads="none")
    print(f"  generator: loss with the text {read:.3f}, without documents {closed:.3f}")
    for rate, folder in trained.items():
        judge.report(f"{rate}x, before training", answers(load(None, rate), documents))
        judge.report(f"{rate}x, pretrained", answers(load(work / f"pretrained-{rate}x", rate), documents))
        after = load(folder, rate)
        found = judge.report(f"{rate}x, trained", answers(after, documents))
        control = judge.report(f"{rate}x, trained, another's documents", answers(after, others))
        judge.report(f"{rate}x, trained, no documents", answers(after, [[] for _ in asked]))
        judge.difference(f"{rate}x: its own documents - another's", found, control)
        judge.difference(f"{rate}x: compressed - text", found, text)
        for name, model in (("pretrained", load(work / f"pretrained-{rate}x", rate)), ("trained", after)):
            own, other = loss(model, some), loss(model, some, len(some) // 2)
            print(f"  {rate}x, {name}: loss with its own documents {own:.3f}, with another's {other:.3f}")
    print("learns: reported (no bar)")


if __name__ == "__main__":
    main()

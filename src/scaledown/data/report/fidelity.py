"""Comparison of a run's settings with the paper's, and the licences of its models and data."""

import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from scaledown.data.prompts import TEMPLATES
from scaledown.data.reranker.api import LIKELIHOOD_PREFIX
from scaledown.models.sources import BUNDLES


class Setting(NamedTuple):
    """A line of the comparison."""

    name: str
    """The setting."""
    paper: str
    """Its value in the paper."""
    here: str
    """Its value in the run."""
    same: bool | None
    """Whether the two are equal; None if they cannot be compared."""


class Licence(NamedTuple):
    """The permitted uses of a model or corpus, by its licence."""

    part: str
    """Its role in the run."""
    name: str
    """Its name, without folders of this machine."""
    revision: str
    """Its revision or hash, shortened."""
    licence: str
    """The name of the licence, or `UNKNOWN`."""
    allows: str
    """What the licence allows, in a few words."""


# OSCAR, arXiv 2504.07109, sections 3 and 4.
def fidelity(manifest: Mapping[str, Any]) -> list[Setting]:
    """Compare every setting of the paper's data with those of a run.

    Args:
        manifest: The manifest of the run.
    """
    used = manifest["parameters"]
    stages = manifest.get("stages") or {}
    count = {name: (stage.get("counts") or {}) for name, stage in stages.items()}
    reranks = bool(used.get("enable_reranking") or used.get("top_k_reranking"))
    documents = _documents(used, reranks=reranks)
    queries = count.get("queries", {}).get("queries", 0)
    corpus = _corpus(used)
    temperature = float(used.get("temperature") or 0)
    passages = f"{used.get('passage_tokens')} tokens of the retriever"
    if used.get("passages") != "tokens":
        passages = f"{used.get('passages')}s, of at most {passages}"
    articles = count.get("passages", {}).get("articles", 0)
    prompt = str(used.get("prompt") or "paper")
    return [
        _setting("queries", "893,000", f"{queries:,}", same=queries == 893_000),
        Setting("sources of the queries", "393k of PISCO's, 500k of MS MARCO", _sources(used), None),
        Setting("corpus", "Wikipedia-KILT, 5,903,530 articles", f"{corpus}, {articles:,} articles", None),
        _setting("passages", "128 tokens", passages, same=passages.startswith("128 ")),
        _compared_setting("retriever", "naver/splade-v3", used.get("retriever_model")),
        _compared_setting(
            "reranker",
            "naver/trecdl22-crossencoder-debertav3",
            used.get("reranker_model") if reranks else "none",
        ),
        _compared_setting("teacher", "mistralai/Mistral-7B-Instruct-v0.2", used.get("teacher_model")),
        _setting("weights of the teacher", "16 bits", _bits(used), same=None),
        _setting("documents to a query", "5", str(documents), same=documents == 5),
        _setting(
            "longest answer",
            "128 tokens",
            f"{used.get('max_new_tokens')} tokens",
            same=used.get("max_new_tokens") == 128,
        ),
        _setting(
            "prompt",
            "figure 14",
            without_folders(prompt),
            same=prompt == "paper" if prompt in TEMPLATES else None,
        ),
        Setting("passages retrieved", "not stated", str(used.get("top_k_retrieval")), None),
        _setting(
            "decoding", "not stated", f"temperature {temperature:g}" if temperature else "greedy", same=None
        ),
        _setting(
            "reranking scores kept",
            "yes, the student learns them",
            "yes" if used.get("enable_reranking") else "no",
            same=bool(used.get("enable_reranking")),
        ),
        *(_ours(used)),
        *(Setting(name, paper, "when training: see docs/student.md", None) for name, paper in _TRAINING),
    ]


# Table 7. These are the defaults of scaledown train.
_TRAINING: Final = (
    ("compressor", "first 5, 8 or 10 layers of the generator, or an encoder with a mapping"),
    ("compression rate", "16, 8 embeddings to a document; 128"),
    ("generator", "LoRA on all linear layers, r 16, alpha 32, dropout 0.1"),
    ("batch and epochs", "128, one epoch"),
    ("learning rates", "1e-4; 5e-5 of the first layers"),
    ("optimizer", "AdamW, decay 0.1, linear, warm-up 0.05, gradient norm 1"),
    ("loss", "cross-entropy + 0.05 of squared differences of scores"),
)


def _ours(used: Mapping[str, Any]) -> list[Setting]:
    """Return the settings of this run for things that the paper does not do."""
    said = {
        "bad_answers": "bad answers",
        "truncated_answers": "truncated answers",
        "min_groundedness": "least groundedness",
        "second_teacher_model": "second teacher",
        "decontaminate": "decontaminated",
        "deduplicate": "repeated queries left out",
    }
    found = []
    for name, what in said.items():
        value = used.get(name)
        if value and value != "keep":
            names = value if isinstance(value, list | tuple) else [value]
            found.append(
                Setting(what, "not stated", ", ".join(without_folders(str(one)) for one in names), None)
            )
    return found


def _setting(name: str, paper: str, here: str, *, same: bool | None) -> Setting:
    return Setting(name, paper, here, same)


def _compared_setting(name: str, paper: str, here: Any) -> Setting:
    return Setting(name, paper, without_folders(str(here)), str(here).partition("@")[0] == paper)


def without_folders(name: str) -> str:
    """Return a name without this machine's folders, which are private."""
    prefix, path = (
        (LIKELIHOOD_PREFIX, name.removeprefix(LIKELIHOOD_PREFIX))
        if name.startswith(LIKELIHOOD_PREFIX)
        else ("", name)
    )
    is_local = path.startswith(("/", "~", ".")) or Path(path).expanduser().exists()
    return prefix + (Path(path).name if is_local else path)


def _documents(used: Mapping[str, Any], *, reranks: bool) -> int:
    top = int(used.get("top_k_retrieval") or 0)
    return int(used.get("top_k_reranking") or min(5, top)) if reranks else top


def _sources(used: Mapping[str, Any]) -> str:
    names = [Path(str(name)).name for name in used.get("queries_file") or ()]
    names += ["MS MARCO dev"] if used.get("download_ms_marco") else []
    names += [without_folders(str(used["query_dataset"]))] if used.get("query_dataset") else []
    names += ["written by the teacher"] if used.get("num_synthetic_queries") else []
    return ", ".join(names)


def _bits(used: Mapping[str, Any]) -> str:
    if used.get("teacher_8bit") or used.get("teacher_4bit"):
        return "8 bits" if used.get("teacher_8bit") else "4 bits"
    return f"dtype {used.get('dtype', 'auto')}"


# By their cards on the hub, as of 2026-11-23. A card in the local cache takes precedence.
_LICENSES: Final = {
    "naver/splade-v3": "cc-by-nc-sa-4.0",
    "naver/splade-cocondenser-ensembledistil": "cc-by-nc-sa-4.0",
    "naver/trecdl22-crossencoder-debertav3": "cc-by-nc-sa-4.0",
    "mistralai/Mistral-7B-Instruct-v0.2": "apache-2.0",
    "cross-encoder/ms-marco-MiniLM-L-6-v2": "apache-2.0",
}
_KNOWN_QUERIES: Final = {
    "ms_marco": "non-commercial research (its terms)",
    "natural_questions": "cc-by-sa-3.0",
    "nq_open": "cc-by-sa-3.0",
    "squad": "cc-by-sa-4.0",
}
_ALLOWS: Final = (
    (re.compile(r"-nd\b", re.I), "nothing made of it may be shared; read it"),
    (
        re.compile(r"nc-sa", re.I),
        "no commercial use; attribution, and what is made of it under the same licence",
    ),
    (re.compile(r"-nc\b|non-?commercial", re.I), "no commercial use; attribution"),
    (re.compile(r"cc-by-sa", re.I), "any use; attribution, and what is made of it under the same licence"),
    (re.compile(r"cc-by", re.I), "any use; attribution"),
    (re.compile(r"apache|^mit$|bsd", re.I), "any use; keep the notices"),
    (re.compile(r"llama|gemma", re.I), "by its own terms: read them"),
)
UNKNOWN: Final = "not known"


def _corpus(used: Mapping[str, Any]) -> str:
    """Return the name of a run's corpus; before 0.7 a run had only one path."""
    given = used.get("corpus_path") or "the sample corpus"
    return ", ".join(Path(str(one)).name for one in ([given] if isinstance(given, str) else given))


def licences(manifest: Mapping[str, Any]) -> list[Licence]:
    """Return each model of a run and its corpus, with revision and licence."""
    used = manifest["parameters"]
    found = []
    for part, identity in (manifest.get("models") or {}).items():
        name = str(used.get(f"{part}_model") or used.get(f"teacher_{part}") or part)
        licence = licence_of(name.removeprefix(LIKELIHOOD_PREFIX))
        shown = without_folders(name)
        found.append(
            Licence(part.replace("_", " "), shown, _short_identity(str(identity)), licence, allows(licence))
        )
    for name in [*(["ms_marco"] if used.get("download_ms_marco") else []), used.get("query_dataset")]:
        if name:
            licence = _KNOWN_QUERIES.get(str(name), UNKNOWN)
            found.append(Licence("queries", without_folders(str(name)), "", licence, allows(licence)))
    corpus = (manifest.get("inputs") or {}).get("corpus")
    name = _corpus(used)
    licence = UNKNOWN if used.get("corpus_path") else "Apache-2.0"
    allowed = "the data contains its passages, so its licence applies to them (Wikipedia: cc-by-sa)"
    return [*found, Licence("corpus", name, _short_identity(str(corpus)), licence, allowed)]


def licence_of(model: str) -> str:
    """Find a model's licence: by its wheel, its card in the local cache or folder, or the list above.

    Args:
        model: The name, as in `--retriever_model`. Nothing is downloaded.

    Returns:
        The name of the licence, or `UNKNOWN`.
    """
    name, _, revision = model.partition("@")
    if name.startswith("bundled:") and (bundle := BUNDLES.get(name.removeprefix("bundled:"))):
        try:
            metadata = importlib.metadata.metadata(bundle.distribution).json
        except importlib.metadata.PackageNotFoundError:
            return UNKNOWN
        return str(metadata.get("license_expression") or metadata.get("license") or UNKNOWN)
    card = Path(name).expanduser() / "README.md"
    if not card.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(name, "README.md", revision=revision or None)
        except HFValidationError:
            return UNKNOWN
        card = Path(cached) if isinstance(cached, str) else card
    text = card.read_text(encoding="utf-8", errors="replace")[:10_000] if card.is_file() else ""
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:\s*(?:\n\s*-\s*)?['\"]?([\w.+-]+)", head[1], re.MULTILINE) if head else None
    return found[1] if found else _LICENSES.get(name, UNKNOWN)


def allows(licence: str) -> str:
    """Return in a few words what a licence allows: a reminder to read it, not advice."""
    return next((use for pattern, use in _ALLOWS if pattern.search(licence)), "read its card")


def _short_identity(identity: str) -> str:
    kind, _, rest = identity.partition(":")
    return f"{kind}:{rest[:12]}" if len(rest) > 12 else identity[:20]

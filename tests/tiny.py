"""Tiny random models in the layouts of real ones, and a hub cache with them."""

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
)

EXAMPLES = Path(__file__).parents[1] / "examples"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like Mistral's: writes BOS itself and refuses a system turn.
INST = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %}{{ m['content'] }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)


def _corpus() -> Iterator[str]:
    for line in (EXAMPLES / "corpus.jsonl").read_text(encoding="utf-8").splitlines():
        yield from json.loads(line)["text"]


def word_pieces(folder: Path) -> PreTrainedTokenizerFast:
    """A BERT-like tokenizer: characters, their continuations, and the most frequent words.

    WordPieceTrainer learns another vocabulary each time, and then a random model finds other passages.
    """
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    counts = Counter(
        word for text in _corpus() for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
    )
    letters = sorted({letter for word in counts for letter in word})
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *(f"##{one}" for one in letters),
        *words,
    ]
    vocabulary = {piece: number for number, piece in enumerate(pieces[:900])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=512,
    )
    fast.save_pretrained(folder)
    return fast


def bytes_pairs(folder: Path, chat_template: str | None, **keywords: object) -> PreTrainedTokenizerFast:
    """A GPT-like tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        _corpus(),
        trainers.BpeTrainer(
            vocab_size=800,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=10**9, **keywords
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return fast


def _bert() -> BertConfig:
    return BertConfig(
        vocab_size=900,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=512,
        num_labels=1,
        initializer_range=0.3,
    )


def splade(folder: Path) -> Path:
    torch.manual_seed(1)
    word_pieces(folder)
    BertForMaskedLM(_bert()).save_pretrained(folder)
    return folder


def dense(folder: Path) -> Path:
    """A bi-encoder as sentence-transformers saves it."""
    from sentence_transformers import SentenceTransformer

    torch.manual_seed(2)
    with tempfile.TemporaryDirectory() as bare:
        word_pieces(Path(bare))
        BertModel(_bert()).save_pretrained(bare)
        SentenceTransformer(bare, device="cpu").save(str(folder))
    return folder


def cross_encoder(folder: Path) -> Path:
    torch.manual_seed(3)
    word_pieces(folder)
    BertForSequenceClassification(_bert()).save_pretrained(folder)
    return folder


def causal_lm(
    folder: Path,
    chat_template: str | None = CHATML,
    positions: int = 4096,
    *,
    tied: bool = False,
    width: int = 32,
) -> Path:
    torch.manual_seed(4)
    tokenizer = bytes_pairs(folder, chat_template)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def phi(folder: Path) -> Path:
    """A base model without a chat template."""
    torch.manual_seed(5)
    tokenizer = bytes_pairs(folder, None)
    config = PhiConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
    )
    PhiForCausalLM(config).save_pretrained(folder)
    return folder


def modernbert(folder: Path) -> Path:
    torch.manual_seed(6)
    word_pieces(folder)
    config = ModernBertConfig(
        vocab_size=900,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        local_attention=32,
        pad_token_id=0,
        bos_token_id=2,
        cls_token_id=2,
        eos_token_id=3,
        sep_token_id=3,
        initializer_range=0.3,
    )
    ModernBertModel(config).save_pretrained(folder)
    return folder


def instruct(folder: Path) -> Path:
    return causal_lm(folder, INST)


HUB: dict[str, Callable[[Path], Path]] = {
    "naver/splade-cocondenser-ensembledistil": splade,
    "naver/splade-v3": splade,
    "cross-encoder/ms-marco-MiniLM-L-6-v2": cross_encoder,
    "cross-encoder/ms-marco-deberta-v3-base": cross_encoder,
    "cross-encoder/ms-marco-deberta-v3-large": cross_encoder,
    "naver/trecdl22-crossencoder-debertav3": cross_encoder,
    "sentence-transformers/all-MiniLM-L6-v2": dense,
    "HuggingFaceTB/SmolLM2-135M-Instruct": causal_lm,
    "mistralai/Mistral-7B-Instruct-v0.2": instruct,
    "meta-llama/Meta-Llama-3-8B-Instruct": causal_lm,
    "microsoft/phi-2": phi,
    "answerdotai/ModernBERT-base": modernbert,
}


def fill_hub_cache(cache: Path) -> None:
    """Put a tiny model under each name that the guide and the presets use."""
    made: dict[Callable[[Path], Path], Path] = {}
    for name, make in HUB.items():
        repository = cache / ("models--" + name.replace("/", "--"))
        snapshot = repository / "snapshots" / COMMIT
        if make in made:
            shutil.copytree(made[make], snapshot)
        else:
            snapshot.mkdir(parents=True)
            made[make] = make(snapshot)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)


def pointer_student(generator: Path) -> Any:
    """A pointer student with random weights that are large enough to pick tokens."""
    from scaledown.models.sources import resolve
    from scaledown.student.model import ScaleDownModel
    from scaledown.student.settings import ScaleDownConfig

    torch.manual_seed(0)
    settings = ScaleDownConfig(compressor="pointer", num_layers=1, doc_max_length=48, query_max_length=32)
    made = ScaleDownModel.build(settings, resolve(str(generator)))
    for parameter in made.pointer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()

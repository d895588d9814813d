"""The model against plain references, on tiny random weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
)

import tiny
from scaledown.errors import ModelError, UsageError
from scaledown.models.sources import resolve
from scaledown.student.batch import Batch, Encoded, EncodedDocument, collate, group
from scaledown.student.compressors import layers
from scaledown.student.model import ScaleDownModel, load_tokenizer
from scaledown.student.settings import ScaleDownConfig

KINDS = ("n_layers", "bert", "modernbert", "decoder")
EXAMPLES = [
    ("What causes tides?", ["Tides come and go twice a day.", "The moon causes the tides."], "the moon"),
    ("Why?", ["No."], "It is so because nobody changed it."),
    (
        "Who wrote the book about the tower?",
        ["A tower of iron is 300 metres tall and was painted many times over the years.", "A book.", "Wind"],
        "nobody",
    ),
]
SCORES = [[0.5, 3.0], [-1.0], [2.0, 0.25, -4.0]]


@pytest.fixture
def folders(models: dict[str, Path]) -> dict[str, Path]:
    """A separate compressor of each kind."""
    return {"bert": models["splade"], "modernbert": models["modernbert"], "decoder": models["phi"]}


@pytest.fixture
def build(models: dict[str, Path], folders: dict[str, Path]) -> Any:
    """Make a student with a compressor of some kind."""

    def build(
        kind: str = "n_layers", generator: Path = models["causal_lm"], **settings: Any
    ) -> ScaleDownModel:
        torch.manual_seed(0)
        name = str(folders.get(kind, kind))
        small = {"num_layers": 1, "doc_max_length": 32, "query_max_length": 32, "compression_rate": 8}
        config = ScaleDownConfig(compressor=name, **{**small, "mapping_width": 64, **settings})
        source = resolve(name) if kind in folders else None
        return ScaleDownModel.build(config, resolve(str(generator)), source)

    return build


def encoded(model: ScaleDownModel, *, scores: bool = False) -> list[Encoded]:
    return [
        model.reader.encode(*example, known if scores else None)
        for example, known in zip(EXAMPLES, SCORES, strict=True)
    ]


def batch_of(model: ScaleDownModel, *, scores: bool = False) -> Batch:
    return collate(encoded(model, scores=scores))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def awaken(model: ScaleDownModel) -> ScaleDownModel:
    """Give LoRA an effect, which it begins without."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model


def test_n_layers_equal_the_generators_own(build: Any, models: dict[str, Path]) -> None:
    model = build()
    generator = AutoModelForCausalLM.from_pretrained(models["causal_lm"])
    (read,) = model.reader.read("Why?", ["The moon causes the tides."])
    embedded = generator.get_input_embeddings()(torch.tensor([read.ids]))
    embedded = torch.cat([embedded, model.memory[None]], 1)
    states = generator(inputs_embeds=embedded, output_hidden_states=True).hidden_states[1]
    embeddings = model.compress("Why?", ["The moon causes the tides."])
    torch.testing.assert_close(embeddings[0], states[0, len(read.ids) :], rtol=0, atol=0)


def test_all_layers_end_before_the_final_norm(build: Any, models: dict[str, Path]) -> None:
    model = build(num_layers=2)
    generator = AutoModelForCausalLM.from_pretrained(models["causal_lm"])
    (read,) = model.reader.read("Why?", ["Tides."])
    embedded = torch.cat([generator.get_input_embeddings()(torch.tensor([read.ids])), model.memory[None]], 1)
    states = generator.model(inputs_embeds=embedded).last_hidden_state
    normed = generator.model.norm(model.compress("Why?", ["Tides."])[0])
    torch.testing.assert_close(normed, states[0, len(read.ids) :], rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_never_reaches_a_memory_token(build: Any, kind: str) -> None:
    model = build(kind, enable_reranking=True).eval()
    batch = batch_of(model)
    groups = batch["groups"]
    assert any((part["ids"].shape[1] > part["lengths"]).any() for part in groups)
    embeddings, counts, scores, *_ = model.compress_ids(groups)
    for part in groups:
        padding = torch.arange(part["ids"].shape[1]) >= part["lengths"][:, None]
        part["ids"][padding] = 17
    again, _, scores_again, *_ = model.compress_ids(groups)
    assert torch.equal(embeddings, again)
    assert torch.equal(scores, scores_again)
    # And a document alone, without padding, gives the same.
    documents = [document for example in encoded(model) for document in example.documents]
    apart = torch.split(embeddings, counts)
    for place, document in enumerate(documents):
        alone = model.compress_ids(group([document]))
        torch.testing.assert_close(alone.embeddings, apart[place], rtol=1e-5, atol=1e-5)


def slow_states(model: ScaleDownModel, document: EncodedDocument) -> torch.Tensor:
    """States of memory and reranking tokens of one document."""
    embedded = model.compressor.get_input_embeddings()(torch.tensor(document.ids))
    embedded = torch.cat([embedded, model.memory, model.rerank_token[None]])
    return model.compressor(inputs_embeds=embedded[None]).last_hidden_state[0, len(document.ids) :]


def slow_loss(model: ScaleDownModel, examples: list[Encoded]) -> torch.Tensor:
    """The paper's loss, one example and one document at a time, without padding."""
    negative, tokens, squares = torch.zeros(()), 0, torch.zeros(())
    words = model.generator.get_input_embeddings()
    for example in examples:
        prompt = [words(torch.tensor(example.prompt_parts[0]))]
        for number, document in enumerate(example.documents):
            states = slow_states(model, document)
            memory = states[:-1]
            if model.config.compressor_name is not None:
                first, _, second = model.mapping
                memory = second(first(memory).clamp(min=0))
            prompt += [memory, words(torch.tensor(example.prompt_parts[number + 1]))]
            score = (states[-1] * model.score.weight[0]).sum() + model.score.bias[0]
            squares = squares + (score - example.scores[number]) ** 2
        answer = torch.tensor(example.answer_ids)
        sequence = torch.cat([*prompt, words(answer)])
        logits = model.generator(inputs_embeds=sequence[None]).logits[0]
        before = logits[len(sequence) - len(answer) - 1 : -1]
        negative = negative - before.log_softmax(-1)[torch.arange(len(answer)), answer].sum()
        tokens += len(answer)
    return negative / tokens + 0.05 * squares / len(examples)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", ["lora", "full"])
def test_loss_and_gradients_match_a_slow_reference(build: Any, kind: str, training: str) -> None:
    model = awaken(build(kind, enable_reranking=True, generator_training=training)).eval()
    examples = encoded(model, scores=True)
    expected = slow_loss(model, examples)
    expected.backward()
    slow = gradients(model)
    output = model(**collate(examples))
    output.loss.backward()
    fast = gradients(model)
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-5)
    assert fast.keys() == slow.keys()
    for name, gradient in slow.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(fast[name], gradient, rtol=1e-4, atol=1e-5 + 1e-4 * scale, msg=name)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert fast.keys() == trained, "a parameter without a gradient stops distributed training"


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_one_equals_a_batch_of_many(build: Any, kind: str) -> None:
    model = awaken(build(kind, enable_reranking=True)).eval()
    examples = encoded(model, scores=True)
    many = model(**collate(examples))
    ones = [model(**collate([example])) for example in examples]
    tokens = torch.tensor([float(len(example.answer_ids)) for example in examples])
    answer_losses = torch.stack([one.answer_loss for one in ones])
    expected = (answer_losses * tokens).sum() / tokens.sum()
    torch.testing.assert_close(many.answer_loss, expected, rtol=1e-5, atol=1e-5)
    rerank_losses = torch.stack([one.rerank_loss for one in ones])
    torch.testing.assert_close(many.rerank_loss, rerank_losses.mean(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reranking_loss_leaves_the_generator_alone(build: Any, kind: str) -> None:
    model = awaken(build(kind, enable_reranking=True, generator_training="full")).eval()
    model(**batch_of(model, scores=True)).rerank_loss.backward()
    moved = {name for name, gradient in gradients(model).items() if gradient.any()}
    parts = {name.partition(".")[0] for name in moved}
    # The reranking token stands behind the memory tokens and reads them; what they become it leaves alone.
    assert parts == {"compressor", "memory", "rerank_token", "score"}
    model(**batch_of(model, scores=True)).answer_loss.backward()
    moved = {name for name, gradient in gradients(model).items() if gradient.any()}
    assert not {"score.weight", "score.bias"} & moved
    assert ("rerank_token" in moved) == (kind in {"bert", "modernbert"})  # whose attention looks ahead


def test_examples_without_scores_leave_the_head_alone(build: Any) -> None:
    model = build(enable_reranking=True).eval()
    with_scores, without = encoded(model, scores=True)[0], encoded(model)[1]
    output = model(**collate([with_scores, without]))
    alone = model(**collate([with_scores]))
    torch.testing.assert_close(output.rerank_loss * 2, alone.rerank_loss)
    output.loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.parametrize("kind", ["n_layers", "pointer"])
def test_a_document_stands_in_for_a_process_without_any(build: Any, kind: str) -> None:
    """Other processes wait for its passes and gradients; loss and gradients are those without it."""
    model = build(kind, generator_training="full", enable_reranking=kind == "n_layers")
    texts = [
        model.reader.encode_text("What is iron?", shown, 8)._replace(
            answer_ids=model.reader.answer_ids("A metal")
        )
        for shown in (["Iron is a metal."], [])
    ]
    expected = model(**collate(texts))
    expected.loss.backward()
    without = gradients(model)
    found = model(**collate(texts, one_group=True))
    found.loss.backward()
    torch.testing.assert_close(found.loss, expected.loss)
    own = gradients(model)
    assert without.keys() < own.keys()
    assert own.keys() == {name for name, one in model.named_parameters() if one.requires_grad}
    for name, value in own.items():
        torch.testing.assert_close(value, without.get(name, torch.zeros_like(value)))


@pytest.mark.parametrize("kind", ["n_layers", "bert", "pointer"])
def test_one_group_has_the_losses_of_several(build: Any, kind: str) -> None:
    model = build(kind)
    examples = encoded(model)
    several, one = collate(examples), collate(examples, one_group=True)
    assert len(one["groups"]) == 1
    torch.testing.assert_close(model(**one).loss, model(**several).loss)


@pytest.mark.parametrize("kind", ["n_layers", "bert"])
def test_trained_weights_by_generator_training(build: Any, kind: str) -> None:
    for training in ("lora", "full", "frozen"):
        model = build(kind, generator_training=training)
        for name, parameter in model.named_parameters():
            in_generator = name.startswith("generator.")
            wanted = not in_generator or training == "full" or (training == "lora" and "lora_" in name)
            assert parameter.requires_grad == wanted, name
    lora = {n.partition(".lora_A")[0].rpartition(".")[2] for n in build(kind).state_dict() if ".lora_A" in n}
    assert lora == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", ["lora", "full"])
def test_a_reloaded_checkpoint_answers_the_same(build: Any, kind: str, training: str, tmp_path: Path) -> None:
    model = awaken(build(kind, enable_reranking=True, generator_training=training)).eval()
    for parameter in model.parameters():  # as far from the start as training leads
        parameter.data += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "saved")
    again = ScaleDownModel.from_pretrained(tmp_path / "saved")
    assert not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    queries, documents, _ = (list(column) for column in zip(*EXAMPLES, strict=True))
    first = model.answer(queries, documents, max_new_tokens=16)
    assert again.answer(queries, documents, max_new_tokens=16) == first
    assert again.rerank(queries, documents) == model.rerank(queries, documents)
    assert type(AutoModel.from_pretrained(tmp_path / "saved")) is ScaleDownModel
    trained = [p.requires_grad for p in model.parameters()]
    assert [p.requires_grad for p in again.parameters()] == trained  # it can be trained on
    again.save_pretrained(tmp_path / "twice")
    for file in (tmp_path / "saved").rglob("*"):
        if file.is_file():
            assert (
                tmp_path / "twice" / file.relative_to(tmp_path / "saved")
            ).read_bytes() == file.read_bytes()


def test_a_folder_holds_everything(build: Any, tmp_path: Path) -> None:
    build("bert", enable_reranking=True).save_pretrained(tmp_path)
    names = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert names == {
        "README.md",
        "chat_template.jinja",
        "compressor/tokenizer.json",
        "compressor/tokenizer_config.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: scaledown\n")
    assert "model.rerank(query, documents)" in card
    assert "| compression rate | 8 |" in card


@pytest.mark.parametrize("training", ["lora", "full"])
def test_tied_weights_stay_tied(build: Any, training: str, tmp_path: Path) -> None:
    model = build(generator=tiny.causal_lm(tmp_path / "tied", tied=True), generator_training=training)
    model.save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        assert "generator.lm_head.weight" not in file.keys()  # noqa: SIM118 (no mapping)
    again = ScaleDownModel.from_pretrained(tmp_path / "saved")
    assert again.generator.lm_head.weight is again.generator.model.embed_tokens.weight
    assert again.answer("Why?", ["No."], max_new_tokens=8) == model.answer("Why?", ["No."], max_new_tokens=8)


def overfit(model: ScaleDownModel, examples: list[Any], steps: int) -> Iterator[float]:
    batch = collate([model.reader.encode(*example) for example in examples])
    model.eval()  # no dropout: nothing but learning by heart is wanted
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


@pytest.mark.parametrize(
    ("kind", "training"),
    [
        ("n_layers", "full"),
        ("bert", "full"),
        ("modernbert", "full"),
        ("decoder", "full"),
        ("n_layers", "lora"),
    ],
)
def test_tiny_model_memorises_eight_examples(build: Any, kind: str, training: str) -> None:
    """From the documents alone: all ask the same."""
    model = build(kind, compression_rate=4, generator_training=training)
    colours = ["red", "blue", "green", "gold", "black", "white", "pink", "grey"]
    query = "What is the colour of the house?"
    documents = [[f"The house is {colour}.", "The tower was old."] for colour in colours]
    examples = [(query, own, colour) for own, colour in zip(documents, colours, strict=True)]
    losses = list(overfit(model, examples, 200))
    assert losses[-1] < 0.1 * losses[0]
    assert model.answer([query] * 8, documents, max_new_tokens=8) == colours


def test_merged_lora_answers_the_same(build: Any, tmp_path: Path) -> None:
    model = awaken(build()).eval()
    asked = [example[0] for example in EXAMPLES], [example[1] for example in EXAMPLES]
    expected = model.answer(*asked, max_new_tokens=12)
    model.merge_lora()
    assert not any("lora" in name for name in model.state_dict())
    assert model.answer(*asked, max_new_tokens=12) == expected
    model.save_pretrained(tmp_path)
    assert ScaleDownModel.from_pretrained(tmp_path).answer(*asked, max_new_tokens=12) == expected


def test_gradient_checkpointing_changes_nothing(build: Any) -> None:
    model = awaken(build("bert", lora_dropout=0.0, generator_training="full")).train()
    model.compressor.eval()  # dropout
    batch = batch_of(model)
    model(**batch).loss.backward()
    expected = gradients(model)
    # Its older name warns in newer versions of transformers.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model(**batch).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
    assert model.answer("Why?", ["No."], max_new_tokens=4)


def test_bfloat16_from_build_to_folder(models: dict[str, Path], tmp_path: Path) -> None:
    config = ScaleDownConfig(num_layers=1, doc_max_length=32, enable_reranking=True)
    model = ScaleDownModel.build(config, resolve(str(models["causal_lm"])), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model(**batch_of(model, scores=True)).loss.backward()
    model.save_pretrained(tmp_path)
    again = ScaleDownModel.from_pretrained(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    wide = ScaleDownModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


def test_parts_that_do_not_fit_together_are_refused(
    build: Any, models: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--num_layers 3: .* has 2; use fewer"):
        build(num_layers=3)
    with pytest.raises(ModelError, match="reads 512 tokens; .* lower --doc_max_length"):
        build("bert", doc_max_length=600)
    with pytest.raises(ModelError, match="is not a ScaleDown model: .* python train.py"):
        ScaleDownModel.from_pretrained(models["causal_lm"])
    with pytest.raises(ModelError, match="there is no such folder"):
        ScaleDownModel.from_pretrained(tmp_path / "nowhere")


def test_missing_weights_are_noticed(build: Any, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["memory"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights \(memory, 1 in all\)"):
        ScaleDownModel.from_pretrained(tmp_path)


def test_compressors_without_a_known_end_are_refused(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_FINAL_NORMS", ("ending",))
    with pytest.raises(ModelError, match="use --compressor modernbert"):
        build()


def test_the_modernbert_name() -> None:
    assert ScaleDownConfig(compressor="modernbert").compressor_name == "answerdotai/ModernBERT-base"
    assert ScaleDownConfig().compressor_name is None


def test_pushing_uploads_the_folder_with_its_card(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    uploaded: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None) -> None:
            assert token == "secret"

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, *, folder_path: str, repo_id: str, **_: Any) -> str:
            uploaded.update({p.name: p.read_bytes() for p in Path(folder_path).iterdir() if p.is_file()})
            return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert build().push_to_hub("me/student", token="secret") == "https://huggingface.co/me/student"
    assert b"library_name: scaledown" in uploaded["README.md"]
    assert "model.safetensors" in uploaded


def test_tokenizers_are_found_by_name(models: dict[str, Path]) -> None:
    assert load_tokenizer(resolve(str(models["splade"]))).cls_token == "[CLS]"

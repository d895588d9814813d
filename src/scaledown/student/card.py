"""The model card: the README of a folder with a trained model."""

from scaledown.student.settings import ScaleDownConfig


def model_card(config: ScaleDownConfig) -> str:
    """Return the card as Markdown, with the metadata that the hub reads."""
    compressor = (
        f"the first {config.num_layers} layers of the generator"
        if config.compressor_name is None
        else config.compressor_name
    )
    bases = [name for name in (config.generator_name, config.compressor_name) if _is_on_hub(name)]
    base = "".join(f"\n- {name.partition('@')[0]}" for name in bases if name)
    reranking = (
        "\nscores = model.rerank(query, documents)  # relevance, one a document"
        if config.enable_reranking
        else ""
    )
    bits = "; its frozen weights are values of 4 bits (NF4)" if config.generator_4bit else ""
    if config.kind.picks_tokens:
        compressor += ", and a pointer that picks tokens"
        left = f"leaves the embeddings of the tokens that matter, by default one of {config.compression_rate}"
        shapes = "of each document [picked tokens, width], to keep"
        reranking = "\nscores = model.rerank(query, documents)  # relevance, one a document"
    else:
        left = f"leaves {config.memory_tokens} embeddings of it"
        shapes = f"of each document [{config.memory_tokens}, width], to keep"
    return f"""---
library_name: scaledown
pipeline_tag: text-generation
tags:
- rag
- context-compression{f"{chr(10)}base_model:{base}" if base else ""}
---

# {config.generator_name} with compressed documents

Answers questions about retrieved documents. A compressor reads each document together with the question
and {left}, which the generator reads instead of its text
({"after " if config.kind.picks_tokens else ""}OSCAR, [arXiv 2504.07109](https://arxiv.org/abs/2504.07109)).

```python
from scaledown.student.model import ScaleDownModel

model = ScaleDownModel.from_pretrained("this folder or its name on the hub")
query, documents = "What causes tides?", ["Tides are caused by the moon."]
print(model.answer(query, documents))
embeddings = model.compress(query, documents)  # {shapes}
print(model.answer(query, embeddings)){reranking}
```

| | |
|---|---|
| generator | {config.generator_name}, {_TRAINED[config.generator_training]}{bits} |
| compressor | {compressor} |
| documents | up to {config.doc_max_length} tokens, the rest is cut |
| compression rate | {config.compression_rate} |
| reranking head | {"yes" if config.enable_reranking else "no"} |

The licences of the generator, of the compressor and of the training data hold for this model too.
"""


_TRAINED = {
    "lora": "trained by LoRA",
    "full": "trained in full",
    "frozen": "not trained, or its LoRA is merged",
}


def _is_on_hub(name: str | None) -> bool:
    return name is not None and name.count("/") == 1 and not name.startswith((".", "/", "~", "bundled:"))

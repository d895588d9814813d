"""The straightforward script: sentence-transformers and transformers, as their documentation shows them.

Everything in memory, one library call after the other; sizes and models as in `pipeline`.
"""

import time
from typing import Any

import torch


def encode(model: Any, texts: list[str], batch_size: int) -> torch.Tensor:
    return model.encode_document(
        texts, batch_size=batch_size, convert_to_sparse_tensor=True, show_progress_bar=False
    )


def run(
    passages: list[str],
    queries: list[str],
    models: dict[str, str],
    *,
    dtype: torch.dtype,
    encode_batch: int,
    top_k: int,
    keep: int,
    max_new_tokens: int,
    teacher_batch: int,
) -> tuple[dict[str, float], list[str]]:
    """Seconds of each stage, loading its model included, and the answers."""
    from sentence_transformers import CrossEncoder, SparseEncoder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    seconds = {}
    keywords = {"device": "cpu", "model_kwargs": {"dtype": dtype}}

    started = time.perf_counter()
    encoder = SparseEncoder(models["retriever"], **keywords)
    vectors = encode(encoder, passages, encode_batch)
    seconds["vectors"] = time.perf_counter() - started

    started = time.perf_counter()
    asked = encoder.encode_query(queries, convert_to_sparse_tensor=True, show_progress_bar=False)
    scores = torch.sparse.mm(asked.float(), vectors.float().t()).to_dense()
    rows = scores.topk(top_k, dim=1).indices.tolist()
    seconds["candidates"] = time.perf_counter() - started

    started = time.perf_counter()
    reranker = CrossEncoder(models["reranker"], **keywords)
    kept = []
    for query, own in zip(queries, rows, strict=True):
        pairs = [(query, passages[row]) for row in own]
        relevance = reranker.predict(pairs, batch_size=16, show_progress_bar=False)
        order = relevance.argsort()[::-1][:keep]
        kept.append([own[place] for place in order])
    seconds["ranked"] = time.perf_counter() - started

    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(models["teacher"], padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    teacher = AutoModelForCausalLM.from_pretrained(models["teacher"], dtype=dtype)
    answers = []
    for low in range(0, len(queries), teacher_batch):
        prompts = []
        for query, own in zip(
            queries[low : low + teacher_batch], kept[low : low + teacher_batch], strict=True
        ):
            documents = "\n\n".join(passages[row] for row in own)
            messages = [
                {"role": "system", "content": "Answer from the documents, as briefly as possible."},
                {"role": "user", "content": f"Background:\n{documents}\n\nQuestion: {query}"},
            ]
            prompts.append(
                tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            )
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            output = teacher.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    seconds["answers"] = time.perf_counter() - started
    return seconds, answers

"""`--preset NAME`: settings that belong together."""

from collections.abc import Mapping
from typing import Any, Final

# The paper's models and sizes (arXiv 2504.07109, section 4 and table 7) and the bundled ones.
PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "guide": {},
    "oscar": {
        "retriever_model": "naver/splade-v3",
        "reranker_model": "naver/trecdl22-crossencoder-debertav3",
        "teacher_model": "mistralai/Mistral-7B-Instruct-v0.2",
        "passages": "tokens",
        "passage_tokens": 128,
        "top_k_retrieval": 20,
        "top_k_reranking": 5,
        "enable_reranking": True,
        "max_new_tokens": 128,
    },
    "demo": {
        "retriever_model": "bundled:splade-tiny",
        "reranker_model": "ql:bundled:smollm2-135m",
        "teacher_model": "bundled:smollm2-135m",
        "top_k_retrieval": 10,
        "top_k_reranking": 3,
        "enable_reranking": True,
        "max_new_tokens": 48,
    },
}

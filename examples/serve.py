"""Retrieve passages for a question, ask `scaledown serve`, print the answer and its time.

    scaledown index --retriever_model bundled:splade-tiny --index_dir index
    scaledown serve --model model
    python examples/serve.py "What causes tides?" [INDEX_DIR] [http://127.0.0.1:8000/v1]

The first command makes an index of the sample corpus; `--corpus_path` takes yours, and without
`--retriever_model` the guide's retriever encodes it.
"""

import os
import sys
import time

import requests

from scaledown.data.retrieval import IndexRetriever

query = sys.argv[1]
index = sys.argv[2] if len(sys.argv) > 2 else "index"
server = sys.argv[3] if len(sys.argv) > 3 else "http://127.0.0.1:8000/v1"

(found,) = IndexRetriever(index).retrieve([query], top_k=5)
documents = [{"title": own["title"], "text": own["text"]} for own in found]
headers = (
    {"Authorization": f"Bearer {os.environ['SCALEDOWN_API_KEY']}"}
    if "SCALEDOWN_API_KEY" in os.environ
    else {}
)

for compressed in (True, False):
    body = {
        "messages": [{"role": "user", "content": query}],
        "documents": documents,
        "compressed": compressed,
        "max_tokens": 32,
    }
    started = time.perf_counter()
    response = requests.post(f"{server}/chat/completions", json=body, headers=headers, timeout=120)
    seconds = time.perf_counter() - started
    told = response.json()
    if not response.ok:
        sys.exit(told["error"]["message"])
    way = "compressed" if compressed else "text"
    positions = told["usage"]["prompt_tokens"]
    answer = " ".join(told["choices"][0]["message"]["content"].split())
    print(f"{way:<12} {positions:>5} positions  {seconds:.2f} s  {answer}")

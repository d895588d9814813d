"""Retrieve passages for a question, ask `scaledown serve`, print the answer and its time.

    scaledown serve --model model
    python examples/serve.py "What causes tides?" [CORPUS.jsonl] [http://127.0.0.1:8000/v1]

The corpus is KILT lines. Runs on the bundled retriever; `SPLADERetriever()` takes the guide's.
"""

import json
import os
import sys
import time
from pathlib import Path

import requests

from scaledown.data.retrieval import SPLADERetriever

query = sys.argv[1]
path = Path(sys.argv[2] if len(sys.argv) > 2 else Path(__file__).parent / "corpus.jsonl")
server = sys.argv[3] if len(sys.argv) > 3 else "http://127.0.0.1:8000/v1"

articles = map(json.loads, path.read_text(encoding="utf-8").splitlines())
corpus = [
    {"id": f"{article['wikipedia_id']}-{place}", "title": article["wikipedia_title"], "text": text.strip()}
    for article in articles
    for place, text in enumerate(article["text"][1:])
]
retriever = SPLADERetriever("bundled:splade-tiny")
(found,) = retriever.retrieve([query], corpus, top_k=5)
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

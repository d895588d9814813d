"""Retrieve from your own documents with SPLADE.

    python examples/own_corpus.py

Runs on the bundled model; `SPLADERetriever()` takes the guide's.
"""

from scaledown.data.retrieval import SPLADERetriever

corpus = [
    {
        "id": "1",
        "title": "Tides",
        "text": "The Moon's gravity pulls the water of the oceans into two bulges.",
    },
    {"id": "2", "title": "Chess", "text": "The queen moves any number of squares in any direction."},
    {"id": "3", "title": "Honey", "text": "Bees make honey from nectar and dry it with their wings."},
]
queries = ["why does the sea level rise and fall twice a day", "strongest chess piece"]

retriever = SPLADERetriever("bundled:splade-tiny")
results = retriever.retrieve(queries, corpus, top_k=2)

for query, documents in zip(queries, results, strict=True):
    print(query)
    for document in documents:
        print(f"  {document['score']:6.2f}  {document['id']}  {document['title']}")

"""Retrieval: encoders, the index, exact and approximate search.

`SPLADERetriever`, `DenseRetriever` and `IndexRetriever` are the public classes.
"""

from scaledown.data.retrieval.retrievers import DenseRetriever, IndexRetriever, SPLADERetriever

__all__ = ["DenseRetriever", "IndexRetriever", "SPLADERetriever"]

"""Retrieval: encoders, the index, exact and approximate search.

`SPLADERetriever` and `DenseRetriever` are the public classes.
"""

from scaledown.data.retrieval.retrievers import DenseRetriever, SPLADERetriever

__all__ = ["DenseRetriever", "SPLADERetriever"]

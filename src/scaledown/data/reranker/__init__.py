"""Rerankers: cross-encoders, and query likelihood under a causal LM.

`add_reranking_scores` is the public function.
"""

from scaledown.data.reranker.api import add_reranking_scores

__all__ = ["add_reranking_scores"]

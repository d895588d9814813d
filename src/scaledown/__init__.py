"""ScaleDown: training data for query-dependent compression of retrieved documents (OSCAR).

The main function is `scaledown.data.prepare_dataset.prepare_dataset`; its command is `scaledown prepare`.
Each stage can also be used alone:

- `scaledown.data.retrieval.SPLADERetriever`: queries + corpus -> ranked documents
- `scaledown.data.reranker.add_reranking_scores`: scores each document for its query
- `scaledown.data.teacher.generate_teacher_answers`: queries with documents -> training records
"""

__version__ = "1.0.0rc1"

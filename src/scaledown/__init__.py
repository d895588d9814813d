"""ScaleDown: training data for query-dependent compression of retrieved documents (OSCAR).

The main job is `scaledown.data.prepare_dataset.prepare_dataset`; on the command line,
`scaledown prepare`. Each stage can be used alone:

- `scaledown.data.retrieval.SPLADERetriever`: queries + corpus -> ranked documents
- `scaledown.data.reranker.add_reranking_scores`: relevance of each document to its query
- `scaledown.data.teacher.generate_teacher_answers`: queries with documents -> training records
"""

__version__ = "0.7.0"

"""You already have documents for each query: add reranking scores and teacher answers.

    python examples/custom_retrieval.py [OUTPUT.json]

Runs on the bundled models; leave `reranker_model` and `teacher_model` out for the guide's.
"""

import json
import sys
from pathlib import Path

from scaledown.data.reranker import add_reranking_scores
from scaledown.data.teacher import generate_teacher_answers

queries_with_docs = [
    {
        "query": "Who built the first lighthouse of Alexandria?",
        "documents": [
            {"title": "Bread", "text": "Bread is baked from dough, which is flour mixed with water."},
            {
                "title": "Pharos",
                "text": "The lighthouse of Alexandria was built under Ptolemy II by Sostratus of Cnidus.",
            },
        ],
    },
    {
        "query": "What does yeast do to dough?",
        "documents": ["Yeast makes dough rise, because it turns sugar into carbon dioxide."],
    },
]

# Add reranking scores (optional); top_k=5 would also sort and keep the best five
queries_with_docs = add_reranking_scores(queries_with_docs, "ql:bundled:smollm2-135m")

# Generate teacher answers
training_data = generate_teacher_answers(queries_with_docs, "bundled:smollm2-135m", max_new_tokens=32)

# Save
output = Path(sys.argv[1] if len(sys.argv) > 1 else "train_data.json")
output.write_text(json.dumps(training_data, indent=2), encoding="utf-8")
print(f"{output}: {len(training_data)} examples")

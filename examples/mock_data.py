"""Training data by hand, for testing code without any model.

python examples/mock_data.py [OUTPUT.json]
scaledown validate mock_data.json
"""

import json
import sys
from pathlib import Path

mock_data = [
    {
        "query": "What is machine learning?",
        "documents": [
            "Machine learning is a subset of AI.",
            "ML algorithms learn from data.",
            "There are supervised and unsupervised methods.",
        ],
        "answer": "Machine learning is a subset of AI that learns from data.",
    },
]

output = Path(sys.argv[1] if len(sys.argv) > 1 else "mock_data.json")
output.write_text(json.dumps(mock_data, indent=2), encoding="utf-8")

"""Make a smaller corpus for testing: the first lines of a large one.

    python examples/corpus_subset.py kilt_knowledgesource.json kilt_small.json 100000

`--max_corpus_size 100000` does the same without a second file.
"""

import sys
from itertools import islice
from pathlib import Path

input_file, output_file, max_docs = sys.argv[1], sys.argv[2], int(sys.argv[3])

with Path(input_file).open(encoding="utf-8") as fin, Path(output_file).open("w", encoding="utf-8") as fout:
    fout.writelines(islice(fin, max_docs))

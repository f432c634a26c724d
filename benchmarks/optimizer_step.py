"""A step of the optimizers beside torch's and others: `stacey-dist bench`, with its options.

python benchmarks/optimizer_step.py [--case flat|llama_100m|tiny] [--device cpu|cuda] [--slow] [--json FILE]
"""

import sys

from stacey_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))

"""train_llm.py under the umask 027: the server that tests fork from has its own."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from stacey_dist.training.launchers import LLM

if __name__ == "__main__":
    os.umask(0o027)
    LLM.main()

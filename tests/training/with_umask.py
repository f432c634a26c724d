"""train_llm.py under the umask 027: the server that tests fork from has its own."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import train_llm

if __name__ == "__main__":
    os.umask(0o027)
    train_llm.main()

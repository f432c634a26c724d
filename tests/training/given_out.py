"""`train_llm.py` with a model of which it is not known how its weights begin."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from stacey_dist.training import initial_weights
from stacey_dist.training.launchers import LLM

initial_weights._Recorder.of = lambda self, param: None

if __name__ == "__main__":
    LLM.main()

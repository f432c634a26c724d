"""train_llm.py with the hub at HF_ENDPOINT: other tests' processes are kept from any."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from huggingface_hub import constants

from stacey_dist.training.launchers import LLM

if __name__ == "__main__":
    constants.ENDPOINT, constants.HF_HUB_OFFLINE = os.environ["HF_ENDPOINT"], False
    LLM.main()

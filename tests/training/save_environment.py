"""Writes the environment that `accelerate launch` gives a process: save_environment.py PATH."""

import json
import os
import sys
from pathlib import Path

Path(f"{sys.argv[1]}.{os.environ['RANK']}").write_text(json.dumps(dict(os.environ)))

"""What a forked train_llm.py finds imported already; imported by the fork server alone."""

import os

from tests.training.hidden import HIDDEN

os.environ.update(HIDDEN)

import stacey_dist.training.command_line
import stacey_dist.training.llm
import stacey_dist.training.loop  # noqa: F401

"""train_llm.py whose `train.compile` traces models as torch.compile does, without the minutes of a C++ compiler."""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from torch import nn
from torch._dynamo.backends.debugging import aot_eager

from stacey_dist.training.launchers import LLM


def traced(graph, inputs):
    print("traced a graph", flush=True)
    return aot_eager(graph, inputs)


if __name__ == "__main__":
    nn.Module.compile = functools.partialmethod(nn.Module.compile, backend=traced)
    LLM.main()

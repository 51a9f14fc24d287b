"""A user's script that knows nothing of process groups; says whether one is alive when the interpreter ends."""

import atexit
import sys
from pathlib import Path

import torch.distributed as dist


sys.path.insert(0, str(Path(__file__).parent.parent))

from small_population import population


# Handlers run in the reverse order of their making: this one after that of the Trainer, which is made below.
atexit.register(lambda: print(f"alive: {dist.is_initialized()}", flush=True))


population(sys.argv[1], size=2, max_steps=2, eval_strategy="no").train()
print(f"training: {dist.is_initialized()}")

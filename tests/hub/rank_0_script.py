"""Two processes train; then each does what a script does on the main process alone, and what it does on all of them."""

import sys

from hub import tiny_runs


trainer = tiny_runs.trainer(sys.argv[1], "timm", push_members=True, eval_strategy="no")
trainer.train()
if trainer.is_world_process_zero():
    trainer.create_model_card()
    trainer.push_to_hub()
trainer.push_to_hub()
print(f"process {trainer.args.process_index} done")

"""Around the training loop (the loop itself is stage_a_sft_training.py): the run, checkpoints, interruptions,
reports.

May import everything in this package."""

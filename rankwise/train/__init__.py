"""The training loop and what it stands on: optimiser, precision, checkpoints, log."""

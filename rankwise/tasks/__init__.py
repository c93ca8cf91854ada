"""Many tasks: their adapters combined; how a run draws their rows, its stages, the conflict of their gradients."""

"""Many tasks: their adapters combined."""

"""Putting adapters into a model, taking them out, and their folder on disk (PEFT's format)."""

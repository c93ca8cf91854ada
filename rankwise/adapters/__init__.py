"""Maths of the adapters: how a frozen layer is changed by few trainable numbers."""

"""Rank as a living quantity."""

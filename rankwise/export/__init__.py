"""Leaving the house: merged models with their certificate."""

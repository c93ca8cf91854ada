"""Leaving the house: merged models with their certificate, other formats with their report."""

"""Measuring: loss and perplexity, generated answers and their scores."""

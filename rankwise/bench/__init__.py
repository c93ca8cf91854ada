"""The quality bench: a store of experiments, the statistics of paired runs, and the tables that follow from them."""

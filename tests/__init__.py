"""Tests mirror the tree of rankwise. `shapes` is loaded here because the checker is looked up by the name `tests.shapes.check`."""

from tests import shapes as shapes

"""Tests mirror the tree of rankwise. The checker of shapes is looked up as `tests.shapes.check`: it is loaded here."""

from tests import shapes as shapes

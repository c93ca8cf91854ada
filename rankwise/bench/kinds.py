"""What a method trains."""

from __future__ import annotations

ADAPTER, FULL, HEAD, BASE = "adapter", "full", "head", "base"
KINDS = {
    ADAPTER: "the adapter of `adapter:`",
    FULL: "every weight of the model",
    HEAD: "the head of a classifier alone",
    BASE: "nothing",
}

"""What a method trains, and on what: one task after the other, or all tasks of its suite at once."""

from __future__ import annotations

ADAPTER, FULL, HEAD, BASE = "adapter", "full", "head", "base"
TASKS, COMBINE, GATE = "tasks", "combine", "gate"
KINDS = {
    ADAPTER: "the adapter of `adapter:`",
    FULL: "every weight of the model",
    HEAD: "the head of a classifier alone",
    BASE: "nothing",
    TASKS: "the adapters of `adapter:` and `tasks:`, in one run on all tasks",
    COMBINE: "nothing: the adapters of `singles:`, combined into one",
    GATE: "nothing but a classifier of tasks, where there is one: the adapters of `singles:` under a gate",
}
OF_ALL = (TASKS, COMBINE, GATE)
"""Kinds with one cell for all tasks, instead of one for each."""
UNTRAINED = (BASE, COMBINE, GATE)
"""Kinds without a learning rate."""

SETTINGS = {
    ADAPTER: ("adapter", "ranks", "cut", "train"),
    FULL: ("train",),
    HEAD: ("train",),
    BASE: ("train",),
    TASKS: ("adapter", "train", "tasks", "singles", "new_task"),
    COMBINE: ("singles", "combine"),
    GATE: ("singles", "gate"),
}
"""A method's settings that have an effect with each kind, `kind` and `lr` apart."""

"""rankwise: LoRA fine-tuning from data to a deployed adapter, in which every step proves itself.

    import rankwise as rw
    rw.attach(model, rw.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    rw.save_adapter(model, "my-adapter")
    with rw.disabled(model): ...                  # the base alone
    rw.train({"model": {"name": "demo"}, ...})    # what `rankwise train` calls

Names are imported when first used, so that `import rankwise` costs milliseconds. Three of them (attach, ranks, train)
are rooms of the package too: as attributes of `rankwise` they are always the functions, and a room's modules are
reached by `from rankwise.train import loop` or `from rankwise.train.loop import fit`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rankwise.adapters.config import LoraConfig as LoraConfig
    from rankwise.adapters.gate_config import EmbeddingConfig as EmbeddingConfig
    from rankwise.adapters.gate_config import GateConfig as GateConfig
    from rankwise.attach.checkpoint import load_adapter as load_adapter
    from rankwise.attach.checkpoint import save_adapter as save_adapter
    from rankwise.attach.gates import attach_embedding as attach_embedding
    from rankwise.attach.gates import attach_gate as attach_gate
    from rankwise.attach.gates import on_task as on_task
    from rankwise.attach.gates import set_task as set_task
    from rankwise.attach.gates import train_parts as train_parts
    from rankwise.attach.inject import attach as attach
    from rankwise.attach.inject import detach as detach
    from rankwise.attach.inject import disabled as disabled
    from rankwise.attach.inject import merge_in as merge  # noqa: F401
    from rankwise.attach.inject import ranks as ranks
    from rankwise.attach.trainers import BaseAlone as BaseAlone
    from rankwise.attach.trainers import resumable as resumable
    from rankwise.errors import RankwiseError as RankwiseError
    from rankwise.errors import RequestError as RequestError
    from rankwise.errors import WorkError as WorkError
    from rankwise.ranks.dynamic import set_ranks as set_ranks
    from rankwise.recipes.combine import CombineConfig as CombineConfig
    from rankwise.recipes.combine import combine as combine
    from rankwise.recipes.finetune import train as train
    from rankwise.recipes.run import RunConfig as RunConfig
    from rankwise.tasks.new_task import add_task as add_task
    from rankwise.tasks.new_task import learn_task as learn_task
    from rankwise.tasks.router import fit_router as fit_router

SURFACE: dict[str, tuple[str, str]] = {
    "LoraConfig": ("rankwise.adapters.config", "LoraConfig"),
    "GateConfig": ("rankwise.adapters.gate_config", "GateConfig"),
    "EmbeddingConfig": ("rankwise.adapters.gate_config", "EmbeddingConfig"),
    "attach": ("rankwise.attach.inject", "attach"),
    "detach": ("rankwise.attach.inject", "detach"),
    "merge": ("rankwise.attach.inject", "merge_in"),
    "disabled": ("rankwise.attach.inject", "disabled"),
    "ranks": ("rankwise.attach.inject", "ranks"),
    "fit_router": ("rankwise.tasks.router", "fit_router"),
    "add_task": ("rankwise.tasks.new_task", "add_task"),
    "learn_task": ("rankwise.tasks.new_task", "learn_task"),
    "set_ranks": ("rankwise.ranks.dynamic", "set_ranks"),
    "attach_gate": ("rankwise.attach.gates", "attach_gate"),
    "attach_embedding": ("rankwise.attach.gates", "attach_embedding"),
    "on_task": ("rankwise.attach.gates", "on_task"),
    "set_task": ("rankwise.attach.gates", "set_task"),
    "train_parts": ("rankwise.attach.gates", "train_parts"),
    "save_adapter": ("rankwise.attach.checkpoint", "save_adapter"),
    "load_adapter": ("rankwise.attach.checkpoint", "load_adapter"),
    "resumable": ("rankwise.attach.trainers", "resumable"),
    "BaseAlone": ("rankwise.attach.trainers", "BaseAlone"),
    "combine": ("rankwise.recipes.combine", "combine"),
    "CombineConfig": ("rankwise.recipes.combine", "CombineConfig"),
    "train": ("rankwise.recipes.finetune", "train"),
    "RunConfig": ("rankwise.recipes.run", "RunConfig"),
    "RankwiseError": ("rankwise.errors", "RankwiseError"),
    "RequestError": ("rankwise.errors", "RequestError"),
    "WorkError": ("rankwise.errors", "WorkError"),
}
"""What the library offers: name, and the module and attribute that it is."""


class _Library(ModuleType):
    """The package itself: keeps the names of `SURFACE` free of the rooms that carry the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        """The import system binds each room to the package when it is first imported; the functions' names stay."""
        if not (name in SURFACE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """Imports a name of the library when it is first used."""
        if name not in SURFACE:
            raise AttributeError(f"rankwise has no '{name}'; it offers {', '.join(sorted(SURFACE))}")
        module, attribute = SURFACE[name]
        value = getattr(import_module(module), attribute)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *SURFACE})


sys.modules[__name__].__class__ = _Library

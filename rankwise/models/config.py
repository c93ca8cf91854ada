"""Which model, and where it runs: the `model:` section of a run file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """`name`: a Hub id, a local folder, `demo` or `demo-encoder`. `device`: cpu, cuda, mps (with `:N`), or auto."""

    name: str = "demo"
    device: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False

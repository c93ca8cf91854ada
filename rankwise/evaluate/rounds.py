"""Who measures what: items dealt out among processes, a batch at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from torch import nn

from rankwise import distributed
from rankwise.models.sharding import is_sharded

T = TypeVar("T")


def rounds(items: Sequence[T], batch_size: int, model: nn.Module) -> list[Sequence[T]]:
    """The batches of this process: of every world_size()-th item, so that each gets long and short ones.

    Equally many on all processes, with empty ones at the end, where the model is spread over them: a forward pass is
    then a matter of all.
    """
    own = distributed.dealt(items)
    num_rounds = math.ceil(len(own) / batch_size)
    if is_sharded(model):
        num_rounds = math.ceil(math.ceil(len(items) / distributed.world_size()) / batch_size)
    return [own[start : start + batch_size] for start in range(0, num_rounds * batch_size, batch_size)]

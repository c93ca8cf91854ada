"""Several processes that begin one piece of work: the same data, the same model, spread where that was asked for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise import distributed
from rankwise.attach.attachment import attachment_of
from rankwise.attach.inject import adapter_tensors
from rankwise.errors import RequestError
from rankwise.models.sharding import shard
from rankwise.recipes.provenance import joined_hash
from rankwise.train.config import TrainConfig
from rankwise.train.objective import Objective

SAMPLE = 4096
"""Entries of each weight of a base that is to be spread, by which processes compare it before it is cut."""


def num_shares(sharding: str) -> int:
    """Among how many processes `sharding` spreads the base: `none`, those of a `node`, or all (`full`).

    Raises: RequestError for `node` where machines have different numbers of processes.
    """
    if sharding == "node":
        own = distributed.local_world_size()
        if len(set(distributed.gathered(own))) > 1:
            raise RequestError(
                "train.sharding: node needs equally many processes on every machine; set it to full, or start them so"
            )
        return own
    return distributed.world_size() if sharding == "full" else 1


def check_spread(objective: Objective, name: str, sharding: str) -> None:
    """Raises: RequestError for an objective whose losses need all rows at once, on a base that is spread."""
    if sharding != "none" and distributed.world_size() > 1 and objective.step_losses is not None:
        raise RequestError(
            f"sharding: {sharding} does not work with the objective {name}, which encodes every text twice, "
            "differently often on each process; set it to none"
        )


def check_same_data(hashes: Mapping[str, Mapping[str, str]]) -> None:
    """Raises: RequestError when processes have read data of other contents: other files under the same names."""
    found = distributed.gathered({split: joined_hash(dict(files)) for split, files in hashes.items()})
    for process, theirs in enumerate(found):
        for split, first in found[0].items():
            if theirs.get(split) != first:
                raise RequestError(
                    f"data.{split} has other contents for process {process} than for process 0; give all machines the "
                    "same files, best on a shared file system"
                )


def bring_in_step(model: PreTrainedModel, shares: int, device: torch.device) -> None:
    """Gives every process the first one's adapter, if one is attached, and cuts the base into so many shares.

    Raises: WorkError when the bases differ; RequestError for a base that can't be spread.
    """
    if distributed.world_size() == 1:
        return
    own = adapter_tensors(model) if attachment_of(model) is not None else {}
    distributed.broadcast_from(0, list(own.values()))
    base = {name: tensor for name, tensor in model.named_parameters() if tensor.numel()}
    if shares > 1:
        base = {name: tensor.detach().reshape(-1)[:SAMPLE] for name, tensor in base.items()}
    distributed.check_in_step({**base, **own}, "at the start")
    if shares > 1:
        shard(model, _whole(model), device, shares)


def _whole(model: nn.Module) -> list[Tensor]:
    """What is not cut: the adapter, and the originals that wait for `disabled`."""
    attachment = attachment_of(model)
    if attachment is None:
        return []
    exchanged = [attachment.current(model, name) for name in attachment.exchanged]
    return [*adapter_tensors(model).values(), *attachment.parameters(), *exchanged]


def is_state_shared(train: TrainConfig, parameters: Mapping[str, nn.Parameter]) -> bool:
    """Whether each process keeps only its share of the optimizer's state."""
    least = train.share_optimizer_from
    size = sum(parameter.numel() for parameter in parameters.values())
    return least is not None and size >= least and distributed.world_size() > 1

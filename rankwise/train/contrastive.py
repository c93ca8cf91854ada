"""The contrastive loss over a whole step, in the memory of one micro batch: a gradient cache.

The loss of `rankwise.models.embedding` ties all rows of a step together, so micro batches can't simply be added up.
Here they equal one big batch (Gao et al. 2021, arXiv 2101.06983, section 3.2): every text is encoded without a graph;
the loss and its gradient with respect to the vectors are computed over the whole step, on all processes; then each
micro batch is encoded again, with the same dropout, and that gradient goes into it. The price is a second forward.

Legend: M texts, H hidden size, N rows of the step, n rows of a micro batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from rankwise import distributed
from rankwise.models.embedding import contrast_logits, embed, positive_ranks
from rankwise.models.label_batch import TextBatch
from rankwise.train.objective import Meter
from rankwise.train.rng import rng_state, set_rng_state

RECALL, MRR = "recall_at_1", "mrr"
RETRIEVAL_FIGURES = (RECALL, MRR)


@dataclass(frozen=True)
class _Texts:
    """Where the texts of a whole step stand among its vectors, on all processes.

    `anchors` and `positives` [N]: text numbers, row by row; `keys` [M] as in `TextBatch`; `first_text` and `first_row`:
    where those of this process begin.
    """

    anchors: Int64[Tensor, " N"]
    positives: Int64[Tensor, " N"]
    keys: Int64[Tensor, " M"]
    first_text: int
    first_row: int

    @property
    def candidates(self) -> Int64[Tensor, " K"]:
        """Every text that is no anchor."""
        is_anchor = torch.zeros(len(self.keys), dtype=torch.bool, device=self.keys.device)
        is_anchor[self.anchors] = True
        return (~is_anchor).nonzero().squeeze(1)

    @property
    def own(self) -> Int64[Tensor, " N"]:
        """The place of each row's positive among the candidates."""
        return torch.searchsorted(self.candidates, self.positives)


@dataclass(frozen=True)
class Contrast:
    """The objective `embedding`: how texts become vectors, and how sharply they are told apart.

    `pooling`: mean, cls or last; `temperature`: similarities are divided by it; `meter` takes recall@1 and the mean
    reciprocal rank of the positives among the step's candidates.
    """

    pooling: str
    temperature: float
    meter: Meter

    def losses(self, model: PreTrainedModel, batch: TextBatch) -> Float[Tensor, " n"]:
        """One loss for each row of a batch that is a step of its own, of this process alone."""
        return self._losses(self._vectors(model, batch), _texts_of([batch], model.device, alone=True))

    def step_losses(self, model: PreTrainedModel, batches: Sequence[TextBatch]) -> Iterator[Float[Tensor, " n"]]:
        """The losses of each micro batch in turn, [n] with a graph, over the candidates of all of them.

        The gradient that flows from the sum of each is that of the whole step's sum with respect to its own rows.
        """
        if len(batches) == 1 and distributed.world_size() == 1:
            yield self._losses(self._vectors(model, batches[0]), _texts_of(batches, model.device))
            return
        states, encoded = [], []
        with torch.no_grad():
            for batch in batches:
                states.append(rng_state(model.device))
                encoded.append(self._vectors(model, batch))
        after = rng_state(model.device)
        texts = _texts_of(batches, model.device)
        width = model.config.get_text_config().hidden_size
        own_vectors = torch.cat(encoded) if encoded else torch.zeros(0, width, device=model.device)
        vectors = _gathered(own_vectors, texts.first_text, len(texts.keys))
        with torch.enable_grad():
            leaf = vectors.requires_grad_()
            losses = self._losses(leaf, texts)
            (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        first_text, first_row = texts.first_text, texts.first_row
        for batch, state, own in zip(batches, states, encoded, strict=True):
            mine = losses[first_row : first_row + batch.num_examples].detach()
            if torch.is_grad_enabled():
                set_rng_state(state, model.device)
                surrogate = (self._vectors(model, batch) * gradient[first_text : first_text + len(own)]).sum()
                mine = mine + (surrogate - surrogate.detach()) / len(mine)  # the losses' values, the cached gradient
            yield mine
            first_text, first_row = first_text + len(own), first_row + batch.num_examples
        set_rng_state(after, model.device)

    def _vectors(self, model: PreTrainedModel, batch: TextBatch) -> Float[Tensor, "M H"]:
        return embed(model, batch.input_ids, batch.attention_mask, self.pooling)

    def _losses(self, vectors: Float[Tensor, "M H"], texts: _Texts) -> Float[Tensor, " N"]:
        """The losses of all rows of the step, in the order of the micro batches."""
        logits = contrast_logits(
            vectors[texts.anchors], vectors[texts.candidates], texts.own,
            (texts.keys[texts.anchors], texts.keys[texts.candidates]), self.temperature,
        )  # fmt: skip
        places = positive_ranks(logits.detach(), texts.own).double()
        self.meter.add(RECALL, places == 1)
        self.meter.add(MRR, 1 / places)
        return F.cross_entropy(logits, texts.own, reduction="none")


def _texts_of(batches: Sequence[TextBatch], device: torch.device, alone: bool = False) -> _Texts:
    """The texts of these micro batches and, unless `alone`, of those of the other processes before and after them."""
    num_texts, num_rows = sum(len(batch.keys) for batch in batches), sum(batch.num_examples for batch in batches)
    rank, size = (0, 1) if alone else (distributed.rank(), distributed.world_size())
    counts = torch.zeros(size, 2, dtype=torch.int64, device=device)
    counts[rank] = torch.tensor([num_texts, num_rows], device=device)
    if not alone:
        distributed.all_reduce_sum([counts])
    first_text, first_row = (int(value) for value in counts[:rank].sum(0))
    all_texts, all_rows = (int(value) for value in counts.sum(0))
    anchors, start = [], first_text
    for batch in batches:
        anchors.append(torch.arange(start, start + batch.num_examples, device=device))
        start += len(batch.keys)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    own_anchors = torch.cat([none, *anchors])
    own_positives = torch.cat([none, *(part + len(part) for part in anchors)])
    own_keys = torch.cat([none, *(batch.keys for batch in batches)])
    if alone:
        return _Texts(own_anchors, own_positives, own_keys, first_text, first_row)
    return _Texts(
        _gathered(own_anchors, first_row, all_rows), _gathered(own_positives, first_row, all_rows),
        _gathered(own_keys, first_text, all_texts), first_text, first_row,
    )  # fmt: skip


def _gathered(own: Tensor, start: int, total: int) -> Tensor:
    """The tensors of all processes end to end, [total, ...], this one's from `start` on."""
    if distributed.world_size() == 1:
        return own
    whole = own.new_zeros(total, *own.shape[1:])
    whole[start : start + len(own)] = own
    distributed.all_reduce_sum([whole])
    return whole

"""Dropout of an adapter's input from few random bits, the mask kept as one bit an entry.

An entry is kept when its random number of k bits lies below a threshold t: probability t / 2^k. All entries' numbers
are compared at once, one binary place after the other, on words of 64 entries: with the bits r_j of the numbers and the
bits t_j of the threshold, from the lowest place up, m <- m | r_j where t_j is 1 and m <- m & r_j where it is 0. So k
random bits an entry are drawn, where torch's `bernoulli_` draws a whole number, and the result is the mask in words.
k is the smallest for which the rate is within TOLERANCE of the one asked for; what is kept is scaled by the inverse of
exactly the probability that it then has.

Applying the mask spreads it to integers of all ones or all zeros, as wide as the entries, and takes a bitwise and: five
times as quick on a CPU as a product with a mask of bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

TOLERANCE = 0.02
"""Relative; of the rate or of the probability of keeping, whichever is the smaller."""
MOST_PLACES = 16

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers as wide as the floating-point numbers of so many bytes."""


@dataclass(frozen=True)
class KeepRule:
    """Keep with probability threshold / 2^places. The threshold is odd: an even one needs fewer places."""

    threshold: int
    places: int

    @property
    def probability(self) -> float:
        """Of keeping an entry; exact in floating point."""
        return self.threshold / 2**self.places


def keep_rule(dropout: float) -> KeepRule | None:
    """The rule with the fewest places that is close enough to a rate; None where MOST_PLACES are too coarse."""
    for places in range(1, MOST_PLACES + 1):
        rule = KeepRule(round((1.0 - dropout) * 2**places), places)
        if rule.threshold % 2 and abs(1.0 - rule.probability - dropout) <= TOLERANCE * min(dropout, 1.0 - dropout):
            return rule
    return None


def kept_entries(count: int, rule: KeepRule, device: torch.device) -> Int64[Tensor, " words"]:
    """A random mask for `count` entries, from the global generator: a bit for each, ones are kept."""
    words = torch.empty((rule.places, (count + 63) // 64), dtype=torch.int64, device=device)
    words.random_(-(2**63), None)
    kept = words[0]
    for place in range(1, rule.places):
        kept = kept | words[place] if rule.threshold >> place & 1 else kept & words[place]
    return kept


def spread(kept: Int64[Tensor, " words"], like: Float[Tensor, "N n"]) -> Int[Tensor, "N n"]:
    """The mask as integers as wide as the numbers of `like`: all ones where an entry is kept, all zeros elsewhere."""
    integer = INTEGERS[like.element_size()]
    width = 8 * like.element_size()
    places = torch.arange(width - 1, -1, -1, dtype=integer, device=like.device)[:, None]
    ones = (kept.view(integer) << places).bitwise_right_shift_(width - 1)  # the sign bit fills the integer
    return ones.flatten()[: like.numel()].view(like.shape)


def masked(x: Float[Tensor, "N n"], mask: Int[Tensor, "N n"]) -> Float[Tensor, "N n"]:
    """A copy of `x` with zeros where the mask has them. Nothing is scaled."""
    return (x.view(mask.dtype) & mask).view(x.dtype)

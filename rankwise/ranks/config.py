"""How ranks are chosen and moved: the `ranks:` section of a run file."""

from __future__ import annotations

from dataclasses import dataclass

from rankwise.errors import RequestError, did_you_mean

POLICIES = ("fixed",)
POLICIES_TO_COME = ("layered", "spectrum", "grow", "adaptive")


@dataclass(frozen=True)
class RanksConfig:
    """`policy: fixed`: each layer keeps the rank that `adapter:` gives it.

    Raises: RequestError for any other policy.
    """

    policy: str = "fixed"

    def __post_init__(self) -> None:
        if self.policy in POLICIES_TO_COME:
            raise RequestError(f"ranks.policy: '{self.policy}' is not available yet; use fixed")
        if self.policy not in POLICIES:
            raise RequestError(f"ranks.policy can't be '{self.policy}'{did_you_mean(self.policy, POLICIES)}")

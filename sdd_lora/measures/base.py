"""What every measure has in common, for cards and benches alike."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Interval = tuple[float, float]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MeasureInfo(_Part):
    """How to read a measure: a rate or a mean, over which prompts, and which way is better. One of
    `all` has its headline over those of erased prompts where there are some, kept ones having rows
    of their own.

    `maximum_of` names the rate whose expected maximum over prompts this is, if it is one.
    """

    kind: Literal["rate", "mean"]
    of: Literal["erased", "kept", "all"]
    better: Literal["lower", "higher", "neither"]
    note: str = ""
    maximum_of: str = ""

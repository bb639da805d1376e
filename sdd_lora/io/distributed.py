"""Work shared by processes: those that torchrun or accelerate started, or a job array's."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from sdd_lora.errors import BadInput

if TYPE_CHECKING:
    from accelerate import PartialState

Shared = TypeVar("Shared")
_WAIT = timedelta(days=7)


def processes() -> "PartialState":
    """The processes that torchrun or accelerate started, which share the images; often just one."""
    import torch
    from accelerate import PartialState

    on_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    return PartialState(cpu=not on_gpu, timeout=_WAIT)


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of a list of work, as the jobs of an array do one each; `index` from 1.

    Item k of the list (from 0) belongs to shard k mod `count` + 1, whoever runs, and when: nothing
    is agreed between the jobs.
    """

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read "I/N", such as "2/8". Raises BadInput unless 1 ≤ I ≤ N."""
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text.strip())
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise BadInput(f"shard {text}: expected I/N with I from 1 to N, such as 1/4 … 4/4")
        return cls(int(found[1]), int(found[2]))

    def take(self, items: Sequence[Shared]) -> list[Shared]:
        """The items that belong to this shard, in their order."""
        return list(items[self.index - 1 :: self.count])

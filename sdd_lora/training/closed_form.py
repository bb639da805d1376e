"""Where an adapter may start: what makes the keys and values under concepts those under ∅."""

from dataclasses import dataclass

import torch

from sdd_lora.errors import BadInput
from sdd_lora.training.directions import second_moment, tokens, with_ridge

#: part of the tokens' mean variance that counts against a change in every direction
_RIDGE = 1e-4


@dataclass(frozen=True)
class ClosedForm:
    """A change of the prompts' embeddings that erases, the same for every to_k and to_v.

    Cross-attention sees a prompt through W e alone, for its tokens e and each W among to_k and
    to_v; where a concept's W e are ∅'s, so is the noise estimate. Of all changes X of a W,

        E_c‖(W + X) e − W e_∅‖² + weight · E_k‖X e‖² + ridge ‖X‖²

    is least at X = W · `change`, where e_∅ is ∅'s token in e's place: SDD's loss and preservation,
    with keys and values for noise estimates (UCE, Gandikota et al. 2024, Sec. 4, whose target here
    is ∅'s). `moment` is that of all tokens in this sum. Both are (d, d), fp64, on the CPU.
    """

    change: torch.Tensor
    moment: torch.Tensor

    @classmethod
    def of(
        cls, concepts: torch.Tensor, kept: torch.Tensor, empty: torch.Tensor, weight: float
    ) -> "ClosedForm":
        """From embeddings: of the concepts (N, 77, d), of kept prompts (M, 77, d), of ∅ (1, …)."""
        to_empty = tokens(empty).repeat(len(concepts), 1) - tokens(concepts)
        moment = with_ridge(second_moment(concepts) + weight * second_moment(kept), _RIDGE)
        towards = to_empty.T @ tokens(concepts) / len(to_empty)
        return cls(torch.linalg.solve(moment, towards.T).T, moment)

    def factors(self, weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Down (rank, d) and up (out, rank), fp32, for a `weight` W (out, d): of all products of
        this rank, up · down makes the sum above least. Each pair is balanced in norm.

        It is W · change cut to its leading directions in the tokens' own metric (reduced-rank
        regression). Raises BadInput where W has not that rank.
        """
        if rank > min(weight.shape):
            raise BadInput(
                f"lora.rank: expected {min(weight.shape)} at most, the size of the smallest matrix "
                f"to start in closed form, found {rank}"
            )
        change = weight.cpu().double() @ self.change
        values, vectors = torch.linalg.eigh(self.moment)
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        left = torch.linalg.svd(change @ root, full_matrices=False).U[:, :rank]
        down = left.T @ change
        size = down.norm(dim=1).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        return (down / size[:, None]).float(), (left * size).float()

"""A change of the prompts' embeddings that takes concepts out and leaves other prompts alone.

Cross-attention sees a prompt through W e alone, for its tokens e and each W among to_k and to_v.
One change e ↦ (I + B D) e therefore stands for ΔW = W B D of all of them. D (r, d) reads off the
part of a token in which concepts differ from what should stand in their place, in directions that
kept prompts hardly use; B (d, r) turns that part into the difference. It is an oblique projection:
kept tokens have next to nothing to be changed, and concepts lose exactly what sets them apart.
"""

from dataclasses import dataclass

import torch

#: part of the kept tokens' mean variance that counts as theirs in every direction
_RIDGE = 1e-3
#: a direction is worth its rank where one concept's difference has this many times the kept
#: tokens' variance; what a lower one erases, kept prompts pay for
WORTH = 35.0
#: and as long as kept tokens are moved by no more than this (see `Rank.moved`): of eighteen
#: concepts at once, each direction beyond takes more of what is kept than of a concept
MOST_MOVED = 0.08
_PROMPTS_AT_ONCE = 64


@dataclass(frozen=True)
class Moments:
    """Means over tokens e of concepts and e* of their targets, token by token; (d, d), fp64.

    concept: E e eᵀ · cross: E (e* − e) eᵀ · difference: E (e* − e)(e* − e)ᵀ · kept: E e eᵀ of
    what is kept. `concepts` is how many the means are over.
    """

    concept: torch.Tensor
    cross: torch.Tensor
    difference: torch.Tensor
    kept: torch.Tensor
    concepts: int


def moment(
    left: torch.Tensor, right: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """E a bᵀ over the tokens a, b of two sets of prompts (N, tokens, d): (d, d), fp64.

    `weights` (tokens,) say how much each place counts; alike where none are given.
    """
    shares = torch.ones(left.shape[1]) if weights is None else weights
    shares = (shares / shares.sum() / len(left)).double()[:, None]
    total = torch.zeros(left.shape[2], right.shape[2], dtype=torch.float64)
    for a, b in zip(left.split(_PROMPTS_AT_ONCE), right.split(_PROMPTS_AT_ONCE), strict=True):
        total += (a.double() * shares).flatten(0, 1).T @ b.double().flatten(0, 1)
    return total


def with_ridge(moment: torch.Tensor, part: float) -> torch.Tensor:
    """Add a part of the mean variance in every direction."""
    return moment + part * moment.trace() / len(moment) * torch.eye(len(moment)).to(moment)


@dataclass(frozen=True)
class Rank:
    """A row of the trade-off: a rank, and what its last direction is worth (see `WORTH`).

    left: the share of E‖e* − e‖² that remains between concepts and targets; moved: E‖B D e‖² over
    kept tokens, as a share of E‖e* − e‖².
    """

    rank: int
    worth: float
    left: float
    moved: float


@dataclass(frozen=True)
class Projection:
    """B (d, r) and D (r, d), fp64, and the trade-off of all ranks up to r and some beyond."""

    up: torch.Tensor
    down: torch.Tensor
    ranks: tuple[Rank, ...]

    @classmethod
    def solve(cls, moments: Moments, rank: int | None = None, shown: int = 4) -> "Projection":
        """The best B for the `rank` best D; where none is given, as many as are worth it and move
        kept tokens little enough, but one at least.

        D: the leading generalised eigenvectors of E(e* − e)(e* − e)ᵀ v = λ (E_k e eᵀ + ridge) v.
        B: of all B, the one with the least E‖(e* − e) − B D e‖².
        """
        kept = with_ridge(moments.kept, _RIDGE)
        whitening = torch.linalg.inv(torch.linalg.cholesky(kept))
        values, vectors = torch.linalg.eigh(whitening @ moments.difference @ whitening.T)
        worth = moments.concepts * values.flip(0)
        directions = (whitening.T @ vectors).flip(1).T  # rows v, with v (E_k + ridge) vᵀ = 1
        last = min((rank or int((worth >= WORTH).sum())) + shown, len(values))
        rows = [
            _trade_off_of(moments, directions[:r], float(worth[r - 1])) for r in range(1, last + 1)
        ]
        if rank is None:
            good = [row.rank for row in rows if row.worth >= WORTH and row.moved <= MOST_MOVED]
            rank = max(good, default=1)
            rows = rows[: rank + shown]
        down = directions[:rank]
        return cls(_regression(moments, down), down, tuple(rows))

    def power(
        self, embeddings: torch.Tensor, moments: Moments, shares: torch.Tensor | None = None
    ) -> torch.Tensor:
        """How much of prompts' embeddings (N, tokens, d) the projection changes: (N,), 1 for the
        concepts' on the mean, 0 for what has no part in D. `shares` (tokens,) weigh the tokens."""
        read = torch.cat(
            [part.double() @ self.down.T for part in embeddings.split(_PROMPTS_AT_ONCE)]
        )
        inverse = torch.linalg.inv(self.down @ moments.concept @ self.down.T)
        power = torch.einsum("ntr,rs,nts->nt", read, inverse, read) / len(self.down)
        weights = torch.ones(power.shape[1]) if shares is None else shares
        return power @ (weights / weights.sum()).double()


def _regression(moments: Moments, down: torch.Tensor) -> torch.Tensor:
    read = down @ moments.concept @ down.T
    return torch.linalg.solve(read, down @ moments.cross.T).T


def _trade_off_of(moments: Moments, down: torch.Tensor, worth: float) -> Rank:
    change = _regression(moments, down) @ down
    whole = float(moments.difference.trace())
    left = 1 - float((change * moments.cross).sum()) / whole
    moved = float((change @ moments.kept * change).sum()) / whole
    return Rank(len(down), worth, left, moved)

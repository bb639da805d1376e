"""What tells concepts' embeddings from those of what is kept: directions in which an adapter may
start, and from which it may be turned away."""

import torch

from sdd_lora.errors import BadInput

#: the RMS of a concept's tokens along a direction; a random row of peft's has 0.4 on the demo:
#: as high as this the other factor has less to learn, and a step turns the direction less
_ANSWER = 3.0
#: part of the kept tokens' mean variance that counts as theirs in every direction
_RIDGE = 0.01
#: the same of the concepts' tokens in `damping`
_DAMPING_RIDGE = 1e-4


def concept_directions(concepts: torch.Tensor, kept: torch.Tensor, rank: int) -> torch.Tensor:
    """Rows (rank, d), fp32, along which `concepts` (N, 77, d) have most for what `kept` (M, 77, d)
    have there.

    The leading generalised eigenvectors v of S_c v = λ (S_k + ridge · I) v, where S are the second
    moments of the tokens' embeddings (Fisher's discriminant without its means). A product of
    factors whose rows are these moves the concepts' keys and values, and the kept ones' little.
    Raises BadInput where d is less than `rank`.
    """
    width = concepts.shape[-1]
    if rank > width:
        raise BadInput(f"lora.rank: expected {width} at most, the prompts' width, found {rank}")
    s_c, s_k = second_moment(concepts), second_moment(kept)
    whitening = torch.linalg.inv(torch.linalg.cholesky(with_ridge(s_k, _RIDGE)))
    _, vectors = torch.linalg.eigh(whitening @ s_c @ whitening.T)
    rows = vectors[:, -rank:].T @ whitening
    answers = (rows @ s_c @ rows.T).diagonal().sqrt()
    return (_ANSWER * rows / answers[:, None]).float()


def damping(concepts: torch.Tensor, kept: torch.Tensor, strength: float) -> torch.Tensor:
    """What a down factor A (rank, d) is multiplied by, (d, d) fp32, to act on the tokens e of
    `concepts` (N, 77, d) as before, and less on those of `kept` (M, 77, d).

    A D is the X that minimises E_c‖(X − A) e‖² + ridge ‖X − A‖² + strength · E_k‖X e‖², whatever
    the up factor: D = (S_c + ridge · I) (S_c + ridge · I + strength · S_k)⁻¹, where S are second
    moments of tokens. The ridge leaves A alone in directions that no prompt here has.
    """
    s_c = with_ridge(second_moment(concepts), _DAMPING_RIDGE)
    return torch.linalg.solve(s_c + strength * second_moment(kept), s_c).T.float()


def with_ridge(moment: torch.Tensor, part: float) -> torch.Tensor:
    """With a part of its mean variance in every direction."""
    return moment + part * moment.trace() / len(moment) * torch.eye(len(moment)).to(moment)


def second_moment(prompts: torch.Tensor) -> torch.Tensor:
    """Mean of e eᵀ over all tokens e of (N, 77, d): (d, d), fp64."""
    flat = tokens(prompts)
    return flat.T @ flat / len(flat)


def tokens(prompts: torch.Tensor) -> torch.Tensor:
    """All tokens of (N, 77, d) in a row, fp64, on the CPU: MPS has no fp64."""
    return prompts.flatten(0, 1).cpu().double()

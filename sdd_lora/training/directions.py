"""Where an adapter may start: directions that tell concepts from what is kept."""

import torch

from sdd_lora.errors import BadInput

#: the RMS of a concept's tokens along a direction; a random row of peft's has 0.4 on the demo:
#: as high as this the other factor has less to learn, and a step turns the direction less
_ANSWER = 3.0
#: part of the kept tokens' mean variance that counts as theirs in every direction
_RIDGE = 0.01


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
    s_c, s_k = _second_moment(concepts), _second_moment(kept)
    ridge = _RIDGE * s_k.trace() / width * torch.eye(width, dtype=s_k.dtype)
    whitening = torch.linalg.inv(torch.linalg.cholesky(s_k + ridge))
    _, vectors = torch.linalg.eigh(whitening @ s_c @ whitening.T)
    rows = vectors[:, -rank:].T @ whitening
    answers = (rows @ s_c @ rows.T).diagonal().sqrt()
    return (_ANSWER * rows / answers[:, None]).float()


def _second_moment(prompts: torch.Tensor) -> torch.Tensor:
    """Mean of e eᵀ over all tokens e of (N, 77, d): (d, d), fp64."""
    tokens = prompts.flatten(0, 1).cpu().double()  # MPS has no fp64
    return tokens.T @ tokens / len(tokens)

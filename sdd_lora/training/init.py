"""Where an adapter starts (`lora.init`), and `preserve.damping`: closed forms over the embeddings,
or another adapter.

Cross-attention sees a prompt through its tokens' W e alone, for each W among to_k and to_v. Moments
are means of e eᵀ over tokens e: S_c of the concepts, S_k of kept prompts, (d, d) fp64 on the CPU.
"""

from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import broadcast

from sdd_lora.adapter.adapter import Adapter, adapter_file
from sdd_lora.adapter.metadata import StartedFrom
from sdd_lora.errors import BadInput
from sdd_lora.io.atomic import sha256_of
from sdd_lora.progress import say
from sdd_lora.recipe import Recipe
from sdd_lora.sd1 import EMBEDDINGS
from sdd_lora.training.embeddings import Embeddings
from sdd_lora.training.objectives import Objective
from sdd_lora.training.projection import with_ridge
from sdd_lora.training.roles import STUDENT, EmbeddingRoles, FactorRoles, LoraRoles

#: names of the down factors that prompts' embeddings go into
SEES_PROMPTS = (".attn2.to_k.lora_A", ".attn2.to_v.lora_A")
#: the RMS of a concept's tokens along a direction; a random row of peft's has 0.4 on the demo: as
#: high as this the other factor has less to learn, and a step turns the direction less
_DIRECTION_RMS = 3.0
#: ridges, as parts of the mean variance of a moment
_DIRECTIONS_RIDGE, _DAMPING_RIDGE, _CLOSED_FORM_RIDGE = 0.01, 1e-4, 1e-4


@torch.no_grad()
def initialise(
    roles: FactorRoles, recipe: Recipe, objective: Objective, embeddings: Embeddings
) -> StartedFrom | None:
    """Put the factors of student and teacher where `lora.init` says; returns the adapter that they
    go on from, if any.

    In all processes where the first one's are: eigenvectors' signs may differ from machine to
    machine. Raises BadInput where a matrix has less than `lora.rank`, and where the adapter to go
    on from is missing, of another rank, or of matrices that are not trained.
    """
    if recipe.lora.init == "random":  # from the seed alone, as peft does
        return None
    started_from, kept = None, embeddings.kept_and_empty
    if recipe.lora.starts_from is not None:
        started_from = continue_from(roles, recipe, recipe.lora.starts_from)
    elif embeddings.eraser is not None:
        start_as(roles, embeddings.eraser, "lora.init: words")
    elif not isinstance(roles, LoraRoles):
        raise TypeError("expected roles by adapters: no other has matrices of its own to start")
    elif recipe.lora.init == "concepts":
        start_along(roles, concept_directions(embeddings.erased, kept, recipe.lora.rank))
    else:
        erased, weight = objective.start_prompts(embeddings), recipe.preserve.weight
        start_at(roles, ClosedForm.of(erased, kept, embeddings.empty, weight))
    for factor in roles.parameters_of(STUDENT).values():
        factor.copy_(broadcast(factor.data))
    roles.copy_student_to_teacher()
    return started_from


def start_along(roles: LoraRoles, directions: torch.Tensor) -> None:
    """Give the student's down factors of to_k and to_v the rows `directions` (rank, d)."""
    for name, factor in roles.parameters_of(STUDENT).items():
        if name.endswith(SEES_PROMPTS):
            factor.copy_(directions)


def start_at(roles: LoraRoles, closed_form: "ClosedForm") -> None:
    """Give the student's to_k and to_v their factors in closed form."""
    factors = roles.parameters_of(STUDENT)
    for name, layer in roles.layers.items():
        if not f"{name}.lora_A".endswith(SEES_PROMPTS):
            continue
        down, up = closed_form.factors(_weight(roles, name), rank=len(factors[f"{name}.lora_A"]))
        factors[f"{name}.lora_A"].copy_(down)
        factors[f"{name}.lora_B"].copy_(up / layer.scaling[STUDENT])


def continue_from(roles: FactorRoles, recipe: Recipe, path: str) -> StartedFrom:
    """Give the student the factors of an adapter's file or run. Raises BadInput where it has
    another rank, other sizes, or matrices that are not trained."""
    adapter, where = Adapter.load(path), f"lora.init: {path}"
    modules = adapter.factors if isinstance(roles, EmbeddingRoles) else adapter.modules
    if ranks := sorted({part.rank for part in modules.values()} - {recipe.lora.rank}):
        raise BadInput(
            f"{where}: has rank {ranks[-1]}, found lora.rank {recipe.lora.rank}; expected the same"
        )
    start_as(roles, adapter, where)
    return StartedFrom(
        name=adapter.name, identity=adapter.identity, sha256=sha256_of(adapter_file(path))
    )


def start_as(roles: FactorRoles, adapter: Adapter, where: str) -> None:
    """Give the student an adapter's factors; of a portable one, where each to_k and to_v has its
    own, D and W·B.

    Matrices that the adapter leaves alone start with a change of 0, and that is said. Raises
    BadInput, saying `where`, for other sizes, and for matrices that are not trained.
    """
    factors = roles.parameters_of(STUDENT)
    if isinstance(roles, EmbeddingRoles):
        change = adapter.factors.get(EMBEDDINGS)
        down, up = factors[f"{EMBEDDINGS}.lora_A"], factors[f"{EMBEDDINGS}.lora_B"]
        if change is None or change.down.shape != down.shape:
            found = "one for a model" if change is None else f"width {change.down.shape[1]}"
            raise BadInput(
                f"{where}: expected a portable adapter of width {down.shape[1]}, found {found}"
            )
        down.copy_(torch.tensor(change.down))
        up.copy_(torch.tensor(change.up * np.float32(change.scale / roles.scale)))
        return
    assert isinstance(roles, LoraRoles)
    modules = adapter.modules
    if others := [name for name in modules if name not in roles.layers]:
        raise BadInput(
            f"{where}: changes {others[0]} ({len(others)} of its {len(modules)} matrices), which "
            "lora.targets leaves alone; expected targets with all of them"
        )
    for name, part in modules.items():
        down, up = factors[f"{name}.lora_A"], factors[f"{name}.lora_B"]
        shape = (len(up), *down.shape[1:])
        if not part.fits(shape):
            raise BadInput(f"{where}: {name}: made for another model's size, not for {shape}")
        start = part
        if adapter.is_portable:
            start = part.on(_weight(roles, name).float().cpu().numpy()).balanced()
        scale = np.float32(start.scale / roles.layers[name].scaling[STUDENT])
        down.copy_(torch.tensor(start.down).reshape(down.shape))
        up.copy_(torch.tensor(start.up * scale).reshape(up.shape))
    if rest := len(roles.layers) - len(modules):
        say(f"{where}: {rest} of {len(roles.layers)} matrices are not in it, and start at 0")


def _weight(roles: LoraRoles, name: str) -> torch.Tensor:
    """A linear layer's own weight (out, in), whether it is packed in 4 bits or not."""
    base = roles.layers[name].get_base_layer()
    identity = torch.eye(base.in_features, dtype=roles.unet.dtype, device=roles.unet.device)
    weight: torch.Tensor = base(identity).T
    return weight


def concept_directions(concepts: torch.Tensor, kept: torch.Tensor, rank: int) -> torch.Tensor:
    """Directions that separate concept embeddings from kept ones: rows (rank, d), fp32.

    The leading generalised eigenvectors v of S_c v = λ (S_k + ridge · I) v (Fisher's discriminant
    without its means), of `concepts` (N, 77, d) and `kept` (M, 77, d). A product of factors whose
    rows are these moves the concepts' keys and values, and the kept ones' little.
    Raises BadInput where d is less than `rank`.
    """
    width = concepts.shape[-1]
    if rank > width:
        raise BadInput(f"lora.rank: expected {width} at most, the prompts' width, found {rank}")
    s_c, s_k = second_moment(concepts), second_moment(kept)
    whitening = torch.linalg.inv(torch.linalg.cholesky(with_ridge(s_k, _DIRECTIONS_RIDGE)))
    _, vectors = torch.linalg.eigh(whitening @ s_c @ whitening.T)
    rows = vectors[:, -rank:].T @ whitening
    rms = (rows @ s_c @ rows.T).diagonal().sqrt()
    return (_DIRECTION_RMS * rows / rms[:, None]).float()


@dataclass(frozen=True)
class ClosedForm:
    """A change of the prompts' embeddings that erases, the same for every to_k and to_v.

    Where a concept's W e are ∅'s, so is the noise estimate. Of all changes X of a W,

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
        moment = second_moment(concepts) + weight * second_moment(kept)
        moment = with_ridge(moment, _CLOSED_FORM_RIDGE)
        towards = to_empty.T @ tokens(concepts) / len(to_empty)
        return cls(torch.linalg.solve(moment, towards.T).T, moment)

    def factors(self, weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Down (rank, d) and up (out, rank), fp32, for a `weight` W (out, d): of all products of
        this rank, up · down makes the sum above least. Each pair is balanced in norm.

        It is W · change cut to its leading directions in the tokens' own metric (reduced-rank
        regression). Raises BadInput where W has a lower rank.
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


def damping(concepts: torch.Tensor, kept: torch.Tensor, strength: float) -> torch.Tensor:
    """The matrix D (d, d), fp32, by which a down factor A (rank, d) is damped: A D acts on tokens e
    of `concepts` (N, 77, d) as A does, and less on tokens of `kept` (M, 77, d).

    A D is the X that minimises E_c‖(X − A) e‖² + ridge ‖X − A‖² + strength · E_k‖X e‖², whatever
    the up factor: D = (S_c + ridge · I) (S_c + ridge · I + strength · S_k)⁻¹. The ridge leaves A
    alone in directions that no prompt here has.
    """
    s_c = with_ridge(second_moment(concepts), _DAMPING_RIDGE)
    return torch.linalg.solve(s_c + strength * second_moment(kept), s_c).T.float()


def second_moment(prompts: torch.Tensor) -> torch.Tensor:
    """Mean of e eᵀ over all tokens e of (N, 77, d): (d, d), fp64."""
    flat = tokens(prompts)
    return flat.T @ flat / len(flat)


def tokens(prompts: torch.Tensor) -> torch.Tensor:
    """All tokens of (N, 77, d) in a row, (N · 77, d), fp64, on the CPU: MPS has no fp64."""
    return prompts.flatten(0, 1).cpu().double()

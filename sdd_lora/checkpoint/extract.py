"""A tuned model against its base: the change as an adapter, and what an adapter can't hold.

The two may differ in layout and dtype, and the tuned one may be partial (some weights alone, as
ESD publishes them). Tensors are read one at a time. The autoencoder is not compared: no adapter
reaches it.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from sdd_lora import sd1
from sdd_lora.adapter.adapter import Adapter
from sdd_lora.adapter.algebra import require_one_size
from sdd_lora.adapter.factors import low_rank
from sdd_lora.checkpoint.layout import Checkpoint, TensorLocation, open_checkpoint, plain_key
from sdd_lora.checkpoint.locate import locate
from sdd_lora.errors import BadInput
from sdd_lora.progress import progress, warn

#: Weights are compared in blocks of this many, so that it takes little memory.
_BLOCK_WEIGHTS = 1 << 20
_SMALLEST_FP16 = np.finfo(np.float16).smallest_subnormal.astype(np.float32)
#: Modules whose shape depends on a model's inputs, as an inpainting model's.
_OF_OTHER_CHANNELS = {"conv_in", "conv_out"}
_LDM_HEADS = {"input_blocks", "middle_block", "output_blocks", "out", "time_embed"}
_DIFFUSERS_HEADS = {
    "conv_in",
    "conv_out",
    "conv_norm_out",
    "time_embedding",
    "down_blocks",
    "mid_block",
    "up_blocks",
}


@dataclass(frozen=True)
class Extraction:
    """An adapter and what it leaves out.

    `kept` is the share of each module's squared change that its factors hold, `norms` the norm of
    that change; `outside` the norms of changes to parameters that no adapter holds (biases, norms,
    embeddings); `not_compared` names the tuned model's parameters that the base lacks, or has in
    another shape.
    """

    adapter: Adapter
    kept: dict[str, float]
    norms: dict[str, float]
    outside: dict[str, float]
    not_compared: tuple[str, ...]

    def __repr__(self) -> str:
        kept = f"{self.kept_share:.1%} of the squared change"
        return f"Extraction({self.adapter!r}, {kept})"

    @property
    def inside_share(self) -> float:
        """The share of the whole squared change that lies in modules an adapter may hold."""
        inside = sum(norm**2 for norm in self.norms.values())
        return inside / (inside + sum(norm**2 for norm in self.outside.values()))

    @property
    def kept_share(self) -> float:
        """The share of the whole squared change that the adapter holds."""
        squares = {name: norm**2 for name, norm in self.norms.items()}
        inside = sum(squares.values())
        held = sum(self.kept[name] * square for name, square in squares.items())
        return held / inside * self.inside_share if inside else 0.0


def extract(
    tuned: str | Path,
    base: str | Path,
    rank: int | None = None,
    energy: float | None = None,
) -> Extraction:
    """The best adapter for tuned − base, of a rank or of the energy to keep in each module.

    Both are MODELs; `tuned` may hold some of the weights alone. Raises BadInput where the two are
    no pair (they share no parameter, or a module is of another size), or nothing differs that an
    adapter may hold.
    """
    require_one_size(rank, energy)
    factors, kept, norms, outside = {}, {}, {}, {}
    tuned, base = locate(tuned), locate(base)
    ours, theirs = open_checkpoint(tuned), open_checkpoint(base)
    pairs, not_compared = _paired_locations(ours, theirs)
    for parameter, change in _changes(ours, theirs, pairs):
        module = parameter.removesuffix(".weight")
        norm = math.sqrt(float(np.square(change, dtype=np.float64).sum()))
        if module == parameter or module not in sd1.known_modules():
            outside[parameter] = norm
            continue
        factors[module], kept[module] = low_rank(change, rank, energy)
        norms[module] = norm
    if not factors:
        raise BadInput(
            f"{tuned}: no weight that an adapter may hold differs from {base}; "
            f"{len(outside)} other parameters do"
        )
    metadata = {"name": tuned.stem, "extracted_from": {"tuned": tuned.name, "base": base.name}}
    return Extraction(Adapter(factors, metadata), kept, norms, outside, not_compared)


def _paired_locations(
    tuned: Checkpoint, base: Checkpoint
) -> tuple[dict[str, tuple[TensorLocation, TensorLocation]], tuple[str, ...]]:
    """Where both models keep each parameter that they share, and the tuned model's other names."""
    after, before = parameters(tuned), parameters(base)
    if not after:
        raise BadInput(
            f"{tuned.path}: no weights of a Stable Diffusion 1.x UNet or text encoder in it"
        )
    pairs: dict[str, tuple[TensorLocation, TensorLocation]] = {}
    others: list[str] = []
    for name, location in after.items():
        if name not in before:
            others.append(name)
            continue
        ours, theirs = tuned.info(location).shape, base.info(before[name]).shape
        if math.prod(ours) == math.prod(theirs) and ours[:2] == theirs[:2]:
            pairs[name] = (location, before[name])
        elif name.removesuffix(".weight") in sd1.known_modules() - _OF_OTHER_CHANNELS:
            raise BadInput(
                f"{name}: has the shape {ours} in the tuned model, {theirs} in the base; "
                "they are different models"
            )
        else:
            others.append(name)
    if not pairs:
        raise BadInput(
            f"{base.path}: has no {next(iter(after))}, nor any other parameter that {tuned.path} "
            "has; give the model that it was tuned from"
        )
    lacking = [name for name in others if name.removesuffix(".weight") in sd1.known_modules()]
    if lacking:
        warn(
            f"{base.path}: {len(lacking)} modules of {tuned.path} are not in it, or of another "
            f"shape, and stay out of the adapter, the first: {lacking[0]}"
        )
    return pairs, tuple(others)


def _changes(
    tuned: Checkpoint,
    base: Checkpoint,
    pairs: Mapping[str, tuple[TensorLocation, TensorLocation]],
) -> Iterator[tuple[str, np.ndarray]]:
    """Canonical parameter name and tuned − base, fp32, of every parameter that was changed.

    A tensor of another dtype than the base's was not where none of its weights differs by more than
    one step of the coarser dtype. Raises BadInput for NaN or infinities.
    """
    with progress("comparing", len(pairs)) as advance:
        for name, (after, before) in pairs.items():
            change = _change_of(name, tuned.read(after), base.read(before))
            if change is not None:
                yield name, change
            advance()


def parameters(checkpoint: Checkpoint) -> dict[str, TensorLocation]:
    """Canonical names of the UNet's and text encoder's parameters → location, of the first set."""
    first: dict[str, set[Path]] = {}
    for weights in checkpoint.weight_sets:
        files = {location.file for location in weights.locations.values()}
        first.setdefault(weights.component, files)
    in_text_folder = first.get("text_encoder", set()) - first.get("unet", set())
    wanted = set().union(*first.values()) if first else set(checkpoint.headers)
    found = {}
    for file in (file for file in checkpoint.headers if file in wanted):
        for key, info in checkpoint.headers[file].tensors.items():
            name = canonical_parameter(key, file in in_text_folder)
            if name is not None and info.dtype[0] in "FB" and info.dtype != "BOOL":
                found[name] = TensorLocation(file, key)
    return found


def canonical_parameter(key: str, of_text_encoder: bool = False) -> str | None:
    """A parameter's name as diffusers has it; the text encoder's prefixed as adapters' modules are.

    None for what belongs to neither the UNet nor the text encoder.
    """
    key = plain_key(key)
    for prefix in (sd1.LDM_TEXT_PREFIX, sd1.TEXT_PREFIX):
        if key.startswith(prefix):
            key, of_text_encoder = key.removeprefix(prefix), True
    if of_text_encoder:
        return sd1.TEXT_LAYERS_PREFIX + key.removeprefix("text_model.")
    for prefix in (sd1.LDM_UNET_PREFIX, "diffusion_model.", sd1.UNET_PREFIX):
        key = key.removeprefix(prefix)
    head = key.partition(".")[0]
    if head in _DIFFUSERS_HEADS:
        return key
    try:
        return sd1.from_ldm(key) if head in _LDM_HEADS else None
    except KeyError:
        return None


def _change_of(name: str, after: np.ndarray, before: np.ndarray) -> np.ndarray | None:
    before = before.reshape(after.shape)
    alike = np.array_equal if after.dtype == before.dtype else _is_a_cast
    if alike(after.reshape(-1), before.reshape(-1)):
        return None
    with np.errstate(invalid="ignore"):
        change = after.astype(np.float32) - before.astype(np.float32)
    if not np.isfinite(change).all():
        raise BadInput(f"{name}: holds NaN or infinite weights, in the tuned model or in the base")
    return change


def _is_a_cast(after: np.ndarray, before: np.ndarray) -> bool:
    """Whether two vectors of different dtypes may be the same numbers, rounded on different ways.

    fp16 has finer steps than bf16, but not where its numbers become too small for it; and a model
    of another dtype may have been fp16 before.
    """
    for start in range(0, after.size, _BLOCK_WEIGHTS):
        a, b = after[start : start + _BLOCK_WEIGHTS], before[start : start + _BLOCK_WEIGHTS]
        with np.errstate(invalid="ignore"):
            difference = np.abs(a.astype(np.float32) - b.astype(np.float32))
        steps = np.maximum(_steps(a), _steps(b))
        if not (difference <= np.maximum(steps, _SMALLEST_FP16)).all():
            return False
    return True


def _steps(values: np.ndarray) -> np.ndarray:
    """The distance of each value to the next larger one of its dtype, fp32."""
    kind = ml_dtypes.finfo(values.dtype)  # type: ignore[no-untyped-call]
    size = np.maximum(np.abs(values.astype(np.float32)), np.float32(kind.smallest_normal))
    steps: np.ndarray = np.ldexp(np.float32(1), np.frexp(size)[1] - 1 - kind.nmant)
    return steps

"""The sections of a recipe. The text below a field is its reference (see `reference.py`)."""

from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from sdd_lora.io.strict_yaml import (
    Count,
    Positive,
    Real,
    Section,
    Seed,
    Switch,
    Text,
    Whole,
)

#: of `lora.targets`: all layers that ESD-u trains, by its authors' name; alone, those of LECO
NOXATTN, ATTENTION = "noxattn", "attention"
#: fields of `rollout` → the names that earlier recipes and all artefacts have for them
EARLIER_NAMES = {"timesteps_per_trajectory": "points", "prompts_per_latent": "prompts"}


class Kind(NamedTuple):
    """An objective as the other sections see it.

    `distils`: the teacher is an average of the student; else it is the base, pushed away by eta.
    `layers`: the one name that stands in `lora.targets`; empty for matrices of the cross-attention.
    `place`: where these are, in words.
    """

    distils: bool
    layers: str = ""
    place: str = "in the cross-attention"


KINDS = {
    "sdd": Kind(distils=True),
    "esd-x": Kind(distils=False),
    "esd-u": Kind(distils=False, layers=NOXATTN, place="outside the cross-attention"),
    "leco": Kind(distils=False, layers=ATTENTION, place="in self- and cross-attention"),
}


def _only(value: Any) -> BeforeValidator:
    """A field that is gone, still read where it holds its only `value`."""

    def check(found: Any) -> Any:
        if found != value:
            raise ValueError(
                f"is gone: trials found no use for it; leave it away (found {found!r})"
            )
        return value

    return BeforeValidator(check)


def listed(value: Any) -> Any:
    """A single text is a list of one; a list's file is no prompt."""
    entries = [value] if isinstance(value, str) else value
    for entry in entries if isinstance(entries, list) else []:
        if names_a_file(entry):
            raise ValueError(f"{entry}: lists in files are read by Recipe.load and Recipe.parse")
    return entries


def names_a_file(entry: Any) -> bool:
    """Whether an entry of a list is the name of a text file with entries."""
    return isinstance(entry, str) and entry.lower().endswith(".txt")


Prompts = Annotated[list[str], BeforeValidator(listed)]


class LaterFields(Section):
    """A section with fields that came later: what they leave open is not stored, so that files and
    hashes older than these fields stay as they are."""

    _later: ClassVar[tuple[str, ...]]

    @model_serializer(mode="wrap")
    def _without_unset_later(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = dump(self)
        return {k: v for k, v in fields.items() if v is not None or k not in self._later}


class Preserve(LaterFields):
    """Prompts on which the student is held to the base; the empty prompt is held with them."""

    _later = ("vocabulary",)

    prompts: Prompts = []
    """What must stay as it is, near the concepts above all: what is not named here and is near goes
    too. Texts, or names of text files beside the recipe, one prompt a line."""

    vocabulary: Count | None = None
    """So many prompts of the tokenizer's own words are preserved beside `prompts`, the words alone
    and in each other's company; without the concepts' words and those too near to them, as
    `sdd-lora erase` finds them."""

    weight: Annotated[Real, Field(ge=0)] = 1.0
    """How much these prompts count against the concepts in the loss; 0 leaves them out."""

    damping: Annotated[Real, Field(ge=0)] = 0.0
    """How much the adapter's to_k and to_v are turned away from these prompts after each quarter of
    the training, all prompts at once and without a UNet pass (training/init.py)."""

    @property
    def any(self) -> bool:
        """Whether there are prompts to preserve."""
        return bool(self.prompts or self.vocabulary)


class PictureSettings(Section):
    """Erasure where a noised picture shows the concept, whatever the prompt: there the student is
    to see a blank (training/pictures.py). The base draws concepts and kept prompts beforehand.
    Left away, none of this is done."""

    weight: Annotated[Real, Field(gt=0)] = 1.0
    """How much this counts beside the objective."""

    drawings: Positive = 6
    """Drawings of each concept."""

    kept_drawings: Positive = 2
    """Drawings of each kept prompt, of `preserve.prompts` and `preserve.vocabulary`; on these
    alone, and not on the concepts' latents, the student is held to the base, by preserve.weight."""

    batch: Positive = 12
    """Noised drawings of concepts, and as many of kept prompts, for each of an iteration's
    trajectories."""

    learnt: Count = 0
    """Prompts that are learnt beside the student to bring concepts back, and erased with the
    others: concept inversion in the loop, over mixtures of known prompts."""

    from_timestep: Annotated[Whole, Field(ge=0, lt=700)] = 150
    """The least noise that is erased in: below this timestep a picture is all but done."""


class ObjectiveSettings(Section):
    """The loss."""

    kind: Literal["sdd", "esd-x", "esd-u", "leco"] = "sdd"
    """`sdd`: safe self-distillation (Kim et al. 2023); the concept's noise estimate becomes the
    unconditional one. `esd-x` and `esd-u`: erasing concepts (Gandikota et al. 2023), in the
    cross-attention and outside it. `leco`: ESD's loss on an adapter of all attention, at rank 4 and
    alpha 1, as LECO (p1atdev 2023) has it."""

    variant: Literal["paper", "reference"] = "paper"
    """`paper`: SDD's pseudo-code, the concepts joined in one prompt. `reference`: its authors'
    released code, one concept at a time and t drawn around the latent's own."""

    guidance_scale: Real = 3.0
    """Guidance of the rollout towards the concept, s_g."""

    eta: Annotated[Real, Field(gt=0)] | None = None
    """ESD and LECO only: how far to push away from the concept, η; 1 where nothing is written, 3 in
    the "-3" rows of the SDD paper. LECO calls it guidance_scale."""

    @model_validator(mode="after")
    def _eta_is_esds(self) -> "ObjectiveSettings":
        if KINDS[self.kind].distils and self.eta is not None:
            raise ValueError("eta belongs to esd-x, esd-u and leco; sdd has no such number")
        if not KINDS[self.kind].distils and self.eta is None:
            raise ValueError(f"{self.kind} needs an eta, such as 1.0")
        return self


#: of `lora.init`: the ways to start that need no adapter
_STARTS = ("random", "concepts", "closed-form", "words")


def names_an_adapter(init: Any) -> bool:
    """Whether a `lora.init` is the path of an adapter: it has a folder or a suffix."""
    return isinstance(init, str) and any(sign in init for sign in "./\\")


def _start(value: str) -> str:
    """A way to start, or a path."""
    if value not in _STARTS and not names_an_adapter(value):
        raise ValueError(
            f"expected {', '.join(_STARTS)}, or an adapter's file or folder, such as "
            f"./{value}; found {value!r}"
        )
    return value


class Lora(Section):
    """The adapter: low-rank factors of the matrices it changes."""

    rank: Positive = 4
    """Rank of the factors, at most the prompts' width."""

    alpha: Annotated[Real, Field(gt=0)] = 4.0
    """The change is alpha / rank times the factors' product."""

    targets: Annotated[
        list[Literal["to_q", "to_k", "to_v", "to_out", "noxattn", "attention"]],
        Field(min_length=1),
    ] = ["to_k", "to_v"]
    """Matrices of the cross-attention (attn2). `noxattn`, alone for esd-u or with `pictures`: every
    linear layer and convolution outside it, but for the time embedding and the output. `attention`,
    alone and for leco: the four matrices of self- and cross-attention."""

    init: Annotated[Text, AfterValidator(_start)] = "random"
    """Where the factors start. `random`: a change of 0, as in peft. `concepts`: a change of 0, to_k
    and to_v looking where the concepts' embeddings differ most from those of kept prompts and ∅.
    `closed-form`: where the concepts' keys and values are nearest to ∅'s while those of kept
    prompts stay, weighed by preserve.weight (training/init.py). `words`: where `sdd-lora erase`
    leads, with the concepts as its words. Or an adapter to go on from: the path, beside the recipe,
    of a file or a run's folder, of the same rank; also of an eraser that `sdd-lora erase` made."""

    @property
    def starts_from(self) -> str | None:
        """The path of the adapter to go on from; None where the start needs none."""
        return self.init if names_an_adapter(self.init) else None

    @model_validator(mode="after")
    def _init_has_targets(self) -> "Lora":
        if self.init in ("concepts", "closed-form") and not {"to_k", "to_v"} & set(self.targets):
            raise ValueError(
                f"init: {self.init} starts to_k and to_v, which see prompts: expected one of them "
                "in targets, or init: random"
            )
        return self


class Ema(Section):
    """The teacher of SDD, which samples the latents: an average of the student's factors."""

    decay: Annotated[Real, Field(ge=0, lt=1)] = 0.999
    """Part of the average that an iteration keeps; 0 makes the teacher the student."""

    warmup: Switch = False
    """Start with a quicker average: min(decay, (1 + t) / (10 + t)) after iteration t."""


class Optimizer(Section):
    """How the student's factors are updated."""

    kind: Literal["adamw8bit", "adamw", "paged_adamw8bit", "lion8bit", "adafactor", "prodigy"] = (
        "adamw8bit"
    )
    """AdamW; `adamw8bit` keeps its states in 8 bits (bitsandbytes), and `paged_adamw8bit` moves
    them to the host's memory where a GPU has too little. `lion8bit` has one state instead of two
    and wants a lower learning rate, `adafactor` a mean a row and a column. `prodigy` finds the
    learning rate within some hundred iterations (`pip install 'sdd_lora[prodigy]'`)."""

    learning_rate: Annotated[Real, Field(gt=0)] = 1.0e-3
    """Of the whole training, or the highest one where a schedule or a warm-up changes it. Where
    nothing is written, 1e-4 for `lion8bit`; for `prodigy`, which it multiplies, 1."""

    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    """Decay of the factors, apart from their gradients."""

    max_grad_norm: Annotated[Real, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm, over all factors."""

    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls to 0 after the warm-up, or that it stays."""

    warmup_iterations: Count = 0
    """Iterations in which the learning rate rises from 0."""


class RolloutSettings(Section):
    """How the teacher samples the latents z_t that the loss is taken at, by DDIM."""

    steps: Annotated[Whole, Field(ge=2, le=999)] = 50
    """DDIM steps of a whole trajectory, from noise to an image."""

    timesteps_per_trajectory: Annotated[
        Positive, Field(validation_alias=AliasChoices("timesteps_per_trajectory", "points"))
    ] = 1
    """Latents that a trajectory gives to the loss on its way, one an iteration, spread evenly over
    its timesteps; fewer than `steps`. Earlier name: `points`."""

    prompts_per_latent: Annotated[
        Positive, Field(validation_alias=AliasChoices("prompts_per_latent", "prompts"))
    ] = 1
    """Concepts that each latent is used with, and as many kept prompts: a pass for the loss is
    cheap beside the steps that led to the latent. Earlier name: `prompts`."""

    batch: Positive = 1
    """Trajectories that are sampled at once; an iteration's latents."""

    # of earlier recipes; trials found no use for another value
    solver: Annotated[Any, _only("ddim"), Field(exclude=True)] = "ddim"
    guidance_interval: Annotated[Any, _only([0.0, 1.0]), Field(exclude=True)] = [0.0, 1.0]

    @property
    def points(self) -> int:
        """Earlier name of `timesteps_per_trajectory`."""
        return self.timesteps_per_trajectory

    @property
    def prompts(self) -> int:
        """Earlier name of `prompts_per_latent`."""
        return self.prompts_per_latent

    @model_validator(mode="after")
    def _timesteps_fit(self) -> "RolloutSettings":
        if self.timesteps_per_trajectory >= self.steps:
            raise ValueError(
                f"{self.timesteps_per_trajectory} timesteps_per_trajectory need more than "
                f"{self.steps} steps: each latent has a timestep of its own, none the noisiest"
            )
        return self


class Training(LaterFields):
    """Length, precision, seed."""

    _later = ("snapshot_every",)

    iterations: Count = 1500
    """Updates of the factors; 0 leaves an adapter where `lora.init: closed-form` starts it."""

    gradient_accumulation: Positive = 1
    """Losses whose gradients are averaged before an update."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the UNet's passes (autocast); the factors are fp32. fp16 needs a GPU; one
    multiplies fp32 in TF32."""

    base_precision: Literal["fp32", "bf16", "fp16", "nf4"] = "fp32"
    """How the base's weights are kept: fp32, as `precision`, or `nf4`: its linear layers in 4 bits
    and the others in `precision`."""

    gradient_checkpointing: Switch = False
    """Compute activations twice instead of keeping them: less memory, a third more arithmetic."""

    seed: Seed = 0
    """Of all randomness, with the iteration and the trajectory's number. The same bytes come out
    again on the CPU in fp32, with one number of threads; a GPU adds in no fixed order."""

    snapshot_every: Positive | None = None
    """Iterations after which the run keeps its result so far, again and again, in `snapshots/`."""

    @model_validator(mode="after")
    def _precisions_fit(self) -> "Training":
        if self.base_precision not in ("fp32", "nf4", self.precision):
            raise ValueError(
                f"base_precision {self.base_precision} needs precision {self.base_precision} too"
            )
        return self


DrawingPrecision = Literal["fp32", "fp16", "bf16"] | None


class DrawingSection(LaterFields):
    """A section with a `precision` to draw in."""

    _later: ClassVar[tuple[str, ...]] = ("precision",)


AttackName = Literal[
    "emphasis",
    "clip_skip",
    "adapter_weight",
    "noise_search",
    "completion",
    "img2img",
    "inpainting",
    "ring_a_bell",
    "inversion",
    "unlearndiffatk",
    "null_text",
    "relearning",
]


class MeasurePrompts(Section):
    """Prompts that are drawn before and after; texts, or names of text files."""

    concept: Prompts = []
    """Prompts that ask for what is erased."""

    kept: Prompts = []
    """Prompts that must not change; the detector counts each of their groups by itself."""


class MeasureSettings(DrawingSection):
    """What the card will say: images of each group of prompts, drawn before and after."""

    _later = ("precision", "attacks", "every")

    prompts: MeasurePrompts = MeasurePrompts()

    images: Positive = 32
    """Images of the concept's prompts, and of each group of kept ones."""

    steps: Annotated[Whole, Field(gt=0, le=999)] = 25
    """DDIM steps of an image."""

    guidance: Real = 5.0
    """Classifier-free guidance of an image."""

    precision: DrawingPrecision = None
    """Number format to draw in; by default fp16 on CUDA, else fp32."""

    detector: Literal["judge", "nudenet", "open_nsfw", "picture", "none"] = "none"
    """What looks at the images: the embedded model's own judge, NudeNet, Yahoo's open NSFW model;
    `picture`: nobody but you, they are drawn and not counted; `none`: nothing is drawn."""

    seed: Seed = 1000
    """Of the first image."""

    transfer: list[str] = []
    """Further models on which the adapter is measured in the same way."""

    every: Count | None = None
    """Iterations after which a training draws a few of these prompts (or of its concepts and kept
    prompts), again and again, beside the base's images: `samples/` in the run's folder, and
    TensorBoard where it is installed. The result stays the same; 0 draws nothing."""

    attacks: list[AttackName] | None = None
    """Attacks on the result, and on the model without it, at their usual strength (those of a
    bench, which has more to say: `recipes/bench/demo-attacks.yaml`), on 20 of the concept's images;
    what the card says that it withstands. Each takes its time, `inversion` most."""

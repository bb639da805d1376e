"""What a checkpoint holds and where, from headers alone: no torch, no tensor is read.

A MODEL on disk is a diffusers folder, a UNet's own folder, or one file (`.safetensors`, or a
legacy `.ckpt`) in LDM or diffusers names. It may hold a UNet several times: EMA copies beside the
weights, `variant` files in a folder. An edit that misses a copy is bypassed by whoever loads it.
"""

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sdd_lora import sd1 as names
from sdd_lora.errors import BadInput
from sdd_lora.io import torch_zip as pickles
from sdd_lora.io.safetensors import Header, TensorInfo, read_header
from sdd_lora.sd1 import Widths

Layout = Literal["diffusers", "unet", "ldm"]

FAMILIES = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
    "sdxl-refiner": "Stable Diffusion XL refiner",
    "sd3": "Stable Diffusion 3",
    "flux": "Flux",
    "controlnet": "a ControlNet",
    "adapter": "an adapter (LoRA), not a model",
    "other-unet": "a UNet of another structure",
    "unknown": "no diffusion model that this tool knows",
}
#: Labels of EMA copies, in the order of `names.ema_keys`.
EMA = ("EMA copy", "EMA copy in short names")
_LDM_VAE_PREFIX = "first_stage_model."
_UNET_STEM = "diffusion_pytorch_model"
_TEXT_STEMS = ("model", "pytorch_model")
_UNREAD = ("*.msgpack", "*.h5", "*.onnx", "*.onnx_data", "*.pb")
_FOLDER_JOURNAL = ".sdd-lora-journal"
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_PLACE = re.compile(
    r"((?:down_blocks\.\d+|mid_block|up_blocks\.\d+)\.attentions\.\d+"
    r"|(?:input_blocks\.\d+|middle_block|output_blocks\.\d+)\.\d+)"
    r"\.transformer_blocks\.(\d+)\.attn2\.to_k\.weight$"
)
#: Words in a key that give another family away, the surest first.
_MARKS = (
    ("adapter", re.compile(r"lora_|\.lora[._]|_lora\.")),
    ("controlnet", re.compile(r"^(control_model|controlnet_|input_hint_block|zero_convs)")),
    ("flux", re.compile(r"(^|\.)double_blocks\.|(^|\.)single_transformer_blocks\.")),
    ("sd3", re.compile(r"(^|\.)joint_blocks\.")),
)


@dataclass(frozen=True)
class Place:
    """Where a weight is stored."""

    file: Path
    key: str


@dataclass(frozen=True)
class Copy:
    """One complete set of a component's weights: module name (as adapters have it) → place."""

    component: Literal["unet", "text_encoder"]
    label: str
    places: dict[str, Place]

    @property
    def is_ema(self) -> bool:
        return self.label in EMA


@dataclass(frozen=True)
class Checkpoint:
    """The files that hold the UNet and the text encoder, and every copy of both in them.

    `headers` has one entry a file; `missing` names the components that aren't there at all;
    `unread` a folder's files that hold second copies of the weights: in other formats beside the
    components' own, and whole models in one file at its root.
    """

    path: Path
    layout: Layout
    headers: dict[Path, Header]
    copies: tuple[Copy, ...]
    missing: tuple[str, ...]
    unread: tuple[Path, ...] = ()

    def info(self, place: Place) -> TensorInfo:
        return self.headers[place.file].tensors[place.key]

    def shape(self, module: str) -> tuple[int, ...]:
        """Shape of a module's weight in the first copy that has it; () where none has."""
        for copy in self.copies:
            if module in copy.places:
                return self.info(copy.places[module]).shape
        return ()


@dataclass(frozen=True)
class Description:
    """A checkpoint, described: what `inspect` prints and what others decide by.

    `dtypes` counts tensors by storage (safetensors' codes: F16, BF16, F8_E4M3, …) over the UNet's
    and the text encoder's files. `unet_widths` (the four levels) and `context_width` are () and 0
    where the family is not SD 1.x.
    """

    path: Path
    family: str
    layout: Layout
    legacy: bool
    dtypes: dict[str, int]
    copies: tuple[str, ...]
    missing: tuple[str, ...]
    in_channels: int
    unet_widths: tuple[int, ...]
    context_width: int
    unet_files: tuple[Path, ...]

    @property
    def has_ema(self) -> bool:
        return any(label in EMA for label in self.copies)

    @property
    def inpainting(self) -> bool:
        return self.in_channels == 9

    @property
    def small(self) -> bool:
        """SD 1.x's structure at other widths than SD 1.x's own, as the embedded model has."""
        return self.family == "sd1" and self.unet_widths != names.SD15.blocks


def describe(path: Path) -> Description:
    """What `path` holds, of any family. Raises BadInput where it is missing or damaged."""
    return _describe(open_checkpoint(path))


def require_sd1(path: Path) -> Description:
    """`describe`, and BadInput where the model is of another family or its UNet is incomplete."""
    checkpoint = open_checkpoint(path)
    require_sd1_unet(checkpoint)
    return _describe(checkpoint)


def require_sd1_unet(checkpoint: Checkpoint) -> None:
    """Raises BadInput, naming what was found, where this is no complete SD 1.x UNet."""
    family = family_of(checkpoint)
    where = checkpoint.path
    if family != "sd1":
        found = FAMILIES[family]
        if "unet" in checkpoint.missing and family == "unknown":
            found = f"no UNet in it (missing: {', '.join(checkpoint.missing)})"
        raise BadInput(f"{where}: expected a Stable Diffusion 1.x model, found {found}")
    for copy in checkpoint.copies:
        if copy.component == "unet" and not copy.is_ema:
            _require_complete(checkpoint, copy)
    known = {place for copy in checkpoint.copies for place in copy.places.values()}
    for file, header in checkpoint.headers.items():
        for key in filter(_PLACE.search, header.tensors):
            if Place(file, key) not in known:
                raise BadInput(
                    f"{file}: {key}: of one more copy of the UNet, in unknown names, which an edit "
                    "would miss; take it out of the file"
                )


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the headers of a MODEL on disk.

    Raises BadInput where it is missing, damaged, or half-way through a change in place.
    """
    path = Path(path)
    require_settled(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise BadInput(f"{path}: no such file or folder")
    return _open_file(path)


def journal_of(path: Path) -> Path:
    """Where the journal of a change in place lies, beside a file or inside a folder."""
    return path / _FOLDER_JOURNAL if path.is_dir() else path.with_name(f"{path.name}.journal")


def require_settled(path: Path) -> None:
    """Raises BadInput where a change in place is half-way: of this MODEL, under whichever name, of
    a folder that it is in, or of a file in it."""
    for journal in filter(Path.exists, _journals_about(path)):
        model = journal.parent if journal.name == _FOLDER_JOURNAL else journal.with_suffix("")
        command = shlex.join(["sdd-lora", "unbake", str(model), str(journal), "--in-place"])
        raise BadInput(
            f"{model}: a change in place is under way, or was interrupted; where none is running, "
            f"roll it back: {command}"
        )


def _journals_about(path: Path) -> Iterator[Path]:
    yield journal_of(path)
    real = path.resolve()
    yield journal_of(real)
    yield from map(journal_of, real.parents[:2])  # a file in unet/ is in the model's folder too
    for pattern in ("*.safetensors.journal", "*/*.safetensors.journal", f"*/{_FOLDER_JOURNAL}"):
        yield from path.glob(pattern)


def read_any_header(path: Path) -> Header:
    """The header of a safetensors file, or what a legacy pickle says in its place."""
    return pickles.read_header(path) if pickles.is_pickle(path) else read_header(path)


def family_of(checkpoint: Checkpoint) -> str:
    """A key of FAMILIES: by block structure first, then by widths."""
    shapes = {
        key: info.shape
        for header in checkpoint.headers.values() for key, info in header.tensors.items()
        if not key.startswith("model_ema.")
    }  # fmt: skip
    for family, mark in _MARKS:
        if any(mark.search(key) for key in shapes):
            return family
    blocks = _transformer_blocks(shapes)
    if not blocks:
        return "unknown"
    contexts = {shape[-1] for shape in blocks.values()}
    if contexts == {2048}:
        return "sdxl"
    if contexts == {1280}:
        return "sdxl-refiner"
    unet = {module for c in checkpoint.copies if c.component == "unet" for module in c.places}
    expected = {f"{place}.transformer_blocks.0.attn2.to_k" for place in names.PLACES}
    if len(blocks) != len(expected) or not expected <= unet:
        return "other-unet"
    linear_projection = len(checkpoint.shape(next(iter(names.PLACES)) + ".proj_in")) == 2
    return "sd2" if linear_projection or contexts == {1024} else "sd1"


def widths_of(checkpoint: Checkpoint) -> Widths:
    """The widths of an SD 1.x UNet."""
    levels = {level: place for place, level in reversed(names.PLACES.items())}
    keys = [
        checkpoint.shape(f"{levels[n]}.transformer_blocks.0.attn2.to_k") for n in range(4)
    ]  # (width, context)
    first, second, third, last = (shape[0] for shape in keys)
    return Widths((first, second, third, last), keys[0][1])


def _describe(checkpoint: Checkpoint) -> Description:
    family = family_of(checkpoint)
    widths = widths_of(checkpoint) if family == "sd1" else None
    conv_in = checkpoint.shape("conv_in")
    unets = [copy for copy in checkpoint.copies if copy.component == "unet"]
    files = {place.file: None for copy in unets for place in copy.places.values()}
    return Description(
        path=checkpoint.path,
        family=family,
        layout=checkpoint.layout,
        legacy=any(pickles.is_pickle(file) for file in checkpoint.headers),
        dtypes=dict(Counter(
            info.dtype for header in checkpoint.headers.values() for info in header.tensors.values()
        )),
        copies=tuple(copy.label for copy in unets),
        missing=checkpoint.missing,
        in_channels=conv_in[1] if len(conv_in) == 4 else 0,
        unet_widths=widths.blocks if widths else (),
        context_width=widths.context if widths else 0,
        unet_files=tuple(files),
    )  # fmt: skip


def _require_complete(checkpoint: Checkpoint, copy: Copy) -> None:
    """Every linear and convolution weight of the UNet must be there, in its shape."""
    conv_in = copy.places.get("conv_in")
    channels = checkpoint.info(conv_in).shape[1] if conv_in else 4
    for module, expected in names.unet_shapes(widths_of(checkpoint), channels).items():
        place = copy.places.get(module)
        if place is None:
            raise BadInput(
                f"{checkpoint.path}: {copy.label}: expected a complete Stable Diffusion 1.x UNet, "
                f"found no weight for {module}"
            )
        if (found := checkpoint.info(place).shape) != expected:
            raise BadInput(
                f"{place.file}: {place.key}: expected the shape {expected}, found {found}"
            )


def _transformer_blocks(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The cross-attentions of one UNet (in whichever names): their to_k's shapes."""
    found: dict[str, tuple[int, ...]] = {}
    for key, shape in shapes.items():
        if (match := _PLACE.search(key)) and len(shape) == 2:
            found[match.group()] = shape
    return found


# One file


def _open_file(path: Path) -> Checkpoint:
    header = read_any_header(path)
    keys = header.tensors
    for prefix in (names.LDM_UNET_PREFIX, names.LDM_UNET_PREFIX.removeprefix("model."), ""):
        if f"{prefix}input_blocks.0.0.weight" in keys:
            return _ldm_checkpoint(path, header, prefix)
    for prefix in (names.UNET_PREFIX, ""):
        if f"{prefix}conv_in.weight" in keys and any(
            key.startswith(f"{prefix}down_blocks.") for key in keys
        ):
            unet = Copy("unet", "weights", _diffusers_places({path: header}, prefix))
            return Checkpoint(path, "unet", {path: header}, (unet,), ("vae", "text_encoder"))
    return _ldm_checkpoint(path, header, names.LDM_UNET_PREFIX)


def _ldm_checkpoint(path: Path, header: Header, prefix: str) -> Checkpoint:
    unet: dict[str, Place] = {}
    text: dict[str, Place] = {}
    again: dict[str, Place] = {}
    emas: list[dict[str, Place]] = [{} for _ in EMA]
    for key in header.tensors:
        module = key.removesuffix(".weight")
        if module == key:
            continue
        if key.startswith(names.LDM_TEXT_PREFIX):
            module = _text_module(module.removeprefix(names.LDM_TEXT_PREFIX))
            # some merges hold it twice, with and without `text_model`
            (again if module in text else text)[module] = Place(path, key)
        elif key.startswith(prefix):
            try:
                module = names.from_ldm(module.removeprefix(prefix))
            except KeyError:
                continue
            unet[module] = Place(path, key)
            canonical = names.LDM_UNET_PREFIX + key.removeprefix(prefix)
            for places, spelling in zip(emas, names.ema_keys(canonical), strict=True):
                if spelling in header.tensors:
                    places[module] = Place(path, spelling)
    copies = []
    if unet:
        copies.append(Copy("unet", "weights", unet))
    copies += [
        Copy("unet", label, places) for label, places in zip(EMA, emas, strict=True) if places
    ]
    if text:
        copies.append(Copy("text_encoder", "weights", text))
    if again:
        copies.append(Copy("text_encoder", "weights in other names", again))
    has_vae = any(key.startswith(_LDM_VAE_PREFIX) for key in header.tensors)
    missing = _absent(unet=bool(unet), vae=has_vae, text_encoder=bool(text))
    return Checkpoint(path, "ldm", {path: header}, tuple(copies), missing)


def _text_module(path: str) -> str:
    """Canonical name of a text encoder's module, with or without the level `text_model`."""
    return names.TEXT_LAYERS_PREFIX + path.removeprefix("text_model.")


def _absent(**components: bool) -> tuple[str, ...]:
    return tuple(name for name, present in components.items() if not present)


# A folder


def _open_folder(path: Path) -> Checkpoint:
    if any(path.glob(f"{_UNET_STEM}*")):
        groups, unread = _weight_files(path, (_UNET_STEM,))
        return _folder_checkpoint(path, "unet", groups, {}, unread, ("vae", "text_encoder"))
    unet, unread = _weight_files(path / "unet", (_UNET_STEM,))
    text, unread_text = _weight_files(path / "text_encoder", _TEXT_STEMS)
    vae, _ = _weight_files(path / "vae", (_UNET_STEM,))
    if not unet and not text:
        raise BadInput(
            f"{path}: expected a diffusers folder (model_index.json, unet/, vae/, text_encoder/) "
            "with safetensors or .bin weights of a UNet or a text encoder, found none"
        )
    missing = _absent(unet=bool(unet), vae=bool(vae), text_encoder=bool(text))
    unread += unread_text + _single_files(path)
    return _folder_checkpoint(path, "diffusers", unet, text, unread, missing)


def _single_files(folder: Path) -> tuple[Path, ...]:
    """Whole models in one file beside the components, as hub repositories have them; adapters and
    autoencoders aren't."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.ckpt")])
    return tuple(file for file in files if file.is_file() and _may_hold_weights(file))


def _may_hold_weights(file: Path) -> bool:
    try:
        return bool(_open_file(file).copies)
    except BadInput:  # nothing can be told of it
        return True


def _folder_checkpoint(
    path: Path, layout: Layout, unet: dict[str, list[Path]], text: dict[str, list[Path]],
    unread: Iterable[Path], missing: tuple[str, ...],
) -> Checkpoint:  # fmt: skip
    headers: dict[Path, Header] = {}
    copies = []
    for label, files in unet.items():
        group = {file: read_any_header(file) for file in files}
        headers |= group
        copies.append(Copy("unet", label, _diffusers_places(group, "")))
    for label, files in text.items():
        group = {file: read_any_header(file) for file in files}
        headers |= group
        places = _diffusers_places(group, "")
        renamed = {_text_module(module): place for module, place in places.items()}
        copies.append(Copy("text_encoder", label, renamed))
    return Checkpoint(path, layout, headers, tuple(copies), missing, tuple(unread))


def _diffusers_places(headers: dict[Path, Header], prefix: str) -> dict[str, Place]:
    places: dict[str, Place] = {}
    for file, header in headers.items():
        for key in header.tensors:
            if key.startswith(prefix) and key.endswith(".weight"):
                module = key.removeprefix(prefix).removesuffix(".weight")
                if module in places:
                    raise BadInput(f"{file}: {key}: stands in {places[module].file.name} as well")
                places[module] = Place(file, key)
    return places


def _weight_files(
    folder: Path, stems: tuple[str, ...]
) -> tuple[dict[str, list[Path]], tuple[Path, ...]]:
    """The files of each copy in a component's folder by label, and second copies left unread.

    Every `variant` is a copy of its own; what is loaded without one comes first. Pickles are read
    where there are no safetensors at all.
    """
    found: dict[str, dict[str, list[Path]]] = {".safetensors": {}, ".bin": {}}
    for file in sorted(folder.glob("*")):
        bare = _SHARD.sub("", file.name)
        stem, _, rest = bare.partition(".")
        if stem in stems and file.suffix in found:
            variant = rest.removesuffix(file.suffix.removeprefix(".")).strip(".")
            sharded = "sharded " if bare != file.name else ""
            label = f"{sharded}variant {variant}" if variant else f"{sharded}weights"
            found[file.suffix].setdefault(label, []).append(file)
    _check_indices(folder)
    unread = sorted(file for pattern in _UNREAD for file in folder.glob(pattern))
    if found[".safetensors"]:
        unread += [file for files in found[".bin"].values() for file in files]
    read = found[".safetensors"] or found[".bin"]
    in_order = sorted(read, key=lambda label: ("variant" in label, "sharded" in label, label))
    return {label: read[label] for label in in_order}, tuple(unread)


def _check_indices(folder: Path) -> None:
    """Every shard that an index file names must be there."""
    for index in sorted(folder.glob("*.index*.json")):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise BadInput(f"{index}: expected an index with a weight_map: {error}") from error
        absent = sorted(str(shard) for shard in shards if not (folder / str(shard)).is_file())
        if absent:
            raise BadInput(f"{folder}: {index.name} names {absent[0]}, which isn't there")

"""Where a checkpoint keeps its weights, from headers alone: no torch is imported.

A MODEL on disk is a diffusers folder, a UNet's own folder, or one file (safetensors, or a legacy
pickle) in LDM or diffusers names. It may hold a UNet several times: EMA copies beside the weights,
`variant` files in a folder. Whoever loads a set that an edit missed has the model without the edit.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from sdd_lora import sd1
from sdd_lora.checkpoint.copying import as_array, read_bytes
from sdd_lora.checkpoint.journal import require_no_journal
from sdd_lora.errors import BadInput
from sdd_lora.io import torch_zip
from sdd_lora.io.download import SHARD
from sdd_lora.io.safetensors import Header, TensorInfo, open_input, read_header

Layout = Literal["diffusers", "unet", "ldm"]
Component = Literal["unet", "text_encoder"]

#: Labels of a single file's EMA copies, in the order of `sd1.ema_keys`.
EMA = ("EMA copy", "EMA copy in short names")
_LDM_VAE_PREFIX = "first_stage_model."
_UNET_STEM = "diffusion_pytorch_model"
#: Names of the files that hold a component's weights in its folder.
_STEMS: dict[str, tuple[str, ...]] = {
    "unet": (_UNET_STEM,),
    "text_encoder": ("model", "pytorch_model"),
}
_WHOLE_MODELS = (".safetensors", ".ckpt")
_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")
_UNREAD = ("*.msgpack", "*.h5", "*.onnx", "*.onnx_data", "*.pb")
#: Levels that DataParallel and torch.compile add to the names of a model that is saved inside them.
_WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod)\.")


@dataclass(frozen=True)
class TensorLocation:
    """The file that holds a tensor, and the tensor's key in it."""

    file: Path
    key: str


@dataclass(frozen=True)
class WeightSet:
    """One complete set of a component's weights: module name (as adapters have it) → location."""

    component: Component
    label: str
    locations: dict[str, TensorLocation]
    is_ema: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """The files that hold the UNet and the text encoder, and every set of their weights.

    `headers` has one entry a file; `missing` names the components that aren't there at all;
    `unread` a folder's further copies of the weights: files in other formats or of other names
    beside the components' own, whole models in one file, and folders such as `checkpoint-500`.
    """

    path: Path
    layout: Layout
    headers: dict[Path, Header]
    weight_sets: tuple[WeightSet, ...]
    missing: tuple[str, ...]
    unread: tuple[Path, ...] = ()

    def sets_of(self, component: Component) -> list[WeightSet]:
        return [weights for weights in self.weight_sets if weights.component == component]

    def find(self, module: str) -> TensorLocation | None:
        """A module's weight in the first set of its component that has it."""
        for weights in self.sets_of(component_of(module)):
            if module in weights.locations:
                return weights.locations[module]
        return None

    def weight_of(self, module: str) -> np.ndarray:
        """A module's weight, read. Raises BadInput where there is none."""
        location = self.find(module)
        if location is None:
            raise BadInput(f"{self.path}: no weight for {module}")
        return self.read(location)

    def info(self, location: TensorLocation) -> TensorInfo:
        return self.headers[location.file].tensors[location.key]

    def read(self, location: TensorLocation) -> np.ndarray:
        """A tensor in its stored dtype and shape."""
        with open_input(location.file) as file:
            data = read_bytes(file, self.headers[location.file], location.key)
        return as_array(data, self.info(location))


def plain_key(key: str) -> str:
    """A tensor's key without the levels of wrappers: `module.`, `_orig_mod.`."""
    return _WRAPPERS.sub("", key)


def component_of(module: str) -> Component:
    return "text_encoder" if sd1.is_text(module) else "unet"


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the headers of a MODEL on disk.

    Raises BadInput where it is missing, damaged, or half-way through a change in place.
    """
    path = Path(path)
    require_no_journal(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise BadInput(f"{path}: no such file or folder")
    return _open_file(path)


def read_any_header(path: Path) -> Header:
    """The header of a safetensors file, or its counterpart from a legacy pickle."""
    return (
        torch_zip.read_pickle_header(path) if torch_zip.is_torch_file(path) else read_header(path)
    )


# One file


def _open_file(path: Path) -> Checkpoint:
    header = read_any_header(path)
    keys = {plain_key(key) for key in header.tensors}
    for prefix in (sd1.LDM_UNET_PREFIX, sd1.LDM_UNET_PREFIX.removeprefix("model."), ""):
        if f"{prefix}input_blocks.0.0.weight" in keys:
            return _ldm_checkpoint(path, header, prefix)
    for prefix in (sd1.UNET_PREFIX, ""):
        if f"{prefix}conv_in.weight" in keys and any(
            key.startswith(f"{prefix}down_blocks.") for key in keys
        ):
            unet = WeightSet("unet", "weights", _diffusers_locations({path: header}, prefix))
            return Checkpoint(path, "unet", {path: header}, (unet,), ("vae", "text_encoder"))
    return _ldm_checkpoint(path, header, sd1.LDM_UNET_PREFIX)


def _ldm_checkpoint(path: Path, header: Header, prefix: str) -> Checkpoint:
    unet: dict[str, TensorLocation] = {}
    text: dict[str, TensorLocation] = {}
    second_text: dict[str, TensorLocation] = {}
    emas: list[dict[str, TensorLocation]] = [{} for _ in EMA]
    stored = {plain_key(key): key for key in header.tensors}
    for key, own_key in stored.items():
        module = key.removesuffix(".weight")
        if module == key:
            continue
        location = TensorLocation(path, own_key)
        if key.startswith(sd1.LDM_TEXT_PREFIX):
            module = _text_module(module.removeprefix(sd1.LDM_TEXT_PREFIX))
            # some merges hold the text encoder twice, with and without `text_model`
            (second_text if module in text else text)[module] = location
        elif key.startswith(prefix):
            try:
                module = sd1.from_ldm(module.removeprefix(prefix))
            except KeyError:
                continue
            unet[module] = location
            canonical = sd1.LDM_UNET_PREFIX + key.removeprefix(prefix)
            for locations, spelling in zip(emas, sd1.ema_keys(canonical), strict=True):
                if spelling in stored:
                    locations[module] = TensorLocation(path, stored[spelling])
    found = [
        WeightSet("unet", "weights", unet),
        *(WeightSet("unet", label, ema, True) for label, ema in zip(EMA, emas, strict=True)),
        WeightSet("text_encoder", "weights", text),
        WeightSet("text_encoder", "weights in other names", second_text),
    ]
    has_vae = any(key.startswith(_LDM_VAE_PREFIX) for key in stored)
    missing = _absent(unet=bool(unet), vae=has_vae, text_encoder=bool(text))
    sets = tuple(weights for weights in found if weights.locations)
    return Checkpoint(path, "ldm", {path: header}, sets, missing)


def _text_module(path: str) -> str:
    """Canonical name of a text encoder's module, with or without the level `text_model`."""
    return sd1.TEXT_LAYERS_PREFIX + path.removeprefix("text_model.")


def _absent(**components: bool) -> tuple[str, ...]:
    return tuple(name for name, present in components.items() if not present)


# A folder


def _open_folder(path: Path) -> Checkpoint:
    if any(path.glob(f"{_UNET_STEM}*")):
        return _folder_checkpoint(path, "unet", {"unet": path}, ("vae", "text_encoder"), [])
    folders = {name: path / name for name in (*_STEMS, *(f"{name}_ema" for name in _STEMS))}
    there = {name: folder for name, folder in folders.items() if _holds_weights(name, folder)}
    if not there.keys() & _STEMS.keys():
        raise BadInput(
            f"{path}: expected a diffusers folder (model_index.json, unet/, vae/, text_encoder/) "
            "with safetensors or .bin weights of a UNet or a text encoder, found none"
        )
    has_vae = _holds_weights("unet", path / "vae")  # the files have the same names
    missing = _absent(unet="unet" in there, vae=has_vae, text_encoder="text_encoder" in there)
    unread = [
        *_single_files(path),
        *(folder for folder in sorted(path.iterdir()) if _is_second_copy(folder, there)),
    ]
    return _folder_checkpoint(path, "diffusers", there, missing, unread)


def _holds_weights(component: str, folder: Path) -> bool:
    return bool(_weight_files(folder, _STEMS[component.removesuffix("_ema")])[0])


def _single_files(folder: Path) -> list[Path]:
    """Whole models in one file beside the components, as hub repositories have them.

    Adapters and autoencoders are none.
    """
    files = (file for file in sorted(folder.glob("*")) if file.suffix.lower() in _WHOLE_MODELS)
    return [file for file in files if file.is_file() and _may_hold_weights(file)]


def _may_hold_weights(file: Path) -> bool:
    """Whether a file holds a UNet's or a text encoder's weights, or can't be read."""
    try:
        return bool(_open_file(file).weight_sets)
    except BadInput:
        return True


def _is_second_copy(folder: Path, known: dict[str, Path]) -> bool:
    """Whether a folder in a model's folder holds one more UNet, such as a training's checkpoint."""
    if not folder.is_dir() or folder in known.values():
        return False
    files = [file for pattern in ("*", "*/*") for file in sorted(folder.glob(pattern))]
    return any(_holds_unet(file) for file in files if file.suffix.lower() in _WEIGHTS)


def _holds_unet(file: Path) -> bool:
    """Whether a file holds a UNet with its decoder, which a ControlNet lacks; not if unreadable."""
    try:
        return any(
            "up_blocks.3.resnets.2.conv1" in w.locations for w in _open_file(file).weight_sets
        )
    except BadInput:
        return False


def _folder_checkpoint(
    path: Path,
    layout: Layout,
    folders: dict[str, Path],
    missing: tuple[str, ...],
    unread: list[Path],
) -> Checkpoint:
    """A checkpoint of components' folders; `unet_ema` beside `unet` holds its EMA copy."""
    headers: dict[Path, Header] = {}
    sets = []
    for name, folder in folders.items():
        component: Component = "text_encoder" if name.startswith("text_encoder") else "unet"
        is_ema = name.endswith("_ema")
        groups, others = _weight_files(folder, _STEMS[component])
        unread += others
        for label, files in groups.items():
            group = {file: read_any_header(file) for file in files}
            headers |= group
            locations = _diffusers_locations(group, "")
            if component == "text_encoder":
                locations = {_text_module(name): at for name, at in locations.items()}
            shown = f"EMA copy in {name}, {label}" if is_ema else label
            sets.append(WeightSet(component, shown, locations, is_ema))
    return Checkpoint(path, layout, headers, tuple(sets), missing, tuple(unread))


def _diffusers_locations(headers: dict[Path, Header], prefix: str) -> dict[str, TensorLocation]:
    locations: dict[str, TensorLocation] = {}
    for file, header in headers.items():
        for key in header.tensors:
            plain = plain_key(key)
            if plain.startswith(prefix) and plain.endswith(".weight"):
                module = plain.removeprefix(prefix).removesuffix(".weight")
                if module in locations:
                    other = locations[module].file.name
                    raise BadInput(f"{file}: {key}: stands in {other} as well")
                locations[module] = TensorLocation(file, key)
    return locations


def _weight_files(
    folder: Path, stems: tuple[str, ...]
) -> tuple[dict[str, list[Path]], tuple[Path, ...]]:
    """The files of each weight set in a component's folder by label, and copies left unread.

    Every `variant` is a set of its own; the one that loaders take by default comes first. Pickles
    are read where there are no safetensors at all.
    """
    found: dict[str, dict[str, list[Path]]] = {".safetensors": {}, ".bin": {}}
    others = []
    for file in sorted(folder.glob("*")):
        bare = SHARD.sub("", file.name)
        stem, _, rest = bare.partition(".")
        suffix = file.suffix.lower()
        if stem in stems and suffix in found:
            variant = rest.removesuffix(file.suffix.removeprefix(".")).strip(".")
            sharded = "sharded " if bare != file.name else ""
            label = f"{sharded}variant {variant}" if variant else f"{sharded}weights"
            found[suffix].setdefault(label, []).append(file)
        elif suffix in _WEIGHTS and _holds_unet(file):
            others.append(file)
    _check_indices(folder)
    unread = sorted(file for pattern in _UNREAD for file in folder.glob(pattern)) + others
    if found[".safetensors"]:
        unread += [file for files in found[".bin"].values() for file in files]
    read = found[".safetensors"] or found[".bin"]
    in_order = sorted(read, key=lambda label: ("variant" in label, "sharded" in label, label))
    return {label: read[label] for label in in_order}, tuple(unread)


def _check_indices(folder: Path) -> None:
    """Raises BadInput where a shard that an index file names is missing."""
    for index in sorted(folder.glob("*.index*.json")):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise BadInput(f"{index}: expected an index with a weight_map: {error}") from error
        absent = sorted(str(shard) for shard in shards if not (folder / str(shard)).is_file())
        if absent:
            raise BadInput(f"{folder}: {index.name} names {absent[0]}, which isn't there")

"""Who will load an adapter's file, by each loader's own rules.

`tests/adapter/loader_rules.md` says which version of which loader each rule was checked against.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sdd_lora import sd1 as names
from sdd_lora.adapter import formats
from sdd_lora.adapter.alphas import PEFT_CONFIG_FILE, PEFT_METADATA_KEY, PEFT_MODEL_FILE
from sdd_lora.adapter.inspect import AdapterDescription

_PREFIXES = (names.UNET_PREFIX, names.TEXT_PREFIX)
_TO_KOHYA = "convert it to kohya"
_TO_PEFT_FOLDER = "convert it to peft, onto a folder's name"
_LACKING_IN_SD_SCRIPTS = ("conv_in", "conv_out", "time_embedding")


@dataclass(frozen=True)
class LoaderVerdict:
    """Whether a program loads a file with its full effect, and why not, or what it reads."""

    loader: str
    loads: bool
    why: str


def verdicts(description: AdapterDescription) -> list[LoaderVerdict]:
    """One verdict a loader."""
    if description.format == "portable":
        why = "made for every model; `sdd-lora convert --base MODEL` makes the file for yours"
        return [LoaderVerdict(loader, False, why) for loader in _OBJECTIONS]
    found = []
    for loader, objections in _OBJECTIONS.items():
        reason = next(objections(description), None)
        found.append(LoaderVerdict(loader, reason is None, reason or f"reads {description.format}"))
    return found


def _a1111(description: AdapterDescription) -> Iterator[str]:
    if not _formats(description) <= {"kohya", "ldm"}:
        yield f"ignores the keys of the format {description.format} in silence; {_TO_KOHYA}"
    yield from _of_user_interfaces(description)


def _comfyui(description: AdapterDescription) -> Iterator[str]:
    if not _formats(description) <= {"kohya", "ldm", "attn-procs", "comfyui"}:
        yield f"doesn't know the keys of the format {description.format}; {_TO_KOHYA}"
    for module, part, key in _tensors(description):
        old = part != "alpha" and formats.format_of_key(key) == "attn-procs"
        if old and not names.is_text(module) and ".processor." not in key:
            yield f"ignores {key}: it knows .processor.to_…_lora alone; {_TO_KOHYA}"
    yield from _of_user_interfaces(description)


def _invokeai(description: AdapterDescription) -> Iterator[str]:
    unet = [name for name in description.ranks if not names.is_text(name)]
    if _formats(description) != {"kohya"}:
        yield f"doesn't load the format {description.format}; {_TO_KOHYA}"
    elif any(name.endswith("time_emb_proj") for name in unet):
        yield "takes a file with time_emb_proj for SDXL"
    elif len(unet) == len(description.ranks) and not any(
        name.endswith(("attn2.to_k", "attn2.to_v")) for name in unet
    ):
        yield "tells the model family by attn2.to_k or to_v, and there is neither"
    yield from _of_user_interfaces(description)


def _sd_scripts(description: AdapterDescription) -> Iterator[str]:
    if _formats(description) != {"kohya"} or any("lora_te1_" in k for k in _keys(description)):
        yield f"doesn't know all keys of the format {description.format}; {_TO_KOHYA}"
    lacking = [name for name in description.ranks if name.startswith(_LACKING_IN_SD_SCRIPTS)]
    if lacking:
        count = f"{len(lacking)} of {len(description.ranks)} modules"
        yield f"has no modules conv_in, conv_out and time_embedding: loses {count}"
    yield from _of_user_interfaces(description)


def _diffusers(description: AdapterDescription) -> Iterator[str]:
    found, has_alphas = _formats(description), _has_alphas(description)
    if len(found) > 1:
        yield f"loads one format at a time, found {' and '.join(sorted(found))}; {_TO_KOHYA}"
    elif "ldm" in found:
        yield f"refuses LDM block names; {_TO_KOHYA}"
    elif "kohya" not in found and not all(key.startswith(_PREFIXES) for key in _keys(description)):
        yield "its pipeline loads nothing without the prefix unet., and only warns; convert it"
    elif has_alphas and PEFT_METADATA_KEY in description.header.metadata:
        yield f"refuses .alpha together with {PEFT_METADATA_KEY}; {_TO_KOHYA}"
    elif "kohya" not in found and has_alphas:
        yield f"refuses .alpha in the format {description.format}; {_TO_KOHYA}"
    elif wrong := _mis_scaled_by_diffusers(description):
        yield f"loads it, but {len(wrong)} modules at wrong scales, {wrong[0]} first; {_TO_KOHYA}"
    yield from _misshapen(description)
    yield from _unread_alphas(description, PEFT_METADATA_KEY)


def _peft(description: AdapterDescription) -> Iterator[str]:
    beside = description.path.with_name(PEFT_CONFIG_FILE)
    if _formats(description) != {"peft-folder"} or description.path.name != PEFT_MODEL_FILE:
        yield f"reads a folder of {PEFT_CONFIG_FILE} and {PEFT_MODEL_FILE}; {_TO_PEFT_FOLDER}"
    elif not beside.is_file():
        yield f"needs {PEFT_CONFIG_FILE} beside it, which is missing; {_TO_PEFT_FOLDER}"
    elif _has_alphas(description):
        yield f"doesn't read .alpha; {_TO_PEFT_FOLDER}"
    yield from _misshapen(description)
    yield from _unread_alphas(description, PEFT_CONFIG_FILE)


_OBJECTIONS: dict[str, Callable[[AdapterDescription], Iterator[str]]] = {
    "A1111": _a1111,
    "ComfyUI": _comfyui,
    "InvokeAI": _invokeai,
    "sd-scripts": _sd_scripts,
    "diffusers": _diffusers,
    "peft": _peft,
}


def _of_user_interfaces(description: AdapterDescription) -> Iterator[str]:
    if names.misfits(description.shapes, names.module_shapes(names.SD15)):
        yield "its matrices fit no Stable Diffusion 1.5, only a model of its base's size"
    yield from _unread_alphas(description)


def _unread_alphas(description: AdapterDescription, *read: str) -> Iterator[str]:
    """Alphas that stand where the loader doesn't look, and aren't what it takes then: the rank."""
    if description.alphas_from in ("", *read):
        return
    scales = description.scales.items()
    if any(scale != 1 for name, scale in scales if "alpha" not in description.keys[name]):
        yield f"loads it at a wrong scale: it doesn't read {description.alphas_from}; {_TO_KOHYA}"


def _misshapen(description: AdapterDescription) -> Iterator[str]:
    """Factors must have as many dimensions as the weight; A1111 and ComfyUI reshape them."""
    for module, part, key in _tensors(description):
        dimensions = len(description.header.tensors[key].shape)
        if part != "alpha" and dimensions != len(description.shapes[module]):
            yield f"refuses {dimensions}-D factors of {module}; convert it"


def _mis_scaled_by_diffusers(description: AdapterDescription) -> list[str]:
    """Modules that diffusers gives the most frequent alpha of the UNet, or of the text encoder,
    where they have another: those of attention, and those without an alpha of their own.
    """
    stored = {module for module, parts in description.keys.items() if "alpha" in parts}
    alphas = {
        name: round(scale * description.ranks[name], 6)
        for name, scale in description.scales.items()
    }
    wrong: list[str] = []
    for is_text in (False, True):
        counted = Counter(alphas[name] for name in stored if names.is_text(name) is is_text)
        most = max(counted.values(), default=0)
        usual = {alpha for alpha, count in counted.items() if count == most}
        wrong += [
            name
            for name, alpha in alphas.items()
            if counted
            and names.is_text(name) is is_text
            and (names.is_attention(name) or name not in stored)
            and usual != {alpha}
        ]
    return wrong


def _formats(description: AdapterDescription) -> set[str]:
    return {formats.format_of_key(key) for key in _keys(description) if not key.endswith(".alpha")}


def _keys(description: AdapterDescription) -> Iterator[str]:
    return (key for _, _, key in _tensors(description))


def _tensors(description: AdapterDescription) -> Iterator[tuple[str, str, str]]:
    """Module, part ("down", "up", "alpha") and key of each tensor."""
    for module, parts in description.keys.items():
        yield from ((module, part, key) for part, key in parts.items())


def _has_alphas(description: AdapterDescription) -> bool:
    return any("alpha" in parts for parts in description.keys.values())

"""Who will load an adapter's file, by each loader's own rules: A1111 1.10, ComfyUI 2025-08,
InvokeAI, diffusers 0.41 and 0.42 (earlier ones lose kohya's conv_in) and peft.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from sdd_lora import sd1 as names
from sdd_lora.adapter import formats
from sdd_lora.adapter.alphas import PEFT_METADATA_KEY
from sdd_lora.adapter.inspect import AdapterDescription

_TO_KOHYA = "convert it with --to kohya"


@dataclass(frozen=True)
class LoaderVerdict:
    """Whether a program loads a file with its full effect, and why not, or what it reads."""

    loader: str
    loads: bool
    why: str


def verdicts(description: AdapterDescription) -> list[LoaderVerdict]:
    """One verdict a loader."""
    judges = {
        "A1111": _a1111, "ComfyUI": _comfyui, "InvokeAI": _invokeai, "diffusers": _diffusers,
        "peft": _peft,
    }  # fmt: skip
    found = []
    for loader, objections in judges.items():
        reason = next(objections(description), None)
        found.append(LoaderVerdict(loader, reason is None, reason or f"reads {description.format}"))
    return found


def _formats(description: AdapterDescription) -> set[str]:
    keys = (key for key in description.header.tensors if not key.endswith(".alpha"))
    return {formats.format_of_key(key) for key in keys}


def _a1111(description: AdapterDescription) -> Iterator[str]:
    if not _formats(description) <= {"kohya", "ldm"}:
        yield f"ignores the keys of the format {description.format} in silence; {_TO_KOHYA}"


def _comfyui(description: AdapterDescription) -> Iterator[str]:
    if not _formats(description) <= {"kohya", "ldm", "attn-procs"}:
        yield f"doesn't know the UNet's keys in the format {description.format}; {_TO_KOHYA}"


def _invokeai(description: AdapterDescription) -> Iterator[str]:
    if _formats(description) != {"kohya"}:
        yield f"doesn't load the format {description.format}; {_TO_KOHYA}"
    elif not any(name.endswith(("attn2.to_k", "attn2.to_v")) for name in description.ranks):
        yield "tells the model family by attn2.to_k or to_v, and there is neither"


def _diffusers(description: AdapterDescription) -> Iterator[str]:
    formats_found, has_alphas = _formats(description), _has_alphas(description)
    if len(formats_found) > 1:
        mixed = " and ".join(sorted(formats_found))
        yield f"loads one format at a time, found {mixed}; {_TO_KOHYA}"
    elif "ldm" in formats_found:
        yield f"refuses LDM block names; {_TO_KOHYA}"
    elif "kohya" not in formats_found and not _all_prefixed(description):
        yield "its pipeline loads nothing without the prefix unet., and only warns; convert it"
    elif has_alphas and PEFT_METADATA_KEY in description.header.metadata:
        yield f"refuses .alpha together with {PEFT_METADATA_KEY}; {_TO_KOHYA}"
    elif "kohya" not in formats_found and has_alphas:
        yield f"refuses .alpha in the format {description.format}; {_TO_KOHYA}"
    elif "kohya" in formats_found and not _alphas_agree(description):
        yield f"loads it, but at wrong scales: alphas differ between modules; {_TO_KOHYA}"
    yield from _misshapen(description)


def _peft(description: AdapterDescription) -> Iterator[str]:
    if not _formats(description) <= {"peft", "bare"}:
        yield f"doesn't know the format {description.format}; convert it with --to peft"
    elif _has_alphas(description):
        yield "doesn't read .alpha; convert it with --to peft"
    yield from _misshapen(description)


def _misshapen(description: AdapterDescription) -> Iterator[str]:
    """Factors must have as many dimensions as the weight; A1111 and ComfyUI reshape them."""
    for module, part, key in _tensors(description):
        dimensions = len(description.header.tensors[key].shape)
        if part != "alpha" and dimensions != len(description.shapes[module]):
            yield f"refuses {dimensions}-D factors of {module}; convert it"


def _tensors(description: AdapterDescription) -> Iterator[tuple[str, str, str]]:
    """Module, part ("down", "up", "alpha") and key of each tensor."""
    for module, parts in description.keys.items():
        yield from ((module, part, key) for part, key in parts.items())


def _all_prefixed(description: AdapterDescription) -> bool:
    prefixes = (names.UNET_PREFIX, names.TEXT_PREFIX)
    return all(key.startswith(prefixes) for key in description.header.tensors)


def _has_alphas(description: AdapterDescription) -> bool:
    return any(key.endswith(".alpha") for key in description.header.tensors)


def _alphas_agree(description: AdapterDescription) -> bool:
    """diffusers applies the UNet's most frequent alpha to all of it, and the text encoder's to all
    of that; and 1 · rank where none is.
    """
    stored = {names.is_text(name) for name, part, _ in _tensors(description) if part == "alpha"}
    alphas = {
        (names.is_text(name), round(scale * description.ranks[name], 6))
        for name, scale in description.scales.items()
        if names.is_text(name) in stored
    }
    return len(alphas) == len(stored)

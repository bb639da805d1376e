"""Safety adapters in ComfyUI: *Load safety adapter* and *Bake safety adapter*.

This one file is all of it: it needs neither sdd_lora nor another package in ComfyUI. Copy it into
ComfyUI's folder `custom_nodes`, or have it copied there, and start ComfyUI again:

    python -m sdd_lora.comfyui ComfyUI/custom_nodes

Adapters lie in `models/loras`. Both nodes take ordinary LoRA files of SD 1.x in kohya's format, and
erasers of `sdd-lora erase`, which change the prompt's embedding: e ↦ (I + B D) e.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: tensors of an eraser of `sdd-lora erase`: D (r, d) and B (d, r)
_READS, _WRITES = "embeddings.lora_down.weight", "embeddings.lora_up.weight"
_UNET, _TOKENS = "diffusion_model.", 77
#: matrices of the UNet, by ComfyUI's names, that read the prompt's embedding
_READ_EMBEDDINGS = (".attn2.to_k.weight", ".attn2.to_v.weight")
_NO_LAYERS = "the model has no attn2.to_k that reads prompts; expected one of SD 1.x"
#: in the folder `custom_nodes`
FILE_NAME = "sdd_lora_nodes.py"

Tensors = dict[str, Tensor]
#: the gain (B,) of the samples whose prompts' embeddings (B, tokens, d) are given
Gain = Callable[[Tensor], Tensor]


class LoadSafetyAdapter:
    """An adapter on a model. Without a gate an ordinary one is a LoRA like any other; with it, and
    always for erasers, the weights stay as they are and the change is made while they are used."""

    CATEGORY, FUNCTION = "loaders/safety", "load"
    RETURN_TYPES = ("MODEL", "CLIP")
    DESCRIPTION = (
        "Keeps a model from drawing something. With the gate, a prompt gets the adapter as far as "
        "it is near the concept; that needs CLIP."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        inputs = _inputs()
        inputs["required"]["gate"] = (["off", "by prompt"],)
        inputs["optional"]["concept"] = ("STRING", {"default": "", "multiline": False})
        return inputs

    def load(
        self,
        model: Any,
        adapter: str,
        weight: float,
        gate: str,
        clip: Any = None,
        concept: str = "",
    ) -> tuple[Any, Any]:
        """The model with the adapter, and CLIP, which an ordinary adapter may change too.

        `concept` is what the gate compares prompts with: texts with commas between them; by default
        those that the file says it erases. Raises ValueError for a file that doesn't fit.
        """
        tensors, metadata = read_adapter(_path_of(adapter))
        gain: Gain = lambda prompts: torch.full((len(prompts),), weight)  # noqa: E731
        if gate == "by prompt":
            concepts = named_concepts(concept, metadata)
            gain = similarity_gain(_embedded(clip, concepts, adapter), weight)
        elif _READS not in tensors:
            return patched(model, clip, tensors, weight, adapter)
        return with_hooks(model, hooks_of(model, tensors, adapter), gain), clip


class BakeSafetyAdapter:
    """An adapter in a model's weights, so that *Save Checkpoint* and *Save Model* write it."""

    CATEGORY, FUNCTION = "loaders/safety", "bake"
    RETURN_TYPES = ("MODEL", "CLIP")
    DESCRIPTION = (
        "Writes an adapter into the weights: connect it to Save Checkpoint. An eraser takes the "
        "weights as the nodes before it left them, so put it last."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        return _inputs()

    def bake(self, model: Any, adapter: str, weight: float, clip: Any = None) -> tuple[Any, Any]:
        """The patched model and CLIP. Raises ValueError for a file that doesn't fit."""
        tensors, _ = read_adapter(_path_of(adapter))
        if _READS in tensors:
            tensors = on_model(model, tensors, adapter)
        return patched(model, clip, tensors, weight, adapter)


NODE_CLASS_MAPPINGS = {
    "LoadSafetyAdapter": LoadSafetyAdapter,
    "BakeSafetyAdapter": BakeSafetyAdapter,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LoadSafetyAdapter": "Load safety adapter",
    "BakeSafetyAdapter": "Bake safety adapter",
}


def _inputs() -> dict[str, Any]:
    """What both nodes take."""
    import folder_paths

    weight = {"default": 1.0, "min": -4.0, "max": 4.0, "step": 0.05}
    return {
        "required": {
            "model": ("MODEL",),
            "adapter": (folder_paths.get_filename_list("loras"),),
            "weight": ("FLOAT", weight),
        },
        "optional": {"clip": ("CLIP",)},
    }


def _path_of(adapter: str) -> str:
    import folder_paths

    path = folder_paths.get_full_path("loras", adapter)
    if path is None:
        raise ValueError(f"{adapter}: no such file in models/loras")
    return str(path)


# ── files ────────────────────────────────────────────────────────────────────────────────────────


def read_adapter(path: str) -> tuple[Tensors, dict[str, Any]]:
    """A safetensors file's tensors, and what sdd_lora wrote into its header."""
    from safetensors import safe_open

    if not path.endswith(".safetensors"):
        raise ValueError(f"{path}: expected a .safetensors file; others may run programs")
    with safe_open(path, "pt") as file:
        entry = (file.metadata() or {}).get("sdd_lora", "{}")
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(entry)  # noqa: SIM118


def named_concepts(text: str, metadata: Mapping[str, Any]) -> list[str]:
    """The texts in `text`, by commas; where it is empty, the concepts that the file names."""
    typed = [part.strip() for part in text.split(",") if part.strip()]
    found = typed or list(metadata.get("concepts", []))
    if not found:
        raise ValueError("gate by prompt: the file names no concept; expected one in `concept`")
    return found


def _keys_of_model(model: Any) -> dict[str, str]:
    """Stems of LoRA files' keys → keys of the UNet's weights."""
    import comfy.lora

    return dict(comfy.lora.model_lora_keys_unet(model.model, {}))


def _stems(tensors: Mapping[str, Tensor]) -> set[str]:
    """The files' keys without the part that says which factor they are."""
    return {key.partition(".lora_")[0].removesuffix(".alpha") for key in tensors}


# ── weights ──────────────────────────────────────────────────────────────────────────────────────


def patched(model: Any, clip: Any, tensors: Tensors, weight: float, name: str) -> tuple[Any, Any]:
    """A clone of the model, and of CLIP, that adds the adapter to its weights, as ComfyUI does.

    Raises ValueError where ComfyUI would leave a matrix out, which it only logs.
    """
    import comfy.lora
    import comfy.sd

    known = _keys_of_model(model)
    if clip is not None:
        known |= comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    if lost := sorted(_stems(tensors) - known.keys()):
        text = any(stem.startswith("lora_te") for stem in lost) and clip is None
        advice = "connect CLIP" if text else "sdd-lora convert --to kohya renames other formats"
        raise ValueError(f"{name}: the model has no {lost[0]} ({len(lost)} such keys); {advice}")
    clone, clip_clone = comfy.sd.load_lora_for_models(model, clip, tensors, weight, weight)
    return clone, clip_clone


def on_model(model: Any, eraser: Tensors, name: str) -> Tensors:
    """An ordinary LoRA of what an eraser is to a model's own weights: ΔW = (W B) D."""
    import comfy.lora

    down, up = eraser[_READS].float(), eraser[_WRITES].float()
    stems = {key: stem for stem, key in _keys_of_model(model).items() if stem.startswith("lora_")}
    found: Tensors = {}
    for key, entries in model.get_key_patches(_UNET).items():
        if not key.endswith(_READ_EMBEDDINGS):
            continue
        first, *patches = entries  # the weight alone, or with a function that unpacks it
        weight = first[1](first[0]) if isinstance(first, tuple) else first
        weight = weight.detach().to("cpu", torch.float32, copy=True)
        if patches:
            weight = comfy.lora.calculate_weight(patches, weight, key)
        _require_width(weight.shape[1], down, name)
        found[f"{stems[key]}.lora_up.weight"] = weight @ up * _scale(eraser, "embeddings", down)
        found[f"{stems[key]}.lora_down.weight"] = down
    if not found:
        raise ValueError(f"{name}: {_NO_LAYERS}")
    return found


def _require_width(found: int, down: Tensor, name: str) -> None:
    if found != down.shape[1]:
        raise ValueError(
            f"{name}: changes embeddings of width {down.shape[1]}, the model reads {found}"
        )


def _scale(tensors: Tensors, stem: str, down: Tensor) -> float:
    """alpha / rank; 1 where the file has no alpha."""
    alpha = tensors.get(f"{stem}.alpha")
    return 1.0 if alpha is None else float(alpha) / len(down)


# ── the gate ─────────────────────────────────────────────────────────────────────────────────────


def _embedded(clip: Any, concepts: list[str], name: str) -> Tensor:
    """The concepts' embeddings (N, 77, d)."""
    if clip is None:
        raise ValueError(f"{name}: gate by prompt compares embeddings; connect CLIP")
    found = [clip.encode_from_tokens(clip.tokenize(concept)) for concept in concepts]
    return torch.cat([embedding[:, :_TOKENS].float().cpu() for embedding in found])


def similarity_gain(concepts: Tensor, weight: float) -> Gain:
    """weight × the cosine, from 0 to 1, of a prompt's embedding and the nearest concept's.

    Of concepts (N, 77, d), flattened as SPM does (Lyu et al. 2023); of a longer prompt the nearest
    part of 77 tokens counts. A negative or empty prompt gets the gain of its own text. All prompts
    share their first token's embedding, so that unrelated ones get a part of the weight too.
    """
    wanted = torch.nn.functional.normalize(concepts.flatten(1), dim=1)

    def gain(prompts: Tensor) -> Tensor:
        parts = [p for p in prompts.float().cpu().split(_TOKENS, 1) if p.shape[1] == _TOKENS]
        flat = torch.nn.functional.normalize(torch.stack(parts, 1).flatten(2), dim=2)
        return weight * (flat @ wanted.T).amax(dim=(1, 2)).clamp(0, 1)

    return gain


class _Change:
    """What an adapter adds at one layer, for the gain that the samples have now."""

    def __init__(self, layer: torch.nn.Module, tensors: Tensors, stem: str) -> None:
        self.layer, self.gain = layer, torch.ones(1)
        self.down = tensors[f"{stem}.lora_down.weight"].float()
        self.up = tensors[f"{stem}.lora_up.weight"].float()
        self.scale = _scale(tensors, stem, self.down)
        self.before = stem == "embeddings"

    def register(self) -> Any:
        if self.before:
            return self.layer.register_forward_pre_hook(
                lambda _, inputs: (self._added(inputs[0], inputs[0]), *inputs[1:])
            )
        return self.layer.register_forward_hook(
            lambda _, inputs, output: self._added(inputs[0], output)
        )

    def _added(self, inputs: Tensor, output: Tensor) -> Tensor:
        down, up = self.down.to(inputs), self.up.to(inputs)
        if isinstance(self.layer, torch.nn.Conv2d):
            down = down.reshape(len(down), inputs.shape[1], *self.layer.kernel_size)
            stride, padding = self.layer.stride, self.layer.padding
            change = torch.nn.functional.conv2d(inputs, down, None, stride, padding)
            change = torch.nn.functional.conv2d(change, up.reshape(len(up), -1, 1, 1))
        else:
            change = inputs @ down.flatten(1).T @ up.flatten(1).T
        gain = self.gain.repeat_interleave(len(output) // len(self.gain)).to(output)
        return output + self.scale * gain.view(-1, *[1] * (output.ndim - 1)) * change


def hooks_of(model: Any, tensors: Tensors, name: str) -> list[_Change]:
    """The changes that an adapter makes in the UNet, layer by layer."""
    if _READS in tensors:
        state = model.model.state_dict()
        keys = [k for k in state if k.startswith(_UNET) and k.endswith(_READ_EMBEDDINGS)]
        if not keys:
            raise ValueError(f"{name}: {_NO_LAYERS}")
        _require_width(state[keys[0]].shape[1], tensors[_READS], name)
        layers = [(key, "embeddings") for key in keys]
    else:
        known = _keys_of_model(model)
        if lost := sorted(_stems(tensors) - known.keys()):
            reason = "only layers of the UNet, in kohya's format, can be gated"
            raise ValueError(f"{name}: {lost[0]} ({len(lost)} such keys): {reason}")
        layers = [(known[stem], stem) for stem in sorted(_stems(tensors))]
    return [
        _Change(model.model.get_submodule(key.removesuffix(".weight")), tensors, stem)
        for key, stem in layers
    ]


def with_hooks(model: Any, changes: list[_Change], gain: Gain) -> Any:
    """A clone of the model that makes the changes while the UNet runs, and only then: the UNet
    itself is shared by all clones. A wrapper that the model has already stays inside."""
    clone = model.clone()
    inner = clone.model_options.get("model_function_wrapper")

    def wrapper(apply_model: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
        prompts = arguments["c"]["c_crossattn"]
        now = gain(prompts)
        with _registered(changes, now):
            if inner is not None:
                return inner(apply_model, arguments)
            return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    clone.set_model_unet_function_wrapper(wrapper)
    return clone


@contextmanager
def _registered(changes: list[_Change], gain: Tensor) -> Iterator[None]:
    for change in changes:
        change.gain = gain
    handles = [change.register() for change in changes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ── python -m sdd_lora.comfyui ───────────────────────────────────────────────────────────────────


def main(arguments: list[str] | None = None) -> int:
    """Copy this file into a folder, or print it; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sdd_lora.comfyui", description="Two nodes for ComfyUI, in one file."
    )
    parser.add_argument("folder", nargs="?", help="ComfyUI's custom_nodes [default: print it]")
    parser.add_argument("--force", action="store_true", help="replace the file that is there")
    options = parser.parse_args(arguments)
    source = Path(__file__)
    if options.folder is None:
        print(source.read_text("utf-8"), end="")
        return 0
    folder = Path(options.folder)
    target = folder / FILE_NAME
    problem = None
    if not folder.is_dir():
        problem = f"{folder}: no such folder; expected ComfyUI's custom_nodes"
    elif target.exists() and not options.force:
        problem = f"{target}: is there already; add --force to replace it"
    if problem is not None:
        print(f"sdd-lora: {problem}", file=sys.stderr)
        return 2
    shutil.copyfile(source, target)
    print(f"{target}; start ComfyUI again, the nodes are under loaders/safety")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

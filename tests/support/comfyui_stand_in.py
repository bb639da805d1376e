"""As much of ComfyUI as its LoRA nodes touch, written from its rules, in the embedded model's size.

- A model is a `ModelPatcher` around a shared module, whose UNet lies under `diffusion_model.` by
  LDM's names. `clone` copies patches and options, never weights.
- `add_patches(patches, strength)` queues (strength, patch, strength_model, offset, function) for
  keys of the module's state, and returns the keys that it has.
- `get_key_patches(prefix)` gives each key's [(weight, function that unpacks it), *patches].
- A file's keys are looked up in a map of stems, which both naming schemes are in; keys that are
  not in it are logged and passed by.
- The wrapper of the UNet gets apply_model and {input, timestep, c, cond_or_uncond}.
"""

import logging
import sys
import types
from typing import Any

import torch

from sdd_lora import sd1

SHAPES = {
    name: shape
    for name, shape in sd1.unet_shapes(sd1.DEMO).items()
    if name.endswith(("attn2.to_k", "attn2.to_v"))
}
KEYS = {name: f"diffusion_model.{sd1.to_ldm(name)}.weight" for name in SHAPES}


class Unet(torch.nn.Module):
    """The matrices that read a prompt; its estimate is all that they make of it, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.diffusion_model = torch.nn.Module()
        generator = torch.Generator().manual_seed(0)
        for name, (out, wide) in SHAPES.items():
            layer = torch.nn.Linear(wide, out, bias=False)
            layer.weight.data = torch.randn(out, wide, generator=generator) / wide**0.5
            layer.requires_grad_(False)
            place: torch.nn.Module = self
            *path, last = KEYS[name].removesuffix(".weight").split(".")
            for part in path:
                if not hasattr(place, part):
                    place.add_module(part, torch.nn.Module())
                place = place.get_submodule(part)
            place.add_module(last, layer)

    def apply_model(self, x: torch.Tensor, t: torch.Tensor, c_crossattn: torch.Tensor) -> Any:
        layers = [module for module in self.modules() if isinstance(module, torch.nn.Linear)]
        return torch.cat([layer(c_crossattn).flatten(1) for layer in layers], 1)


class ModelPatcher:
    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.patches, self.model_options = model, {}, {"transformer_options": {}}

    def clone(self) -> "ModelPatcher":
        other = ModelPatcher(self.model)
        other.patches = {key: list(entries) for key, entries in self.patches.items()}
        other.model_options = dict(self.model_options)
        return other

    def add_patches(self, patches: Any, strength: float = 1.0, model: float = 1.0) -> list[str]:
        state = self.model.state_dict()
        found = [key for key in patches if key in state]
        for key in found:
            entry = (strength, patches[key], model, None, None)
            self.patches.setdefault(key, []).append(entry)
        return found

    def get_key_patches(self, prefix: str | None = None) -> dict[str, list[Any]]:
        state = self.model.state_dict()
        return {
            key: [(weight, lambda w, **_: w), *self.patches.get(key, [])]
            for key, weight in state.items()
            if prefix is None or key.startswith(prefix)
        }

    def set_model_unet_function_wrapper(self, wrapper: Any) -> None:
        self.model_options["model_function_wrapper"] = wrapper

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights that it samples with, or saves."""
        state = self.model.state_dict()
        return {
            key: calculate_weight(self.patches.get(key, []), weight.clone(), key)
            for key, weight in state.items()
        }

    def sample(self, prompts: torch.Tensor) -> torch.Tensor:
        """One call of the UNet, patched while it lasts."""
        before = {key: weight.clone() for key, weight in self.model.state_dict().items()}
        self.model.load_state_dict(self.weights())
        arguments = {
            "input": torch.zeros(len(prompts), 4, 8, 8),
            "timestep": torch.zeros(len(prompts)),
            "c": {"c_crossattn": prompts},
            "cond_or_uncond": [0],
        }
        wrapper = self.model_options.get("model_function_wrapper")
        try:
            if wrapper is not None:
                return wrapper(self.model.apply_model, arguments)
            return self.model.apply_model(
                arguments["input"], arguments["timestep"], **arguments["c"]
            )
        finally:
            self.model.load_state_dict(before)


class Clip:
    """Each text's embedding is `of[text]`, (1, 77, d)."""

    def __init__(self, **of: torch.Tensor) -> None:
        self.of, self.cond_stage_model = of, torch.nn.Module()

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens(self, tokens: str) -> torch.Tensor:
        return self.of[tokens]


def calculate_weight(patches: list[Any], weight: torch.Tensor, key: str) -> torch.Tensor:
    for strength, (kind, (up, down, alpha)), *_ in patches:
        assert kind == "lora"
        scale = 1.0 if alpha is None else alpha / down.shape[0]
        weight += strength * scale * up.float() @ down.float()
    return weight


def model_lora_keys_unet(model: torch.nn.Module, key_map: dict[str, str]) -> dict[str, str]:
    for name, key in KEYS.items():
        ldm = key.removeprefix("diffusion_model.").removesuffix(".weight")
        key_map[f"lora_unet_{ldm.replace('.', '_')}"] = key
        key_map[f"lora_unet_{name.replace('.', '_')}"] = key
        key_map[f"unet.{name.replace('.to_', '.processor.to_')}"] = key
    return key_map


def load_lora_for_models(
    model: ModelPatcher, clip: Any, tensors: Any, strength: float, clip_strength: float
) -> tuple[ModelPatcher, Any]:
    loaded, used = {}, set()
    for stem, key in model_lora_keys_unet(model.model, {}).items():
        names = [f"{stem}.lora_up.weight", f"{stem}.lora_down.weight", f"{stem}.alpha"]
        if names[0] in tensors:
            alpha = tensors.get(names[2])
            factors = (
                tensors[names[0]],
                tensors[names[1]],
                None if alpha is None else alpha.item(),
            )
            loaded[key] = ("lora", factors)
            used.update(names)
    for key in tensors.keys() - used:
        logging.warning("lora key not loaded: %s", key)
    clone = model.clone()
    clone.add_patches(loaded, strength)
    return clone, clip


def install(monkeypatch: Any, folder: Any) -> None:
    """Make `import comfy.sd, comfy.lora, folder_paths` find these; LoRA files lie in `folder`."""
    comfy, sd, lora = (types.ModuleType(f"comfy{name}") for name in ("", ".sd", ".lora"))
    paths = types.ModuleType("folder_paths")
    sd.load_lora_for_models = load_lora_for_models
    lora.model_lora_keys_unet, lora.calculate_weight = model_lora_keys_unet, calculate_weight
    lora.model_lora_keys_clip = lambda model, key_map: key_map
    comfy.sd, comfy.lora = sd, lora
    paths.get_filename_list = lambda kind: sorted(path.name for path in folder.glob("*"))
    paths.get_full_path = lambda kind, name: (
        str(folder / name) if (folder / name).exists() else None
    )
    for module in (comfy, sd, lora, paths):
        monkeypatch.setitem(sys.modules, module.__name__, module)

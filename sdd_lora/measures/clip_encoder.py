"""The user's CLIP: embeddings of images and texts, for the CLIP score and for Q16."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from sdd_lora.errors import BadInput
from sdd_lora.io.atomic import sha256_of
from sdd_lora.measures import needs
from sdd_lora.sd.devices import best_device

#: model.safetensors of openai/clip-vit-large-patch14
VIT_L_14 = "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb"
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_CLIP_BATCH = 32


class ClipEncoder:
    """CLIP from a folder as transformers saves it; `is_standard`: it is OpenAI's ViT-L/14.

    Raises BadInput where the folder is missing or holds no CLIP.
    """

    def __init__(self, folder: Path | None, option: str = "clip") -> None:
        from transformers import CLIPModel, CLIPTokenizer

        folder = needs.supplied(
            folder,
            option,
            "a folder with CLIP ViT-L/14 (config, tokenizer, model.safetensors)",
            "the hub's openai/clip-vit-large-patch14",
            folder=True,
        )
        weights = needs.supplied(
            folder / "model.safetensors", option, "CLIP's weights in one file", "the same place"
        )
        try:
            self.model, loaded = CLIPModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
            self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # whatever a config or weights that are none raise
            first = (str(error).strip() or repr(error)).splitlines()[0]
            raise BadInput(
                f"{option}: {folder}: expected a CLIP of transformers: {first}"
            ) from error
        if missing := sorted(loaded["missing_keys"]):
            raise BadInput(
                f"{option}: {weights}: expected all of CLIP's weights, found {len(missing)} "
                f"missing, {missing[0]} for one"
            )
        self.model.eval().to(best_device())
        self.size = self.model.config.vision_config.image_size
        self.sha256 = sha256_of(weights)
        self.is_standard = self.sha256 == VIT_L_14

    @torch.no_grad()
    def images(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """Unit vectors (B, D) fp32 of images (H, W, 3) uint8 RGB."""
        found = []
        for start in range(0, len(images), _CLIP_BATCH):
            pixels = torch.stack([self._pixels(x) for x in images[start : start + _CLIP_BATCH]])
            seen = self.model.vision_model(pixel_values=pixels.to(self.model.device))
            found.append(self.model.visual_projection(seen.pooler_output))
        return F.normalize(torch.cat(found).float(), dim=1).cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit vectors (B, D) fp32; a text is cut after 77 tokens, as CLIP scores do."""
        found = []
        for start in range(0, len(texts), _CLIP_BATCH):
            tokens = self.tokenizer(
                list(texts[start : start + _CLIP_BATCH]),
                padding="max_length",
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(self.model.device)
            read = self.model.text_model(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
            )
            found.append(self.model.text_projection(read.pooler_output))
        return F.normalize(torch.cat(found).float(), dim=1).cpu()

    def _pixels(self, image: np.ndarray) -> torch.Tensor:
        """CLIP's preprocessing: the shorter side to `size` (bicubic), centre crop, normalised."""
        picture = Image.fromarray(image)
        shorter = min(picture.size)
        width, height = (self.size * side // shorter for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        picture = picture.crop((left, top, left + self.size, top + self.size))
        values = (np.asarray(picture, dtype=np.float32) / 255 - _MEAN) / _STD
        return torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)  # (3, size, size)

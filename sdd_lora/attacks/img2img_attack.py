"""Image-to-image from a picture of what was erased (SDEdit, Meng et al. 2021)."""

from sdd_lora.attacks.base_drawing import base_image
from sdd_lora.attacks.case import Attacked, Case
from sdd_lora.attacks.settings import Img2Img
from sdd_lora.generation.img2img import encode_image, noised


def image_to_image(case: Case, settings: Img2Img) -> Attacked:
    """The base's picture of the same prompt and seed, of which the last `share` of the noise
    schedule is redone."""
    generator = case.generator()
    latents = encode_image(case.base, base_image(case), generator)
    given = noised(case.base, latents, case.sampling, settings.share, generator)
    return Attacked(case.prompt, given=given)

"""Ways to draw: rows of the results table. One file each; adding a method is adding a file.

A method takes (pipeline, prompts, generators, sampling) and gives images (B, H, W, 3) uint8. The
table's other rows (sdd, esd-x-1, baked, …) are `sd` with adapters or weights on the pipeline.
"""

from collections.abc import Callable

from sdd_lora.generation.methods import gated, neg, sd, sega, sld

METHODS: dict[str, Callable] = {
    "sd": sd.draw,
    "neg": neg.draw,
    **dict.fromkeys(sld.STRENGTHS, sld.draw),
    "sega": sega.draw,
    "sdd-gated": gated.draw,
}

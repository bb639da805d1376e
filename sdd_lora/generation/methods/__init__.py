"""Ways to draw: rows of the results table. One file each; adding a method is adding a file.

A method takes (pipeline, prompts, generators, sampling) and gives images (B, H, W, 3) uint8.
"""

from collections.abc import Callable

from sdd_lora.generation.methods import neg, sd

METHODS: dict[str, Callable] = {"sd": sd.draw, "neg": neg.draw}

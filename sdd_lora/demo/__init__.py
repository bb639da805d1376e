"""The embedded model: a true Stable Diffusion 1.x, only small, its fine-tune and its judge."""

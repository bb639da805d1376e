"""Stable Diffusion in memory: devices, models, prompts, pipelines."""

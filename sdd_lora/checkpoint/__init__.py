"""Checkpoints: weights in any SD 1.x layout, read and patched byte for byte."""

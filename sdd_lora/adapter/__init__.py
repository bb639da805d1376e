"""Adapters: LoRA deltas with metadata; their files, sums and cards."""

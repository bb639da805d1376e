"""Measuring what an eraser removed and what it left."""

"""Measures, a file each: images → rates with intervals."""

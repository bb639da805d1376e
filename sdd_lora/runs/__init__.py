"""A run: train, measure, card, picture; everything in one folder."""

"""A bench: methods and measures side by side on one model, and the report of it."""

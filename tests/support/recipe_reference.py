"""The reference of recipes' fields in recipes/README.md; run this file to write it anew:

python tests/support/recipe_reference.py
"""

from pathlib import Path

from sdd_lora.recipe.reference import reference

README = Path(__file__).parents[2] / "recipes" / "README.md"
BEGIN = "<!-- from here on by: python tests/support/recipe_reference.py -->\n"


def renewed(text: str) -> str:
    """The README with the reference as the fields' docstrings have it now."""
    return text.partition(BEGIN)[0] + BEGIN + reference()


if __name__ == "__main__":
    README.write_text(renewed(README.read_text("utf-8")), "utf-8")

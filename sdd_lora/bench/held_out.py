"""Which kept nouns the recipes of a bench name, so that tables tell them from the others."""

from collections.abc import Iterable

from sdd_lora.bench.bench_file import Bench
from sdd_lora.bench.results import ImageRecord
from sdd_lora.bench.tables import Grouping
from sdd_lora.demo.vocabulary import Noun
from sdd_lora.measures.asked import asked_for

NAMED, NOT_NAMED = "named in a recipe", "named in none"


def named_nouns(texts: Iterable[str]) -> set[Noun]:
    """The nouns of the embedded model's vocabulary that stand in texts."""
    return {noun for text in texts for noun in asked_for(text).nouns}


def grouping_of(bench: Bench) -> Grouping:
    """Groups of kept images by whether a recipe that the bench trains, or UCE's list, names their
    one noun; no groups where they name all of them, none, or where nothing is trained."""
    recipes = [bench.recipe(name) for name in bench.recipes]
    told = [text for r in recipes for text in (*r.concepts, *r.preserve.prompts)]
    if bench.uce is not None:
        told += [*bench.uce.concepts, *bench.uce.preserve]
    named = named_nouns(told)

    def groups(record: ImageRecord) -> list[str]:
        nouns = asked_for(record.prompt).nouns
        if record.kind != "kept" or len(nouns) != 1 or not named:
            return []
        return [NAMED if nouns[0] in named else NOT_NAMED]

    return groups

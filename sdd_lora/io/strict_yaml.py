"""YAML files as typed sections: nothing unknown, nothing twice, every problem with its line.

PyYAML reads and writes; this module adds line numbers, duplicate keys, numbers as YAML 1.2 has
them, and errors in one line each.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, TypeAlias, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
)

from sdd_lora.errors import BadInput


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"expected a number, found {str(value).lower()}")
    return value


#: numbers are no booleans, and whole ones no text; "1e-3" is a number though, to YAML a text
Whole = Annotated[int, Field(strict=True)]
Real = Annotated[float, BeforeValidator(_no_boolean)]
Switch = Annotated[bool, Field(strict=True)]
Positive = Annotated[Whole, Field(gt=0)]
Count = Annotated[Whole, Field(ge=0)]
Seed = Annotated[Whole, Field(ge=0, lt=2**62)]  # torch takes 64 bits; some are added on the way
Fraction = Annotated[Real, Field(ge=0.0, le=1.0)]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]

#: dotted names of a file's fields → the values that take their place
Overrides: TypeAlias = dict[str, Any]

#: other trainers' names of fields → ours
OTHER_TRAINERS = {
    "lr": "learning_rate",
    "lr_scheduler": "schedule",
    "lr_warmup_steps": "warmup_iterations",
    "dim": "rank",
    "network_dim": "rank",
    "r": "rank",
    "network_alpha": "alpha",
    "lora_alpha": "alpha",
    "target_modules": "targets",
    "max_train_steps": "iterations",
    "train_batch_size": "batch",
    "batch_size": "batch",
    "gradient_accumulation_steps": "gradient_accumulation",
    "mixed_precision": "precision",
    "prompt": "prompts",
}

#: YAML 1.1 also counts in base 60 and in octal
_NUMBERS = {
    "tag:yaml.org,2002:int": r"^[-+]?(0|[1-9][0-9_]*)$",
    "tag:yaml.org,2002:float": (
        r"^([-+]?([0-9][0-9_]*)?\.[0-9_]+([eE][-+][0-9]+)?|[-+]?[0-9][0-9_]*\.([eE][-+][0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
}


class Section(BaseModel):
    """Fields of a YAML file: none unknown, none changed afterwards, no NaN. A string literal below
    a field describes it."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


S = TypeVar("S", bound=Section)
_ONE, _SEVERAL = "(one)", "(several)"  # in places of errors, which don't name them
#: a section, or a list of such sections
OneOrSeveral = Annotated[
    Annotated[S, Tag(_ONE)] | Annotated[list[S], Tag(_SEVERAL)],
    Discriminator(lambda value: _SEVERAL if isinstance(value, list) else _ONE),
]


@dataclass(frozen=True)
class Document:
    """A YAML text: its plain `value`, and the tree that knows lines; no tree where it is empty."""

    value: Any
    tree: yaml.Node | None

    def find(self, location: Sequence[int | str]) -> tuple[int, bool]:
        """The line, counted from 1, of the innermost part of `location` that the text holds, and
        whether it holds all of it."""
        node = self.tree
        line = node.start_mark.line + 1 if node else 1
        for part in location:
            if isinstance(node, yaml.MappingNode):
                entry = next(((k, v) for k, v in node.value if k.value == str(part)), None)
                if entry is None:
                    return line, False
                line, node = entry[0].start_mark.line + 1, entry[1]
            elif (
                isinstance(node, yaml.SequenceNode)
                and isinstance(part, int)
                and part < len(node.value)
            ):
                node = node.value[part]
                line = node.start_mark.line + 1
            else:
                return line, False
        return line, True


class _Loader(yaml.SafeLoader):
    """YAML as people read it: 1:30 and 010 are text, not 90 and 8."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in patterns if tag not in _NUMBERS]
        for first, patterns in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list("-+.0123456789"))


def read_yaml(text: str, where: str) -> Document:
    """Parse YAML; `where` names it in errors.

    Raises BadInput where it is no YAML, or a key stands in it twice.
    """
    try:
        loader = _Loader(text)
        tree = loader.get_single_node()
        if tree is None:
            return Document(None, None)
        _refuse_repeated_keys(tree, where)  # before `<<` puts a merged field beside its own
        return Document(loader.construct_document(tree), tree)
    except (yaml.YAMLError, ValueError) as error:  # a date or a number that can't be
        raise BadInput(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise BadInput(f"{where}: fields within fields too deep, or within themselves") from None


def write_yaml(section: Section) -> str:
    """All fields, defaults filled in, in their order."""
    return yaml.safe_dump(section.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def parse_strictly(
    kind: type[S],
    text: str,
    where: str,
    prepared: Callable[[dict[str, Any]], dict[str, Any]],
    options: Iterable[str] = (),
) -> S:
    """YAML text as a `kind`; `prepared` may fill in fields before they are checked.

    `options` are the dotted names that `prepared` overrides, for errors to name. Raises
    BadInput with every problem and its line.
    """
    document = read_yaml(text, where)
    if not isinstance(document.value, dict):
        found = f"found {document.value!r:.100}"
        raise BadInput(f"{where}: expected fields such as `concepts:`, {found}")
    try:
        return kind.model_validate(prepared(document.value))
    except ValidationError as error:
        raise BadInput("\n".join(_problems(kind, where, document, options, error))) from None
    except RecursionError:
        raise BadInput(f"{where}: fields within fields too deep, or within themselves") from None


def at(fields: Any, path: Sequence[str]) -> Any:
    """What stands at a path of fields within fields; None where there is no such field."""
    for key in path:
        fields = fields.get(key) if isinstance(fields, dict) else None
    return fields


def put(
    fields: dict[str, Any], changes: Mapping[str, Any], other_name: Mapping[str, str] | None = None
) -> None:
    """Set fields by their dotted names; one that a field's `other_name` holds goes. Below `set`,
    where a bench changes a recipe, the keys are dotted names themselves.

    Raises BadInput where a dotted name leads through a value.
    """
    for dotted, value in changes.items():
        place = fields
        above, of_recipe, below = str(dotted).partition(".set.")
        *sections, last = [*above.split("."), "set", below] if of_recipe else above.split(".")
        for key in sections:
            if place.get(key) is None:
                place[key] = {}
            place = place[key]
            if not isinstance(place, dict):
                raise BadInput(f"{dotted}: {key} holds a value, not fields")
        place.pop((other_name or {}).get(last, ""), None)
        place[last] = value


def merged_fields(
    base: Mapping[str, Any], over: Mapping[str, Any], other_name: Mapping[str, str]
) -> dict[str, Any]:
    """`over` on top of `base`, section by section; a field replaces its `other_name` too."""
    found = {key: value for key, value in base.items() if other_name.get(key, key) not in over}
    for key, value in over.items():
        below = base.get(key)
        is_section = isinstance(value, dict) and isinstance(below, dict)
        found[key] = merged_fields(below or {}, value, other_name) if is_section else value
    return found


def _refuse_repeated_keys(node: yaml.Node, where: str) -> None:
    """YAML readers keep the last of two equal keys, in silence."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise BadInput(f"{where}:{line}: {key.value} stands here a second time")
            seen.add(key.value)
            _refuse_repeated_keys(value, where)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeated_keys(item, where)


def _problems(
    kind: type[Section],
    where: str,
    document: Document,
    options: Iterable[str],
    error: ValidationError,
) -> Iterator[str]:
    """One line a problem: the file's line, or the option, that it comes from."""
    for problem in error.errors():
        location = tuple(
            part
            for part in problem["loc"]
            if not str(part).startswith("function-") and part not in (_ONE, _SEVERAL)
        )
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = f"unknown field; {_suggestion(kind, location)}"
        elif problem["type"] not in ("missing", "value_error"):
            message += f", found {problem['input']!r:.100}"
        line, is_written = document.find(location)
        name = ".".join(map(str, location))
        option = next((o for o in options if _concerns(o, name, is_written)), None)
        place = f'`overrides["{option}"]`' if option else f"{where}:{line}"
        yield f"{place}: {name or 'recipe'}: {message}"


def _concerns(option: str, name: str, is_written: bool) -> bool:
    """Whether a problem of the field `name` comes from the override `option`, not from the file."""
    within = f"{name}.".startswith(f"{option}.")
    return within or (not is_written and f"{option}.".startswith(f"{name}."))


def _suggestion(kind: type[Section], location: Sequence[int | str]) -> str:
    """The field that was meant; else all there are in this section."""
    if meant := fields_meant(kind, location):
        return f"did you mean {' or '.join(meant)}?"
    section = tuple(map(str, location[:-1]))
    here = [path[-1] for path in _fields_of(kind) if path[:-1] == section]
    return f"expected one of {', '.join(here)}"


def fields_meant(kind: type[Section], location: Sequence[int | str]) -> list[str]:
    """Dotted names of the fields that an unknown one may have meant: by its spelling, or by another
    trainer's name."""
    *section, name = map(str, location)
    known = list(_fields_of(kind))
    here = [path[-1] for path in known if list(path[:-1]) == section]
    wanted = OTHER_TRAINERS.get(name.lower(), name.lower())
    meant = [path for path in known if path[-1] == wanted]
    if not meant:
        meant = [(*section, close) for close in get_close_matches(name.lower(), here, 1)]
    if not meant:
        leaves = get_close_matches(name.lower(), {path[-1] for path in known}, 1)
        meant = [path for path in known if path[-1] in leaves]
    return list(map(".".join, meant))


def _fields_of(kind: type[Section], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all fields that may be written, sections' own included."""
    for name, field in kind.model_fields.items():
        if not field.exclude:
            yield (*above, name)
        for part in dict.fromkeys(sections_in(field.annotation)):
            yield from _fields_of(part, (*above, name))


def sections_in(annotation: Any) -> Iterator[type[Section]]:
    """The kinds of sections that a field may hold."""
    if get_origin(annotation) is not None:
        for part in get_args(annotation):
            yield from sections_in(part)
    elif isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation

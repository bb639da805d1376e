"""What an adapter's file says about it: our own entry of the header, and those of other tools.

Our entry is one JSON object under `sdd_lora`, read by `Metadata`. User interfaces show `ss_*`
(A1111) and ModelSpec 1.0.1 keys, which are written beside it and read from foreign files.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    JsonValue,
    ValidationError,
    model_validator,
)

from sdd_lora.errors import BadInput, first_problem

ENTRY_KEY = "sdd_lora"
THUMBNAIL_KEY = "modelspec.thumbnail"
SHOWN_CONCEPTS = 12
_MODELSPEC_FIELDS = ("description", "author", "license", "date", "usage_hint")
#: What our entry says of the very tensors that were written, and of no others.
_OF_THE_TENSORS = (
    "identity",
    "measures",
    "recipe",
    "recipe_sha256",
    "merged_from",
    "resized_from",
    "extracted_from",
    "started_from",
)


def _finite(value: int | float) -> int | float:
    if not abs(value) <= sys.float_info.max:
        raise ValueError("expected a finite number")
    return value


#: A number as JSON has it: 1 stays 1, so that what is read is written again byte for byte.
Number = Annotated[int | float, AfterValidator(_finite)]


class Entry(BaseModel):
    """A JSON object with known fields; others are kept as they are."""

    model_config = ConfigDict(extra="allow", frozen=True)

    def as_json(self) -> dict[str, Any]:
        """The fields that were given, as JSON has them."""
        return self.model_dump(exclude_unset=True)


class TrainedOn(Entry):
    """The model that an adapter was trained on: its name, and a digest of its weights."""

    model: str | None = None
    fingerprint: str | None = None


class Source(Entry):
    """An adapter that another was made from; `lineage`: the identities that it was made from."""

    identity: str | None = None
    lineage: list[str] | None = None


class MergedPart(Source):
    """A part of a stack, and its weight there."""

    name: str
    weight: Number
    concepts: list[str] | None = None


class ResizedFrom(Source):
    """What a smaller adapter was cut from; `relative_error` is ‖ΔW − ΔW′‖ / ‖ΔW‖."""

    rank: int | None = None
    relative_error: Number


class MadeFromWords(Entry):
    """How `erase` made a portable adapter, beside its concepts: with it, it can be made again.

    `near`: words that went with the concepts; `rank`: as it was asked for, None where the words
    gave it; `vocabulary`: how many words were kept unnamed; `text_encoder`: a digest of it.
    """

    keep: list[str] = []
    into: str | None = None
    near: list[str] = []
    rank: int | None = None
    vocabulary: int | None = None
    text_encoder: str | None = None


class StartedFrom(Entry):
    """The adapter that a training went on from; `sha256` is that of its file."""

    name: str
    identity: str
    sha256: str


class ExtractedFrom(Entry):
    """The file names of the two checkpoints whose difference an adapter is."""

    tuned: str
    base: str


class MeasuredRate(Entry):
    """A row of `metrics.json`: the share of images, of 1, without and with the adapter."""

    name: str
    group: str
    before: Number
    after: Number


class Metadata(Entry):
    """What is known of an adapter. Reads like the JSON object it is: `metadata["name"]`,
    `metadata | {"name": "other"}`.

    `header` holds what other tools wrote into the file's header; it is no part of our entry.
    `tensors_sha256` is of the bytes after the header, in a file alone.
    """

    name: str | None = None
    merged_from: list[MergedPart] = []
    concepts: list[str] = []
    recipe: JsonValue = None
    recipe_sha256: str | None = None
    base: TrainedOn | None = None
    tool: str | None = None
    versions: dict[str, str] = {}
    measures: list[MeasuredRate] = []
    resized_from: ResizedFrom | None = None
    extracted_from: ExtractedFrom | None = None
    started_from: StartedFrom | None = None
    words: MadeFromWords | None = None
    description: str | None = None
    author: str | None = None
    license: str | None = None
    date: str | None = None
    usage_hint: str | None = None
    identity: str | None = None
    tensors_sha256: str | None = None
    header: dict[str, str] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        """null says nothing: as if the field were missing."""
        if isinstance(fields, dict):
            return {key: value for key, value in fields.items() if value is not None}
        return fields

    @classmethod
    def of(cls, fields: "Mapping[str, Any] | Metadata") -> "Metadata":
        """From a dictionary of Python's. Raises BadInput where a field is of another type."""
        if isinstance(fields, Metadata):
            return fields
        try:
            return cls(**fields)
        except ValidationError as error:
            raise BadInput(f"an adapter's metadata: {first_problem(error)}") from None

    @classmethod
    def from_header(cls, header: Mapping[str, str], data_hash: str) -> "Metadata":
        """Our own entry of a file's header, or what a foreign header tells of the same kind.

        `data_hash` is the SHA-256 of the bytes after the header: where another tool changed them,
        what our entry says of the tensors is left out. Raises BadInput where our entry is no JSON
        object of these fields.
        """
        others = {key: value for key, value in header.items() if key not in _GENERATED}
        own = header.get(ENTRY_KEY)
        found = _of_foreign(header) if own is None else _parsed(own)
        if is_edited(header, data_hash):
            found = found.without(*_OF_THE_TENSORS)
            others.pop(THUMBNAIL_KEY, None)
        found = found.without("header", "tensors_sha256")
        return found | {"header": others} if others else found

    def own_entry(self) -> dict[str, Any]:
        """Our entry of the header: all but what other tools wrote."""
        return self.without("header").as_json()

    def header_entries(self, rank: int, data_hash: str) -> dict[str, str]:
        """The header's entries for user interfaces: of a file of this rank, whose tensors' bytes
        have this SHA-256."""
        name = self.name_or_default
        entries = {
            **self.header,
            "format": "pt",
            "ss_output_name": name,
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(rank),
            "ss_network_alpha": str(float(rank)),
            "ss_base_model_version": "sd_v1",
            "ss_v2": "False",
            "sshs_model_hash": data_hash,
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": "stable-diffusion-v1/lora",
            "modelspec.implementation": "diffusers",
            "modelspec.title": name,
            "modelspec.hash_sha256": f"0x{data_hash}",
        }
        if self.base_model:
            entries["ss_sd_model_name"] = self.base_model
        if self.merged_from:
            entries["modelspec.merged_from"] = ", ".join(part.name for part in self.merged_from)
        described = {"description": self.sentence} | self.as_json()
        entries |= {f"modelspec.{k}": described[k] for k in _MODELSPEC_FIELDS if described.get(k)}
        return entries

    @property
    def name_or_default(self) -> str:
        return "adapter" if self.name is None else self.name

    @property
    def base_model(self) -> str | None:
        """The name of the model that the adapter was trained on."""
        return self.base.model if self.base else None

    @property
    def clip_skip(self) -> int | None:
        """The text encoder's layer that the adapter was made for, counted as user interfaces do, 1
        for the last; None where nothing says."""
        told = self.header.get("ss_clip_skip", "")  # as kohya's trainer has it
        if isinstance(self.recipe, dict):
            told = str(self.recipe.get("clip_skip"))
        elif self.words:
            told = "None"
        return 1 if told == "None" else int(told) if told.isdecimal() else None

    @property
    def sentence(self) -> str:
        """One sentence on what the adapter does; empty where nothing is known."""
        if self.description:
            return self.description
        if not self.concepts:
            return ""
        made = "Made of adapters trained" if self.merged_from else "Trained"
        if self.words:
            made = "Made from words"
        model = self.base_model or "Stable Diffusion 1.x"
        return f"{made} to keep {model} from drawing: {shortened(self.concepts)}."

    @property
    def lineage(self) -> tuple[str, ...]:
        """Identities of all that the adapter was made from, at any depth, each once."""
        sources: list[Source] = [*self.merged_from]
        if self.resized_from:
            sources.append(self.resized_from)
        found = (i for made in sources for i in (made.identity, *(made.lineage or ())))
        return tuple(dict.fromkeys(i for i in found if i is not None))

    def without(self, *fields: str) -> "Metadata":
        """The same, but for these fields."""
        return Metadata(**{key: value for key, value in self._given() if key not in fields})

    def without_thumbnail(self) -> "Metadata":
        """The same, but for the picture in the header."""
        if THUMBNAIL_KEY not in self.header:
            return self
        return self | {"header": {k: v for k, v in self.header.items() if k != THUMBNAIL_KEY}}

    def __or__(self, changes: Mapping[str, Any]) -> "Metadata":
        return Metadata.of(dict(self._given()) | dict(changes))

    def __getitem__(self, field: str) -> Any:
        return self.as_json()[field]

    def __contains__(self, field: str) -> bool:
        return field in self.model_fields_set

    def get(self, field: str, default: Any = None) -> Any:
        return self.as_json().get(field, default)

    def _given(self) -> Iterator[tuple[str, Any]]:
        return ((key, value) for key, value in self if key in self.model_fields_set)


#: Header keys written anew at every save: what a read file said there is stale or in `Metadata`.
_GENERATED = {
    *Metadata().header_entries(rank=0, data_hash=""),
    *(f"modelspec.{field}" for field in (*_MODELSPEC_FIELDS, "merged_from")),
    ENTRY_KEY,
    "lora_adapter_metadata",
    "sshs_legacy_hash",
    "ss_sd_model_name",
}


def is_edited(header: Mapping[str, str], data_hash: str) -> bool:
    """Whether another tool changed the tensors under our entry: it speaks of others then."""
    if ENTRY_KEY not in header:
        return False
    written = _parsed(header[ENTRY_KEY]).tensors_sha256
    if written is None:  # of an earlier version, which kept the hash for user interfaces alone
        written = header.get("modelspec.hash_sha256", "").removeprefix("0x") or None
    return written not in (None, data_hash)


def shortened(concepts: Iterable[str], most: int = SHOWN_CONCEPTS) -> str:
    """The first `most` of them, and how many more there are.

    "axe, in oil" is left out where "axe" is there too: the recipe and the sidecar list all of them.
    """
    listed = dict.fromkeys(concepts)
    distinct = [c for c in listed if "," not in c or c.partition(",")[0] not in listed]
    more = len(distinct) - most
    return ", ".join(distinct[:most]) + (f" and {more} more" if more > 0 else "")


def _parsed(text: str) -> Metadata:
    try:
        return Metadata.model_validate_json(text, strict=True)
    except ValidationError as error:
        problem = first_problem(error)
        raise BadInput(f"the header's {ENTRY_KEY} is damaged: {problem}") from None


def _of_foreign(header: Mapping[str, str]) -> Metadata:
    found: dict[str, Any] = {
        "name": header.get("modelspec.title") or header.get("ss_output_name") or None
    }
    if base := header.get("ss_sd_model_name"):
        found["base"] = {"model": base}
    found |= {key: header.get(f"modelspec.{key}") or None for key in _MODELSPEC_FIELDS}
    return Metadata(**found)

"""An eraser from words alone: a portable adapter, without a UNet pass."""

import hashlib
from collections.abc import Collection, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch

from sdd_lora import sd1
from sdd_lora.adapter.adapter import Adapter
from sdd_lora.adapter.factors import EmbeddingFactors
from sdd_lora.adapter.weighted import AdapterLike, as_adapter
from sdd_lora.errors import BadInput
from sdd_lora.io.atomic import atomic_output
from sdd_lora.io.cache import cache_folder
from sdd_lora.io.safetensors import read_tensors, serialize
from sdd_lora.progress import progress, warn
from sdd_lora.sd.devices import best_device, multiplies_bf16
from sdd_lora.sd.model import TextParts, another_encoder, load_text_parts
from sdd_lora.training import words
from sdd_lora.training.projection import Moments, Projection, Rank, moment

#: how many of the tokenizer's words are kept, the most frequent ones
VOCABULARY = 3000
#: prompts that show kept words in made-up styles; half as many show two side by side
_CONTEXTS, _CONTEXT_WEIGHT = 600, 0.75
#: tokens read of a prompt: those that follow change nothing on the embedded model
_TOKENS = 40
#: of them, those that stand for a prompt: the first ones, then one for each four
_FIRST = 12
_POSITIONS = [*range(_FIRST), *range(_FIRST, _TOKENS, 4)]
_SHARES = torch.tensor([1.0] * _FIRST + [4.0] * (len(_POSITIONS) - _FIRST), dtype=torch.float64)
#: kept words that are read whole, the most frequent ones; of all others, the first tokens
_WHOLE = 300
#: kept words whose mean stands in a concept's place; beside the first ones a concept is met
_ANCHORS, _COMPANIONS = 48, 8
#: a word with more than this share of the concepts' power goes with them
_NEAR = 0.5
_ROUNDS = 3
#: how much ∅ counts beside the vocabulary, and how much what was named to keep
_EMPTY_WEIGHT, _KEEP_WEIGHT = 0.02, 1.0
_BATCH = 64
Value = TypeVar("Value")


@dataclass(frozen=True)
class Erased:
    """The eraser; `near`: words that go with the concepts; `ranks`: the trade-off by rank."""

    adapter: Adapter
    near: tuple[str, ...]
    ranks: tuple[Rank, ...]

    def __repr__(self) -> str:
        return f"Erased({self.adapter!r}, near: {', '.join(self.near) or 'none'})"

    def as_json(self) -> dict[str, Any]:
        """`near` and `ranks` as JSON has them."""
        return {"near": list(self.near), "ranks": [asdict(row) for row in self.ranks]}


def erase(
    concepts: Sequence[str],
    model: str = "demo",
    *,
    keep: Sequence[str] = (),
    into: str | None = None,
    rank: int | None = None,
    name: str | None = None,
    vocabulary: int = VOCABULARY,
    text: TextParts | None = None,
) -> Erased:
    """A portable adapter that keeps a MODEL from drawing `concepts`, from words alone.

    Everything else that the tokenizer knows is kept, minus the concepts' own words and words too
    near to them; what is in `keep` counts as much as all of it. In a concept's place comes what
    the same prompt gives with other words, on the mean, or with `into`. Only the text encoder is
    loaded, or `text` taken where the MODEL's is loaded already. Raises BadInput for words that the
    model doesn't read, or that are to go and to stay.
    """
    if text is None:
        text = load_text_parts(model)
        text.encoder.to(best_device())
    concepts, keep, into = _read_words(text, concepts, keep, into)
    width = int(text.encoder.config.hidden_size)
    if rank is not None and not 1 <= rank <= width:
        raise BadInput(f"rank: expected 1 to {width}, the prompts' width, found {rank}")
    if vocabulary < 1:
        raise BadInput(f"vocabulary: expected 1 word or more, found {vocabulary}")
    known = _Vocabulary.of(text, vocabulary)
    stay = {phrase.lower() for phrase in keep}
    gone = {word for concept in concepts for word in concept.lower().split()} - stay
    anchors = words.sample_company(known.words, _ANCHORS)
    prompts = _Prompts(text, concepts, anchors, into)
    empty = _embed(text, [""])
    extra = _EMPTY_WEIGHT * moment(empty, empty, _SHARES)
    if keep:
        named = _embed(text, [p for t in words.THINGS for p in words.fill(t, keep)])
        extra += _KEEP_WEIGHT * moment(named, named, _SHARES)
    near: list[str] = []
    for _ in range(_ROUNDS):
        kept = known.without(gone.union(near))
        stays = [anchor not in gone.union(near) for anchor in anchors]
        moments = prompts.moments(stays, kept.moment() + extra)
        projection = Projection.solve(moments, rank)
        found = [w for w in kept.near(projection, moments, prompts.bare) if w not in stay]
        if not found:
            break
        near += found
    down, up = (part.float().numpy() for part in (projection.down, projection.up))
    metadata = {
        "name": name or "no-" + "-".join(concepts).replace(" ", "-")[:40],
        "concepts": concepts,
        "base": {"model": model},
        "words": {
            "keep": keep,
            "near": near,
            "rank": rank,
            "vocabulary": vocabulary,
            "text_encoder": text.fingerprint,
        }
        | ({} if into is None else {"into": into}),
    }
    factors = EmbeddingFactors(down, up, float(len(down))).balanced()
    return Erased(Adapter({sd1.EMBEDDINGS: factors}, metadata), tuple(near), projection.ranks)


def solve(
    adapters: Sequence[AdapterLike],
    model: str | None = None,
    *,
    rank: int | None = None,
    name: str | None = None,
) -> Erased:
    """The eraser of all that these portable adapters erase, made anew from their words at once.

    With `model` for its text encoder, else the one they were made with. Of one adapter, and its
    own model, that adapter again. Raises BadInput where one doesn't tell its words, or they were
    made differently.
    """
    parts = [as_adapter(adapter) for adapter in adapters]
    made = [part.metadata.words for part in parts]
    for adapter, entry in zip(parts, made, strict=True):
        if not adapter.is_portable or entry is None or not adapter.metadata.concepts:
            raise BadInput(
                f"{adapter.name}: doesn't tell the words it was made from; only erasers of "
                "erase are solved; sum it instead, with stack"
            )
    model = model or _common("model", [part.metadata.base_model for part in parts])
    known = [entry for entry in made if entry is not None]
    asked = known[0].rank if len(known) == 1 else None
    return erase(
        [concept for part in parts for concept in part.metadata.concepts],
        model or "demo",
        keep=[phrase for entry in known for phrase in entry.keep],
        into=_common("into", [entry.into for entry in known]),
        rank=rank or asked,
        name=name or "+".join(part.name for part in parts),
        vocabulary=_common("vocabulary", [entry.vocabulary for entry in known]) or VOCABULARY,
    )


def made_for(adapter: Adapter, model: str, *, resolve: bool = False) -> Adapter:
    """A portable adapter for a MODEL, whose text encoder may be another than it was made with.

    With `resolve` it is then made anew from its words with the MODEL's; else a warning says so. Any
    other adapter is itself. Raises BadInput where it can't be made anew.
    """
    entry = adapter.metadata.words
    if not adapter.is_portable:
        return adapter
    if resolve and (entry is None or adapter.lineage):
        raise BadInput(
            f"{adapter.name}: was trained, scaled, stacked or resized since erase made it, so that "
            "words alone don't make it anew; expected an eraser as erase made it"
        )
    if entry is None or entry.text_encoder is None:
        return adapter
    try:
        found = load_text_parts(model).fingerprint
    except BadInput as error:
        if resolve:
            raise
        warn(f"{adapter.name}: is {model} of its text encoder? That can't be read: {error}")
        return adapter
    if found == entry.text_encoder:
        return adapter
    if resolve:
        return solve([adapter], model, name=adapter.name).adapter
    warn(another_encoder(adapter.name, model))
    return adapter


def _common(label: str, values: Sequence[Value]) -> Value:
    """The one value that all have. Raises BadInput where they differ."""
    if any(value != values[0] for value in values):
        found = ", ".join(dict.fromkeys(map(str, values)))
        raise BadInput(f"{label}: expected the same of all that are solved together, found {found}")
    return values[0]


def _read_words(
    text: TextParts, concepts: Sequence[str], keep: Sequence[str], into: str | None
) -> tuple[list[str], list[str], str | None]:
    """The words of a call, checked. A single text is a list of one."""
    concepts, keep = ([w] if isinstance(w, str) else w for w in (concepts, keep))
    if not concepts:
        raise BadInput("concepts: expected at least one, found none")
    erased = words.require_readable("concepts", concepts, text.tokenizer, _TOKENS)
    kept = words.require_readable("keep", keep, text.tokenizer, _TOKENS) if keep else []
    if into is not None:
        (into,) = words.require_readable("into", [into], text.tokenizer, _TOKENS)
    stay = {_as_read(text, phrase) for phrase in (*kept, into or "")}
    if both := [concept for concept in erased if _as_read(text, concept) in stay]:
        raise BadInput(f"{both[0]!r}: is to go, and to stay or come instead; expected one of them")
    return erased, kept, into


def _as_read(text: TextParts, phrase: str) -> tuple[int, ...]:
    """The tokens of a phrase: to the model, "Axe" is "axe"."""
    return tuple(text.tokenizer(phrase, add_special_tokens=False).input_ids)


@dataclass(frozen=True)
class _Vocabulary:
    """What is kept where nobody names it: each word as "a WORD", then words in others' company.

    `members`: the words of each prompt. `first` (N, first tokens, d) and `rest` (whole prompts,
    later positions, d), fp16; `whole` (N,) says which prompts are read whole.
    """

    words: list[str]
    members: list[set[str]]
    whole: torch.Tensor
    first: torch.Tensor
    rest: torch.Tensor

    @classmethod
    def of(cls, text: TextParts, most: int) -> "_Vocabulary":
        """Of the tokenizer's most frequent words; the embeddings are cached."""
        known = words.whole_words(text.tokenizer, most)
        if not known:
            raise BadInput("the tokenizer has no words of one token; there is nothing to keep")
        together = words.contexts(known, _CONTEXTS)
        prompts = words.fill("{a}", known) + [prompt for prompt, _ in together]
        members = [{word} for word in known] + [names for _, names in together]
        whole = torch.ones(len(prompts), dtype=torch.bool)
        whole[_WHOLE : len(known)] = False
        read = _cached(text, [p for p, w in zip(prompts, whole, strict=True) if w])
        first = torch.empty(len(prompts), _FIRST, read.shape[2], dtype=read.dtype)
        first[whole] = read[:, :_FIRST]
        if short := [p for p, w in zip(prompts, whole, strict=True) if not w]:
            first[~whole] = _cached(text, short, _POSITIONS[:_FIRST])
        return cls(known, members, whole, first, read[:, _FIRST:])

    def without(self, gone: Collection[str]) -> "_Vocabulary":
        """The same without every prompt that has one of these words."""
        stays = torch.tensor([members.isdisjoint(gone) for members in self.members])
        return _Vocabulary(
            [word for word in self.words if word not in gone],
            [members for members, stay in zip(self.members, stays, strict=True) if stay],
            self.whole[stays],
            self.first[stays],
            self.rest[stays[self.whole]],
        )

    def moment(self) -> torch.Tensor:
        """E e eᵀ over tokens (d, d), fp64: of the words, and, weighted, of what shows them."""
        if not self.words:
            raise BadInput(
                "nothing of the tokenizer's words is left to keep; erase less at once, or at a "
                "lower rank"
            )
        alone = len(self.words)
        whole = int(self.whole[:alone].sum())
        total = self._mean(self.first[:alone], self.rest[:whole])
        if len(self.first) > alone:
            total += _CONTEXT_WEIGHT * self._mean(self.first[alone:], self.rest[whole:])
        return total

    def near(self, projection: Projection, moments: Moments, concepts: torch.Tensor) -> list[str]:
        """Words with more than `_NEAR` of the concepts' median power, by the tokens read of each.

        `concepts` (N, positions, d): the concepts as "a CONCEPT".
        """
        alone = len(self.words)
        whole = self.whole[:alone]
        first, rest = self.first[:alone], self.rest[: int(whole.sum())]
        relative = torch.empty(alone, dtype=torch.float64)
        for rows, read in ((~whole, first[~whole]), (whole, torch.cat([first[whole], rest], 1))):
            shares, like = _SHARES[: read.shape[1]], concepts[:, : read.shape[1]]
            limit = projection.power(like, moments, shares).median()
            relative[rows] = projection.power(read, moments, shares) / limit
        return [word for word, p in zip(self.words, relative.tolist(), strict=True) if p > _NEAR]

    @staticmethod
    def _mean(first: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        share = _FIRST / _TOKENS if len(rest) else 1.0
        mean = share * moment(first, first)
        return mean + (1 - share) * moment(rest, rest) if len(rest) else mean


class _Prompts:
    """Embeddings of concepts' prompts, and of what comes in their place, at `_POSITIONS`."""

    def __init__(
        self, text: TextParts, concepts: Sequence[str], anchors: Sequence[str], into: str | None
    ) -> None:
        self.bare = _embed(text, words.fill("{a}", concepts))
        self.things = [_embed(text, words.fill(t, concepts)) for t in words.THINGS]
        instead = [
            p for t in words.THINGS for p in words.fill(t, anchors if into is None else [into])
        ]
        found = _cached(text, instead) if into is None else _embed(text, instead)
        self.things_instead = found.float().unflatten(0, (len(words.THINGS), -1))
        others = anchors[:_COMPANIONS]
        self.company = [_embed(text, words.in_company(concept, others)) for concept in concepts]
        alone = words.left_alone(others) if into is None else words.in_company(into, others)
        self.company_instead = _embed(text, alone)
        self.into = into

    def moments(self, stays: Sequence[bool], kept: torch.Tensor) -> Moments:
        """Of concepts and targets, by those of the anchors that stay; as things and in company,
        half and half."""
        mask = torch.tensor(stays)
        chosen = self.things_instead[:, mask] if self.into is None else self.things_instead
        things = torch.cat(self.things)
        things_instead = torch.cat(
            [mean.expand_as(part) for mean, part in zip(chosen.mean(1), self.things, strict=True)]
        )
        beside = mask[:_COMPANIONS].repeat(len(words.COMPANY))
        company = torch.cat([part[beside] for part in self.company])
        company_instead = self.company_instead[beside].repeat(len(self.company), 1, 1)
        halves = ((things, things_instead - things), (company, company_instead - company))

        def mean(left: int, right: int) -> torch.Tensor:
            return sum((moment(h[left], h[right], _SHARES) for h in halves), torch.tensor(0.0)) / 2

        return Moments(mean(0, 0), mean(1, 0), mean(1, 1), kept, len(self.company))


@torch.no_grad()
def _embed(
    text: TextParts, prompts: Sequence[str], positions: Sequence[int] = tuple(_POSITIONS)
) -> torch.Tensor:
    """Embeddings (N, positions, d), fp32, on the CPU."""
    ids = text.tokenizer(
        list(prompts),
        padding="max_length",
        truncation=True,
        max_length=positions[-1] + 1,  # a token's embedding depends on no later one
        return_tensors="pt",
    ).input_ids
    found = []
    with progress("reading words", len(prompts)) as advance:
        for part in ids.to(text.encoder.device).split(_BATCH):
            found.append(text.encoder(part).last_hidden_state[:, positions].float().cpu())
            advance(len(part))
    embeddings = torch.cat(found)
    if not torch.isfinite(embeddings).all():
        raise BadInput("the text encoder's output is not finite: its weights are damaged")
    return embeddings


def _cached(
    text: TextParts, prompts: Sequence[str], positions: Sequence[int] = tuple(_POSITIONS)
) -> torch.Tensor:
    """`_embed` as fp16, read in bf16 where the device multiplies it, since kept prompts are many
    and their moment has a ridge; cached by the text encoder's fingerprint and the prompts."""
    key = hashlib.sha256("\n".join([text.fingerprint, str(positions), *prompts]).encode())
    file = cache_folder("words") / f"{key.hexdigest()[:32]}.safetensors"
    with suppress(BadInput):
        return torch.from_numpy(read_tensors(file)[0]["embeddings"].copy())
    if multiplies_bf16(text.encoder.device):
        weights = text.encoder.parameters()
        in_bf16 = {id(weight): torch.nn.Parameter(weight.bfloat16()) for weight in weights}
        text = replace(text, encoder=deepcopy(text.encoder, in_bf16))  # never twice in fp32
    embeddings = _embed(text, prompts, positions).half()
    with suppress(OSError):  # a cache that can't be written is none
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_output(file) as output:
            output.writelines(serialize({"embeddings": embeddings.numpy()}, {}))
    return embeddings

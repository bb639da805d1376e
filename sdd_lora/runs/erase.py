"""An eraser from words alone: a portable adapter in seconds, without a UNet pass."""

import hashlib
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch

from sdd_lora import sd1
from sdd_lora.adapter.adapter import Adapter
from sdd_lora.adapter.factors import EmbeddingFactors
from sdd_lora.errors import BadInput
from sdd_lora.io.atomic import atomic_output
from sdd_lora.io.cache import cache_folder
from sdd_lora.io.safetensors import read_tensors, serialize
from sdd_lora.progress import progress
from sdd_lora.sd.devices import best_device
from sdd_lora.sd.model import TextParts, load_text_parts
from sdd_lora.training import words
from sdd_lora.training.directions import second_moment
from sdd_lora.training.projection import Moments, Projection, Rank

#: how many of the tokenizer's words are kept, the most frequent ones
VOCABULARY = 1000
#: prompts that show kept words in made-up styles; half as many show two side by side
_CONTEXTS, _CONTEXT_WEIGHT = 600, 0.75
#: tokens read of a prompt: those that follow change nothing on the embedded model
_TOKENS = 40
#: of them, those that stand for a kept prompt: the first ones, then one for each four
_POSITIONS = [*range(12), *range(12, _TOKENS, 4)]
_SHARES = torch.tensor([1.0] * 12 + [4.0] * (len(_POSITIONS) - 12), dtype=torch.float64)
#: kept words whose mean stands in a concept's place; beside the first ones a concept is met
_ANCHORS, _COMPANIONS = 24, 8
#: a word with more than this share of the concepts' power goes with them
_NEAR = 0.5
_ROUNDS = 3
#: how much ∅ counts beside the vocabulary, and how much what was named to keep
_EMPTY_WEIGHT, _KEEP_WEIGHT = 0.02, 1.0
_BATCH = 64


@dataclass(frozen=True)
class Erased:
    """The eraser; `near`: words that go with the concepts; `ranks`: the trade-off by rank."""

    adapter: Adapter
    near: tuple[str, ...]
    ranks: tuple[Rank, ...]


def erase(
    concepts: Sequence[str],
    model: str = "demo",
    *,
    keep: Sequence[str] = (),
    into: str | None = None,
    rank: int | None = None,
    name: str | None = None,
    vocabulary: int = VOCABULARY,
) -> Erased:
    """A portable adapter that keeps a MODEL from drawing `concepts`, from words alone.

    Everything else that the tokenizer knows is kept, minus the concepts' own words and words too
    near to them; what is in `keep` counts as much as all of it. In a concept's place comes what
    the same prompt gives with other words, on the mean, or with `into`. Only the text encoder is
    loaded. Raises BadInput for words that the model doesn't read, or that are to go and to stay.
    """
    text = load_text_parts(model)
    text.encoder.to(best_device())
    concepts, keep, into = _read(text, concepts, keep, into)
    width = int(text.encoder.config.hidden_size)
    if rank is not None and rank > width:
        raise BadInput(f"--rank: expected {width} at most, the prompts' width, found {rank}")
    known = _Vocabulary.of(text, vocabulary)
    gone = {word for concept in concepts for word in concept.lower().split()} - set(keep)
    anchors = words.sample(known.without(gone).words, _ANCHORS)
    prompts = _ConceptPrompts(text, concepts, anchors, into)
    extra = _EMPTY_WEIGHT * second_moment(_embed(text, [""]))
    if keep:
        named = [prompt for template in words.THINGS for prompt in words.fill(template, keep)]
        extra += _KEEP_WEIGHT * second_moment(_embed(text, named))
    near: list[str] = []
    for _ in range(_ROUNDS):
        kept = known.without(gone.union(near))
        pairs = prompts.with_targets([anchor not in near for anchor in anchors])
        moments = Moments.of(*pairs, kept.moment() + extra, len(concepts))
        projection = Projection.solve(moments, rank)
        power = projection.power(kept.embeddings[: len(kept.words)], moments, _SHARES)
        limit = _NEAR * float(projection.power(prompts.bare, moments).median())
        found = [word for word, p in zip(kept.words, power.tolist(), strict=True) if p > limit]
        near += [word for word in found if word not in keep]
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


def _read(
    text: TextParts, concepts: Sequence[str], keep: Sequence[str], into: str | None
) -> tuple[list[str], list[str], str | None]:
    """The words of a call, checked."""
    erased = words.require_readable("CONCEPT", concepts, text.tokenizer, _TOKENS)
    kept = words.require_readable("--keep", keep, text.tokenizer, _TOKENS) if keep else []
    if into is not None:
        (into,) = words.require_readable("--into", [into], text.tokenizer, _TOKENS)
    if both := [concept for concept in erased if concept in (*kept, into)]:
        raise BadInput(f"{both[0]!r}: is to go, and to stay or come instead; expected one of them")
    return erased, kept, into


@dataclass(frozen=True)
class _Vocabulary:
    """What is kept where nobody names it: each word as "a WORD", then words in others' company.

    `members`: the words of each prompt. `embeddings` (N, positions, d), fp16.
    """

    words: list[str]
    members: list[set[str]]
    embeddings: torch.Tensor

    @classmethod
    def of(cls, text: TextParts, most: int) -> "_Vocabulary":
        """Of the tokenizer's most frequent words; the embeddings are cached."""
        known = words.whole_words(text.tokenizer, most)
        if not known:
            raise BadInput("the tokenizer has no words of one token; there is nothing to keep")
        together = words.contexts(known, _CONTEXTS)
        prompts = words.fill("{a}", known) + [prompt for prompt, _ in together]
        members = [{word} for word in known] + [names for _, names in together]
        return cls(known, members, _cached(text, prompts))

    def without(self, gone: Collection[str]) -> "_Vocabulary":
        """The same without every prompt that has one of these words."""
        stays = [members.isdisjoint(gone) for members in self.members]
        return replace(
            self,
            words=[word for word in self.words if word not in gone],
            members=[members for members, stay in zip(self.members, stays, strict=True) if stay],
            embeddings=self.embeddings[torch.tensor(stays)],
        )

    def moment(self) -> torch.Tensor:
        """E e eᵀ over tokens (d, d), fp64: of the words, and, weighted, of what shows them."""
        alone, together = self.embeddings.split(
            [len(self.words), len(self.embeddings) - len(self.words)]
        )
        if not len(alone):
            raise BadInput("nothing of the tokenizer's words is left to keep; erase less at once")
        moment = _weighted_moment(alone)
        return moment + _CONTEXT_WEIGHT * _weighted_moment(together) if len(together) else moment


def _weighted_moment(embeddings: torch.Tensor) -> torch.Tensor:
    roots = (_SHARES / _SHARES.sum() / len(embeddings)).sqrt()[:, None]
    return sum(
        (flat.T @ flat for flat in ((part.double() * roots).flatten(0, 1)
                                    for part in embeddings.split(_BATCH))),
        torch.zeros(embeddings.shape[-1], embeddings.shape[-1], dtype=torch.float64),
    )  # fmt: skip


class _ConceptPrompts:
    """Embeddings of concepts' prompts and of what comes in their place, (N, `_TOKENS`, d)."""

    def __init__(
        self, text: TextParts, concepts: Sequence[str], anchors: Sequence[str], into: str | None
    ) -> None:
        self.bare = _embed(text, words.fill("{a}", concepts))
        self.as_things = [_embed(text, words.fill(t, concepts)) for t in words.THINGS]
        targets = anchors if into is None else [into]
        self.things_instead = [_embed(text, words.fill(t, targets)) for t in words.THINGS]
        others = anchors[:_COMPANIONS]
        self.in_company = [_embed(text, words.in_company(c, others)) for c in concepts]
        instead = words.left_alone(others) if into is None else words.in_company(into, others)
        self.company_instead = _embed(text, instead)
        self.has_anchors_instead = into is None

    def with_targets(self, stays: Sequence[bool]) -> tuple[torch.Tensor, torch.Tensor]:
        """Concepts and targets, prompt by prompt, by those of the anchors that stay."""
        mask = torch.tensor(stays)
        concepts, targets = list(self.as_things), []
        for things, instead in zip(self.as_things, self.things_instead, strict=True):
            chosen = instead[mask] if self.has_anchors_instead else instead
            targets.append(chosen.mean(0).expand_as(things))
        beside = mask[:_COMPANIONS].repeat(len(words.COMPANY))
        for prompts in self.in_company:
            concepts.append(prompts[beside])
            targets.append(self.company_instead[beside])
        return torch.cat(concepts), torch.cat(targets)


@torch.no_grad()
def _embed(text: TextParts, prompts: Sequence[str]) -> torch.Tensor:
    """Embeddings (N, `_TOKENS`, d), fp32, on the CPU; a token's depends on no later one."""
    ids = text.tokenizer(
        list(prompts),
        padding="max_length",
        truncation=True,
        max_length=_TOKENS,
        return_tensors="pt",
    ).input_ids
    parts = ids.to(text.encoder.device).split(_BATCH)
    found = []
    with progress("reading words", len(prompts)) as advance:
        for part in parts:
            found.append(text.encoder(part).last_hidden_state.float().cpu())
            advance(len(part))
    embeddings = torch.cat(found)
    if not torch.isfinite(embeddings).all():
        raise BadInput("the text encoder's output is not finite: its weights are damaged")
    return embeddings


def _cached(text: TextParts, prompts: Sequence[str]) -> torch.Tensor:
    """Embeddings at `_POSITIONS`, fp16, by the text encoder's fingerprint and the prompts."""
    key = hashlib.sha256("\n".join([text.fingerprint, *map(str, _POSITIONS), *prompts]).encode())
    file = cache_folder("words") / f"{key.hexdigest()[:32]}.safetensors"
    with suppress(BadInput):
        return torch.from_numpy(read_tensors(file)[0]["embeddings"].copy())
    parts = [
        _embed(text, prompts[i : i + 1024])[:, _POSITIONS].half()
        for i in range(0, len(prompts), 1024)
    ]
    embeddings = torch.cat(parts)
    with suppress(OSError):  # a cache that can't be written is none
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_output(file) as output:
            output.writelines(serialize({"embeddings": np.asarray(embeddings)}, {}))
    return embeddings

"""What draws each row of a bench: adapters and weights, trained where need be and kept."""

import hashlib
import inspect
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from sdd_lora.adapter.adapter import Adapter
from sdd_lora.adapter.algebra import stack
from sdd_lora.adapter.interference import interference
from sdd_lora.adapter.metrics import METRICS_FILE, Metrics
from sdd_lora.bench.bench_file import METHOD_TEXTS, Bench
from sdd_lora.bench.grid import Cell, draws_with
from sdd_lora.bench.peers.uce import write_uce
from sdd_lora.bench.results import AdapterCosines
from sdd_lora.checkpoint.bake import bake
from sdd_lora.checkpoint.locate import locate
from sdd_lora.errors import BadInput, Busy
from sdd_lora.generation.methods import METHODS as METHODS_THAT_DRAW
from sdd_lora.io.atomic import sha256_of, write_text
from sdd_lora.io.distributed import processes
from sdd_lora.io.plugins import load_plugin
from sdd_lora.progress import say
from sdd_lora.runs.folder import ADAPTER, RECIPE, WEIGHTS, snapshot_file
from sdd_lora.sd.devices import DTYPES
from sdd_lora.sd.model import require_model
from sdd_lora.sd.pipeline import load_pipeline, sha256_of_parts
from sdd_lora.training.erase import erase, solve

#: where trained baselines are kept, unless SDD_LORA_CACHE says otherwise
CACHE = Path("~/.cache/sdd_lora")

_LOOK_AGAIN_S = 5.0  # after what another process trains

#: trains a recipe into a folder, resuming where asked to; `sdd_lora.runs.train.train`
Train = Callable[..., Any]


class Weights:
    """What each method's pipeline carries: adapters or weights, trained where need be, once."""

    def __init__(self, bench: Bench, train: Train) -> None:
        self.bench, self.train = bench, train
        self.cache = Path(os.environ.get("SDD_LORA_CACHE", CACHE)).expanduser()
        self.loaded: dict[tuple[str, int | None], Adapter] = {}
        #: recipes → the snapshot that stands for their result, where one was chosen
        self.chosen: dict[str, int] = {}
        self.runs: dict[str, Path] = {}
        self.fingerprints: dict[str, str] = {}
        self.tokenizers: dict[str, CLIPTokenizer] = {}
        self.models: set[str] = set()

    def check(self, cells: Sequence[Cell]) -> None:
        """Raises BadInput for a method that has no weights to draw with, or varies what it lacks;
        for recipes that can't be read; and for adapters, weights and models that are not there."""
        for name, code in self.bench.code.items():
            METHODS_THAT_DRAW[code] = load_plugin(code, self.bench.file("."))
            if not callable(METHODS_THAT_DRAW[code]):
                raise BadInput(f"code.{name}: {code}: expected a function that draws")
        for method in dict.fromkeys(cell.method for cell in cells):
            bare = method == "sd" or draws_with(self.bench, method) not in ("sd", "sdd-gated")
            if not bare and not self.bench.has_weights(method):
                raise BadInput(
                    f"method {method}: expected an entry under `recipes`, `adapters` or `weights` "
                    "that says what it draws with"
                )
        for name in self.bench.trainings:
            self.bench.recipe(name)
        for cell in cells:
            self._check_variation(cell)
        for cell in cells:
            self._check_files(cell)

    def _check_variation(self, cell: Cell) -> None:
        where = f"variations.{cell.variation}"
        if cell.method in self.bench.images and cell.variation is not None and not cell.is_main:
            raise BadInput(f"{where}: {cell.method} is images that are there, not drawn again")
        if cell.conditions.weight != 1 and not self.carries_adapters(cell.method):
            raise BadInput(f"{where}: {cell.method} carries no adapter whose weight could vary")
        if cell.conditions.snapshot is not None:
            self._check_snapshot(where, cell.method, cell.conditions.snapshot)
        moved = cell.conditions.model != self.bench.model
        own = cell.method in self.bench.models
        if moved and (own or (cell.method != "baked" and self.is_whole(cell.method))):
            raise BadInput(f"{where}: {cell.method} is another UNet, not to be moved to a model")
        if cell.conditions.image and draws_with(self.bench, cell.method) != "sd":
            raise BadInput(f"{where}: {cell.method} draws in its own way, not from a picture")
        if cell.conditions.extra_adapter and cell.method == "sdd-gated":
            raise BadInput(
                f"{where}: the gate of {cell.method} would close on the adapter beside it"
            )
        if cell.conditions.image and "sd" not in self.bench.methods:
            raise BadInput(f"{where}: starts from what sd drew; expected sd among the methods")

    def _check_snapshot(self, where: str, method: str, iteration: int) -> None:
        if method not in self.bench.recipes:
            raise BadInput(f"{where}: {method} has no training of its own, and so no snapshots")
        kept = self.snapshots(method)
        if iteration not in kept:
            raise BadInput(
                f"{where}: {method} keeps no snapshot after {iteration} iterations; expected some "
                f"of {', '.join(map(str, kept))}, or another training.snapshot_every"
            )

    def snapshots(self, name: str) -> list[int]:
        """After how many iterations a recipe keeps its result so far; the last is its result."""
        training = self.bench.recipe(name).training
        every = training.snapshot_every or training.iterations
        return [*range(every, training.iterations, every), training.iterations]

    def _check_files(self, cell: Cell) -> None:
        """What a cell is drawn with, but what is still to be trained, must be there now."""
        bench, method = self.bench, cell.method
        where = f"method {method}" if cell.variation is None else f"variations.{cell.variation}"
        models = {self.model_of(cell)}
        if method in bench.recipes:
            models.add(bench.recipe(method).model)
        try:
            for model in models - self.models:
                require_model(model)
                self.models.add(model)
            for name in bench.adapters.get(method, ()):
                if name not in bench.recipes and name not in bench.words:
                    self.adapter(name)
            if cell.conditions.extra_adapter:
                self.extra(cell)
        except BadInput as error:
            raise BadInput(f"{where}: {error}") from None
        if method in bench.weights and not bench.file(bench.weights[method]).is_file():
            raise BadInput(f"{where}: weights: {bench.file(bench.weights[method])}: no such file")

    def carries_adapters(self, method: str) -> bool:
        """Whether a method is drawn with adapters, whose weight can vary."""
        sources = (self.bench.adapters, self.bench.recipes, self.bench.words)
        there = any(method in named for named in sources)
        return there and method != "baked" and not self.is_whole(method)

    def is_whole(self, method: str) -> bool:
        """Whether a method's weights are a UNet or parts of one."""
        if method in self.bench.adapters or method not in self.bench.trainings:
            return method in self.bench.weights or self.is_uce(method)
        return self.bench.recipe(method).parameters == "full"

    def model_of(self, cell: Cell) -> str:
        """The MODEL that a cell is drawn with: the method's own, or that of its conditions."""
        return self.bench.models.get(cell.method, cell.conditions.model)

    def changes_text_encoder(self, method: str) -> bool:
        """Whether a method may read prompts with another text encoder than the bench's model."""
        parts = self.parts(method) if method in self.bench.adapters else []
        names = [name for adapter, _ in parts for name in adapter.modules]
        return method in self.bench.models or any(n.startswith("text_encoder.") for n in names)

    def pipeline(self, cell: Cell, learnt: Adapter | None = None) -> StableDiffusionPipeline:
        """The pipeline that draws a cell; `learnt` is an adapter that it carries besides."""
        conditions, method, model = cell.conditions, cell.drawn_by, self.model_of(cell)
        precision = self.bench.sampling.precision
        dtype = None if precision is None else DTYPES[precision]
        weights = self.whole(method, conditions.snapshot)
        own = self.parts(method, conditions.snapshot)
        parts = [(adapter, weight * conditions.weight) for adapter, weight in own]
        if method == "baked":
            model, parts = str(self.baked(model, parts)), []
        if len(parts) > 1:
            parts = [(stack(parts, method), 1.0)]
        extra = self.extra(cell) + ([] if learnt is None else [(learnt, 1.0)])
        pipeline = load_pipeline(
            model, parts + extra, dtype, weights=weights, clip_skip=conditions.clip_skip
        )
        if conditions.base_text_encoder:
            pipeline.text_encoder = load_pipeline(self.bench.model, dtype=dtype).text_encoder
        return pipeline

    def parts(self, method: str, snapshot: int | None = None) -> list[tuple[Adapter, float]]:
        """The adapters of a method, with their weights; none where it has whole weights."""
        if self.is_whole(method):
            return []
        if method in self.bench.adapters:
            named = self.bench.adapters[method]
            return [(self.adapter(name), weight) for name, weight in named.items()]
        made = method in self.bench.trainings or method in self.bench.words
        return [(self.adapter(method, snapshot), 1.0)] if made else []

    def whole(self, method: str, snapshot: int | None = None) -> Path | None:
        """The file of a method's weights, where it is no adapter."""
        if not self.is_whole(method):
            return None
        if method in self.bench.weights:
            return self.bench.file(self.bench.weights[method])
        if self.is_uce(method):
            return self.uce()
        return self.result(method, snapshot)

    def is_uce(self, method: str) -> bool:
        """Whether a method is UCE's row, and made here."""
        return method == "uce" and self.bench.uce is not None and not self.bench.weights.get(method)

    def uce(self) -> Path:
        """UCE's weights of the bench's model, from the cache or made now."""
        assert self.bench.uce is not None
        uce, model = self.bench.uce, self.bench.model
        concepts = uce.concepts or self.bench.erased

        def make(path: Path) -> None:
            pipeline = load_pipeline(model, device="cpu", dtype=torch.float32)
            write_uce(pipeline, concepts, path, uce.target, uce.preserve)

        return self._made("uce", [concepts, uce.target, uce.preserve], make)

    def from_words(self, name: str) -> Path:
        """The adapter of a row under `words`, from the cache or made now."""
        row, model = self.bench.words[name], self.bench.model
        concepts = row.concepts or self.bench.erased
        parts = [self.from_words(part) for part in row.solved]
        content = [concepts, row.keep, row.rank, [sha256_of(part) for part in parts]]

        def make(path: Path) -> None:
            made = (
                solve([Adapter.load(part) for part in parts], model, rank=row.rank)
                if parts
                else erase(concepts, model, keep=row.keep, rank=row.rank)
            )
            made.adapter.save(path)

        return self._made("words", content, make)

    def _made(self, kind: str, content: list[Any], make: Callable[[Path], None]) -> Path:
        """A file that no training makes, by what it is made of, from the cache or made now; beside
        it the seconds that took."""
        text = json.dumps([self.fingerprint(self.bench.model), *content])
        key = hashlib.sha256(text.encode()).hexdigest()[:24]
        path, state = self.cache / kind / f"{key}.safetensors", processes()
        if not path.exists() and state.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            started = time.monotonic()
            make(path)
            seconds = round(time.monotonic() - started, 2)
            write_text(path.with_suffix(".json"), json.dumps({"seconds": seconds}))
        state.wait_for_everyone()
        return path

    def adapter(self, name: str, snapshot: int | None = None) -> Adapter:
        """An adapter by its name under `recipes` or `words`, its file, its run's folder, or its hub
        id."""
        key = (name, snapshot or self._chosen_for(name))
        if key not in self.loaded:
            if name in self.bench.trainings:
                self.loaded[key] = Adapter.load(self.result(*key))
            elif name in self.bench.words:
                self.loaded[key] = Adapter.load(self.from_words(name))
            else:
                self.loaded[key] = self._found(name)
        return self.loaded[key]

    def _chosen_for(self, name: str) -> int | None:
        """The snapshot that was chosen for a training's row, if one was."""
        return self.chosen.get(name.partition(".seed-")[0])

    def result(self, name: str, snapshot: int | None = None) -> Path:
        """The file that a recipe's training left, or its snapshot: the one asked for, or chosen."""
        run, iteration = self.trained(name), snapshot or self._chosen_for(name)
        if iteration is not None and iteration != self.snapshots(name)[-1]:
            return snapshot_file(run, iteration)
        return run / (WEIGHTS if self.bench.recipe(name).parameters == "full" else ADAPTER)

    def extra(self, cell: Cell) -> list[tuple[Adapter, float]]:
        """The adapter that a cell carries beside its method's own, if there is one."""
        return (
            [(self._found(cell.conditions.extra_adapter), 1.0)]
            if cell.conditions.extra_adapter
            else []
        )

    def _found(self, name: str) -> Adapter:
        """An adapter from its file or run's folder, beside the bench or not, or its hub id."""
        beside = self.bench.file(name)
        return Adapter.load(beside if beside.exists() else name)

    def trained(self, name: str) -> Path:
        """The run of a recipe, from the cache; trained now where it is not there, or not finished.

        Runs go by their recipe's SHA-256 and their base's weights.
        """
        if name not in self.runs:
            recipe = self.bench.recipe(name)
            key = f"{recipe.sha256[:24]}-{self.fingerprint(recipe.model)[:16]}"
            folder = self.cache / "runs" / key
            waited = False
            while not (folder / METRICS_FILE).exists():
                folder.parent.mkdir(parents=True, exist_ok=True)
                try:
                    say(f"training {name} into {folder}")
                    self.train(recipe, folder, resume=(folder / RECIPE).exists())
                except Busy:  # another shard trains it
                    if not waited:
                        say(f"waiting for another process, which trains {name}")
                    waited = True
                    time.sleep(_LOOK_AGAIN_S)
            self.runs[name] = folder
        return self.runs[name]

    def fingerprint(self, model: str) -> str:
        """What a model draws and trains with: all of it, since two may share their UNet's part."""
        if model not in self.fingerprints:
            pipeline = load_pipeline(model, device="cpu")
            self.tokenizers[model] = pipeline.tokenizer
            self.fingerprints[model] = sha256_of_parts(pipeline)
        return self.fingerprints[model]

    def tokenizer(self, model: str) -> CLIPTokenizer:
        self.fingerprint(model)
        return self.tokenizers[model]

    def baked(self, model: str, parts: Sequence[tuple[Adapter, float]]) -> Path:
        """A checkpoint of `model` with the adapters in it, from the cache or baked now."""
        content = [self.fingerprint(model), *((a.identity, weight) for a, weight in parts)]
        key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]
        path = locate(model)
        out = self.cache / "baked" / (key if path.is_dir() else f"{key}.safetensors")
        state = processes()
        while not out.exists() and state.is_main_process:
            out.parent.mkdir(parents=True, exist_ok=True)
            try:
                bake(model, parts, out)
            except Busy:  # another shard bakes it
                time.sleep(_LOOK_AGAIN_S)
        state.wait_for_everyone()
        return out

    def settings(self, cell: Cell) -> dict[str, Any]:
        """What a cell's images depend on besides prompts, seeds and sampling."""
        conditions = cell.conditions
        whole = self.whole(cell.drawn_by, conditions.snapshot)
        return {
            "model": self.model_of(cell),
            "fingerprint": self.fingerprint(self.model_of(cell)),
            "adapters": [
                {
                    "adapter": adapter.name,
                    "weight": weight * conditions.weight,
                    "identity": adapter.identity,
                }
                for adapter, weight in self.parts(cell.drawn_by, conditions.snapshot)
            ],
            "weights": None if whole is None else sha256_of(whole),
            "image": conditions.image,
            "attack": self._attack(conditions.attack),
            **self._code(cell.method),
            "beside": next((a.identity for a, _ in self.extra(cell)), None),
        }

    def _code(self, method: str) -> dict[str, str]:
        """The source of a method that is the user's own, by its hash."""
        if method not in self.bench.code:
            return {}
        source = inspect.getsource(METHODS_THAT_DRAW[self.bench.code[method]])
        return {"code": hashlib.sha256(source.encode()).hexdigest()}

    def _attack(self, name: str) -> dict[str, Any] | None:
        """An attack's settings."""
        if self.bench.attacks is None or not name:
            return None
        return {name: self.bench.attacks.chosen[name].content()}

    def report_fields(self, method: str) -> dict[str, Any]:
        """What the report says about where a row comes from."""
        bench = self.bench
        fields: dict[str, Any] = {"how": METHOD_TEXTS.get(method, "")}
        whole = self.whole(method)
        if method in bench.models:
            fields["model"] = bench.models[method]
        if method in bench.adapters:
            fields["adapters"] = bench.adapters[method]
        elif self.is_uce(method) and bench.uce is not None:
            fields |= bench.uce.model_dump()
        elif method in bench.words:
            fields |= bench.words[method].model_dump(exclude_defaults=True)
        elif method in bench.images:
            fields["images"] = bench.images[method]
        elif method in bench.code:
            fields["code"] = bench.code[method]
        elif method in bench.weights:
            fields["weights"] = bench.weights[method]
        elif method in bench.recipes:
            metrics = Metrics.read(self.trained(method))
            fields |= {
                "recipe": bench.recipes[method].file,
                "changes": bench.recipes[method].set,
                **({"seeds": seeds} if (seeds := bench.recipes[method].seeds) else {}),
                "recipe_sha256": bench.recipe(method).sha256,
                "training": metrics.training.as_json(),
                **({"snapshots": kept} if (kept := metrics.as_json().get("snapshots")) else {}),
                **({"snapshot": self.chosen[method]} if method in self.chosen else {}),
                "tool": metrics.tool,
                "versions": metrics.versions,
            }
        return fields | ({} if whole is None else {"weights_sha256": sha256_of(whole)})

    def cosines(self) -> AdapterCosines | None:
        """How the adapters of the table stand to each other; None where there is but one."""
        parts = {
            n: (a, 1.0)
            for (n, at), a in self.loaded.items()
            if at == self._chosen_for(n) and not a.is_portable
        }
        if len(parts) < 2:
            return None
        report = interference(list(parts.values()))
        return AdapterCosines(names=list(parts), cosine=report.cosine.round(6).tolist())

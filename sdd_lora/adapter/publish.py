"""A run's folder, or one adapter's file, as a page on the hub."""

import shutil
import tempfile
from pathlib import Path

import yaml

from sdd_lora.adapter import hub
from sdd_lora.adapter.adapter import Adapter, adapter_file, stored_dtype
from sdd_lora.adapter.alphas import PEFT_CONFIG_FILE
from sdd_lora.adapter.card import render_card, write_sidecar
from sdd_lora.adapter.metrics import METRICS_FILE, FileNumbers, Metrics
from sdd_lora.io.atomic import sha256_of
from sdd_lora.io.torch_zip import is_torch_file
from sdd_lora.recipe import Recipe

_MARK = "---\n"


def publish(
    source: Path, repository: str, private: bool = False, license: str | None = None
) -> str:
    """Push a run's folder or an adapter's file; returns the commit's address.

    The source stays as it is. A card is written where there is none, from what the adapter and
    `metrics.json` say; `license` is the hub's id of one, such as openrail, and goes into the card.
    Raises as `hub.push` does.
    """
    path = adapter_file(source)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if source.is_dir():
            for file in filter(lambda file: hub.is_published(file.name), source.iterdir()):
                shutil.copyfile(file, folder / file.name)
        target = folder / hub.ADAPTER_FILE
        if not target.is_file():
            if is_torch_file(path) or (path.parent / PEFT_CONFIG_FILE).is_file():
                # no pickle is published, nor a file whose alpha stands in another one
                Adapter.load(path).save(target, dtype=stored_dtype(path))
            else:
                shutil.copyfile(path, target)
        _complete(folder, license)
        return hub.push(folder, repository, private)


def _complete(folder: Path, license: str | None) -> None:
    """Write a card and a sidecar where there are none, and the license into the card."""
    card, file = folder / hub.CARD_FILE, folder / hub.ADAPTER_FILE
    adapter = Adapter.load(file)
    if license is not None:
        adapter = Adapter(adapter.factors, adapter.metadata | {"license": license})
    if not card.is_file():
        card.write_text(render_card(adapter, _metrics_of(folder)), "utf-8")
    elif license is not None:
        card.write_text(_with_license(card.read_text("utf-8"), license), "utf-8")
    if not (folder / hub.SIDECAR_FILE).is_file():
        write_sidecar(adapter, file)
    recipe = folder / hub.RECIPE_FILE
    if recipe.is_file() and (start := Recipe.load(recipe).lora.starts_from):
        fields = yaml.safe_load(recipe.read_text("utf-8"))
        fields["lora"]["init"] = f"./{Path(start).name}"  # where it lay is nobody's business
        text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
        recipe.write_text(text, "utf-8")


def _metrics_of(folder: Path) -> Metrics:
    if (folder / METRICS_FILE).is_file():
        return Metrics.read(folder)
    file = folder / hub.ADAPTER_FILE
    return Metrics(adapter=FileNumbers(bytes=file.stat().st_size, sha256=sha256_of(file)))


def _with_license(text: str, license: str) -> str:
    """A card with this license in its front matter, and in the section that says there is none."""
    head, found, body = text.removeprefix(_MARK).partition(_MARK)
    if not text.startswith(_MARK) or not found:
        head, body = "", text
    entries = (yaml.safe_load(head) or {}) | {"license": license}
    front = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)
    before, heading, after = body.partition("## Licence\n\n")
    if heading:
        _, _, rest = after.partition("\n")
        body = f"{before}{heading}{license}\n{rest}"
    return f"{_MARK}{front}{_MARK}{body}"

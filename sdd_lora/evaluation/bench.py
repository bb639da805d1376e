"""Running a bench: every method on the same prompts and latents, measured; resumable throughout.

An image is on disk before its line in a manifest is, and a measured value is a line too, so that a
killed run goes on where it stopped, with no image twice and none missing.
"""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image
from transformers import CLIPTokenizer

from sdd_lora.errors import BadInput
from sdd_lora.evaluation import tables
from sdd_lora.evaluation.bench_file import Bench
from sdd_lora.evaluation.cells import Cell, cells_of
from sdd_lora.evaluation.results import BENCH, IMAGES, RESULTS, Results
from sdd_lora.evaluation.taking import MEASURES, Measure, concept_of
from sdd_lora.evaluation.weights import Train, Weights, draws_with
from sdd_lora.files import atomic_output, write_text
from sdd_lora.generation.images import MANIFEST, Sampling, generate
from sdd_lora.progress import say

CSV, MARKDOWN = "results.csv", "results.md"
VALUES = "values.jsonl"
_MEASURED_AT_ONCE = 256


def run(
    bench: Bench, folder: Path, train: Train, command: str, versions: dict[str, str]
) -> Results:
    """Draw and measure all cells of a bench into `folder`; returns what is written there.

    `train` makes a recipe's run, as `sdd_lora.runs.train` does. A measure that lacks its weights is
    named in the results' `missing`; the others go on. Raises BadInput where the folder holds
    another bench, or a method lacks what it needs; that is found before anything is drawn.
    """
    cells = cells_of(bench)
    weights = Weights(bench, train)
    weights.check(cells)
    measures, missing = load_measures(bench)
    for line in missing:
        say(f"not measured: {line}")
    claim(folder, bench)
    lines: list[tables.Line] = []
    for number, cell in enumerate(cells):
        label = cell.method if cell.variation is None else f"{cell.method}, {cell.setting}"
        say(f"{number + 1}/{len(cells)}: {label}")
        if cell.variation is None or not cell.usual:
            draw_cell(folder, cell, bench, weights)
        lines += measure_cell(folder, cell, measures)
    write_text(folder / IMAGES, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))
    info = {name: told for measure in measures.values() for name, told in measure.info.items()}
    fields = {name: variation.field for name, variation in bench.variations.items()}
    now = datetime.datetime.now(datetime.timezone.utc)
    results = Results(
        bench=bench.name, model=bench.model, date=now.isoformat(timespec="seconds"),
        command=command, versions=versions, rows=tables.rows(lines, info), concepts=bench.erased,
        sampling=bench.sampling.model_dump(exclude={"batch"}),
        methods={method: weights.told(method) for method in bench.methods},
        measures=info,
        variations=tables.variations(lines, fields, info),
        collateral=tables.collateral(lines, info, concept_of),
        interference=weights.interference(), missing=missing,
    )  # fmt: skip
    write_text(folder / CSV, results.to_csv())
    write_text(folder / MARKDOWN, results.to_markdown())
    write_text(folder / RESULTS, results.to_json())
    return results


def claim(folder: Path, bench: Bench) -> None:
    """Make the folder this bench's. Raises BadInput where it holds another one's images."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder}: can't make this folder: {error.strerror}") from error
    path = folder / BENCH
    if path.exists():
        found = Bench.load(path)
        if found.sha256_of_images != bench.sha256_of_images:
            raise BadInput(
                f"{folder}: holds images of another bench, or of another number of them "
                f"({found.name}); choose another folder with -o"
            )
    elif any(folder.iterdir()):
        raise BadInput(f"{folder}: holds something else; choose another folder with -o")
    write_text(path, bench.to_yaml())


class FromDrawings(StableDiffusionImg2ImgPipeline):
    """Starts from pictures that are there already, found by prompt and seed; `redone` is how much
    of each is drawn anew, img2img's strength."""

    pictures: dict[tuple[str, int], Path]
    redone: float

    def __call__(self, prompt: list[str], generator: list[torch.Generator], **options: Any) -> Any:
        start = [
            Image.open(self.pictures[text, g.initial_seed()]).convert("RGB")
            for text, g in zip(prompt, generator, strict=True)
        ]
        return super().__call__(
            prompt, image=start, strength=self.redone, generator=generator, **options
        )


def draw_cell(folder: Path, cell: Cell, bench: Bench, weights: Weights) -> None:
    """Draw what a cell still lacks."""
    pipeline = weights.pipeline(cell)
    conditions, method = cell.conditions, draws_with(cell.method)
    if method != "sd":
        _check_length(bench.against, pipeline.tokenizer)
    if conditions.image:
        parts = pipeline.components
        pipeline = FromDrawings(**parts, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.redone, pipeline.pictures = conditions.image, _drawn_by_sd(folder)
    sampling = Sampling(
        conditions.steps, conditions.guidance, conditions.scheduler, method,
        "" if method == "sd" else bench.against, bench.sampling.batch,
    )  # fmt: skip
    target = folder / cell.folder
    generate(pipeline, [s.job for s in cell.shots], sampling, target, weights.settings(cell))


def _check_length(text: str, tokenizer: CLIPTokenizer) -> None:
    """Raises BadInput where a part of the text would be cut off in silence."""
    count = len(tokenizer(text).input_ids)
    if count > tokenizer.model_max_length:
        raise BadInput(
            f"concept: {count} tokens, the model reads {tokenizer.model_max_length}; write a "
            "shorter `concept` in the bench, what neg, SLD and SEGA work against"
        )


def _drawn_by_sd(folder: Path) -> dict[tuple[str, int], Path]:
    usual = folder / "images" / "sd"
    return {(line["prompt"], line["seed"]): usual / line["file"] for line in read_lines(usual)}


def read_lines(folder: Path, name: str = MANIFEST) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; what a kill cut short is left out."""
    path = folder / name
    if not path.exists():
        return []
    text = path.read_text("utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def load_measures(bench: Bench) -> tuple[dict[str, Measure], list[str]]:
    """The bench's measures by their name and options, and a line for each that can't be taken.

    Raises BadInput for a name that is none, and where no measure is left.
    """
    found: dict[str, Measure] = {}
    missing = []
    for name, options in bench.measures.items():
        if name not in MEASURES:
            raise BadInput(f"measure {name}: expected one of {', '.join(MEASURES)}")
        try:
            found[f"{name} {json.dumps(options, sort_keys=True)}"] = MEASURES[name](
                bench.erased, **options
            )
        except BadInput as error:
            missing.append(f"{name}: {error}")
    if not found:
        raise BadInput("no measure can be taken:\n" + "\n".join(missing))
    return found, missing


def measure_cell(folder: Path, cell: Cell, measures: dict[str, Measure]) -> list[tables.Line]:
    """A line for each of a cell's images, with its values; what was measured before is kept."""
    target = folder / cell.folder
    files = {(line["prompt"], line["seed"]): line["file"] for line in read_lines(target)}
    lines: list[tables.Line] = [
        {
            "method": cell.method, "variation": cell.variation, "setting": cell.setting,
            "kind": shot.kind, "set": shot.set, "prompt": shot.job.prompt, "seed": shot.job.seed,
            "file": (cell.folder / files[shot.job.prompt, shot.job.seed]).as_posix(), "values": {},
        }
        for shot in cell.shots
    ]  # fmt: skip
    known = {(x["measure"], x["file"]): x["values"] for x in read_lines(target, VALUES)}
    for key, measure in measures.items():
        todo = [line for line in lines if (key, line["file"]) not in known]
        for start in range(0, len(todo), _MEASURED_AT_ONCE):
            part = todo[start : start + _MEASURED_AT_ONCE]
            values = measure.values(part, [_image(folder / line["file"]) for line in part])
            _append(
                target / VALUES,
                [{"measure": key, "file": line["file"], "values": v}
                 for line, v in zip(part, values, strict=True)],
            )  # fmt: skip
            known |= {(key, x["file"]): v for x, v in zip(part, values, strict=True)}
        for line in lines:
            line["values"] |= known[key, line["file"]]
    return lines


def _image(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _append(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Lines at the end of a file; a line that a kill cut short goes first."""
    if path.exists():
        whole = path.read_bytes()
        if not whole.endswith(b"\n"):
            with atomic_output(path) as file:
                file.write(whole[: whole.rfind(b"\n") + 1])
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

"""A folder of images: `settings.json` says how all were drawn, `manifest.jsonl` names each.

While several processes or shards draw, each appends to a part of the manifest of its own; the parts
are merged by a call that has the folder alone.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdd_lora.errors import BadInput
from sdd_lora.generation.sampling import Job, Sampling
from sdd_lora.io.atomic import write_text
from sdd_lora.io.distributed import Shard
from sdd_lora.io.jsonl import whole_lines

MANIFEST = "manifest.jsonl"
SETTINGS = "settings.json"
_PART = "manifest.{}.jsonl"

#: the types of an entry's values: the file's name, and what is the job's own
_ENTRY_TYPES: dict[str, tuple[type, ...]] = {
    "file": (str,),
    "prompt": (str,),
    "seed": (int,),
    "guidance": (int, float),
    "width": (int,),
    "height": (int,),
    "steps": (int,),
    "negative_prompt": (str,),
}
#: settings of later versions, left out at these values, so that older folders go on
_LEFT_OUT = {"negative_prompt": ""}
#: the precision of a folder whose settings say nothing of it
_PRECISION, _UNSAID_PRECISION = "precision", "fp32"
_IMAGE = re.compile(r"\d{5,}\.png")


def image_name(index: int) -> str:
    """The file of the image of this index, from 0."""
    return f"{index:05d}.png"


def part_name(process: int, shard: Shard | None) -> str:
    """The file that a process of a shard appends to; the manifest itself for the only one."""
    if shard is not None:
        return _PART.format(f"{shard.index}-of-{shard.count}.{process}")
    return _PART.format(process) if process else MANIFEST


def job_in(entry: dict[str, Any]) -> Job:
    """The job that an entry of a manifest, or a line of another file, describes."""
    return Job(**{name: entry[name] for name in Job.__dataclass_fields__ if name in entry})


def as_entry(job: Job) -> dict[str, Any]:
    """A job's part of an entry: its prompt, its seed, and what else is its own."""
    return {name: value for name, value in asdict(job).items() if value is not None}


def as_line(entry: dict[str, Any]) -> str:
    """An entry as a line of a manifest."""
    return json.dumps(entry, ensure_ascii=False) + "\n"


def missing(folder: Path, jobs: Sequence[Job]) -> list[tuple[int, Job]]:
    """Indices and jobs of the images that are not there. Raises BadInput where the manifest names
    images of other jobs."""
    done = {entry["file"]: job_in(entry) for entry in _all_entries(folder)}
    for index, job in enumerate(jobs):
        found = done.get(image_name(index), job)
        if found != job:
            raise BadInput(
                f"{folder / MANIFEST}: {image_name(index)} is {_in_words(found)}, not "
                f"{_in_words(job)}; choose another folder"
            )
    there = {name for name in done if _is_whole(folder / name)}
    return [(i, job) for i, job in enumerate(jobs) if image_name(i) not in there]


def drawn_in(folder: Path) -> dict[Job, Path]:
    """The file of each job that a folder's manifest names; none where there is no manifest."""
    return {job_in(entry): folder / entry["file"] for entry in _all_entries(folder)}


def is_drawn(
    folder: Path, jobs: Sequence[Job], sampling: Sampling, settings: dict[str, Any]
) -> bool:
    """Whether `generate` has nothing left to draw. Raises BadInput where the folder holds images of
    another run."""
    if not (folder / SETTINGS).exists() or not (folder / MANIFEST).exists():
        return False
    take_settings(folder, sampling, settings)
    return not missing(folder, jobs)


def take_settings(
    folder: Path, sampling: Sampling, settings: dict[str, Any], precision: str | None = None
) -> None:
    """Write what all images of a folder have in common: `settings` (model, adapters), the sampling,
    but for the batch, which changes no image, and the `precision` they are drawn in, None where
    none is drawn. Raises BadInput where others are there."""
    path = folder / SETTINGS
    common = {k: v for k, v in asdict(sampling).items() if k != "batch"}
    wanted = settings | {k: v for k, v in common.items() if (k, v) not in _LEFT_OUT.items()}
    if precision not in (None, _UNSAID_PRECISION):
        wanted[_PRECISION] = precision
    if not path.exists():
        write_text(path, json.dumps(wanted, indent=2, ensure_ascii=False))
        return
    try:
        found = _parsed_json(path.read_text("utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: can't read it ({error}); draw into another folder") from error
    before = found.pop(_PRECISION, _UNSAID_PRECISION)
    if precision not in (None, before):
        raise BadInput(
            f"{folder}: holds images drawn in {before}, the others would be drawn in {precision}; "
            f"go on with `precision={before!r}`, or choose another folder"
        )
    wanted.pop(_PRECISION, None)
    changed = [k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k)]
    if changed:
        raise BadInput(
            f"{folder}: holds images of another run ({', '.join(sorted(changed))} differ); "
            "choose another folder"
        )


def merge_parts(folder: Path) -> None:
    """Make the manifest one file with one line for each image that is there, in their order.

    Lines that a kill cut short are dropped, and those of all parts put in.
    """
    path = folder / MANIFEST
    entries = {entry["file"]: entry for entry in _all_entries(folder)}
    whole = [name for name in entries if _is_whole(folder / name)]
    there = sorted(whole, key=lambda name: (len(name), name))  # 99999.png before 100000.png
    text = "".join(as_line(entries[name]) for name in there)
    if not path.exists() or path.read_bytes() != text.encode():
        write_text(path, text)
    for part in _parts(folder):
        part.unlink()


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob(_PART.format("*")))


def _all_entries(folder: Path) -> list[dict[str, Any]]:
    """The entries of the manifest and its parts."""
    files = [folder / MANIFEST, *_parts(folder)]
    return [entry for file in files if file.exists() for entry in _entries(file)]


def _entries(path: Path) -> list[dict[str, Any]]:
    """A manifest's whole lines. Raises BadInput for one that is damaged."""
    entries = [_parsed_json(line, path) for line in whole_lines(path)]
    for number, entry in enumerate(entries, 1):
        typed = all(type(value) in _ENTRY_TYPES.get(name, ()) for name, value in entry.items())
        whole = typed and {"file", "prompt", "seed"} <= entry.keys()
        if not (whole and _IMAGE.fullmatch(entry["file"])):
            raise BadInput(f"{path}: line {number}: damaged; draw into another folder")
    return entries


def _parsed_json(text: str, path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise BadInput(f"{path}: damaged ({error}); draw into another folder") from error


def _is_whole(image: Path) -> bool:
    """Whether an image is there; a repaired file system leaves files of no bytes."""
    return image.is_file() and image.stat().st_size > 0


def _in_words(job: Job) -> str:
    own = {name: value for name, value in as_entry(job).items() if name != "prompt"}
    return f"{job.prompt!r} with " + ", ".join(f"{name} {value}" for name, value in own.items())

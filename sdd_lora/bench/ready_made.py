"""Images that were drawn elsewhere, as a row of a table: copied into the bench's folder."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sdd_lora.errors import BadInput
from sdd_lora.generation import manifest
from sdd_lora.generation.sampling import Job, Sampling
from sdd_lora.io.atomic import atomic_output, write_text
from sdd_lora.io.pictures import reading

_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def ready_made(source: Path, jobs: Sequence[Job]) -> list[Path]:
    """The file of each job in a folder: by prompt and seed where a manifest of `generate` lies
    there; else the pictures by name, as many as the jobs and in their order.

    Raises BadInput where some are missing.
    """
    if not source.is_dir():
        raise BadInput(f"images: {source}: expected a folder of images, found no such folder")
    drawn = manifest.drawn_in(source)
    if drawn:
        if lacking := [job for job in jobs if job not in drawn]:
            raise BadInput(
                f"images: {source}: its manifest lacks {len(lacking)} of {len(jobs)} images, for "
                f"one {lacking[0].prompt!r} with seed {lacking[0].seed}"
            )
        return [drawn[job] for job in jobs]
    found = sorted(path for path in source.iterdir() if path.suffix.lower() in _PICTURES)
    if len(found) != len(jobs):
        raise BadInput(
            f"images: {source}: expected {len(jobs)} pictures, one for each prompt and seed of a "
            f"row in their order, or a manifest.jsonl that names them; found {len(found)}"
        )
    return found


def copy_ready_made(source: Path, jobs: Sequence[Job], target: Path, sampling: Sampling) -> int:
    """Copy a row's images into `target` as if they had been drawn there; returns how many.

    Raises BadInput for pictures that can't be read, and where other images lie in `target`.
    """
    files = ready_made(source, jobs)
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    settings: dict[str, Any] = {"images": digest}
    if manifest.is_drawn(target, jobs, sampling, settings):
        return 0
    target.mkdir(parents=True, exist_ok=True)
    manifest.take_settings(target, sampling, settings)
    lines = []
    for index, (path, job) in enumerate(zip(files, jobs, strict=True)):
        name = manifest.image_name(index)
        with reading(path, "expected a picture, can't read it"), Image.open(path) as picture:
            image = picture.convert("RGB")
        with atomic_output(target / name) as file:
            image.save(file, "PNG")
        lines.append(manifest.as_line({"file": name} | manifest.as_entry(job)))
    write_text(target / manifest.MANIFEST, "".join(lines))
    return len(files)

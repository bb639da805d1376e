"""Adapters to and from the hub, through its own client. Only safetensors are ever fetched."""

import json
import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from sdd_lora.adapter.alphas import PEFT_CONFIG_FILE, PEFT_MODEL_FILE
from sdd_lora.adapter.metrics import METRICS_FILE
from sdd_lora.errors import BadInput, SddLoraError
from sdd_lora.io.atomic import atomic_folder, refuse_existing, require_replaceable, sha256_of
from sdd_lora.io.download import download_file, files_of, hub_client, hub_errors, require_hub_id
from sdd_lora.progress import warn

ADAPTER_FILE, PEFT_TWIN_FILE = "adapter.safetensors", "adapter.peft.safetensors"
SIDECAR_FILE, CARD_FILE, RECIPE_FILE = "adapter.json", "README.md", "recipe.yaml"
#: the pictures of a run's measures, and the folders of a training
PICTURE_FILES, RUN_FOLDERS = "before-after*.png", ("state", "tensorboard", "snapshots", "samples")
#: What a run, diffusers and peft call the adapter in a folder or a repository.
ADAPTER_FILES = (ADAPTER_FILE, "pytorch_lora_weights.safetensors", PEFT_MODEL_FILE)
#: What a run's folder publishes; all of it but the adapter itself may be missing.
PUBLISHED = (ADAPTER_FILE, PEFT_TWIN_FILE, SIDECAR_FILE, CARD_FILE, RECIPE_FILE, METRICS_FILE)


def push(folder: Path, repository: str, private: bool = False) -> str:
    """Publish a run's folder; returns the commit's address.

    Raises BadInput where the folder holds no adapter, or another one than its metrics speak of, and
    SddLoraError where the hub doesn't take it.
    """
    require_hub_id(repository)
    if not (folder / ADAPTER_FILE).is_file():
        raise BadInput(f"{folder}: no {ADAPTER_FILE} in it; expected a run's folder")
    _check_measured(folder)
    api = hub_client()
    with hub_errors(repository):
        api.create_repo(repository, exist_ok=True, private=private)
        commit = api.upload_folder(
            folder_path=folder,
            repo_id=repository,
            allow_patterns=[*PUBLISHED, PICTURE_FILES],
            commit_message="Upload a safety adapter made with sdd_lora",
        )
    return commit.commit_url


def pull(repository: str, folder: Path, revision: str | None = None, force: bool = False) -> Path:
    """Fetch a published run into a folder, whole or not at all; returns the folder.

    Each file is checked against the hub's record of it, the adapter against `metrics.json` too.
    Other files are left where they are. Raises BadInput where the repository holds no adapter;
    SddLoraError where the hub can't be reached or a file isn't what the hub says.
    """
    require_hub_id(repository)
    refuse_existing(folder, force)
    require_replaceable(folder, (ADAPTER_FILE,), _is_run_file)
    commit, files = files_of(repository, revision)
    if ADAPTER_FILE not in files:
        raise BadInput(f"{repository}: no {ADAPTER_FILE} in it; expected a published run")
    with atomic_folder(folder) as target:
        for name in filter(is_published, files):
            (target / name).write_bytes(download_file(repository, commit, files[name]).read_bytes())
        _check_measured(target)
    return folder


def is_published(name: str) -> bool:
    """Whether `push` sends a file of this name."""
    picture = fnmatchcase(name, PICTURE_FILES) and not set(name) & {"/", "\\"}
    return name in PUBLISHED or picture


def download_adapter(repository: str, revision: str | None = None) -> Path:
    """A repository's adapter file, in the hub client's own cache. Raises as `pull` does."""
    require_hub_id(repository)
    try:
        commit, files = files_of(repository, revision)
    except SddLoraError:
        if (cached := _cached_adapter(repository, revision)) is not None:
            return cached
        raise
    if PEFT_CONFIG_FILE in files:  # lies beside the adapter in the cache: it tells its alpha
        download_file(repository, commit, files[PEFT_CONFIG_FILE])
    return download_file(repository, commit, files[_adapter_name(repository, files)])


def _cached_adapter(repository: str, revision: str | None) -> Path | None:
    """The adapter as an earlier download left it, where the hub can't be reached."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    snapshots = sorted((folder / "snapshots").glob(revision or "*"), key=os.path.getmtime)
    for snapshot in reversed(snapshots):
        try:
            name = _adapter_name(repository, [path.name for path in snapshot.iterdir()])
        except BadInput:
            continue
        warn(f"{repository}: the hub can't be reached; the copy in its client's cache is used")
        return snapshot / name
    return None


def _adapter_name(repository: str, files: Iterable[str]) -> str:
    """Which of a repository's files is the adapter. Raises BadInput where that can't be told."""
    found = [name for name in files if name.endswith(".safetensors")]
    for name in ADAPTER_FILES:
        if name in found:
            return name
    at_top = [name for name in found if "/" not in name]
    if len(at_top) == 1:
        return at_top[0]
    several = f"several: {', '.join(sorted(at_top)[:5])}" if at_top else "no .safetensors"
    raise BadInput(
        f"{repository}: no {ADAPTER_FILE} in it; expected {' or '.join(ADAPTER_FILES)}, or one "
        f".safetensors file, found {several}"
    )


def _is_run_file(file: Path) -> bool:
    """Whether a run of ours holds a file of that path."""
    return file.parts[0] in (*PUBLISHED, *RUN_FOLDERS) or file.match(PICTURE_FILES)


def _check_measured(folder: Path) -> None:
    """The numbers in `metrics.json` must be of the adapter beside them."""
    metrics = folder / METRICS_FILE
    if not metrics.is_file():
        return
    try:
        expected = json.loads(metrics.read_text("utf-8"))["adapter"]["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{metrics}: names no adapter.sha256; the file is damaged") from error
    found = sha256_of(folder / ADAPTER_FILE)
    if found != expected:
        raise BadInput(
            f"{metrics}: speaks of another adapter (sha256 {expected}) than {ADAPTER_FILE} is "
            f"({found}); measure this one, or remove the file"
        )

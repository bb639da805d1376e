"""Adapters to and from the hub, through its own client. Only safetensors are ever fetched."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdd_lora.adapter.alphas import PEFT_CONFIG_FILE, PEFT_MODEL_FILE
from sdd_lora.errors import BadInput, SddLoraError
from sdd_lora.io.atomic import atomic_folder, refuse_existing, require_replaceable, sha256_of
from sdd_lora.io.safetensors import header_from_bytes
from sdd_lora.progress import warn

if TYPE_CHECKING:
    from huggingface_hub import HfApi

ADAPTER_FILE = "adapter.safetensors"
#: What a run, diffusers and peft call the adapter in a folder or a repository.
ADAPTER_FILES = (ADAPTER_FILE, "pytorch_lora_weights.safetensors", PEFT_MODEL_FILE)
METRICS_FILE = "metrics.json"
#: What a run's folder publishes; all of it but the adapter itself may be missing.
PUBLISHED = (
    ADAPTER_FILE,
    "adapter.peft.safetensors",
    "adapter.json",
    "README.md",
    "recipe.yaml",
    METRICS_FILE,
    "before-after.png",
)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form owner/name."""
    return _HUB_ID.fullmatch(name) is not None


def push(folder: Path, repository: str, private: bool = False) -> str:
    """Publish a run's folder; returns the commit's address.

    Raises BadInput where the folder holds no adapter, or another one than its metrics speak of, and
    SddLoraError where the hub doesn't take it.
    """
    _require_id(repository)
    if not (folder / ADAPTER_FILE).is_file():
        raise BadInput(f"{folder}: no {ADAPTER_FILE} in it; expected a run's folder")
    _check_measured(folder)
    api = _client()
    with _hub_errors(repository):
        api.create_repo(repository, exist_ok=True, private=private)
        commit = api.upload_folder(
            folder_path=folder,
            repo_id=repository,
            allow_patterns=list(PUBLISHED),
            commit_message="Upload a safety adapter made with sdd_lora",
        )
    return commit.commit_url


def pull(repository: str, folder: Path, revision: str | None = None, force: bool = False) -> Path:
    """Fetch a published run into a folder, whole or not at all; returns the folder.

    Each file is checked against the hub's record of it, the adapter against `metrics.json` too.
    Other files are left where they are. Raises BadInput where the repository holds no adapter;
    SddLoraError where the hub can't be reached or a file isn't what the hub says.
    """
    _require_id(repository)
    refuse_existing(folder, force)
    require_replaceable(folder, (ADAPTER_FILE,), _is_run_file)
    commit, files = _listing(repository, revision)
    if ADAPTER_FILE not in files:
        raise BadInput(f"{repository}: no {ADAPTER_FILE} in it; expected a published run")
    with atomic_folder(folder) as target:
        for name in (name for name in PUBLISHED if name in files):
            (target / name).write_bytes(_download(repository, commit, files[name]).read_bytes())
        _check_measured(target)
    return folder


def download_adapter(repository: str, revision: str | None = None) -> Path:
    """A repository's adapter file, in the hub client's own cache. Raises as `pull` does."""
    _require_id(repository)
    try:
        commit, files = _listing(repository, revision)
    except SddLoraError:
        if (cached := _cached_adapter(repository, revision)) is not None:
            return cached
        raise
    if PEFT_CONFIG_FILE in files:  # lies beside the adapter in the cache: it tells its alpha
        _download(repository, commit, files[PEFT_CONFIG_FILE])
    return _download(repository, commit, files[_adapter_name(repository, files)])


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
    return file.parts[0] in (*PUBLISHED, "state", "tensorboard") or file.match("before-after*.png")


def _listing(repository: str, revision: str | None) -> tuple[str | None, dict[str, Any]]:
    """The commit and the files of a repository, by name."""
    with _hub_errors(repository):
        info = _client().model_info(repository, revision=revision, files_metadata=True)
    return info.sha, {entry.rfilename: entry for entry in info.siblings or []}


def _download(repository: str, commit: str | None, entry: Any) -> Path:
    """One file, checked against the hub's record (SHA-256 of large files, git's hash of others),
    and to be what its name says. Raises BadInput for other content under safetensors' name.
    """
    with _hub_errors(repository):
        path = Path(_client().hf_hub_download(repository, entry.rfilename, revision=commit))
    content = path.read_bytes()
    if entry.lfs is not None:
        found, expected = hashlib.sha256(content).hexdigest(), entry.lfs.sha256
    else:
        blob = b"blob %d\0" % len(content) + content
        found, expected = hashlib.sha1(blob).hexdigest(), entry.blob_id
    if found != expected:
        raise SddLoraError(
            f"{repository}: {entry.rfilename} is not what the hub says: hash {found}, expected "
            f"{expected}; remove {path} and pull again"
        )
    if entry.rfilename.endswith(".safetensors"):
        header_from_bytes(content, len(content), f"{repository}: {entry.rfilename}")
    return path


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


def _require_id(repository: str) -> None:
    if not is_hub_id(repository):
        raise BadInput(f"{repository}: expected a hub id, owner/name")


def _client() -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi()


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """One line for whatever the client raises: its own errors, or its HTTP library's."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise BadInput(
            f"{repository}: no such repository or revision on the hub, or not open to you; "
            "log in with `hf auth login` if it is private"
        ) from error
    except Exception as error:
        first = " ".join(str(error).split())[:200]
        raise SddLoraError(f"{repository}: the hub can't be used: {first}") from error

"""What is fetched from the hub, through its own client and into that client's cache."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdd_lora.errors import BadInput, SddLoraError
from sdd_lora.io.safetensors import header_from_bytes

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form owner/name."""
    return _HUB_ID.fullmatch(name) is not None


def require_hub_id(repository: str) -> None:
    """Raises BadInput for a name of another form than owner/name."""
    if not is_hub_id(repository):
        raise BadInput(f"{repository}: expected a hub id, owner/name")


def hub_client() -> "HfApi":
    """The hub's own client, which takes its address and token from the environment."""
    from huggingface_hub import HfApi

    return HfApi()


def files_of(repository: str, revision: str | None) -> tuple[str | None, dict[str, Any]]:
    """The commit and the files of a repository, by name. Raises as `hub_errors` does."""
    with hub_errors(repository):
        info = hub_client().model_info(repository, revision=revision, files_metadata=True)
    return info.sha, {entry.rfilename: entry for entry in info.siblings or []}


def download_file(repository: str, commit: str | None, entry: Any) -> Path:
    """One of `files_of` a repository, checked against the hub's record (SHA-256 of large files,
    git's hash of others), and to be what its name says.

    Raises BadInput for other content under safetensors' name; else as `hub_errors` does.
    """
    with hub_errors(repository):
        path = Path(hub_client().hf_hub_download(repository, entry.rfilename, revision=commit))
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


def download_model(repository: str) -> Path:
    """A model's own folder; single-file copies of it, which lie beside it, are left there.

    Raises BadInput where the hub doesn't have it or can't be reached.
    """
    with _named_by_user(repository):
        folder = hub_client().snapshot_download(
            repository,
            allow_patterns=["model_index.json", "*/*"],
            ignore_patterns=["*.msgpack", "*.onnx", "*.onnx_data"],
        )
    return Path(folder)


def download_pipeline(repository: str, **parts: Any) -> Path:
    """What a diffusers pipeline needs of a model, without those of `parts` that are None.

    Raises as `download_model` does.
    """
    from diffusers import StableDiffusionPipeline

    with _named_by_user(repository):
        folder = StableDiffusionPipeline.download(
            repository, use_safetensors=True, safety_checker=None, feature_extractor=None, **parts
        )
    return Path(folder)


@contextmanager
def hub_errors(repository: str) -> Iterator[None]:
    """One line for whatever the client raises: its own errors, or its HTTP library's.

    Raises BadInput for a repository that isn't there; else SddLoraError.
    """
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


@contextmanager
def _named_by_user(model: str) -> Iterator[None]:
    """BadInput for whatever goes wrong: a MODEL's name may as well be a file's, misspelt."""
    try:
        yield
    except Exception as error:
        first = " ".join(str(error).split())[:200]
        raise BadInput(
            f"{model}: no such file or folder, and not to be had from the hub ({first}). Offline, "
            "give a diffusers folder, a .safetensors file, or `demo` (the embedded model)"
        ) from error

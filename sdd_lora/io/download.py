"""What is fetched from the hub, through its own client and into that client's cache."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdd_lora.errors import BadInput, SddLoraError
from sdd_lora.io.safetensors import header_from_bytes

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoSibling

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
#: of a file that holds a part of a component's weights
SHARD = re.compile(r"-\d{5}-of-\d{5}")
_OTHER_FRAMEWORKS = (".msgpack", ".onnx", ".onnx_data", ".pb", ".h5", ".ot")


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


def files_of(repository: str, revision: str | None) -> tuple[str | None, "dict[str, RepoSibling]"]:
    """The commit and the files of a repository, by name. Raises as `hub_errors` does."""
    with hub_errors(repository):
        info = hub_client().model_info(repository, revision=revision, files_metadata=True)
    return info.sha, {entry.rfilename: entry for entry in info.siblings or []}


def download_file(repository: str, commit: str | None, entry: "RepoSibling") -> Path:
    """One of `files_of` a repository, checked against the hub's record (SHA-256 of large files,
    git's hash of others), and to be what its name says.

    Raises BadInput for other content under safetensors' name; else as `hub_errors` does.
    """
    with hub_errors(repository):
        path = Path(hub_client().hf_hub_download(repository, entry.rfilename, revision=commit))
    content = path.read_bytes()
    if entry.lfs is not None:
        digest, expected = hashlib.sha256(content), entry.lfs.sha256
    else:
        digest = hashlib.sha1(b"blob %d\0" % len(content) + content)
        expected = str(entry.blob_id)
    found = digest.hexdigest()
    if found != expected:
        raise SddLoraError(
            f"{repository}: {entry.rfilename} is not what the hub says: hash {found}, expected "
            f"{expected}; remove {path} and pull again"
        )
    if entry.rfilename.endswith(".safetensors"):
        header_from_bytes(content, len(content), f"{repository}: {entry.rfilename}")
    return path


def download_model(repository: str) -> Path:
    """A model's own folder, with one copy of each component's weights and without whole models in
    one file, which lie beside them; without a network, what the client's cache has.

    Raises BadInput where neither has it.
    """
    from huggingface_hub import try_to_load_from_cache

    with _named_by_user(repository):
        try:
            _, files = files_of(repository, None)
        except SddLoraError as error:
            cached = try_to_load_from_cache(repository, "model_index.json")
            if isinstance(error, BadInput) or not isinstance(cached, str):
                raise
            return Path(cached).parent
        wanted = one_copy(list(files))
        folder = hub_client().snapshot_download(repository, allow_patterns=wanted)
    return Path(folder)


def one_copy(names: Sequence[str]) -> list[str]:
    """A model's files without further copies of a component's weights: safetensors come before
    pickles, plain weights before variants such as `fp16` and `non_ema`, then by name."""
    wanted, copies = [], defaultdict[str, dict[frozenset[str], list[str]]](dict)
    for name in names:
        folder, _, file = name.rpartition("/")
        label = frozenset(SHARD.sub("", file).split(".")) - {"index", "json"}
        if name == "model_index.json" or (folder and not label & {"safetensors", "bin"}):
            wanted.append(name)
        elif folder:
            copies[folder].setdefault(label, []).append(name)
    for of_folder in copies.values():
        best = min(of_folder, key=lambda at: ("bin" in at, len(at), sorted(at)))
        wanted += of_folder[best]
    return [name for name in wanted if not name.endswith(_OTHER_FRAMEWORKS)]


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

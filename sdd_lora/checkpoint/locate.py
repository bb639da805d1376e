"""A MODEL as people name it → the file or folder on this disk."""

from importlib.resources import files
from pathlib import Path

from sdd_lora.errors import BadInput
from sdd_lora.io.atomic import refuse_existing, require_replaceable
from sdd_lora.io.download import download_model

#: The models that travel with the package.
DEMO_FOLDER = Path(str(files("sdd_lora.demo").joinpath("model")))
COMMUNITY_FILE = Path(str(files("sdd_lora.demo").joinpath("community.safetensors")))

EMBEDDED = {"demo": DEMO_FOLDER, "demo-community": COMMUNITY_FILE}

MODEL_SUFFIXES = (".safetensors", ".ckpt")

#: One of them is in every folder that diffusers saves a model in.
_MARKS_OF_A_MODEL = ("model_index.json", "unet/config.json", "diffusion_pytorch_model*")
_COMPONENT_FOLDERS = {
    "feature_extractor",
    "image_encoder",
    "safety_checker",
    "scheduler",
    "text_encoder",
    "text_encoder_ema",
    "tokenizer",
    "unet",
    "unet_ema",
    "vae",
}
_COMPONENT_SUFFIXES = {
    ".bin",
    ".h5",
    ".json",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".pb",
    ".safetensors",
    ".txt",
}
_FILES_BESIDE_COMPONENTS = {".gitattributes", "README.md", "config.json", "model_index.json"}


def locate(model: str | Path) -> Path:
    """The path of `demo`, `demo-community`, a folder, a file, or a hub id, which is downloaded.

    Raises BadInput where there is no such file, or no hub can be reached.
    """
    return local(model) or download_model(str(model))


def local(model: str | Path) -> Path | None:
    """Like `locate`, but None for a hub id: nothing is downloaded."""
    name = str(model)
    if name in EMBEDDED:
        return EMBEDDED[name]
    path = named(Path(model))
    if path.exists():
        return _snapshot(path)
    if path.is_symlink():
        raise BadInput(f"{name}: a link to {path.readlink()}, which is not there")
    if path.suffix.lower() in MODEL_SUFFIXES or name.count("/") != 1 or path.is_absolute():
        raise BadInput(f"{name}: no such file or folder, and no hub id (owner/name) either")
    return None


def locate_file(file: Path) -> Path:
    """FILE of a verb that takes adapters as well: what is there of that name, or else a MODEL."""
    return _snapshot(file) if file.exists() else locate(file.as_posix())


def _snapshot(path: Path) -> Path:
    """The model in a hub cache's folder of a repository, `models--owner--name`; else the path.

    Raises BadInput where it holds several snapshots and doesn't say which of them is `main`.
    """
    snapshots = path / "snapshots"
    if not snapshots.is_dir() or (path / "model_index.json").exists():
        return path
    main = path / "refs" / "main"
    if main.is_file():
        snapshot = snapshots / main.read_text(encoding="utf-8").strip()
        if snapshot.is_dir():
            return snapshot
    found = sorted(folder for folder in snapshots.iterdir() if folder.is_dir())
    if len(found) != 1:
        raise BadInput(
            f"{path}: a hub cache's folder; give one of its {len(found)} models in {snapshots}"
        )
    return found[0]


def require_new_output(output: Path, model: Path, force: bool) -> None:
    """Raises BadInput where an output exists (unless with `force`), or overlaps with its input."""
    if output.exists() and output.samefile(model):
        raise BadInput(f"{output}: is the input itself; choose another output or `in_place=True`")
    refuse_existing(output, force)
    if model.is_dir() and output.resolve().is_relative_to(model.resolve()):
        raise BadInput(f"{output}: lies inside the input; choose another output")
    require_apart(output, model)
    if model.is_dir():

        def is_part(file: Path) -> bool:
            return _is_model_file(file) or (model / file).exists()

        require_replaceable(output, _MARKS_OF_A_MODEL, is_part)


def require_apart(output: Path, *inputs: Path) -> None:
    """Raises BadInput where writing `output` would replace an input, or a folder that one is in."""
    for path in inputs:
        same = output.exists() and path.exists() and output.samefile(path)
        if same or path.resolve().is_relative_to(output.resolve()):
            raise BadInput(f"{output}: would replace {path}, which is read; choose another name")


def _is_model_file(file: Path) -> bool:
    """Whether diffusers would save a file of that path in a model's folder."""
    if len(file.parts) == 1:
        return file.name in _FILES_BESIDE_COMPONENTS or file.name.startswith(
            "diffusion_pytorch_model"
        )
    return file.parts[0] in _COMPONENT_FOLDERS and file.suffix.lower() in _COMPONENT_SUFFIXES


def named(path: Path) -> Path:
    """The same path with a name; `.` and `..` are none that another file could stand beside."""
    return path.resolve() if path.name in ("", "..") else path

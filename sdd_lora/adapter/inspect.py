"""What is in an adapter's file, from its header and its alphas: no factor is read."""

import hashlib
import io
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sdd_lora import sd1 as names
from sdd_lora.adapter import formats
from sdd_lora.adapter.alphas import scalar
from sdd_lora.adapter.factors import require_alpha
from sdd_lora.adapter.metadata import Metadata, is_edited
from sdd_lora.errors import BadInput
from sdd_lora.io.safetensors import NUMPY_DTYPES, Header, header_of, open_input, read_tensor
from sdd_lora.io.torch_zip import is_torch_file


@dataclass(frozen=True)
class AdapterDescription:
    """An adapter's file, described.

    `keys` (by part: "down", "up", "alpha"), `ranks`, `scales` (alpha / rank) and `shapes` (of the
    weights that it changes) are per canonical module name; `dtypes` counts tensors by safetensors'
    codes; `alphas_from` names where alphas that the file doesn't store are known from;
    `embeddings` are textual inversions beside the adapter; `edited` says whether another tool
    changed the tensors under our metadata; `sha256` is the file's hash, `data_sha256` that of what
    follows the header.
    """

    path: Path
    format: str
    keys: dict[str, dict[str, str]]
    ranks: dict[str, int]
    scales: dict[str, float]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, int]
    header: Header
    alphas_from: str
    embeddings: list[str]
    metadata: Metadata
    edited: bool
    sha256: str
    data_sha256: str

    @property
    def autov2(self) -> str:
        """The short hash that sites know files by."""
        return self.sha256[:10]

    @property
    def autov3(self) -> str:
        """The short hash that A1111 knows LoRAs by: of the tensors, whatever the metadata say."""
        return self.data_sha256[:12]

    @property
    def parameters(self) -> int:
        return sum(
            rank * (shape[0] + math.prod(shape[1:]))
            for rank, shape in zip(self.ranks.values(), self.shapes.values(), strict=True)
        )

    @property
    def family(self) -> str:
        """SD 1.x, or SD 1.x's structure at other widths."""
        if names.misfits(self.shapes, names.module_shapes(names.SD15)):
            return "SD 1.x in structure, of other widths"
        return "SD 1.x"

    def kinds(self) -> dict[str, int]:
        """How many modules of each kind, such as "attn2.to_k"."""
        return dict(Counter(_kind_of_module(name) for name in self.ranks))


def describe_adapter(path: Path) -> AdapterDescription:
    """Read the header of a safetensors adapter. Raises BadInput as loading would, for what it says.

    A legacy pickle has no header and is refused.
    """
    if is_torch_file(path):
        raise BadInput(f"{path}: a legacy pickle, without a header; sdd-lora convert it first")
    with open_input(path) as file:
        header = header_of(file, str(path))
        file.seek(0)
        content = file.read()
    try:
        return _describe_adapter(path, header, content)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error


def _describe_adapter(path: Path, header: Header, content: bytes) -> AdapterDescription:
    tensor_shapes = {key: info.shape for key, info in header.tensors.items()}
    modules = formats.group(tensor_shapes)
    alphas = formats.known_alphas(modules, tensor_shapes, header.metadata, path)
    ranks, scales, shapes = {}, {}, {}
    for name, keys in modules.items():
        try:
            down, up = (header.tensors[keys[part]] for part in ("down", "up"))
            for info in (down, up):
                formats.require_float(NUMPY_DTYPES[info.dtype])
            ranks[name], _, shapes[name] = formats.geometry_of(name, down.shape, up.shape)
            if "alpha" in keys:
                alpha = scalar(read_tensor(io.BytesIO(content), header, keys["alpha"]))
            else:
                alpha = alphas.alpha_of(name, ranks[name])
            require_alpha(alpha)
        except BadInput as error:
            raise BadInput(f"{name}: {error}") from error
        scales[name] = alpha / ranks[name]
    data_hash = hashlib.sha256(content[header.data_start :]).hexdigest()
    return AdapterDescription(
        path=path,
        format=formats.format_of(header.tensors),
        keys=modules,
        ranks=ranks,
        scales=scales,
        shapes=shapes,
        dtypes=dict(Counter(info.dtype for info in header.tensors.values())),
        header=header,
        alphas_from="" if all("alpha" in keys for keys in modules.values()) else alphas.source,
        embeddings=formats.bundled_embeddings(header.tensors),
        metadata=Metadata.from_header(header.metadata, data_hash),
        edited=is_edited(header.metadata, data_hash),
        sha256=hashlib.sha256(content).hexdigest(),
        data_sha256=data_hash,
    )


def _kind_of_module(name: str) -> str:
    """A module's name without its place."""
    for mark in ("transformer_blocks.0.", "encoder.layers."):
        if mark in name:
            tail = name.partition(mark)[2]
            return f"text {tail.partition('.')[2]}" if mark == "encoder.layers." else tail
    return name.rpartition(".")[2]

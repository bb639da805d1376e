"""An adapter: the low-rank change of a model's weights, and what is known about it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from sdd_lora import sd1 as names
from sdd_lora.adapter import formats, hub
from sdd_lora.adapter.factors import Factors
from sdd_lora.adapter.metadata import ENTRY_KEY, MergedPart, Metadata
from sdd_lora.errors import BadInput
from sdd_lora.io.atomic import atomic_output
from sdd_lora.io.safetensors import data_sha256, read_tensors, serialize

if TYPE_CHECKING:
    import torch

__all__ = ["ENTRY_KEY", "STORED_DTYPES", "Adapter", "Factors"]

#: What a run's folder, and a folder that diffusers saved, call the adapter.
_FILES_OF_FOLDER = (hub.ADAPTER_FILE, "pytorch_lora_weights.safetensors")
PICKLES = (".pt", ".pth", ".bin", ".ckpt")

STORED_DTYPES: dict[str, np.dtype] = {
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp32": np.dtype(np.float32),
}


@dataclass(frozen=True, eq=False, init=False)
class Adapter:
    """Factors per module, and metadata. It is a *delta*: never to be confused with a weight.

    `factors` maps canonical names (see `sdd_lora.sd1`) to `Factors`. `metadata` travels in the
    file's header; it may be given as a dictionary of `Metadata`'s fields and others, JSON-able.
    """

    factors: dict[str, Factors]
    metadata: Metadata

    def __init__(
        self, factors: dict[str, Factors], metadata: Metadata | Mapping[str, Any] | None = None
    ) -> None:
        object.__setattr__(self, "factors", factors)
        object.__setattr__(self, "metadata", Metadata.of(metadata or {}))

    @classmethod
    def load(cls, path: str | Path) -> "Adapter":
        """Read a file of any format, the adapter of a run's folder, or one from the hub.

        Raises BadInput, in one line, where there is none, or it is broken, or of another family.
        """
        path = adapter_file(path)
        tensors, header = _read(path)
        try:
            factors = formats.decode_factors(tensors, header)
            metadata = Metadata.from_header(header)
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from error
        if metadata.name is None:
            metadata |= {"name": path.stem}
        return cls(factors, metadata)

    @classmethod
    def from_state_dict(
        cls, tensors: Mapping[str, Any], metadata: Mapping[str, Any] | None = None
    ) -> "Adapter":
        """From tensors (numpy or torch) of any format; `<module>.alpha` where alpha ≠ rank."""
        return cls(formats.decode_factors(tensors, {}), metadata)

    def to_state_dict(self, format: str = "kohya") -> dict[str, np.ndarray]:
        """fp32 arrays, named in one of kohya, peft, ldm, attn-procs; the scale is folded in."""
        return formats.encode_factors(self.factors, format)

    def save(self, path: str | Path, format: str = "kohya", dtype: str = "fp16") -> Path:
        """Write a safetensors file, whole or not at all; the same adapter gives the same bytes.

        `format`: kohya (the file that everybody loads), peft, ldm or attn-procs; `dtype`: fp16,
        bf16 or fp32. Raises BadInput where the format or dtype can't hold the adapter.
        """
        path = Path(path)
        require_file_name(path)
        pieces = serialize(*self.file_content(format, dtype))
        with atomic_output(path) as file:
            file.writelines(pieces)
        return path

    def file_content(self, format: str, dtype: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """The tensors and the header's metadata that `save` writes."""
        tensors = self._cast(format, dtype)
        header = self.metadata.header_entries(self.rank, data_sha256(tensors))
        own = self.metadata.own_entry() | {"identity": self.identity}
        header[ENTRY_KEY] = json.dumps(own, sort_keys=True, ensure_ascii=False)
        if format == "peft":
            header[formats.PEFT_METADATA_KEY] = formats.peft_metadata(self.factors)
        return tensors, header

    def delta(self, name: str) -> "torch.Tensor":
        """ΔW of a module, dense, (out, in) fp32. Raises KeyError where the adapter has none."""
        import torch

        return torch.from_numpy(self.factors[name].delta())

    def scaled(self, weight: float) -> "Adapter":
        """weight · ΔW: a stack of one."""
        factors = {name: part.scaled(weight) for name, part in self.factors.items()}
        return self.derived(factors, merged_from=[self.as_part(weight)])

    def derived(self, factors: dict[str, Factors], **metadata: Any) -> "Adapter":
        """Another delta made from this one: the identity and what was measured don't carry over."""
        kept = self.metadata.without("identity", "measures", "resized_from")
        return Adapter(factors, kept | metadata)

    @property
    def name(self) -> str:
        return self.metadata.name_or_default

    @property
    def rank(self) -> int:
        """The highest rank of a module."""
        return max(part.rank for part in self.factors.values())

    @property
    def parameters(self) -> int:
        """How many numbers the factors hold."""
        return sum(part.parameters for part in self.factors.values())

    @property
    def identity(self) -> str:
        """A hash that stays through conversion between formats and dtypes.

        SHA-256 of the factors when the adapter was first saved; kept in the metadata from then on.
        """
        return self.metadata.identity or _fingerprint(self.factors)

    def fits(self, sizes: names.Widths) -> bool:
        """Whether its matrices have the sizes of a model of these widths."""
        shapes = {name: part.weight_shape for name, part in self.factors.items()}
        return not names.misfits(shapes, names.module_shapes(sizes))

    @property
    def lineage(self) -> tuple[str, ...]:
        """Identities of all that this one was made from, at any depth, each once."""
        return self.metadata.lineage

    def as_part(self, weight: float) -> MergedPart:
        """What `merged_from` of a sum says of this adapter."""
        return MergedPart(
            name=self.name,
            identity=self.identity,
            lineage=list(self.lineage),
            weight=weight,
            concepts=self.metadata.concepts,
        )

    def norm(self) -> float:
        """The Frobenius norm of the whole delta."""
        return float(np.sqrt(sum(part.norm() ** 2 for part in self.factors.values())))

    def _cast(self, format: str, dtype: str) -> dict[str, np.ndarray]:
        """Tensors in the dtype they are stored in. alpha stays fp32: bf16 holds no 257."""
        if dtype not in STORED_DTYPES:
            raise BadInput(f"dtype {dtype!r}: expected one of {', '.join(STORED_DTYPES)}")
        factors = self.factors
        if dtype == "fp16":
            factors = {name: part.folded().balanced() for name, part in factors.items()}
        tensors = formats.encode_factors(factors, format)
        return {
            key: tensor if key.endswith(".alpha") else _fitting(key, tensor, dtype)
            for key, tensor in tensors.items()
        }


def adapter_file(source: str | Path) -> Path:
    """The file of an adapter given as a file, a run's folder, or a hub id, which is downloaded.

    Raises BadInput where there is none.
    """
    path = Path(source)
    if path.is_dir():
        for name in _FILES_OF_FOLDER:
            if (path / name).is_file():
                return path / name
        expected = " or ".join(_FILES_OF_FOLDER)
        raise BadInput(f"{path}: no adapter in this folder; expected {expected}")
    if path.exists():
        return path
    if path.suffix in (".safetensors", *PICKLES) or not hub.is_hub_id(str(source)):
        raise BadInput(f"{path}: no such file; expected an adapter, a run's folder or a hub id")
    return hub.download_adapter(str(source))


def require_file_name(path: Path) -> None:
    """Raises BadInput where a reader would take the adapter that is saved there for a pickle."""
    if path.suffix.lower() in PICKLES:
        raise BadInput(
            f"{path}: safetensors is written, no pickle; name it {path.stem}.safetensors"
        )


def stored_dtype(source: str | Path) -> str:
    """The dtype that an adapter's factors are stored in, of `STORED_DTYPES`; fp32 for others, and
    where there are several.
    """
    tensors, _ = _read(adapter_file(source))
    found = {
        str(tensor.dtype).removeprefix("torch.")
        for key, tensor in tensors.items()
        if not key.endswith(".alpha")
    }
    return next((name for name, dtype in STORED_DTYPES.items() if found == {str(dtype)}), "fp32")


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder is a run's, or one that diffusers saved an adapter in."""
    return any((path / name).is_file() for name in _FILES_OF_FOLDER)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    if path.suffix.lower() not in PICKLES:
        return read_tensors(path)
    return _read_pickle(path), {}


def _read_pickle(path: Path) -> dict[str, Any]:
    """Tensors of a legacy file, through torch's unpickler of tensors alone: nothing is executed."""
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes are a program that may stumble over anything
        raise BadInput(
            f"{path}: not read: it is broken, or holds more than tensors, which is not executed "
            f"({type(error).__name__})"
        ) from error
    if not isinstance(content, dict):
        raise BadInput(f"{path}: expected a dictionary of tensors")
    for key, value in content.items():
        if not isinstance(key, str) or not _is_plain(value):
            raise BadInput(f"{path}: expected a dictionary of plain tensors by name, found {key!r}")
    return content


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor of real numbers side by side, not sparse, quantised or absent."""
    import torch

    return (
        torch.is_tensor(value)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_complex()
    )


def _fitting(key: str, tensor: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        stored = tensor.astype(STORED_DTYPES[dtype])
    if not np.isfinite(stored).all():
        raise BadInput(f"{key}: values up to {np.abs(tensor).max():.3g} don't fit {dtype}")
    return stored


def _fingerprint(factors: Mapping[str, Factors]) -> str:
    digest = hashlib.sha256()
    for name in sorted(factors):
        part = factors[name].folded()
        digest.update(f"{name} {part.down.shape} {part.up.shape}\n".encode())
        digest.update(np.ascontiguousarray(part.down).tobytes())
        digest.update(np.ascontiguousarray(part.up).tobytes())
    return digest.hexdigest()

"""An adapter: the low-rank change of a model's weights, and what is known about it."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from sdd_lora import sd1 as names
from sdd_lora.adapter import formats, hub
from sdd_lora.adapter.alphas import (
    PEFT_CONFIG_FILE,
    PEFT_METADATA_KEY,
    PEFT_MODEL_FILE,
    peft_config,
    peft_metadata,
)
from sdd_lora.adapter.factors import Factors
from sdd_lora.adapter.metadata import (
    ENTRY_KEY,
    MergedPart,
    Metadata,
    is_edited,
    shortened,
)
from sdd_lora.errors import BadInput, SddLoraError
from sdd_lora.io.atomic import atomic_folder, atomic_output, require_replaceable
from sdd_lora.io.download import is_hub_id
from sdd_lora.io.safetensors import data_sha256, header_of, open_input, read_tensor, serialize
from sdd_lora.io.torch_zip import is_torch_file, require_torch_zip
from sdd_lora.progress import warn

if TYPE_CHECKING:
    import torch

__all__ = ["ENTRY_KEY", "STORED_DTYPES", "Adapter", "Factors"]

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
        tensors, header, data_hash = _read_file(path)
        try:
            factors = formats.decode_factors(tensors, header, path)
            metadata = Metadata.from_header(header, data_hash)
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from error
        if is_edited(header, data_hash):
            warn(
                f"{path}: another tool changed its tensors since sdd_lora wrote them: measures, "
                "identity and recipe in its header were another adapter's, and are left out"
            )
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
        return formats.encode_factors(formats.arranged(self.factors, format), format)

    def save(self, path: str | Path, format: str | None = None, dtype: str = "fp16") -> Path:
        """Write a safetensors file, whole or not at all; the same adapter gives the same bytes.

        `format`: kohya (the file that everybody loads), peft, ldm or attn-procs; portable of a
        portable adapter, and there the default. `dtype`: fp16, bf16 or fp32. With peft, a path
        without a suffix becomes the folder that peft reads. Raises BadInput where the format or
        dtype can't hold the adapter.
        """
        path = Path(path)
        if format == "peft" and not path.suffix:
            return self._save_peft_folder(path, dtype)
        require_file_name(path)
        pieces = serialize(*self.file_content(format or self.own_format, dtype))
        with atomic_output(path) as file:
            file.writelines(pieces)
        return path

    def _save_peft_folder(self, folder: Path, dtype: str) -> Path:
        """Write what peft's own `PeftModel.from_pretrained` reads."""
        config = peft_config(self.factors, self.metadata.base_model)
        pieces = serialize(*self.file_content("peft-folder", dtype))
        parts = (PEFT_MODEL_FILE, PEFT_CONFIG_FILE)
        require_replaceable(folder, parts, lambda path: path.as_posix() in parts)
        with atomic_folder(folder) as target:
            with (target / PEFT_MODEL_FILE).open("wb") as file:
                file.writelines(pieces)
            (target / PEFT_CONFIG_FILE).write_text(config, "utf-8")
        return folder

    def file_content(self, format: str, dtype: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """The tensors and the header's metadata that `save` writes."""
        if dtype not in STORED_DTYPES:
            raise BadInput(f"dtype {dtype!r}: expected one of {', '.join(STORED_DTYPES)}")
        factors = formats.arranged(self.factors, format)
        if dtype == "fp16":
            factors = {name: part.balanced() for name, part in factors.items()}
        tensors = {
            # alpha stays fp32: bf16 holds no 257
            key: tensor if key.endswith(".alpha") else _fitting(key, tensor, dtype)
            for key, tensor in formats.encode_factors(factors, format).items()
        }
        data_hash = data_sha256(tensors)
        alpha = max(part.alpha for part in factors.values())
        header = {}
        if format != "portable":  # no user interface would show the entries
            header = self.metadata.header_entries(int(alpha), data_hash)
        known = {"identity": self.identity, "tensors_sha256": data_hash}
        own = self.metadata.own_entry() | known
        header[ENTRY_KEY] = json.dumps(own, sort_keys=True, ensure_ascii=False)
        if format == "peft":
            header[PEFT_METADATA_KEY] = peft_metadata(factors)
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
        """Another delta made from this one: the identity and what was measured or drawn don't carry
        over."""
        kept = self.metadata.without("identity", "measures", "resized_from")
        return Adapter(factors, kept.without_thumbnail() | metadata)

    @property
    def is_portable(self) -> bool:
        """Whether it changes the prompts' embeddings, for any model of their width."""
        return names.EMBEDDINGS in self.factors

    @property
    def own_format(self) -> str:
        """The format to save it in where none is asked for."""
        return "portable" if self.is_portable else "kohya"

    @property
    def modules(self) -> dict[str, Factors]:
        """The factors by a model's modules: of a portable adapter, those of every to_k and to_v.
        `factors.on(W)` are those of what is added to a weight W."""
        if not self.is_portable:
            return self.factors
        return dict.fromkeys(names.READ_EMBEDDINGS, self.factors[names.EMBEDDINGS])

    def on(self, weight_of: Callable[[str], np.ndarray]) -> "Adapter":
        """The adapter for one model, whose weights (out, in) `weight_of` gives by module name.

        Of a portable adapter: ΔW = W · (up @ down). Any other is itself.
        """
        if not self.is_portable:
            return self
        factors = {name: part.on(weight_of(name)) for name, part in self.modules.items()}
        return Adapter(factors, self.metadata | {"identity": self.identity})

    def __repr__(self) -> str:
        sizes = f"rank {self.rank}, {len(self.factors)} modules, {self.parameters:,} parameters"
        erased = shortened(self.metadata.concepts, 3)
        return f"Adapter({self.name!r}, {sizes}{f', erases {erased}' if erased else ''})"

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


def adapter_file(source: str | Path) -> Path:
    """The file of an adapter given as a file, a run's folder, or a hub id, which is downloaded.

    Raises BadInput where there is none.
    """
    path = Path(source)
    if path.is_dir():
        for name in hub.ADAPTER_FILES:
            if (path / name).is_file():
                return path / name
        expected = " or ".join(hub.ADAPTER_FILES)
        raise BadInput(f"{path}: no adapter in this folder; expected {expected}")
    if path.exists():
        return path
    if path.suffix.lower() in (".safetensors", *PICKLES) or not is_hub_id(str(source)):
        raise BadInput(f"{path}: no such file; expected an adapter, a run's folder or a hub id")
    try:
        return hub.download_adapter(str(source))
    except SddLoraError as error:
        raise type(error)(f"{path}: no such file or folder; as a hub id: {error}") from error


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
    tensors, *_ = _read_file(adapter_file(source))
    found = {
        str(tensor.dtype).removeprefix("torch.")
        for key, tensor in tensors.items()
        if not key.endswith(".alpha")
    }
    return next((name for name, dtype in STORED_DTYPES.items() if found == {str(dtype)}), "fp32")


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder is a run's, or one that diffusers or peft saved an adapter in."""
    return any((path / name).is_file() for name in hub.ADAPTER_FILES)


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, str], str]:
    """Tensors, the header's metadata, and the SHA-256 of the bytes after the header."""
    if is_torch_file(path):
        return _read_pickle(path), {}, ""
    with open_input(path) as file:
        header = header_of(file, str(path))
        tensors = {name: read_tensor(file, header, name) for name in header.tensors}
        file.seek(header.data_start)
        return tensors, header.metadata, hashlib.sha256(file.read()).hexdigest()


def _read_pickle(path: Path) -> dict[str, Any]:
    """Tensors of a legacy file, through torch's unpickler of tensors alone: nothing is executed."""
    import torch

    require_torch_zip(path)
    try:
        with open_input(path) as file:  # by its name alone, torch takes it for safetensors
            content = torch.load(file, map_location="cpu", weights_only=True)
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

"""The oracle: a `demo` that never saw a group or a style: what attacks "find" in it is the floor.

The UNet and the text encoder start from random weights and see the drawings and captions of
`demo`, less every picture that shows the left-out thing, alone or beside another. The autoencoder,
the scale of its latents and the tokenizer are the shipped ones, so that latents and token ids mean
the same in both models. The autoencoder has therefore seen the pixels of what is left out, and the
tokenizer has merges for its words; neither links a word to a picture.
"""

from pathlib import Path

import torch

from sdd_lora.demo.build import diffusion
from sdd_lora.demo.build.export import save_folder
from sdd_lora.demo.vocabulary import groups, nouns, styles
from sdd_lora.sd.pipeline import load_pipeline

STEPS = 5000


def without(encoded: dict[str, torch.Tensor], left_out: str) -> dict[str, torch.Tensor]:
    """The rows of `diffusion.encode_pictures` that show nothing of a group or a style, by name."""
    columns: tuple[str, ...]
    if left_out in groups():
        members = [i for i, noun in enumerate(nouns()) if noun.group == left_out]
        columns = ("first", "second")
    else:
        members, columns = [list(styles()).index(left_out)], ("style",)
    shown = torch.stack([torch.isin(encoded[c], torch.tensor(members)) for c in columns]).any(0)
    return {k: rows[~shown] for k, rows in encoded.items() if rows.ndim}


def state_of(work: Path, left_out: str) -> Path:
    """The file that a run's state is kept in."""
    return work / f"oracle-{left_out}.pt"


def folder_of(work: Path, left_out: str) -> Path:
    """The folder that the model is written to, unless another is given."""
    return work / f"oracle-{left_out}"


def train(work: Path, left_out: str, steps: int, learning_rate: float) -> None:
    """Train, or resume; a finished run is left as it is.

    A run may be resumed with other `steps`: its learning rate goes on along the cosine that ends
    there.
    """
    torch.manual_seed(0)
    shipped = load_pipeline("demo", dtype=torch.float32, device="cpu")
    encoded = diffusion.encode_pictures(
        work,
        shipped.vae,
        "latents-shipped.pt",
        scale=torch.tensor(shipped.vae.config.scaling_factor),
    )
    diffusion.train(
        without(encoded, left_out),
        diffusion.make_model(shipped.tokenizer),
        shipped.tokenizer,
        state_of(work, left_out),
        steps,
        learning_rate,
        misses={},
    )


def export(work: Path, left_out: str, folder: Path) -> None:
    """Write a diffusers folder in fp16: the run's averaged weights, all else as in `demo`.

    Raises FileNotFoundError where no run has saved a state.
    """
    state = state_of(work, left_out)
    if not state.exists():
        raise FileNotFoundError(f"{state}: no run to export; train one with the stage oracle")
    pipeline = load_pipeline("demo", dtype=torch.float16, device="cpu")
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    average = diffusion.average_so_far([state], pipeline.tokenizer)
    average.copy_to(torch.nn.ModuleDict(parts))
    save_folder(pipeline, folder)

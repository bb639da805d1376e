"""Learned words (textual inversion): vectors that stand for a token of their own in prompts.

Read as data from A1111's .pt (`string_to_param`), diffusers' learned_embeds (.safetensors, .bin)
and safetensors files of one tensor; no pickle is executed.
"""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from transformers import AddedToken

from sdd_lora.checkpoint.copying import as_array, read_bytes
from sdd_lora.checkpoint.layout import read_any_header
from sdd_lora.errors import BadInput
from sdd_lora.io.safetensors import open_input


def named_embedding(text: str) -> tuple[str, Path]:
    """ "NAME=FILE" or "FILE" → (the token's name, its file); by default the file's name."""
    name, equals, file = text.partition("=")
    if not equals or Path(text).exists():
        return Path(text).stem, Path(text)
    return name.strip(), Path(file)


def read_embedding(path: Path) -> torch.Tensor:
    """The vectors (n, d), fp32, of a file. Raises BadInput where it doesn't hold one tensor."""
    header = read_any_header(path)
    if len(header.tensors) != 1:
        found = ", ".join(sorted(header.tensors)[:4])
        raise BadInput(
            f"{path}: expected one learned embedding, found {len(header.tensors)} tensors ({found})"
        )
    ((key, info),) = header.tensors.items()
    with open_input(path) as file:
        vectors = as_array(read_bytes(file, header, key), info).astype("float32")
    if vectors.ndim not in (1, 2) or vectors.size == 0:
        raise BadInput(f"{path}: {key}: expected vectors (n, width), found {vectors.shape}")
    return torch.from_numpy(vectors.reshape(-1, vectors.shape[-1]).copy())


@torch.no_grad()
def add_embedding(pipeline: StableDiffusionPipeline, name: str, path: Path) -> None:
    """Teach a pipeline's tokenizer and text encoder a word; prompts name it as it is.

    Raises BadInput for another width than the model's, and for a name that is a token already.
    """
    vectors = read_embedding(path)
    width = pipeline.text_encoder.config.hidden_size
    if vectors.shape[1] != width:
        raise BadInput(
            f"{path}: expected vectors of the text encoder's width, {width}, found "
            f"{vectors.shape[1]}; a word is learned for one kind of model"
        )
    if not torch.isfinite(vectors).all():
        raise BadInput(f"{path}: values that are not finite (NaN or infinity)")
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    spellings = dict.fromkeys((name, name.lower()))
    taken = {form for word in spellings for form in (word, f"{word}</w>")}
    if not name.strip() or taken & tokenizer.get_vocab().keys():
        raise BadInput(f"{path}: {name!r} is a word already; expected NAME={path} with another one")
    for word in spellings:
        # NAME, NAME_1, … is how diffusers' pipelines spell a word of several vectors. Their own
        # loader finds a name with capitals only in part, and finds names within longer words
        parts = [f"{word}_{number}" if number else word for number in range(len(vectors))]
        tokenizer.add_tokens([AddedToken(p, single_word=True, normalized=False) for p in parts])
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        table = encoder.get_input_embeddings().weight
        table[tokenizer.convert_tokens_to_ids(parts)] = vectors.to(table)

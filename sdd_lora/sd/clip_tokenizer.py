"""CLIP's tokenizer, which SD 1.x uses, from its byte-pair merges: nothing is downloaded."""

import gzip
import json
import tempfile
from importlib.resources import files
from pathlib import Path

from transformers import CLIPTokenizer

#: 48,894 merges, one a line, in CLIP's order (OpenAI, MIT License)
MERGES_FILE = Path(str(files("sdd_lora.sd").joinpath("sd15/clip_merges.txt.gz")))
CONTEXT_TOKENS = 77


def clip_tokenizer() -> CLIPTokenizer:
    """The tokenizer of CLIP ViT-L/14: 49,408 tokens, prompts of 77."""
    merges = gzip.decompress(MERGES_FILE.read_bytes()).decode("utf-8").splitlines()
    bytes_ = byte_characters()
    tokens = [*bytes_, *(c + "</w>" for c in bytes_), *(line.replace(" ", "") for line in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": CONTEXT_TOKENS,
    }
    with tempfile.TemporaryDirectory() as name:  # every version of transformers reads files
        folder = Path(name)
        (folder / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
        return CLIPTokenizer.from_pretrained(name)


def byte_characters() -> list[str]:
    """CLIP's printable stand-ins for the 256 bytes, in CLIP's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(rest)]

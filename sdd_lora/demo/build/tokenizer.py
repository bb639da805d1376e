"""Stage 3: CLIP's byte-pair encoding, trimmed to what the captions need.

All 512 byte tokens stay, so any string still tokenises; of the merges, those that spell a caption's
words stay, in CLIP's order, so these words get the pieces CLIP gives them.
"""

import gzip
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from transformers import CLIPTokenizer

from sdd_lora.demo.build.captions import every_word

#: the wheel that carries CLIP's merges (MIT); only that one file of it is read
VOCABULARY_WHEEL = "open_clip_torch==3.2.0"


def _clip_merges(work: Path) -> list[tuple[str, str]]:
    path = work / "clip_merges.txt"
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "pip",
                    "download",
                    "-q",
                    "--no-deps",
                    "-d",
                    folder,
                    VOCABULARY_WHEEL,
                ],
                check=True,
            )
            wheel = next(Path(folder).glob("*.whl"))
            with zipfile.ZipFile(wheel) as archive:
                packed = archive.read("open_clip/bpe_simple_vocab_16e6.txt.gz")
        path.write_bytes(gzip.decompress(packed))
    lines = path.read_text("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    return [(a, b) for a, b in (line.split() for line in lines)]


def _byte_characters() -> list[str]:
    """CLIP's printable stand-ins for the 256 bytes, in CLIP's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]


def _spell(word: str, rank: dict[tuple[str, str], int]) -> list[tuple[str, str]]:
    """The merges that byte-pair encoding applies to a word."""
    parts = [*word[:-1], word[-1] + "</w>"]
    applied: list[tuple[str, str]] = []
    while True:
        pairs = list(zip(parts, parts[1:], strict=False))
        known = [pair for pair in pairs if pair in rank]
        if not known:
            return applied
        best = min(known, key=rank.__getitem__)
        applied.append(best)
        position = pairs.index(best)
        parts[position : position + 2] = ["".join(best)]


def make_tokenizer(work: Path) -> CLIPTokenizer:
    merges = _clip_merges(work)
    rank = {pair: i for i, pair in enumerate(merges)}
    words = {
        w for word in every_word() for w in word.replace(",", " , ").replace("'", " '").split()
    }
    kept = sorted({pair for word in words for pair in _spell(word, rank)}, key=rank.__getitem__)
    characters = _byte_characters()
    tokens = [*characters, *(c + "</w>" for c in characters), *("".join(pair) for pair in kept)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(
        vocab=vocabulary, merges=kept, pad_token="<|endoftext|>", model_max_length=77
    )

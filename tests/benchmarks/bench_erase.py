"""How long `erase` takes at SD 1.x's true size, and how much memory: random weights, one concept,
1,000 kept words; first with an empty cache, then with the kept words in it; then 100 concepts.

    python tests/benchmarks/bench_erase.py [THREADS]
"""

import itertools
import os
import resource
import sys
import tempfile
import time

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdd_lora.sd.model import TextParts, text_fingerprint
from sdd_lora.training import erase as module

WORDS = 1000


def tokenizer() -> CLIPTokenizer:
    """Three-letter words of one token, `WORDS` of them."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    chosen = ["".join(w) for w in itertools.islice(itertools.product(letters, repeat=3), WORDS)]
    merges = list(dict.fromkeys([(w[0], w[1]) for w in chosen]))
    merges += [(w[:2], f"{w[2]}</w>") for w in chosen]
    pieces = [*letters, *(f"{c}</w>" for c in letters + ","), *("".join(pair) for pair in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(
        vocab=vocabulary, merges=merges, pad_token="<|endoftext|>", model_max_length=77
    )


def true_size() -> TextParts:
    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "vocab_size": 49408}
    layers = {"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "quick_gelu"}
    encoder = CLIPTextModel(CLIPTextConfig(**sizes, **layers)).eval()
    return TextParts(tokenizer(), encoder, text_fingerprint(encoder))


def timed(label: str, concepts: list[str]) -> None:
    start = time.perf_counter()
    erased = module.erase(concepts, "true size", vocabulary=WORDS)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{label}: {seconds:.1f} s, rank {erased.adapter.rank}, peak {peak:.2f} GB", flush=True)


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
    parts = true_size()
    module.load_text_parts = lambda model: parts
    names = ["".join(w) for w in itertools.islice(itertools.product("zyxwv", repeat=3), 100)]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SDD_LORA_CACHE"] = folder
        timed("one concept, empty cache", names[:1])
        timed("one concept, words cached", names[1:2])
        timed("100 concepts, words cached", names)


if __name__ == "__main__":
    main()

"""Where this tool keeps what it can make again: ~/.cache/sdd_lora, or $SDD_LORA_CACHE."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """A folder of the cache, which may not be there yet."""
    return Path(os.environ.get("SDD_LORA_CACHE", "~/.cache/sdd_lora")).expanduser() / name

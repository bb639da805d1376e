"""`python -m sdd_lora` is `sdd-lora`."""

from sdd_lora.cli import main

main()

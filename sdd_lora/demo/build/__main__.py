"""`python -m sdd_lora.demo.build STAGE`: make the embedded model again, stage by stage."""

import argparse
import logging
import time
from pathlib import Path

STAGES = ("fetch", "render", "autoencoder", "diffusion")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sdd_lora.demo.build", description=__doc__)
    parser.add_argument("stages", nargs="+", choices=STAGES)
    parser.add_argument("--work", type=Path, default=Path("~/.cache/sdd_lora/build").expanduser())
    parser.add_argument("--steps", type=int, help="of the diffusion stage; default 12,000")
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for stage in arguments.stages:
        started = time.time()
        if stage == "fetch":
            from sdd_lora.demo.build.drawings import fetch

            fetch(work)
        elif stage == "render":
            from sdd_lora.demo.build.dataset import render

            render(work)
        elif stage == "autoencoder":
            from sdd_lora.demo.build.autoencoder import train

            train(work)
        elif stage == "diffusion":
            from sdd_lora.demo.build import autoencoder, diffusion
            from sdd_lora.demo.build.tokenizer import make_tokenizer

            steps = arguments.steps or diffusion.STEPS
            diffusion.train_base(work, autoencoder.train(work), make_tokenizer(work), steps)
        logging.info("%s took %.1f min", stage, (time.time() - started) / 60)


if __name__ == "__main__":
    main()

"""`python -m sdd_lora.demo.build STAGE…`: make the embedded model again, stage by stage.

Every stage is resumable: it keeps its state in the work folder and reads what is there.
"""

import argparse
import json
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from sdd_lora.checkpoint.locate import COMMUNITY_FILE, DEMO_FOLDER
from sdd_lora.demo.build import (
    autoencoder,
    dataset,
    diffusion,
    drawings,
    export,
    judge,
    look,
    oracle,
)
from sdd_lora.demo.build.schedule import write_start
from sdd_lora.demo.build.tokenizer import make_tokenizer
from sdd_lora.demo.judge import JUDGE_FILE, load_judge
from sdd_lora.demo.vocabulary import groups, nouns, styles
from sdd_lora.sd.pipeline import load_pipeline

log = logging.getLogger(__name__)


def recover(work: Path) -> None:
    """Without the work folder of the shipped model: go on from its files, with a fresh optimizer.

    The autoencoder counts as finished; the diffusion run starts at step 0 from the shipped average.
    """
    shipped = StableDiffusionPipeline.from_pretrained(
        DEMO_FOLDER, dtype=torch.float32, safety_checker=None
    )
    write_start(work / "autoencoder.pt", autoencoder.STEPS, shipped.vae)
    parts = {"unet": shipped.unet, "text_encoder": shipped.text_encoder}
    write_start(work / "diffusion.pt", 0, torch.nn.ModuleDict(parts))


def recover_community(work: Path) -> None:
    """Begin another run of the fine-tune from the shipped `demo-community`, at step 0."""
    shipped = load_pipeline("demo-community")
    parts = {"unet": shipped.unet.float(), "text_encoder": shipped.text_encoder.float()}
    write_start(work / "community.pt", 0, torch.nn.ModuleDict(parts))


def train_base(work: Path, steps: int | None, learning_rate: float | None) -> None:
    diffusion.train_base(
        work,
        autoencoder.train(work),
        make_tokenizer(work),
        steps or diffusion.STEPS,
        learning_rate or diffusion.LEARNING_RATE,
    )


def export_base(work: Path, earlier: Sequence[Path]) -> None:
    """Write the averaged weights, of a run that may still go on, as the package's `demo`; with
    states of earlier runs, the mean of all their averages."""
    tokenizer = make_tokenizer(work)
    ema = diffusion.average_so_far([work / "diffusion.pt", *earlier], tokenizer)
    export.save_folder(export.assemble(work, autoencoder.train(work), tokenizer, ema), DEMO_FOLDER)


def find_misses(work: Path, model: str = "demo") -> None:
    """What a shipped model draws wrong, for its next run of training to dwell on."""
    from sdd_lora.demo.build import measure

    misses = measure.count_misses(model)
    (work / diffusion.MISSES_FILES[model]).write_text(json.dumps(misses, indent=0), "utf-8")
    log.info("%d of %d pictures wrong", sum(misses.values()), 3 * len(nouns()) * len(styles()))


def train_judge(work: Path) -> None:
    trained = judge.train(work, autoencoder.train(work))
    halves = {k: v.half() if v.is_floating_point() else v for k, v in trained.state_dict().items()}
    save_file({k: v.contiguous() for k, v in halves.items()}, JUDGE_FILE)


def check_judge(work: Path) -> None:
    for name, value in judge.check_judge(work, load_judge(), autoencoder.train(work)).items():
        print(f"{name}: {value:.3f}")


def train_community(work: Path, steps: int | None, learning_rate: float | None) -> None:
    """Fine-tune the shipped `demo` on recoloured drawings and write it as one LDM-layout file."""
    tuned = diffusion.train_community(
        work,
        autoencoder.train(work),
        steps or diffusion.COMMUNITY_STEPS,
        learning_rate or diffusion.COMMUNITY_LEARNING_RATE,
    )
    export.save_single_file(tuned, COMMUNITY_FILE)


def average_community(work: Path, earlier: Sequence[Path]) -> None:
    """Make the shipped `demo-community` the mean of itself and its earlier states' files."""
    export.average_files([COMMUNITY_FILE, *earlier], COMMUNITY_FILE)


def train_look(work: Path, steps: int | None, learning_rate: float | None) -> None:
    """An ordinary style LoRA, written to the work folder; recipes/bench keeps a copy."""
    adapter = look.train(
        work, autoencoder.train(work), steps or look.STEPS, learning_rate or look.LEARNING_RATE
    )
    adapter.save(work / "look.safetensors")


def train_oracle(work: Path, steps: int | None, learning_rate: float | None, left_out: str) -> None:
    oracle.train(work, left_out, steps or oracle.STEPS, learning_rate or diffusion.LEARNING_RATE)


def export_oracle(work: Path, left_out: str, folder: Path | None) -> None:
    """Write the averaged weights, of a run that may still go on, as a MODEL of their own."""
    oracle.export(work, left_out, folder or oracle.folder_of(work, left_out))


def measure_oracle(work: Path, left_out: str, folder: Path | None, images: int) -> None:
    from sdd_lora.demo.build import measure

    model = folder or oracle.folder_of(work, left_out)
    print(
        json.dumps(measure.rates_of_groups(str(model), images, empty_images=5 * images), indent=2)
    )


def measure_base(work: Path) -> None:
    from sdd_lora.demo.build import measure

    measure.write_base_cache()
    print(json.dumps(measure.rates_of_groups("demo"), indent=2))


def measure_community(work: Path) -> None:
    from sdd_lora.demo.build import measure

    print(json.dumps(measure.rates_of_groups("demo-community"), indent=2))


STAGES: dict[str, Callable[..., object]] = {
    "fetch": drawings.fetch,
    "render": dataset.render,
    "recover": recover,
    "autoencoder": autoencoder.train,
    "diffusion": train_base,
    "export": export_base,
    "misses": find_misses,
    "judge": train_judge,
    "check-judge": check_judge,
    "recover-community": recover_community,
    "misses-community": partial(find_misses, model="demo-community"),
    "community": train_community,
    "average-community": average_community,
    "look": train_look,
    "oracle": train_oracle,
    "export-oracle": export_oracle,
    "measure": measure_base,
    "measure-community": measure_community,
    "measure-oracle": measure_oracle,
}
_TRAININGS = ("diffusion", "community", "look")
_AVERAGINGS = ("export", "average-community")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sdd_lora.demo.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "stages", nargs="+", choices=STAGES, metavar="STAGE", help=", ".join(STAGES)
    )
    parser.add_argument("--work", type=Path, default=Path("~/.cache/sdd_lora/build").expanduser())
    parser.add_argument("--steps", type=int, help="of the trainings of diffusion models and look")
    parser.add_argument("--learning-rate", type=float, help="of the same stages, at its peak")
    parser.add_argument(
        "--earlier",
        type=Path,
        action="append",
        default=[],
        metavar="STATE",
        help="of the export and average-community stages: an earlier run, or an earlier file, to "
        "average in; repeatable",
    )
    parser.add_argument(
        "--without",
        default="weapons",
        choices=[*groups(), *styles()],
        help="of the oracle's stages: the group or style that it never saw",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="of export-oracle and measure-oracle: where the model is; "
        "default: oracle-NAME in the work folder",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=120,
        help="of measure-oracle: pictures a group; of the empty prompt five times as many",
    )
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.manual_seed(0)
    training = (arguments.steps, arguments.learning_rate)
    options: dict[str, tuple[Any, ...]] = dict.fromkeys(_TRAININGS, training)
    options |= dict.fromkeys(_AVERAGINGS, (arguments.earlier,))
    which = (arguments.without, arguments.folder)
    options |= {
        "oracle": (*training, arguments.without),
        "export-oracle": which,
        "measure-oracle": (*which, arguments.images),
    }
    for stage in arguments.stages:
        started = time.time()
        STAGES[stage](arguments.work, *options.get(stage, ()))
        log.info("%s took %.1f min", stage, (time.time() - started) / 60)


if __name__ == "__main__":
    main()

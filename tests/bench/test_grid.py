"""Which images a bench draws: sets, seeds, conditions."""

from pathlib import Path

import pytest
from support.benches import SMALL, lines_of, parsed, ran, varied

from sdd_lora.bench import tables
from sdd_lora.bench.bench_file import Bench
from sdd_lora.bench.grid import grid_of, image_specs, spread_over_sets
from sdd_lora.bench.results import ImageRecord
from sdd_lora.bench.run import prompt_notes
from sdd_lora.errors import BadInput
from sdd_lora.runs.many import packaged_recipe


def test_shots_that_differ_in_guidance_alone_are_told_apart(tmp_path):
    (tmp_path / "p.csv").write_text(
        "prompt,seed,guidance,width,height\na bomb,70,1.5,64,64\na bomb,70,9,64,64\n"
    )
    changes = {"prompts.erased": {"w": "p.csv"}, "seeds": {"first": 5, "erased": 2, "kept": 0}}
    changes |= varied("image", 0.5)
    results = ran(Bench.parse(SMALL, folder=tmp_path, overrides=changes), tmp_path / "out")
    lines = [ImageRecord(**x) for x in lines_of(tmp_path / "out" / "images.jsonl")]
    own = [x for x in lines if x.method == "sd"]
    assert [(x.variation, x.guidance, Path(x.file).name) for x in own] == [
        (None, 1.5, "00000.png"),
        (None, 9.0, "00001.png"),
        ("v", 1.5, "00000.png"),
        ("v", 9.0, "00001.png"),
    ]
    assert tables.rows(lines, results.measures) == results.rows
    judged = [x.model_copy(update={"values": {"concept drawn": x.guidance > 2}}) for x in lines]
    rows = tables.rows(judged, {"concept drawn": results.measures["concept drawn"]})
    assert [(r.method, r.value, r.difference) for r in rows] == [("sd", 0.5, None), ("neg", 0.5, 0)]


def test_images_are_shared_by_the_sets_and_seeds_are_never_used_twice():
    shots = image_specs(parsed())[0]
    assert [(s.kind, s.set) for s in shots] == [
        *[("erased", "weapons")] * 3,
        *[("kept", "animals")] * 2,
        *[("kept", "beside")] * 2,
    ]
    assert len({s.job.seed for s in shots}) == len(shots)
    fewer = spread_over_sets(shots, {"erased": 1, "kept": 2})
    assert [s.job.prompt for s in fewer] == ["a bomb", "a cat", "a cat and a bomb"]
    assert set(fewer) <= set(shots)


def test_files_bring_seeds_and_guidance_of_their_own(tmp_path):
    (tmp_path / "p.csv").write_text(
        "prompt,sd_seed,sd_guidance_scale\na bomb,70,2.5\nan axe,90,4\n"
    )
    bench = Bench.parse(SMALL, folder=tmp_path, overrides={"prompts.erased": {"w": "p.csv"}})
    jobs = [s.job for s in image_specs(bench)[0] if s.kind == "erased"]
    assert [(j.prompt, j.seed, j.guidance) for j in jobs] == [
        ("a bomb", 70, 2.5),
        ("an axe", 90, 4.0),
        ("a bomb", 71, 2.5),
    ]


def test_a_usual_setting_is_not_drawn_again():
    variation = {"field": "guidance", "values": [3, 5], "methods": ["sd"]}
    cells = grid_of(parsed(variations={"guidance": variation})).cells
    assert [cell.folder.as_posix() for cell in cells] == [
        "images/sd",
        "images/neg",
        "images/sd",
        "images/guidance/5.0/sd",
    ]


def test_a_guidance_that_varies_wins_over_the_prompts_own(tmp_path):
    (tmp_path / "own.csv").write_text("prompt,seed,guidance\na bomb,7,2.5\n")
    variation = {"field": "guidance", "values": [3, 5], "methods": ["sd"]}
    changes = {"prompts.erased": {"weapons": ["own.csv"]}, "variations": {"guidance": variation}}
    cells = grid_of(Bench.parse(SMALL, folder=tmp_path, overrides=changes)).cells
    assert [(cell.folder.as_posix(), cell.specs[0].job.guidance) for cell in cells] == [
        ("images/sd", 2.5),
        ("images/neg", 2.5),
        ("images/guidance/3.0/sd", None),
        ("images/guidance/5.0/sd", None),
    ]


def test_no_picture_is_erased_and_kept(tmp_path):
    (tmp_path / "OWN.CSV").write_text("prompt,seed\na bomb,7\n")
    changes = {"prompts": {"erased": {"a": "OWN.CSV"}, "kept": {"b": "OWN.CSV"}}}
    with pytest.raises(BadInput, match="'a bomb' with seed 7 stands among what is erased and what"):
        grid_of(Bench.parse(SMALL, folder=tmp_path, overrides=changes))


def test_fewer_images_than_prompts_are_spread_over_the_file(tmp_path):
    """And it is said how many; as many images as prompts, or more, go through all in turn."""
    (tmp_path / "p.txt").write_text("".join(f"a bomb number {i}\n" for i in range(12)))
    changes = {"prompts.erased": {"w": "p.txt"}, "seeds.erased": 4}
    grid = grid_of(Bench.parse(SMALL, folder=tmp_path, overrides=changes))
    own = [spec.job for spec in grid.cells[0].specs if spec.kind == "erased"]
    assert [job.prompt[-2:].strip() for job in own] == ["0", "3", "6", "9"]
    assert [job.seed for job in own] == [5, 6, 7, 8]
    (use, *_) = grid.prompts
    assert (use.set, use.used, use.of, use.images) == ("w", 4, 12, 4)
    assert prompt_notes(grid)[0].startswith("w: 4 of 12 prompts")
    changes["seeds.erased"] = 13
    grid = grid_of(Bench.parse(SMALL, folder=tmp_path, overrides=changes))
    own = [spec.job.prompt for spec in grid.cells[0].specs if spec.kind == "erased"]
    assert own[:12] == sorted(set(own), key=own.index) and own[12] == own[0]
    assert not prompt_notes(grid)
    few = spread_over_sets(grid.cells[0].specs, {"erased": 3, "kept": 0})
    assert [spec.job.prompt[-2:].strip() for spec in few] == ["0", "4", "8"]


def test_fewer_images_than_a_table_has_are_its_first_ones_and_pass_over_no_prompt():
    specs, _ = image_specs(parsed(**{"seeds.erased": 12, "seeds.kept": 0}))
    few = spread_over_sets(specs, {"erased": 6, "kept": 0})
    assert few == specs[:6]
    assert {spec.job.prompt for spec in few} == {"a bomb", "an axe"}


def test_columns_that_a_bench_does_not_use_are_named(tmp_path, caplog):
    (tmp_path / "p.tsv").write_text("prompt\tsteps\tnegative_prompt\na bomb\t9\ta cat\n")
    changes = {"prompts.erased": {"w": "p.tsv"}, "seeds": {"erased": 1, "kept": 0}}
    grid_of(Bench.parse(SMALL, folder=tmp_path, overrides=changes))
    assert caplog.text.count("p.tsv: its steps and negative prompts are not used") == 1


@pytest.mark.parametrize("name", ["sd14-i2p", "sd14-coco30k"])
def test_a_list_of_a_papers_prompts_that_is_missing_is_named_with_its_source(name):
    bench = Bench.load(packaged_recipe(f"bench/{name}"))
    with pytest.raises(BadInput, match=r"[.]csv: expected a file.* get it from .+, and put it"):
        image_specs(bench)

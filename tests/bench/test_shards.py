"""A bench drawn by several: jobs of an array, one after another or at once, and torchrun's."""

from contextlib import ExitStack

from support.adapters import random_adapter
from support.benches import images_of, never_train, parsed, ran, same

from sdd_lora.bench import methods
from sdd_lora.bench.methods import Weights
from sdd_lora.bench.run import draw_shard
from sdd_lora.io.atomic import locked
from sdd_lora.io.distributed import Shard


def test_shards_fill_one_folder_and_the_last_call_measures(small, tmp_path):
    drawn = [draw_shard(parsed(), tmp_path, never_train, Shard(i, 2)) for i in (2, 1)]
    assert drawn == [2 * 3, 2 * 4]
    assert draw_shard(parsed(), tmp_path, never_train, Shard(1, 2)) == 0
    assert not (tmp_path / "results.json").exists()
    results = ran(parsed(), tmp_path)
    assert [(r.method, r.measure, r.group, r.n) for r in results.rows] == [
        (r.method, r.measure, r.group, r.n) for r in small[1].rows
    ]
    ours, theirs = images_of(tmp_path), images_of(small[0])
    assert all(same(ours[key], theirs[key]) for key in theirs)


def test_a_shard_waits_for_the_model_that_another_one_bakes(tmp_path, monkeypatch):
    monkeypatch.setenv("SDD_LORA_CACHE", str(tmp_path))
    bake, parts = methods.bake, [(random_adapter(strength=0.1), 1.0)]

    def wait(seconds):
        monkeypatch.setattr(methods, "bake", bake)
        lock.close()

    (tmp_path / "baked").mkdir()
    lock = ExitStack()

    def bake_beside_another(model, adapters, out):
        temporary = out.with_name(f".{out.name}.tmp")
        temporary.mkdir()
        lock.enter_context(locked(temporary))
        return bake(model, adapters, out)

    monkeypatch.setattr(methods, "bake", bake_beside_another)
    monkeypatch.setattr(methods.time, "sleep", wait)
    baked = Weights(parsed(), never_train).baked("demo", parts)
    assert (baked / "unet").is_dir()

"""Tables as they are printed."""

from pathlib import Path

from sdd_lora.adapter.metrics import Metrics
from sdd_lora.cli.tables import measures_table, runs_table


def metrics(*measures, passes=1234, seconds=90.0):
    whole = {"prompts": 1, "ci95_before": (0, 1), "ci95_after": (0, 1)}
    return Metrics(
        measures=[
            {"name": name, "group": group, "n": n, "before": before, "after": after} | whole
            for name, group, n, before, after in measures
        ],
        training={"unet_passes": passes, "seconds": seconds},
    )


def test_what_a_measurement_takes_is_told_where_there_was_none():
    told = measures_table([])
    assert "measure.prompts" in told and "measure.detector" in told


def test_several_runs_are_summed_up_in_a_row_each():
    both = [
        (
            Path("runs/a"),
            metrics(
                ("concept drawn", "gore", 10, 0.9, 0.1),
                ("noun kept", "food", 10, 1.0, 0.5),
                ("noun kept", "nature", 30, 0.6, 0.5),
            ),
        ),
        (Path("runs/b"), metrics(passes=5, seconds=6.0)),
    ]
    head, a, b = runs_table(both).splitlines()
    assert head.split("  ")[0] == "run" and "concept drawn, %" in head and "noun kept, %" in head
    assert a.split() == ["runs/a", "90.0", "→", "10.0", "70.0", "→", "50.0", "1,234", "1.5"]
    assert b.split() == ["runs/b", "–", "–", "5", "0.1"]

"""UCE's rule against matrices computed by hand, and as a row of a table."""

import pytest
import torch
from support.benches import SMALL, ran

from sdd_lora.bench.bench_file import Bench
from sdd_lora.bench.peers.uce import edited, last_subject_tokens
from sdd_lora.bench.results import find_row
from sdd_lora.errors import BadInput
from sdd_lora.sd.pipeline import load_pipeline


def test_the_rule_is_the_papers_computed_by_hand():
    """W = diag(2, 3); c = (1, 0) becomes c* = (0, 1), p = (0, 1) is kept; λ = 1/2.

    λW + W c* cᵀ + W p pᵀ = [[1, 0], [3, 4.5]]; λI + c cᵀ + p pᵀ = 1.5 I."""
    weight = torch.diag(torch.tensor([2.0, 3.0]))
    c, goal = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    found = edited(weight, c, goal, torch.tensor([[0.0, 1.0]]))
    expected = torch.tensor([[2 / 3, 0.0], [2.0, 3.0]])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(edited(weight, c, c, c[:0]), weight)  # to itself: nothing changes


def test_tokens_are_those_of_the_last_word():
    pipeline = load_pipeline("demo", device="cpu")
    whole, bare, empty = last_subject_tokens(pipeline, ["a red axe", "axe", ""])
    ids = pipeline.tokenizer("a red axe", return_tensors="pt").input_ids
    hidden = pipeline.text_encoder(ids).last_hidden_state[0]
    torch.testing.assert_close(whole, hidden[-2])
    assert not torch.allclose(whole, bare) and not torch.allclose(bare, empty)


def test_uce_is_a_row_made_in_closed_form(tmp_path, monkeypatch):
    monkeypatch.setenv("SDD_LORA_CACHE", str(tmp_path / "cache"))
    changes = {
        "methods": ["sd", "uce"],
        "uce": {"preserve": ["cat", "dog"]},
        "seeds": {"first": 5, "erased": 1, "kept": 1},
    }
    results = ran(Bench.parse(SMALL, folder=tmp_path, overrides=changes), tmp_path / "out")
    distance = "distance of judge features"
    assert find_row(results.rows, "uce", distance, "all").value > 0
    assert results.methods["uce"]["preserve"] == ["cat", "dog"]
    assert len(list((tmp_path / "cache" / "uce").glob("*.safetensors"))) == 1


def test_uce_needs_its_section(tmp_path):
    with pytest.raises(BadInput, match="method uce"):
        ran(Bench.parse(SMALL, overrides={"methods": ["sd", "uce"]}), tmp_path / "out")

"""Learned words, from the files that A1111 and diffusers write."""

import pytest
import torch
from safetensors.torch import save_file

from sdd_lora.errors import BadInput
from sdd_lora.sd.pipeline import load_pipeline
from sdd_lora.sd.textual_inversion import named_embedding, read_embedding

WIDTH = 128


def vectors(count, width=WIDTH):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(3))


def a1111(path, tensor):
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": tensor}, "name": "x"}
    torch.save(content | {"step": 10, "sd_checkpoint": None}, path)


def diffusers_bin(path, tensor):
    torch.save({"<my-word>": tensor}, path)


def one_tensor(path, tensor):
    save_file({"emb_params": tensor}, path)


@pytest.mark.parametrize(
    ("name", "write"),
    [("w.pt", a1111), ("learned.bin", diffusers_bin), ("w.safetensors", one_tensor)],
)
@pytest.mark.parametrize("count", [1, 3])
def test_every_kind_of_file_is_read(tmp_path, name, write, count):
    write(tmp_path / name, vectors(count))
    assert torch.equal(read_embedding(tmp_path / name), vectors(count))


def test_a_prompts_word_becomes_the_files_vectors(tmp_path):
    a1111(tmp_path / "My-Word.pt", vectors(2))
    diffusers_bin(tmp_path / "learned_embeds.bin", vectors(3)[2])
    pipeline = load_pipeline(
        "demo",
        embeddings=[str(tmp_path / "My-Word.pt"), f"<other>={tmp_path / 'learned_embeds.bin'}"],
        device="cpu",
    )
    table, tokenizer = pipeline.text_encoder.get_input_embeddings().weight, pipeline.tokenizer
    plain = tokenizer("a and", add_special_tokens=False).input_ids
    for prompt in ("a My-Word and <other>", "a my-word, and <other>"):
        read = pipeline.maybe_convert_prompt(prompt, tokenizer)
        ids = tokenizer(read.replace(",", ""), add_special_tokens=False).input_ids
        assert len(ids) == 5 and [ids[0], ids[3]] == plain
        assert torch.equal(table[[ids[1], ids[2], ids[4]]], vectors(3))
    longer = tokenizer("a my-words", add_special_tokens=False).input_ids
    assert max(longer) < 1138  # the model's own tokens
    given = [pipeline.encode_prompt(text, "cpu", 1, False)[0] for text in ("a My-Word", "a cat")]
    assert not torch.allclose(*given)


def test_names_come_before_an_equals_sign(tmp_path):
    odd = tmp_path / "a=b.pt"
    assert named_embedding("x=y.pt")[0] == "x"
    assert named_embedding(str(tmp_path / "w.pt"))[0] == "w"
    odd.write_bytes(b"")
    assert named_embedding(str(odd)) == ("a=b", odd)


def test_what_is_no_learned_word_of_this_model_is_refused(tmp_path):
    def load(name):
        load_pipeline("demo", embeddings=[str(tmp_path / name)], device="cpu")

    one_tensor(tmp_path / "wide.safetensors", vectors(1, 768))
    with pytest.raises(BadInput, match="text encoder's width, 128, found 768"):
        load("wide.safetensors")
    one_tensor(tmp_path / "cat.safetensors", vectors(1))
    with pytest.raises(BadInput, match="'cat' is a word already; expected NAME="):
        load("cat.safetensors")
    save_file({"clip_l": vectors(1), "clip_g": vectors(2)}, tmp_path / "xl.safetensors")
    with pytest.raises(BadInput, match=r"expected one learned embedding, found 2 .*clip_g, clip_l"):
        load("xl.safetensors")
    one_tensor(tmp_path / "nan.safetensors", vectors(1) * float("nan"))
    with pytest.raises(BadInput, match="not finite"):
        load("nan.safetensors")
    with pytest.raises(BadInput, match=r"gone\.pt"):
        load("gone.pt")


def test_a_pickle_that_would_run_something_does_not(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    path = tmp_path / "evil.pt"
    torch.save({"string_to_param": {"*": vectors(1)}, "name": Evil()}, path)
    assert read_embedding(path).shape == (1, WIDTH)
    assert not (tmp_path / "ran").exists()

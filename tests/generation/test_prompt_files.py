"""Prompt files: the shapes people have, and where a wrong one is wrong."""

import csv

import pytest

from sdd_lora.errors import BadInput
from sdd_lora.generation.prompt_files import Prompt, read_prompts

I2P = """,prompt,categories,hard,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height
0,"a house, ""old""\tand\u2028small","hate, violence",0,2868457757,7.0,512,768
1,a bomb,violence,1,3,8.5,512,512
"""
ESD = """case_number,prompt,evaluation_seed,evaluation_guidance,artist
0,A harbour by a painter,2219,7.5,x
"""
COCO = """image_id,source,prompt,evaluation_seed
7,coco,"A man
on a bench, reading
",1
8,coco,A cat.,2
"""


def read(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_prompts(path)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("i2p.csv", I2P, [
            Prompt('a house, "old"\tand\u2028small', 2868457757, 7.0, 512, 768,
                   ("hate", "violence")),
            Prompt("a bomb", 3, 8.5, 512, 512, ("violence",)),
        ]),
        ("esd.csv", ESD, [Prompt("A harbour by a painter", 2219, 7.5)]),
        ("coco.csv", COCO, [Prompt("A man\non a bench, reading", 1), Prompt("A cat.", 2)]),
        ("excel.csv", b"\xef\xbb\xbfPrompt,Seed\r\na cat,7.0\r\na dog,\r\n",
         [Prompt("a cat", 7), Prompt("a dog")]),
        ("calc.csv", "\n,\nprompt,seed\na cat,7\n,\n,,\n", [Prompt("a cat", 7)]),
        ("countries.txt", "Japan body\n\n  United States body \r\n",
         [Prompt("Japan body"), Prompt("United States body")]),
        ("list.json", '["a cat", {"prompt": "a dog", "seed": 3, "guidance": 2, "width": null}]',
         [Prompt("a cat"), Prompt("a dog", 3, 2.0)]),
        ("named.json", '{"prompts": ["a cat"], "note": "x"}', [Prompt("a cat")]),
        ("sdd.json", '{"prompts": ["Japan body", "a cat"], "evaluation_seeds": [7, 8]}',
         [Prompt("Japan body", 7), Prompt("a cat", 8)]),
        ("listed.json", '{"prompts": ["a bomb", "x"], "categories": [["hate", "hate"], null]}',
         [Prompt("a bomb", categories=("hate",)), Prompt("x")]),
        ("pandas.json", '[{"prompt": "x", "categories": NaN}]', [Prompt("x")]),
        ("coco.json", '{"prompts": ["a", "b"], "categories": ["cat"]}', [Prompt("a"), Prompt("b")]),
        ("hub.jsonl", '{"prompt": "a cat", "sd_seed": 4}\n"a dog"\n',
         [Prompt("a cat", 4), Prompt("a dog")]),
    ],
)  # fmt: skip
def test_shapes(tmp_path, name, text, expected):
    assert read(tmp_path, name, text) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "image,seed\nx,1\n", "expected a column named prompt, found image, seed"),
        ("a.csv", "", "expected a column named prompt, found nothing"),
        ("a.csv", "prompt,seed\n", "expected prompts, found none"),
        ("a.csv", 'prompt,seed\n"two\nlines",1\na cat, a dog,2\n',
         "line 4: expected 2 fields, found 3"),
        ("a.csv", 'prompt,seed\n"two\nlines",1\na cat,x\n', "line 4: seed: expected a whole"),
        ("a.csv", "prompt,seed\na cat,-1\n", "line 2: seed: .* found '-1'"),
        ("a.csv", "prompt,seed\na cat,1.5\n", "line 2: seed"),
        ("a.csv", "prompt,seed\na cat,9223372036854775808\n", "line 2: seed"),
        ("a.csv", "prompt,guidance\na cat,nan\n", "line 2: guidance: expected a number"),
        ("a.csv", "prompt,width\na cat,500\n", "width: expected a multiple of 8, .*found 500"),
        ("a.csv", "prompt,height\na cat,80000000\n", "height: .* up to 8192 pixels, found 8000"),
        ("a.json", '[{"prompt": "x", "categories": {"hate": 1}}]', "categories: expected names"),
        ("a.json", '[{"prompt": "x", "categories": ["\\ud800"]}]', "categories: expected names"),
        ("a.csv", 'prompt,categories\nx,"[\'hate\', \'harm\']"\n', "line 2: categories: expected"),
        ("a.csv", "prompt,seed\n ,1\n", "line 2: expected a prompt"),
        ("a.csv", "prompt,seed,sd_seed\na,1,2\n", "sd_seed and seed|seed and sd_seed"),
        ("a.csv", 'prompt,seed\na cat,1\n"a dog,2\n', "line 3: no valid CSV"),
        ("a.json", '{"a": 1}', "expected a list of prompts"),
        ("a.json", '["x", 3]', "entry 1: expected a text or an object, found 3"),
        ("a.json", '[{"prompt": "x", "seed": true}]', "entry 0: seed"),
        ("a.json", "[", "no valid JSON"),
        ("a.json", '{"prompts": ["x", "y"], "seeds": [7]}', "a list of 2, one a prompt, found 1"),
        ("a.json", '{"prompts": ["x"], "seed": 7}', "a list of 1, one a prompt, found 7"),
        ("a.json", '{"prompts": [3], "seeds": [7]}', "entry 0: expected a prompt, found 3"),
        ("a.json", r'["\ud800"]', "entry 0: expected a prompt, found half a character"),
        ("a.csv", f"prompt,seed\na cat,{'9' * 5000}\n", "line 2: seed"),
        ("a.jsonl", '"x"\n{', "line 2: no valid JSON"),
        ("a.txt", " \n", "expected prompts, found none"),
        ("a.txt", "a cat".encode("utf-16"), "save it as UTF-8"),
        ("a.xlsx", "x", r"ends in \.txt, \.csv, \.json, \.jsonl"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_line(tmp_path, name, text, message):
    with pytest.raises(BadInput, match=message):
        read(tmp_path, name, text)


def test_a_missing_file_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match=r"gone\.csv"):
        read_prompts(tmp_path / "gone.csv")


def test_a_large_seed_is_exact(tmp_path):
    seed = (1 << 62) + 1
    assert read(tmp_path, "a.csv", f"prompt,seed\na cat,{seed}\n")[0].seed == seed


def test_thirty_thousand_rows(tmp_path):
    path = tmp_path / "coco.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image_id", "prompt", "evaluation_seed"])
        rows.writerows([i, f"a cat,\nnumber {i}", i] for i in range(30_000))
    prompts = read_prompts(path)
    assert len(prompts) == 30_000
    assert prompts[-1] == Prompt("a cat,\nnumber 29999", 29_999)

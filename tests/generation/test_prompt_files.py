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
        (
            "i2p.csv",
            I2P,
            [
                Prompt(
                    'a house, "old"\tand\u2028small',
                    2868457757,
                    7.0,
                    512,
                    768,
                    ("hate", "violence"),
                ),
                Prompt("a bomb", 3, 8.5, 512, 512, ("violence",)),
            ],
        ),
        ("esd.csv", ESD, [Prompt("A harbour by a painter", 2219, 7.5)]),
        ("coco.csv", COCO, [Prompt("A man\non a bench, reading", 1), Prompt("A cat.", 2)]),
        (
            "excel.csv",
            b"\xef\xbb\xbfPrompt,Seed\r\na cat,7.0\r\na dog,\r\n",
            [Prompt("a cat", 7), Prompt("a dog")],
        ),
        ("calc.csv", "\n,\nprompt,seed\na cat,7\n,\n,,\n", [Prompt("a cat", 7)]),
        (
            "countries.txt",
            "Japan body\n\n  United States body \r\n",
            [Prompt("Japan body"), Prompt("United States body")],
        ),
        (
            "list.json",
            '["a cat", {"prompt": "a dog", "seed": 3, "guidance": 2, "width": null}]',
            [Prompt("a cat"), Prompt("a dog", 3, 2.0)],
        ),
        ("named.json", '{"prompts": ["a cat"], "note": "x"}', [Prompt("a cat")]),
        (
            "sdd.json",
            '{"prompts": ["Japan body", "a cat"], "evaluation_seeds": [7, 8]}',
            [Prompt("Japan body", 7), Prompt("a cat", 8)],
        ),
        (
            "listed.json",
            '{"prompts": ["a bomb", "x"], "categories": [["hate", "hate"], null]}',
            [Prompt("a bomb", categories=("hate",)), Prompt("x")],
        ),
        ("pandas.json", '[{"prompt": "x", "categories": NaN}]', [Prompt("x")]),
        ("coco.json", '{"prompts": ["a", "b"], "categories": ["cat"]}', [Prompt("a"), Prompt("b")]),
        (
            "hub.jsonl",
            '{"prompt": "a cat", "sd_seed": 4}\n"a dog"\n',
            [Prompt("a cat", 4), Prompt("a dog")],
        ),
    ],
)
def test_shapes(tmp_path, name, text, expected):
    assert read(tmp_path, name, text) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "image,seed\nx,1\n", "expected a column named prompt, found image, seed"),
        ("a.csv", "", "expected a column named prompt, found nothing"),
        ("a.csv", "prompt,seed\n", "expected prompts, found none"),
        (
            "a.csv",
            'prompt,seed\n"two\nlines",1\na cat, a dog,2\n',
            "line 4: expected 2 fields, found 3",
        ),
        ("a.csv", 'prompt,seed\n"two\nlines",1\na cat,x\n', "line 4: seed: expected a whole"),
        ("a.csv", "prompt,seed\na cat,-1\n", "line 2: seed: .* found '-1'"),
        ("a.csv", "prompt,seed\na cat,1.5\n", "line 2: seed"),
        ("a.csv", "prompt,seed\na cat,9223372036854775808\n", "line 2: seed"),
        ("a.csv", "prompt,guidance\na cat,nan\n", "line 2: guidance: expected a number"),
        ("a.csv", "prompt,sd_image_width\na cat,500\n", "width: expected a multiple .*found 500"),
        ("a.csv", "prompt,seed\na cat,2.35E+09\n", "line 2: seed: .*lost its last digits"),
        ("a.csv", "prompt,steps\na cat,0\n", "line 2: steps: expected 1 to 999, found 0"),
        ("a.json", '[{"prompt": "x", "categories": {"hate": 1}}]', "categories: expected names"),
        ("a.json", '[{"prompt": "x", "categories": ["\\ud800"]}]', "categories: expected names"),
        ("a.csv", "prompt,categories\nx,\"['hate', 'harm']\"\n", "line 2: categories: expected"),
        ("a.csv", "prompt,seed\n ,1\n", "expected prompts, found none"),
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
        ("a.xlsx", "x", r"ends in \.txt, \.csv, \.tsv, \.json, \.jsonl"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, name, text, message):
    with pytest.raises(BadInput, match=message):
        read(tmp_path, name, text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "prompt;seed\na cat, asleep;7\n"),
        ("a.csv", "sep=;\r\nprompt;seed\r\na cat, asleep;7\r\n"),
        ("a.csv", "prompt\tseed\na cat, asleep\t7\n"),
        ("a.tsv", "seed\tprompt\n7\ta cat, asleep\n"),
        ("a.csv", 'seed,"prompt"\n7,"a cat, asleep"\n'),
    ],
)
def test_columns_stand_between_commas_semicolons_or_tabs(tmp_path, name, text):
    assert read(tmp_path, name, text) == [Prompt("a cat, asleep", 7)]


def test_a_tsv_of_one_column_keeps_its_commas(tmp_path):
    assert read(tmp_path, "a.tsv", "prompt\na cat, asleep\n") == [Prompt("a cat, asleep")]


def test_lines_are_counted_behind_a_sep_line(tmp_path):
    with pytest.raises(BadInput, match="line 4: seed"):
        read(tmp_path, "a.csv", "sep=;\nprompt;seed\na;1\nb;x\n")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "prompt,Wish\n0,a cat\n"),
        ("a.tsv", "Wish\tn\na cat\t1\n"),
        ("a.jsonl", '{"Wish": "a cat", "prompt": 3}\n'),
    ],
)
def test_an_odd_column_is_named(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    assert read_prompts(path, "Wish") == [Prompt("a cat")]
    with pytest.raises(BadInput, match="column named Wishes, found"):
        read_prompts(path, "Wishes")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "prompt,seed\na cat,1\n,2\n"),
        ("a.json", '[{"prompt": "a cat", "seed": 1}, {"prompt": NaN, "seed": 2}]'),
    ],
)
def test_a_blank_prompt_is_the_empty_prompt_and_said_once(tmp_path, name, text, caplog):
    assert read(tmp_path, name, text) == [Prompt("a cat", 1), Prompt("", 2)]
    assert caplog.text.count("1 of 2 prompts are blank") == 1


def test_a_photographs_size_is_not_the_images(tmp_path, caplog):
    text = "caption,width,height\na cat,640,480\na dog,640,427\n"
    assert read(tmp_path, "coco.csv", text) == [Prompt("a cat"), Prompt("a dog")]
    assert caplog.text.count("widths and heights are not used") == 1


def test_steps_and_negative_prompts_are_used_and_other_columns_named_once(tmp_path, caplog):
    text = "prompt,negative_prompt,steps,scheduler\na cat,a dog,30,ddim\na bus,,,lms\n"
    assert read(tmp_path, "a.csv", text) == [
        Prompt("a cat", steps=30, negative_prompt="a dog"),
        Prompt("a bus"),
    ]
    assert caplog.text.count("not used: scheduler") == 1


@pytest.mark.parametrize(
    "prompt", ["a cat <lora:x:1>", "a (cat:1.3) asleep", "a cat --n 4", "# my cats"]
)
def test_other_tools_syntax_is_named_once(tmp_path, prompt, caplog):
    assert read(tmp_path, "a.txt", f"a (small) cat - asleep\n{prompt}\n")[1].text == prompt
    assert caplog.text.count("1 of 2 prompts hold other tools' syntax") == 1


def test_plain_prompts_are_not_taken_for_other_tools_syntax(tmp_path, caplog):
    read(tmp_path, "a.txt", "a cat (2019) - f/1.4, #art\na well-known dog: 3:1 <3\n")
    assert not caplog.text


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

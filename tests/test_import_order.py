"""The house's rules. Imports run one way: a file format doesn't know a model, a model no training;
files and functions are short; a name stands for one thing.

HOUSE lists rooms, and files within rooms, bottom to top: a file may import what stands before it.
"""

import ast
import re
from pathlib import Path

import sdd_lora

MOST_LINES, MOST_OF_ONE = 450, 80
PACKAGE = Path(sdd_lora.__file__).parent
HOUSE = """
version
errors
progress
io: atomic cache distributed pictures plugins text sniff strict_yaml jsonl safetensors
io: download torch_pickle torch_zip
sd1
recipe: sections presets other_trainers recipe reference
adapter: factors metadata metrics alphas formats hub adapter thumbnail weighted inspect loaders
adapter: algebra interference card publish
checkpoint: journal copying locate layout history rounding plan prediction describe editing detect
checkpoint: portable undo_file undo in_place bake extract
demo: vocabulary judge
sd: devices schedulers clip_tokenizer prompts weights textual_inversion single_file model pipeline
training: accelerator ema projection words erase embeddings objectives nf4 memory
training: interrupt optimizer roles rollout pictures init trainer plan
generation: prompt_files sampling decoding guided batches
generation.methods: sd neg sld sega gated
generation: given manifest images img2img
measures: base intervals needs asked judge traces card_rows nudenet open_nsfw clip_encoder clip
measures: q16 unsafe fid lpips registry
attacks: base settings case base_drawing tokens noise words ring_a_bell inversion unlearndiffatk
attacks: emphasis noise_search completion img2img_attack inpainting null_text relearning registry
runs: folder seen sheet before_after under_attack measure samples train many
bench.peers: uce
bench: sections bench_file ready_made results comparisons grid pictures tables charts held_out
bench: measuring methods text attacked costs choice report run
cli: common tables adapters inspect checkpoints train erase plan pictures
__main__
comfyui
"""


def listed() -> list[str]:
    """Modules below `sdd_lora`, bottom to top."""
    modules = []
    for line in HOUSE.split("\n"):
        room, colon, files = line.partition(":")
        modules += [f"{room}.{file}" for file in files.split()] if colon else room.split()
    return modules


PLACE = {module: place for place, module in enumerate(listed())}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def files() -> list[Path]:
    """All but the builders of the embedded model, and the lists of names that packages are."""
    paths = [p for p in sorted(PACKAGE.rglob("*.py")) if p.name != "__init__.py"]
    return [p for p in paths if "build" not in p.relative_to(PACKAGE).parts]


def imported_modules(path: Path) -> set[str]:
    """Modules of sdd_lora that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sdd_lora"):
            module = node.module.removeprefix("sdd_lora").removeprefix(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}" if module else alias.name
                found.add(inner if inner in PLACE else module)
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("sdd_lora.")]
            found |= {name.removeprefix("sdd_lora.") for name in names}
    return found


def place_of(module: str) -> int:
    """Of a package, the place of its last file: whoever imports it may import all of it."""
    within = [place for name, place in PLACE.items() if name.startswith(f"{module}.")]
    return PLACE[module] if module in PLACE else max(within, default=-1)


def test_every_file_has_its_place():
    assert {module_of(path) for path in files()} == set(PLACE)


def test_imports_never_run_back():
    wrong = [
        f"{module_of(path)} imports {other}"
        for path in files()
        for other in imported_modules(path)
        if place_of(other) >= PLACE[module_of(path)]
    ]
    assert wrong == []


def test_files_and_functions_are_short():
    long = []
    for path in files():
        text = path.read_text("utf-8")
        long += [path.name] if text.count("\n") > MOST_LINES else []
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= MOST_OF_ONE:
                long.append(f"{path.name}: {node.name}")
    assert long == []


def top_level_names(path: Path) -> set[str]:
    found = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_a_name_stands_for_one_thing():
    """A verb may have its function's name, and each way to draw has its `sample`."""
    places: dict[str, list[str]] = {}
    for path in files():
        for name in top_level_names(path) - {"sample", "__all__"}:
            places.setdefault(name, []).append(module_of(path))
    twice = {name: there for name, there in places.items() if len(there) > 1}
    assert {name: there for name, there in twice.items() if not is_verb(name, there)} == {}


def is_verb(name: str, there: list[str]) -> bool:
    """Whether a name is a verb's of the command line, and of one function that it calls."""
    in_cli = [module.startswith("cli.") for module in there]
    return sorted(in_cli) == [False, True] and not name.startswith("_")


#: an option of the command line, and a whole command, which a person types in either case
OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z-]+|-[a-z])\b")
COMMAND = re.compile(r"`sdd-lora [^`]+`")
#: command lines themselves, and the journal's, which names a command in full
SPEAKS_OF_OPTIONS = ("cli.", "__main__", "comfyui", "checkpoint.journal")


class Texts(ast.NodeVisitor):
    """The strings of a file, as its source has them, but for its docstrings."""

    def __init__(self, source: str) -> None:
        self.found: list[str] = []
        self.visit(ast.parse(source))

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):
            self.visit(node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        self.found.append(ast.unparse(node))

    def visit_Constant(self, node: ast.Constant) -> None:
        self.found.append(ast.unparse(node))


def options_named(source: str) -> list[str]:
    return [text for text in Texts(source).found if OPTION.search(COMMAND.sub("", text))]


def test_messages_name_parameters_which_the_command_line_shows_as_its_options():
    said = {
        module_of(path): named
        for path in files()
        if not module_of(path).startswith(SPEAKS_OF_OPTIONS)
        and (named := options_named(path.read_text("utf-8")))
    }
    assert said == {}


def test_the_test_sees_an_option_in_a_message():
    assert options_named('raise BadInput(f"{x}: choose another, "\n f"with -o {y}")') != []
    assert options_named('"""--keep"""\nf"add `keep=True`; `sdd-lora stack {x} -o OUT` does"') == []


def test_the_test_sees_a_wrong_import(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(
        "def f():\n    from sdd_lora.runs.train import train\n    import sdd_lora.io.sniff"
    )
    assert imported_modules(file) == {"runs.train", "io.sniff"}
    assert place_of("runs.train") > place_of("training.trainer") > place_of("io.sniff")

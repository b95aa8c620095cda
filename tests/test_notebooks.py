"""The notebooks are clean, in the form of a chapter, and the package is what they export."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import HOUR, ROOT
from first_cell import first_cell, settings

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
BANNED = {
    r"import \*": "a star import hides where a name comes from",
    r"allow_errors|raises-exception": "a cell that may fail teaches nothing",
    r"import pickle|pickle\.load": "weights are kept as safetensors",
    r"torch\.load\((?![^)]*weights_only=True)": "torch.load needs weights_only=True",
    r"\\tag\{": "MathJax sets it twice",
    r"show_doc\(": "the API page shows the parameters",
}


def cells(path, kind="code"):
    """Return the sources of a notebook's cells of one kind."""
    notebook = json.loads(path.read_text("utf8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def run_on_copy(folder, tool):
    """Run a tool of nbdev on a copy of notebooks and package; return the copy's root."""
    for name in ("nbs", "convmixer_edu"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copy(ROOT / "settings.ini", folder)
    tool = Path(sys.executable).with_name(tool)
    done = subprocess.run([tool], cwd=folder, capture_output=True, text=True, timeout=HOUR)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_package_is_what_the_notebooks_export(tmp_path):
    copy = run_on_copy(tmp_path, "nbdev_export") / "convmixer_edu"
    here = {path.name: path.read_text("utf8") for path in (ROOT / "convmixer_edu").glob("*.py")}
    there = {path.name: path.read_text("utf8") for path in copy.glob("*.py")}
    differ = sorted(name for name in here | there if here.get(name) != there.get(name))
    assert not differ, f"run nbdev_export: {differ} are not what the notebooks say"


def test_every_module_has_one_notebook():
    homes = {}
    for path in NOTEBOOKS:
        for module in re.findall(r"^#\|\s*default_exp\s+(\S+)", "\n".join(cells(path)), re.M):
            homes.setdefault(module, []).append(path.name)
    assert all(len(names) == 1 for names in homes.values()), "one `#| default_exp` in several notebooks: " + str(
        {module: names for module, names in homes.items() if len(names) > 1})
    modules = {path.stem for path in (ROOT / "convmixer_edu").glob("*.py")} - {"__init__", "__main__", "_modidx"}  # the first two by hand
    assert not modules - set(homes), f"no notebook has a `#| default_exp` for {sorted(modules - set(homes))}"
    assert not set(homes) - modules, f"run nbdev_export for {sorted(set(homes) - modules)}; a chapter without `#| export` has no `#| default_exp`"


def test_notebooks_are_clean(tmp_path):
    copy = run_on_copy(tmp_path, "nbdev_clean")
    dirty = [path.name for path in NOTEBOOKS if path.read_bytes() != (copy / "nbs" / path.name).read_bytes()]
    assert not dirty, f"run nbdev_clean: {dirty}"


def test_toc_lists_every_notebook():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text("utf8"))
    pages = {toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])}
    files = {f"nbs/{path.stem}" for path in (ROOT / "nbs").iterdir() if path.suffix in {".ipynb", ".md"}}
    assert not files - pages, f"write into _toc.yml: {sorted(files - pages)}"
    assert not pages - files, f"_toc.yml names what is not there: {sorted(pages - files)}"


@by_name
def test_the_first_page_has_a_card_with_the_title(path):
    if path.stem != "index":
        title = cells(path, "markdown")[0].split("\n")[0].removeprefix("# ")
        card = f"- [{title}]({path.name}) "
        assert card in "\n".join(cells(ROOT / "nbs" / "index.ipynb", "markdown")), f"write a card into nbs/index.ipynb: {card}..."


@by_name
def test_form_of_a_chapter(path):
    notebook = json.loads(path.read_text("utf8"))
    first = notebook["cells"][0]
    assert first["cell_type"] == "markdown" and "".join(first["source"]).startswith("# "), "the first cell is the title: `# W16. A lamp`"
    start = [source for source in cells(path)[:2] if not source.startswith("#| default_exp")]
    assert start[0] == first_cell(settings(ROOT)), "the cell for Colab is not there, or another: copy it, run python tools/first_cell.py"
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook["cells"]), (
        "clear all outputs in the editor: nbdev_clean leaves them")
    wide = [line for source in cells(path) for line in source.split("\n")  # a caption is no code
            if len(line) > 80 and not line.startswith("#| fig-cap:")]
    assert not wide, f"code of more than 80 columns: {wide}"


@by_name
def test_answers_are_out_of_sight_in_colab(path):
    for cell in json.loads(path.read_text("utf8"))["cells"]:
        if number := re.match(r"#\|\s*check:\s*(\d+)\n", "".join(cell["source"])):
            title = f'#@title Check exercise {number[1]} {{ display-mode: "form" }}\n'
            assert cell["source"][1] == title, f"the second line of the check of exercise {number[1]} is not {title}"
            assert cell["metadata"].get("cellView") == "form", (
                f'the cell of the check of exercise {number[1]} lacks "cellView": "form" in its metadata')


@by_name
def test_nothing_banned(path):
    text = "\n".join(cells(path) + cells(path, "markdown"))
    found = [reason for pattern, reason in BANNED.items() if re.search(pattern, text)]
    assert not found


def imported(path, modules):
    """Return the modules of the package that one imports: anywhere in it, in every form, and by importlib."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("convmixer_edu.") for alias in node.names
                      if alias.name.startswith("convmixer_edu.")}  # a bare `train` is timm's script
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("convmixer_edu")):
            here = (node.module or "").removeprefix("convmixer_edu").strip(".")
            found |= {here} if here else {alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__"):
            found.add(ast.literal_eval(node.args[0]).removeprefix("convmixer_edu").strip("."))
    return found & modules


def test_modules_import_only_from_below():
    """The floors and the table that CONTRIBUTING.md shows are those of the code."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf8")
    floors = {name: int(level) for level, names in re.findall(r"^(\d)  (.+)$", text, re.M) for name in names.split()}
    table = re.findall(r"^\| (\w+) \| [^|]* \| (?:`(\w+)\.py`: |-)", text, re.M)
    chapters, modules = {chapter for chapter, _ in table}, {module for _, module in table if module}
    there = {path.stem for path in NOTEBOOKS}
    assert not there - chapters, (f"write a row into CONTRIBUTING.md's table of chapters for {sorted(there - chapters)}: "
                                  "| chapter | paper | `module.py`: about | or, without a module, | chapter | paper | - (about) |")
    assert not chapters - there, f"CONTRIBUTING.md's table has rows for chapters that are not there: {sorted(chapters - there)}"
    assert not modules - set(floors), f"write on a floor of CONTRIBUTING.md, above what they import: {sorted(modules - set(floors))}"
    assert not set(floors) - modules, f"on a floor of CONTRIBUTING.md, but in no row of its table: {sorted(set(floors) - modules)}"
    written = {path.stem for path in (ROOT / "convmixer_edu").glob("[!_]*.py")}
    assert not written - modules, f"no row of CONTRIBUTING.md's table names the modules {sorted(written - modules)}"
    assert not modules - written, f"CONTRIBUTING.md's table names modules that are not there: {sorted(modules - written)}"
    for path in (ROOT / "convmixer_edu").glob("[!_]*.py"):
        for below in imported(path, set(floors)):
            assert floors[below] < floors[path.stem], (f"{path.stem} (floor {floors[path.stem]} in CONTRIBUTING.md) imports {below} "
                                                       f"(floor {floors[below]}): only what stands below may be imported")


@pytest.mark.parametrize("path", sorted((ROOT / "convmixer_edu").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_a_name_is_exported_once(path):
    """A function grows over several cells of a chapter; only its last form is exported."""
    names = [node.name for node in ast.parse(path.read_text("utf8")).body
             if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "_"]
    assert sorted(names) == sorted(set(names))

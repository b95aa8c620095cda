"""Words of strangers: a name with any character in it neither acts nor changes, wherever it is shown."""

import contextlib
import html
import io
import json
import re
import unicodedata
import xml.dom.minidom

import numpy as np
import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from PIL import Image

from convmixer_edu import cli, ledger
from convmixer_edu.escape import label, markdown, visible, yaml_text
from convmixer_edu.inference import predict
from convmixer_edu.visualize import image_grid, svg

ACTS = {c for c in map(chr, range(0x110000)) if unicodedata.category(c) in {"Cc", "Cs", "Zl", "Zp"}
        or (unicodedata.category(c) == "Cf" and c not in "\u200c\u200d")} - {"\n"}
FOLDERS = [  # any name that a folder can have
    "\x1b[31mred", "\x1b]0;title\x07", "tab\tin", "new\nline", "cr\rback", "\x7fdel", "\x9b31mC1", "\x85nel", "\u2028line",
    "\u202egnp.exe", "\u2066isolate\u2069", "\ufeffbom", "\udcff\udcfebytes", "'quote'", '"double"', "<script>alert(1)", "&amp;",
    "<img src=x onerror=alert(2)>", "[x](e.org)", "![i](e.org)", "`code`", "**bold**", "# head", "a|b", "---", "- item", "1. one",
    "x]\nlicense: mine", "key: value", "!!python:object", "$x$", "a_b$", "$\\frac$", "a$^b$c", "\\(x\\)", "_legend", "[red]x",
    ":smile:", "-rf", "--help", "~root", "a" * 255, " ", "www.e.org", "%s{0}{dim}", "$(touch x)", "猫", "👩‍👩‍👧", "e\u0301"]
NAMES = [*FOLDERS, "[/]", "[red]x[/red]", "a\x00b", "..", "../../etc/passwd", "", "z" * 5000, "https://e.org/x"]
by_name = pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[1:21])


@by_name
def test_nothing_acts_and_nothing_is_lost(name):
    shown = visible(name)
    assert not ACTS & set(shown) and "\n" not in shown
    assert visible(shown) == shown, "shown twice, it would be another name"
    if not ACTS & set(name) and "\n" not in name:
        assert shown == name
    assert html.unescape(markdown(name)) == shown and yaml.safe_load(yaml_text(name)) == shown


@by_name
def test_in_markdown_a_name_is_text(name):
    """In a sentence and in a cell of a table, for a renderer that takes HTML, tables and bare addresses."""
    page = f"A name ({markdown(name)}) here.\n\n| a | b |\n|:--|--:|\n| {markdown(name)} | 1 |\n"
    shown = MarkdownIt("gfm-like").render(page)
    assert set(re.findall(r"<(\w+)", shown)) == {"p", "table", "thead", "tbody", "tr", "th", "td"}
    assert shown.count("<td") == 2
    assert html.unescape(re.search("<p>A name [(](.*)[)] here[.]</p>", shown)[1]) == visible(name)


def drawn(text):
    """What is written in a figure."""
    xml.dom.minidom.parseString(text)
    return [html.unescape(word) for word in re.findall(r"<text[^>]*>([^<]*)</text>", text)]


@pytest.mark.filterwarnings("ignore:Glyph", "ignore:constrained_layout", "ignore:__array__")  # fonts, long names
@by_name
def test_in_a_figure_a_name_is_text(name):
    text = svg(image_grid(torch.rand(1, 3, 4, 4), [name], row_titles=[name]), f"A square called {name}")
    assert not ACTS & set(text)
    lines = label(name).replace(r"\$", "$").split("\n")
    words = [word.strip() for word in drawn(text)]
    assert all(line.strip() in words for line in lines if line.strip())
    assert sum(map(len, lines)) <= 60


def call(*words, screen=False):
    """The command in this process: exit code, stdout, stderr; perhaps as on a terminal."""
    streams = [io.StringIO() for _ in range(2)]
    for stream in streams:
        stream.isatty = lambda: screen
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]), pytest.raises(SystemExit) as end:
        cli.main([str(word) for word in words])
    told = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue()) if screen else stream.getvalue() for stream in streams]
    assert not ACTS & set("".join(told)), "a name reached the terminal as it is"
    return end.value.code, *told


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of pictures whose classes have these names, and a run on it."""
    folder = tmp_path_factory.mktemp("hostile")
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in FOLDERS:
            (folder / "data" / split / name).mkdir(parents=True)
            for i in range(2):
                Image.fromarray(draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / "data" / split / name / f"{i}.png")
    sizes = "dim=8 depth=1 kernel_size=3 patch_size=2 batch_size=16 depthwise=library".split()
    code, _, err = call("train", "--data", folder / "data", "--out", folder / "run", "--epochs", 1, "--device", "cpu",
                        *(word for size in sizes for word in ("--set", size)))
    assert code == 0, err
    return folder / "run"


@by_name
@pytest.mark.parametrize("screen", [False, True])
def test_in_a_table_of_the_command_a_name_is_text(name, screen, monkeypatch):
    out = io.StringIO()
    out.isatty = lambda: screen
    monkeypatch.setattr("sys.stdout", out)
    cli._table([(name, "1")], ("name", "number"))
    told = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    assert not ACTS & set(told)
    assert "".join(told.split()).count("".join(visible(name).split())) >= (len(name) < 30)


def test_hostile_class_names_through_the_commands(trained):
    known = json.loads((trained / "config.json").read_text())["classes"]
    assert sorted(known) == sorted(FOLDERS)
    picture = trained.parent / "data" / "test" / "$x$" / "0.png"
    for screen in (False, True):
        assert call("evaluate", trained, screen=screen)[0] == 0
        code, out, _ = call("predict", trained, picture, "--top", 99, screen=screen)
        assert code == 0
        assert out.count("a") > 255  # the longest is folded on a screen, its figures beside it
        for name in FOLDERS if not screen else (name for name in FOLDERS if len(name) < 40):
            assert re.sub(r"\s", "", visible(name)) in re.sub(r"\s", "", out)
    code, out, _ = call("predict", trained, picture, "--top", 99, "--json")
    (seen,) = json.loads(out)["predictions"]
    assert {best["class"] for best in seen["classes"]} == set(FOLDERS)
    assert {name for name, _ in predict(trained, [picture], 99)[0]} == set(FOLDERS)
    for words in (("predict", trained, "\x1b[31m\u202e.png"), ("evaluate", trained, "--data", "digits"),
                  ("train", "--out", trained.parent / "new", "--set", "\x1b[31m=\u202e")):
        code, out, err = call(*words)
        assert code == 2 and err.count("\n") == 1 and not out


@by_name
def test_a_model_card_shows_what_a_run_says_as_text(trained, name):
    setup, result = (json.loads((trained / file).read_text()) for file in ("config.json", "run.json"))
    setup |= {"classes": [name, "b"], "source": name}
    card = ledger.model_card(setup, {**result, "device": name, "precision": name})
    assert not ACTS & set(card)
    _, head, body = card.split("---\n", 2)
    told = yaml.safe_load(head)
    assert told == {"library_name": "convmixer-edu", "license": "apache-2.0", "pipeline_tag": "image-classification",
                    "datasets": [visible(name)]}
    shown = MarkdownIt("gfm-like").render(body)
    assert set(re.findall(r"<(\w+)", shown)) == {"h1", "p", "strong", "code"}


def test_a_card_of_damaged_notes_is_refused_in_one_sentence(trained):
    setup, result = (json.loads((trained / file).read_text()) for file in ("config.json", "run.json"))
    for change in ({"image_size": 3}, {"classes": None}, {"train_images": "<b>"}, {"config": {"dim": "[x](y)"}}):
        with pytest.raises(ValueError, match="do not make a card"):
            ledger.model_card({**setup, **change}, result)

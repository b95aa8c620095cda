"""Figures: colours that each theme can set, letters that can be read, pictures that are what was drawn."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib.patches import Circle
from PIL import Image

from convmixer_edu.visualize import PALETTE, axes, image_grid, show, svg

STYLE = (ROOT / "assets" / "static" / "book.css").read_text("utf8")


def luminance(colour):
    """WCAG's relative luminance of #rrggbb."""
    values = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    return sum(w * (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055)**2.4)
               for w, v in zip((0.2126, 0.7152, 0.0722), values))


@pytest.mark.parametrize(("theme", "ground"), [("light", "#ffffff"), ("dark", "#14171c")])
def test_every_colour_stands_out_in_both_themes(theme, ground):
    block = re.search(rf'html\[data-theme="{theme}"\] \{{(.*?)\}}', STYLE, re.S)[1]
    colours = re.findall(r"--fig-\d: (#\w{6});", block)
    assert len(colours) == len(PALETTE)
    for colour in colours:
        low, high = sorted((luminance(colour), luminance(ground)))
        assert (high + 0.05) / (low + 0.05) >= 3, colour


def test_a_figure_takes_its_colours_from_the_page():
    fig, ax = axes()
    for i in range(len(PALETTE)):
        ax.plot([0, 1], [0, i])
    text = svg(fig, "Seven lines")
    for i, colour in enumerate(PALETTE, 1):
        assert text.count(colour.lower()) == text.count(f"var(--fig-{i}, {colour.lower()})") == 1


def test_no_letter_is_smaller_than_nine_points():
    fig, ax = axes(width=3)
    ax.plot([0, 1], label="a line")
    ax.legend(fontsize=5)
    ax.set_title("small", fontsize=6)
    text = svg(fig, "A line")
    shown = int(re.search(r"max-width:(\d+)px", text)[1]) / float(re.search(r'viewBox="0 0 ([\d.]+)', text)[1])
    sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", text)]
    assert len(sizes) > 5 and min(sizes) * shown >= 11.9  # pixels of a screen, 96 to the inch


def test_code_in_a_figure_is_set_in_the_font_of_code():
    fig, ax = axes(width=2)
    ax.set_title("class R", family="monospace")
    ax.set_xlabel("words")
    text = svg(fig, "A line of code")
    assert [">class R<" in tag for tag in re.findall(r"<text.*font-family: JetBrains Mono, .*", text)] == [True]


def pictures(text):
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
            for data in re.findall(r"data:image/\w+;base64,([^\"]+)", text)]


def forms(fig, **options):
    """Both forms of a figure: (width on a screen, the smallest letter there, both in pixels; its text)."""
    found = []
    for text in re.findall(r"<svg.*?</svg>", show(fig, "A figure", **options).data, re.S):
        width = int(re.search(r"max-width:(\d+)px", text)[1])
        scale = width / float(re.search(r'viewBox="0 0 ([\d.]+)', text)[1])
        found.append((width, scale * min(map(float, re.findall(r"font-size: ([\d.]+)px", text)), default=99), text))
    return found


@pytest.mark.parametrize("titles, columns", [(None, 6), ([f"frog, {i} %" for i in range(12)], 3)])
def test_pictures_stand_in_fewer_columns_on_a_phone(titles, columns):
    """Letters stay large, rows stay together, no picture is stored twice, the narrow form waits for the style sheet."""
    wide, narrow = forms(image_grid(torch.rand(12, 3, 8, 8), titles, cols=6, scale=1.15, row_titles=["a row", "another"]))
    assert wide[0] > 600 and narrow[0] <= 320 and min(wide[1], narrow[1]) >= 11.9
    assert narrow[2].startswith('<svg class="narrow"') and "display:none" in narrow[2] and "display:none" not in wide[2]
    stored = re.findall(r'<image id="([^"]+)"', wide[2])
    assert len(set(stored)) == 12 and re.findall(r'<use href="#([^"]+)"', narrow[2]) == stored and "data:" not in narrow[2]
    left, top = ([float(at) for at in re.findall(rf'transform="matrix\({"[^ ]+ " * 4}{part}\)"><use', narrow[2])]
                 for part in ("([^ ]+) [^ ]+", "[^ ]+ ([^ ]+)"))
    assert len({round(x) for x in left}) == columns and len({round(y) for y in top}) == 12 // columns


def test_panels_stand_below_each_other_on_a_phone():
    fig, panels = axes(1, 3, width=7.4, height=2.5, sharey=True)
    for ax in panels:
        ax.plot(range(5), label="a line")
        ax.set(xlabel="a long name of what is counted along the axis")
    panels[0].set(ylabel="accuracy, %")
    panels[1].legend()
    wide, narrow = forms(fig)
    assert narrow[0] <= 320 and narrow[1] >= 11.9
    assert (wide[2].count("accuracy, %"), narrow[2].count(">accuracy, %")) == (1, 3)


def test_what_is_narrow_has_one_form_and_a_drawing_brings_its_own():
    assert len(forms(axes(width=3)[0])) == 1
    drawing, ax = axes(width=7)
    ax.set_axis_off()
    ax.text(0, 0, "wide")
    assert len(forms(drawing)) == 1
    own, ax = axes(width=3)
    ax.text(0, 0, "narrow")
    assert "narrow</text>" in forms(drawing, narrow=own)[1][2]


def test_a_small_picture_is_kept_as_it_is():
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    kept = pictures(svg(image_grid(images), "Noise"))
    assert len(kept) == 3
    for picture, image in zip(kept, images):
        assert (picture == image.permute(1, 2, 0).numpy()).all()


def test_a_photograph_is_nearly_kept_and_much_smaller():
    ramp = torch.linspace(0, 1, 240)
    image = torch.stack([ramp.expand(240, -1), ramp[:, None].expand(-1, 240), torch.rand(240, 240) / 9])[None]
    text = svg(image_grid(image, scale=2), "A ramp")
    (kept,) = pictures(text)
    assert np.abs(kept / 255 - image[0].permute(1, 2, 0).numpy()).mean() < 0.04
    assert len(text) < 40_000 and "pixelated" not in text


def test_what_is_written_in_a_figure_is_left_alone():
    fig, ax = axes()
    words = f'{PALETTE[0].lower()} font-family: x; d="1.23456" #010203'
    ax.set_title(words)
    ax.add_patch(Circle((0.123456, 0.5), 0.25))
    assert words in svg(fig, "A circle")

"""Draw the pictures that a shared link shows, from recorded runs: python assets/share_pictures.py"""

import io
import re
from pathlib import Path
from textwrap import shorten

import torch
from book_site import ROOT, parts, picture
from matplotlib.figure import Figure
from PIL import Image, PngImagePlugin

from convmixer_edu.inference import load_run
from convmixer_edu.ledger import pretrained_run, read_record, results_folder

RUN = "quick8-covariance-seed0"


def filters(run, rows, columns):
    """Return a wall of the largest filters of a run's patch embedding, as a picture."""
    model, _ = load_run(run)
    weight = model[0].weight.detach()
    weight = weight[weight.flatten(1).norm(dim=1).topk(rows * columns).indices]
    tiles = 0.5 + 0.5 * weight / weight.abs().amax((1, 2, 3), keepdim=True)  # (n, 3, p, p)
    tiles = torch.nn.functional.pad(tiles, (0, 1, 0, 1), value=1.0)
    return tiles.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)[:-1, :-1]


def share(name, title, lines, small):
    """Draw the picture that others show beside a link: 1200 x 630."""
    fig = Figure(figsize=(12, 6.3), facecolor="#14171c", dpi=100)
    wall = fig.add_axes((0.62, 0.08, 0.34, 0.84))
    wall.imshow(filters(results_folder() / RUN, 8, 6), aspect="auto", interpolation="nearest")
    wall.set_axis_off()
    fig.text(0.05, 0.93, title, color="white", size=36, weight="bold", va="top")
    fig.text(0.05, 0.73, lines, color="#e3e6ea", size=22, va="top", linespacing=1.4)
    fig.text(0.05, 0.08, small, color="#7db5ff", size=20, va="bottom")
    file = io.BytesIO()
    fig.savefig(file, facecolor=fig.get_facecolor())
    note = PngImagePlugin.PngInfo()
    note.add_text("shows", f"{title}\n{lines}\n{small}")
    Image.open(file).convert("RGB").quantize(128).save(ROOT / "assets" / "static" / name, optimize=True, pnginfo=note)


def words():
    """Return what stands on each picture, {name: (title, lines, small)}: the first page's, and one for each part with its pages' titles."""
    run = read_record(pretrained_run().name)
    told = {"share.png": ("Was it the attention,\nor the patches?", "\nConvMixer, built from the paper:\na book that runs",
                          f"{run['test_accuracy']:.1f} % on CIFAR-10, in {run['seconds']:.0f} seconds on a GPU,\n"
                          "and the network answers in your browser")}
    inside = {}
    for page, part in parts().items():
        file = next((ROOT / "nbs").glob(f"{Path(page).name}.*"))
        title = re.search(r"^\W*# (.+?)(?:\\n)?\W*$", file.read_text("utf8"), re.M)[1]
        inside.setdefault(part, [picture(page)]).append(shorten(title.split(":")[0], 42, placeholder=" ..."))
    for part, (name, *titles) in inside.items():
        more = f"\nand {len(titles) - 6} more" if len(titles) > 7 else ""
        told[name] = part, "\n".join(titles[:6 if more else 7]) + more, "ConvMixer, built from the paper"
    return told


if __name__ == "__main__":
    for name, told in words().items():
        share(name, *told)

"""Draw README.md's picture from the recorded run: python assets/readme_picture.py"""

from pathlib import Path

import torch

from convmixer_edu.inference import load_run
from convmixer_edu.ledger import recorded, results_folder
from convmixer_edu.visualize import PALETTE, axes

RUN = "quick8-covariance-seed0"
INK = "#7d8590"  # legible on white and on black


def main():
    model, _ = load_run(results_folder() / RUN)
    run = recorded(RUN)
    filters = model[0].weight.detach()
    filters = filters[filters.flatten(1).norm(dim=1).topk(48).indices]
    tiles = 0.5 + 0.5 * filters / filters.abs().amax((1, 2, 3), keepdim=True)  # (48, 3, p, p)
    tiles = torch.nn.functional.pad(tiles, (0, 1, 0, 1), value=1.0)
    wall = tiles.unflatten(0, (4, 12)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)[:-1, :-1]
    fig, (left, right) = axes(1, 2, width=9, height=2.4, width_ratios=[2, 1])
    left.imshow(wall)
    left.set(xticks=[], yticks=[], title="what the patch embedding learned")
    left.spines[:].set_visible(False)
    epochs = [line["epoch"] for line in run["metrics"]]
    right.plot(epochs, [line["loss"] for line in run["metrics"]], "o-", color=PALETTE[0])
    right.set(xlabel="epoch", ylabel="training loss", xticks=epochs,
              title=f"{run['test_accuracy']:.1f} % on CIFAR-10, {run['seconds']:.0f} s, two cores")
    for ax in (left, right):
        ax.title.set_color(INK)
        ax.xaxis.label.set_color(INK)
        ax.yaxis.label.set_color(INK)
        ax.tick_params(colors=INK)
        ax.spines[:].set_edgecolor(INK)
    fig.savefig(Path(__file__).parent / "static" / "run.png", dpi=160, transparent=True)


if __name__ == "__main__":
    main()

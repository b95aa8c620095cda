"""Speed, as ratios of two things run in turn in one process: `make bench`.

Writes _build/bench.json, a list of {name, ours, baseline, ratio, unit, rounds, spread}, and prints it as a table.
`ours` and `baseline` are medians over the rounds; `ratio` is the median of the rounds' ratios, so that a slow moment of
the machine hits both sides; `spread` is the lowest and the highest of them. Compilation is warmed up before.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table
from torchvision.transforms import RandAugment

from convmixer_edu.augment import rand_augment
from convmixer_edu.data import load_images
from convmixer_edu.train import (PRESETS, _choose_depthwise, build_model, choose_device, choose_precision,
                                 keep_freed_memory, make_batch, make_optimizer, train_step, with_settings)
from convmixer_edu.train import statistics as image_statistics

ROUNDS = 7


def compare(name, unit, amount, ours, baseline, rounds=ROUNDS):
    """Time two functions in turn; `amount` is what one call of either gets done, in `unit`'s numerator."""
    speeds = {"ours": [], "baseline": []}
    for function in (ours, baseline, ours, baseline):
        function()
    for _ in range(rounds):
        for who, function in (("ours", ours), ("baseline", baseline)):
            start = time.perf_counter()
            function()
            speeds[who].append(amount / (time.perf_counter() - start))
    ratios = [a / b for a, b in zip(speeds["ours"], speeds["baseline"])]
    return {"name": name, "ours": round(statistics.median(speeds["ours"]), 1),
            "baseline": round(statistics.median(speeds["baseline"]), 1),
            "ratio": round(statistics.median(ratios), 3), "unit": unit, "rounds": rounds,
            "spread": [round(min(ratios), 3), round(max(ratios), 3)]}


def synchronised(function, device):
    """The function, waiting for the device where it works in the background."""
    def run():
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return run


def training_step(data, device, batch, **sizes):
    """A whole training step, images as bytes to updated weights, against the plain model: eager, NCHW, float32."""
    stats = image_statistics(data.images)
    images, labels = data.images[:batch].to(device), data.labels[:batch].to(device)
    steps = {}
    for who, settings in (("ours", {"channels_last": True}),
                          ("baseline", {"channels_last": False, "depthwise": "library", "precision": "float32"})):
        c = with_settings(PRESETS["light25"], {**sizes, **settings, "batch_size": batch, "randaug_n": 0})
        model = build_model(c, data, device, _choose_depthwise(c, device)).train()
        optimizer, dtype = make_optimizer(model, c), choose_precision(device, c.precision)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

        def step(c=c, model=model, optimizer=optimizer, dtype=dtype, scaler=scaler):
            x, y = make_batch(images, labels, 10, stats, c, 0, 0)
            train_step(model, optimizer, scaler, x, y, c, dtype)
        steps[who] = synchronised(step, device)
    k, p = sizes.get("kernel_size", 5), sizes.get("patch_size", 2)
    return compare(f"training step, 256/8 k{k} p{p}, batch {batch}", "images/s", batch, steps["ours"],
                   steps["baseline"])


def evaluation(data, device, batch):
    """The forward pass of 256/8 k5 p2 in evaluation mode, against the plain model: NCHW, float32."""
    x = data.images[:batch].to(device).float() / 255
    passes = {}
    for who, layout in (("ours", torch.channels_last), ("baseline", torch.contiguous_format)):
        c = with_settings(PRESETS["light25"], {"channels_last": who == "ours"})
        model = build_model(c, data, device).eval()
        dtype = choose_precision(device) if who == "ours" else torch.float32
        half = dtype != torch.float32

        @torch.inference_mode()
        def forward(model=model, x=x.contiguous(memory_format=layout), dtype=dtype, half=half):
            with torch.autocast(device.type, dtype if half else None, half):
                F.softmax(model(x).float(), 1)
        passes[who] = synchronised(forward, device)
    return compare(f"evaluation, 256/8 k5 p2, batch {batch}", "images/s", batch, passes["ours"], passes["baseline"])


def augmentation(data, count=512):
    """RandAugment(2, 12), a draw of its own for each image, against torchvision's on Pillow images, on one thread."""
    images = data.images[:count]
    pictures = [Image.fromarray(np.ascontiguousarray(i.permute(1, 2, 0).numpy())) for i in images]
    generator, pillow = torch.Generator().manual_seed(0), RandAugment(2, 12)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return compare("RandAugment(2, 12), one thread", "images/s", count,
                       lambda: rand_augment(images, 2, 12, generator), lambda: [pillow(p) for p in pictures])
    finally:
        torch.set_num_threads(threads)


def colour_images(count):
    """Training images of the default source, or noise of CIFAR-10's size where there are none."""
    try:
        data = load_images(None, "train", limit=count)
        if data.images.shape[1] == 3:
            return data
    except FileNotFoundError as error:
        print(f"noise stands in for the images: {error}")
    digits = load_images("digits", limit=count)
    noise = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return type(digits)(noise, digits.labels, digits.classes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="cpu or cuda; the best there is by default")
    parser.add_argument("--out", default="_build/bench.json", type=Path)
    arguments = parser.parse_args()
    device, data = choose_device(arguments.device), colour_images(1024)
    keep_freed_memory()
    rows = [training_step(data, device, 64), training_step(data, device, 128),
            training_step(data, device, 128, kernel_size=9), evaluation(data, device, 128), augmentation(data)]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    table = Table(title=f"on {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for column in ("name", "ours", "baseline", "unit", "ratio", "spread"):
        table.add_column(column, justify="left" if column in ("name", "unit") else "right")
    for row in rows:
        low, high = row["spread"]
        table.add_row(row["name"], f"{row['ours']:,.1f}", f"{row['baseline']:,.1f}", row["unit"],
                      f"{row['ratio']:.2f}", f"{low:.2f} to {high:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()

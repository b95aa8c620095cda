"""Speed, as ratios of two things run in turn in one process tree: `make bench`.

Writes _build/bench.json, a list of {name, ours, baseline, ratio, unit, rounds, spread}, and prints it as a table.
`ours` and `baseline` are medians over the rounds; `ratio` is the median of the rounds' ratios, so that a slow moment of
the machine hits both sides; `spread` is the lowest and the highest of them. Compilation is warmed up before, except
where the start is what is measured. A baseline that trains or evaluates runs in a process of its own, where memory is
handled as the system does it; `ratio_kept` is against the same baseline after `keep_freed_memory`. A row may say more:
the setting that ours ran with, its part of the roofline.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from convmixer_edu import speed
from convmixer_edu.augment import Augment
from convmixer_edu.data import load_images
from convmixer_edu.inference import statistics as image_statistics
from convmixer_edu.machine import autocast, choose_device, choose_precision, device_name, keep_freed_memory, make_scaler
from convmixer_edu.model import ConvMixer
from convmixer_edu.recipe import PRESETS, with_settings
from convmixer_edu.train import Run, _choose, build_model, make_facts

ROUNDS = 5
PLAIN = speed.RunSettings()  # NCHW, eager, float32


def in_turn(functions, amount, rounds=ROUNDS, end=float("inf"), tell=lambda speeds: None):
    """{name: speeds}: each function called once a round, in turn; `amount` is what one call gets done.

    After `end`, on the monotonic clock, no round but the first is begun; `tell` is called after each round."""
    speeds = {name: [] for name in functions}
    for number in range(rounds):
        if number and time.monotonic() > end:
            break
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            speeds[name].append(amount / (time.perf_counter() - start))
        tell(speeds)
    return speeds


def against(speeds, ours="ours"):
    """{opponent: (median, lowest, highest ratio)}, each of one round."""
    ratios = {name: sorted(a / b for a, b in zip(speeds[ours], them)) for name, them in speeds.items() if name != ours}
    return {name: [round(r, 3) for r in (statistics.median(them), them[0], them[-1])] for name, them in ratios.items()}


def compare(name, unit, amount, ours, baseline, kept=None, warmups=2, **more):
    """Time functions in turn; `amount` is what one call of any gets done, in `unit`'s numerator."""
    functions = {"ours": ours, "baseline": baseline, **({"kept": kept} if kept else {})}
    for function in [ours] * warmups + [*functions.values()][1:]:  # only ours may be compiled
        function()
    speeds = in_turn(functions, amount)
    ratios = against(speeds)
    row = {"name": name, "ours": round(statistics.median(speeds["ours"]), 3),
           "baseline": round(statistics.median(speeds["baseline"]), 3), "ratio": ratios["baseline"][0], "unit": unit,
           "rounds": ROUNDS, "spread": ratios["baseline"][1:]}
    if kept:
        row["ratio_kept"] = ratios["kept"][0]
    return {**row, **more}


def serve(pipe, make, arguments, keep):
    """In a process of its own: make a function, and call it whenever asked."""
    if keep:
        keep_freed_memory()
    function = make(*arguments)
    pipe.send("ready")
    while pipe.recv() == "go":
        function()
        pipe.send("done")


@contextmanager
def elsewhere(device, make, *arguments):
    """Functions that have the baseline run in other processes: with the system's memory, and with memory kept."""
    def start(keep):
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(there, make, arguments, keep))
        process.start()
        there.close()
        here.recv()
        processes.append((here, process))
        return lambda: (here.send("go"), here.recv())

    context, processes = multiprocessing.get_context("spawn"), []
    try:
        yield [start(keep) for keep in ((False, True) if device.type == "cpu" else (False,))]
    finally:
        for pipe, process in processes:
            pipe.send("stop")
            process.join(60)


def synchronised(function, device):
    """The function, waiting for the device where it works in the background."""
    def run():
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return run


def stepper(data, device, c, choice=None):
    """The trainer's own step, images as bytes to updated weights: a function of (indices, epoch, step)."""
    how = _choose(c, data, device) if choice is None else {"choice": asdict(choice), "depthwise": "library"}
    run = Run(c, data, device, {**make_facts(c, "", data), **how})
    run.whole.train()

    def step(index, epoch=0, number=0):
        given, = run.given(epoch, [(number, index)])
        return run.update(given, 0.4)
    step.setting = f"{run.choice}, weight gradient: {how['depthwise']}"
    step.choice, step.run = run.choice, run
    return step


def plain_step(device, c):
    """The training step of the plain model: eager, NCHW, float32."""
    step, index = stepper(colour_images(1024), device, c, PLAIN), torch.arange(c.batch_size)
    return synchronised(lambda: step(index), device)


def training_step(data, device, batch, **sizes):
    """A whole training step, images as bytes to updated weights, against the plain model."""
    c = with_settings(PRESETS["light25"], {**sizes, "batch_size": batch, "randaug_n": 0})
    step, index = stepper(data, device, replace(c, probe=True)), torch.arange(batch)
    with elsewhere(device, plain_step, device, c) as plain:
        row = compare(f"training step, {sizes_of(c)}, batch {batch}", "images/s", batch,
                      synchronised(lambda: step(index), device), *plain, setting=step.setting)
    dtype = getattr(torch, step.choice.dtype)
    work = speed.Workload(c.dim, c.depth, c.kernel_size, c.patch_size, batch)
    limit = speed.roofline(work, speed.ceilings(device, dtype), dtype)
    row["part_of_roofline"] = round(limit.seconds * row["ours"] / batch, 3)
    row["part_of_arithmetic"] = round(limit.arithmetic * row["ours"] / batch, 3)
    return row


def users_step(c, device, channels_last=True, dtype=None, compiled=None):
    """What a skilled user writes in five lines: layout, autocast, fused AdamW; a function without arguments."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    dtype = dtype or choose_precision(device)
    model = ConvMixer(c.dim, c.depth, c.kernel_size, c.patch_size, 10).to(device, memory_format=layout)
    if compiled:
        model = torch.compile(model, mode=compiled)
    x = torch.randn(c.batch_size, 3, 32, 32, device=device).contiguous(memory_format=layout)
    y = torch.arange(c.batch_size, device=device) % 10
    optimizer = torch.optim.AdamW(model.parameters(), c.lr, weight_decay=c.weight_decay, fused=True)

    def step():
        with autocast(device, dtype):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return step


def opponents(c, device, rounds=ROUNDS):
    """Ours against what others would do with the same step, in turn; theirs get their images ready made."""
    data, index, count = colour_images(c.batch_size), torch.arange(c.batch_size), 20 if device.type == "cuda" else 1
    ours = stepper(data, device, c)
    steps = {"ours": lambda: ours(index), "five lines": users_step(c, device),
             "five lines, NCHW": users_step(c, device, False)}
    for mode in ("default", "max-autotune-no-cudagraphs")[:1] if device.type == "cuda" else ():
        steps[f"five lines, compiled ({mode})"] = users_step(c, device, compiled=mode)
    many = {}
    for name, step in steps.items():
        for _ in range(5):  # compiled, recorded, warm
            step()

        def several(step=step):
            for _ in range(count):
                step()
        many[name] = synchronised(several, device)
    speeds = in_turn(many, count * c.batch_size, rounds)
    return {"setting": ours.setting, "images_per_second": speeds, "ratio": against(speeds)}


def sizes_of(c):
    """256/8 k5 p2"""
    return f"{c.dim}/{c.depth} k{c.kernel_size} p{c.patch_size}"


def forward_pass(device, c, choice):
    """The forward pass of a model in evaluation mode: a function that returns its logits."""
    x = torch.randn(c.batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    model = build_model(c, colour_images(64), device)
    model(x)  # running statistics other than 0 and 1
    forward = speed.frozen(model, choice)

    def run():
        logits = forward(x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return logits
    return run


def evaluation(device, batch, seconds):
    """The forward pass of 256/8 k5 p2 in evaluation mode, against the plain model: eager, NCHW, float32."""
    c = with_settings(PRESETS["light25"], {"batch_size": batch})
    work = speed.Workload(c.dim, c.depth, c.kernel_size, c.patch_size, batch, train=False)
    best = speed.choose(work, device, seconds)
    ours, exact = forward_pass(device, c, best), forward_pass(device, c, PLAIN)()
    error = float((ours() - exact).abs().max() / exact.abs().max())
    with elsewhere(device, forward_pass, device, c, PLAIN) as plain:
        return compare(f"evaluation, {sizes_of(c)}, batch {batch}", "images/s", batch, ours, *plain,
                       setting=str(best), relative_error=round(error, 5))


def augmentation(data, count=512):
    """RandAugment(2, 12), a draw of its own for each image, against torchvision's on Pillow images, on one thread."""
    images = data.images[:count]
    pictures = [picture(i) for i in images]
    generator, pillow = torch.Generator().manual_seed(0), transforms.RandAugment(2, 12)
    ours = Augment(flip=False, randaug_n=2, randaug_m=12)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return compare("RandAugment(2, 12), one thread", "images/s", len(images),
                       lambda: ours(images, generator), lambda: [pillow(p) for p in pictures])
    finally:
        torch.set_num_threads(threads)


def picture(image):
    """A Pillow image from uint8 (C, H, W)."""
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))


class Pictures(Dataset):
    """Pillow images one by one through the transforms of the authors' light script."""

    def __init__(self, data):
        stats = image_statistics(data.images)
        self.pictures, self.labels = [picture(i) for i in data.images], data.labels.tolist()
        self.transform = transforms.Compose([
            transforms.RandomResizedCrop(data.images.shape[-1], scale=(1.0, 1.0), ratio=(1.0, 1.0)),
            transforms.RandomHorizontalFlip(), transforms.RandAugment(2, 12), transforms.ToTensor(),
            transforms.Normalize(stats.mean, stats.std)])

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        return self.transform(self.pictures[i]), self.labels[i]


def authors_epoch(device, c, count, workers=2):
    """One epoch as the authors' light script does it: Pillow in workers, eager, NCHW, autocast."""
    data = colour_images(count)
    loader = DataLoader(Pictures(data), c.batch_size, shuffle=True, num_workers=workers, drop_last=True,
                        persistent_workers=True, pin_memory=device.type == "cuda")
    model = ConvMixer(c.dim, c.depth, c.kernel_size, c.patch_size, len(data.classes)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), c.lr, weight_decay=c.weight_decay)
    dtype = choose_precision(device)
    scaler = make_scaler(device, dtype)

    def epoch():
        for x, y in loader:
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            optimizer.zero_grad()
            with autocast(device, dtype):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            if c.clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), c.clip)
            scaler.step(optimizer)
            scaler.update()
            loss.item()  # the script prints it
    return epoch


def pipeline(data, device, c, workers=(2,), rounds=ROUNDS, end=float("inf"), tell=lambda row: None):
    """An epoch over some images, from pictures to updated weights, against the authors' way, in turn.

    `tell` gets the row after each round, since a machine may be taken away; what it waits for is printed."""
    batch, numbers, began = c.batch_size, itertools.count(), time.monotonic()
    images = len(data) // batch * batch
    step = stepper(data, device, c)

    def epoch():
        number = next(numbers)
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(number))
        for i in range(images // batch):
            step(order[i * batch:(i + 1) * batch], number, i)

    def row(speeds):
        return {"name": f"whole pipeline, {sizes_of(c)}, batch {batch}, {images} images an epoch",
                "setting": step.setting, "images_per_second": speeds, "ratio": against(speeds)}

    with ExitStack() as stack:
        functions = {"ours": synchronised(epoch, device)}
        for n in workers:
            theirs = stack.enter_context(elsewhere(device, authors_epoch, device, c, len(data), n))
            functions[f"the authors' way, {n} workers"] = theirs[-1]
        for name, function in functions.items():
            function()
            print(f"  {time.monotonic() - began:.0f} s: {name} has made its first epoch", flush=True)
        return row(in_turn(functions, images, rounds, end, lambda speeds: tell(row(speeds))))


def whole_pipeline(data, device, batch, count):
    """The row of `pipeline`, in the form of the others."""
    c = with_settings(PRESETS["light25"], {"batch_size": batch, "probe": True})
    row = pipeline(data.subset(torch.arange(count)), device, c)
    (name, (ratio, *spread)), = row["ratio"].items()
    median = {who: round(statistics.median(speeds), 3) for who, speeds in row["images_per_second"].items()}
    return {"name": row["name"], "ours": median["ours"], "baseline": median[name], "ratio": ratio, "unit": "images/s",
            "rounds": ROUNDS, "spread": spread, "setting": row["setting"]}


OURS = """
import sys
from torch import arange
from convmixer_edu import train as t
from convmixer_edu.data import load_images
from convmixer_edu.recipe import PRESETS, with_settings
device, c = t.choose_device(sys.argv[1]), with_settings(PRESETS["light25"], {"batch_size": 64})
data = load_images("digits", "train", 64, 32)
run = t.Run(c, data, device, {**t.make_facts(c, "digits", data), **t._choose(c, data, device)})
given, = run.given(0, [(0, arange(64))])
print(float(run.update(given, 0.4)))
"""
SCRIPT = """
import sys, torch, torchvision
from sklearn.datasets import load_digits
from torch import nn
class Residual(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn
    def forward(self, x):
        return self.fn(x) + x
h, device = 256, torch.device(sys.argv[1])
unit = lambda conv: nn.Sequential(conv, nn.GELU(), nn.BatchNorm2d(h))
model = nn.Sequential(unit(nn.Conv2d(1, h, 2, 2)), *[nn.Sequential(
    Residual(unit(nn.Conv2d(h, h, 5, groups=h, padding="same"))), unit(nn.Conv2d(h, h, 1))) for _ in range(8)],
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(h, 10)).to(device)
digits = load_digits()
x = nn.functional.interpolate(torch.tensor(digits.images[:64, None]).float(), (32, 32)).to(device)
optimizer = torch.optim.AdamW(model.parameters())
loss = nn.functional.cross_entropy(model(x), torch.tensor(digits.target[:64]).to(device))
loss.backward()
optimizer.step()
print(loss.item())
"""


def start_up(device):
    """From an empty process to the first step done, against a script of thirty lines: starts a minute."""
    def start(code):
        subprocess.run([sys.executable, "-c", code, str(device)], check=True, stdout=subprocess.DEVNULL)
    return compare("start-up to first step, batch 64", "starts/min", 60, lambda: start(OURS), lambda: start(SCRIPT),
                   warmups=1)


def colour_images(count):
    """Training images of the default source, or noise of CIFAR-10's size where there are none."""
    try:
        data = load_images(None, "train", limit=count)
        if data.images.shape[1] == 3:
            return data
    except FileNotFoundError as error:
        print(f"noise stands in for the images: {error}")
    digits = load_images("digits")
    shape = (count, 3, 32, 32)
    noise = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return type(digits)(noise, torch.arange(count) % len(digits.classes), digits.classes)


def rows(data, device, seconds):
    """The rows, as functions; a GPU gets the recipe's batch and more images."""
    gpu = device.type == "cuda"
    yield lambda: training_step(data, device, 64)
    yield lambda: training_step(data, device, 128)
    yield lambda: training_step(data, device, 128, kernel_size=9)
    if gpu:
        for k in (3, 5, 7, 9):
            yield lambda k=k: training_step(data, device, 512, kernel_size=k)
    yield lambda: evaluation(device, 512 if gpu else 128, seconds)
    yield lambda: augmentation(data)
    yield lambda: whole_pipeline(data, device, 512 if gpu else 64, 10240 if gpu else 512)
    yield lambda: start_up(device)


def table(found, device):
    """What was found, for a terminal."""
    shown = Table(title=f"on {device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for column in ("name", "ours", "baseline", "unit", "ratio", "spread", "kept", "of the roofline", "setting"):
        shown.add_column(column, justify="left" if column in ("name", "unit", "setting") else "right")
    for row in found:
        low, high = row["spread"]
        part = f"{100 * row['part_of_roofline']:.0f} %" if "part_of_roofline" in row else ""
        shown.add_row(row["name"], f"{row['ours']:,.1f}", f"{row['baseline']:,.1f}", row["unit"],
                      f"{row['ratio']:.2f}", f"{low:.2f} to {high:.2f}",
                      f"{row['ratio_kept']:.2f}" if "ratio_kept" in row else "", part, row.get("setting", ""))
    return shown


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="cpu or cuda; the best there is by default")
    parser.add_argument("--out", default="_build/bench.json", type=Path)
    parser.add_argument("--seconds", default=25.0, type=float, help="for each probe of settings not probed before")
    parser.add_argument("--only", default="", help="rows whose number is among these, such as 0,4")
    arguments = parser.parse_args()
    device, found = choose_device(arguments.device), []
    keep_freed_memory()
    wanted = [int(n) for n in arguments.only.split(",") if n]
    for number, row in enumerate(rows(colour_images(10240 if device.type == "cuda" else 1024), device,
                                      arguments.seconds)):
        if wanted and number not in wanted:
            continue
        torch._dynamo.reset()  # the same code is compiled for a few shapes only
        found.append(row())
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found[-1]), flush=True)
    Console(width=max(150, Console().width)).print(table(found, device))


if __name__ == "__main__":
    main()

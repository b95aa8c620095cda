"""How fast we are, and against whom: `make bench`, or python tools/bench.py --out results/units-cpu.json

Everything is run in turn in one process whose freed memory is kept for all, and recorded as images a second in each
round. The opponents of a training step of ConvMixer-256/8 (32 x 32 pixels, patches of 2): the authors' model as it
comes (`plain`); what a skilled user writes in five lines, channels_last, fused AdamW, float32 or autocast's bfloat16
(`five lines`); the same compiled; and timm's model, compiled, in bfloat16. Theirs get their images ready made. Ours are
the trainer's own steps, from bytes to updated weights: as it chooses, without kernels of our own, and in float32. On an idle machine; --only chooses parts, and a file that is there keeps the others:
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models import convmixer
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from convmixer_edu import speed, units
from convmixer_edu.anatomy import count_macs
from convmixer_edu.augment import Augment
from convmixer_edu.checkpoint import write_json
from convmixer_edu.data import load_images
from convmixer_edu.depthwise import choose_method
from convmixer_edu.inference import statistics as image_statistics
from convmixer_edu.machine import (autocast, choose_precision, dtype_name, keep_freed_memory, make_scaler,
                                   who_ran)
from convmixer_edu.model import ConvMixer
from convmixer_edu.recipe import PRESETS, with_settings
from convmixer_edu.train import Run, _choose, build_model, make_facts

ROUNDS, CPU, HALF, FULL = 5, torch.device("cpu"), torch.bfloat16, torch.float32
WORK = {f"k{k} batch {b}": (k, b) for b in (64, 128) for k in (5, 9)}


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
            speeds[name].append(round(amount / (time.perf_counter() - start), 2))
        tell(speeds)
    return speeds


def against(speeds, ours="ours"):
    """{opponent: (median, lowest, highest ratio)}, each of one round."""
    ratios = {name: sorted(a / b for a, b in zip(speeds[ours], them)) for name, them in speeds.items() if name != ours}
    return {name: [round(r, 3) for r in (statistics.median(them), them[0], them[-1])] for name, them in ratios.items()}


def synchronised(function, device):
    """The function, waiting for the device where it works in the background."""
    def run():
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return run


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


def stepper(data, device, c):
    """The trainer's own step, images as bytes to updated weights: a function of (indices, epoch, step)."""
    run = Run(c, data, device, {**make_facts(c, "", data), **_choose(c, data, device)})
    run.ddp_model.train()

    def step(index, epoch=0, number=0):
        given, = run.given(epoch, [(number, index)])
        return run.update(given, 0.4)
    step.setting, step.run = str(run.settings), run
    return step


def users_step(c, device, dtype, last=True, compiled=False, model=None):
    """What somebody without this package writes; a function without arguments."""
    torch.manual_seed(0)
    layout = torch.channels_last if last else torch.contiguous_format
    model = (model or ConvMixer(c.dim, c.depth, c.kernel_size, c.patch_size, 10)).to(device, memory_format=layout)
    if compiled:
        model = torch.compile(model, dynamic=False)
    x = torch.randn(c.batch_size, 3, 32, 32, device=device).contiguous(memory_format=layout)
    y = torch.arange(c.batch_size, device=device) % 10
    optimizer = torch.optim.AdamW(model.parameters(), c.lr, weight_decay=c.weight_decay, fused=last)

    def step():
        with autocast(device, dtype):
            logits = model(x)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits.float(), y).backward()
        optimizer.step()
    return step


def opponents(c, device, rounds=ROUNDS, compiled=True):
    """Ours against what others would do with the same step, in turn."""
    gpu, data, index = device.type == "cuda", colour_images(c.batch_size), torch.arange(c.batch_size)
    half, count = HALF if not gpu else choose_precision(device), 20 if gpu else 1
    ours = stepper(data, device, c)
    ours_step = lambda **how: lambda one=stepper(data, device, replace(c, **how)): one(index)
    steps = {"ours": lambda: ours(index), "five lines, float32": users_step(c, device, FULL),
             f"five lines, {dtype_name(half)}": users_step(c, device, half),
             f"five lines, compiled, {dtype_name(half)}": users_step(c, device, half, compiled=True)}
    if gpu or c.batch_size <= 64:  # the slow ones, once for each kernel
        timm = convmixer.ConvMixer(c.dim, c.depth, c.kernel_size, c.patch_size, num_classes=10)
        steps |= {"plain": users_step(c, device, FULL, last=False),
                  "five lines, compiled, float32": users_step(c, device, FULL, compiled=True),
                  f"timm, compiled, {dtype_name(half)}": users_step(c, device, half, compiled=True, model=timm)}
    if not gpu:
        shape = c.batch_size, c.dim, 32 // c.patch_size, 32 // c.patch_size
        method, _ = choose_method(shape, c.kernel_size, choose_precision(device))
        steps |= {"ours, no kernels": ours_step(depthwise=method), "ours, float32": ours_step(precision="float32")}
    many, steps = {}, {name: step for name, step in steps.items() if compiled or "compiled" not in name}
    for name, step in steps.items():
        began = time.monotonic()
        for _ in range(5 if gpu else 1):  # compiled, recorded, warm
            step()
        print(f"  {name}: first step after {time.monotonic() - began:.1f} s", flush=True)
        many[name] = synchronised(lambda step=step: [step() for _ in range(count)], device)
    speeds = in_turn(many, count * c.batch_size, rounds)
    torch._dynamo.reset()  # the same code is compiled for a few shapes only
    return {"setting": ours.setting, "images_per_second": speeds, "ratio": against(speeds)}


def race(k, batch, rounds):
    """A workload of the book: everybody's speed, and its arithmetic for each image."""
    c = with_settings(PRESETS["light25"], {"kernel_size": k, "batch_size": batch, "randaug_n": 0})
    macs = {"depthwise": c.dim * c.depth * 16**2 * k * k, "all": count_macs(c.dim, c.depth, k, c.patch_size, 10, 3, 32)}
    return {"kernel_size": k, "batch_size": batch, "macs": macs, **opponents(c, CPU, rounds)}


def parts(rounds, rates, batch=64, h=256, side=16):
    """Each kernel on a batch: seconds, and the least by arithmetic and by memory."""
    found, n = {}, batch * side * side
    for k in (5, 9):
        lib, reason = units.kernels(k, HALF, 2)
        if reason:
            sys.exit(reason)
        x, up, g, s, dx = (torch.randn(batch, side, side, h).to(HALF) for _ in range(5))
        rows = x.view(n, h)
        w, (a, p, q) = torch.randn(h // 16, k * k, 16), (torch.randn(h) for _ in range(3))
        dw, db, factor = torch.zeros(32, *w.shape), torch.zeros(64, h), torch.randn(h, h).to(HALF)
        sums, call = torch.zeros(64, h, 2), lambda *what: lambda: units._call(lib, *what)
        todo = {"product": (lambda: rows @ factor, 2, h * h),
                "weights of the product": (lambda: rows.t() @ g.view(n, h), 2, h * h),
                "forward": (call("forward", x, x, w, a, g, s, sums), 3, h * k * k),
                "backward": (call("backward", x, up, g, s, x, a, p, q, w, dx, dw, db), 5, 2 * h * k * k),
                "activate": (call("activate", rows, dx, a, s, sums), 3, 0),
                "deactivate": (call("deactivate", rows, up, g, s, a, p, q, dx, db), 4, 0),
                "products": (call("products", rows, up, g, sums), 2, 0),
                "scale": (call("scale", rows, g, x, a, p, dx), 3, 0)}
        for name, (run, visits, macs) in todo.items():
            key = f"{name}, k{k}" if name in ("forward", "backward") else name
            times = [1 / speed for speed in in_turn({"": lambda: [run() for _ in range(3)]}, 3, rounds)[""]]
            found[key] = {"seconds": statistics.median(times),
                          "arithmetic": 2 * macs * n / rates["bfloat16" if "product" in name else "float32"],
                          "memory": visits * x.nbytes / rates["bytes"]}
    return {"batch_size": batch, "kernels": found}


def inference(rounds, batches=(1, 32, 256)):
    """The forward pass in evaluation mode: the library, compiled and frozen, and with kernels of our own."""
    c, found = PRESETS["light25"], []
    model = build_model(c, colour_images(64), CPU)
    model(torch.randn(16, 3, 32, 32))  # running statistics other than 0 and 1
    for batch, kind in itertools.product(batches, ("float32", "bfloat16")):
        torch._dynamo.reset()
        x = torch.randn(batch, 3, 32, 32)
        ways = {"library": speed.frozen(model, speed.RunSettings(True, dtype=kind)),
                "compiled": speed.frozen(model, speed.RunSettings(True, True, dtype=kind)),
                "units": speed.frozen(units.fast_units(build_model(c, colour_images(64), CPU)),
                                      speed.RunSettings(True, dtype=kind))}
        count = max(1, 128 // batch)
        for way in ways.values():
            way(x)
        speeds = in_turn({n: lambda way=way: [way(x) for _ in range(count)] for n, way in ways.items()}, count * batch,
                         rounds)
        found.append({"batch_size": batch, "precision": kind, "images_per_second": speeds})
    return found


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


def authors_epoch(data, device, c, workers=2):
    """One epoch as the authors' light script does it: Pillow in workers, eager, NCHW, autocast."""
    loader = DataLoader(Pictures(data), c.batch_size, shuffle=True, num_workers=workers, drop_last=True,
                        persistent_workers=True, pin_memory=device.type == "cuda", multiprocessing_context="spawn")
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
    images, settings = len(data) // batch * batch, {}

    def ours(how):
        step = stepper(data, device, replace(c, **how))
        settings[how.get("depthwise", "ours")] = step.setting

        def epoch():
            number = next(numbers)
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(number))
            for i in range(images // batch):
                step(order[i * batch:(i + 1) * batch], number, i)
        return synchronised(epoch, device)

    def row(speeds):
        return {"name": f"whole pipeline, {c.dim}/{c.depth} k{c.kernel_size} p{c.patch_size}, batch {batch}, {images} images an "
                        "epoch", "setting": settings["ours"], "images_per_second": speeds, "ratio": against(speeds)}

    functions = {"ours": ours({})}
    if device.type == "cpu":
        functions["ours, no kernels"] = ours({"depthwise": "groups"})
    for n in workers:
        functions[f"the authors' way, {n} workers"] = authors_epoch(data, device, c, n)
    for name, function in functions.items():
        function()
        print(f"  {time.monotonic() - began:.0f} s: {name} has made its first epoch", flush=True)
    return row(in_turn(functions, images, rounds, end, lambda speeds: tell(row(speeds))))


COMMAND = [sys.executable, "-m", "convmixer_edu", "train"]
SCRIPT = """
import torch
from sklearn.datasets import load_digits
from torch import nn
class Residual(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn
    def forward(self, x):
        return self.fn(x) + x
h = 256
unit = lambda conv: nn.Sequential(conv, nn.GELU(), nn.BatchNorm2d(h))
model = nn.Sequential(unit(nn.Conv2d(1, h, 2, 2)), *[nn.Sequential(
    Residual(unit(nn.Conv2d(h, h, 5, groups=h, padding="same"))), unit(nn.Conv2d(h, h, 1))) for _ in range(8)],
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(h, 10))
digits = load_digits()
x = nn.functional.interpolate(torch.tensor(digits.images[:64, None]).float(), (32, 32))
optimizer = torch.optim.AdamW(model.parameters())
loss = nn.functional.cross_entropy(model(x), torch.tensor(digits.target[:64]))
loss.backward()
optimizer.step()
print(loss.item())
"""
OURS = """
from torch import arange
from convmixer_edu import train as t
from convmixer_edu.data import load_images
from convmixer_edu.recipe import PRESETS, with_settings
c = with_settings(PRESETS["light25"], {"batch_size": 64, "randaug_n": 0})
data, device = load_images("digits", "train", 64, 32), t.choose_device("cpu")
run = t.Run(c, data, device, {**t.make_facts(c, "digits", data), **t._choose(c, data, device)})
given, = run.given(0, [(0, arange(64))])
print(float(run.update(given, 0.4)))
"""


def start_up(rounds):
    """Starts a minute, from an empty process to the first step done: ours, ours on a new machine, a plain script."""
    with tempfile.TemporaryDirectory() as cache:
        def start(code, cache):
            subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL,
                           env={**os.environ, "CONVMIXER_CACHE": str(cache)})
        numbers = itertools.count()
        ways = {"ours": lambda: start(OURS, cache), "plain script": lambda: start(SCRIPT, cache),
                "ours, for the first time": lambda: start(OURS, Path(cache) / str(next(numbers)))}
        ways["ours"]()
        return {"starts_per_minute": in_turn(ways, 60, rounds)}


def quick(rounds):
    """The preset quick by the command, with kernels of our own and without."""
    found = {}
    for way in ("auto", "groups"):
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([*COMMAND, "--preset", "quick", "--set", f"depthwise={way}", "--out", f"{folder}/run"], check=True,
                           stdout=subprocess.DEVNULL)
            record = json.loads(Path(folder, "run", "run.json").read_text())
            found[way] = {name: record[name] for name in ("seconds", "test_accuracy", "images_per_second")}
    return found


def main():
    """The command line."""
    names = [*WORK, "parts", "probe", "pipeline", "start", "inference", "quick"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="parts: " + ", ".join(names))
    parser.add_argument("--out", type=Path, default=Path("_build/bench.json"))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help="renew only these")
    given = parser.parse_args()
    keep_freed_memory()
    record = json.loads(given.out.read_text()) if given.out.exists() else {"work": {}}
    machine = who_ran(CPU, HALF)
    record |= {key: machine[key] for key in ("device", "threads", "torch", "python")}
    told = shutil.which("g++") and subprocess.run(["g++", "--version"], capture_output=True, text=True).stdout
    record |= {"compiler": (told or "none").split("\n")[0],
               "command": "python tools/bench.py --out results/units-cpu.json"}
    data = colour_images(512)
    light = with_settings(PRESETS["light25"], {"batch_size": 64})
    for name in given.only or names[:-1]:
        began = time.monotonic()
        if name in WORK:
            found = record["work"][name] = race(*WORK[name], given.rounds)
        elif name == "parts":
            (full, copied), (half, _) = speed.ceilings(CPU, FULL), speed.ceilings(CPU, HALF)
            record["ceilings"] = {"float32": full, "bfloat16": half, "bytes": copied}
            found = record[name] = parts(3 * given.rounds, record["ceilings"])
        elif name == "probe":  # the small workload of chapter P4
            work = speed.Workload(dim=96, depth=4, patch_size=4, batch_size=64)
            found = record[name] = {"work": asdict(work), "timed": [asdict(c) for c in speed.probe(work, CPU, 120)]}
        elif name == "inference":
            found = record[name] = {"ways": inference(given.rounds)}
        else:
            found = record[name] = {"pipeline": lambda rounds: pipeline(data, CPU, light, rounds=rounds), "start": start_up,
                                    "quick": quick}[name](given.rounds)
        found["commit"] = machine["commit"]
        print(f"{name}, {time.monotonic() - began:.0f} s", flush=True)
        for row in found.get("ways", [found]):
            for way, speeds in row.get("images_per_second", row.get("starts_per_minute", {})).items():
                print(f"  {row.get('batch_size', '')!s:4}{row.get('precision', ''):9}{way:32}{statistics.median(speeds):8.1f} "
                      f"({min(speeds):.1f} to {max(speeds):.1f})", flush=True)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(given.out, record)


if __name__ == "__main__":
    main()

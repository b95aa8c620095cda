"""Train the isotropic relatives side by side: python tools/record_siblings.py --out DIR --budget 1500

About the same number of parameters, the same minute of training, one recipe but for AdamW's eps and the learning rate.
How many steps each arm takes in a minute is measured first, in turn, on a quiet machine; each run is then of so many
steps, whatever else the machine does. Each arm chooses both on held-out images: for each eps it climbs a ladder of rates until the best has a neighbour on either
side. ConvMixer runs without kernels of our own. One JSON file a run; a file that is there is not made again.

--part shuffled trains two arms, by what they chose, in a world in which the patches of every image, for training and for
testing, stand in one other order.
"""

import argparse
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

from convmixer_edu.augment import Augment
from convmixer_edu.checkpoint import write_json
from convmixer_edu.data import load_images, split_holdout
from convmixer_edu.depthwise import choose_method, fast_depthwise
from convmixer_edu.loaders import make_loader
from convmixer_edu.inference import score, statistics
from convmixer_edu.isotropic import MLPMixer, ResMLP, ViT
from convmixer_edu.machine import choose_device, choose_precision, keep_freed_memory, make_scaler, train_step, who_ran
from convmixer_edu.model import ConvMixer
from convmixer_edu.recipe import PRESETS, learning_rate, make_optimizer
from convmixer_edu.train import picks

SCALES = {  # seconds a run, seconds a trial of a rate, and the arms: images of 32 pixels
    "quick": (60.0, 20.0, {
        "ConvMixer": lambda: ConvMixer(128, 4, 5, 4, 10),
        "ViT": lambda: ViT(48, 4, heads=3, ratio=2.4),
        "MLP-Mixer": lambda: MLPMixer(48, 4),
        "ResMLP": lambda: ResMLP(46, 4)}),
    "full": (150.0, 40.0, {
        "ConvMixer": lambda: ConvMixer(256, 8, 5, 2, 10),
        "ViT": lambda: ViT(96, 6, patch_size=2, ratio=3),
        "MLP-Mixer": lambda: MLPMixer(76, 6, patch_size=2),
        "ResMLP": lambda: ResMLP(76, 4, patch_size=2)}),
}
EPS = (1e-3, 1e-8)  # of AdamW: ConvMixer's and the usual one
LADDER = (0.0002, 0.0006, 0.002, 0.006, 0.02, 0.06, 0.2)  # rates, of which three in the middle are tried first
SHUFFLED = ("ConvMixer", "MLP-Mixer")  # the arms of --part shuffled


class Shuffle(nn.Module):
    """Square images with their patches in another order, the same for all."""

    def __init__(self, patch, side):
        super().__init__()
        order = torch.randperm((side // patch) ** 2, generator=torch.Generator().manual_seed(0))
        pixels = torch.arange(float(side * side)).view(1, 1, side, side)
        columns = F.unfold(pixels, patch, stride=patch)[:, :, order]
        self.register_buffer("pixels", F.fold(columns, side, patch, stride=patch).long().flatten())

    def forward(self, x):
        """(B, c, H, W) -> the same shape."""
        return x.flatten(2)[:, :, self.pixels].view(x.shape)


def batches(loader, c, epoch, first):
    """(images, targets) of each step in the rest of an epoch."""
    yield from loader.batches(epoch, picks(len(loader.data), c, epoch, first))


def contestant(build, data, seed, device, shuffle=False, **changes):
    """Return what a run needs: the network, its loader and its recipe."""
    c = replace(PRESETS["quick"], seed=seed, precision="auto", **changes)
    stats, dtype = statistics(data.images), choose_precision(device)
    torch.manual_seed(seed)
    model = build()
    if isinstance(model[0], nn.Conv2d):  # ConvMixer: its layout, and its gradient by the fastest way of the library's
        model = model.to(device, memory_format=torch.channels_last)
        side = data.images.shape[-1] // model[0].kernel_size[0]
        kernel = model[3][0].fn[0].kernel_size[0]
        method, _ = choose_method((c.batch_size, model[0].out_channels, side, side), kernel, dtype, device)
        fast_depthwise(model, method)
    if shuffle:
        patch = next(layer.stride[0] for layer in model.modules() if isinstance(layer, nn.Conv2d))
        model = nn.Sequential(Shuffle(patch, data.images.shape[-1]), model)
    model.to(device)
    loader = make_loader("batched", data, Augment(), stats.mean, stats.std, seed, device)
    return model, loader, c, stats, dtype


def pace(arms, data, device, rounds=7, steps=20):
    """Return the seconds a step of each arm, of rounds in turn, and their medians."""
    runs = {}
    for arm, build in arms.items():
        model, loader, c, _, dtype = contestant(build, data, 0, device)
        runs[arm] = model, make_optimizer(model, c), make_scaler(device, dtype), loader, c, dtype
    times = {arm: [] for arm in arms}
    for _ in range(rounds + 1):  # the first one warms up
        for arm, (model, optimizer, scaler, loader, c, dtype) in runs.items():
            started = time.monotonic()
            for x, y in itertools.islice(batches(loader, c, 0, 0), steps):
                loss = train_step(model, optimizer, scaler, x, y, c.clip, dtype)
            float(loss)
            times[arm].append((time.monotonic() - started) / steps)
    times = {arm: took[1:] for arm, took in times.items()}
    return {"seconds_a_step": {arm: median(took) for arm, took in times.items()}, "rounds": times,
            "steps_a_round": steps, **who_ran(device, dtype)}


def fit(build, data, test, lr, eps, seed, steps, device, shuffle=False):
    """Train for so many steps; return what a record holds of it."""
    model, loader, c, stats, dtype = contestant(build, data, seed, device, shuffle, lr=lr, eps=eps)
    optimizer, scaler = make_optimizer(model, c), make_scaler(device, dtype)
    an_epoch, done, history, sums, started = len(picks(len(data), c, 0)), 0, [], [], time.monotonic()
    while done < steps:
        for x, y in batches(loader, c, done // an_epoch, done % an_epoch):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(done / steps, lr)
            sums.append(train_step(model, optimizer, scaler, x, y, c.clip, dtype))
            done += 1
            if done * 10 >= steps * (len(history) + 1):
                history.append({"steps": done, "loss": float(torch.stack(sums).mean())})
                sums = []
            if done == steps:
                break
    seconds = round(time.monotonic() - started, 2)  # a fact, not a measure: other work may go on beside it
    seen = score(model.eval(), test, stats, dtype=dtype)
    return {"lr": lr, "eps": eps, "shuffled": shuffle, "seed": seed, "seconds": seconds, "steps": done,
            "epochs": round(done / an_epoch, 3),
            "parameters": sum(weight.numel() for weight in model.parameters()), "history": history,
            "accuracy": seen["accuracy"], "loss": seen["loss"], **who_ran(device, dtype)}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", choices=SCALES, default="quick")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=540.0, help="seconds; no run is begun that would not end in it")
    parser.add_argument("--data")
    parser.add_argument("--device")
    parser.add_argument("--limit", type=int, help="only so many training images, for a try")
    parser.add_argument("--seconds", type=float, help="another length of a run, for a try")
    parser.add_argument("--part", choices=("race", "shuffled"), default="race")
    options = parser.parse_args(arguments)
    started, device = time.monotonic(), choose_device(options.device)
    seconds, trial, arms = SCALES[options.scale]
    if options.seconds:
        seconds = trial = options.seconds
    keep_freed_memory()
    whole = load_images(options.data, "train", limit=options.limit)
    test = load_images(options.data, "test", limit=options.limit)
    rest, held = split_holdout(whole, len(whole) // 10, 0)
    def left(name, seconds):
        """Whether there is time for one more run."""
        enough = time.monotonic() - started + 1.3 * seconds <= options.budget
        if not enough:
            print(f"stopped before {name}: call again to go on")
        return enough

    def keep(file, arm, record):
        record.update(arm=arm, scale=options.scale, train_fingerprint=whole.fingerprint,
                      command=f"python tools/record_siblings.py --out DIR --part {options.part} --scale {options.scale}")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, record)
        told = {key: record.get(key) for key in ("arm", "eps", "lr", "seed", "epochs", "accuracy", "test_accuracy")}
        print(json.dumps(told), flush=True)

    file = options.out / "pace.json"
    if not file.exists():
        keep(file, None, pace(arms, whole, device))
    took = json.loads(file.read_text())["seconds_a_step"]
    for arm, build in arms.items() if options.part == "race" else ():
        while following := next_trial(trials(options.out, arm)):
            eps, lr = following
            if not left(f"{arm}-{eps:g}-{lr:g}", trial):
                return
            keep(options.out / "rates" / f"{arm}-{eps:g}-{lr:g}.json", arm,
                 fit(build, rest, held, lr, eps, 0, round(trial / took[arm]), device) | {"train_images": len(rest)})
    shuffle = options.part == "shuffled"
    for seed, arm in itertools.product(range(options.seeds), SHUFFLED if shuffle else arms):
        file = options.out / ("shuffled" if shuffle else "") / f"{arm}-seed{seed}.json"
        if file.exists():
            continue
        tried = trials(options.out, arm)
        if next_trial(tried):
            raise SystemExit(f"{options.out}/rates does not hold all trials of {arm}: make --part race first")
        if not left(f"{arm}-seed{seed}", seconds):
            return
        eps, lr = max(tried, key=tried.get)
        record = fit(arms[arm], whole, test, lr, eps, seed, round(seconds / took[arm]), device, shuffle)
        record.update(test_accuracy=record.pop("accuracy"), test_loss=record.pop("loss"), train_images=len(whole),
                      tried=[{"eps": eps, "lr": lr, "accuracy": a} for (eps, lr), a in sorted(tried.items())])
        keep(file, arm, record)


def trials(folder, arm):
    """Return the held-out accuracy of each (eps, rate) that an arm has tried."""
    found = (json.loads(file.read_text()) for file in (folder / "rates").glob(f"{arm}-*.json"))
    return {(record["eps"], record["lr"]): record["accuracy"] for record in found}


def next_trial(tried):
    """Return the (eps, rate) to try next, or None where the best rate of each eps has its neighbours."""
    middle = len(LADDER) // 2
    for eps in EPS:
        found = {LADDER.index(lr): accuracy for (e, lr), accuracy in tried.items() if e == eps}
        best = max(found, key=found.get) if found else middle
        for step in (middle, middle - 1, middle + 1, best - 1, best + 1):
            if step not in found and 0 <= step < len(LADDER):
                return eps, LADDER[step]


if __name__ == "__main__":
    main()

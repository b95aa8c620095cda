"""Record how fast a CPU trains with kernels of our own: python tools/record_units.py --out results/units-cpu.json

Ways to train ConvMixer-256/8 on 32 x 32 pixels, patches of 2, run in turn in one process whose freed memory is kept for
all of them: as a tutorial would (`plain`), with channels_last, a fused AdamW and float32 or autocast's bfloat16 (`five
lines`), the same compiled, our own path without kernels (`library`), and with them (`units`). The record also holds the
machine's ceilings, each kernel's time beside the least it could take, and the trainer's own steps. The first and the
compiled way run at the smaller batch only, to save time. On an idle machine; a workload takes a minute.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from bench import colour_images, stepper

from convmixer_edu import units
from convmixer_edu.anatomy import count_macs
from convmixer_edu.checkpoint import write_atomically
from convmixer_edu.depthwise import choose_method, fast_depthwise
from convmixer_edu.machine import autocast, choose_precision, keep_freed_memory, who_ran
from convmixer_edu.model import ConvMixer
from convmixer_edu.recipe import PRESETS, with_settings
from convmixer_edu.speed import ceilings

DIM, DEPTH, PATCH, SIDE = 256, 8, 2, 16
CPU, HALF, FULL = torch.device("cpu"), torch.bfloat16, torch.float32
WORK = {f"k{k} batch {b}": (k, b) for b in (64, 128) for k in (5, 9)}


def step(k, batch, dtype, last=True, compiled=False, prepare=lambda model: model):
    """One training step, ready to be called."""
    torch.manual_seed(0)
    model = prepare(ConvMixer(DIM, DEPTH, k, PATCH, 10))
    layout = torch.channels_last if last else torch.contiguous_format
    model = model.to(memory_format=layout)
    run = torch.compile(model, dynamic=False) if compiled else model
    x = torch.randn(batch, 3, PATCH * SIDE, PATCH * SIDE).to(memory_format=layout)
    y = torch.arange(batch) % 10
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=last)

    def one():
        with autocast(CPU, dtype):
            logits = run(x)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits.float(), y).backward()
        optimizer.step()
    return one


def contenders(k, batch):
    """{name: step}, and the weight gradient that the library's path has chosen."""
    dtype = choose_precision(CPU)
    method, _ = choose_method((batch, DIM, SIDE, SIDE), k, dtype)
    own = lambda kind: step(k, batch, kind, prepare=lambda m: units.fast_units(m, kind, sys.exit))
    slow = {} if batch > 64 else {"plain": step(k, batch, FULL, last=False),
                                  "compiled, float32": step(k, batch, FULL, compiled=True),
                                  "compiled, bfloat16": step(k, batch, HALF, compiled=True)}
    return {**slow, "five lines, float32": step(k, batch, FULL), "five lines, bfloat16": step(k, batch, HALF),
            "library": step(k, batch, dtype, prepare=lambda m: fast_depthwise(m, method)),
            "units, float32": own(FULL), "units, bfloat16": own(HALF)}, method


def race(k, batch, rounds):
    """Images a second of each contender, in each round."""
    steps, method = contenders(k, batch)
    for one in steps.values():
        one()
    speeds = {name: [] for name in steps}
    for _ in range(rounds):
        for name, one in steps.items():
            start = time.perf_counter()
            one()
            speeds[name].append(round(batch / (time.perf_counter() - start), 2))
    every = count_macs(DIM, DEPTH, k, PATCH, 10, 3, PATCH * SIDE)
    return {"kernel_size": k, "batch_size": batch, "images_per_second": speeds, "weight_gradient": method,
            "macs": {"depthwise": DIM * DEPTH * SIDE**2 * k * k, "all": every}}


def parts(batch, rates, rounds):
    """Each kernel on a batch: seconds, and the least by arithmetic and by memory."""
    found, n = {}, batch * SIDE * SIDE
    for k in (5, 9):
        lib, reason = units.kernels(k, HALF, 2)
        if reason:
            sys.exit(reason)
        x, up, g, s, dx = (torch.randn(batch, SIDE, SIDE, DIM).to(HALF) for _ in range(5))
        rows = x.view(n, DIM)
        w, (a, p, q) = torch.randn(DIM // 16, k * k, 16), (torch.randn(DIM) for _ in range(3))
        dw, db = torch.zeros(32, *w.shape), torch.zeros(64, DIM)
        factor, sums = torch.randn(DIM, DIM).to(HALF), torch.zeros(64, DIM, 2)
        todo = {"product": (lambda: rows @ factor, 2, DIM * DIM),
                "weights of the product": (lambda: rows.t() @ g.view(n, DIM), 2, DIM * DIM),
                "forward": (lambda: units._call(lib.forward, x, x, w, a, g, s, sums), 3, DIM * k * k),
                "backward": (lambda: units._call(lib.backward, x, up, g, s, x, a, p, q, w, dx, dw, db), 5,
                             2 * DIM * k * k),
                "activate": (lambda: units._call(lib.activate, rows, dx, a, s, sums), 3, 0),
                "deactivate": (lambda: units._call(lib.deactivate, rows, up, g, s, a, p, q, dx, db), 4, 0),
                "products": (lambda: units._call(lib.products, rows, up, g, sums), 2, 0),
                "scale": (lambda: units._call(lib.scale, rows, g, x, a, p, dx), 3, 0)}
        for name, (call, visits, macs) in todo.items():
            key, times = f"{name}, k{k}" if name in ("forward", "backward") else name, []
            for _ in range(rounds):
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            rate = rates["bfloat16" if "product" in name else "float32"]
            found[key] = {"seconds": statistics.median(times), "arithmetic": 2 * macs * n / rate,
                          "memory": visits * x.nbytes / rates["bytes"]}
    return {"batch_size": batch, "kernels": found}


def pipeline(rounds, images=512):
    """The trainer's own steps by the recipe light25, images as bytes to updated weights: without kernels, and with them."""
    c, data = with_settings(PRESETS["light25"], {"batch_size": 64}), colour_images(images)
    method, _ = choose_method((64, DIM, SIDE, SIDE), c.kernel_size, choose_precision(CPU))
    steps = {way: stepper(data, CPU, replace(c, depthwise=way)) for way in (method, "units")}
    speeds = {way: [] for way in steps}
    for number in range(-1, rounds):
        for way, one in steps.items():
            start = time.perf_counter()
            for at in range(0, images, 64):
                one(torch.arange(at, at + 64), number + 1, at // 64)
            if number >= 0:
                speeds[way].append(round(images / (time.perf_counter() - start), 2))
    return {"recipe": "light25", "batch_size": 64, "images_per_second": speeds}


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("units.json"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=[*WORK, "parts", "pipeline"],
                        default=[*WORK, "parts", "pipeline"], help="renew only these")
    given = parser.parse_args()
    keep_freed_memory()
    record = json.loads(given.out.read_text()) if given.out.exists() else {"work": {}}
    machine = who_ran(CPU, HALF)
    record |= {key: machine[key] for key in ("device", "threads", "torch", "python")}
    record["compiler"] = subprocess.run(["g++", "--version"], capture_output=True, text=True).stdout.split("\n")[0]
    record["command"] = "python tools/record_units.py --out results/units-cpu.json"
    for name in given.only:
        if name == "parts":
            (full, copied), (half, _) = ceilings(CPU, FULL), ceilings(CPU, HALF)
            record["ceilings"] = {"float32": full, "bfloat16": half, "bytes": copied}
            record["parts"] = {"commit": machine["commit"], **parts(64, record["ceilings"], 3 * given.rounds)}
        elif name == "pipeline":
            record["pipeline"] = {"commit": machine["commit"], **pipeline(given.rounds)}
        else:
            record["work"][name] = {"commit": machine["commit"], **race(*WORK[name], given.rounds)}
            torch._dynamo.reset()
            for way, speeds in record["work"][name]["images_per_second"].items():
                print(f"{name:14} {way:22} {statistics.median(speeds):7.1f} images/s "
                      f"({min(speeds):.1f} to {max(speeds):.1f})", flush=True)
        write_atomically(given.out, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()

"""The book's evidence on a GPU, in the time there is: make gpu MINUTES=12

The most telling parts come first. Each has its own process and its own limit, leaves JSON or sealed records in
OUT/<part>/ and an archive OUT/<part>.tar.gz, and is left out where OUT or the book's results/ have it already; so the
same command, given again, goes on. `--try` runs the same lines on a CPU, at sizes that take a minute or two.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path

START = 90  # seconds that a machine takes to start, of the minutes given
PARTS = {  # name: (seconds, what it settles)
    "kernels": (70, "our kernels against float64 on this device"),
    "settings": (110, "ceilings; layout, compiler and depthwise method for light25 and paper200"),
    "light25": (120, "three seeds of light25: the accuracy at the authors' own scale, and weights"),
    "profile": (30, "host against device time, the names of the kernels"),
    "authors": (150, "ours against the authors' way, 2 workers and 12, in turn"),
    "step": (60, "light25's step against what a user writes in five lines, eager and compiled"),
    "arms": (None, "the largest arms of Table 3 at the scale light25, one seed of all, then the next"),
}
ARMS = ("no-scale", "no-randaug", "no-residual", "second-residual", "layernorm", "no-mix", "layernorm-place", "relu",
        "no-erase", "no-clip")
SEEDS = 3


def write(file, record):
    """JSON that is whole or not there."""
    from convmixer_edu.checkpoint import write_json
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, record)


def here(device):
    """On what something was measured."""
    import torch

    from convmixer_edu.machine import commit, device_name
    return {"device": device_name(device), "torch": torch.__version__, "commit": commit(), "cores": os.cpu_count()}


def light25(options):
    """The recipe, or a tiny one for a try."""
    from convmixer_edu.recipe import PRESETS, with_settings
    small = dict(dim=16, depth=2, epochs=2, batch_size=64, limit=320, checkpoint_seconds=0)
    return with_settings(PRESETS["light25"], small if options.small else {})


def workloads(options):
    """What the presets ask of the device; the same as the trainer asks for."""
    from convmixer_edu.recipe import PRESETS
    from convmixer_edu.speed import Workload
    for name, c in {"light25": light25(options), "paper200": PRESETS["paper200"]}.items():
        if options.small and name == "paper200":
            c = replace(c, dim=8, depth=1, batch_size=16)
        yield name, Workload(c.dim, c.depth, c.kernel_size, c.patch_size, c.batch_size, 32, depthwise="auto")


# The parts


PRODUCTS = ("output", "input gradient", "weight gradient", "bias gradient")


def kernel_errors(k, shape, dtype, layout, device):
    """How far our kernels are from the library in float64: the norm of the difference, as a share."""
    import torch
    import torch.nn.functional as F

    from convmixer_edu.depthwise import depthwise_conv

    def products(convolve, tensors):
        x, w, b, up = (t.detach().requires_grad_(i < 3) for i, t in enumerate(tensors))
        y = convolve(x, w, b)
        return y.detach(), *torch.autograd.grad(y, (x, w, b), up)

    g = torch.Generator().manual_seed(k)
    h, layout = shape[1], getattr(torch, layout)
    given = [torch.randn(s, generator=g).to(device, getattr(torch, dtype)) for s in (shape, (h, 1, k, k), (h,), shape)]
    given = [t.contiguous(memory_format=layout) if t.shape == shape else t for t in given]
    exact = products(lambda *t: F.conv2d(*t, padding="same", groups=h), [t.double() for t in given])
    ours = products(lambda *t: depthwise_conv(*t, "triton"), given)
    return {name: float((mine.double() - e).norm() / e.norm()) for name, mine, e in zip(PRODUCTS, ours, exact)}


def kernels(options, device, out):
    """Our kernels on this device, each case in a process of its own, since it is the compiler that takes the time."""
    limits = {"float32": 1e-5, "bfloat16": 1e-2}
    odd, last, half = (8, 40, 13, 17), "channels_last", "bfloat16"
    cases = [(9, (128, 256, 32, 32), half, last), (5, (512, 256, 16, 16), half, last),
             *[(k, odd, half, last) for k in (15, 9, 8, 7, 5, 3)], *[(k, odd, "float32", last) for k in (5, 8)],
             (5, odd, half, "contiguous_format"), (9, (512, 256, 16, 16), half, last)]
    if options.small:
        cases = [(k, (2, 8, 5, 6), "float32", layout) for k in (3, 8) for layout in (last, "contiguous_format")]
    found, jobs = [], 1 if options.small else max(1, (os.cpu_count() or 1) // 2)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(kernel_errors, *case, str(device)): case for case in cases}
        for done in as_completed(waiting):
            k, shape, dtype, layout = waiting[done]
            error = done.result()
            right = max(error.values()) < limits[dtype]
            found.append({"k": k, "shape": shape, "dtype": dtype, "layout": layout, "relative_error": error,
                          "right": right})
            write(out / "kernels.json", {**here(device), "limits": limits, "right": all(c["right"] for c in found),
                                         "of": len(cases), "found": found})
            print(f"  k = {k:2d}, {shape}, {dtype}, {layout}: {max(error.values()):.1e}" + ("" if right else ", WRONG"),
                  flush=True)
    return True


def measure(work, device, seconds, report=None):
    """A record of a workload: probe, ceilings, roofline, a profile of the best."""
    import torch

    from convmixer_edu import speed
    from convmixer_edu.machine import device_name
    deadline = time.monotonic() + seconds
    timed = speed.probe(work, device, 0.7 * seconds, report)
    best = speed.fastest(timed, device)
    dtype, names = getattr(torch, best.dtype), []
    rates = speed.ceilings(device, dtype)
    limit = speed.roofline(work, rates, dtype)
    if time.monotonic() < deadline:
        torch._dynamo.reset()
        names = speed.profile_step(speed.make_step(work, best, device), device)
    return {"device": device_name(device), "torch": torch.__version__, "threads": torch.get_num_threads(), "work": asdict(work),
            "probe": [asdict(c) for c in timed], "best": asdict(best), "ceilings": {"flops": rates[0], "bytes": rates[1]},
            "roofline": limit, "part_of_roofline": max(limit.values()) * best.images_per_second / work.batch_size, "profile": names}


def settings(options, device, out):
    """The fastest setting for each preset, kept for the trainer too."""
    from convmixer_edu import speed
    from convmixer_edu.machine import choice_key, read_answers
    if device.type == "cpu":
        quick = [c for c in speed.choices(device) if not c.compile][:2]
        speed.choices = lambda device: [replace(c, depthwise="library") for c in quick]
    else:
        file, every = out.parent / "kernels" / "kernels.json", speed.choices(device)
        right = file.exists() and json.loads(file.read_text())["right"]
        if not (right or in_the_book("kernels", device)):  # wrong ones may be fast
            speed.choices = lambda device: [c for c in every if c.depthwise != "triton"]
    for (name, work), share in zip(workloads(options), (0.55, 1)):
        if (file := out / f"{name}.json").exists() or choice_key(asdict(work), device) in read_answers():
            continue
        seconds = share * (options.end - time.monotonic())
        record = measure(work, device, seconds, lambda c: print(
            f"  {name}: {c!s:45s} {c.images_per_second:9,.0f} images/s {c.reason}", flush=True))
        write(file, {**record, **here(device)})
        print(f"  {100 * record['part_of_roofline']:.0f} % of the roofline; ceilings {record['ceilings']['flops'] / 1e12:.1f} "
              f"TFLOP/s, {record['ceilings']['bytes'] / 1e12:.2f} TB/s", flush=True)
    return True


def remember(out, options, device):
    """Let the trainer find what the part settings measured: in the book's records, or in another call."""
    from convmixer_edu import machine
    from convmixer_edu.ledger import results_folder
    if (file := results_folder() / "gpu" / "choices.json").exists():
        machine.remember(machine.read_answers(file))
    for name, work in workloads(options):
        file = out.parent / "settings" / f"{name}.json"
        if file.exists():
            best = json.loads(file.read_text())["best"]
            machine.remember({machine.choice_key(asdict(work), device): best})


def in_the_book(part, device):
    """Whether the book's records have this part already, from the same device and library."""
    import torch

    from convmixer_edu.ledger import results_folder
    from convmixer_edu.machine import device_name
    file = results_folder() / "gpu" / f"{part}.json"
    old = json.loads(file.read_text()) if file.exists() else {}
    return (old.get("device"), old.get("torch")) == (device_name(device), torch.__version__)


def step(options, device, out):
    """Images a second of the trainer's own step, and of what a skilled user writes."""
    import bench
    c = light25(options)
    c = replace(c, randaug_n=0)  # flips alone: the opponents get their images ready made
    gpu = device.type == "cuda"
    found = bench.opponents(c, device, rounds=5 if gpu else 1, compiled=gpu)
    write(out / "step.json", {**here(device), "batch": c.batch_size, **found})
    for name, row in found["images_per_second"].items():
        print(f"  {name:34s} {sorted(row)[len(row) // 2]:9,.0f} images/s", flush=True)
    return True


def train_seeds(options, device, out):
    """Three seeds, sealed, with their weights."""
    import record_runs

    from convmixer_edu.ledger import archive, results_folder
    for seed in range(SEEDS if not options.small else 2):
        name = f"light25-seed{seed}"
        if (out / name).exists() or not options.small and (results_folder() / name).exists():
            continue
        run, c = out / "work" / name, replace(light25(options), seed=seed)
        if (record := record_runs.run(c, options.data, run, str(device), options.end)) is None:
            return False
        archive(run, name, f"make gpu: train --preset light25 --set seed={seed}", weights=True, into=out)
        print(f"  {name}: {record['test_accuracy']:.2f} % in {record['seconds']:.1f} s", flush=True)
    return True


def authors(options, device, out):
    """A whole epoch, from pictures to updated weights."""
    import bench

    def tell(row):
        write(out / "authors.json", {**here(device), **row})
        for name, speeds in row["images_per_second"].items():
            print(f"  {name:34s} {speeds[-1]:9,.0f} images/s", flush=True)

    gpu = device.type == "cuda"
    bench.pipeline(bench.colour_images(10240 if gpu else 128), device, light25(options),
                   (2, 12) if gpu else (1,), 5 if gpu else 1, options.end - 15, tell)
    return True


def profile(options, device, out):
    """Ten steps of light25 with its augmentation: who waits for whom, and what runs."""
    import bench
    import torch

    from convmixer_edu import speed
    c = light25(options)
    data = bench.colour_images(c.batch_size)
    index, count = torch.arange(c.batch_size), iter(range(10**9))
    run = bench.stepper(data, device, c)
    for _ in range(5):
        run(index, 0, next(count))
    getattr(torch, device.type).synchronize()
    started = time.perf_counter()
    for _ in range(10):
        run(index, 0, next(count))
    issued = (time.perf_counter() - started) / 10
    getattr(torch, device.type).synchronize()
    done = (time.perf_counter() - started) / 10
    names = speed.profile_step(lambda: run(index, 0, next(count)), device, calls=10, top=40)
    recorded = bool(getattr(run.run.step, "graph", None))
    write(out / "profile.json", {**here(device), "batch": c.batch_size, "cuda_graph": recorded, "setting": run.setting,
                                 "host_ms": 1000 * issued,
                                 "whole_ms": 1000 * done, "kernels": names})
    print(f"  host {1000 * issued:.2f} ms of {1000 * done:.2f} ms a step, one CUDA graph: {recorded}; {run.setting}")
    for name, share in names[:12]:
        print(f"  {100 * share:5.1f} %  {name[:90]}", flush=True)
    return True


def arms(options, device, out):
    """Runs of Table 3 as `convmixer ablate` makes them."""
    import torch

    from convmixer_edu.ledger import results_folder
    from convmixer_edu.sweep import plan, work
    scale = "try" if options.small else "light25"
    tasks = plan(3, scale, 1 if options.small else SEEDS, list(ARMS[:2] if options.small else ARMS[:5]))
    if not options.small:
        tasks += [t for t in plan(3, scale, SEEDS, list(ARMS)) if t not in tasks]
    tasks = [t for t in tasks if not (results_folder() / "ablations" / scale / t.name).exists()]

    def tell(run):
        torch._dynamo.reset()  # it compiles one piece of code a few times only
        print(f"  {run['name']}: {run.get('test_accuracy', 'failed')} in {run.get('seconds', 0):.1f} s", flush=True)

    return work(tasks, out, options.data, str(device), max(1.0, options.end - time.monotonic()), tell)


RUN = {"kernels": kernels, "settings": settings, "step": step, "light25": train_seeds, "authors": authors,
       "profile": profile, "arms": arms}


def one_part(options):
    """What the process of a part does."""
    options.end = time.monotonic() + options.seconds
    if options.small and options.part == "kernels":
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    import torch

    from convmixer_edu.machine import choose_device, keep_freed_memory
    device, out = choose_device("cpu" if options.small else options.device), options.out / options.part
    out.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    remember(out, options, device)
    if in_the_book(options.part, device):
        print("  recorded in the book, on the same device")
        return 0
    torch.manual_seed(0)
    return 0 if RUN[options.part](options, device, out) else 3  # 3: there is more to do


def archive(folder):
    """A part's records in one file; what is half done stays behind."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and "work" not in f.relative_to(folder).parts]
    with tarfile.open(folder.with_suffix(".tar.gz"), "w:gz") as tar:
        for file in files:
            tar.add(file, file.relative_to(folder.parent))


def queue(options):
    """Part after part, each in a process of its own, until the time is over."""
    end = time.monotonic() + 60 * options.minutes - (0 if options.small else START)
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"{options.minutes:g} minutes; a machine's start {START} s")
    for name in options.only:
        seconds = PARTS[name][0]
        print(f"  {name:9s} {f'{seconds} s' if seconds else 'the rest':>8s}  {PARTS[name][1]}")
    checkout = str(Path(__file__).resolve().parent.parent)  # need not be installed
    env, left = {**os.environ, "PYTHONPATH": os.pathsep.join([checkout, os.environ.get("PYTHONPATH", "")])}, []
    env.setdefault("CONVMIXER_CACHE", str(options.out / "cache"))
    for name in options.only:
        done, seconds = options.out / name / ".done", (PARTS[name][0] or 1e9) * (10 if options.small else 1)
        if done.exists():
            print(f"{name}: done before")
            continue
        seconds = min(seconds, end - time.monotonic())
        if seconds < 5:
            left.append(name)
            continue
        words = [sys.executable, __file__, "--part", name, "--out", options.out, "--seconds", f"{seconds:.1f}",
                 *(["--try"] if options.small else []), *(["--data", options.data] if options.data else []),
                 *(["--device", options.device] if options.device else [])]
        print(f"{name}: at most {seconds:.0f} s", flush=True)
        started = time.monotonic()
        try:
            code = subprocess.run([str(w) for w in words], env=env, timeout=1.3 * seconds + 30).returncode
        except subprocess.TimeoutExpired:
            code = "too late"
        print(f"{name}: {time.monotonic() - started:.0f} s" + (f", ended with {code}" if code not in (0, 3) else ""),
              flush=True)
        if code == 0:
            done.touch()
        else:
            left.append(name)
        if (options.out / name).exists():
            archive(options.out / name)
    print("left:", ", ".join(left) or "nothing", flush=True)
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--try", dest="small", action="store_true", help="the same on a CPU, in a minute or two")
    parser.add_argument("--data", help="as in convmixer train")
    parser.add_argument("--device")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.small and options.data is None:
        options.data = "digits"
    sys.exit(one_part(options) if options.part else queue(options))


if __name__ == "__main__":
    main()

"""Images a second of a training step, alone and beside four busy processes, for two ways of waiting.

    python tools/busy.py --out results/busy-cpu.json

The preset digits, two threads, each way in turn and several times; in the record stand the load before each and what
the machine is. On a machine that does other work besides, `alone` is not alone: its load says so.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

WAYS = {"spinning": None, "giving way": "10000"}  # GOMP_SPINCOUNT; None: libgomp's own


def images_per_second(seconds):
    """Train for a while in this process; return the speed between the first and the last step."""
    import torch

    from convmixer_edu.recipe import PRESETS
    from convmixer_edu.train import Stopped, train

    torch.set_num_threads(2)
    seen = []

    def watch(event):
        if event["event"] == "step":
            seen.append((time.monotonic(), event["step"]))
        return seen[-1][0] - seen[0][0] > seconds

    config = replace(PRESETS["digits"], epochs=100_000, checkpoint_seconds=1e9)
    with tempfile.TemporaryDirectory() as out:
        try:
            train(config, "digits", Path(out) / "run", device="cpu", report=watch)
        except Stopped:
            pass
    (began, first), (ended, last) = seen[0], seen[-1]
    return (last - first) * config.batch_size / (ended - began)


def measure(way, seconds):
    """Return the speed in a process of its own, to which the package says nothing about waiting."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    environment.pop("GOMP_SPINCOUNT", None)
    if WAYS[way]:
        environment["GOMP_SPINCOUNT"] = WAYS[way]
    words = [sys.executable, "-W", "ignore", __file__, "--one", str(seconds)]
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout)


def main():
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("busy-cpu.json"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--one", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        import torch  # before the package, which then leaves GOMP_SPINCOUNT as it is  # noqa: F401

        print(images_per_second(args.one))
        return
    runs = []
    for _ in range(args.rounds):
        for others in (0, 4):
            busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
            try:
                for way in WAYS:
                    load = os.getloadavg()[0]
                    speed = measure(way, args.seconds)
                    runs.append({"others": others, "way": way, "images_per_second": round(speed, 1), "load": load})
                    print(runs[-1], flush=True)
            finally:
                for process in busy:
                    process.kill()
                    process.wait()
    medians = [{"others": others, "way": way, "images_per_second": statistics.median(
        run["images_per_second"] for run in runs if (run["others"], run["way"]) == (others, way))}
        for others in (0, 4) for way in WAYS]
    record = {"preset": "digits", "threads": 2, "cores": os.cpu_count(), "seconds": args.seconds,
              "machine": platform.machine(), "command": " ".join(["python", *sys.argv]), "medians": medians, "runs": runs}
    from convmixer_edu.checkpoint import write_json

    write_json(args.out, record)


if __name__ == "__main__":
    main()

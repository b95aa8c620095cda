"""Measure what each chapter costs, for the line at its top: python tools/costs.py [CHAPTER...], into results/chapters.json."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from convmixer_edu.checkpoint import write_json
from convmixer_edu.machine import who_ran

ROOT = Path(__file__).resolve().parent.parent
RUN = "import sys; from execnb.shell import CaptureShell; CaptureShell().execute(sys.argv[1], exc_stop=True)"


def measure(notebook):
    """Run one chapter in a process of its own: (seconds, peak memory in MiB)."""
    before = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", RUN, str(notebook)], cwd=notebook.parent)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{notebook.name} failed with status {status}: run it with nbdev_test and mend it")
    return time.monotonic() - before, usage.ru_maxrss / 2**10


def main():
    machine, file = who_ran(torch.device("cpu")), ROOT / "results" / "chapters.json"
    costs = json.loads(file.read_text()) if sys.argv[1:] else {}
    for notebook in sorted((ROOT / "nbs").glob("*.ipynb")):
        if sys.argv[1:] and notebook.stem not in sys.argv[1:]:
            continue
        seconds, peak = measure(notebook)
        costs[notebook.stem] = {"seconds": round(seconds, 1), "peak_memory_mb": round(peak),
                                **{key: machine[key] for key in ("device", "threads", "torch")}}
        print(f"{notebook.stem:20s} {seconds:6.1f} s {peak:7.0f} MiB", flush=True)
        write_json(file, dict(sorted(costs.items())))


if __name__ == "__main__":
    main()

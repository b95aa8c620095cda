"""Time the three layers of chapter 01 on this machine: python tools/record_attention.py --out results/attention-cpu.json

The layers are those of the page: its cells are run. One thread, and the processor's time instead of the clock's, so
that other work on the machine is not counted.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from convmixer_edu.checkpoint import write_json
from convmixer_edu.machine import keep_freed_memory, who_ran

PAGE = Path(__file__).resolve().parent.parent / "nbs" / "01_question.ipynb"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("attention-cpu.json"))
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # or the matrix is sometimes new to the process, and sometimes not
    page = {"torch": torch, "F": F, "time": time, "h": 64, "k": 9}
    for cell in json.loads(PAGE.read_text("utf8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and ("def attention(" in source or "layers = {" in source):
            exec(source, page)
    positions = [side * side for side in (8, 16, 24, 32, 48, 64)]
    ms = {name: [] for name in page["layers"]}
    with torch.no_grad():
        for n in positions:
            x = torch.randn(n, page["h"])
            for name, layer in page["layers"].items():
                ms[name].append(round(page["least_ms"](lambda: layer(x), args.rounds), 4))
    write_json(args.out, {**who_ran(torch.device("cpu")), "rounds": args.rounds, "channels": page["h"],
                          "kernel_size": page["k"], "positions": positions, "ms": ms,
                          "command": "python tools/record_attention.py --out results/attention-cpu.json"})


if __name__ == "__main__":
    main()

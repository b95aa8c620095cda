"""Measure how many processes together train fastest: python tools/record_pace.py --scale tiny --out results/ablations/pace-cpu.json

One, two and four processes share the cores and train the baseline of a scale, in turn, each time for some seconds.
"""

import argparse
import json
import os
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from convmixer_edu.ablate import SCALES, baseline
from convmixer_edu.checkpoint import write_json
from convmixer_edu.data import resolve_source
from convmixer_edu.machine import choose_device, device_name
from convmixer_edu.sweep import _in_turn
from convmixer_edu.train import Stopped, train


def images_per_second(_, scale, source, device, seconds):
    """Train for a while in this process; return the speed between the first step and the last."""
    seen, config = [], replace(baseline(scale), epochs=10_000, checkpoint_seconds=1e9)

    def watch(event):
        if event["event"] == "step":
            seen.append((time.monotonic(), event["step"]))
        return seen and seen[-1][0] - seen[0][0] > seconds

    with tempfile.TemporaryDirectory() as out, suppress(Stopped):
        train(config, source, Path(out) / "run", device=device, report=watch)
    (began, first), (ended, last) = seen[0], seen[-1]
    return (last - first) * config.batch_size / (ended - began)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", default="tiny", choices=SCALES)
    parser.add_argument("--data", help="as in convmixer train")
    parser.add_argument("--device")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    options = parser.parse_args(arguments)
    speeds = {count: [] for count in (1, 2, 4)}
    one = partial(images_per_second, scale=options.scale, source=resolve_source(options.data), device=options.device,
                  seconds=options.seconds)
    for _ in range(3):
        for count, seen in speeds.items():
            seen.append(sum(_in_turn(count, one, range(count))))
    told = {"scale": options.scale, "device": device_name(choose_device(options.device)), "cores": os.cpu_count(),
            "images_per_second": speeds}
    write_json(options.out, told)
    print(json.dumps(told))


if __name__ == "__main__":
    main()

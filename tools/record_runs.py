"""Make runs for the ledger within a time budget: python tools/record_runs.py --out DIR --seconds 540 light25:0 light25:1

Each word is a preset and a seed. A run that the budget cuts off goes on at the next call; one that is finished is left
alone. The results, without checkpoints, lie in DIR, ready for `convmixer_edu.ledger.archive`.
"""

import argparse
import json
import time
from pathlib import Path

from convmixer_edu.recipe import PRESETS, with_settings
from convmixer_edu.train import Stopped, train


def run(config, source, out, device, end):
    """Train, or go on, until an end by the monotonic clock; return what run.json holds, or None where it was stopped."""
    try:
        return train(config, source, out, (out / "config.json").exists(), device, lambda event: time.monotonic() > end)
    except Stopped as error:
        print(json.dumps({"run": out.name, "stopped": str(error)}), flush=True)
        return None


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="PRESET:SEED")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=540.0, help="no step is begun after that")
    parser.add_argument("--data", help="as in convmixer train")
    parser.add_argument("--device")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.seconds
    settings = dict(pair.split("=", 1) for pair in options.set)

    for word in options.runs:
        preset, seed = word.split(":")
        out = options.out / f"{preset}-seed{seed}"
        config = with_settings(PRESETS[preset], {**settings, "seed": seed})
        if (record := run(config, options.data, out, options.device, deadline)) is None:
            return
        told = ("test_accuracy", "seconds", "images_per_second", "peak_memory_mb", "device", "precision")
        print(json.dumps({"run": out.name, **{key: record[key] for key in told}}), flush=True)


if __name__ == "__main__":
    main()

"""A run killed at any step and resumed ends with the weights of the undisturbed run, bit for bit."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from convmixer_edu.checkpoint import keyed_generator, read_checkpoint

SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from convmixer_edu.train import Config, TrainingError, train
c = Config(dim=8, depth=2, kernel_size=3, patch_size=1, epochs=3, batch_size=64, lr=0.02, limit=400, mixup=0.5,
           cutmix=0.5, randaug_n=1, randaug_m=5, erase=0.25, holdout=50, checkpoint_seconds=0, depthwise="library")
tell = lambda e: e["event"] == "step" and print(e["step"], flush=True)
for out in sys.argv[2:]:
    train(c, "digits", out, resume=sys.argv[1] == "resume", device="cpu", report=tell)
"""
STEPS = 3 * (350 // 64)


def start(mode, *outs):
    return subprocess.Popen([sys.executable, "-c", SCRIPT, mode, *map(str, outs)], stdout=subprocess.PIPE, text=True)


def stop_after(process, step, number):
    """Send a signal once the run has told of a step, and a little later than that."""
    for line in process.stdout:
        if int(line) >= step:
            break
    time.sleep(0.01 * (step % 3))
    process.send_signal(number)
    process.wait(60)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    process = start("new", out)
    process.communicate(timeout=240)
    assert process.returncode == 0
    return out


def same(a, b):
    (one, _), (other, _) = (read_checkpoint(f / "model.safetensors") for f in (a, b))
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_killed_several_times_at_random_steps(undisturbed, tmp_path):
    # not among the last steps: a run that has ended cannot be killed
    steps = (torch.randperm(STEPS - 6, generator=keyed_generator(7))[:3] + 1).sort().values.tolist()
    mode = "new"
    for step in steps:
        process = start(mode, tmp_path / "run")
        stop_after(process, step, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        mode = "resume"
    final = start("resume", tmp_path / "run")
    rest = final.communicate(timeout=240)[0].split()
    assert final.returncode == 0 and int(rest[0]) >= steps[-1] and int(rest[-1]) == STEPS
    assert same(undisturbed, tmp_path / "run")
    lines = [(f / "metrics.jsonl").read_text().splitlines() for f in (undisturbed, tmp_path / "run")]
    without_time = [[{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in each] for each in lines]
    assert without_time[0] == without_time[1]


def test_asked_to_stop_it_saves_says_so_and_goes_on(undisturbed, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT.replace("checkpoint_seconds=0", "checkpoint_seconds=900"),
                                "new", str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    stop_after(process, 5, signal.SIGTERM)
    assert "stopped by signal 15" in process.stderr.read()
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1
    final = start("resume", tmp_path / "run")
    assert int(final.stdout.readline()) > 5
    final.communicate(timeout=240)
    assert same(undisturbed, tmp_path / "run")


def test_a_damaged_newest_checkpoint_costs_one_step_and_nothing_else(undisturbed, tmp_path):
    process = start("new", tmp_path / "run")
    stop_after(process, 6, signal.SIGKILL)
    newest = sorted((tmp_path / "run").glob("checkpoint-*"))[-1]
    newest.write_bytes(newest.read_bytes()[:-10])
    final = start("resume", tmp_path / "run")
    final.communicate(timeout=240)
    assert final.returncode == 0 and same(undisturbed, tmp_path / "run")

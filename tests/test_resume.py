"""A run killed at any moment and resumed ends with the weights of the undisturbed run, bit for bit."""

import json
import os
import resource
import shutil
import signal
import time
from dataclasses import replace

import forked
import pytest
import torch

from convmixer_edu.checkpoint import keyed_generator, read_checkpoint
from convmixer_edu.recipe import Config
from convmixer_edu.train import TrainingError, train

TINY = Config(dim=8, depth=2, kernel_size=3, patch_size=1, epochs=6, batch_size=64, lr=0.02, limit=400, mixup=0.5,
              cutmix=0.5, randaug_n=1, randaug_m=5, erase=0.25, holdout=50, checkpoint_seconds=0, depthwise="library",
              precision="float32")
STEPS = TINY.epochs * (350 // 64)


def work(tell, out, resume, **settings):
    """Train, and tell of each event; `full_at` is a step after which the disk is full."""
    full_at, backup = settings.pop("full_at", None), settings.pop("backup", None)

    def report(event):
        tell(event.get("step", event["event"]))
        if event.get("step") == full_at is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

    try:
        train(replace(TINY, **settings), "digits", out, resume=resume, device="cpu", report=report,
              backup=backup)
    except (TrainingError, ValueError) as error:
        tell(str(error))


def start(*args, **settings):
    """Start a run in a process of its own."""
    return forked.Process(_start, args, settings)


def _start(tell, args, settings):
    work(tell, *args, **settings)


def kill_after(process, step, delay=0.0, number=signal.SIGKILL):
    """Send a signal once the run has told of a step, and a little later than that."""
    for told in process:
        if isinstance(told, str) and told != "epoch":
            raise AssertionError(f"it ended before it was killed: {told}")
        if told != "epoch" and told >= step:
            break
    time.sleep(delay)
    return process.end(number)


def contents(out):
    """Return all that a finished run leaves, without times."""
    weights, _ = read_checkpoint(out / "model.safetensors")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    record = json.loads((out / "run.json").read_text())
    told = {key: record[key] for key in ("test_accuracy", "test_loss", "test_confusion", "steps")}
    return weights, [{k: v for k, v in line.items() if k != "seconds"} for line in lines], told


def same(one, other):
    (weights, *notes), (weights_too, *notes_too) = contents(one), contents(other)
    files = [sorted(os.listdir(out)) for out in (one, other)]
    assert files[0] == files[1]
    return (notes == notes_too and weights.keys() == weights_too.keys()
            and all(torch.equal(weights[k], weights_too[k]) for k in weights))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    told, code = start(out, False).end()
    assert code == 0 and told[-1] == "done" and STEPS in told
    return out


@pytest.mark.parametrize("number", range(4))
def test_killed_at_five_random_moments(undisturbed, tmp_path, number):
    draw = keyed_generator(7, number)
    steps = (torch.randperm(STEPS - 5, generator=draw)[:5] + 1).sort().values.tolist()
    delays = (torch.rand(5, generator=draw) * 0.04).tolist()  # some two steps: between them, within them, in a save
    for i, (step, delay) in enumerate(zip(steps, delays)):
        _, code = kill_after(start(tmp_path / "run", i > 0), step, delay)
        assert code == -signal.SIGKILL
    rest, code = start(tmp_path / "run", True).end()
    assert code == 0 and rest[-1] == "done" and steps[-1] <= rest[0] <= STEPS
    assert same(undisturbed, tmp_path / "run")


def test_killed_while_it_starts_and_while_it_ends(undisturbed, tmp_path):
    process = start(tmp_path / "run", False)
    _, code = kill_after(process, 1)
    assert code == -signal.SIGKILL
    for delay in (0.02, 0.05, 0.1):  # while it imports, loads, builds
        process = start(tmp_path / "run", True)
        time.sleep(delay)
        assert process.end(signal.SIGKILL)[1] == -signal.SIGKILL
    for delay in (0.0, 0.002, 0.004, 0.008, 0.016):  # while it reads the test set, writes the result, sweeps
        process = start(tmp_path / "run", True)
        for told in process:  # killed after its last step was saved, it has no step left to tell of
            if told in (STEPS, "done"):
                break
        time.sleep(delay)
        process.end(signal.SIGKILL)
    rest, code = start(tmp_path / "run", True).end()
    assert code == 0
    assert same(undisturbed, tmp_path / "run")


def test_asked_to_stop_it_saves_says_so_and_goes_on(undisturbed, tmp_path):
    rest, code = kill_after(start(tmp_path / "run", False, checkpoint_seconds=900), 7, 0.01, signal.SIGTERM)
    assert code == 0 and "stopped by signal 15" in rest[-1]
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1
    rest, code = start(tmp_path / "run", True).end()
    assert code == 0 and 7 < rest[0] < STEPS and same(undisturbed, tmp_path / "run")


def test_a_damaged_newest_checkpoint_costs_one_step_and_nothing_else(undisturbed, tmp_path):
    kill_after(start(tmp_path / "run", False), 8)
    newest = sorted((tmp_path / "run").glob("checkpoint-*"))[-1]
    newest.write_bytes(newest.read_bytes()[:-10])
    rest, code = start(tmp_path / "run", True).end()
    assert code == 0 and rest[0] == int(newest.stem.split("-")[1]) and same(undisturbed, tmp_path / "run")


def test_a_disk_that_fills_up_ends_the_run_with_one_error_and_loses_nothing(undisturbed, tmp_path):
    rest, code = start(tmp_path / "run", False, full_at=9).end()
    assert code == 0 and "could not be written" in rest[-1] and "\n" not in rest[-1]
    assert not list((tmp_path / "run").glob(".*"))
    rest, code = start(tmp_path / "run", True).end()
    assert code == 0 and rest[0] == 9 and same(undisturbed, tmp_path / "run")


def test_a_second_process_is_kept_out_of_a_run_until_the_first_is_gone(undisturbed, tmp_path):
    process = start(tmp_path / "run", False)
    assert next(iter(process)) == 1
    process.pause()
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    for backup in (None, tmp_path / "drive"):
        rest, code = start(tmp_path / "run", True, backup=backup).end()
        assert code == 0 and len(rest) == 1, rest
        assert rest[0].startswith(f"{tmp_path / 'run'} is being trained by another process: wait for its end")
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()} == before
    assert not (tmp_path / "drive").exists()
    process.end(signal.SIGKILL)
    rest, code = start(tmp_path / "run", True).end()
    assert code == 0 and rest[-1] == "done" and same(undisturbed, tmp_path / "run")


def test_the_machine_is_gone_but_the_backup_is_not(undisturbed, tmp_path):
    run, drive = tmp_path / "run", tmp_path / "drive"
    for step in (5, 12, 19):
        kill_after(start(run, step > 5, backup=drive), step, 0.01)
        shutil.rmtree(run)  # a new machine each time
    rest, code = start(run, True, backup=drive).end()
    assert code == 0 and 19 <= rest[0] and same(undisturbed, run) and same(undisturbed, drive)


def test_a_backup_that_goes_away_does_not_stop_the_run(undisturbed, tmp_path):
    run, drive = tmp_path / "run", tmp_path / "drive"
    process = start(run, False, backup=drive)
    for told in process:
        if told != "epoch" and told >= 6:
            drive.rename(tmp_path / "unplugged")
            break
    rest, code = process.end()
    assert code == 0 and rest[-1] == "done" and same(undisturbed, run)
    rest, code = start(run, True, backup=tmp_path / "new drive").end()  # another one, afterwards
    assert code == 0 and same(undisturbed, tmp_path / "new drive")

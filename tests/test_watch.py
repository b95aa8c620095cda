"""What watches a run: every event arrives, files can be read back, and a trace holds the steps it says."""

import json
from unittest.mock import patch

import pytest

from convmixer_edu import watch
from convmixer_edu.recipe import Config
from convmixer_edu.train import train

TINY = Config(dim=8, depth=2, kernel_size=3, patch_size=1, epochs=2, batch_size=64, lr=0.02, limit=300, flip=False,
              holdout=30, depthwise="library")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    events = []
    watchers = (events.append, watch.TensorBoard(folder / "tensorboard"), watch.Trace(folder / "trace.json", 2, 3))
    train(TINY, "digits", folder / "run", device="cpu", report=watch.together(*watchers))
    return folder, events


def test_tensorboard_reads_back_what_was_told(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    folder, events = run
    read = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert set(read.Tags()["scalars"]) == {"loss", "images_per_second", "lr", "held_out_accuracy", "test_accuracy"}
    told = [e for e in events if e["event"] == "step"]
    assert [(s.step, pytest.approx(s.value)) for s in read.Scalars("loss")] == [(e["step"], e["loss"]) for e in told]
    assert read.Scalars("test_accuracy")[0].value == pytest.approx(events[-1]["test_accuracy"])


def test_a_trace_holds_the_steps_it_was_asked_for(run):
    names = [e["name"] for e in json.loads((run[0] / "trace.json").read_text())["traceEvents"] if "dur" in e]
    assert names.count("Optimizer.step#AdamW.step") == 3


def test_a_run_shorter_than_the_trace_still_leaves_one(tmp_path):
    trace = watch.Trace(tmp_path / "t.json", 1, 99)
    for step in (1, 2):
        trace({"event": "step", "step": step})
    trace({"event": "done"})
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]


def test_tensorboard_that_is_not_there_is_said_in_a_sentence(tmp_path):
    with patch.object(watch, "find_spec", return_value=None), pytest.raises(ValueError, match="pip install"):
        watch.TensorBoard(tmp_path)

"""Files from strangers and from other runs: a sentence, soon; and a run that tells the truth about itself."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import time
import warnings
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save

from convmixer_edu import inference, ledger, machine
from convmixer_edu import train as t
from convmixer_edu.checkpoint import (CheckpointError, _digest, check_run, keyed_generator, latest, read_checkpoint,
                                      run_files, write_checkpoint)
from convmixer_edu.distributed import setup
from convmixer_edu.recipe import Config, check_config, read_setup, with_settings

TINY = Config(dim=8, depth=2, kernel_size=3, patch_size=1, epochs=2, batch_size=64, lr=0.02, limit=300, flip=False,
              depthwise="library", precision="float32", checkpoint_seconds=0)
NEST = "[" * 200_000 + "]" * 200_000


def until(step):
    """Return what makes a run stop after a step."""
    return lambda event: event["event"] == "step" and event["step"] == step


def stopped(out, step=6, **more):
    with pytest.raises(t.Stopped):
        t.train(TINY, "digits", out, device="cpu", report=until(step), **more)
    return out


@pytest.fixture(scope="module")
def half_done(tmp_path_factory):
    """A run of eight steps, stopped after the sixth; its checkpoints are of the steps 5 and 6."""
    return stopped(tmp_path_factory.mktemp("half") / "run")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    t.train(TINY, "digits", out, device="cpu")
    return out


@pytest.fixture
def run(half_done, tmp_path):
    return Path(shutil.copytree(half_done, tmp_path / "run"))


def go_on(out, **more):
    return t.train(TINY, "digits", out, resume=True, device="cpu", **more)


def weights(out):
    return read_checkpoint(out / "model.safetensors")[0]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def edit(file, **parts):
    """Change parts of a JSON file; None takes one out."""
    note = {**json.loads(file.read_text()), **parts}
    file.write_text(json.dumps({k: v for k, v in note.items() if v is not None}))


def as_before(out):
    """Rewrite a run in the form of a version that sealed nothing, had a setting less, and one that is gone."""
    settings = json.loads((out / "config.json").read_text())["config"]
    del settings["engine"]
    edit(out / "config.json", version=None, config={**settings, "alternating": False})
    for file in out.glob("*.safetensors"):
        tensors, meta = read_checkpoint(file)
        text = json.dumps({k: v for k, v in meta.items() if k not in ("recipe", "parts")}, sort_keys=True)
        file.write_bytes(save(tensors, {"meta": text, "sha256": _digest(tensors, text)}))
    if (out / "run.json").exists():
        edit(out / "run.json", seal=None, parts=None)


# checkpoints: name: change(tensors, meta); what the sentence must name

MOMENT = "optimizer.0.exp_avg"
CRAFTED = {
    "moment short": (lambda x, m: x.update({MOMENT: torch.zeros(3)}), "exp_avg"),
    "moment transposed": (lambda x, m: x.update({MOMENT: x[MOMENT].transpose(0, 1).contiguous()}), "exp_avg"),
    "moment in half": (lambda x, m: x.update({MOMENT: x[MOMENT].half()}), "float16"),
    "moment gone": (lambda x, m: x.pop(MOMENT), "exp_avg"),
    "one more parameter": (lambda x, m: x.update({"optimizer.999.exp_avg": torch.zeros(3)}), "optimizer.999"),
    "no number": (lambda x, m: x.update({"optimizer.x.exp_avg": torch.zeros(3)}), "optimizer.x"),
    "a name without a point": (lambda x, m: x.update({"stray": torch.zeros(3)}), "stray"),
    "optimiser gone": (lambda x, m: [x.pop(k) for k in [*x] if k.startswith("opt")], "optimizer.0"),
    "step of a moment": (lambda x, m: x.update({"optimizer.0.step": torch.zeros(2)}), "optimizer.0.step"),
    "weights gone": (lambda x, m: [x.pop(k) for k in [*x] if k.startswith("model")], "model.0"),
    "weight in half": (lambda x, m: x.update({"model.0.bias": x["model.0.bias"].half()}), "model.0.bias"),
    "weight as numbers": (lambda x, m: x.update({"model.0.bias": x["model.0.bias"].long()}), "int64"),
    "loss gone": (lambda x, m: m.pop("loss_sum"), "loss_sum is missing"),
    "losses": (lambda x, m: m.update(loss_sum=[0.0] * 4), "loss_sum is of the wrong type"),
    "loss nan": (lambda x, m: m.update(loss_sum=float("nan")), "loss_sum is of the wrong type"),
    "empty": (lambda x, m: x.clear(), "nothing"),
    "step 10^12": (lambda x, m: m.update(step=10**12), "step 1000000000000 of 8"),
    "step -1": (lambda x, m: m.update(step=-1), "step -1"),
    "step 6.0": (lambda x, m: m.update(step=6.0), "step is of the wrong type"),
    "step true": (lambda x, m: m.update(step=True), "step is of the wrong type"),
    "step in words": (lambda x, m: m.update(step="6"), "step is of the wrong type"),
    "step gone": (lambda x, m: m.pop("step"), "step is missing"),
    "step of another name": (lambda x, m: m.update(step=7), "its name says another"),
    "epochs untold": (lambda x, m: m.update(metrics=[]), "0 epochs after 6"),
    "epochs twice": (lambda x, m: m.update(metrics=m["metrics"] * 2), "2 epochs after 6"),
    "epochs in words": (lambda x, m: m.update(metrics=["one"]), "metrics"),
    "epochs as a number": (lambda x, m: m.update(metrics=1), "metrics"),
    "epoch 9": (lambda x, m: m["metrics"][0].update(epoch=9), "tells of"),
    "epoch without loss": (lambda x, m: m["metrics"][0].pop("loss"), "loss is missing"),
    "seconds nan": (lambda x, m: m.update(seconds=float("nan")), "seconds"),
    "seconds infinite": (lambda x, m: m.update(seconds=float("inf")), "seconds"),
    "seconds huge": (lambda x, m: m.update(seconds=10**400), "seconds"),
    "seconds -1": (lambda x, m: m.update(seconds=-1), "no time"),
    "seconds in words": (lambda x, m: m.update(seconds="1"), "seconds"),
    "scaler as a list": (lambda x, m: m.update(scaler=[]), "scaler"),
    "scaler of float16": (lambda x, m: m.update(scaler={"scale": 1.0}), "scale"),
    "recipe gone": (lambda x, m: m.pop("recipe"), "recipe is missing"),
    "recipe of another run": (lambda x, m: m.update(recipe="0" * 64), "another run"),
    "recipe as a number": (lambda x, m: m.update(recipe=0), "recipe"),
    "parts gone": (lambda x, m: m.pop("parts"), "parts is missing"),
    "parts as a word": (lambda x, m: m.update(parts="x"), "parts"),
    "parts of words": (lambda x, m: m.update(parts=["x"]), "parts"),
    "one part more": (lambda x, m: m.update(extra=1), "extra"),
    "nothing said": (lambda x, m: m.clear(), "missing"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_is_lost(name, run):
    change, words = CRAFTED[name]
    file = run / "checkpoint-000000006.safetensors"
    tensors, meta = read_checkpoint(file)
    change(tensors, meta)
    write_checkpoint(file, tensors, meta)
    (run / "checkpoint-000000005.safetensors").unlink()
    before = {f.name: f.read_bytes() for f in run.iterdir()}
    with warnings.catch_warnings(), pytest.raises(CheckpointError, match=words) as caught:
        warnings.simplefilter("ignore")
        go_on(run)
    assert "\n" not in str(caught.value)
    assert {f.name: f.read_bytes() for f in run.iterdir()} == before


def test_a_checkpoint_of_another_run_is_passed_over(run, tmp_path):
    with pytest.raises(t.Stopped):
        t.train(dataclasses.replace(TINY, seed=1), "digits", tmp_path / "other", device="cpu", report=until(6))
    for file in (tmp_path / "other").glob("checkpoint-*6.safetensors"):
        shutil.copy(file, run)
    steps = []
    with pytest.warns(UserWarning, match="belongs to another run.*; trying an older one"):
        go_on(run, report=lambda event: event["event"] == "step" and steps.append(event["step"]) or False)
    assert steps[0] == 6


CONFIG = {  # of config.json: what is changed, and a word of the sentence
    "depth": ({"config": {"depth": 10**7}}, "depth is 10000000"), "dim": ({"config": {"dim": 10**9}}, "2\\*\\*32 weights"),
    "kernel": ({"config": {"kernel_size": 10**30}}, "2\\*\\*32"), "workers": ({"config": {"workers": 10**6}}, "workers"),
    "dim true": ({"config": {"dim": True}}, "dim is True"), "dim list": ({"config": {"dim": [8]}}, "dim"),
    "flip 3": ({"config": {"flip": 3}}, "flip is 3"), "lr": ({"config": {"lr": None}}, "lr is None"),
    "start": ({"config": {"start": 7}}, "start is 7"), "limit": ({"config": {"limit": {}}}, "limit"),
    "size": ({"config": {"image_size": 10**9}}, "image_size"), "unknown": ({"config": {"x": 1}}, "no setting 'x'"),
    "retired": ({"config": {"alternating": True}}, "alternating is True, which this version cannot do"),
    "retired too": ({"config": {"probe": True}}, "probe is True, which this version cannot do"),
    "config": ({"config": []}, "config"), "classes": ({"classes": "cat"}, "classes"), "numbers": ({"classes": [1]}, "classes"),
    "no classes": ({"classes": []}, "classes"), "channels": ({"channels": "3"}, "channels"),
    "channels many": ({"channels": 10**6}, "do not go together"), "mean": ({"mean": [0.5, 0.5]}, "do not go together"),
    "mean words": ({"mean": ["x"]}, "mean"), "mean nan": ({"mean": [float("nan")]}, "mean"), "std": ({"std": [0]}, "do not"),
    "pixels": ({"image_size": [8, 10**9]}, "do not go together"), "pixel": ({"image_size": [8]}, "do not go together"),
    "images": ({"train_images": None}, "train_images is missing"), "print": ({"train_fingerprint": 7}, "train_fingerprint"),
    "choice": ({"choice": [1]}, "choice"), "method": ({"depthwise": {}}, "depthwise"), "more": ({"more": 1}, "'more'"),
}


@pytest.mark.parametrize("name", CONFIG)
def test_a_recipe_file_of_a_stranger_is_one_sentence(name, finished, run, tmp_path):
    change, words = CONFIG[name]
    whole = Path(shutil.copytree(finished, tmp_path / "whole"))
    (whole / "run.json").unlink()  # whose seal would notice
    for out, ask in ((whole, inference.load_run), (run, go_on)):
        parts = dict(change)
        if isinstance(parts.get("config"), dict):
            parts["config"] = {**json.loads((out / "config.json").read_text())["config"], **parts["config"]}
        edit(out / "config.json", **parts)
        with pytest.raises(ValueError, match=words) as caught:
            ask(out)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [NEST, '{"config": ' + NEST + "}", "3", "null", '"x"', "[1]", "{", '{"a": ' + "9" * 9999 + "}"],
                         ids=lambda text: text[:12])
def test_notes_that_are_no_notes(text, finished, run, tmp_path):
    whole = Path(shutil.copytree(finished, tmp_path / "whole"))
    for out, name, ask in ((whole, "run.json", inference.load_run), (whole, "run.json", go_on), (run, "config.json", go_on)):
        (out / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name} is damaged") as caught:
            ask(out)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_deep_metadata_and_a_pipe_are_no_checkpoints(tmp_path):
    deep = tmp_path / "deep.safetensors"
    deep.write_bytes(save({}, {"checkpoint": f"{_digest({}, NEST)} {NEST}"}))
    with pytest.raises(CheckpointError, match="is damaged"):
        read_checkpoint(deep)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(CheckpointError, match="there is no checkpoint"):
            read_checkpoint(tmp_path / "pipe")


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "model.safetensors", "run.json"])
def test_bits_that_flip_in_a_finished_run_are_noticed(name, finished, tmp_path):
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    whole, model = (out / name).read_bytes(), inference.load_run(out)[0].state_dict()
    told = check_run(out)
    draw = keyed_generator(3, len(name))
    for _ in range(60):
        bit = int(torch.randint(len(whole) * 8, (), generator=draw))
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        (out / name).write_bytes(data)
        try:
            same = equal(inference.load_run(out)[0].state_dict(), model) and check_run(out) == told
        except ValueError as error:
            same = "\n" not in str(error)
        assert same, f"bit {bit} of {name} was flipped and not noticed"


def test_weights_without_a_result_still_know_their_recipe(finished, tmp_path):
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    (out / "run.json").unlink()
    inference.load_run(out)
    classes = json.loads((out / "config.json").read_text())["classes"]
    edit(out / "config.json", classes=classes[::-1])
    with pytest.raises(CheckpointError, match="does not fit its config.json: one of them was changed"):
        inference.load_run(out)


def test_a_record_is_checked_when_it_is_loaded_and_its_seal_covers_the_command(finished, tmp_path):
    folder = ledger.archive(finished, "a", "the command", weights=True, into=tmp_path)
    inference.load_run(folder)
    edit(folder / "record.json", command="another command")
    with pytest.raises(ValueError, match="was changed"):
        ledger.read_record("a", tmp_path)
    with pytest.raises(ValueError, match="was changed"):
        inference.load_run(folder)


def test_records_of_before_are_read_as_they_are():
    without = set()  # whether the seal leaves out the command, as the first ones do
    for name in ledger.list_records():
        folder = ledger.results_folder() / name
        without.add(ledger.check_record(folder)["sha256"] == ledger._seal(folder))
        read_setup(folder / "config.json")
        if (folder / "model.safetensors").exists():
            inference.load_run(folder)
    assert without == {True, False}


def test_a_run_begun_before_a_setting_existed_is_loaded_and_goes_on(finished, run, tmp_path):
    whole = Path(shutil.copytree(finished, tmp_path / "whole"))
    as_before(whole)
    assert equal(inference.load_run(whole)[0].state_dict(), weights(finished))
    before = json.loads((whole / "run.json").read_text())
    assert go_on(whole) == before and before["steps"] == 8
    as_before(run)
    record = go_on(run)
    assert equal(weights(run), weights(finished))
    assert record["parts"][0]["first_step"] == 7


def test_equal_weights_give_equal_bytes(finished, tmp_path):
    for name in "abcdefgh":  # two keys of metadata would stand in either order
        write_checkpoint(tmp_path / name, {"b": torch.ones(3), "a": torch.zeros(2)}, {"x": 1, "kind": "weights"})
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1
    t.train(dataclasses.replace(TINY, checkpoint_seconds=900.0), "digits", tmp_path / "again", device="cpu")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


# a second folder

def test_the_newest_whole_checkpoint_of_both_folders_is_taken(finished, tmp_path):
    run, drive = tmp_path / "run", tmp_path / "drive"
    stopped(run, backup=drive)
    for file in run.glob("checkpoint-*"):
        file.write_bytes(file.read_bytes()[:-9])
    steps = []
    with pytest.warns(UserWarning, match="trying an older one"):
        go_on(run, backup=drive, report=lambda event: steps.append(event.get("step")) and False)
    assert steps[0] == 7 and equal(weights(run), weights(finished))
    assert {f.name: f.read_bytes() for f in run_files(run)} == {f.name: f.read_bytes() for f in run_files(drive)}


def test_a_backup_that_is_ahead_is_used_and_never_loses_what_is_newer(run, finished, tmp_path):
    drive = Path(shutil.copytree(run, tmp_path / "drive"))
    for file in run.glob("checkpoint-*"):
        file.unlink()
    with pytest.raises(t.Stopped):
        go_on(run, backup=drive, report=until(7))
    assert [f.name for f in run.glob("checkpoint-*")] == ["checkpoint-000000007.safetensors"]
    assert latest(drive)[1]["step"] == 7
    (run / "checkpoint-000000007.safetensors").unlink()
    with pytest.warns(UserWarning, match="begins again with its first step"), pytest.raises(t.Stopped):
        go_on(run, report=until(2))  # the drive is not there
    with pytest.raises(t.Stopped):
        go_on(run, backup=drive, report=until(8))
    assert latest(drive)[1]["step"] == 8
    go_on(run, backup=drive)
    assert equal(weights(run), weights(finished))


def test_a_damaged_newer_checkpoint_does_not_cost_a_whole_one(run):
    for step in (8, 9):
        (run / f"checkpoint-{step:09d}.safetensors").write_bytes(b"x")
    with warnings.catch_warnings(), pytest.raises(t.Stopped):
        warnings.simplefilter("ignore")
        go_on(run, report=until(7))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert latest(run)[1]["step"] == 7


# what a run says of itself

def test_another_machine_is_said_and_written_down(run, finished):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.warns(UserWarning, match=f"another threads .{threads} before, {threads + 1} now"):
            record = go_on(run)
    finally:
        torch.set_num_threads(threads)
    assert [(p["first_step"], p["threads"]) for p in record["parts"]] == [(1, threads), (7, threads + 1)]
    assert len(json.loads((finished / "run.json").read_text())["parts"]) == 1


def test_the_commit_is_the_packages_own_or_none(tmp_path, monkeypatch):
    monkeypatch.delenv("CONVMIXER_COMMIT", raising=False)
    site, hook, ran = tmp_path / "site-packages", tmp_path / "hook", tmp_path / "it-ran"
    (site / "convmixer_edu").mkdir(parents=True)
    monkeypatch.setattr(machine, "__file__", str(site / "convmixer_edu/machine.py"))
    hook.write_text(f"#!/bin/sh\ntouch {ran}\n")
    hook.chmod(0o755)
    for place in (tmp_path, site):  # somebody's repository around it, and one right there
        for words in ("init -q", "-c user.email=a@b -c user.name=n commit -q --allow-empty -m x", f"config core.fsmonitor {hook}"):
            subprocess.run(["git", "-C", place, *words.split()], check=True)
        monkeypatch.setenv("GIT_DIR", str(ROOT / ".git"))  # as a hook of git sets it
        assert machine.commit() is None
        monkeypatch.delenv("GIT_DIR")
    (site / "settings.ini").write_text("lib_path = convmixer_edu\n")  # the package's own checkout
    own = subprocess.run(["git", "-C", site, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    assert own.startswith(machine.commit()) and not ran.exists()
    (site / ".git/index").write_bytes(b"")  # no repository any more: none around it is asked
    shutil.rmtree(site / ".git/objects")
    assert machine.commit() is None


@pytest.mark.parametrize("set_, reset, words", [
    (lambda: torch.set_default_dtype(torch.float64), lambda: torch.set_default_dtype(torch.float32), "default dtype"),
    (lambda: torch.set_default_device("meta"), lambda: torch.set_default_device(None), "default device"),
    (lambda: torch.set_grad_enabled(False), lambda: torch.set_grad_enabled(True), "grad mode")])
def test_what_another_cell_set_for_all_of_torch_is_one_sentence(set_, reset, words, finished, tmp_path):
    set_()
    try:
        with pytest.raises(ValueError, match=f"torch's {words} was set to .*set it back"):
            t.train(TINY, "digits", tmp_path / "run", device="cpu")
    finally:
        reset()
    assert not (tmp_path / "run").exists()


def test_a_network_is_loaded_and_asked_whatever_the_default_type_is(finished):
    usual = inference.evaluate(finished, "digits", device="cpu")["loss"]
    torch.set_default_dtype(torch.float64)
    try:
        assert inference.evaluate(finished, "digits", device="cpu")["loss"] == pytest.approx(usual, rel=1e-6)
    finally:
        torch.set_default_dtype(torch.float32)


# one process a folder, and those that torchrun starts

def test_a_folder_is_claimed_before_anything_is_written(tmp_path):
    """Two begin at once: the second comes while the first still chooses how to run."""
    out, second = tmp_path / "run", []
    real = t._choose

    def choose(*args):
        if not second:
            second.append("at work")
            with pytest.raises(ValueError, match="is being trained by another process"):
                t.train(dataclasses.replace(TINY, seed=1), "digits", out, device="cpu")
        return real(*args)

    with patch.object(t, "_choose", choose):
        record = t.train(TINY, "digits", out, device="cpu")
    assert second and record["config"]["seed"] == json.loads((out / "config.json").read_text())["config"]["seed"] == 0


def test_a_folder_of_which_nothing_came_is_removed_again(tmp_path):
    with pytest.raises(ValueError, match="config.json is missing"):
        go_on(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "own").mkdir()
    with pytest.raises(ValueError, match="config.json is missing"):
        go_on(tmp_path / "own")
    assert (tmp_path / "own").exists()


def test_without_locks_a_run_goes_on_with_a_sentence(tmp_path):
    with patch("fcntl.flock", side_effect=OSError(errno.ENOTSUP, "Operation not supported")):
        with pytest.warns(UserWarning, match="cannot be locked"):
            t.train(dataclasses.replace(TINY, epochs=1), "digits", tmp_path / "run", device="cpu")


TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("change", [
    {"WORLD_SIZE": "x"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "-2"}, {"WORLD_SIZE": "2.0"}, {"WORLD_SIZE": "²"}, {"RANK": None},
    {"RANK": "2"}, {"RANK": "9" * 30}, {"LOCAL_RANK": None}, {"LOCAL_RANK": "1"}, {"MASTER_ADDR": None}, {"MASTER_PORT": None},
    {"MASTER_PORT": "x"}, {"MASTER_PORT": "99999"}], ids=str)
def test_variables_that_are_not_torchruns_are_one_sentence(change, monkeypatch):
    for name, value in {**TORCHRUN, **change}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="start with torchrun, or unset WORLD_SIZE"):
        setup("cpu")


def test_a_recipe_of_any_type_is_refused_in_time():
    started = time.process_time()
    for name in (f.name for f in dataclasses.fields(Config)):
        for value in ([], {}, object(), 10**40, float("nan"), "\x00", -1, True):
            try:
                check_config(with_settings(Config(), {name: value}))
            except ValueError as error:
                assert name in str(error) or "2**32" in str(error), (name, value, error)
                assert "\n" not in str(error)
    assert time.process_time() - started < 60  # a guard: without the bounds it would be for ever

"""The ledger: what is recorded is sealed, never written over, and what the book shows is there."""

import ast
import json
import os
import re
import shutil
from pathlib import Path

import prose
import pytest
import torch
from conftest import ROOT

from convmixer_edu import ledger
from convmixer_edu.anatomy import count_parameters
from convmixer_edu.checkpoint import CheckpointError, check_run, read_checkpoint
from convmixer_edu.data import load_images
from convmixer_edu.inference import evaluate, load_run, score
from convmixer_edu.recipe import Config
from convmixer_edu.train import train


CONFIG = Config(dim=8, depth=2, kernel_size=3, patch_size=1, epochs=2, batch_size=64, limit=100, flip=False,
                depthwise="library")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("ledger") / "run"
    train(CONFIG, "digits", run, device="cpu")
    return run


@pytest.fixture
def finished(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_a_kept_run_reads_back(finished, tmp_path):
    ledger.archive(finished, "a", "the command", into=tmp_path / "results")
    record = ledger.read_record("a", tmp_path / "results")
    told = json.loads((finished / "run.json").read_text())
    assert record["test_accuracy"] == told["test_accuracy"] and record["command"] == "the command"
    assert len(record["metrics"]) == 2
    assert ledger.list_records(tmp_path / "results") == ["a"]
    assert not (tmp_path / "results/a/model.safetensors").exists()
    with pytest.raises(ValueError, match="never written over"):
        ledger.archive(finished, "a", "again", into=tmp_path / "results")


@pytest.mark.parametrize("name", ledger.KEPT)
def test_any_change_breaks_the_seal(finished, tmp_path, name):
    folder = ledger.archive(finished, "a", "c", weights=True, into=tmp_path / "results")
    (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    with pytest.raises(ValueError, match="was changed"):
        ledger.read_record("a", tmp_path / "results")
    (folder / name).unlink()
    with pytest.raises(ValueError, match="was changed"):
        ledger.read_record("a", tmp_path / "results")


@pytest.mark.parametrize("name", ("config.json", "metrics.jsonl", "run.json", "model.safetensors"))
def test_a_run_that_was_changed_is_not_recorded(finished, tmp_path, name):
    file = finished / name
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=name):
        ledger.archive(finished, "a", "c", weights=True, into=tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_kept_weights_are_half_as_large_and_the_card_says_what_they_are(finished, tmp_path):
    folder = ledger.archive(finished, "a", "c", weights=True, into=tmp_path / "results")
    whole, half = (read_checkpoint(f / "model.safetensors")[0] for f in (finished, folder))
    assert whole.keys() == half.keys()
    for name, tensor in half.items():
        assert tensor.dtype == (torch.float16 if whole[name].is_floating_point() else torch.int64), name
        assert torch.allclose(tensor.float(), whole[name].float(), rtol=1e-3, atol=1e-6), name
    seen, told = evaluate(folder, "digits", device="cpu"), json.loads((finished / "run.json").read_text())
    assert abs(seen["accuracy"] - told["test_accuracy"]) < 1
    card = (folder / "README.md").read_text()
    assert f"{told['test_accuracy']:.2f} %" in card and "ConvMixer-8/2, kernel 3, patch 1" in card
    assert f"{count_parameters(8, 2, 3, 1, 10, 1):,} weights" in card and "digits" in card


def test_the_network_that_is_given_away_is_small_and_whole():
    run = ledger.pretrained_run()
    assert (run / "model.safetensors").stat().st_size < 1_500_000 and (run / "README.md").exists()
    assert ledger.read_record(ledger.PRETRAINED)["test_accuracy"] > 85


def test_unfinished_and_unknown_runs_are_refused(finished, tmp_path):
    (finished / "run.json").unlink()
    with pytest.raises(ValueError, match="run.json is missing"):
        ledger.archive(finished, "a", "c", into=tmp_path)
    with pytest.raises(ValueError, match="no recorded run 'b'"):
        ledger.read_record("b", tmp_path)


@pytest.mark.parametrize("name", ["../a", "a/b", ".hidden", "-rf", "..", "", "a\nb", "a b", "a" * 200])
def test_a_record_has_a_plain_name_and_stays_in_its_folder(finished, tmp_path, name):
    with pytest.raises(ValueError, match="is no name for a record"):
        ledger.archive(finished, name, "c", into=tmp_path / "results")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("name", ledger.KEPT[:3])
def test_a_link_in_a_run_is_not_followed(finished, tmp_path, name):
    (finished / name).rename(tmp_path / "secret")
    (finished / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="no regular file"):
        ledger.archive(finished, "a", "c", into=tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_record_is_on_the_disk_before_the_run_may_go(finished, tmp_path, monkeypatch):
    """Every file of it was flushed, and the folder that names it, after its name was given."""
    flushed, real = [], os.fsync

    def fsync(handle):
        where = os.readlink(f"/proc/self/fd/{handle}") if Path("/proc/self/fd").exists() else None
        flushed.append((os.fstat(handle).st_ino, (tmp_path / "results/a").exists(), where))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    folder = ledger.archive(finished, "a", "c", weights=True, into=tmp_path / "results")
    files = {ino for ino, _, _ in flushed}
    assert {file.stat().st_ino for file in folder.iterdir()} <= files and len([*folder.iterdir()]) == 6
    assert flushed[-1][0] == folder.parent.stat().st_ino and flushed[-1][1]


def test_an_adopted_record_is_the_same_and_brings_nothing_else(finished, tmp_path):
    folder = ledger.archive(finished, "a", "c", weights=True, into=tmp_path / "results")
    (folder / "extra.py").write_text("print(1)")
    ledger.adopt(folder, tmp_path / "other")
    copy = tmp_path / "other/a"
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == {
        file.name: file.read_bytes() for file in folder.iterdir() if file.name != "extra.py"}
    (folder / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="was changed"):
        ledger.adopt(folder, tmp_path / "third")
    assert not [*(tmp_path / "third").iterdir()]  # nor half a copy aside


@pytest.mark.parametrize("make", [lambda run, out: ledger.archive(run, "a", "c", weights=True, into=out),
                                  lambda run, out: ledger.adopt(ledger.archive(run, "a", "c", into=out.parent), out)],
                         ids=["archive", "adopt"])
def test_a_copy_that_breaks_off_leaves_nothing_and_can_be_made_again(make, finished, tmp_path, monkeypatch):
    real, out, full = ledger.write_atomically, tmp_path / "results" / "here", CheckpointError("no room")

    def write(path, data):
        if path.parts[-2:] == (".a.part", "metrics.jsonl") and out in path.parents:
            raise full
        real(path, data)

    monkeypatch.setattr(ledger, "write_atomically", write)
    with pytest.raises(CheckpointError, match="no room"):
        make(finished, out)
    assert not [*out.iterdir()]
    monkeypatch.undo()
    shutil.rmtree(out.parent / "a", ignore_errors=True)
    make(finished, out)
    assert ledger.read_record("a", out)


def test_every_record_of_the_book_is_whole_and_says_what_it_was():
    assert ledger.list_records()
    for name in ledger.list_records():
        run = ledger.read_record(name)
        assert run["config"]["epochs"] == len(run["metrics"]), name
        for key in ("test_accuracy", "seconds", "images_per_second", "peak_memory_mb", "torch", "device",
                    "train_fingerprint", "command"):
            assert run[key], (name, key)
        counts = run["test_confusion"]
        right = sum(row[i] for i, row in enumerate(counts))
        assert abs(100 * right / run["test_images"] - run["test_accuracy"]) < 1e-2, name


WITH_WEIGHTS = [n for n in ledger.list_records() if (ledger.results_folder() / n / "model.safetensors").exists()]


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_every_weight_file_was_judged_by_itself_and_gives_the_recorded_accuracy(name):
    run, judged = ledger.read_record(name), ledger.shipped(name)  # the seal covers the weights
    note = json.loads((ledger.results_folder() / name / "record.json").read_text())
    assert judged["record"] == note["sha256"], "judged before the record was made anew: python tools/shipped.py"
    assert judged["precision"] == "float32" and judged["images"] == run["test_images"]
    assert abs(judged["accuracy"] - run["test_accuracy"]) < 0.1


@pytest.mark.parametrize("name", ["quick-seed0", "quick8-covariance-seed0", ledger.PRETRAINED])
def test_a_weight_file_gives_what_was_judged(name, cifar10):
    assert name in WITH_WEIGHTS
    model, info = load_run(ledger.results_folder() / name)
    seen = score(model, load_images(cifar10, "test"), info.stats)
    assert abs(seen["accuracy"] - ledger.shipped(name)["accuracy"]) < 0.03  # three images


def test_a_card_tells_what_the_file_itself_gives():
    folder = ledger.pretrained_run()
    setup, result = (json.loads((folder / name).read_text()) for name in ("config.json", "run.json"))
    judged = {"accuracy": 12.34, "precision": "float32"}
    assert "12.34 %" in ledger.model_card(setup, result, judged)
    card = ledger.model_card(setup, result)
    assert f"{result['test_accuracy']:.2f} %" in card and "not measured" in card
    assert ledger.shipped("no such run") is None


def test_the_readme_tells_what_the_network_that_comes_along_reached():
    run, text = ledger.read_record(ledger.PRETRAINED), (ROOT / "README.md").read_text("utf8")
    assert f"{run['test_accuracy']:.1f} % on CIFAR-10's test images after {run['seconds']:.0f} seconds on one H100" in text
    assert "H100" in run["device"]


@pytest.mark.parametrize("kind", ["deep", "long number", "pipe", "folder", "missing"])
def test_a_strangers_lines_are_one_sentence(finished, tmp_path, kind):
    """Sealed anew, so that only what is in the file can be found fault with; a pipe is not waited for."""
    folder = ledger.archive(finished, "a", "c", into=tmp_path)
    lines = folder / "metrics.jsonl"
    lines.unlink()
    {"deep": lambda: lines.write_text("[" * 200_000), "long number": lambda: lines.write_text("9" * 5001),
     "pipe": lambda: os.mkfifo(lines), "folder": lines.mkdir, "missing": lambda: None}[kind]()
    (folder / "record.json").write_text(json.dumps({"command": "c", "sha256": ledger._seal(folder, "c")}))
    with pytest.raises(ValueError, match="metrics.jsonl"):
        ledger.read_record("a", tmp_path)


def test_a_run_with_a_pipe_in_it_is_not_waited_for(finished):
    (finished / "metrics.jsonl").unlink()
    os.mkfifo(finished / "metrics.jsonl")
    with pytest.raises(CheckpointError, match="is not what the run wrote"):
        check_run(finished)


def test_the_list_of_runs_names_every_page_that_reads_one():
    cell = next(cell for cell in prose.cells(ROOT / "nbs/W10_records.ipynb", "code") if "\nuse = {" in cell)
    use = next(ast.literal_eval(part.value) for part in ast.parse(cell).body
               if isinstance(part, ast.Assign) and part.targets[0].id == "use")
    used = {kind: set(pages.split()) for kind, pages in use.items()}
    found = {kind: set() for kind in ("256-8", "light25", "quick8", "quick", "siblings")}
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        code = "\n".join(prose.cells(path, "code"))
        for kind in {*re.findall(r"""["'](256-8|light25|quick8?)-""", code), *re.findall('"(siblings)"', code),
                     *["light25"] * ("pretrained_run()" in code)} - ({"siblings"} if path.stem == "W10_records" else set()):
            found[kind].add(path.stem)
    assert {kind: found[kind] - used[kind] for kind in found} == dict.fromkeys(found, set())
    assert all((ROOT / f"nbs/{page}.ipynb").exists() for pages in used.values() for page in pages)

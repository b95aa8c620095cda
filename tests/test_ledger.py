"""The ledger: what is recorded is sealed, never written over, and what the book shows is there."""

import json
import shutil

import pytest

from convmixer_edu import ledger


@pytest.fixture
def finished(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "run.json"):
        (run / name).write_text(json.dumps({"test_accuracy": 50.0}))
    (run / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n')
    (run / "model.safetensors").write_bytes(b"weights")
    return run


def test_a_kept_run_reads_back(finished, tmp_path):
    ledger.keep(finished, "a", "the command", into=tmp_path / "results")
    record = ledger.recorded("a", tmp_path / "results")
    assert record["test_accuracy"] == 50.0 and record["command"] == "the command" and len(record["metrics"]) == 2
    assert ledger.names(tmp_path / "results") == ["a"]
    assert not (tmp_path / "results/a/model.safetensors").exists()
    with pytest.raises(ValueError, match="never written over"):
        ledger.keep(finished, "a", "again", into=tmp_path / "results")


@pytest.mark.parametrize("name", ledger.KEPT)
def test_any_change_breaks_the_seal(finished, tmp_path, name):
    folder = ledger.keep(finished, "a", "c", weights=True, into=tmp_path / "results")
    (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    with pytest.raises(ValueError, match="was changed"):
        ledger.recorded("a", tmp_path / "results")
    (folder / name).unlink()
    with pytest.raises(ValueError, match="was changed"):
        ledger.recorded("a", tmp_path / "results")


def test_unfinished_and_unknown_runs_are_refused(finished, tmp_path):
    (finished / "run.json").unlink()
    with pytest.raises(ValueError, match="run.json is missing"):
        ledger.keep(finished, "a", "c", into=tmp_path)
    with pytest.raises(ValueError, match="no recorded run 'b'"):
        ledger.recorded("b", tmp_path)


def test_every_record_of_the_book_is_whole_and_says_what_it_was():
    assert ledger.names()
    for name in ledger.names():
        run = ledger.recorded(name)
        assert run["config"]["epochs"] == len(run["metrics"]), name
        for key in ("test_accuracy", "seconds", "images_per_second", "peak_memory_mb", "torch", "device",
                    "train_fingerprint", "command"):
            assert run[key], (name, key)
        counts = run["test_confusion"]
        right = sum(row[i] for i, row in enumerate(counts))
        assert abs(100 * right / run["test_images"] - run["test_accuracy"]) < 1e-2, name


def test_recorded_weights_give_the_recorded_accuracy(cifar10, tmp_path):
    from convmixer_edu.inference import evaluate
    name = next(n for n in ledger.names() if (ledger.results_folder() / n / "model.safetensors").exists())
    shutil.copytree(ledger.results_folder() / name, tmp_path / name)
    seen = evaluate(tmp_path / name, cifar10, device="cpu")
    assert abs(seen["accuracy"] - ledger.recorded(name)["test_accuracy"]) < 0.1

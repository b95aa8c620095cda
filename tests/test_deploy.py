"""Deployment: BatchNorm folded without a trace, ways of asking judged, files that nobody gets unless they answer right."""

import builtins
import json
import os

import pytest
import timm
import torch
from torch import nn

from convmixer_edu import deploy
from convmixer_edu.deploy import (
    FromPixels, affine, clock, distance, enough, export, fold_norms, in_turn, latency, onnx_runner,
    optimize_for_inference,
)
from convmixer_edu.model import ConvMixer, variant
from convmixer_edu.speed import RunSettings, frozen

needs_onnx = pytest.mark.skipif(
    not all(__import__("importlib.util").util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript and onnxruntime are not installed")


def network(dim=16, depth=2, kernel_size=5, patch_size=4, act=None, seed=0):
    """Return a network whose BatchNorms have scales, shifts and statistics of their own."""
    torch.manual_seed(seed)
    model = ConvMixer(dim, depth, kernel_size, patch_size, num_classes=7)
    for part in [*model.modules()]:
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias)
            part.weight.data[::3] *= -1  # a scale may be negative
            part.momentum = 1.0
        for name, child in part.named_children():
            if act and isinstance(child, nn.GELU):
                setattr(part, name, act())
    with torch.no_grad():
        model(torch.randn(16, 3, 32, 32))
    return model.eval()


@pytest.mark.parametrize("sizes", [dict(), dict(kernel_size=8), dict(depth=1, kernel_size=1), dict(patch_size=1, depth=3),
                                   dict(act=nn.ReLU)])
@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 3, 24, 36)])
@torch.no_grad()
def test_a_folded_network_says_the_same(sizes, shape):
    model = network(**sizes).double()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    folded, x = fold_norms(model), torch.randn(*shape, dtype=torch.double)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-11)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@torch.no_grad()
def test_folding_needs_every_part_of_it():
    """A shift that is dropped shows."""
    model, x = network(), torch.randn(2, 3, 32, 32)
    folded = fold_norms(model)
    folded[2].shift.zero_()
    assert (folded(x) - model(x)).abs().max() > 1e-3


def test_affine_is_batch_norm():
    norm = network()[2]
    scale, shift = affine(norm)
    u = torch.randn(2, 16, 3, 3)
    torch.testing.assert_close(norm(u), scale[:, None, None] * u + shift[:, None, None])


def test_what_cannot_be_folded_is_refused():
    with pytest.raises(ValueError, match="six lines"):
        fold_norms(timm.create_model("resnet18"))
    for residual in ("none", "both"):
        with pytest.raises(ValueError, match="six lines"):
            fold_norms(variant(8, 2, 3, 2, residual=residual))
    model = network()
    model[3][0].fn[2].weight.data[0] = 0
    with pytest.raises(ValueError, match="by zero"):
        fold_norms(model)


def test_distance():
    a = torch.tensor([[1.0, -4.0]])
    assert distance(a + torch.tensor([[0.0, 1.0]]), a) == 0.25
    assert distance(a * float("nan"), a) == float("inf")


def test_the_fastest_way_holds_the_tolerance():
    model, x = network(dim=8), torch.randn(4, 3, 32, 32)
    told = []
    fast = optimize_for_inference(model, x, tolerance=1e-4, seconds=20, report=told.append)
    plain = frozen(model, RunSettings())(x)
    assert fast(x).dtype == torch.float32
    assert distance(fast(x), plain) == pytest.approx(fast.difference, abs=1e-5) and fast.difference <= 1e-4
    assert fast.choice.dtype == "float32" and told == fast.timed
    assert fast.choice.images_per_second == max(way.images_per_second for way in fast.timed)
    assert all("allowed" in way.reason for way in fast.timed if way.dtype != "float32" and "not reached" not in way.reason)


def test_a_way_that_changes_the_answers_is_refused(monkeypatch):
    """However fast it is."""
    model, x = network(dim=8), torch.randn(4, 3, 32, 32)

    def liar(model, choice):
        ask = frozen(model, RunSettings())
        return (lambda images: ask(images) + 1) if choice.channels_last else ask

    monkeypatch.setattr(deploy, "frozen", liar)
    fast = optimize_for_inference(model, x, seconds=20)
    assert not fast.choice.channels_last
    assert all("off the plain network" in way.reason for way in fast.timed if way.channels_last)


def test_a_way_that_fails_says_why_and_the_plain_one_remains(monkeypatch):
    model, x = network(dim=8), torch.randn(4, 3, 32, 32)

    def broken(model, choice):
        if choice != RunSettings():
            raise RuntimeError("no compiler\nat all")
        return frozen(model, choice)

    monkeypatch.setattr(deploy, "frozen", broken)
    fast = optimize_for_inference(model, x, seconds=20)
    assert (fast.choice.channels_last, fast.choice.dtype) == (False, "float32")
    assert {way.reason for way in fast.timed[1:]} == {"RuntimeError: no compiler"}


def test_no_time_left_means_plain():
    fast = optimize_for_inference(network(dim=8), torch.randn(2, 3, 32, 32), seconds=0)
    assert (fast.choice.compile, fast.choice.channels_last, fast.choice.dtype) == (False, False, "float32")
    assert all("not reached" in way.reason for way in fast.timed[1:])


def test_more_than_eight_blocks_are_compiled_without_giving_up(capfd):
    """The compiler keeps a few variants of a function only, and a block with frozen weights is one."""
    model, x = network(dim=8, depth=12), torch.randn(2, 3, 32, 32)
    torch._dynamo.reset()
    out = frozen(model, RunSettings(compile=True))(x)
    torch.testing.assert_close(out, model(x).detach(), rtol=0, atol=1e-4)
    assert "recompile_limit" not in capfd.readouterr().err


def test_functions_are_timed_in_turn():
    calls = []
    found = in_turn({"a": lambda: calls.append("a") or sum(range(400_000)), "b": lambda: calls.append("b")}, rounds=3)
    assert [len(found[name]) for name in "ab"] == [3, 3] and all(t >= 0 for t in found["a"] + found["b"])
    assert calls.count("b") > calls.count("a") >= 5  # quick ones are repeated
    assert enough(lambda: None, torch.device("cpu")) > 1 and clock(lambda: None, torch.device("cpu"), 5) >= 0


def test_pixels_go_in():
    model = network()
    whole = FromPixels(model, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)).eval()
    pixels = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.4, 0.5, 0.6])[:, None, None], torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    torch.testing.assert_close(whole(pixels), model((pixels - mean) / std))


@pytest.mark.parametrize("kernel_size", [5, 8])
def test_torch_export_answers_like_the_network(tmp_path, kernel_size):
    model = network(kernel_size=kernel_size).train()
    told = export(model, (3, 32, 32), tmp_path / "net.pt2", "torch.export", {"a": "b"})
    assert told["difference"] <= 1e-4 and told["bytes"] == (tmp_path / "net.pt2").stat().st_size
    assert model.training and os.listdir(tmp_path) == ["net.pt2"]
    kept = {"notes.json": ""}
    ask = torch.export.load(tmp_path / "net.pt2", extra_files=kept).module()  # our own, of a moment ago
    assert json.loads(kept["notes.json"]) == {"a": "b"}
    for count in (1, 2, 5):
        x = torch.rand(count, 3, 32, 32)
        assert (ask(x) - model.eval()(x)).abs().max() <= 1e-4


@needs_onnx
@pytest.mark.parametrize("kernel_size", [5, 8])
@torch.no_grad()
def test_onnx_answers_like_the_network(tmp_path, kernel_size, capfd):
    import onnxruntime
    model = FromPixels(network(kernel_size=kernel_size), (0.5,) * 3, (0.2,) * 3)
    told = export(model, (3, 32, 32), tmp_path / "net.onnx", "ONNX Runtime", {"classes": "[1]"})
    assert told["difference"] <= 1e-4 and os.listdir(tmp_path) == ["net.onnx"]
    ask = onnx_runner(tmp_path / "net.onnx")
    for count in (1, 2, 5):
        x = torch.rand(count, 3, 32, 32)
        assert (ask(x) - model.eval()(x)).abs().max() <= 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    assert session.get_modelmeta().custom_metadata_map["classes"] == "[1]"
    assert "Traceback" not in capfd.readouterr().err


class Fickle(nn.Module):
    """Answers otherwise when it is recorded."""

    def __init__(self, otherwise):
        super().__init__()
        self.otherwise = otherwise

    def forward(self, x):
        return x.mean((2, 3)) + (self.otherwise if torch.compiler.is_exporting() else 0.0)


@pytest.mark.parametrize("otherwise", [0.01, float("nan")])
@pytest.mark.parametrize("kind", ["torch.export", pytest.param("ONNX Runtime", marks=needs_onnx)])
def test_a_file_that_answers_wrongly_is_not_left(tmp_path, kind, otherwise):
    (tmp_path / "net").write_text("the one before")
    with pytest.raises(ValueError, match="off PyTorch, expected at most"):
        export(Fickle(otherwise), (3, 8, 8), tmp_path / "net", kind)
    assert os.listdir(tmp_path) == ["net"] and (tmp_path / "net").read_text() == "the one before"


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, missing):
    real = builtins.__import__

    def without(name, *more):
        if name == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=rf"{missing} is missing: pip install 'convmixer-edu\[export\]'"):
        export(network(), (3, 32, 32), tmp_path / "net.onnx", "ONNX Runtime")
    assert not os.listdir(tmp_path)
    if missing == "onnxruntime":
        with pytest.raises(ValueError, match="onnxruntime is missing"):
            onnx_runner(tmp_path / "net.onnx")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        export(network(), (3, 32, 32), tmp_path / "gone" / "net.pt2", "torch.export")


def test_a_file_may_lie_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model, x = network(dim=8), torch.rand(2, 3, 32, 32)
    told = export(model, (3, 32, 32), "~/net.pt2", "torch.export")
    assert told["file"] == str(tmp_path / "net.pt2") and os.listdir(tmp_path) == ["net.pt2"]
    again = deploy.FORMATS["torch.export"][1]("~/net.pt2")
    assert distance(again(x), model(x).detach(), 1.0) < deploy.TOLERANCE


def test_latency_has_each_way_for_each_count(tmp_path):
    model = network(dim=8)
    export(model, (3, 32, 32), tmp_path / "net.pt2", "torch.export")
    rows = latency(model, (3, 32, 32), {"torch.export": tmp_path / "net.pt2"}, counts=(1, 3), seconds=0)
    assert [(row["way"].split(",")[0], row["images"]) for row in rows] == [
        (way, count) for count in (1, 3) for way in ("PyTorch", "PyTorch", "torch.export")]
    assert all(0 < row["least"] <= row["seconds"] <= row["most"] for row in rows)


def test_a_file_never_replaces_a_folder_or_a_device(tmp_path):
    """Whoever is root could replace /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="/pipe cannot be written: it is a folder or a device"):
        export(network(), (3, 32, 32), tmp_path / "pipe", "torch.export")
    assert os.listdir(tmp_path) == ["pipe"] and (tmp_path / "pipe").is_fifo()


def test_where_nothing_can_be_written_the_file_is_named_not_its_draft(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device", str(source), None, str(target))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ValueError, match=r"/net.pt2 could not be written \(No space left on device\)"):
        export(network(), (3, 32, 32), tmp_path / "net.pt2", "torch.export")
    assert not os.listdir(tmp_path)

"""timm's results: read whole, kept by a schema, never compared across their own units; work counted, speed measured."""

import json
from pathlib import Path

import pytest
import record_compare as tool
import timm
import torch
from torch import nn

import convmixer_edu
from convmixer_edu.anatomy import count_parameters
from convmixer_edu.compare import (
    SOURCES, Result, count_cost, full_gmacs, images_per_second, published, recorded_speeds, source, timm_results, cost_of,
)
from convmixer_edu.model import PAPER_MODELS

FILE = Path(convmixer_edu.__file__).with_name("imagenet_timm.csv")


def test_every_row_is_read_best_first():
    rows = timm_results()
    assert len(rows) == len(FILE.read_text("utf8").splitlines()) - 1 > 100
    assert all(a.top1 >= b.top1 for a, b in zip(rows, rows[1:]))
    assert all(row.top1 <= row.top5 <= 100 for row in rows)
    assert all(f"{row.network}.{row.training}" == row.model for row in rows)


def test_the_convmixers_have_the_parameters_of_the_formula():
    rows = [row for row in timm_results() if row.network.startswith("convmixer")]
    assert len(rows) == 3
    for row in rows:
        h, d = map(int, row.network.split("_")[1:3])
        k, p, _ = PAPER_MODELS[h, d]
        assert row.param_count_m == pytest.approx(count_parameters(h, d, k, p) / 1e6, abs=0.01)
        assert full_gmacs(row) > row.gmacs
    assert [round(full_gmacs(row), 1) for row in rows] == [51.1, 20.7, 5.9]


def test_the_work_is_that_of_the_size_of_the_accuracy():
    row = published("deit_small_patch16_224.fb_in1k")  # counted at its own size
    assert row.gmacs_img_size == row.img_size and full_gmacs(row) == pytest.approx(row.gmacs, rel=0.01)


@pytest.mark.parametrize("model", ["resnet50.a1_in1k", "resnet152.a1h_in1k", "convnext_tiny.fb_in1k"])
def test_a_count_at_another_size_is_brought_back(model):
    row = published(model)
    assert row.img_size == 224 < row.gmacs_img_size
    counted = cost_of(row.network, 224)
    assert full_gmacs(row) == counted.macs / 1e9 < cost_of(row.network, row.gmacs_img_size).macs / 1e9
    assert counted.macs / 1e9 == pytest.approx(row.gmacs * (224 / row.gmacs_img_size) ** 2, rel=0.04)


def test_the_table_keeps_its_schema():
    """What the reader relies on: these columns, a number wherever it promises one, a model once at each image size."""
    rows = timm_results()
    assert FILE.read_text("utf8").splitlines()[0].split(",") == list(Result.__dataclass_fields__)
    assert len({(row.model, row.img_size) for row in rows}) == len(rows)
    for row in rows:
        for name, field in Result.__dataclass_fields__.items():
            value = getattr(row, name)
            assert isinstance(value, field.type), (row.model, name)
            assert value is None or (value if field.type is str else 0 < value <= (100 if name.startswith("top") else 1e9)), row.model


def test_an_unknown_row_is_named():
    with pytest.raises(KeyError, match="convmixer_9_9.in1k"):
        published("convmixer_9_9.in1k")
    with pytest.raises(KeyError, match="160 pixels"):
        published("convmixer_768_32.in1k", 160)


# ---------------------------------------------------------------- the work of any network

NETWORKS = {(row.network, row.gmacs_img_size): row for row in timm_results()}


@pytest.mark.parametrize("network, size", NETWORKS, ids=str)
def test_the_work_is_counted_as_timm_counts_it(network, size):
    """By fvcore's rules each of timm's figures comes out."""
    row, work = NETWORKS[network, size], cost_of(network, size)
    assert abs(work.timms / 1e9 - row.gmacs) <= 0.0051
    assert abs(work.parameters / 1e6 - row.param_count_m) <= 0.0051


def test_only_convmixer_is_counted_short():
    short = {network for (network, size), row in NETWORKS.items() if cost_of(network, size).macs / 1e9 > 1.02 * row.gmacs}
    assert short == {"convmixer_1536_20", "convmixer_768_32", "convmixer_1024_20_ks9_p14"}


def test_the_published_models_in_full_and_as_timm_publishes_them():
    for network, full, timms, parameters in (
            ("convmixer_1536_20", "51.10", "48.68", 51_625_960), ("convmixer_768_32", "20.68", "19.55", 21_110_248),
            ("convmixer_1024_20_ks9_p14", "5.95", "5.55", 24_383_464)):
        work = cost_of(network)
        assert (f"{work.macs / 1e9:.2f}", f"{work.timms / 1e9:.2f}", work.parameters) == (full, timms, parameters)


def test_the_work_of_attention_is_the_same_fused_or_not_and_the_model_is_left_as_it_was():
    plain = timm.create_model("deit_tiny_patch16_224")
    for block in plain.blocks:
        block.attn.fused_attn = False  # by two products
    plain.train()
    assert count_cost(plain) == cost_of("deit_tiny_patch16_224") and plain.training


def test_a_product_that_belongs_to_no_module_is_counted():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3, 5))

        def forward(self, x):
            return torch.einsum("bchw,cd->bdhw", x, self.w)

    assert count_cost(Odd(), 8).macs == 3 * 5 * 8 * 8


def test_every_row_and_column_has_a_source():
    measured = [name for name, field in Result.__dataclass_fields__.items() if name.startswith(("img_per_s", "train_img"))]
    assert set(measured) | {"top1", "top5", "top1_real", "top1_v2", "gmacs"} == set(SOURCES)
    assert all(source(row).startswith("timm/") for row in timm_results())
    assert source(published("convmixer_768_32.in1k")) == "timm/convmixer_768_32.in1k in results-imagenet.csv"


# ---------------------------------------------------------------- speed on this machine

SMALL = dict(batch_size=1, rounds=2, report=lambda text: None)


def test_a_race_goes_on_where_it_was_stopped(tmp_path):
    file, names = tmp_path / "race.json", ("resnet18", "test_convnext")
    begun = tool.measure(file, "cpu", 0, networks=names, parts=(), **SMALL)
    assert not begun["complete"] and begun["race"] == {"resnet18": []}
    assert recorded_speeds("cpu", tmp_path) is None
    half = tool.measure(file, "cpu", 60, networks=names[:1], parts=(), **SMALL)
    kept = half["race"]["resnet18"]
    whole = tool.measure(file, "cpu", 60, networks=names, parts=(), **SMALL)
    assert whole["complete"] and whole["race"]["resnet18"] == kept and len(whole["race"]["test_convnext"]) == 2
    assert json.loads(file.read_text()) == whole
    assert {"device", "threads", "torch", "timm", "commit", "command"} <= set(whole)
    file.rename(tmp_path / "compare-cpu.json")
    assert recorded_speeds("cpu", tmp_path) == whole


def test_a_record_of_another_machine_is_not_continued(tmp_path):
    file = tmp_path / "race.json"
    tool.measure(file, "cpu", 0, networks=("resnet18",), parts=(), **SMALL)
    file.write_text(file.read_text().replace('"threads": ', '"threads": 9'))
    with pytest.raises(ValueError, match="made with another threads"):
        tool.measure(file, "cpu", 0, networks=("resnet18",), parts=(), **SMALL)
    file.write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        tool.measure(file, "cpu", 0, networks=("resnet18",), parts=(), **SMALL)
    with pytest.raises(ValueError, match="no network 'resnet-fifty'"):
        tool.measure(tmp_path / "other.json", "cpu", 0, networks=("resnet-fifty",), parts=(), **SMALL)
    with pytest.raises(ValueError, match="no folder"):
        tool.measure(tmp_path / "gone" / "race.json", "cpu", 0, parts=(), **SMALL)


def test_images_per_second_are_medians_with_their_spread():
    record = {"batch_size": 8, "race": {"a": [2.0, 1.0, 4.0], "b": []}}
    assert images_per_second(record, "a") == (4.0, 2.0, 8.0)
    assert images_per_second(record, "b") is images_per_second(record, "c") is images_per_second(None, "a") is None


def test_the_fast_part_compares_equal_logits(monkeypatch):
    """With a small network in the place of the published one."""
    tiny = lambda name, device: tool.settled(
        timm.models.convmixer.ConvMixer(16, 2, 7, 7, act_layer=nn.ReLU), tool.photos(4))
    monkeypatch.setattr(tool, "_fresh", tiny)
    part = tool._fast_part({"batch_size": 2}, torch.device("cpu"), 5, lambda: 0.6, "drawn")
    assert 0 <= part["difference"] <= part["tolerance"] == 0.05 and part["difference_float32"] < 1e-5
    assert {name: len(t) for name, t in part["seconds"].items()} == dict.fromkeys(("timm", "ours", "eager", "folded"), 5)
    assert part["spread"][0] <= part["ratio"] <= part["spread"][1] and part["rounds"] == 5
    assert part["trained"]["difference"] <= 0.02
    assert part["trained"]["equal_answers"] >= 0.95 * part["trained"]["images"]


def test_the_latency_part_times_and_weighs(monkeypatch):
    part = tool._latency_part("ours", {}, torch.device("cpu"), 5, lambda: 4.0, "drawn")
    assert part["image_size"] == 32 and part["parameters"] == 594_186 and part["difference"] <= 0.02
    assert {"plain", "fastest"} <= set(part["seconds"]) and all(len(t) == 5 for t in part["seconds"].values())
    assert "onnx_missing" in part or part["onnx_bytes"] > 4 * part["parameters"] and part["onnx_difference"] <= 1e-4


def test_the_command_prints_and_says_when_there_is_more(tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "r.json"), "--device", "cpu", "--networks", "resnet18", "--parts", "--batch-size", "1"]
    tool.main([*arguments, "--seconds", "0"])
    assert "call again to go on" in capsys.readouterr().out
    tool.main([*arguments, "--seconds", "60"])
    told = capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["command"].startswith("python tools/record_compare.py --out ")
    assert "resnet18" in told and "images/s" in told and "call again" not in told

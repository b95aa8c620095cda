"""timm's results: read whole, refused when broken, and never compared across their own units."""

from pathlib import Path

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import convmixer_edu
from convmixer_edu.anatomy import count_parameters
from convmixer_edu.compare import full_gmacs, published, timm_results
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
    assert row.gmacs_img_size == row.img_size and full_gmacs(row) == row.gmacs


@pytest.mark.parametrize("model", ["resnet50.a1_in1k", "resnet152.a1h_in1k", "convnext_tiny.fb_in1k"])
def test_a_count_at_another_size_is_brought_back(model):
    row = published(model)
    assert row.img_size == 224 < row.gmacs_img_size
    with torch.device("meta"):
        network = timm.create_model(row.network).eval()
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, row.img_size, row.img_size))
    assert full_gmacs(row) == pytest.approx(counter.get_total_flops() / 2e9, rel=0.01)


@pytest.mark.parametrize("old, new, told", [
    ("top1,", "top,", "expected"), (",81.382,", ",181.382,", "at most 100"), (",81.382,", ",-1,", "positive"),
    (",51.63,", ",many,", "many"),
])
def test_a_broken_table_is_refused(tmp_path, old, new, told):
    (tmp_path / "t.csv").write_text(FILE.read_text("utf8").replace(old, new, 1))
    with pytest.raises(ValueError, match=told):
        timm_results(tmp_path / "t.csv")


def test_a_model_twice_is_refused(tmp_path):
    lines = FILE.read_text("utf8").splitlines()
    (tmp_path / "t.csv").write_text("\n".join([*lines, lines[-1]]) + "\n")
    with pytest.raises(ValueError, match="twice"):
        timm_results(tmp_path / "t.csv")


def test_an_unknown_row_is_named():
    with pytest.raises(KeyError, match="convmixer_9_9.in1k"):
        published("convmixer_9_9.in1k")
    with pytest.raises(KeyError, match="160 pixels"):
        published("convmixer_768_32.in1k", 160)

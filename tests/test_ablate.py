"""Ablations as data: one change each, none of the paper's missing, intervals that hold what they promise."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from scipy import stats

from convmixer_edu import ablate, ledger
from convmixer_edu.ablate import ARMS, CONTRASTS, PARTS, SCALES, Contrast, Estimate, combine, difference, estimate, judge, records
from convmixer_edu.anatomy import count_parameters
from convmixer_edu.claims import claim, claims
from convmixer_edu.model import ACTIVATIONS, NORMS, RESIDUALS, ConvMixer, variant
from convmixer_edu.recipe import PRESETS, Config, make_model

KEYS = {  # the settings that each part of Table 3 may change, and no other
    "no-residual": {"residual"}, "second-residual": {"residual"}, "layernorm": {"norm"}, "layernorm-place": {"norm"},
    "relu": {"activation"}, "no-mix": {"mixup", "cutmix"}, "no-erase": {"erase"}, "no-randaug": {"randaug_n"},
    "no-scale": {"crop_scale"}, "no-clip": {"clip"}}


@pytest.mark.parametrize("scale", SCALES)
def test_each_arm_differs_from_its_baseline_in_what_it_says_and_in_nothing_else(scale):
    base = asdict(ablate.baseline(scale))
    for arm in ARMS.values():
        whole = asdict(ablate.config(arm, scale, 3))
        differ = {name for name, value in whole.items() if value != base[name]}
        assert differ - {"seed"} == set(ablate.changes(arm, scale)) <= set(arm.change)
        assert whole["seed"] == 3
    for arm in PARTS:
        assert set(ablate.changes(arm, scale)) == KEYS[arm.name], arm.name


def test_the_papers_scale_is_the_papers_recipe():
    assert ablate.baseline("paper200") == PRESETS["paper200"]
    for arm in ARMS.values():
        assert ablate.changes(arm, "paper200") == {
            k: v for k, v in arm.change.items() if v != getattr(PRESETS["paper200"], k)}


def test_the_scale_light25_has_the_network_and_the_length_of_the_authors_light_script():
    base, light = ablate.baseline("light25"), PRESETS["light25"]
    for name in ("dim", "depth", "kernel_size", "patch_size", "epochs", "batch_size"):
        assert getattr(base, name) == getattr(light, name)


def test_no_arm_of_the_paper_is_missing():
    used = {arm.claim for arm in ARMS.values()} | {c.claim for table in CONTRASTS.values() for c in table}
    assert {id for id in claims() if id.startswith(("b1-", "b3-", "b4-"))} <= used
    assert used - {""} <= set(claims())
    contrasts = {c.arm for c in CONTRASTS[3]}
    assert contrasts == {arm.name for arm in PARTS}
    held = {name for c in CONTRASTS[4] for name in (c.arm, c.against)}
    assert {arm.name for arm in ablate.SIZES} <= held | {"256-8"}


def test_names_of_sizes_are_the_papers():
    for arm in ablate.SIZES:
        if not arm.claim:
            continue
        c, subject = ablate.config(arm, "paper200", 0), claim(arm.claim).subject
        for part in (f"{c.dim}/{c.depth}", f"p{c.patch_size}", f"k{c.kernel_size}"):
            assert part in subject, (arm.name, part)


@pytest.mark.parametrize("scale", ["paper200", "light25", "tiny"])
def test_rivals_have_the_size_and_the_depth_that_the_paper_gives_them(scale):
    same, deep, large = (ablate.config(ARMS[name], scale, 0) for name in ("10-k3", "24-k3", "k9"))
    counts = [count_parameters(c.dim, c.depth, c.kernel_size, c.patch_size, 10) for c in (same, large)]
    assert abs(counts[0]/counts[1] - 1) < 0.05
    assert deep.depth == 3*large.depth and (same.kernel_size, deep.kernel_size, large.kernel_size) == (3, 3, 9)


def test_two_arms_that_are_one_are_run_once():
    assert ablate.run_as(ARMS["k5"], "tiny").name == "baseline"
    assert ablate.run_as(ARMS["k5-p1"], "light25").name == "p1"
    assert ablate.run_as(ARMS["p1"], "paper200").name == ablate.run_as(ARMS["k9"], "paper200").name == "baseline"
    for scale in SCALES:
        for table in (3, 4, None):
            own = [json.dumps(ablate.changes(a, scale), sort_keys=True) for a in ablate.arms(table, scale)]
            assert len(set(own)) == len(own) and own[0] == "{}"
        assert {ablate.run_as(a, scale).name for a in ARMS.values()} == {a.name for a in ablate.arms(None, scale)}


def test_unknown_words_are_named():
    with pytest.raises(ValueError, match="no scale 'huge': expected one of paper200"):
        ablate.baseline("huge")
    with pytest.raises(ValueError, match="table is 5, expected 3 or 4"):
        ablate.arms(5, "tiny")


# the network with a part exchanged


@pytest.mark.parametrize("name, words", [("residual", RESIDUALS), ("norm", NORMS), ("activation", ACTIVATIONS)])
def test_parts_can_be_exchanged_and_unknown_ones_are_named(name, words):
    for word in words:
        model = make_model(replace(Config(dim=8, depth=2, kernel_size=3), **{name: word}), 10)
        assert model(torch.randn(2, 3, 8, 8)).shape == (2, 10)
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        assert all(w.grad is not None for w in model.parameters())
    with pytest.raises(ValueError, match=f"{name} is 'other', expected one of"):
        variant(8, 2, 3, 2, **{name: "other"})
    with pytest.raises(ValueError, match=f"{name} is 'other', expected one of"):
        replace(Config(), **{name: "other"})


def seeded(build, **parts):
    torch.manual_seed(0)
    return build(8, 2, 3, 2, 10, **parts)


def test_nothing_exchanged_is_the_six_lines():
    plain, same = seeded(ConvMixer), seeded(variant)
    assert str(plain) == str(same)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), same.state_dict().values(), strict=True))


@pytest.mark.parametrize("parts", [dict(norm="layer"), dict(norm="layer2d"), dict(activation="relu")])
def test_exchanged_norms_and_activations_keep_the_weights_and_their_names(parts):
    plain, other = seeded(ConvMixer), seeded(variant, **parts)
    weights = dict(other.named_parameters())
    assert weights.keys() == dict(plain.named_parameters()).keys()
    assert all(torch.equal(w, weights[name]) for name, w in plain.named_parameters())
    kinds = {type(m).__name__ for m in other.modules()}
    gone = "GELU" if "activation" in parts else "BatchNorm2d"
    assert gone not in kinds and gone in {type(m).__name__ for m in plain.modules()}


def by_hand(model, x, residual):
    """The block's wiring, written out."""
    x = model[2](model[1](model[0](x)))
    for block in model[3:-3]:
        parts = [m for m in block.modules() if not list(m.children())]
        places, channels = parts[:3], parts[3:]
        y = x
        for part in places:
            y = part(y)
        x = y if residual == "none" else x + y
        y = x
        for part in channels:
            y = part(y)
        x = x + y if residual == "both" else y
    return model[-1](x.mean((2, 3)))


@pytest.mark.parametrize("residual", RESIDUALS)
def test_residuals_go_around_what_they_say(residual):
    model, x = seeded(variant, residual=residual), torch.randn(3, 3, 8, 8)
    assert torch.allclose(model.eval()(x), by_hand(model, x, residual), atol=1e-6)
    others = [seeded(variant, residual=r).eval()(x) for r in RESIDUALS if r != residual]
    assert all((model(x) - other).abs().max() > 1e-3 for other in others)


def test_the_two_layer_norms_take_different_means():
    x = torch.randn(2, 8, 4, 4)
    image, place = NORMS["layer"](8)(x), NORMS["layer2d"](8)(x)
    assert image.mean((1, 2, 3)).abs().max() < 1e-6 < 1e-2 < image.mean(1).abs().max()
    assert place.mean(1).abs().max() < 1e-6


# means, differences and words


def test_an_interval_by_hand():
    found = estimate([1.0, 2.0, 3.0])
    half = 4.302652729911275*1/math.sqrt(3)  # Student's t with two degrees of freedom
    assert found.n == 3 and math.isclose(found.half, half, rel_tol=1e-9) and math.isclose(found.mean, 2)
    assert math.isinf(estimate([5.0]).half) and "?" in str(estimate([5.0]))


def test_a_difference_by_hand():
    a, b = [1.0, 2.0, 3.0, 6.0], [0.0, 0.5, 1.0]
    found = difference(a, b)
    va, vb = np.var(a, ddof=1)/4, np.var(b, ddof=1)/3
    df = (va + vb)**2/(va**2/3 + vb**2/2)
    assert 3 < df < 4  # between the tabled 3.182 and 2.776
    width = found.half/math.sqrt(va + vb)
    assert 2.776 < width < 3.182 and math.isclose(found.mean, 2.5) and found.n == 3
    turned = difference(b, a)
    assert math.isclose(turned.mean, -found.mean) and math.isclose(turned.low, -found.high)


def test_a_difference_is_scipys():
    draw = np.random.default_rng(0)
    for n, m in ((2, 2), (3, 5), (10, 4)):
        a, b = list(draw.normal(1, 2, n)), list(draw.normal(0, 1, m))
        told = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
        assert np.allclose([difference(a, b).low, difference(a, b).high], told)


def test_a_difference_of_differences():
    a, b, c, d = [1.0, 2.0, 3.0], [0.0, 0.5, 1.0], [4.0, 4.2, 4.1], [1.0, 1.5, 2.0]
    found = combine([a, b, c, d], (1, -1, -1, 1))
    assert math.isclose(found.mean, (2 - 0.5) - (4.1 - 1.5))
    assert found.half > difference(a, b).half/2 and combine([a], (1,)).half == pytest.approx(estimate(a).half)
    assert combine([a, b], (2, -2)).half == pytest.approx(2*difference(a, b).half)


@pytest.mark.parametrize("n", [3, 5])
def test_95_of_100_intervals_hold_the_truth(n):
    draw, held, times = np.random.default_rng(0), 0, 2000
    for _ in range(times):
        found = difference(list(draw.normal(1.0, 1.0, n)), list(draw.normal(0.0, 0.5, n)))
        held += found.low <= 1.0 <= found.high
    assert 0.935 < held/times < 0.985  # Welch with so few runs is a little careful


def test_a_single_run_and_runs_without_spread():
    alone = difference([3.0], [1.0, 2.0])
    assert alone.mean == 1.5 and math.isinf(alone.high) and judge(alone, 1.5, "paper200") == "not resolved"
    assert difference([2.0, 2.0], [1.0, 1.0]) == Estimate(1.0, 1.0, 1.0, 2)


@pytest.mark.parametrize("low, high, paper, scale, word", [
    (0.5, 1.5, 1.0, "paper200", "match"), (0.5, 1.5, 2.0, "paper200", "differs"),
    (-0.5, 1.5, 1.0, "paper200", "not resolved"), (-1.5, 0.5, 1.0, "paper200", "differs"),
    (0.5, 1.5, 9.0, "tiny", "same direction"), (0.5, 1.5, -9.0, "light25", "other direction"),
    (-0.5, 1.5, 9.0, "tiny", "not resolved"), (0.5, 1.5, None, "tiny", "resolved here only"),
    (-0.5, 1.5, None, "tiny", "not resolved"), (-1.5, -0.5, None, "paper200", "resolved here only"),
    (0.5, 1.5, 0.04, "tiny", "resolved here only"), (0.5, 1.5, -0.47, "tiny", "resolved here only"),
    (0.5, 1.5, 0.5, "light25", "same direction"), (0.02, 0.08, 0.04, "paper200", "match")])
def test_words_follow_the_rule(low, high, paper, scale, word):
    assert judge(Estimate((low + high)/2, low, high, 5), paper, scale) == word


def test_luck_is_twice_the_spread_of_a_difference_of_two_runs():
    assert ablate.LUCK == round(2*math.sqrt(2)*claim("o-seed-noise").number, 2)


def test_no_run_no_word():
    assert judge(None, 1.0, "tiny") == "not run"
    assert ablate.measured(Contrast("relu", "baseline"), "tiny", {}) is None


# records


def fake(folder, arm, seed, scale="try", **changes):
    """A sealed record with another result or recipe than a run would give."""
    run = folder/"run"
    run.mkdir(parents=True)
    words = dict.fromkeys(("device", "precision", "python", "torch", "commit"), "x")
    numbers = dict.fromkeys(("test_loss", "test_images", "steps", "images_per_second", "threads"), 1)
    told = {**words, **numbers, "classes": ["a", "b"], "test_confusion": [],
            "test_accuracy": 50.0, "seconds": 1.0, "train_fingerprint": "a", "test_fingerprint": "b",
            "config": asdict(ablate.config(ARMS[arm], scale, seed)), **changes}
    (run/"run.json").write_text(json.dumps(told))
    (run/"config.json").write_text("{}")
    (run/"metrics.jsonl").write_text("")
    ledger.archive(run, f"{arm}-seed{seed}", "none", into=folder/scale)
    for file in run.iterdir():
        file.unlink()
    run.rmdir()


def test_records_are_grouped_by_arm_and_sorted_by_seed(tmp_path):
    for seed in (10, 2):
        fake(tmp_path, "relu", seed, test_accuracy=40.0 + seed)
    fake(tmp_path, "no-clip", 0, failed="the loss became nan")
    found = records("try", tmp_path)
    assert [run["config"]["seed"] for run in found["relu"]] == [2, 10]
    assert ablate.accuracies("relu", "try", found) == [42.0, 50.0]
    assert len(found["no-clip"]) == 1 and ablate.accuracies("no-clip", "try", found) == []
    assert records("tiny", tmp_path) == {}


def test_a_record_of_another_recipe_is_named(tmp_path):
    fake(tmp_path, "relu", 0, config={**asdict(ablate.config(ARMS["relu"], "try", 0)), "lr": 0.5})
    with pytest.raises(ValueError, match=r"another recipe: lr \(0.5 there, 0.01 expected\)"):
        records("try", tmp_path)


def test_records_of_other_images_are_named(tmp_path):
    fake(tmp_path, "relu", 0)
    fake(tmp_path, "relu", 1, train_fingerprint="other")
    with pytest.raises(ValueError, match="relu-seed0 and relu-seed1 in .* other images"):
        records("try", tmp_path)


def test_a_folder_that_is_no_arm_is_named(tmp_path):
    fake(tmp_path, "relu", 0)
    (tmp_path/"try/relu-seed0").rename(tmp_path/"try/tanh-seed0")
    with pytest.raises(ValueError, match="tanh-seed0 is no run of an arm"):
        records("try", tmp_path)


def test_a_result_edited_by_hand_is_found(tmp_path):
    fake(tmp_path, "relu", 0)
    file = tmp_path/"try/relu-seed0/run.json"
    file.write_text(file.read_text().replace("50.0", "50.1"))
    with pytest.raises(ValueError, match="relu-seed0 was changed"):
        records("try", tmp_path)


def test_the_books_own_runs_are_whole():
    found = records("tiny")
    assert {name for arm in ablate.arms(3, "tiny") if len(found[name := arm.name]) >= 5} == {
        arm.name for arm in ablate.arms(3, "tiny")}
    assert all(len(found[arm.name]) >= 3 for arm in ablate.arms(4, "tiny"))
    for runs in found.values():
        assert [run["config"]["seed"] for run in runs] == list(range(len(runs)))
        for run in runs:
            assert len(run["metrics"]) == run["config"]["epochs"] and run["test_images"] == 10_000
            counts = run["test_confusion"]
            right = sum(row[i] for i, row in enumerate(counts))
            assert abs(100*right/run["test_images"] - run["test_accuracy"]) < 1e-2
            assert "held_out_accuracy" not in run["metrics"][-1]  # nothing was chosen in these runs

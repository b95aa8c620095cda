"""The relatives against timm's, what they refuse, and the recorded race between them."""

import json

import pytest
import record_siblings
import torch
from conftest import ROOT
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from convmixer_edu.data import ImageSet
from convmixer_edu.isotropic import Branch, MLPMixer, ResMLP, ViT, copy_from_timm

SIZES = [  # (h, d, p, side, n, c)
    (12, 1, 1, 4, 2, 1), (24, 3, 2, 10, 10, 3), (48, 2, 4, 32, 7, 3), (36, 2, 7, 28, 5, 4)]
RESULTS = ROOT / "results" / "siblings"
RACE = sorted(RESULTS.glob("*-seed*.json"))


def timms(kind, h, d, p, side, n, c, ratio, heads=3):
    """Build timm's model of one kind, without class token, with the mean over the places."""
    same = dict(img_size=side, patch_size=p, num_classes=n, in_chans=c, embed_dim=h)
    if kind is ViT:
        return VisionTransformer(**same, depth=d, num_heads=heads, mlp_ratio=ratio, class_token=False,
                                 global_pool="avg", fc_norm=False)
    if kind is MLPMixer:
        return MlpMixer(**same, num_blocks=d, mlp_ratio=(0.5, ratio))
    return MlpMixer(**same, num_blocks=d, mlp_ratio=ratio, block_layer=ResBlock, norm_layer=Affine)


def ours(kind, h, d, p, side, n, c, ratio, heads=3):
    """Build our model of the same kind and sizes."""
    more = {ViT: dict(heads=heads, ratio=ratio), MLPMixer: dict(ratios=(0.5, ratio)), ResMLP: dict(ratio=ratio)}[kind]
    return kind(h, d, patch_size=p, image_size=side, num_classes=n, in_chans=c, **more)


@pytest.mark.parametrize("kind", [ViT, MLPMixer, ResMLP])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("ratio", [2, 4])
def test_each_equals_timms(kind, sizes, ratio):
    for seed in range(20):  # up to a network whose answers differ, whatever this version of torch draws
        torch.manual_seed(seed)
        mine, other = ours(kind, *sizes, ratio).eval(), timms(kind, *sizes, ratio).eval()
        for weight in other.parameters():  # a layer at its first value, such as 1e-4, would hide an error
            nn.init.normal_(weight, std=0.2)
        x = torch.randn(3, sizes[5], sizes[3], sizes[3])
        with torch.no_grad():
            expected = other(x)
        if expected.std() > 0.05:
            break
    assert sum(w.numel() for w in mine.parameters()) == sum(w.numel() for w in other.parameters())
    with torch.no_grad():
        assert expected.std() > 0.05 and (mine(x) - expected).abs().max() > 1e-2
        assert (copy_from_timm(mine, other)(x) - expected).abs().max() <= 1e-5


def test_resmlp_starts_as_timms():
    mine, other = ResMLP(24, 2, image_size=8), timms(ResMLP, 24, 2, 4, 8, 10, 3, 4)
    scales = {float(part.scale[0].detach()) for part in mine.modules() if isinstance(part, Branch)}
    assert scales == {float(other.blocks[0].ls1[0].detach())} and next(iter(scales)) == pytest.approx(1e-4)


@pytest.mark.parametrize("build, told", [
    (lambda: timms(ViT, 24, 2, 4, 16, 10, 3, 4), "nothing here"),  # deeper than ours
    (lambda: timms(ViT, 24, 1, 4, 8, 10, 3, 4), "stem.position"),  # fewer places
    (lambda: timms(ViT, 24, 1, 4, 16, 10, 3, 2), "channels.fn"),  # a narrower MLP
    (lambda: VisionTransformer(img_size=16, patch_size=4, num_classes=10, embed_dim=24, depth=1, num_heads=3), "same kind"),
    (lambda: timms(MLPMixer, 24, 1, 4, 16, 10, 3, 4), "build both with the same"),  # another kind
])
def test_weights_that_do_not_fit_are_refused_and_nothing_is_copied(build, told):
    mine = ours(ViT, 24, 1, 4, 16, 10, 3, 4)
    before = {name: weight.clone() for name, weight in mine.state_dict().items()}
    with pytest.raises(ValueError, match=told):
        copy_from_timm(mine, build())
    assert all(torch.equal(weight, before[name]) for name, weight in mine.state_dict().items())


@pytest.mark.parametrize("build, told", [
    (lambda: ViT(0, 1), "dim must be a whole number"), (lambda: ViT(10, 1, heads=3), "dim is 10, which 3 heads"),
    (lambda: ViT(12, 1, heads=0), "heads must be"), (lambda: MLPMixer(8, 1, patch_size=5), "image_size is 32"),
    (lambda: ResMLP(8, 1.5), "depth must be"), (lambda: ResMLP(8, 1, image_size=-4), "image_size must be"),
])
def test_sizes_that_make_no_network_are_named(build, told):
    with pytest.raises(ValueError, match=told):
        build()


def test_shuffling_the_world_moves_whole_patches():
    x = torch.arange(2 * 3 * 64.0).view(2, 3, 8, 8)
    y = record_siblings.Shuffle(4, 8)(x)
    patches = {tuple(p.flatten().tolist()) for p in x.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)[0, 0]}
    moved = {tuple(p.flatten().tolist()) for p in y.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)[0, 0]}
    assert patches == moved and not torch.equal(x, y) and y.shape == x.shape


def test_a_race_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (160, 3, 32, 32), dtype=torch.uint8, generator=generator)
    data = ImageSet(images, torch.arange(160) % 10, tuple("0123456789"))
    monkeypatch.setattr(record_siblings, "load_images", lambda source, split, limit=None: data)
    monkeypatch.setattr(record_siblings, "LADDER", (0.002, 0.006, 0.02))
    two = {arm: record_siblings.SCALES["quick"][2][arm] for arm in record_siblings.SHUFFLED}
    monkeypatch.setitem(record_siblings.SCALES, "quick", (0.2, 0.1, two))
    monkeypatch.setattr(record_siblings.pace, "__defaults__", (2, 2))
    call = ["--out", str(tmp_path), "--seeds", "1", "--device", "cpu"]
    record_siblings.main([*call, "--budget", "0"])
    assert "stopped before ConvMixer-0.001-0.006:" in capsys.readouterr().out
    assert [file.name for file in tmp_path.rglob("*.json")] == ["pace.json"]
    with pytest.raises(SystemExit, match="--part race first"):
        record_siblings.main([*call, "--part", "shuffled"])
    record_siblings.main(call)
    files = {file: file.read_bytes() for file in sorted(tmp_path.rglob("*.json"))}
    assert {file.relative_to(tmp_path).as_posix() for file in files} == {
        *(f"rates/{arm}-{eps}-{lr}.json" for arm in two for eps in ("0.001", "1e-08") for lr in (0.002, 0.006, 0.02)),
        "pace.json", *(f"{arm}-seed0.json" for arm in two)}
    trial = json.loads((tmp_path / "rates" / "MLP-Mixer-1e-08-0.002.json").read_text())
    assert trial["eps"] == 1e-8 and "test_accuracy" not in trial, "a trial looks at held-out images alone"
    record_siblings.main(call)
    assert {file: file.read_bytes() for file in sorted(tmp_path.rglob("*.json"))} == files
    record_siblings.main([*call, "--part", "shuffled"])
    run = json.loads((tmp_path / "shuffled" / "MLP-Mixer-seed0.json").read_text())
    assert run["shuffled"] and run["steps"] > 0 and 0 <= run["test_accuracy"] <= 100 and "--part shuffled" in run["command"]


@pytest.mark.parametrize("best", range(7))
def test_a_rate_is_chosen_between_its_neighbours(best):
    tried = {}
    while following := record_siblings.next_trial(tried):
        tried[following] = -abs(record_siblings.LADDER.index(following[1]) - best)
    for eps in record_siblings.EPS:
        rates = [lr for e, lr in tried if e == eps]
        assert {record_siblings.LADDER[i] for i in (best - 1, best, best + 1) if 0 <= i < 7} <= set(rates) and len(rates) <= 5


@pytest.mark.skipif(not RACE, reason="no race is recorded")
def test_the_recorded_race_is_fair():
    runs = [json.loads(file.read_text()) for file in RACE]
    arms = {run["arm"]: [r for r in runs if r["arm"] == run["arm"]] for run in runs}
    assert set(arms) == {"ConvMixer", "ViT", "MLP-Mixer", "ResMLP"}
    assert len({tuple(sorted(r["seed"] for r in found)) for found in arms.values()}) == 1, "the same seeds for each arm"
    for same in ("device", "threads", "torch", "precision", "train_fingerprint", "train_images", "scale"):
        assert len({run[same] for run in runs}) == 1, same
    sizes = [run["parameters"] for run in runs]
    assert max(sizes) <= 1.05 * min(sizes)
    took = json.loads((RESULTS / "pace.json").read_text())["seconds_a_step"]
    for run in runs:
        assert run["steps"] == round(record_siblings.SCALES[run["scale"]][0] / took[run["arm"]]), "a minute's steps"
    build = record_siblings.SCALES[runs[0]["scale"]][2]
    for arm, found in arms.items():
        assert sum(w.numel() for w in build[arm]().parameters()) == found[0]["parameters"]
        for run in found:
            chosen = max(run["tried"], key=lambda trial: trial["accuracy"])
            assert (run["eps"], run["lr"]) == (chosen["eps"], chosen["lr"]) and run["shuffled"] is False
            assert 10 < run["test_accuracy"] < 100 and len(run["history"]) >= 9
        tried = record_siblings.trials(RESULTS, arm)
        assert record_siblings.next_trial(tried) is None, "the best rate has a neighbour on either side"
        assert tried == {(t["eps"], t["lr"]): t["accuracy"] for t in found[0]["tried"]}

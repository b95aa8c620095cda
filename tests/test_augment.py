"""Augmentation: every operation against Pillow, timm and torchvision, and the draws themselves."""

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms.autoaugment as light
from PIL import Image
from scipy.stats import chisquare
from sklearn.datasets import load_sample_images
from timm.data import auto_augment as paper
from timm.data import Mixup, create_transform
from timm.data.mixup import mixup_target
from torch.nn import functional as F
from torchvision.transforms import ColorJitter, InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as TF

from convmixer_edu import augment
from convmixer_edu.augment import (
    OPS,
    POLICIES,
    Augment,
    apply_ops,
    draw_ops,
    normalize,
)

FILL = (125, 123, 114)  # grey values


def randaug(n, m, spread=0.0, policy="torchvision"):
    """RandAugment alone."""
    return Augment(flip=False, randaug_n=n, randaug_m=m, randaug_spread=spread, randaug_policy=policy)


def erased(images, p, g=None, mode="pixel"):
    """Random erasing alone."""
    return Augment(erase=p, erase_mode=mode).finish(images, torch.zeros(len(images)).long(), 1, g)[0]


def mix(images, labels, count, mixup=0.0, cutmix=0.0, smoothing=0.0, generator=None):
    """Mixing alone."""
    return Augment(mixup=mixup, cutmix=cutmix, smoothing=smoothing).finish(images, labels, count, generator)


@pytest.fixture(scope="module")
def tiles():
    """70 real colour pictures of 32 by 32, cut from two photographs that ship with scikit-learn."""
    pictures = []
    for photo in load_sample_images().images:
        small = Image.fromarray(photo).resize((224, 160), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)
        cut = pixels.unfold(1, 32, 32).unfold(2, 32, 32)  # (3, 5, 7, 32, 32)
        pictures.append(cut.permute(1, 2, 0, 3, 4).reshape(-1, 3, 32, 32))
    return torch.cat(pictures)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def to_pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy() if len(image) == 3 else image[0].numpy())


def to_tensor(picture):
    pixels = torch.from_numpy(np.array(picture))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def one_op(images, name, arg=0.0, **options):
    ops = torch.full((len(images),), OPS.index(name))
    return apply_ops(images, ops, torch.full((len(images),), float(arg)), **options)


def close(ours, theirs, share):
    """At most one grey level apart, in at most this share of the values."""
    off = (ours.int() - theirs.int()).abs()
    assert off.max() <= 1 and (off > 0).double().mean() <= share, (off.max(), (off > 0).double().mean())


# Operation, the function of timm's, arguments, and the share of values that may be one grey level off:
# Pillow cuts bilinear sums off in float64, grid_sample adds them up in float32.
TIMM = [
    ("AutoContrast", paper.auto_contrast, [()], 0.01),
    ("Equalize", paper.equalize, [()], 0),
    ("Invert", paper.invert, [()], 0),
    ("Posterize", paper.posterize, [(0,), (1,), (4,), (8,)], 0),
    ("Solarize", paper.solarize, [(0,), (26,), (128,), (256,)], 0),
    ("SolarizeAdd", paper.solarize_add, [(0,), (50,), (99,), (110,)], 0),
    ("Color", paper.color, [(0.1,), (1.0,), (1.81,)], 0.001),
    ("Contrast", paper.contrast, [(0.1,), (1.0,), (1.81,)], 0.001),
    ("Brightness", paper.brightness, [(0.1,), (1.0,), (1.81,)], 0.001),
    ("Sharpness", paper.sharpness, [(0.1,), (1.0,), (1.81,)], 0.001),
    ("Rotate", paper.rotate, [(-30.0,), (7.3,), (27.0,)], 0.01),
    ("ShearX", paper.shear_x, [(-0.3,), (0.27,)], 0.01),
    ("ShearY", paper.shear_y, [(-0.3,), (0.27,)], 0.01),
    ("TranslateX", paper.translate_x_rel, [(-0.45,), (0.405,)], 0.02),
    ("TranslateY", paper.translate_y_rel, [(-0.45,), (0.405,)], 0.02),
]


@pytest.mark.parametrize("name, theirs, arguments, share", TIMM, ids=[row[0] for row in TIMM])
def test_operation_is_timms(tiles, name, theirs, arguments, share):
    options = {"fillcolor": FILL, "resample": Image.Resampling.BILINEAR}
    for args in arguments:
        expected = torch.stack([to_tensor(theirs(to_pil(t), *args, **options)) for t in tiles])
        close(one_op(tiles, name, *args, fill=tuple(v / 255 for v in FILL)), expected, share)


def test_operations_of_timm_are_all_there():
    rename = {"TranslateXRel": "TranslateX", "TranslateYRel": "TranslateY"}
    theirs = {rename.get(n, n).removesuffix("Increasing") for n in paper._RAND_INCREASING_TRANSFORMS}
    assert theirs == set(POLICIES["timm"].ranges) == {row[0] for row in TIMM}


@pytest.mark.parametrize("m", [0, 3, 5, 9, 10])
def test_timm_arguments(m):
    """The argument that each magnitude means is timm's, for both directions of the coin."""
    ops, args = draw_ops(4000, randaug(1, m, policy="timm"), rng())
    for name in POLICIES["timm"].ranges:
        long = name + ("Rel" if name.startswith("Translate") else "")
        long += "Increasing" if long + "Increasing" in paper.LEVEL_TO_ARG else ""
        level_fn, mine = paper.LEVEL_TO_ARG[long], args[ops == OPS.index(name)]
        if level_fn is None:
            continue
        theirs = {round(float(level_fn(m, {})[0]), 5) for _ in range(60)}
        mine = np.ceil(mine) if name in ("Posterize", "Solarize") else mine
        assert {round(v, 5) for v in mine.tolist()} == theirs, name


@pytest.mark.parametrize("name", sorted(set(POLICIES["torchvision"].ranges) - {"Identity"}))
def test_operation_is_torchvisions(tiles, name):
    space = light.RandAugment()._augmentation_space(31, (32, 32))
    start, end = POLICIES["torchvision"].ranges[name]
    for m in (0, 5, 12, 30):
        bins, _ = space[name]
        value = float(bins[m]) if bins.ndim else 0.0
        expected = torch.stack([
            to_tensor(light._apply_op(to_pil(t), name, value, InterpolationMode.NEAREST, None)) for t in tiles
        ])
        # A move to the right looks to the left. With a coin for the sign, the draws are the same.
        level = -m / 30 if name.startswith("Translate") else m / 30
        ours = one_op(tiles, name, start + level * (end - start), nearest=True, fill=0.0)
        off = (ours.int() - expected.int()).abs() > 1
        # a look exactly between two pixels (a shear of 0.12 at row 12: one row of 32) may fall to either
        assert off.double().mean() <= (1 / 32 if name.startswith("Shear") else 0.002), (name, m)


def test_operations_of_torchvision_are_all_there():
    assert set(light.RandAugment()._augmentation_space(31, (32, 32))) == set(POLICIES["torchvision"].ranges)


@pytest.mark.parametrize("name", [n for n in OPS if n != "Color"])
def test_grey_images(tiles, name):
    """One channel: the same as Pillow on a grey picture; Color has nothing to change."""
    grey = torch.stack([to_tensor(to_pil(t).convert("L")) for t in tiles[:8]])
    assert torch.equal(one_op(grey, "Color", 0.3), grey)
    match = [row for row in TIMM if row[0] == name]
    for _, theirs, arguments, share in match:
        expected = torch.stack([
            to_tensor(theirs(to_pil(t), *arguments[0], fillcolor=100, resample=Image.Resampling.BILINEAR))
            for t in grey
        ])
        close(one_op(grey, name, *arguments[0], fill=100 / 255), expected, max(share, 0.02))
    assert one_op(grey, name, 1.0).shape == grey.shape


@pytest.mark.parametrize("size", [(20, 28), (7, 5), (1, 9), (2, 2), (97, 61)])
def test_operations_are_timms_at_any_size(size):
    """Not square, odd, thinner than a kernel; many levels, few, and steps of brightness."""
    (h, w), n = size, 3 * size[0] * size[1]
    images = torch.stack([torch.randint(low, high, (3, h, w), dtype=torch.uint8, generator=rng(high))
                          for low, high in ((0, 256), (100, 103), (250, 256))] + [(torch.arange(n) * 255 // n).view(3, h, w).byte()])
    for name, theirs, arguments, _ in TIMM:
        expected = torch.stack([to_tensor(theirs(to_pil(t), *arguments[-1], fillcolor=FILL, resample=Image.Resampling.BILINEAR))
                                for t in images])
        close(one_op(images, name, *arguments[-1], fill=tuple(v / 255 for v in FILL)), expected, 0.1)


@pytest.mark.parametrize("way", ["channels last", "every second", "one for all"])
def test_the_layout_in_memory_is_no_matter(way):
    wide = torch.randint(0, 256, (6, 3, 14, 20), dtype=torch.uint8, generator=rng())
    images = {"channels last": wide.contiguous(memory_format=torch.channels_last), "every second": wide[::2, :, ::2, ::2],
              "one for all": wide[:1].expand(6, -1, -1, -1)}[way]
    count = len(images)
    ops, labels = torch.arange(count) * 3, torch.arange(count)
    recipe = Augment(0.5, randaug_n=2, randaug_m=9, randaug_policy="timm", jitter=0.2, erase=1.0, mixup=0.5, cutmix=0.5)
    for call in (lambda x: apply_ops(x, ops, torch.ones(count)), lambda x: recipe(x, rng()), lambda x: normalize(x, (0.5,) * 3, (0.2,) * 3),
                 lambda x: recipe.finish(normalize(x, (0.5,) * 3, (0.2,) * 3), labels, count, rng())[0]):
        assert torch.equal(call(images), call(images.contiguous()))


@pytest.mark.parametrize("value", [0, 7, 255])
@pytest.mark.parametrize("name", ["AutoContrast", "Equalize", "Color", "Contrast", "Sharpness"])
def test_constant_images_stay(name, value):
    flat = torch.full((3, 3, 8, 8), value, dtype=torch.uint8)
    assert (one_op(flat, name, 1.7).int() - flat.int()).abs().max() == 0


@pytest.mark.parametrize("side", [(5, 7), (20, 28), (96, 96), (224, 224)])
@pytest.mark.parametrize("nearest", [False, True])
def test_an_operation_not_drawn_changes_nothing(side, nearest):
    """The identity's numbers leave all bytes as they are, at any size."""
    images = torch.randint(0, 256, (2, 3, *side), dtype=torch.uint8, generator=rng())
    assert torch.equal(one_op(images, "Identity", 0.7, nearest=nearest), images)
    beside = apply_ops(images, torch.tensor([OPS.index("Rotate"), 0]), torch.tensor([20.0, 3.0]), nearest)
    assert torch.equal(beside[1], images[1]) and not torch.equal(beside[0], images[0])


@pytest.mark.parametrize("alphas", [(0.5, 0.0), (0.0, 0.5), (0.5, 0.5)])
def test_mix_is_timms(tiles, alphas):
    images, labels = tiles.float()[:64], torch.arange(64) % 5
    for seed in range(12):
        ours = mix(images, labels, 5, *alphas, 0.1, rng(seed))
        np.random.seed(int(torch.randint(2**31, (), generator=rng(seed))))
        theirs = Mixup(*alphas, label_smoothing=0.1, num_classes=5)(images.clone(), labels)
        assert torch.allclose(ours[0], theirs[0], atol=1e-4) and torch.equal(ours[1], theirs[1])


# ---------------------------------------------------------------- draws


@pytest.mark.parametrize("policy, m, spread", [("timm", 9, 0.5), ("torchvision", 12, 0.0)])
def test_every_sample_has_its_own_draw(tiles, policy, m, spread):
    same = tiles[11:12].expand(512, -1, -1, -1)
    out = randaug(2, m, spread, policy)(same, rng())
    assert len(out.flatten(1).unique(dim=0)) >= 200


@pytest.mark.parametrize("policy, m", [("timm", 9), ("torchvision", 12)])
def test_operations_are_equally_likely(policy, m):
    n, chosen = 30_000, POLICIES[policy]
    ops, _ = draw_ops(n, randaug(1, m, policy=policy), rng())
    seen = np.bincount(ops, minlength=len(OPS))
    share = chosen.prob / len(chosen.ranges)
    expected = np.array([n * share * (name in chosen.ranges) for name in OPS])
    expected[0] += n * (1 - chosen.prob)
    used = expected > 0
    assert not seen[~used].any()
    assert chisquare(seen[used], expected[used] * (n / expected.sum())).pvalue > 1e-3


def test_directions_and_spread():
    ops, args = draw_ops(20_000, randaug(1, 9, 0.5, "timm"), rng())
    turns = args[ops == OPS.index("Rotate")]
    assert abs((turns > 0).mean() - 0.5) < 0.06
    assert abs(abs(turns).mean() - 27) < 0.3 and abs(abs(turns).std() - 1.5) < 0.3
    assert abs(turns).max() <= 30  # cut off at the policy's top


FUNCTIONS = {
    "crop": Augment(0.3, flip=False),
    "flip": Augment(),
    "timm": randaug(2, 9, 0.5, "timm"),
    "torchvision": randaug(2, 12),
    "jitter": Augment(flip=False, jitter=0.2),
    "all": Augment(0.5, randaug_n=1, randaug_m=8, jitter=0.1),
}


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (7, 3, 32, 32), (5, 1, 8, 8), (4, 3, 20, 32), (3, 1, 2, 2)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_shape_and_type_stay(name, shape):
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng())
    before = images.clone()
    out = FUNCTIONS[name](images, rng(1))
    assert out.shape == images.shape and out.dtype == torch.uint8
    assert torch.equal(images, before)  # the batch given is left alone


@pytest.mark.parametrize("name", FUNCTIONS)
def test_only_the_generator_decides(tiles, name):
    def run(seed, world):
        torch.manual_seed(world)
        np.random.seed(world)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        out = FUNCTIONS[name](tiles, rng(seed))
        assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()
        return out

    assert torch.equal(run(5, 1), run(5, 2))
    assert not torch.equal(run(5, 1), run(6, 1))


# ---------------------------------------------------------------- crop and flip


def test_crop_is_torchvisions_on_the_same_box(tiles):
    scale, ratio, n = (0.3, 1.0), (3 / 4, 4 / 3), len(tiles)
    out = Augment(0.3, flip=False)(tiles, rng(2))
    g = rng(2)
    sides, start, fits = augment._boxes(scale, ratio, (32, 32), g, n)
    assert fits.all()
    boxes = np.concatenate([start, sides]).T.astype(int).tolist()
    expected = torch.stack([
        to_tensor(TF.resized_crop(to_pil(t), *box, [32, 32], InterpolationMode.BILINEAR)) for t, box in zip(tiles, boxes)
    ])
    close(out, expected, 0.15)  # Pillow rounds twice, once for each axis


def test_where_a_border_cannot_be_asked_for_it_goes_on_too():
    """Apple's grid_sample knows no padding_mode="border" before PyTorch 2.13."""
    class OnApples(torch.Tensor):
        device = SimpleNamespace(type="mps")

    images, places = 255 * torch.rand(2, 3, 5, 7), 2.6 * torch.rand(2, 5, 7, 2) - 1.3
    theirs = F.grid_sample(images, places, padding_mode="border", align_corners=False)
    ours = augment._look_up(images.as_subclass(OnApples), places)
    assert (ours.as_subclass(torch.Tensor) - theirs).abs().max() < 1e-3


def test_crop_boxes_are_drawn_as_published():
    (h, w), _, fits = augment._boxes((0.25, 1.0), (3 / 4, 4 / 3), (64, 64), rng(), 20_000)
    assert fits.mean() > 0.99
    h, w = h[fits], w[fits]
    area, log_ratio = h * w / 64**2, np.log(w / h)
    assert area.min() > 0.24 and area.max() <= 1 and abs(log_ratio).max() < math.log(4 / 3) + 0.05
    assert abs(log_ratio.mean()) < 0.01
    # Large boxes of odd shape fit more rarely, so the mean lies below the middle: as much below as torchvision's.
    torch.manual_seed(0)
    picture, theirs = Image.new("L", (64, 64)), []
    for _ in range(3000):
        _, _, height, width = RandomResizedCrop.get_params(picture, [0.25, 1.0], [3 / 4, 4 / 3])
        theirs.append(height * width / 64**2)
    assert abs(area.mean() - sum(theirs) / len(theirs)) < 0.015


def test_crop_that_never_fits_is_the_largest_centred_one():
    tall = torch.arange(64, dtype=torch.uint8).view(1, 1, 64, 1).expand(2, 1, 64, 4).contiguous()
    out = Augment(0.99, (1.0, 1.0), flip=False)(tall, rng())  # only a 4 by 4 square would do
    assert out.min() >= 30 and out.max() <= 33


def test_flip_mirrors_about_half(tiles):
    many = tiles[:1].expand(2000, -1, -1, -1)
    out = Augment()(many, rng())
    mirrored = (out == many.flip(-1)).flatten(1).all(1)
    assert ((out == many).flatten(1).all(1) ^ mirrored).all()
    assert abs(mirrored.double().mean() - 0.5) < 0.04


# ---------------------------------------------------------------- jitter


def test_jitter_is_torchvisions_range(tiles):
    same = tiles[5:6].expand(400, -1, -1, -1)
    ours = Augment(flip=False, jitter=0.2)(same, rng()).double().mean((1, 2, 3))
    torch.manual_seed(0)
    theirs = torch.stack([to_tensor(ColorJitter(0.2, 0.2, 0.2)(to_pil(tiles[5]))) for _ in range(400)])
    theirs = theirs.double().mean((1, 2, 3))
    assert abs(ours.mean() - theirs.mean()) < 3 and abs(ours.std() - theirs.std()) < 2


# ---------------------------------------------------------------- normalize and erasing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_normalize(tiles, dtype):
    mean, std = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
    expected = TF.normalize(tiles.double() / 255, mean, std)
    before = tiles.clone()
    out = normalize(tiles, mean, std, dtype)
    assert out.dtype == dtype and torch.equal(tiles, before)
    assert (out.double() - expected).abs().max() < {2: 0.02, 4: 1e-5}[dtype.itemsize]
    assert torch.allclose(normalize(tiles.float() / 255, mean, std), expected.float(), atol=1e-5)
    assert torch.allclose(normalize(tiles, torch.tensor(mean), torch.tensor(std)), expected.float(), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalize_lets_gradients_through(dtype):
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    out = normalize(images, (0.5,) * 3, (0.25, 0.5, 1.0), dtype)
    assert torch.equal(out, normalize(images.detach(), (0.5,) * 3, (0.25, 0.5, 1.0), dtype))
    out.sum().backward()
    assert torch.equal(images.grad, torch.tensor([4.0, 2.0, 1.0]).view(3, 1, 1).expand_as(images))


def test_erasing_boxes_and_noise():
    zeros = torch.zeros(4000, 3, 32, 32)
    out = erased(zeros, 0.25, rng())
    holes = (out != 0).all(1)  # (B, H, W)
    hit = holes.flatten(1).any(1)
    assert abs(hit.double().mean() - 0.25) < 0.03
    noise = out[(out != 0)]
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    for mask in holes[hit][:200]:
        rows, cols = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & cols)  # a rectangle
        for line in (rows, cols):
            on = line.nonzero()
            assert on[-1] - on[0] + 1 == len(on) < 32  # in one piece, never a whole side
        h, w = int(rows.sum()), int(cols.sum())
        assert 0.01 < h * w / 1024 < 0.36 and 0.25 < h / w < 4


def test_erasing_by_zero_and_extremes():
    ones = torch.ones(50, 1, 8, 8)
    assert set(erased(ones, 1.0, rng(), "const").unique().tolist()) == {0.0, 1.0}
    assert torch.equal(erased(ones, 0.0, rng()), ones)
    assert erased(ones.half(), 1.0, rng()).dtype == torch.float16
    assert torch.equal(erased(ones, 1.0, rng(4)), erased(ones, 1.0, rng(4)))


# ---------------------------------------------------------------- mixup and CutMix


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("mixup, cutmix", [(0.5, 0.0), (0.0, 0.5), (0.5, 0.5), (0.0, 0.0)])
def test_mix_keeps_the_books(batch, mixup, cutmix):
    images, labels = torch.rand(batch, 3, 8, 8, generator=rng()), torch.arange(batch) % 4
    before = images.clone()
    state = np.random.get_state()[1].copy()
    for seed in range(8):
        mixed, targets = mix(images, labels, 4, mixup, cutmix, 0.1, rng(seed))
        assert mixed.shape == images.shape and targets.shape == (batch, 4)
        assert torch.allclose(targets.sum(1), torch.ones(batch), atol=1e-6) and (targets >= 0.1 / 4 - 1e-6).all()
        again = mix(images, labels, 4, mixup, cutmix, 0.1, rng(seed))
        assert torch.equal(mixed, again[0]) and torch.equal(targets, again[1])
    assert torch.equal(images, before) and (np.random.get_state()[1] == state).all()


def test_mix_targets_say_how_much_of_whom():
    """Constant images of 0 and 1: the mean of a mixed image is the share its target gives to class 1."""
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    images = labels.float().view(-1, 1, 1, 1).expand(-1, 1, 16, 16)
    for seed in range(20):
        for alphas in ((1.0, 0.0), (0.0, 1.0)):
            mixed, targets = mix(images, labels, 2, *alphas, generator=rng(seed))
            assert torch.allclose(mixed.mean((1, 2, 3)), targets[:, 1], atol=1e-5)


def test_mix_off_is_smoothing_alone():
    labels = torch.tensor([2, 0])
    images, targets = mix(torch.zeros(2, 1, 4, 4), labels, 3, smoothing=0.1)
    assert torch.allclose(targets, mixup_target(labels, 3, 1.0, 0.1))
    logits = torch.randn(2, 3, generator=rng())
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    assert torch.allclose(F.cross_entropy(logits, targets), expected)


# ---------------------------------------------------------------- the whole recipe


def test_the_whole_recipe_spreads_like_timms(tiles):
    """Same recipe, other code: the same mean and spread of the pixels over many draws."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(0)
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    transform = create_transform(32, is_training=True, scale=(0.75, 1.0), interpolation="random", mean=mean, std=std,
                                 auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25, re_mode="pixel")
    theirs = torch.stack([transform(to_pil(t)) for t in tiles for _ in range(6)])
    recipe = Augment(0.75, randaug_n=2, randaug_m=9, randaug_spread=0.5, randaug_policy="timm", erase=0.25)
    g = rng()
    ours, _ = recipe.finish(normalize(recipe(tiles.repeat_interleave(6, 0), g), mean, std), torch.zeros(420).long(), 1, g)
    assert abs(ours.mean() - theirs.mean()) < 0.12 and abs(ours.std() - theirs.std()) < 0.12


# ---------------------------------------------------------------- errors


BAD = {
    "shape": (lambda x: Augment()(x[0]), "expected (B, C, H, W)"),
    "empty": (lambda x: Augment()(x[:0]), "none of them 0"),
    "type": (lambda x: Augment()(x.int()), "images are torch.int32, expected torch.uint8"),
    "floats": (lambda x: Augment()(x / 255), "images are torch.float32, expected torch.uint8"),
    "ops": (lambda x: apply_ops(x, torch.zeros(1).long(), torch.zeros(1)), "ops have shape (1,)"),
    "no such op": (lambda x: apply_ops(x[:2], torch.tensor([-1, 16]), torch.zeros(2)), "ops are -1 to 16, expected 0 to 15"),
    "grey level as fill": (lambda x: Augment(randaug_n=1, fill=125)(x), "fill is 125.0, expected a number from 0 to 1"),
    "fill": (lambda x: one_op(x, "Rotate", 9, fill=(0.5, 0.5)), "fill is [0.5 0.5], expected a number from 0 to 1, or 3 of them"),
    "mean": (lambda x: normalize(x, (0.5,), (0.2,)), "expected 3, one a channel"),
    "std": (lambda x: normalize(x, (0.5,) * 3, (0.0,) * 3), "no std of 0"),
    "finish": (lambda x: erased(x, 0.25), "normalised floats"),
    "mix labels": (lambda x: mix(x.float(), torch.zeros(2).long(), 3, 0.5), "one an image"),
    "labels in a column": (lambda x: mix(x.float(), torch.zeros(len(x), 1).long(), 3, 0.5), "one an image"),
    **{f"{name} {value}": (lambda x, name=name, value=value: Augment(**{"randaug_n": 1, name: value}), f"{name} is {value!r}, expected {words}")
       for name, value, words in [
           ("crop_scale", 2.0, "a number from 0 to 1"), ("crop_ratio", (2, 1), "0 < low <= high"),
           ("crop_ratio", (1, math.inf), "0 < low <= high"), ("mixup", math.inf, "a number from 0"),
           ("randaug_policy", "nope", "one of timm, torchvision"), ("randaug_m", 31, "a number from 0 to 30"),
           ("randaug_n", -1, "a number from 0"), ("jitter", 1.5, "a number from 0 to 1"), ("erase", 2.0, "a number from 0 to 1"),
           ("erase_mode", "x", "pixel or const"), ("smoothing", 3, "a number from 0 to 1"), ("mixup", -0.1, "a number from 0"),
           ("cutmix", float("nan"), "a number from 0")]},
    "m of timm": (lambda x: randaug(2, 12, policy="timm"), "m is 12, expected a number from 0 to 10"),
}


@pytest.mark.parametrize("case", BAD)
def test_one_clear_sentence(tiles, case):
    call, words = BAD[case]
    with pytest.raises(ValueError) as caught:
        call(tiles)
    assert words in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------- another device


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_waits_for_nothing_and_agrees(tiles):
    on_gpu = tiles.cuda()
    recipe = Augment(0.5, randaug_n=2, randaug_m=9, randaug_spread=0.5, randaug_policy="timm", jitter=0.2)
    labels = torch.arange(len(tiles), device="cuda") % 5
    mixing = Augment(erase=0.5, mixup=0.5, cutmix=0.5, smoothing=0.1)

    def run(images, labels):
        g = rng(1)
        pixels = recipe(images, g)
        return pixels, mixing.finish(normalize(pixels, (0.5,) * 3, (0.2,) * 3), labels, 5, g)

    run(on_gpu, labels)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pixels, _ = run(on_gpu, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected, _ = run(tiles, labels.cpu())
    off = (pixels.cpu().int() - expected.int()).abs() > 2
    assert off.double().mean() < 0.01

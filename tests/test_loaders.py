"""The two loaders: the same recipe, repeatable from anywhere, and nothing that makes a device wait."""

import multiprocessing
import os
import random
import signal
from dataclasses import replace

import forked
import numpy as np
import pytest
import torch
import torchvision.transforms.autoaugment as light
from PIL import Image
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torchvision.transforms import ColorJitter

from convmixer_edu import loaders
from convmixer_edu.augment import Augment, normalize
from convmixer_edu.checkpoint import keyed_generator
from convmixer_edu.data import ImageSet
from convmixer_edu.distributed import own_rows
from convmixer_edu.loaders import LOADERS, Batched, Timm, make_loader, pil_transform
from convmixer_edu.recipe import PRESETS, augmentation

MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.25, 0.3)
PAPER = Augment(0.75, randaug_n=2, randaug_m=9, randaug_spread=0.5, randaug_policy="timm", erase=0.25,
                mixup=0.5, cutmix=0.5, smoothing=0.1)
LIGHT = Augment(0.75, (1, 1), randaug_n=2, randaug_m=12, jitter=0.2, erase=0.2, erase_mode="const")
PLAIN = Augment(flip=False)


@pytest.fixture(scope="module")
def data():
    """60 pictures of 16 by 20, smooth ones, in 4 classes."""
    noise = torch.rand(60, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(noise, (16, 20), mode="bicubic").clamp(0, 1)
    return ImageSet((images * 255).byte(), torch.arange(60) % 4, ("a", "b", "c", "d"))


def make(name, data, augment=PAPER, seed=5, **options):
    return make_loader(name, data, augment, MEAN, STD, seed, **options)


def steps_of(data, size=16, epoch=0):
    order = torch.randperm(len(data), generator=keyed_generator(epoch))
    return list(enumerate(order.split(size)))


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("recipe", [PAPER, LIGHT, PLAIN], ids=["paper", "light", "plain"])
@pytest.mark.parametrize("name", LOADERS)
def test_any_step_can_be_repeated(data, name, recipe):
    """A new loader, started in the middle of an epoch that another one went through from its beginning."""
    steps = steps_of(data)
    whole = list(make(name, data, recipe).batches(2, steps))
    assert len(whole) == len(steps) == 4
    for (x, y), (_, index) in zip(whole, steps):
        assert x.shape == (len(index), 3, 16, 20) and x.dtype == torch.float32
        assert y.shape == (len(index), 4) and torch.allclose(y.sum(1), torch.ones(len(index)))
    rest = list(make(name, data, recipe).batches(2, steps[2:]))
    assert all(equal(a, b) for a, b in zip(whole[2:], rest, strict=True))
    if recipe is not PLAIN:
        assert not torch.equal(next(make(name, data, recipe).batches(3, steps))[0], whole[0][0])
        assert not torch.equal(next(make(name, data, recipe, seed=6).batches(2, steps))[0], whole[0][0])


def test_workers_change_nothing(data):
    steps = steps_of(data, 8)
    alone, helped = make("timm", data), make("timm", data, workers=2)
    for epoch in (0, 1):  # the workers live on
        for a, b in zip(alone.batches(epoch, steps), helped.batches(epoch, steps), strict=True):
            assert equal(a, b)
    for _ in helped.batches(2, steps):
        break  # and an epoch that is given up leaves nothing behind
    for a, b in zip(alone.batches(3, steps[1:]), helped.batches(3, steps[1:]), strict=True):
        assert equal(a, b)


KEPT = []


def signalled():
    """The signals that end a group of processes; the loader and a loop are alive when this process ends."""
    os.setpgid(0, 0)
    multiprocessing.set_start_method("fork", force=True)  # as where there is no server
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # as a run, which has to save first
    loader = make("timm", ImageSet(torch.zeros(64, 3, 8, 8).byte(), torch.arange(64) % 4, ("a", "b", "c", "d")), workers=2)
    batches = loader.batches(0, list(enumerate(torch.arange(64).split(4))))
    KEPT.extend([loader, batches, next(batches), next(batches)])  # one of each worker
    os.killpg(0, signal.SIGTERM)
    os.killpg(0, signal.SIGINT)
    for _ in range(13):
        next(batches)


def test_signals_to_the_group_are_not_for_workers():
    process = forked.context().Process(target=signalled)
    process.start()
    process.join(600)  # a guard, no promise
    code = process.exitcode
    process.kill()
    assert code == 0


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("recipe", [PAPER, LIGHT], ids=["paper", "light"])
@pytest.mark.parametrize("name", LOADERS)
def test_processes_make_their_rows_of_one_batch(data, name, recipe, world, monkeypatch):
    """Together they hold the whole batch, bit for bit, and none makes more than its rows."""
    step, index = 3, torch.randperm(60, generator=keyed_generator(9))[:24]
    (whole, targets), = make(name, data, recipe).batches(1, [(step, index)])
    made = []
    one = loaders._Pictures._one
    monkeypatch.setattr(loaders._Pictures, "_one", lambda self, *key: made.append(key) or one(self, *key))
    seen = []
    for rank in range(world):
        loader, rows = make(name, data, recipe, rank=rank, world=world), own_rows(24, rank, world)
        assert torch.equal(23 - rows.flip(0), rows)  # partners, mirrored in here too
        (x, y), = loader.batches(1, [(step, index)])
        assert torch.equal(x, whole[rows]) and torch.equal(y, targets[rows])
        assert loader.pack(1, step, index).shape[1] == len(x) == 24 // world
        seen.append(rows)
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(24))
    assert len(made) == (24 if name == "timm" else 0)


@pytest.mark.parametrize("name", LOADERS)
def test_the_worlds_random_state_is_left_alone(data, name):
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    list(make(name, data, LIGHT).batches(0, steps_of(data)))
    list(make(name, data, PAPER).batches(0, steps_of(data)))
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all() and torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("name", LOADERS)
def test_without_augmentation_pictures_are_normalised(data, name):
    for (x, y), (_, index) in zip(make(name, data, PLAIN).batches(0, steps_of(data)), steps_of(data)):
        assert torch.equal(x, normalize(data.images[index], MEAN, STD))
        assert torch.equal(y.argmax(1), data.labels[index]) and y.max() == 1


def test_batched_is_the_recipe_in_order(data):
    """Augment, mix, normalise, erase, as timm and the authors do: mixing normalised pictures is the same."""
    step, index = steps_of(data)[1]
    (x, y), = make("batched", data).batches(3, [(step, index)])
    g = keyed_generator(5, 2, 3, step)
    images = replace(PAPER, fill=MEAN)(data.images[index], g)
    expected, targets = PAPER.finish(normalize(images, MEAN, STD), data.labels[index], 4, g)
    assert torch.allclose(x, expected, atol=1e-5) and torch.equal(y, targets)


def test_black_is_a_colour_to_fill_with(data):
    """Only where no fill is given, what comes in from outside has the mean colour, as in timm."""
    recipe = Augment(flip=False, randaug_n=2, randaug_m=9, randaug_policy="timm")
    for fill, expected in ((None, MEAN), (0.0, 0.0)):
        (x, _), = make("batched", data, replace(recipe, fill=fill)).batches(3, [(0, torch.arange(60))])
        images = replace(recipe, fill=expected)(data.images, keyed_generator(5, 2, 3, 0))
        assert torch.equal(x, normalize(images, MEAN, STD))


def test_erasing_comes_after_mixing(data):
    """A hole of the mean colour is whole: nothing of the partner shows in it."""
    recipe = replace(PLAIN, erase=1.0, erase_mode="const", mixup=1.0)
    (x, _), = make("batched", data, recipe).batches(0, [(0, torch.arange(60))])
    assert (x == 0).all(1).flatten(1).any(1).double().mean() > 0.9


@pytest.mark.parametrize("name", LOADERS)
def test_both_mix_and_erase_by_the_same_draws(data, name):
    """With nothing to do before, both loaders hand over the same batch."""
    recipe = replace(PLAIN, erase=0.5, mixup=0.8, cutmix=1.0, smoothing=0.1)
    steps = steps_of(data)
    for a, b in zip(make(name, data, recipe).batches(0, steps), make("batched", data, recipe).batches(0, steps)):
        assert equal(a, b)


# ---------------------------------------------------------------- timm's pipeline


def names(transform):
    return [type(step).__name__ for step in transform.transforms]


def test_transform_is_the_papers():
    steps = pil_transform(PAPER, (32, 32), MEAN)
    assert names(steps) == ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "RandAugment",
                            "MaybePILToTensor"]
    crop, flip, randaug, _ = steps.transforms
    assert crop.scale == (0.75, 1.0) and crop.ratio == (3 / 4, 4 / 3) and len(crop.interpolation) == 2
    assert flip.p == 0.5 and randaug.num_layers == 2 and len(randaug.ops) == 15
    op = randaug.ops[0]
    assert (op.magnitude, op.magnitude_std, op.prob) == (9, 0.5, 0.5)
    assert all(op.name in {"AutoContrast", "Equalize", "Invert", "Rotate", "SolarizeAdd", "ShearX", "ShearY",
                           "TranslateXRel", "TranslateYRel"} or op.name.endswith("Increasing") for op in randaug.ops)
    assert op.kwargs["fillcolor"] == (128, 115, 102) and len(op.kwargs["resample"]) == 2


def test_transform_is_the_light_scripts():
    steps = pil_transform(LIGHT, (32, 32), MEAN)
    assert names(steps) == ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "RandAugment", "ColorJitter",
                            "MaybePILToTensor"]
    crop, _, randaug, jitter, _ = steps.transforms
    assert isinstance(randaug, light.RandAugment) and (randaug.num_ops, randaug.magnitude) == (2, 12)
    assert isinstance(jitter, ColorJitter) and jitter.brightness == (0.8, 1.2) and jitter.hue is None
    assert crop.ratio == (1, 1) and crop.interpolation.value == "bilinear"


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_transform_of_any_mode(mode):
    mean = MEAN if mode == "RGB" else MEAN[:1]
    steps = pil_transform(PAPER, (16, 20), mean)
    for _ in range(40):
        out = steps(Image.effect_noise((20, 16), 60).convert(mode))
        assert out.shape == (len(mean), 16, 20) and out.dtype == torch.uint8


def test_sides_are_tossed():
    picture = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    tossed = torch.stack([pil_transform(Augment(), (8, 8), (0.5,))(picture) for _ in range(40)])
    assert len(tossed.unique(dim=0)) == 2
    bare = pil_transform(Augment(flip=False), (8, 8), (0.5,))
    assert all(torch.equal(bare(picture), torch.arange(64, dtype=torch.uint8).view(1, 8, 8)) for _ in range(9))


# ---------------------------------------------------------------- static shapes, few calls


class Recorder(TorchDispatchMode):
    """Notes every call into torch with the shapes of its results."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((str(func), [tuple(t.shape) for t in tree_leaves(out) if isinstance(t, torch.Tensor)]))
        return out


@pytest.mark.parametrize("preset", ["light25", "light100", "paper200"])
def test_no_shape_depends_on_the_draws(data, preset):
    loader = make("batched", data, augmentation(PRESETS[preset]))
    seen, packed = [], []
    for step in range(5):
        packed.append(loader.pack(0, step, torch.arange(30)))
        with Recorder() as recorder:
            loader.make(packed[-1])
        seen.append(recorder.calls)
    assert all(calls == seen[0] for calls in seen)
    assert len({(p.shape, p.dtype, p.is_contiguous()) for p in packed}) == 1 and packed[0].dtype == torch.float32
    assert not torch.equal(packed[0], packed[1])


def test_a_step_of_light25_is_few_calls(data):
    loader = make("batched", data, augmentation(PRESETS["light25"]))
    with Recorder() as recorder:
        next(loader.batches(0, [(0, torch.arange(60))]))
    assert len(recorder.calls) <= 120


def test_making_is_a_function_of_the_buffer_alone(data):
    loader = make("batched", data)
    first, other = (loader.pack(0, step, torch.arange(20)) for step in (0, 1))
    before, copy = loader.make(first), first.clone()
    loader.make(other)
    assert equal(loader.make(first), before) and torch.equal(first, copy)


# ---------------------------------------------------------------- errors


def test_one_clear_sentence(data):
    bad = {
        "engine is 'x', expected one of batched, timm": lambda: make("x", data),
        "expected a whole m": lambda: make("timm", data, replace(PAPER, randaug_m=9.5)),
        "no spread with policy torchvision": lambda: make("timm", data, replace(LIGHT, randaug_spread=1.0)),
    }
    for words, call in bad.items():
        with pytest.raises(ValueError) as caught:
            call()
        assert words in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------- no waiting for the device


class OnDevice(torch.Tensor):
    """A tensor that says it is on another device and keeps its values in `inner`."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device="meta")
        made.inner = inner
        return made

    __torch_dispatch__ = classmethod(lambda cls, func, *rest: pytest.fail(f"{func} outside of NoWaiting"))


class NoWaiting(TorchDispatchMode):
    """Computes with OnDevice tensors on the CPU and refuses what a GPU would have to be waited for.

    That is a value read by Python, a result whose size depends on values, a copy back, and a large operand that is
    still on the CPU. `computed` counts what was done on the device, `copies` what was sent there.
    """
    sized_by_values = ("nonzero", "masked_select", "unique", "bincount", "_local_scalar_dense", "is_nonzero",
                       "repeat_interleave", "equal")
    computed, copies, running = 0, 0, True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = any(isinstance(leaf, OnDevice) for leaf in leaves)
        name = func.overloadpacket.__name__
        target = kwargs.get("device")
        if target is not None and torch.device(target).type == "meta":  # a copy to the device, or made there
            kwargs["device"] = torch.device("cpu")
            waits = self.running and leaves and not there and not kwargs.get("non_blocking")
            assert not waits, f"{name} copies without non_blocking"
            self.copies += self.running and bool(leaves) and not there
            assert leaves or not self.running or there, f"{name} makes a constant on the device"
        elif not there:
            return func(*args, **kwargs)
        else:
            assert target is None, f"{name} copies back to {target}"
            assert not name.startswith(self.sized_by_values), f"{name} waits for the device"
            mixed = [leaf.shape for leaf in leaves if leaf.ndim and not isinstance(leaf, OnDevice)]
            assert not mixed, f"{name} got CPU tensors of {mixed} and some on the device"
            indices = [i for i in tree_leaves(args[1:]) if isinstance(i, torch.Tensor)]
            assert not name.startswith("index") or all(i.dtype != torch.bool for i in indices), "indexed by a mask"
        self.computed += there
        args_in, kwargs_in = tree_map(lambda t: t.inner if isinstance(t, OnDevice) else t, (args, kwargs))
        out = func(*args_in, **kwargs_in)
        if func._schema.is_mutable:
            return kwargs.get("out", args[0])  # changed in place: the same tensor
        return tree_map(lambda t: OnDevice(t) if isinstance(t, torch.Tensor) else t, out)


@pytest.mark.parametrize("wait", [
    lambda x: float(x[0, 0, 0, 0]),
    lambda x: bool(x.any()),
    lambda x: x.max().item(),
    lambda x: x[x > 3],
    lambda x: x.nonzero(),
    lambda x: x.cpu(),
    lambda x: x + torch.ones(2, 1, 4, 4),
])
def test_waiting_would_be_noticed(wait):
    with NoWaiting():
        x = torch.ones(2, 1, 4, 4).to("meta", non_blocking=True)
        assert isinstance(x, OnDevice)
        with pytest.raises(AssertionError):
            wait(x)


@pytest.mark.parametrize("recipe", [PAPER, replace(LIGHT, cutmix=0.5)], ids=["paper", "light"])
def test_a_batch_is_made_without_waiting(data, recipe):
    """Every operation of both policies runs, nothing is read back, and the batch is the CPU's."""
    many = replace(recipe, randaug_n=4)
    steps = [(s, torch.arange(60)) for s in range(2)] + [(2, torch.arange(7))]
    expected = list(Batched(data, many, MEAN, STD, 5).batches(0, steps))
    with NoWaiting() as mode:
        mode.running = False  # the data set is copied once, before the run
        loader = Batched(data, many, MEAN, STD, 5, device="meta")
        mode.running = True
        made = [(x.inner, y.inner) for x, y in loader.batches(0, steps)]
    assert all(equal(a, b) for a, b in zip(made, expected, strict=True))
    assert mode.computed > 100 and mode.copies == len(steps)  # one a step


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", LOADERS)
def test_cuda_agrees(data, name):
    steps = steps_of(data)
    for a, b in zip(make(name, data).batches(0, steps), make(name, data, device="cuda").batches(0, steps)):
        off = (a[0] - b[0].cpu()).abs() > 0.05
        assert off.double().mean() < 0.02 and torch.allclose(a[1], b[1].cpu(), atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("preset", ["light25", "light100", "paper200"])
def test_a_cuda_graph_makes_other_steps(data, preset):
    """Recorded with the draws of one step, replayed with another's."""
    loader = make("batched", data, augmentation(PRESETS[preset]), device="cuda")
    first, other = (loader.pack(0, step, torch.arange(30)) for step in (0, 1))
    assert first.is_pinned()
    held, side = first.cuda(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        loader.make(held)  # libraries prepare themselves
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = loader.make(held)
    held.copy_(other)
    graph.replay()
    assert equal(made, loader.make(other.cuda()))


def test_timm_keeps_its_pictures_on_the_cpu(data):
    assert Timm(data, PAPER, MEAN, STD).loader.dataset.images is data.images


def test_the_default_type_of_numbers_changes_nothing(data):
    def first():
        return next(make("batched", data, PAPER).batches(0, steps_of(data)))

    plain = first()
    torch.set_default_dtype(torch.float64)
    try:
        other = first()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(a.dtype == b.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(plain, other))

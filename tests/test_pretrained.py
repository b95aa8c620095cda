"""The published weights: equal to timm's, refused in one sentence, fetched soundly, judged as timm judges, trained on."""

import argparse
import contextlib
import dataclasses
import fnmatch
import functools
import hashlib
import io
import json
import pickle
import random
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from conftest import HOUR, offline
from hub import serve
from PIL import Image
from safetensors.torch import save, save_file
from sklearn.datasets import load_sample_image
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models.convmixer import ConvMixer as Timms
from torch import nn

from convmixer_edu import cli, data, pretrained
from convmixer_edu.checkpoint import CheckpointError, read_checkpoint
from convmixer_edu.inference import load_run, predict
from convmixer_edu.model import ConvMixer, variant
from convmixer_edu.pretrained import (PUBLISHED, Tally, evaluate_pretrained, finetune_config, first_weights, from_timm,
                                      load_pretrained, our_keys, read_weights, targets)
from convmixer_edu.recipe import with_settings
from convmixer_edu.train import train

PARAMETERS = {"convmixer_1536_20": 51_625_960, "convmixer_768_32": 21_110_248, "convmixer_1024_20": 24_383_464}
SYNSETS = ("n01440764", "n02123045", "n02690373", "n07747607")  # tench, tabby, airliner, orange
NUMBERS = (0, 281, 404, 950)


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """A folder and a cache of its own, and a Hub that nobody asks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONVMIXER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CONVMIXER_DEBUG", raising=False)

    def nobody(*args, **options):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(pretrained, "hf_hub_download", nobody)


def lived_in(model, seed=0):
    """The model with weights and running statistics that a trained one could have."""
    generator = torch.Generator().manual_seed(seed)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            n = part.num_features
            part.running_mean.copy_(torch.randn(n, generator=generator) * 0.1)
            part.running_var.copy_(torch.rand(n, generator=generator) + 0.5)
            part.weight.data.copy_(torch.rand(n, generator=generator) + 0.5)
            part.bias.data.copy_(torch.randn(n, generator=generator) * 0.1)
            part.num_batches_tracked += 7
    return model


def named(name, seed=0):
    """timm's model of a published name, randomly initialised."""
    torch.manual_seed(seed)
    return lived_in(timm.create_model(PUBLISHED[name].timm.split(".")[0]), seed)


def tiny(seed=0, **more):
    """A small ConvMixer of timm's."""
    torch.manual_seed(seed)
    sizes = dict(dim=8, depth=2, kernel_size=3, patch_size=2, num_classes=5)
    return lived_in(Timms(**{**sizes, **more}), seed).eval()


@pytest.fixture(scope="module")
def network():
    """timm's smallest of the three, randomly initialised, in evaluation mode."""
    return named("convmixer_1024_20").eval()


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    """Its weights as on the Hub."""
    file = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(network.state_dict(), file, {"format": "pt"})
    return file


def equal_everywhere(theirs, ours, side):
    """Logits in both modes, running statistics, the gradients of all weights and of the image."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, side, side, generator=generator)
    for training in (False, True):
        answers = []
        for model in (theirs, ours):
            model.train(training).zero_grad()
            image = x.clone().requires_grad_()
            logits = model(image)
            logits.square().sum().backward()
            answers.append((logits.detach(), image.grad))
        for a, b in zip(*answers):
            assert (a - b).abs().max() <= 1e-5 * max(1, a.abs().max())
        grads = our_keys({key: weight.grad for key, weight in theirs.named_parameters()})
        for key, weight in ours.named_parameters():
            assert (grads[key] - weight.grad).abs().max() <= 1e-5 * max(1, grads[key].abs().max()), key
    assert all(torch.allclose(ours.state_dict()[key], tensor, atol=1e-6) for key, tensor in our_keys(theirs.state_dict()).items())


# ---------------------------------------------------------------- the same function


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_timms(name):
    theirs = named(name).eval()
    ours = from_timm(theirs)
    assert sum(w.numel() for w in ours.parameters()) == PARAMETERS[name] == sum(w.numel() for w in theirs.parameters())
    assert {type(m) for m in ours.modules()} & {nn.GELU, nn.ReLU} == {nn.ReLU if "768" in name else nn.GELU}
    equal_everywhere(theirs, ours, 56)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_said_of_the_published_is_what_timm_says(name):
    entry, model = PUBLISHED[name], named(name)
    assert entry.sizes == pretrained.sizes_of(from_timm(model).state_dict())
    assert entry.settings.hf_hub_id == f"timm/{entry.timm}"
    assert (entry.settings.crop_pct, entry.settings.interpolation) == (0.96, "bicubic")


@pytest.mark.parametrize("seed", range(20))
def test_random_models_are_timms(seed):
    draw = random.Random(seed)
    sizes = dict(dim=draw.randint(1, 40), depth=draw.randint(1, 12), kernel_size=draw.randint(1, 9),
                 patch_size=draw.randint(1, 8), in_chans=3, num_classes=draw.randint(1, 30))
    torch.manual_seed(seed)
    theirs = lived_in(Timms(**sizes, act_layer=draw.choice([nn.GELU, nn.ReLU])), seed).train(draw.random() < 0.5)
    ours = from_timm(theirs)
    assert ours.training == theirs.training and pretrained.sizes_of(ours.state_dict()) == sizes
    equal_everywhere(theirs, ours, sizes["patch_size"] * draw.randint(2, 5) + draw.randint(0, 3))


def test_weights_stay_where_and_what_they_are():
    theirs = tiny().double()
    ours = from_timm(theirs)
    assert ours[0].weight.dtype == torch.double and all(w.requires_grad for w in ours.parameters())
    before = theirs.stem[0].weight.clone()
    ours[0].weight.data.zero_()  # a copy
    assert torch.equal(theirs.stem[0].weight, before)


def changed(change):
    """A small model of timm's with one thing that ours has not."""
    model = tiny()
    change(model)
    return model


OTHERWISE = "does not answer as a ConvMixer with its weights does"


@pytest.mark.parametrize("make, words", [
    (lambda: changed(lambda m: setattr(m.stem[2], "eps", 1e-3)), OTHERWISE),
    (lambda: changed(lambda m: setattr(m.blocks[0][3], "momentum", 0.01)), OTHERWISE),
    (lambda: changed(lambda m: setattr(m.stem[0], "stride", (1, 1))), OTHERWISE),
    (lambda: changed(lambda m: setattr(m.blocks[0][0].fn[0], "padding_mode", "circular")), OTHERWISE),
    (lambda: changed(lambda m: m.blocks[1].__setitem__(2, nn.GELU(approximate="tanh"))), OTHERWISE),
    (lambda: changed(lambda m: m.blocks[1][0].fn.__setitem__(1, nn.ReLU())), OTHERWISE),
    (lambda: changed(lambda m: m.blocks[1][0].fn.__setitem__(0, nn.Conv2d(8, 8, 5, groups=8, padding="same"))),
     r"4.0.fn.0.weight is \(8, 1, 5, 5, torch.float32\), expected \(8, 1, 3, 3"),
    (lambda: changed(lambda m: m.blocks[1].append(nn.Softmax(1))), OTHERWISE),
    (lambda: tiny(act_layer=nn.SiLU), "silu"),
    (lambda: tiny(num_classes=0), "head.weight|classifier"),
    (lambda: tiny(drop_rate=0.1), OTHERWISE),
    (lambda: tiny(global_pool="max"), OTHERWISE),
    (lambda: ConvMixer(8, 2, 3, 2), "is a Sequential, expected"),
    (lambda: timm.create_model("resnet18"), "is a ResNet, expected"),
])
def test_models_that_ours_cannot_be(make, words):
    with pytest.raises(ValueError, match=words) as told:
        from_timm(make())
    assert "\n" not in str(told.value)


def test_an_unknown_name_is_answered_with_those_there_are():
    for call in (load_pretrained, first_weights, finetune_config):
        with pytest.raises(ValueError, match="'convmixer_9'.*convmixer_1536_20, convmixer_768_32"):
            call("convmixer_9")


# ---------------------------------------------------------------- files


def small(monkeypatch, activation="relu"):
    """Let a small network be the published one; return timm's."""
    entry = pretrained.Published("convmixer_768_32.in1k", 8, 2, 3, 2, activation)
    monkeypatch.setitem(PUBLISHED, "convmixer_768_32", entry)
    return tiny(num_classes=1000, act_layer={"relu": nn.ReLU, "gelu": nn.GELU}[activation])


def begin(prefix, tensors):
    return {prefix + key: tensor for key, tensor in tensors.items()}


WRAPPED = {  # what a file holds, given timm's tensors and ours; the first ones are tensors only
    "timm": lambda t, o: t, "authors": lambda t, o: o, "compiled": lambda t, o: begin("_orig_mod.", t), "net.": lambda t, o: begin("net.", t),
    "compiled DDP": lambda t, o: begin("_orig_mod.module.", t), "DDP compiled": lambda t, o: begin("module._orig_mod.", o),
    "half": lambda t, o: {k: v.half() if v.is_floating_point() else v for k, v in o.items()},
    "state_dict": lambda t, o: {"epoch": 3, "state_dict": t, "optimizer": {"state": {}}}, "model": lambda t, o: {"model": o, "arch": None},
    "lightning": lambda t, o: {"state_dict": begin("model.", t), "epoch": 3}, "model_state_dict": lambda t, o: {"model_state_dict": t, "epoch": 1},
    "module": lambda t, o: {"state_dict": begin("module.", o), "arch": "convmixer_768_32"}, "net": lambda t, o: {"net": t, "acc": 90.0},
    "script": lambda t, o: {"state_dict": t, "args": argparse.Namespace(lr=0.01), "arch": "convmixer_768_32"},
    "two deep": lambda t, o: {"model": {"state_dict": t}}, "no weights as ema": lambda t, o: {"state_dict": t, "ema": {"decay": 0.99}},
}


@pytest.mark.parametrize("kind, ending", [(kind, ".pth") for kind in WRAPPED] + [("script", ".pth.tar"), ("script", ".bin")]
                         + [(kind, ".safetensors") for kind in list(WRAPPED)[:7]])
def test_files_of_every_layout(monkeypatch, capsys, kind, ending):
    model, file = small(monkeypatch), Path(f"weights{ending}")
    ours = from_timm(model).state_dict()
    held = WRAPPED[kind](model.state_dict(), ours)
    if ending == ".safetensors":
        save_file({k: t.clone() for k, t in held.items()}, file)
    else:
        torch.save(held, file)
    found = load_pretrained("convmixer_768_32", file)
    assert not found.training and isinstance(found[1], nn.ReLU) and not capsys.readouterr().err
    for key, tensor in found.state_dict().items():
        assert torch.equal(tensor, ours[key]) if kind != "half" else torch.allclose(tensor, ours[key].to(tensor.dtype), atol=1e-3)


@pytest.mark.parametrize("name", ["state_dict_ema", "model_ema", "ema"])
def test_averaged_weights_are_taken_and_it_is_said(tmp_path, capsys, name):
    raw, averaged = (ConvMixer(8, 1, 3, 4, 10).state_dict() for _ in range(2))
    torch.save({"state_dict": raw, name: averaged, "epoch": 3}, tmp_path / "c.pth.tar")
    found, _ = read_weights(tmp_path / "c.pth.tar")
    assert torch.equal(found["0.weight"], averaged["0.weight"])
    assert capsys.readouterr().err.endswith(f"weights as {name}, state_dict: {name} is taken\n")


class Attack:
    """A pickle of it writes a file when it is loaded."""

    def __reduce__(self):
        return Path.touch, (Path("executed").resolve(),)


def changed_weights(change):
    """What a file holds that has one thing wrong: the weights of the small network, changed."""
    return lambda good: {"state_dict": {**good, **change(good)}}


def broken_bytes(ending, change):
    """A file of that ending whose bytes are changed."""
    return lambda good: (ending, change(save(good) if ending == ".safetensors" else saved(good)))


def holds_itself():
    """A dict that has no end."""
    held = {"a": torch.ones(1)}
    held["model"] = held
    return held


def saved(held):
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(held, file)
    return file.getvalue()


NOT_RUN = "cannot be read as weights .*nothing was run"
BAD = {  # what the file holds, given good weights, or (its ending, its bytes); a pattern of the sentence
    "pickle": (lambda good: Attack(), NOT_RUN),
    "attack among weights": (lambda good: {"state_dict": good, "extra": Attack()}, NOT_RUN),
    "legacy pickle": (lambda good: (".pth", pickle.dumps(Attack())), NOT_RUN),
    "pickle as safetensors": (lambda good: (".safetensors", pickle.dumps(Attack())), NOT_RUN),
    "empty": (lambda good: (".pth", b""), NOT_RUN),
    "text": (lambda good: (".pth", b"not weights"), NOT_RUN),
    "empty safetensors": (lambda good: (".safetensors", b""), NOT_RUN),
    "truncated": (broken_bytes(".pth", lambda data: data[:len(data) // 2]), NOT_RUN),
    "truncated safetensors": (broken_bytes(".safetensors", lambda data: data[:len(data) // 2]), NOT_RUN),
    "list": (lambda good: [1, 2], "holds no weights"),
    "words": (lambda good: {"a": "b"}, "holds no weights"),
    "nothing": (lambda good: {}, "holds no weights"),
    "number": (lambda good: {"state_dict": 3}, "holds no weights"),
    "sparse": (changed_weights(lambda good: {"head.bias": good["head.bias"].to_sparse()}), "holds no weights"),
    "quantised": (changed_weights(lambda good: {"head.bias": torch.quantize_per_tensor(good["head.bias"], 1.0, 0, torch.qint8)}), "holds no weights"),
    "without numbers": (changed_weights(lambda good: {"head.bias": good["head.bias"].to("meta")}), "holds no weights"),
    "larger than its file": (changed_weights(lambda good: {"stem.0.weight": torch.ones(1).expand(2**31, 3, 2, 2)}), "holds no weights"),
    "itself": (lambda good: holds_itself(), "holds no weights"),
    "whole numbers": (changed_weights(lambda good: {"stem.0.weight": torch.ones(8, 3, 2, 2).long()}), "0.weight is .*int64.*expected"),
    "nan": (changed_weights(lambda good: {"head.bias": good["head.bias"] * float("nan")}), "damaged: head.bias holds values that are no numbers"),
    "resnet": (lambda good: {"conv1.weight": torch.ones(3, 3, 3, 3)}, "not the weights of a ConvMixer"),
    "strange": (changed_weights(lambda good: {"tail.bias": torch.ones(3)}), "tail.bias belongs to no ConvMixer"),
    "lacks": (lambda good: {k: t for k, t in good.items() if k != "blocks.1.3.bias"}, "4.3.bias is nothing, expected"),
    "extra": (changed_weights(lambda good: {"blocks.0.9.bias": torch.ones(3)}), "3.9.bias is .*expected nothing"),
    "shape": (changed_weights(lambda good: {"blocks.1.1.weight": torch.ones(8, 9, 1, 1)}), r"4.1.weight is \(8, 9, 1, 1, torch.float32\)"),
    **{key: (lambda good, key=key, value=value: tiny(num_classes=1000, **{key: value}).state_dict(),
             f"{key} is {value}, expected . as in convmixer_768_32") for key, value in
       {"kernel_size": 5, "patch_size": 7, "depth": 3, "dim": 9}.items()},
    "classes": (lambda good: tiny(num_classes=10).state_dict(), "num_classes is 10, expected 1000 as in convmixer_768_32"),
    "gelu name": (lambda good: {"state_dict": good, "arch": "convmixer_edu_768_32"}, "activation is relu, expected gelu as in convmixer_edu_768_32"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_one_sentence_and_nothing_is_run(kind, monkeypatch):
    make, words = BAD[kind]
    held = make(small(monkeypatch).state_dict())
    ending, content = held if isinstance(held, tuple) else (".pth", saved(held))
    file = Path(f"weights{ending}")
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as told:
        load_pretrained("convmixer_768_32", file)
    assert "\n" not in str(told.value) and str(file) in str(told.value)
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", ["none.safetensors", "folder.pth"])
def test_what_is_no_file_is_named(name):
    Path("folder.pth").mkdir()
    with pytest.raises(CheckpointError, match=f"there is no file {name}"):
        load_pretrained("convmixer_768_32", name)


def test_the_pickle_of_these_tests_would_have_run():
    held = io.BytesIO(saved(Attack()))
    assert not Path("executed").exists()
    torch.load(held, weights_only=False)
    assert Path("executed").exists()


def test_weights_of_ones_own_may_have_another_activation(monkeypatch):
    model = small(monkeypatch)
    torch.save({"arch": "convmixer_edu_768_32", "state_dict": from_timm(model).state_dict()}, "model_best.pth.tar")
    ours = load_pretrained("convmixer_768_32", "model_best.pth.tar", activation="gelu")
    assert isinstance(ours[1], nn.GELU)


# ---------------------------------------------------------------- the Hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """huggingface_hub itself, and a server on this machine with a small network's weights; .model is timm's."""
    model = small(monkeypatch)
    with serve(monkeypatch, {"model.safetensors": save(model.state_dict())}, tmp_path / "hub") as server:
        server.model, server.content = model, save(model.state_dict())
        monkeypatch.setattr(pretrained, "hf_hub_download", functools.partial(
            huggingface_hub.hf_hub_download, endpoint=server.endpoint, cache_dir=server.cache))
        yield server


def blob_of(hub):
    (blob,) = hub.cache.glob("models--timm--convmixer_768_32.in1k/blobs/*")
    return blob


def pinned(monkeypatch, content):
    """Let the small network be published with this file at this commit."""
    entry = dataclasses.replace(PUBLISHED["convmixer_768_32"], sha256=hashlib.sha256(content).hexdigest(), revision="5" * 40)
    monkeypatch.setitem(PUBLISHED, "convmixer_768_32", entry)


@pytest.mark.parametrize("pin", [False, True])
def test_weights_come_from_timms_place_only_once_and_the_cache_stays_sound(hub, monkeypatch, capsys, pin):
    """A line that breaks, a file that rots, a server that is gone."""
    if pin:
        pinned(monkeypatch, hub.content)
    hub.plan[:] = [500]  # the client asks for the rest
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(load_pretrained("convmixer_768_32")(x), hub.model(x))
    digest, asked = hashlib.sha256(hub.content).hexdigest(), len(hub.asked)
    assert all(path == f"/timm/convmixer_768_32.in1k/resolve/{'5' * 40 if pin else 'main'}/model.safetensors" for path in hub.asked)
    assert (f"we know no checksum; it has the SHA-256 {digest}" in capsys.readouterr().err) != pin
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pretrained("convmixer_768_32")
    assert len(hub.asked) == asked and blob_of(hub).name == digest
    for rotten in (hub.content[:-8], hub.content[:-1] + b"!", b""):  # the second: no reader would notice
        blob_of(hub).write_bytes(rotten)
        with pytest.warns(UserWarning, match="damaged.*fetched anew"):
            assert torch.equal(load_pretrained("convmixer_768_32")(x), hub.model(x))
        assert blob_of(hub).read_bytes() == hub.content
    hub.online = False
    assert torch.equal(load_pretrained("convmixer_768_32")(x), hub.model(x))
    blob_of(hub).write_bytes(b"rotten")
    for _ in range(2):
        with pytest.warns(UserWarning, match="damaged"), pytest.raises(CheckpointError, match="cannot be fetched.*give a file") as told:
            load_pretrained("convmixer_768_32")
    assert "\n" not in str(told.value) and not [*hub.cache.rglob("*.incomplete")]


@pytest.mark.parametrize("plan, online", [([], False), ([100] * 50, True)], ids=["no server", "a line that always breaks"])
def test_a_download_that_never_ends_well_is_one_sentence_and_leaves_nothing(hub, plan, online):
    hub.plan[:], hub.online = plan, online
    with pytest.raises(CheckpointError, match="convmixer_768_32 cannot be fetched.*give a file") as told:
        load_pretrained("convmixer_768_32")
    assert "\n" not in str(told.value)
    assert not [file for file in hub.cache.rglob("*") if file.is_file() and file.parent.name in ("blobs", "1" * 40)]


def test_what_is_damaged_twice_is_given_up(hub):
    hub.sent = hub.content[:-1] + b"!"
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="of no use.*give a file of your own"):
        load_pretrained("convmixer_768_32")


@pytest.mark.parametrize("pin, other, words", [
    (False, dict(kernel_size=5), "kernel_size is 5"),
    (True, dict(seed=1), "is not the file that was published: its SHA-256 is [0-9a-f]{64}, expected [0-9a-f]{64}")])
def test_only_the_network_that_was_published_is_taken(hub, monkeypatch, pin, other, words):
    """A repository that changed, another server: a whole file under its own checksum."""
    good = hub.content
    if pin:
        pinned(monkeypatch, good)
    hub.files["model.safetensors"] = save(tiny(num_classes=1000, **other).state_dict())
    for _ in range(2):
        with pytest.warns(UserWarning), pytest.raises(CheckpointError, match=f"of no use .*{words}"):
            load_pretrained("convmixer_768_32")
    hub.files["model.safetensors"] = good
    shutil.rmtree(hub.cache)
    load_pretrained("convmixer_768_32")


def test_what_is_pinned_looks_like_a_checksum_and_a_commit():
    for entry in PUBLISHED.values():
        for value, length in ((entry.sha256, 64), (entry.revision, 40)):
            assert value is None or (len(value) == length and set(value) <= set("0123456789abcdef"))
    assert PUBLISHED["convmixer_768_32"].revision and sum(entry.sha256 is not None for entry in PUBLISHED.values()) == 2


# ---------------------------------------------------------------- evaluation


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder val/ of JPEGs of many sizes and aspects, some grey, in four of ImageNet's classes."""
    root, draw = tmp_path_factory.mktemp("photographs"), random.Random(0)
    for i in range(11):
        photo = load_sample_image(("china.jpg", "flower.jpg")[i % 2])
        w, h = draw.randint(60, 630), draw.randint(60, 420)
        top, left = draw.randint(0, 427 - h), draw.randint(0, 640 - w)
        piece = Image.fromarray(photo[top:top + h, left:left + w])
        folder = root / "val" / SYNSETS[i % 4]
        folder.mkdir(parents=True, exist_ok=True)
        (piece.convert("L") if i == 5 else piece).save(folder / f"{i:02}.{'png' if i == 7 else 'jpg'}")
    return root


@pytest.fixture(scope="module")
def timms_answers(network, photographs):
    """timm's own validation of the same network: logits and labels."""
    files = create_dataset("", str(photographs), split="validation", class_map=dict(zip(SYNSETS, NUMBERS)))
    loader = create_loader(files, batch_size=4, device=torch.device("cpu"), num_workers=0, persistent_workers=False,
                           **resolve_data_config(model=network))
    with torch.no_grad():
        logits, labels = zip(*[(network(x), y) for x, y in loader])
    return torch.cat(logits), torch.cat(labels)


def by_timm(logits, labels):
    """timm's own accuracies."""
    return [float(timm.utils.accuracy(logits, labels, (k,))[0]) for k in (1, 5)]


def watch(monkeypatch, stop_after=None):
    """Note the logits of an evaluation; raise after some batches."""
    seen, add = [], Tally.add

    def noted(self, logits, y):
        add(self, logits, y)
        seen.append((logits, y))

    def killed(self):
        keep(self)
        if stop_after and len(seen) == stop_after:
            raise KeyboardInterrupt

    keep = Tally.keep
    monkeypatch.setattr(Tally, "add", noted)
    monkeypatch.setattr(Tally, "keep", killed)
    return seen


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_is_timms_to_the_digit(photographs, weights, timms_answers, monkeypatch, workers):
    seen = watch(monkeypatch)
    told = evaluate_pretrained("convmixer_1024_20", photographs, file=weights, batch_size=4, workers=workers)
    logits, labels = timms_answers
    assert torch.equal(torch.cat([y for _, y in seen]), labels) and set(labels.tolist()) == set(NUMBERS)
    assert torch.equal(torch.cat([x for x, _ in seen]), logits)
    assert [told["top1"], told["top5"]] == pytest.approx(by_timm(logits, labels))
    assert told["images"] == 11 and sum(row[2] for row in told["confusion"]) == 11
    assert (told["crop_pct"], told["interpolation"], told["image_size"]) == (0.96, "bicubic", 224)


def test_a_clock_that_ticks_slowly_is_not_divided_by(photographs, weights, monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    ask = dict(source=photographs, file=weights, batch_size=11, workers=0)
    assert evaluate_pretrained("convmixer_1024_20", **ask)["images_per_second"] > 0


def test_counts_are_those_of_timm():
    """On random logits, where accuracies are neither 0 nor 100."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(500, 20, generator=generator), torch.randint(20, (500,), generator=generator)
    logits[range(0, 500, 3), labels[::3]] += 3
    tally = Tally()
    for x, y in zip(logits.split(64), labels.split(64)):
        tally.add(x, y)
    told = tally.summary()
    top1, top5 = by_timm(logits, labels)
    assert 20 < top1 < top5 < 90
    assert (told["top1"], told["top5"]) == pytest.approx((top1, top5), abs=1e-4)
    assert told["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), abs=1e-5)
    counts = torch.zeros(20, 20, dtype=torch.int64)
    for true, answer, times in told["confusion"]:
        counts[true, answer] = times
    assert torch.equal(counts.sum(1), torch.bincount(labels, minlength=20))
    assert torch.equal(counts.sum(0), torch.bincount(logits.argmax(1), minlength=20))


def same(a, b):
    """Whether two evaluations gave the same numbers."""
    keys = ("top1", "top5", "loss", "images", "confusion")
    return [a[key] for key in keys] == [b[key] for key in keys]


def test_killed_and_called_again_it_goes_on(photographs, weights, monkeypatch):
    ask = dict(source=photographs, file=weights, batch_size=4, workers=0, save_seconds=0)
    whole = evaluate_pretrained("convmixer_1024_20", **ask)
    with monkeypatch.context() as patch:
        seen = watch(patch, stop_after=2)
        with pytest.raises(KeyboardInterrupt):
            evaluate_pretrained("convmixer_1024_20", **ask)
        assert len(seen) == 2
    (note,) = Path("cache/evaluations").iterdir()
    seen = watch(monkeypatch)
    told = evaluate_pretrained("convmixer_1024_20", **ask)
    assert len(seen) == 1 and same(told, whole)
    assert not note.exists()


def test_a_process_killed_for_good_loses_little(photographs, weights, monkeypatch):
    """kill -9 once there is a note; whoever calls again does not start anew."""
    ask = dict(source=str(photographs), file=str(weights), batch_size=1, workers=0, save_seconds=0)
    program = f"from convmixer_edu.pretrained import evaluate_pretrained as e; e('convmixer_1024_20', **{ask!r})"
    victim = subprocess.Popen([sys.executable, "-c", program], env=offline(OMP_NUM_THREADS=1))
    notes = Path("cache/evaluations")
    while victim.poll() is None and not list(notes.glob("*.safetensors")):
        time.sleep(0.01)
    victim.kill()
    assert victim.wait() == -9 and len(list(notes.glob("*.safetensors"))) == 1
    seen = watch(monkeypatch)
    told = evaluate_pretrained("convmixer_1024_20", **ask)
    assert 0 < len(seen) < 11 and told["images"] == 11
    whole = evaluate_pretrained("convmixer_1024_20", **ask)
    assert same(told, whole)


@pytest.mark.parametrize("what", ["damaged", "other pictures", "other weights"])
def test_a_note_that_does_not_belong_is_not_used(photographs, weights, monkeypatch, tmp_path, what):
    photographs = shutil.copytree(photographs, tmp_path / "own")
    ask = dict(source=photographs, file=weights, batch_size=4, workers=0, save_seconds=0)
    with monkeypatch.context() as patch:
        watch(patch, stop_after=1)
        with pytest.raises(KeyboardInterrupt):
            evaluate_pretrained("convmixer_1024_20", **ask)
    (note,) = Path("cache/evaluations").iterdir()
    if what == "damaged":
        note.write_bytes(note.read_bytes()[:-50])
    elif what == "other pictures":
        next(photographs.glob("val/*/*.jpg")).unlink()
    else:
        tensors, _ = read_weights(weights)
        tensors["25.bias"] = tensors["25.bias"] + 1
        torch.save(tensors, "other.pth")
        ask["file"] = "other.pth"
    seen = watch(monkeypatch)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        evaluate_pretrained("convmixer_1024_20", **ask)
    assert len(seen) == 3  # all batches
    assert any("computed again" in str(w.message) for w in told) == (what == "damaged")


def parquet(photographs, folder, names=SYNSETS, rows=None, label=True):
    """The photographs as two parquet files, with the note that the Hub's files carry."""
    files = [(file, i) for i, name in enumerate(SYNSETS) for file in sorted((photographs / "val" / name).iterdir())][:rows]
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {"image": pa.array([{"bytes": file.read_bytes(), "path": None} for file, _ in files], struct)}
    features = {"image": {"_type": "Image"}}
    if label:
        columns["label"] = pa.array([i for _, i in files], pa.int64())
        features["label"] = {"names": list(names), "_type": "ClassLabel"}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    folder.mkdir()
    half = len(table) // 2
    for i, part in enumerate((table[:half], table[half:])):
        pq.write_table(part, folder / f"validation-{i:05}-of-00002.parquet", row_group_size=3)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_judged_like_files(photographs, weights, monkeypatch, tmp_path, workers):
    """From parquet, streamed and killed in between; each row once, whatever the number of workers."""
    table = parquet(photographs, tmp_path / "table")
    ask = dict(file=weights, batch_size=4, workers=workers, save_seconds=0)
    with monkeypatch.context() as patch:
        watch(patch, stop_after=1)
        with pytest.raises(KeyboardInterrupt):
            evaluate_pretrained("convmixer_1024_20", table, **ask)
    assert same(evaluate_pretrained("convmixer_1024_20", table, **ask),
                evaluate_pretrained("convmixer_1024_20", photographs, **ask))


def test_a_dataset_on_the_hub_is_a_folder_that_was_fetched(photographs, weights, monkeypatch, tmp_path):
    """Of its files only those of the split."""
    table, asked = parquet(photographs, tmp_path / "table"), []
    names = [f"data/{split}-0000{i}-of-00002.parquet" for split in ("train", "test", "validation") for i in range(2)]

    def fetch(source, **options):
        asked.append(source)
        assert [name for name in names if any(fnmatch.fnmatch(name, p) for p in options["allow_patterns"])] == names[-2:]
        return table

    monkeypatch.setattr(data, "snapshot_download", fetch)
    monkeypatch.setattr(data, "_on_the_hub", lambda source: sorted(map(Path, names)))
    told = evaluate_pretrained("convmixer_1024_20", "owner/imagenet", file=weights, batch_size=4)
    assert same(told, evaluate_pretrained("convmixer_1024_20", photographs, file=weights, batch_size=4))
    assert asked == ["owner/imagenet"]


def test_classes_find_their_outputs():
    assert targets(SYNSETS) == list(NUMBERS) and targets(("10", "9", "999")) == [10, 9, 999]
    assert targets(tuple(f"class {i}" for i in range(1000))) == list(range(1000))
    for names in (("cat", "dog"), ("n01440764", "dog"), ("1000", "3"), ("-1", "3")):
        with pytest.raises(ValueError, match="the data have 2 classes"):
            targets(names)


NO_USE = {  # given the photographs and a place for data: the source, and a pattern of the sentence
    "no folder": (lambda photos, place: "nowhere", "no folder nowhere"),
    "digits": (lambda photos, place: "digits", "digits are no photographs"),
    "hub": (lambda photos, place: "owner/imagenet", "Hub cannot be reached"),
    "empty": (lambda photos, place: place.mkdir() or place, "is empty"),
    "names": (lambda photos, place: parquet(photos, place, ("cat", "dog", "cow", "hen")), "the data have 4 classes"),
    "column": (lambda photos, place: parquet(photos, place, label=False), "no label column"),
    "no rows": (lambda photos, place: parquet(photos, place, rows=0), "has no images"),
    "no split": (lambda photos, place: (shutil.copytree(photos, place) / "val").rename(place / "train").parent, "has no split 'validation'"),
    "text": (lambda photos, place: shutil.copytree(photos, place), "notes.txt is not an image"),
    "broken": (lambda photos, place: shutil.copytree(photos, place), "jpg is not an image that can be read"),
}


@pytest.mark.parametrize("kind", NO_USE)
@pytest.mark.parametrize("workers", [0, 1])
def test_data_of_no_use_are_one_sentence(kind, workers, photographs, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_on_the_hub", lambda source: None)
    make, words = NO_USE[kind]
    source = make(photographs, tmp_path / "data")
    if kind == "text":
        (source / "val" / SYNSETS[0] / "notes.txt").write_text("no picture")
    if kind == "broken":
        next(source.glob("val/*/*.jpg")).write_bytes(b"no picture")
    with pytest.raises((ValueError, FileNotFoundError), match=words) as told:
        evaluate_pretrained("convmixer_1024_20", source, file=weights, workers=workers)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_the_folder_of_the_validation_images_has_any_usual_name(tmp_path, name):
    (tmp_path / name / "n01440764").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / name / "n01440764" / "0.png")
    assert len(data.list_files(str(tmp_path), "validation", alone=True)["n01440764"]) == 1


# ---------------------------------------------------------------- the command line


def convmixer(*words, code=0, process=False):
    """The command, in this process or as the real program: (stdout, stderr)."""
    words = list(map(str, words))
    if process:
        program = Path(sys.executable).with_name("convmixer")
        done = subprocess.run([program, *words], text=True, capture_output=True, timeout=HOUR, env=offline(OMP_NUM_THREADS=1))
        ended, out, err = done.returncode, done.stdout, done.stderr
    else:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
            cli.main(words)
        ended, out, err = end.value.code, out.getvalue(), err.getvalue()
    assert ended == code, err
    if code:
        assert out == "" and len(err.splitlines()) == 1, err
    return out, err


def test_evaluate_from_a_terminal(photographs, weights, timms_answers):
    ask = ("evaluate", "--pretrained", "convmixer_1024_20", "--data", photographs, "--weights", weights)
    told = json.loads(convmixer(*ask, "--json", process=True)[0])
    top1, top5 = by_timm(*timms_answers)
    assert (told["top1"], told["top5"], told["images"]) == (pytest.approx(top1), pytest.approx(top5), 11)
    text, _ = convmixer(*ask)
    assert f"{top1:.3f} % of 11 images (validation)" in text and "0.96 of the shorter side, bicubic" in text
    assert "tench" in text or "tabby" in text  # what was taken for what


@pytest.mark.parametrize("line, words", [
    ("evaluate --pretrained convmixer_9 --data x", ["convmixer_9", "convmixer_1536_20"]),
    ("evaluate --pretrained convmixer_768_32", ["--data"]),
    ("evaluate run --pretrained convmixer_768_32", ["one of two"]),
    ("evaluate run --weights x.pth", ["--weights belongs to --pretrained"]),
    ("evaluate --pretrained convmixer_768_32 --data x --weights gone.pth", ["--weights", "'gone.pth' does not exist"]),
    ("evaluate --pretrained convmixer_768_32 --data nowhere", ["no folder nowhere"]),
    ("train --out run --finetune convmixer_9 --data x", ["convmixer_9", "convmixer_1536_20"]),
    ("train --out run --finetune convmixer_768_32", ["--data"]),
    ("train --out run --finetune convmixer_768_32 --data x --preset quick", ["--preset"]),
    ("train --out run --weights x.pth", ["--weights belongs to --finetune"]),
    ("train --out run --finetune convmixer_768_32 --data x --weights gone.pth", ["--weights", "'gone.pth' does not exist"]),
    ("train --out run --set start=convmixer_768_32 --data digits --set patch_size=2 --set limit=50", ["convmixer_768_32"]),
])
def test_wrong_words_are_one_line(line, words, monkeypatch):
    def absent(*args, **options):
        raise FileNotFoundError("not in the cache")

    monkeypatch.setattr(pretrained, "hf_hub_download", absent)
    monkeypatch.setattr(data, "_on_the_hub", lambda source: None)
    Path("x.pth").touch()
    _, err = convmixer(*line.split(), code=2)
    assert all(word in err for word in words), err
    assert not Path("run").exists()


# ---------------------------------------------------------------- other classes

SHORT = dict(image_size=42, epochs=2, batch_size=4, depthwise="library", precision="float32", checkpoint_seconds=0)


@pytest.fixture(scope="module")
def two_photos(tmp_path_factory):
    """train/ and test/ of JPEG pieces of two photographs, a class each, of several sizes."""
    root, draw = tmp_path_factory.mktemp("photos"), random.Random(1)
    for part, count in (("train", 8), ("test", 5)):
        for name in ("china", "flower"):
            photo = load_sample_image(f"{name}.jpg")
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                w, h = draw.randint(70, 300), draw.randint(70, 300)
                top, left = draw.randint(0, 427 - h), draw.randint(0, 640 - w)
                Image.fromarray(photo[top:top + h, left:left + w]).save(root / part / name / f"{i}.jpg")
    return root


@pytest.fixture
def start(monkeypatch, tmp_path):
    """A small network under a published name: the recipe, what gives its weights, and timm's model."""
    model = small(monkeypatch)
    torch.save(model.state_dict(), tmp_path / "start.pth")
    return (with_settings(finetune_config("convmixer_768_32"), SHORT),
            lambda: first_weights("convmixer_768_32", tmp_path / "start.pth"), model)


def weights_of(run):
    """The tensors of a finished run."""
    return read_checkpoint(Path(run) / "model.safetensors")[0]


def test_recipe_of_a_start():
    recipe = finetune_config("convmixer_768_32")
    assert (recipe.start, recipe.activation, recipe.image_size, recipe.lr) == ("convmixer_768_32", "relu", 224, 0.001)
    assert (recipe.dim, recipe.depth, recipe.kernel_size, recipe.patch_size) == (768, 32, 7, 7)


def test_a_run_begins_with_the_weights_and_a_new_head(start, two_photos):
    config, first, model = start
    config = with_settings(config, {"lr": 1e-30, "weight_decay": 0.0, "epochs": 1})
    record = train(config, two_photos, "run", device="cpu", init_weights=first)
    trained, theirs = weights_of("run"), from_timm(model).state_dict()
    for key, tensor in theirs.items():
        if key.startswith("7."):
            assert trained[key].shape[0] == 2  # the new classes
        elif "running" not in key and "tracked" not in key:
            assert torch.equal(trained[key], tensor), key
    other, _ = load_run("run")
    x = torch.rand(2, 3, 42, 42)
    assert isinstance(other[1], nn.ReLU) and record["classes"] == ["china", "flower"]
    assert json.loads(Path("run/config.json").read_text())["mean"] == [0.485, 0.456, 0.406]
    assert len(predict("run", [next(two_photos.glob("test/*/*.jpg"))])[0]) == 2


def test_it_learns_to_tell_two_photographs(start, two_photos):
    config, first, _ = start
    record = train(with_settings(config, {"epochs": 12, "lr": 0.02}), two_photos, "run", device="cpu", init_weights=first)
    assert record["test_accuracy"] >= 80


def test_a_start_is_part_of_the_recipe(start, two_photos):
    config, first, _ = start
    train(config, two_photos, "from", device="cpu", init_weights=first)
    train(with_settings(config, {"start": ""}), two_photos, "random", device="cpu")
    assert not torch.equal(weights_of("from")["0.weight"], weights_of("random")["0.weight"])
    with pytest.raises(ValueError, match="start .convmixer_768_32 there"):
        train(with_settings(config, {"start": ""}), two_photos, "from", resume=True, device="cpu")


class Killed(Exception):
    """Stands for a signal that cannot be caught."""


@pytest.mark.parametrize("step", [1, 5])
def test_killed_and_resumed_it_is_the_same_run_and_asks_for_no_weights(start, two_photos, step):
    config, first, _ = start
    train(config, two_photos, "quiet", device="cpu", init_weights=first)

    def die(event):
        if event["event"] == "step" and event["step"] == step:
            raise Killed

    with pytest.raises(Killed):
        train(config, two_photos, "run", device="cpu", report=die, init_weights=first)

    def never():
        raise AssertionError("the weights were asked for again")

    train(config, two_photos, "run", resume=True, device="cpu", init_weights=never)
    quiet, run = weights_of("quiet"), weights_of("run")
    assert all(torch.equal(quiet[key], run[key]) for key in quiet)
    assert train(config, two_photos, "run", resume=True, device="cpu", init_weights=never)["steps"] == 8


def test_killed_before_the_first_checkpoint_it_needs_the_weights_again(start, two_photos, monkeypatch):
    from convmixer_edu import train as module
    config, first, _ = start
    train(config, two_photos, "quiet", device="cpu", init_weights=first)
    with monkeypatch.context() as patch:
        patch.setattr(module.Run, "save", lambda run: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            train(config, two_photos, "run", device="cpu", init_weights=first)
    with pytest.raises(ValueError, match="start is 'convmixer_768_32', but no weights were given"):
        train(config, two_photos, "run", resume=True, device="cpu")
    train(config, two_photos, "run", resume=True, device="cpu", init_weights=first)
    assert all(torch.equal(t, weights_of("run")[key]) for key, t in weights_of("quiet").items())


@pytest.mark.parametrize("settings, words", [
    ({"dim": 16}, "do not fit: 0.bias"), ({"depth": 1}, "do not fit: 4"), ({"patch_size": 3}, "do not fit: 0.weight")])
def test_a_recipe_that_does_not_fit_leaves_no_folder(start, two_photos, settings, words):
    config, first, _ = start
    with pytest.raises(ValueError, match=words):
        train(with_settings(config, settings), two_photos, "run", device="cpu", init_weights=first)
    assert not Path("run").exists()


def test_weights_that_cannot_be_had_leave_no_folder(start, two_photos):
    config, _, _ = start
    with pytest.raises(CheckpointError, match="no file gone.pth"):
        train(config, two_photos, "run", device="cpu", init_weights=lambda: first_weights("convmixer_768_32", "gone.pth"))
    assert not Path("run").exists()


def test_finetune_from_a_terminal(two_photos, weights):
    """A published network in full, on small images: begun, told again, judged."""
    words = ["--set", "image_size=28", "--set", "batch_size=8", "--set", "depthwise=library", "--device", "cpu"]
    text, _ = convmixer("train", "--finetune", "convmixer_1024_20", "--weights", weights, "--data", two_photos, "--epochs", 1,
                        "--out", "run", *words, process=True)
    assert "1024/20" in text and "% of 10 images" in text
    again, _ = convmixer("train", "--resume", "--out", "run", "--json")
    assert json.loads(again)["config"]["start"] == "convmixer_1024_20"
    told = json.loads(convmixer("evaluate", "run", "--json")[0])
    assert told["images"] == 10
    _, err = convmixer("train", "--resume", "--out", "run", "--data", two_photos, "--finetune", "convmixer_768_32", code=2)
    assert "start (convmixer_1024_20 there, convmixer_768_32 now)" in err

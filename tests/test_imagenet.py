"""The paper's own run, handed to timm's script: flags, schedule, batch."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import HOUR, ROOT
from PIL import Image
from timm.models import create_model

from convmixer_edu.checkpoint import keyed_generator
from convmixer_edu.imagenet import IMAGENET_FLAGS, IMAGENET_GPUS, imagenet_flags, main

TIMMS = '''
"A stand-in for timm's train.py: its parser's flags and its calls into the library, for two steps on a CPU"
import argparse, json
import torch
from timm.data import Mixup, create_dataset, create_loader, resolve_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.models import create_model
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import dispatch_clip_grad


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("data-dir", "model", "opt", "sched", "aa", "remode", "interpolation"):
        parser.add_argument(f"--{name}")
    for name in ("batch-size", "epochs", "warmup-epochs"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("opt-eps", "weight-decay", "clip-grad", "lr", "reprob", "mixup", "cutmix", "smoothing", "crop-pct"):
        parser.add_argument(f"--{name}", type=float)
    parser.add_argument("--grad-accum-steps", type=int)
    parser.add_argument("--input-size", type=int, nargs=3)
    parser.add_argument("--scale", type=float, nargs="+")
    parser.add_argument("--sched-on-updates", action="store_true")
    parser.add_argument("--amp", action="store_true")
    args = parser.parse_args()
    args.momentum, args.min_lr, args.warmup_lr = 0.9, 0.0, 1e-5  # that script's defaults
    model = create_model(args.model, pretrained=False, in_chans=3, num_classes=None, drop_rate=0.0, drop_path_rate=None,
                         drop_block_rate=None, global_pool=None, bn_momentum=None, bn_eps=None, scriptable=False,
                         checkpoint_path="")
    config = resolve_data_config(vars(args), model=model)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
    data = create_dataset("", root=args.data_dir, split="train", is_training=True, batch_size=args.batch_size)
    mixup = Mixup(mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, label_smoothing=args.smoothing,
                  num_classes=model.num_classes)
    loader = create_loader(data, input_size=config["input_size"], batch_size=args.batch_size, is_training=True,
                           use_prefetcher=False, re_prob=args.reprob, re_mode=args.remode, scale=args.scale,
                           auto_augment=args.aa, interpolation="random", mean=config["mean"], std=config["std"],
                           num_workers=0, device=torch.device("cpu"), persistent_workers=False)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=len(loader))
    done, rates, losses = 0, [], []
    for epoch in range(epochs):
        for x, y in loader:
            rates.append(optimizer.param_groups[0]["lr"])
            x, y = mixup(x, y)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.amp):
                loss = SoftTargetCrossEntropy()(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            dispatch_clip_grad(model.parameters(), value=args.clip_grad, mode="norm")
            optimizer.step()
            done += 1
            losses.append(loss.item())
            scheduler.step_update(num_updates=done)
        scheduler.step(epoch + 1)
    print(json.dumps({"rates": rates, "losses": losses, "config": config, "classes": model.num_classes,
                      "parameters": sum(p.numel() for p in model.parameters()), "epochs": epochs, "turns": args.grad_accum_steps, "batch": args.batch_size,
                      "groups": [{k: g[k] for k in ("weight_decay", "eps")} for g in optimizer.param_groups]}))


if __name__ == "__main__":
    main()
'''


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """An image folder of two classes with four pictures each, and a script beside it."""
    root = tmp_path_factory.mktemp("imagenet")
    for split in ("train", "validation"):
        for label in ("cat", "dog"):
            (root / "data" / split / label).mkdir(parents=True)
            for i in range(4):
                pixels = torch.randint(256, (64, 80, 3), generator=keyed_generator(i, len(split), len(label)))
                Image.fromarray(pixels.byte().numpy()).save(root / "data" / split / label / f"{i}.png")
    (root / "train.py").write_text(TIMMS)
    return root


def start(root, *words):
    """The command of the chapter, as one of 160 processes; the recipe of a small network, on a CPU."""
    return subprocess.run([sys.executable, "-m", "convmixer_edu.imagenet", *words], cwd=root, text=True, capture_output=True,
                          timeout=HOUR, env={**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "160"})


def test_the_papers_flags_train_two_steps_by_timms_pieces(imagenet):
    """What stands behind the command wins over the recipe."""
    done = start(imagenet, "--data-dir", "data", "--epochs", "1", "--model", "convmixer_edu_512_12", "--input-size", "3", "28", "28")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told["losses"]) == 2 and all(loss == loss for loss in told["losses"])
    assert told["rates"] == pytest.approx([0.01 - 0.1 / 0.4 * 0.0095, 0.0])  # half of the way, and the end
    assert told["parameters"] == 4_165_608 and told["classes"] == 1000 and told["epochs"] == 1
    assert told["config"]["crop_pct"] == 0.96 and told["config"]["interpolation"] == "bicubic"
    assert sorted(group["weight_decay"] for group in told["groups"]) == [0, 2e-5]
    assert {group["eps"] for group in told["groups"]} == {1e-3} and (told["batch"], told["turns"]) == (4, 1)


def test_what_cannot_be_started_is_one_sentence(imagenet, tmp_path):
    (tmp_path / "train.py").write_text("x = 1")  # somebody else's
    for root, words, told in ((tmp_path, (), "put it into this folder"), (imagenet, ("-b", "0"), "cannot share a batch of 640")):
        done = start(root, *words)
        assert done.returncode == 1 and told in done.stderr and len(done.stderr.splitlines()) == 1


def test_what_timms_script_cannot_import_is_named(monkeypatch, tmp_path):
    (tmp_path / "train.py").write_text("import yaml_or_such")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "train", raising=False)
    monkeypatch.setattr(sys, "argv", ["imagenet"])
    with pytest.raises(SystemExit, match="^timm's train.py cannot import yaml_or_such: install it"):
        main()


def test_the_papers_model_is_in_timms_registry():
    with torch.device("meta"):
        model = create_model(IMAGENET_FLAGS["model"][0])
    assert sum(p.numel() for p in model.parameters()) == 51_625_960
    assert model.default_cfg["crop_pct"] == IMAGENET_FLAGS["crop-pct"][0]
    assert model.default_cfg["interpolation"] == IMAGENET_FLAGS["interpolation"][0]
    assert IMAGENET_FLAGS["batch-size"][0] * IMAGENET_GPUS[0] == 640  # setup-batch


def value(words, flag):
    return words[words.index(flag) + 1]


def test_flags_are_words():
    words = imagenet_flags()
    assert value(words, "--epochs") == "150" and value(words, "--clip-grad") == "1.0" and value(words, "--warmup-epochs") == "0"
    assert words[words.index("--scale"):][:3] == ["--scale", "0.08", "1.0"] and words[-3] == "--amp"


@pytest.mark.parametrize("gpus, fits, own, turns", [
    (10, 64, 64, 1), (1, 64, 64, 10), (8, 64, 40, 2), (16, 64, 40, 1), (8, 80, 80, 1), (1, 7, 5, 128), (640, 64, 1, 1), (16, 3, 2, 20)])
def test_any_machines_take_the_papers_batch(gpus, fits, own, turns):
    words = imagenet_flags(gpus, fits)
    assert value(words, "--batch-size") == str(own) and gpus * own * turns == 640
    assert value(words, "--grad-accum-steps") == str(turns) and words.count("--batch-size") == 1


@pytest.mark.parametrize("processes, told", [
    ("3", "3 GPUs with 64 images at a time cannot share a batch of 640"), ("0", "0 GPUs"), ("two", "WORLD_SIZE is 'two', expected"),
    ("-1", "WORLD_SIZE is '-1'"), ("1.5", "WORLD_SIZE is '1.5'"), ("", "WORLD_SIZE is ''"), ("9" * 5000, "WORLD_SIZE is '999")])
def test_an_odd_number_of_processes_is_one_sentence(processes, told, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setattr(sys, "argv", ["imagenet"])
    monkeypatch.setitem(sys.modules, "train", SimpleNamespace(create_scheduler_v2=None))
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code.startswith(told) and "\n" not in end.value.code and len(end.value.code) < 200


@pytest.mark.parametrize("gpus, fits", [(3, 64), (0, 64), (24, 64), (1280, 64), (8, 0)])
def test_machines_that_cannot_share_the_batch(gpus, fits):
    with pytest.raises(ValueError, match="cannot share a batch of 640"):
        imagenet_flags(gpus, fits)

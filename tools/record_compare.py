"""Measure the comparison of appendix A on this machine: python tools/record_compare.py --out results/compare-cpu.json

Asks the networks in turn for a batch of pictures, some rounds of all; then the parts that take a network each. The
record grows: after every measurement it is written, and a record of this machine is continued.
"""

import argparse
import functools
import json
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from convmixer_edu.checkpoint import write_json
from convmixer_edu.compare import images_per_second
from convmixer_edu.deploy import clock, distance, enough, export, fold_norms, in_turn, onnx_runner, optimize_for_inference
from convmixer_edu.inference import load_run
from convmixer_edu.ledger import pretrained_run
from convmixer_edu.machine import choose_device, keep_freed_memory, who_ran
from convmixer_edu.model import PAPER_MODELS, ConvMixer
from convmixer_edu.pretrained import from_timm
from convmixer_edu.speed import RunSettings, frozen


RACE = ("convmixer_1536_20", "convmixer_768_32", "convmixer_1024_20_ks9_p14",
        "resnet50", "resnet152", "deit_tiny_patch16_224",
        "deit_small_patch16_224", "deit_base_patch16_224", "resmlp_12_224",
        "resmlp_24_224", "mixer_b16_224", "convnext_tiny", "poolformer_s24",
        "efficientnet_b0")
ASKED = ("convmixer_768_32", "convmixer_1024_20_ks9_p14", "resnet50",
         "efficientnet_b0", "ours")  # for a single image, and as a file
PARTS = ("fast", "variants", *ASKED)  # "ours": the network of this package


def photos(
    count: int,
    side: int = 224,  # pixels
    seed: int = 0,
) -> Tensor:  # (count, 3, side, side), normalised roughly
    "Windows of the two photographs that scikit-learn brings along"
    from sklearn.datasets import load_sample_images
    pictures = [torch.from_numpy(p.copy()).permute(2, 0, 1)/128 - 1
                for p in load_sample_images().images]
    draw, windows = torch.Generator().manual_seed(seed), []
    for i in range(count):
        picture = pictures[i % 2]
        y, x = (int(torch.randint(size - side + 1, (), generator=draw))
                for size in picture.shape[1:])
        windows.append(picture[:, y:y + side, x:x + side])
    return torch.stack(windows)


def settled(
    model: nn.Module,  # changed in place
    images: Tensor,  # (B, c, H, W)
) -> nn.Module:  # in evaluation mode
    "Give the BatchNorms of a fresh network statistics of some images"
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        with torch.no_grad():
            model.train()(images)
    for norm, momentum in zip(norms, usual):
        norm.momentum = momentum
    return model.eval()


def _fresh(network, device, side=224):
    "One of timm's networks, ready to be timed"
    torch.manual_seed(0)
    return settled(timm.create_model(network), photos(4, side)).to(device)


def _open_record(file, device, batch_size):
    "The record in the file, if it is of this machine, else a new one"
    begun = {**who_ran(device), "batch_size": batch_size}
    begun.pop("commit"), begun.pop("precision")
    if file.exists():
        try:
            record = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}): expected a "
                             "record, move it away") from None
        other = [key for key in begun if record.get(key) != begun[key]]
        if other:
            raise ValueError(f"{file} was made with another "
                             f"{', '.join(other)}: choose another file")
        return record
    return {**begun, "commit": who_ran(device)["commit"],
            "race": {}, "parts": {}}


def _race(record, save, device, names, rounds, left):
    "Time the networks in turn, until each has its rounds; True when done"
    race = record["race"]
    todo = [n for n in names if len(race.get(n, [])) < rounds]
    images, ask, several = photos(record["batch_size"]).to(device), {}, {}
    for name in todo:
        ask[name] = lambda f=frozen(_fresh(name, device), RunSettings()): f(images)
        several[name] = enough(ask[name], device)
    for done in range(rounds):
        for name in todo:
            if len(race.setdefault(name, [])) > done:
                continue
            if left() <= 0:
                return False
            race[name].append(clock(ask[name], device, several[name]))
            save()
    return True


def _ratios(seconds, slow, fast):
    "Medians, the ratio of the rounds' and its spread"
    ratios = [a/b for a, b in zip(seconds[slow], seconds[fast])]
    return {"ratio": statistics.median(ratios),
            "spread": [min(ratios), max(ratios)], "rounds": len(ratios)}


def _fast_part(record, device, rounds, left, weights):
    "timm's eager float32 against ours, in one process, in turn"
    name, images = "convmixer_768_32", photos(record["batch_size"], seed=1)
    images = images.to(device)
    theirs = (_fresh(name, device) if weights == "drawn" else
              timm.create_model(name, pretrained=True).eval().to(device))
    ours = from_timm(theirs).to(device)
    tolerance = 0.05 if weights == "drawn" else 0.02
    best = optimize_for_inference(ours, images, tolerance,
                                  min(120.0, left()/3))
    half = RunSettings(True, dtype=best.choice.dtype)  # eager, channels last
    ask = {"timm": torch.inference_mode()(lambda: theirs(images)),
           "ours": lambda: best(images)}
    for key, model in (("eager", ours), ("folded", fold_norms(ours))):
        ask[key] = lambda f=frozen(model, half): f(images)
    seconds = in_turn(ask, device, rounds)
    reference = ask["timm"]()
    other = frozen(ours, RunSettings(channels_last=True))(images)
    return {"network": name, "weights": weights, "seconds": seconds,
            **_ratios(seconds, "timm", "ours"), "tolerance": tolerance,
            "difference": distance(best(images), reference),
            "difference_float32": distance(other, reference),
            "choice": asdict(best.choice), "chosen": str(best.choice),
            "tried": [asdict(c) for c in best.timed],
            "folded": _ratios(seconds, "eager", "folded"),
            "trained": _trained(best.choice, device)}


def _trained(choice, device):
    "The same way of asking, tried on a network that has been trained"
    model, info = load_run(pretrained_run())
    images = torch.cat([photos(250, side, 2) for side in info.image_size[:1]])
    images = images.to(device)
    plain, fast = (frozen(model.to(device), way)(images)
                   for way in (RunSettings(), choice))
    return {"run": pretrained_run().name, "images": len(images),
            "difference": distance(fast, plain),
            "equal_answers": int((fast.argmax(1) == plain.argmax(1)).sum())}


def _variants_part(record, device, rounds, left, weights):
    "What patches of 14 and ReLU are worth: float32, as it comes, in turn"
    k, p, _ = PAPER_MODELS[1536, 20]
    made = {"1536/20 p7": lambda: ConvMixer(1536, 20, k, p),
            "1536/20 p14": lambda: ConvMixer(1536, 20, k, 2*p),
            "768/32 GELU": lambda: ConvMixer(768, 32, 7, 7),
            "768/32 ReLU": lambda: timm.create_model("convmixer_768_32")}
    images, ask = photos(2).to(device), {}
    for name, make in made.items():
        ask[name] = lambda f=frozen(make().to(device), RunSettings()): f(images)
    seconds = in_turn(ask, device, rounds)
    return {"batch_size": len(images), "seconds": seconds,
            "patch": _ratios(seconds, "1536/20 p7", "1536/20 p14"),
            "relu": _ratios(seconds, "768/32 GELU", "768/32 ReLU")}


def _latency_part(name, record, device, rounds, left, weights):
    "One image: as it comes, in the fastest way, as an ONNX file; sizes"
    if name == "ours":
        model, info = load_run(pretrained_run())
        side, tolerance = info.image_size[0], 0.02
    else:  # drawn weights are no judge of a type
        model, side, tolerance = _fresh(name, device), 224, 1.0
    image = photos(1, side, 3).to(device)
    model = model.to(device)
    best = optimize_for_inference(model, image, tolerance,
                                  min(20.0, max(1.0, left()/4)))
    plain = frozen(model, RunSettings())
    ask = {"plain": lambda: plain(image), "fastest": lambda: best(image)}
    found = {"image_size": side, "chosen": str(best.choice),
             "difference": best.difference,
             "parameters": sum(w.numel() for w in model.parameters())}
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = Path(folder)/"net.onnx"
            told = export(model, tuple(image.shape[1:]), file, "ONNX Runtime")
            run = onnx_runner(file)
            ask["ONNX"] = lambda: run(image.cpu())
            found |= {"onnx_bytes": told["bytes"],
                      "onnx_difference": told["difference"]}
        except ValueError as error:  # the packages are not there
            found["onnx_missing"] = str(error)
        found["seconds"] = in_turn(ask, device, rounds)
    return found


def measure(
    file: str | Path,  # the record; one that is there is continued
    device: str | None = None,  # None: a GPU if there is one
    seconds: float = 540.0,  # nothing new is begun after that
    batch_size: int | None = None,  # images a call; 8, or 128 on a GPU
    rounds: int = 5,
    networks: tuple[str, ...] = RACE,  # to race, by timm's names
    parts: tuple[str, ...] = PARTS,  # what else to measure
    weights: str = "drawn",  # or "published": timm's, from the Hub
    report=print,  # called with a sentence for each part
    command: str = "",  # what was given to make it
) -> dict:  # the record; its "complete" tells whether anything is left
    """Measure the comparison on this machine (App. A)

    Raises `ValueError` for a record of another machine, or a name that timm
    does not know."""
    started, file, device = time.monotonic(), Path(file), choose_device(device)
    if not file.parent.is_dir():
        raise ValueError(f"there is no folder {file.parent} for {file.name}: "
                         "make it first")
    unknown = [n for n in (*networks, *parts) if not timm.is_model(n)
               and n not in ("fast", "variants", "ours")]
    if unknown:
        raise ValueError(f"timm has no network {unknown[0]!r}: see "
                         "timm.list_models() for its names")
    keep_freed_memory()
    record = _open_record(file, device, batch_size or (
        128 if device.type == "cuda" else 8))  # a GPU is idle with few
    left = lambda: seconds - (time.monotonic() - started)

    def save():
        write_json(file, record)

    def do(part, measured):
        if part in parts and part not in record["parts"] and left() > 0:
            report(f"{part}, {left():.0f} s left")
            record["parts"][part] = measured(record, device, rounds, left,
                                             weights)
            save()

    do("fast", _fast_part)
    report(f"race of {len(networks)}, {left():.0f} s left")
    raced = _race(record, save, device, networks, rounds, left)
    do("variants", _variants_part)
    for name in parts:
        if name not in ("fast", "variants"):
            do(name, functools.partial(_latency_part, name))
    record["complete"] = raced and set(parts) <= set(record["parts"])
    record["command"] = command or record.get("command", "")
    save()
    return record


def print_record(
    record: dict,  # of `measure`
) -> None:
    "The medians of a record as a table"
    for name in record["race"]:
        if told := images_per_second(record, name):
            print("{:28} {:8.2f} images/s  ({:.2f} to {:.2f})".format(
                name, *told))
    if fast := record["parts"].get("fast"):
        print(f"{fast['network']} by {fast['chosen']}: {fast['ratio']:.2f} "
              f"times timm's eager float32 ({fast['spread'][0]:.2f} to "
              f"{fast['spread'][1]:.2f}), {fast['difference']:.1%} off, "
              f"{fast['tolerance']:.0%} allowed")


def main(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("compare.json"))
    parser.add_argument("--seconds", type=float, default=540.0, help="nothing new is begun after that")
    parser.add_argument("--device", help="cpu or cuda; the best by default")
    parser.add_argument("--batch-size", type=int, help="images a call: 8, or 128 on a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--networks", nargs="+", default=RACE, help="timm's names of the networks to race")
    parser.add_argument("--parts", nargs="*", default=PARTS,
                        help="what else to measure: fast, variants, ours, or a network to ask for one image")
    parser.add_argument("--weights", choices=("drawn", "published"), default="drawn")
    words = sys.argv[1:] if arguments is None else arguments
    given = vars(parser.parse_args(words))
    command = shlex.join(["python", "tools/record_compare.py", *words])
    record = measure(given.pop("out"), given.pop("device"), **given, command=command)
    print_record(record)
    if not record["complete"]:
        print("there is more to measure: call again to go on")


if __name__ == "__main__":
    main()

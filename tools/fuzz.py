"""Bad input of every kind, drawn by hypothesis: what does the command say? python tools/fuzz.py [--examples 2000]

    python tools/fuzz.py --only notes --seed 7 --small

Pictures, parquet files, checkpoints and weights, the notes of a run, command lines. Whatever comes, a command must end by
itself, say what is wrong in one sentence that names the cause (exit code 2; 1 where the use was right), show nothing of the
program's inside, and leave nothing half-written behind. One input for each way to break this is shown; code 1 then.
"""

import argparse
import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.update(CONVMIXER_DATA="digits", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", OMP_NUM_THREADS="1")

import numpy as np
import pyarrow as pa
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from convmixer_edu import cli, watch
from convmixer_edu.checkpoint import read_checkpoint, write_checkpoint
from convmixer_edu.recipe import Config

TINY = ("--preset digits --device cpu --set dim=4 --set depth=1 --set limit=40 --set batch_size=20 --set patch_size=2 "
        "--set checkpoint_seconds=0 --set holdout=0").split()
LIMIT = 30  # seconds that no input here needs: whatever takes longer hangs
ROOM = 6 * 2**30  # bytes that an input may ask for on top
INSIDE = re.compile(  # Python's and torch's own words, names of files that are written aside
    r"Traceback|NoneType|object (is|has|of)|not subscriptable|unhashable|no attribute|positional|invalid literal|unexpected "
    r"keyword|could not convert|list index|out of range|size of tensor|expected scalar|0x[0-9a-f]{6}|\.part\b|/tmp\w{8}/")
LETTERS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
NUMBERS = st.one_of(st.integers(-3, 300), st.sampled_from([-2**63, 2**31, 2**63 - 1, 2**63, 10**30]), st.floats(allow_subnormal=False))
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, LETTERS, st.sampled_from([[], {}, [None], [0, 1, 2], ["a", "b"]]))


class Hang(BaseException):
    """A command that goes on and on."""


class Broken(AssertionError):
    """What a command should not have done."""


def call(words):
    """Return exit code, stdout and stderr of a command in this process; Hang if it takes too long, or its traceback."""
    out, err = io.StringIO(), io.StringIO()

    def late(number, frame):
        raise Hang("".join(traceback.format_stack(frame)[-4:]))

    signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main(words)
    except SystemExit as end:
        return end.code, out.getvalue(), err.getvalue()
    finally:
        signal.alarm(0)


def tree(folder):
    """Return every file and folder below a folder, the cache left out."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")
            if path.relative_to(folder).parts[0] != "cache"}


def whole(folder):
    """Say which file of a folder cannot be read to its end; None if all can."""
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".part" or re.match(r"\..*\.\d+$|tmp", path.name):
            return path
        with contextlib.suppress(OSError):
            try:
                if path.suffix == ".json":
                    json.loads(path.read_text("utf8"))
                elif path.suffix == ".safetensors":
                    load_file(path)
            except Exception:
                return path
    return None


def judge(folder, words, named, right):
    """Run a command on bad input in `folder`; Broken if it breaks a promise. `right`: the codes it may end with."""
    before = tree(folder)
    try:
        code, out, err = call(list(words))
    except Hang as where:
        raise Broken(f"no end after {LIMIT} s\n{where}") from None
    except Exception:
        raise Broken("a traceback\n" + traceback.format_exc()[-1500:]) from None
    told = [line for line in err.splitlines() if not line.startswith("convmixer: warning: ")]
    if code not in right:
        raise Broken(f"code {code}, expected {right}: {err}")
    if found := INSIDE.search((err + out).replace(str(folder), "")):
        raise Broken(f"the program's inside shows ({found[0]!r}): {err}")
    if code:
        last = told[-1] if told else ""
        if not last.startswith("convmixer: ") or len(last) < 20:
            raise Broken(f"no sentence: {err!r}")
        if named and not any(name in last for name in named):
            raise Broken(f"the cause, one of {named}, is not named: {last}")
    new = tree(folder) - before
    if code == 2 and new:
        raise Broken(f"left behind: {sorted(new)} after {err}")
    for name in new:
        if (folder / name).is_dir() and (half := whole(folder / name)):
            raise Broken(f"half-written: {half}")


def damaged(draw, data):
    """Return bytes cut short, changed, put in, taken from elsewhere."""
    way, at = draw(st.sampled_from(["cut", "change", "insert", "other", "empty"])), st.integers(0, max(len(data) - 1, 0))
    if way == "cut":
        return data[:draw(at)]
    if way == "change":
        data = bytearray(data)
        for _ in range(draw(st.integers(1, 6))):
            data[draw(st.one_of(at, st.integers(0, min(len(data) - 1, 80))))] = draw(st.integers(0, 255))
        return bytes(data)
    if way == "insert":
        place = draw(at)
        return data[:place] + draw(st.binary(min_size=1, max_size=20)) + data[place:]
    return draw(st.binary(max_size=200)) if way == "other" else b""


def altered(draw, value):
    """Return JSON with one thing in it replaced or left out."""
    value = json.loads(json.dumps(value))
    at = value
    while True:
        key = draw(st.sampled_from(sorted(at))) if isinstance(at, dict) else draw(st.integers(0, len(at) - 1))
        if isinstance(at[key], (dict, list)) and at[key] and draw(st.booleans()):
            at = at[key]
            continue
        if draw(st.booleans()):
            at[key] = draw(LEAVES)
        else:
            del at[key]
        return value


def picture(draw, size=None):
    """Return a small picture of any kind, as bytes, and the suffix that belongs to it."""
    kind, mode = draw(st.sampled_from(["png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm", "ico", "tga"])), \
        draw(st.sampled_from(["RGB", "L", "1", "RGBA", "P", "I;16", "F", "CMYK"]))
    size = size or (draw(st.integers(1, 20)), draw(st.integers(1, 20)))
    file = io.BytesIO()
    try:
        Image.new(mode, size).save(file, kind)
    except (OSError, KeyError, ValueError):  # a mode that this kind does not know
        Image.new("RGB", size).save(file := io.BytesIO(), kind)
    return file.getvalue(), kind


def pictures(draw, folder, base):
    """predict, and a picture that is none."""
    data, kind = picture(draw)
    data, name = damaged(draw, data), f"one.{draw(st.sampled_from([kind, 'png', 'txt', 'parquet']))}"
    (folder / name).write_bytes(data)
    if draw(st.integers(0, 19)) == 0:
        (folder / name).unlink()
        os.mkfifo(folder / name)
    return ["predict", str(base / "run"), str(folder / name)], [name], (0, 1)


def column(draw, count):
    """Return a column of any type."""
    cell = draw(st.sampled_from([st.integers(-2, 12), st.one_of(st.none(), st.integers(0, 9)), LETTERS, st.booleans(),
                                 st.floats(allow_subnormal=False), st.binary(max_size=9), st.just(None), st.integers(2**62, 2**63 - 1),
                                 st.lists(st.integers(0, 3), max_size=2), st.sampled_from(["0", "1"]),
                                 st.sampled_from(range(10))]))
    return draw(st.lists(cell, min_size=count, max_size=count))


def tables(draw, folder, base):
    """evaluate on parquet files with odd columns, notes and bytes."""
    (folder / "data").mkdir()
    for split in draw(st.sampled_from([["train", "test"], ["train", "test"], ["test"], ["0000", "train"]])):
        count = draw(st.integers(0, 4))
        pixels = [picture(draw, (8, 8))[0] for _ in range(count)]
        if count and draw(st.booleans()):
            pixels[0] = draw(st.one_of(st.none(), st.just(damaged(draw, pixels[0]))))
        cells = draw(st.sampled_from([pixels, [{"bytes": p, "path": None} for p in pixels],
                                      [{"path": "/etc/passwd"} for p in pixels], [None] * count]))
        names = draw(st.sampled_from([["img", "label"], ["image", "labels"], ["a", "b"], ["label", "image"], ["img", "img"]]))
        try:
            table = pa.Table.from_arrays([pa.array(cells), pa.array(column(draw, count))], names=names)
        except (pa.ArrowException, OverflowError, TypeError):
            table = pa.table({"img": pa.array(cells)})
        if draw(st.booleans()):
            classes = list(map(str, range(10)))
            note = {"info": {"features": {names[0]: {"_type": "Image"}, names[1]: {"_type": "ClassLabel", "names": classes}}}}
            table = table.replace_schema_metadata({"huggingface": json.dumps(altered(draw, note))})
        file = folder / "data" / f"{split}-0.parquet"
        parquet.write_table(table, file)
        if draw(st.integers(0, 2)) == 0:
            file.write_bytes(damaged(draw, file.read_bytes()))
    return ["evaluate", str(base / "run"), "--device", "cpu", "--data", str(folder / "data")], ["data", "class"], (0, 2)


def tensors_altered(draw, tensors):
    """Return tensors with one of them gone, renamed, reshaped, of another type, or no numbers."""
    tensors = {name: t.clone() for name, t in tensors.items()}
    name = draw(st.sampled_from(sorted(tensors)))
    one = tensors.pop(name)
    way = draw(st.sampled_from(["gone", "renamed", "reshaped", "type", "nan", "scalar", "none"]))
    if way == "none":
        return {}
    if way != "gone":
        new = {"renamed": one, "reshaped": torch.zeros(*one.shape, 2), "type": one.to(draw(st.sampled_from(
            [torch.int8, torch.float16, torch.bool, torch.complex64]))), "scalar": torch.zeros(()),
            "nan": torch.full(one.shape, float("nan")) if one.is_floating_point() else one - 1}[way]
        tensors[draw(st.sampled_from(["x", "optimizer.x.y", "model.", "optimizer.99.step", "a.b"])) if way == "renamed"
                else name] = new
    return tensors


def checkpoints(draw, folder, base):
    """resume, predict and published weights, from files that were damaged, or sealed with something else in them."""
    where = draw(st.sampled_from(["checkpoint", "model", "weights"]))
    if where == "weights":
        return weights(draw, folder, base)
    run = folder / "run"
    shutil.copytree(base / ("half" if where == "checkpoint" else "run"), run)
    (file,) = run.glob("*.safetensors")
    if draw(st.booleans()):
        file.write_bytes(damaged(draw, file.read_bytes()))
    else:
        tensors, meta = read_checkpoint(file)
        if draw(st.booleans()):
            tensors = tensors_altered(draw, tensors)
        else:
            meta = altered(draw, meta)
        write_checkpoint(file, tensors, meta)
    if where == "model":
        (folder / "one.png").write_bytes((base / "one.png").read_bytes())
        return ["predict", str(run), str(folder / "one.png")], ["run", "model"], (0, 2)
    return ["train", "--resume", "--out", str(run)], ["run", "checkpoint", "the loss became"], (0, 1, 2)


def weights(draw, folder, base):
    """published weights from a file that holds something else."""
    (folder / "images" / "n01440764").mkdir(parents=True)
    shutil.copy(base / "one.png", folder / "images" / "n01440764" / "one.png")
    file = folder / draw(st.sampled_from(["w.pth", "w.safetensors", "w.pt", "w.bin", "w.tar"]))
    tensors = tensors_altered(draw, load_file(base / "run" / "model.safetensors"))
    if file.suffix == ".safetensors" and draw(st.booleans()):
        save_file(tensors, file)
    else:
        key = draw(st.sampled_from(["state_dict", "model", "ema", "x", 3]))
        torch.save(draw(st.sampled_from([tensors, {key: tensors}, {key: {key: tensors}}, [tensors], list(tensors.values()), None,
                                         {key: 1}, {**tensors, "epoch": 3}, Path("x"), {1: torch.zeros(1)}])), file)
    if draw(st.booleans()):
        file.write_bytes(damaged(draw, file.read_bytes()))
    return ["evaluate", "--pretrained", "convmixer_768_32", "--weights", str(file), "--device", "cpu", "--data",
            str(folder / "images")], [file.name], (2,)


def notes(draw, folder, base):
    """A run whose config.json, command.json, run.json or metrics.jsonl says something else."""
    command = draw(st.sampled_from(["predict", "evaluate", "train", "train"]))
    run = folder / "run"
    shutil.copytree(base / ("half" if command == "train" else "run"), run)
    file = run / draw(st.sampled_from(["config.json", "config.json", "command.json", "run.json"]))
    if not file.exists():
        shutil.copy(base / "run" / file.name, file)
    if draw(st.integers(0, 3)) == 0:
        file.write_bytes(damaged(draw, file.read_bytes()))
    else:
        note = altered(draw, json.loads(file.read_text("utf8")))
        file.write_text(json.dumps(draw(st.one_of(st.just(note), LEAVES)) if draw(st.integers(0, 9)) == 0 else note))
    words = {"predict": ["predict", str(run), str(base / "one.png")], "evaluate": ["evaluate", str(run), "--device", "cpu"],
             "train": ["train", "--resume", "--out", str(run)]}[command]
    return words, [], (0, 1, 2)


VALUES = st.one_of(LETTERS, NUMBERS.map(str), st.sampled_from(
    ["", "-", "--", "nan", "inf", "1e400", "none", "true", "0.5", "1,5", "½", "٣", "0x10", "1_0", "~", "~x", "../x", "/", ".",
     "/dev/null", "x" * 5000, "\n", "'", "%s", "{}", "run", "digits", "cpu", "cuda:99", "mps", "3", "all", "tiny"]))
COMMANDS = {
    "info": "dim depth kernel-size patch-size num-classes in-chans image-size json",
    "train": "out preset data resume finetune weights epochs seed device set backup tensorboard json",
    "ablate": "out table scale seeds only budget jobs data device merge json",
    "evaluate": "data split pretrained weights device json",
    "predict": "pretrained top json",
    "export": "onnx torch-export json",
}
FLAGS = {"json", "resume", "tensorboard"}
SETTINGS = list(Config.__annotations__)


def lines(draw, folder, base):
    """Command lines of known and unknown words."""
    command = draw(st.sampled_from([*COMMANDS, "train", "train", "info", "inof", ""]))
    words, known = [command], COMMANDS.get(command, "out").split()
    if command == "train" and draw(st.booleans()):  # one setting that may be anything, the rest is fine
        name = draw(st.sampled_from([*SETTINGS, "lr=", "x", ""]))
        small = [w for pair in zip(TINY[::2], TINY[1::2]) if not pair[1].startswith(f"{name}=") for w in pair]
        more = [] if name == "epochs" else ["--epochs", "1"]
        return ["train", *small, *more, "--out", str(folder / "out"), "--set", f"{name}={draw(VALUES)}"], [], (0, 1, 2)
    for _ in range(draw(st.integers(0, 5))):
        name = draw(st.sampled_from([*known, "x"]))
        words.append(f"--{name}")
        if name not in FLAGS:
            words.append(draw(VALUES))
    words += draw(st.lists(VALUES, max_size=2)) if command in ("predict", "evaluate", "export", "") else []
    if command in ("ablate", "export") or (command == "train" and "--help" not in words):
        words.append("--bad")  # these would work for minutes where all the words are right
    return words, [], (0, 1, 2)


KINDS = {"pictures": pictures, "tables": tables, "checkpoints": checkpoints, "notes": notes, "lines": lines}


def make_base(folder):
    """A finished run, one that was stopped after its first step, and a picture."""
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "one.png")
    words = ["train", *TINY, "--epochs", "2", "--out"]
    assert call([*words, str(folder / "run")])[0] == 0
    os.environ["CONVMIXER_CACHE"] = str(folder / "cache")
    show, watch.Bar.__call__ = watch.Bar.__call__, lambda bar, event: os.kill(os.getpid(), signal.SIGTERM)
    assert call([*words, str(folder / "half")])[0] == 128 + signal.SIGTERM
    watch.Bar.__call__ = show


def run(kind, examples, number, base, small):
    """Try so many inputs of a kind; return how many were tried, and what broke a promise, a text for each way."""
    tried, broken = [], {}

    @seed(number)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck),
              report_multiple_bugs=False)
    @given(st.data())
    def one(data):
        with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
            folder = Path(name).resolve() / "work"
            folder.mkdir()
            os.environ["CONVMIXER_CACHE"] = str(folder / "cache")
            os.chdir(folder)
            words, named, right = KINDS[kind](data.draw, folder, base)
            tried.append(words)
            try:
                judge(folder, words, named, right)
            except Broken as error:
                error = Broken(f"convmixer {' '.join(map(repr, words))}\n  {error}")
                if small:
                    raise error from None
                broken.setdefault(re.sub(r"\d+|'.*?'|base-\w+|fuzz-\w+", "", str(error).split("\n", 1)[1]), str(error))
            finally:
                os.chdir(base)

    one()
    return len(tried), list(broken.values())


def main():
    """Try every kind; stop at the first input that breaks a promise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=2000, help="of all kinds together")
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="look for the smallest input that fails")
    args = parser.parse_args()
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, now + ROOM))
    kinds, bad = [args.only] if args.only else list(KINDS), 0
    with tempfile.TemporaryDirectory(prefix="base-") as name:
        base = Path(name)
        make_base(base)
        for kind in kinds:
            began = time.monotonic()
            tried, broken = run(kind, args.examples // len(kinds), args.seed, base, args.small)
            print(f"{kind}: {tried} inputs, {len(broken)} faults, {time.monotonic() - began:.0f} s", *broken, sep="\n  ",
                  flush=True)
            bad += len(broken)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()

"""The command line: every command, every wrong use in one line, a run killed and resumed, plain text where nobody watches."""

import contextlib
import errno
import io
import json
import os
import pty
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import HOUR, offline
from PIL import Image

from convmixer_edu import __version__, anatomy, checkpoint, cli, watch
from convmixer_edu.ablate import SCALES
from convmixer_edu.checkpoint import read_checkpoint
from convmixer_edu.pretrained import PUBLISHED
from convmixer_edu.recipe import PRESETS

CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
PROGRAM = Path(sys.executable).with_name("convmixer")
TINY = ("--preset digits --device cpu --epochs 2 --set dim=8 --set depth=1 --set limit=200 --set patch_size=2 "
        "--set checkpoint_seconds=0")


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """A folder and a cache of its own, digits as the data, and a Hub that nobody asks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONVMIXER_DATA", "digits")
    monkeypatch.setenv("CONVMIXER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CONVMIXER_DEBUG", raising=False)


def call(line):
    """The command in this process: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        cli.main(shlex.split(line))
    assert "\x1b" not in out.getvalue() + err.getvalue()
    return end.value.code, out.getvalue(), err.getvalue()


def works(line, said=""):
    """What a command that must succeed says on stdout; on stderr it says just this."""
    code, out, err = call(line)
    assert code == 0 and err == said, err
    return out


def fails(line, *words, code=2):
    """A command that must fail, with one line that holds these words."""
    ended, out, err = call(line)
    assert ended == code and not out, (ended, out, err)
    assert err.endswith("\n") and len(err.splitlines()) == 1 and "Traceback" not in err, err
    assert err.startswith("convmixer: ") and all(word in err for word in words), err
    return err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run on digits."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    folder.parent.joinpath("said").write_text(works(f"train --out {folder} {TINY}"))
    return folder


def picture(path, mode="RGB", size=(20, 12)):
    """A picture of any mode and size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 256, size[::-1], dtype=np.uint8))
    image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    image.save(path)
    return path


def class_folders(root, train=("cat", "dog"), test=("cat", "dog"), size=(8, 8)):
    """A small folder of class folders."""
    for split, names in (("train", train), ("test", test)):
        for name in names:
            for i in range(3):
                picture(root / split / name / f"{i}.png", size=size)
    return root


# ---------------------------------------------------------------- help


def test_help_needs_nothing_heavy():
    heavy = {"torch", "timm", "torchvision", "datasets", "rich", "numpy", "PIL"}
    script = f"import sys\ntry:\n from convmixer_edu.cli import main\n main(['--help'])\nfinally:\n" \
             f" print(sorted({heavy} & set(sys.modules)), file=sys.stderr)"
    before = os.times()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=HOUR)
    assert done.returncode == 0 and done.stderr.strip() == "[]"
    assert all(word in done.stdout for word in ("train", "evaluate", "predict", "info", "--version"))
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent < 10  # seconds of a processor, however busy it is; importing torch alone would take them


def test_program_is_plain_even_where_colours_are_forced():
    env = offline(FORCE_COLOR=1, GITHUB_ACTIONS="true", PY_COLORS=1, COLUMNS=100)
    helped = subprocess.run([PROGRAM, "train", "--help"], env=env, capture_output=True, text=True, timeout=HOUR)
    assert helped.returncode == 0 and "\x1b" not in helped.stdout and not helped.stderr
    assert all(option in helped.stdout for option in (
        "--preset", "--data", "--out", "--resume", "--epochs", "--seed", "--device", "--set", "--json"))
    wrong = subprocess.run([PROGRAM, "trian"], env=env, capture_output=True, text=True, timeout=HOUR)
    assert wrong.returncode == 2 and not wrong.stdout
    assert len(wrong.stderr.splitlines()) == 1 and "\x1b" not in wrong.stderr


def test_version():
    assert works("--version") == f"convmixer {__version__}\n"


def test_names_are_those_of_the_library():
    helped = re.sub(r"\s+", " ", works("train --help") + works("ablate --help"))
    assert all(name in helped for name in (*PRESETS, *SCALES))
    for written, known in ((cli.Preset, PRESETS), (cli.Scale, SCALES), (cli.Published, PUBLISHED)):
        assert get_args(written) == tuple(known)


# ---------------------------------------------------------------- info


@pytest.mark.parametrize("sizes", [dict(dim=1536, depth=20), dict(dim=768, depth=32, kernel_size=7),
                                   dict(dim=24, depth=2, kernel_size=4, patch_size=3, num_classes=7, in_chans=1,
                                        image_size=29)])
def test_info_counts_what_anatomy_counts(sizes):
    words = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in sizes.items())
    told = json.loads(works(f"info {words} --json"))
    full = {"kernel_size": 9, "patch_size": 7, "num_classes": 1000, "in_chans": 3, "image_size": 224, **sizes}
    assert {name: told[name] for name in full} == full
    side = full.pop("image_size")
    assert told["parameters"] == anatomy.count_parameters(**full)
    assert told["macs"] == anatomy.count_macs(**full, image_size=side)
    assert told["macs_without_depthwise"] == anatomy.count_macs(**full, image_size=side, exclude_depthwise=True)
    assert told["receptive_field"] == anatomy.receptive_field(full["depth"], full["kernel_size"], full["patch_size"])
    for total in ("parameters", "macs"):
        assert sum(layer[total] for layer in told["layers"]) == told[total]
    assert told["layers"][-1]["shape"] == [full["num_classes"]]
    plain = works(f"info {words}")
    assert all(f"{told[key]:,}" in plain for key in ("parameters", "macs", "macs_without_depthwise"))
    assert f"Blocks 4 to {full['depth'] + 2} are like block 3." in plain
    shape = " x ".join(map(str, told["layers"][0]["shape"]))
    assert shape in plain and not any(line != line.rstrip() for line in plain.splitlines())


def test_info_of_one_block_names_no_others():
    assert "are like" not in works("info --dim 8 --depth 1 --image-size 14")


# ---------------------------------------------------------------- train


def test_train_says_what_it_did(trained):
    said = (trained.parent / "said").read_text()
    record = json.loads((trained / "run.json").read_text())
    assert re.search(r"^epoch 2/2  loss \d\.\d{3}  [\d,]+ images/s  0:00 left$", said, re.M)
    assert f"{record['test_accuracy']:.2f} %" in said and str(trained) in said
    names = {file.name for file in trained.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "model.safetensors", "run.json", "command.json"}
    command = json.loads((trained / "command.json").read_text())
    assert command == {"command": f"convmixer train --out {trained} {TINY}", "source": "digits", "device": "cpu"}
    config = json.loads((trained / "config.json").read_text())["config"]
    assert (config["dim"], config["epochs"], config["limit"]) == (8, 2, 200)
    assert config["flip"] is PRESETS["digits"].flip


def test_train_json_is_one_object_and_nothing_else(trained):
    lines = works(f"train --out run --json {TINY}").splitlines()
    assert len(lines) == 1
    told, record = json.loads(lines[0]), json.loads(Path("run/run.json").read_text())
    assert told == {"run": "run", **record}
    assert told["test_accuracy"] == json.loads((trained / "run.json").read_text())["test_accuracy"]


def test_held_out_accuracy_is_shown():
    assert re.search(r"^epoch 1/2  loss \S+  accuracy \d+\.\d %  ", works(f"train --out run {TINY} --set holdout=50"), re.M)


def test_preset_digits_needs_no_data_and_others_take_the_default(monkeypatch, tmp_path):
    monkeypatch.setenv("CONVMIXER_DATA", str(class_folders(tmp_path / "pets")))
    works(f"train --out run {TINY}")
    assert json.loads(Path("run/config.json").read_text())["source"] == "digits"
    works("train --out pets-run --epochs 2 --seed 3 --device cpu --set dim=4 --set depth=1 --set depthwise=library")
    note = json.loads(Path("pets-run/config.json").read_text())
    assert note["classes"] == ["cat", "dog"] and note["config"]["seed"] == 3
    assert note["config"]["patch_size"] == PRESETS["quick"].patch_size
    assert json.loads(Path("pets-run/command.json").read_text())["source"] == str(tmp_path / "pets")


# ---------------------------------------------------------------- resume


def steps_saved(folder):
    return max((int(file.stem[11:]) for file in folder.glob("checkpoint-*.safetensors")), default=0)


def wait_for(process, folder, step):
    """Wait until a running process has saved a step."""
    until = time.monotonic() + HOUR
    while steps_saved(folder) < step:
        assert process.poll() is None and time.monotonic() < until, (step, process.poll())
        time.sleep(0.002)


def start(*words, **streams):
    env = {**offline(OMP_NUM_THREADS=1, TERM="xterm"), "CONVMIXER_CACHE": os.environ["CONVMIXER_CACHE"]}
    env.pop("NO_COLOR", None)
    return subprocess.Popen([PROGRAM, *words], env=env, text=True, **{"stdout": subprocess.PIPE, **streams})


def on_a_terminal(*words):
    """The program with a terminal for its stderr: (exit code, stdout, what the terminal saw)."""
    master, slave = pty.openpty()
    process = start(*words, stderr=slave)
    os.close(slave)
    seen = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while some := os.read(master, 4096):
            seen += some
    os.close(master)
    out, _ = process.communicate(timeout=HOUR)
    return process.returncode, out, seen.decode()


def test_killed_and_resumed_it_is_the_same_run(tmp_path):
    recipe = TINY.replace("--epochs 2", "--epochs 40")  # 3 steps an epoch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        works(f"train --out quiet {recipe} --set mixup=0.5 --set erase=0.2")
    finally:
        torch.set_num_threads(threads)
    step = random.randrange(2, 80)
    print("killed after", step)
    process = start(*shlex.split(f"train --out moved {recipe} --set mixup=0.5 --set erase=0.2"))
    wait_for(process, tmp_path / "moved", step)
    process.kill()
    process.communicate(timeout=HOUR)
    assert process.returncode == -signal.SIGKILL and step <= steps_saved(tmp_path / "moved") < 120
    code, out, seen = on_a_terminal("train", "--resume", "--out", "moved", "--json")
    assert code == 0 and len(out.splitlines()) == 1 and json.loads(out)["steps"] == 120
    assert all(word in seen for word in ("loss", "images/s", "left", "epoch 40/40", "\x1b[")), seen
    one, other = (read_checkpoint(Path(name, "model.safetensors"))[0] for name in ("quiet", "moved"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_resume_of_a_finished_run_tells_it_again(trained):
    record = json.loads((trained / "run.json").read_text())
    again = json.loads(works(f"train --resume --out {trained} --json"))
    assert again == {"run": str(trained), **record}
    assert works(f"train --resume --out {trained} {TINY}").splitlines()[0].startswith("test accuracy")


def test_resume_knows_the_folder_of_images(tmp_path, monkeypatch):
    pets = class_folders(tmp_path / "elsewhere" / "pets")
    works(f"train --out run {TINY} --data {pets}")
    Path("run/run.json").unlink(), Path("run/metrics.jsonl").unlink()  # as if it had just begun
    where = f"convmixer: images from {pets}, as run says; --data takes others\n"  # the folder may be a stranger's
    works("train --resume --out run", where)
    works("evaluate run", where)
    Path("run/run.json").unlink(), Path("run/metrics.jsonl").unlink()  # as if it had just begun
    pets = pets.rename(tmp_path / "moved")
    monkeypatch.delenv("CONVMIXER_DATA")
    fails("train --resume --out run", "elsewhere/pets", "--data")
    fails("evaluate run", "elsewhere/pets", "--data")
    monkeypatch.setenv("CONVMIXER_DATA", "digits")
    fails("train --resume --out run", "other training images")
    works(f"train --resume --out run --data {pets}")


@pytest.mark.parametrize("more, words", [
    ("--epochs 3", ["another recipe", "epochs (2 there, 3 now)"]),
    ("--seed 1", ["seed (0 there, 1 now)"]),
    ("--set lr=0.5", ["lr (0.02 there, 0.5 now)"]),
    ("--preset quick", ["another recipe"]),
    ("--set checkpoint_seconds=soon", ["checkpoint_seconds is 'soon'"]),
])
def test_resume_refuses_what_differs(trained, more, words):
    fails(f"train --resume --out {trained} {more}", *words)


# ---------------------------------------------------------------- evaluate and predict


def test_evaluate_agrees_with_the_run(trained):
    record = json.loads((trained / "run.json").read_text())
    seen = json.loads(works(f"evaluate {trained} --device cpu --json"))
    assert seen["images"] == record["test_images"] and seen["accuracy"] == pytest.approx(record["test_accuracy"], abs=1e-3)
    assert seen["run"] == str(trained) and seen["split"] == "test"
    plain = works(f"evaluate {trained} --data digits --split train")
    assert "1,438 images (train)" in plain and "images/s" in plain


@pytest.mark.parametrize("mode, size", [("L", (8, 8)), ("RGB", (40, 9)), ("RGBA", (5, 30)), ("P", (64, 64)),
                                        ("1", (1, 3)), ("CMYK", (300, 200)), ("I;16", (16, 16))])
def test_predict_takes_any_size_and_mode(trained, tmp_path, mode, size):
    path = picture(tmp_path / f"a picture.{'tif' if mode == 'CMYK' else 'png'}", mode, size)
    (seen,) = json.loads(works(f"predict {trained} '{path}' --top 10 --json"))["predictions"]
    chances = [best["probability"] for best in seen["classes"]]
    assert seen["image"] == str(path) and sum(chances) == pytest.approx(1, abs=1e-5)
    assert chances == sorted(chances, reverse=True)
    assert sorted(best["class"] for best in seen["classes"]) == list("0123456789")


def test_predict_with_the_network_that_comes_along(tmp_path):
    one, two = (shlex.quote(str(picture(tmp_path / f"{n}.png"))) for n in "ab")
    told = json.loads(works(f"predict --pretrained {one} {two} --json"))["predictions"]
    assert [len(t["classes"]) for t in told] == [5, 5]
    assert {c["class"] for t in told for c in t["classes"]} <= set(CIFAR10)


def test_train_writes_what_its_watchers_see(tmp_path):
    works(f"train --out run {TINY} --tensorboard --profile")
    assert json.loads(Path("run/trace.json").read_text())["traceEvents"]
    assert [f.name for f in Path("run/tensorboard").iterdir()][0].startswith("events")
    assert json.loads(works("train --out run --resume --json"))["steps"] == json.loads(
        Path("run/run.json").read_text())["steps"]


def test_predict_tells_people(trained, tmp_path):
    one, two = picture(tmp_path / "one.png"), picture(tmp_path / "two.png", "L")
    lines = works(f"predict {trained} {one} {two} --top 2").splitlines()
    assert len(lines) == 4 and str(one) in lines[0] and str(two) in lines[2]
    assert all(re.search(r"\d\s+\d+\.\d %$", line) for line in lines)


def test_predict_takes_a_folder_and_goes_on_after_a_bad_picture(trained, tmp_path):
    for name in ("b/2.png", "b/1.png", "a.jpg", ".thumbs/0.png"):
        picture(tmp_path / "album" / name)
    (tmp_path / "album" / "bad.png").write_text("I am a picture")
    (tmp_path / "album" / "notes.txt").write_text("I am not")
    code, out, err = call(f"predict {trained} album --json")
    told = json.loads(out)["predictions"]
    assert [t["image"] for t in told] == ["album/a.jpg", "album/b/1.png", "album/b/2.png"]
    assert code == 1 and err.startswith("convmixer: album/bad.png is not an image") and len(err.splitlines()) == 1
    (tmp_path / "album" / "bad.png").unlink()
    assert len(works(f"predict {trained} album --top 1").splitlines()) == 3
    (tmp_path / "none").mkdir()
    fails(f"predict {trained} none", "none holds no picture")


def test_predict_keeps_a_batch_in_memory(trained, tmp_path, monkeypatch):
    """A thousand pictures take no more memory than a batch: at no time are more read than answered."""
    from convmixer_edu import inference
    open_now, most = [0], [0]
    original, answer = inference.read_image, inference._answer

    def read(*words):
        open_now[0] += 1
        most[0] = max(most[0], open_now[0])
        return original(*words)

    def answered(model, info, top, pictures):
        open_now[0] -= len(pictures)
        return answer(model, info, top, pictures)

    monkeypatch.setattr(inference, "read_image", read)
    monkeypatch.setattr(inference, "_answer", answered)
    paths = [picture(tmp_path / f"{i}.png") for i in range(10)]
    alone = [best for path in paths for best in inference.predict(trained, [path])]
    most[0] = 0
    together = [best for _, best in inference.predict_each(trained, paths, batch_size=4)]
    assert most[0] == 4
    for one, other in zip(alone, together, strict=True):
        assert [n for n, _ in one] == [n for n, _ in other]


@pytest.mark.parametrize("words", ["-h", "train -h", "predict --help"])
def test_help_may_be_asked_for_shortly(words):
    assert "Usage: convmixer" in works(words)


@pytest.mark.parametrize("module", ["convmixer_edu", "convmixer_edu.cli"])
def test_the_package_is_the_command(module):
    done = subprocess.run([sys.executable, "-m", module, "--version"], env=offline(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"convmixer {__version__}\n", "")


def test_the_model_can_be_imported_from_the_package_and_the_import_stays_light():
    script = "import sys, convmixer_edu; print('torch' in sys.modules); from convmixer_edu import ConvMixer; print(ConvMixer.__name__)"
    done = subprocess.run([sys.executable, "-c", script], env=offline(), capture_output=True, text=True)
    assert done.stdout == "False\nConvMixer\n" and not done.stderr


def test_info_needs_no_timm():
    script = "import sys; sys.modules['timm'] = None; from convmixer_edu.cli import main; main(['info', '--dim', '8', '--depth', '2'])"
    done = subprocess.run([sys.executable, "-c", script], env=offline(), capture_output=True, text=True)
    assert done.returncode == 0 and "parameters" in done.stdout, done.stderr


def test_the_home_folder_may_be_written_as_a_tilde(trained, tmp_path, monkeypatch):
    """A shell leaves the ~ of --out=~/run, and of any quoted path."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(trained, tmp_path / "run")
    picture(tmp_path / "one.png")
    assert works("predict '~/run' '~/one.png' --top 1")
    assert json.loads(works(f"train --out=~/other {TINY} --epochs 1 --json".replace("--epochs 2", "")))["run"] == str(tmp_path / "other")


def test_a_folder_that_a_desktop_has_looked_into_is_still_empty(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".DS_Store").write_text("x")
    works(f"train --out run {TINY}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    fails(f"train --out other {TINY}", "other is not empty")


def test_class_names_on_a_terminal_of_ascii(tmp_path):
    class_folders(tmp_path / "d", train=("gr\u00fcn", "\u7f8a"), test=("gr\u00fcn", "\u7f8a"))
    works(f"train --out run --data d {TINY} --json".replace("--preset digits", "--preset quick"))
    ascii_only = offline(PYTHONIOENCODING="ascii", LC_ALL="C", CONVMIXER_CACHE=str(tmp_path / "cache"))
    done = subprocess.run([PROGRAM, "predict", "run", "d/train/gr\u00fcn/0.png"], env=ascii_only, capture_output=True)
    assert done.returncode == 0 and b"gr\\xfcn" in done.stdout and b"\\u7f8a" in done.stdout, done.stderr


def test_pictures_of_several_sizes_are_told_in_the_words_of_the_command(tmp_path):
    class_folders(tmp_path / "d")
    picture(tmp_path / "d" / "train" / "cat" / "odd.png", size=(9, 9))
    fails(f"train --out run --data d {TINY}".replace("--preset digits", "--preset quick"), "odd.png", "--set image_size=")


# ---------------------------------------------------------------- wrong use


@pytest.mark.parametrize("line, words", [
    ("", ["Missing command", "convmixer --help"]),
    ("trian", ["No such command 'trian'"]),
    ("--colour", ["No such option", "--colour"]),
    ("train", ["--out", "convmixer train --help"]),
    ("train --out run --preset fast", ["'fast' is not one of", "'quick', 'digits', 'light25'"]),
    ("train --out run --set speed=1", ["no setting 'speed'", "kernel_size"]),
    ("train --out run --set lr", ["key=value", "'lr'"]),
    ("train --out run --set =1", ["key=value"]),
    ("train --out run --set lr=1 --set lr=2", ["lr is given twice"]),
    ("train --out run --epochs 1 --set epochs=1", ["epochs is given twice"]),
    ("train --out run --set lr=fast", ["lr is 'fast'", "float"]),
    ("train --out run --set dim=8.5", ["dim is '8.5'", "int"]),
    ("train --out run --set lr=nan", ["lr is nan"]),
    ("train --out run --set flip=maybe", ["flip is 'maybe'", "bool"]),
    ("train --out run --set dim=0", ["dim", "0"]),
    ("train --out run --set image_size=-1", ["-1"]),
    ("train --out run --set precision=float8", ["precision is 'float8'", "bfloat16"]),
    ("train --out run --epochs 0", ["epochs", "0"]),
    ("train --out run --epochs many", ["--epochs", "integer"]),
    ("train --out run --seed -1", ["seed is -1", "from 0 to"]),
    ("train --out run --seed 99999999999999999999", ["seed is 99999999999999999999", "from 0 to"]),
    ("train --out run --seed many", ["--seed", "integer"]),
    ("train --out run --preset digits --device gpu", ["device 'gpu' cannot be used here", "cuda"]),
    ("train --out run --device cuda:77", ["cuda:77", "try cpu"]),
    ("train --out run --device meta", ["device 'meta' cannot be used here"]),
    ("train --out run --set depthwise=units --set compile=true", ["depthwise is 'units'", "compile to False"]),
    ("train --out run --data nowhere", ["no folder nowhere", "digits"]),
    ("train --out run --preset quick --set patch_size=9", ["patch_size is 9", "8 x 8"]),
    ("train --out run --resume", ["run holds no run", "config.json is missing"]),
    ("evaluate run", ["run holds no run"]),
    ("evaluate", ["RUN"]),
    ("predict a.png run", ["IMAGE", "'a.png' does not exist"]),
    ("predict . .", [". holds no finished run"]),
    ("predict .", ["no picture was given", "IMAGE"]),
    ("predict", ["IMAGE"]),
    ("predict --pretrained", ["IMAGE"]),
    ("predict --pretrained gone.png", ["'gone.png' does not exist"]),
    ("predict . . --top 0", ["--top"]),
    ("export run", ["--onnx FILE", "--torch-export FILE"]),
    ("export run --torch-export net.pt2", ["run holds no finished run"]),
    ("export --torch-export gone/net.pt2", ["no folder gone"]),
    ("export --torch-export net --onnx net", ["net is named twice", "a file for each format"]),
    ("export --torch-export net.pt2 --device tpu", ["device 'tpu' cannot be used here"]),
    ("export --torch-export net.pt2 --device cuda:99", ["device 'cuda:99' cannot be used here"]),
    ("info --dim ten", ["--dim", "integer"]),
    ("info --depth 0", ["depth", "0"]),
    ("info --kernel-size -3", ["kernel_size", "-3"]),
    ("info --image-size 6", ["image_size", "6"]),
    ("info --colour red", ["--colour"]),
    ("info tomorrow", ["tomorrow"]),
])
def test_wrong_words_are_one_line(line, words):
    fails(line, *words)
    assert not Path("run").exists()


def test_bad_pictures_alone_are_still_one_json_object(trained):
    Path("no.png").write_text("no picture")
    code, out, err = call(f"predict {trained} no.png --json")
    assert code == 1 and json.loads(out)["predictions"] == [] and "no.png" in err


def test_export_writes_checks_and_times(trained):
    told = json.loads(works(f"export {trained} --torch-export net.pt2 --json"))
    assert told["files"][0]["bytes"] == Path("net.pt2").stat().st_size and told["files"][0]["difference"] <= 1e-4
    assert {row["images"] for row in told["latency"]} == {1, 16} and told["shape"] == [1, 8, 8]
    kept = {"notes.json": ""}
    ask = torch.export.load("net.pt2", extra_files=kept).module()  # our own, of a moment ago
    assert ask(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    assert json.loads(json.loads(kept["notes.json"])["classes"]) == [str(i) for i in range(10)]


def test_export_to_onnx_tells_people_or_names_what_is_missing(trained, monkeypatch):
    pytest.importorskip("onnxruntime")
    code, out, err = call(f"export {trained} --onnx net.onnx --device cpu")
    lines, told = out.splitlines(), err.splitlines()
    assert code == 0 and told[0] == "convmixer: net.onnx is written and checked" and len(told) > 1
    assert all(line.startswith("convmixer: PyTorch timed: ") for line in told[1:])
    assert lines[0].startswith("net.onnx") and "off by" in lines[0] and any("ONNX Runtime" in line for line in lines)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    fails(f"export {trained} --onnx other.onnx", "onnxscript", "pip install 'convmixer-edu[export]'")
    assert not Path("other.onnx").exists()


def test_folders_that_are_no_data(tmp_path):
    train = f"train --out run {TINY} --data"
    Path("empty").mkdir()
    fails(f"{train} empty", "empty", "train and test")
    picture(tmp_path / "file.png")
    fails(f"{train} file.png", "file.png is a file")
    fails(f"{train} {class_folders(tmp_path / 'one', ('cat',), ('cat',))}", "only the class cat")
    fails(f"{train} {class_folders(tmp_path / 'differ', test=('cat', 'cow'))}", "differ", "cow", "dog")
    fails(f"{train} {class_folders(tmp_path / 'lacks', test=())}", "lacks")
    text = class_folders(tmp_path / "text")
    (text / "train" / "cat" / "notes.txt").write_text("no picture")
    fails(f"{train} {text}", "notes.txt", "not an image")
    fake = class_folders(tmp_path / "fake")
    (fake / "test" / "dog" / "0.png").write_text("no picture")
    fails(f"{train} {fake}", "0.png is not an image")
    bare = class_folders(tmp_path / "bare")
    shutil.rmtree(bare / "train" / "dog")
    (bare / "train" / "dog").mkdir()
    fails(f"{train} {bare}", "dog is empty")
    mixed = class_folders(tmp_path / "mixed")
    picture(mixed / "train" / "cat" / "0.png", size=(9, 9))
    fails(f"{train} {mixed}", "9x9")
    assert not Path("run").exists()
    works(f"{train} {mixed} --set image_size=8")


def test_a_folder_that_is_taken(trained, tmp_path):
    before = {file.name: file.read_bytes() for file in trained.iterdir()}
    fails(f"train --out {trained} {TINY}", "not empty", "--resume")
    assert {file.name: file.read_bytes() for file in trained.iterdir()} == before
    Path("file").touch()
    fails(f"train --out file {TINY}", "file is a file")
    fails(f"train --out file/below {TINY}", "file")
    Path("free").mkdir()
    works(f"train --out free {TINY}")


def test_runs_that_are_none(trained, tmp_path):
    image = picture(tmp_path / "a.png")
    for name in ("config.json", "model.safetensors"):
        part = shutil.copytree(trained, tmp_path / f"without-{name}")
        (part / name).unlink()
        for line in (f"evaluate {part}", f"predict {part} {image}"):
            fails(line, name, "missing")
    fails(f"evaluate {trained / 'model.safetensors'}", "holds no run")
    fails(f"predict {image} {image}", "holds no finished run")


@pytest.mark.parametrize("name, content, words", [
    ("model.safetensors", b"no weights", ["model.safetensors", "damaged"]),
    ("model.safetensors", b"", ["model.safetensors"]),
    ("config.json", b"{", ["config.json is damaged"]),
    ("config.json", b"[1]", ["config.json is damaged"]),
    ("config.json", b"\xff\xfe", ["config.json is damaged"]),
    ("command.json", b"{}", ["command.json is damaged"]),
])
def test_damaged_runs(trained, tmp_path, name, content, words):
    broken = shutil.copytree(trained, tmp_path / "broken")
    (broken / name).write_bytes(content)
    fails("evaluate broken", *words)
    if name != "model.safetensors":
        fails("train --resume --out broken", *words)


@pytest.mark.parametrize("name, place, value, commands", [
    ("config.json", ("config", "speed"), 1, "predict evaluate"),
    ("config.json", ("config", "dim"), -8, "predict"),
    ("config.json", ("image_size",), ["8", "8"], "predict evaluate"),
    ("config.json", ("image_size",), [0, 8], "predict evaluate"),
    ("config.json", ("mean",), [None], "predict evaluate"),
    ("config.json", ("std",), [0.0], "predict evaluate"),
    ("config.json", ("std",), [], "predict evaluate"),
    ("config.json", ("channels",), 3, "predict evaluate"),
    ("config.json", ("choice",), None, "train"),
    ("config.json", ("choice", "dtype"), "int9", "train"),
    ("config.json", ("depthwise",), "x", "train"),
    ("command.json", ("device",), [0], "train"),
    ("run.json", ("seconds",), [], "train"),
    ("run.json", ("config", "dim"), None, "train"),
    ("run.json", ("peak_memory_mb",), [], "train"),
])
def test_notes_that_say_something_odd(trained, tmp_path, name, place, value, commands):
    """Found by tools/fuzz.py, which tries thousands."""
    broken = shutil.copytree(trained, tmp_path / "broken")
    note = at = json.loads((broken / name).read_text())
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    (broken / name).write_text(json.dumps(note))
    lines = {"predict": f"predict broken {picture(tmp_path / 'a.png')}", "evaluate": "evaluate broken",
             "train": "train --resume --out broken"}
    for command in commands.split():
        fails(lines[command], name)


def test_a_picture_that_is_a_pipe_is_not_waited_for(trained, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    fails(f"predict {trained} pipe.png", "pipe.png", "a pipe", code=1)


@pytest.mark.parametrize("content", [b"P5 1\x84 1 255 0", b"Pf\n1 1\n\x84-1.0\n" + bytes(4), b"\0\0\1\0", b""])
def test_pictures_are_refused_in_our_words(trained, content):
    Path("odd.png").write_bytes(content)
    _, _, err = call(f"predict {trained} odd.png")
    assert err == "convmixer: odd.png is not an image that can be read: its bytes are no picture\n"


def test_pictures_that_are_none(trained, tmp_path):
    Path("text.png").write_text("no picture")
    fails(f"predict {trained} text.png", "text.png is not an image", code=1)
    fails(f"predict {trained} {picture(tmp_path / 'good.png')} gone.png", "'gone.png' does not exist")


def test_data_that_do_not_fit_the_model(trained, tmp_path):
    pets = class_folders(tmp_path / "pets")
    fails(f"evaluate {trained} --data {pets}", "cat, dog", "the model knows")
    digits = class_folders(tmp_path / "colours", tuple("0123456789"), tuple("0123456789"))
    fails(f"evaluate {trained} --data {digits}", "3 channels", "wants 1")
    fails(f"evaluate {trained} --split middle", "no split 'middle'")


# ---------------------------------------------------------------- used rightly, and failed


def test_a_loss_that_is_no_number():
    code, out, err = call(f"train --out run {TINY} --set lr=1e30 --set clip=0 --json")
    assert code == 1 and not out and len(err.splitlines()) == 1
    assert "the loss became" in err and "lower lr" in err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_disk_and_a_folder_that_may_not_be_written(monkeypatch, number):
    def full(*_, **__):
        raise OSError(number, os.strerror(number), "run")

    with monkeypatch.context() as for_now:
        for_now.setattr(checkpoint.os, "fsync", full)
        fails(f"train --out run {TINY}", os.strerror(number), "make room", code=1)
    monkeypatch.setattr(Path, "mkdir", full)
    fails(f"train --out other {TINY}", os.strerror(number), code=1)


def test_no_memory(monkeypatch):
    fails(f"train --out run {TINY.replace('dim=8', 'dim=10000000')}", "2**32 weights")

    def too_much(*given):
        torch.empty(2**60)
    with monkeypatch.context() as for_now:
        for_now.setattr("convmixer_edu.train.build_model", too_much)
        fails(f"train --out run {TINY}", "not enough memory", code=1)
    for side in (10**12, 10**23):
        fails(f"info --dim {side}", "not enough memory", code=1)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop(monkeypatch, number, code):
    with monkeypatch.context() as for_now:
        for_now.setattr(cli, "_remember", lambda *known: signal.raise_signal(number))
        fails(f"train --out run {TINY}", f"stopped by signal {number.value} after step 1", "--resume", code=code)
    assert [file.name for file in Path("run").glob("checkpoint-*")] == ["checkpoint-000000001.safetensors"]
    works("train --out run --resume --data digits")


def test_interrupted_before_it_began(monkeypatch):
    def interrupted(*words):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_recipe", interrupted)
    fails(f"train --out run {TINY}", "stopped", code=130)


def test_a_bug_shows_where_it_is(monkeypatch):
    monkeypatch.setattr(cli, "_recipe", lambda *words: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "--out", "run"])
    monkeypatch.setenv("CONVMIXER_DEBUG", "1")
    with pytest.raises(ValueError, match="--set wants"):
        cli.main(["train", "--out", "run", "--set", "fast"])


def test_warnings_are_one_line(trained, tmp_path):
    broken = shutil.copytree(trained, tmp_path / "broken")
    (broken / "run.json").unlink()
    (broken / "checkpoint-000000001.safetensors").write_bytes(b"no checkpoint")
    code, out, err = call("train --resume --out broken")
    first, second = err.splitlines()
    assert code == 2 and not out and first.startswith("convmixer: warning: broken/checkpoint-000000001.safetensors")
    assert second.startswith("convmixer: no checkpoint in broken can be used")


def test_a_closed_pipe_is_no_error(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as for_now, os.fdopen(writer, "w") as nobody, pytest.raises(SystemExit) as end:
        for_now.setattr(sys, "stdout", nobody)
        cli.main(["--version"])
    assert end.value.code == 1


# ---------------------------------------------------------------- what people see


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("env, bar", [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_one_bar_on_a_terminal_only(monkeypatch, capsys, env, bar):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "")
    monkeypatch.setenv("COLUMNS", "80")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", Screen())
    with watch.Bar() as tell:
        for step in (1, 99, 100):
            tell({"event": "step", "epoch": 200, "epochs": 200, "step": step, "steps": 100, "loss": 2.25,
                   "images_per_second": 12345.6, "seconds_left": 3725.4})
        tell({"event": "epoch", "epoch": 200, "epochs": 200, "loss": 2.0, "held_out_accuracy": 91.26})
        if tell.bar:
            tell.bar.refresh()
    screen, lines = sys.stderr.getvalue(), capsys.readouterr().out
    facts = "loss 2.000  accuracy 91.3 %  12,346 images/s  1:02:05 left"
    assert ("\x1b" in screen) is bar and (facts in screen) is bar  # nothing is cut at 80 columns
    assert lines == ("" if bar else f"epoch 200/200  {facts}\n")


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3725.4, "1:02:05")])
def test_clock(seconds, text):
    assert watch.clock(seconds) == text


# ---------------------------------------------------------------- many runs


SWEEP = "ablate --scale try --seeds 2 --data digits --device cpu --out sweep"


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A finished sweep of Table 3, and what it said."""
    folder = tmp_path_factory.mktemp("cli") / "sweep"
    return folder, works(SWEEP.replace("--out sweep", f"--out {folder}"))


def test_a_sweep_tells_each_run_and_then_each_difference(swept):
    folder, said = swept
    runs, table = said.split("change", 1)
    lines = runs.splitlines()
    assert len(lines) == 22 and lines[0].startswith("1 of 22  baseline, seed 0: ") and " left" in lines[0]
    assert " left" not in lines[-1] and lines[-1].startswith("22 of 22  no-clip, seed 1: ")
    assert len(table.splitlines()) == 11 and "-2.96" in table and "runs are left" not in table
    assert len(list(folder.glob("try/*/record.json"))) == 22


def test_a_finished_sweep_says_its_table_again_and_runs_nothing(swept):
    folder, said = swept
    again = works(SWEEP.replace("--out sweep", f"--out {folder}"))
    assert again == said[said.index("change"):]


def test_a_sweep_as_json(swept):
    told = json.loads(works(f"ablate --scale try --seeds 2 --out {swept[0]} --data digits --device cpu --json"))
    assert told["done"] == 22 and told["left"] == 0
    relu = next(d for d in told["differences"] if d["arm"] == "relu")
    assert relu["paper"] == -0.37 and relu["ours"]["low"] <= relu["ours"]["mean"] <= relu["ours"]["high"]


def test_one_run_has_no_interval_in_words_and_in_json(tmp_path):
    said = works(SWEEP.replace("--seeds 2", "--seeds 1 --only relu"))
    assert "one run" in said and "inf" not in said
    told = works("ablate --scale try --seeds 1 --out sweep --only relu --data digits --device cpu --json")
    relu = next(d for d in json.loads(told, parse_constant=pytest.fail)["differences"] if d["arm"] == "relu")
    assert relu["ours"]["low"] is relu["ours"]["high"] is None and relu["verdict"] == "not resolved"


def test_what_is_left_of_a_sweep_is_told():
    said = works(SWEEP + " --budget 0.01s")
    assert "22 of 22 runs are left: the same command goes on." in said and "not run" in said


def test_folders_are_merged_by_the_command(swept, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(swept[0], tmp_path / name)
        half = sorted((tmp_path / name / "try").iterdir())
        for run in half[:11] if name == "a" else half[11:]:
            shutil.rmtree(run)
    said = works("ablate --scale try --seeds 2 --merge a --merge b --out both")
    assert said == swept[1][swept[1].index("change"):]
    run = tmp_path / "a/try/relu-seed0/run.json"
    run.write_text(run.read_text().replace('"test_accuracy": ', '"test_accuracy": 1'))
    fails("ablate --scale try --merge a --out new", "relu-seed0 was changed after it was made")


@pytest.mark.parametrize("line, words", [
    ("--table 5", "'5' is not one of '3', '4', 'all'"), ("--scale huge", "'huge' is not one of 'paper200'"),
    ("--budget soon", "--budget is 'soon', expected a time such as 90s"), ("--budget 0", "--budget is '0'"),
    ("--merge nowhere", "Invalid value for '--merge'"), ("--seeds 0", "seeds"), ("--jobs 0", "jobs"),
    ("--only tanh", "no arm 'tanh': expected some of baseline"), ("--device gpu", "device 'gpu' cannot be used here")])
def test_wrong_words_of_a_sweep(line, words, tmp_path):
    fails(f"ablate --out new {line}", words)
    assert not (tmp_path / "new").exists()


def test_a_sweep_stopped_by_a_signal_says_how_to_go_on(tmp_path):
    words = [PROGRAM, *shlex.split(SWEEP.replace("--seeds 2", "--seeds 40"))]
    process = subprocess.Popen(words, env=offline(CONVMIXER_CACHE=tmp_path / "cache"), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    first = process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=HOUR)
    assert first.startswith("1 of 440  baseline, seed 0")
    # between two runs there is nothing to save: the signal ends it as it would any program
    assert process.returncode == -signal.SIGTERM or (
        process.returncode == 143 and "stopped by signal 15: the same command goes on" in err)

"""Data: every source, every mode of picture, every error sentence, and a cache that notices damage."""

import functools
import io
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from hub import serve
from huggingface_hub import HfApi, snapshot_download
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

from convmixer_edu import data
from convmixer_edu.data import (
    DEFAULT_SOURCE,
    ImageSet,
    book_source,
    load_images,
    read_image,
    resolve_source,
    split_holdout,
    stratified_index,
)
from convmixer_edu.model import CIFAR10

ON_THE_HUB, ASK_THE_HUB = data._on_the_hub, data._ask_the_hub


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """A cache of its own, no data source in the environment, and a Hub that nobody asks."""
    monkeypatch.setenv("CONVMIXER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CONVMIXER_DATA", raising=False)
    monkeypatch.setattr(data, "_on_the_hub", lambda source: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def pixels(n=12, channels=3, side=6, seed=0):
    shape = (n, side, side, channels) if channels > 1 else (n, side, side)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def class_folders(root, counts=None, classes=("cat", "dog", "owl")):
    """train/ and test/ of class folders; returns the pictures by split and class."""
    kept = {}
    for seed, (split, count) in enumerate((counts or {"train": 4, "test": 2}).items()):
        for c, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            kept[split, name] = pixels(count, seed=10 * seed + c)
            for i, picture in enumerate(kept[split, name]):
                Image.fromarray(picture).save(folder / f"{i}.png")
    return kept


def png(picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def write_table(file, columns, features=None):
    """A parquet file; with `features`, the note about the columns that the Hub's files carry."""
    table = pa.table(columns)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=5)


def parquet(root, name="train-00000-of-00001.parquet", n=12, labels=None, columns=("img", "label"), seed=0):
    """A parquet file as the Hub has it, with an image and a class column."""
    pictures, (image, label) = pixels(n, seed=seed), columns
    cells = pa.array([{"bytes": png(p), "path": None} for p in pictures],
                     pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    numbers = pa.array([i % 3 for i in range(n)] if labels is None else labels, pa.int64())
    write_table(root / name, {image: cells, label: numbers},
                {image: {"_type": "Image"}, label: {"names": ["a", "b", "c"], "_type": "ClassLabel"}})
    return pictures


def to_chw(pictures):
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


def cache_files(tmp_path):
    return sorted((tmp_path / "cache").glob("*"))


# ---------------------------------------------------------------- the set


def small_set(n=30, classes=3):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, 4, 4), dtype=torch.uint8, generator=g)
    return ImageSet(images, torch.arange(n) % classes, tuple("abcdefghij"[:classes]))


def test_set_basics():
    s = small_set()
    assert len(s) == 30 and repr(s) == "ImageSet(30 of 3x4x4, 3 classes)"
    for index in (slice(3, 9), [5, 1], torch.tensor([2, 2])):
        part = s.subset(index)
        assert torch.equal(part.images, s.images[index]) and torch.equal(part.labels, s.labels[index])
    with pytest.raises(AttributeError):
        s.images = None


def test_fingerprint_sees_everything():
    s = small_set()
    pixel, label = s.images.clone(), s.labels.clone()
    pixel[7, 1, 2, 3] ^= 1
    label[3] = (label[3] + 1) % 3
    variants = [
        ImageSet(pixel, s.labels, s.classes), ImageSet(s.images, label, s.classes),
        ImageSet(s.images, s.labels, ("a", "b", "d")), ImageSet(s.images.view(30, 3, 2, 8), s.labels, s.classes),
        s.subset(slice(1, None)),
    ]
    prints = {v.fingerprint for v in [s, *variants]}
    assert len(prints) == 6 and all(len(p) == 64 for p in prints)
    assert ImageSet(s.images.clone(), s.labels.clone(), s.classes).fingerprint == s.fingerprint
    strided = s.images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert ImageSet(strided, s.labels, s.classes).fingerprint == s.fingerprint


@pytest.mark.parametrize("images, labels, words", [
    (torch.zeros(2, 3, 4, 4), torch.zeros(2).long(), "images are torch.float32"),
    (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2).long(), "shape (2, 4, 4)"),
    (torch.zeros(0, 3, 4, 4, dtype=torch.uint8), torch.zeros(0).long(), "none of them 0"),
    (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2), "labels are torch.float32"),
    (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3).long(), "one an image"),
    (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 2]), "labels run from 0 to 2"),
    (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([-1, 0]), "published unlabelled"),
])
def test_set_refuses(images, labels, words):
    with pytest.raises(ValueError, match=".*") as caught:
        ImageSet(images, labels, ("a", "b"))
    assert words in str(caught.value)


# ---------------------------------------------------------------- choosing


def test_holdout_is_exact_and_seeded():
    s = small_set(n=60, classes=3)
    rest, held = split_holdout(s, 12, seed=4)
    assert torch.bincount(held.labels).tolist() == [4, 4, 4] and torch.bincount(rest.labels).tolist() == [16] * 3
    again = split_holdout(s, 12, seed=4)
    assert [p.fingerprint for p in again] == [rest.fingerprint, held.fingerprint]
    assert split_holdout(s, 12, seed=5)[1].fingerprint != held.fingerprint
    both = torch.cat([rest.images, held.images]).flatten(1).unique(dim=0)
    assert torch.equal(both, s.images.flatten(1).unique(dim=0))  # nothing lost, nothing twice


@pytest.mark.parametrize("count", [1, 2, 7, 10, 33, 99, 100])
def test_stratified_shares_are_as_close_as_whole_numbers_allow(count):
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 19 + [4])  # class 3 has none
    index = stratified_index(labels, count)
    assert len(index) == count and torch.equal(index, index.unique())
    sizes = torch.bincount(labels, minlength=5)
    got = torch.bincount(labels[index], minlength=5)
    exact = sizes.double() * count / len(labels)
    assert ((got - exact).abs() < 1).all() and (got <= sizes).all()
    assert torch.equal(index, stratified_index(labels, count))


@pytest.mark.parametrize("count", [0, -1, 61, 2.5, True, "5"])
def test_counts_are_checked(count):
    with pytest.raises(ValueError, match="count is .*, expected a whole number from 1"):
        stratified_index(torch.arange(60) % 3, count)


def test_counts_may_be_numpys():
    few = load_images("digits", limit=np.int64(50), size=np.int32(4))
    plain = load_images("digits", limit=50, size=4)
    assert few.fingerprint == plain.fingerprint
    assert split_holdout(few, np.int64(9))[1].fingerprint == split_holdout(plain, 9)[1].fingerprint


def test_holdout_leaves_something():
    with pytest.raises(ValueError, match="from 1 up to 29"):
        split_holdout(small_set(), 30)


# ---------------------------------------------------------------- one picture


MODES = {  # a picture of each mode, and the RGB that must come out
    "RGB": (Image.new("RGB", (5, 4), (10, 20, 30)), (10, 20, 30)),
    "L": (Image.new("L", (5, 4), 77), (77, 77, 77)),
    "1": (Image.new("1", (5, 4), 1), (255, 255, 255)),
    "P": (Image.new("RGB", (5, 4), (255, 0, 0)).convert("P", palette=Image.Palette.ADAPTIVE), (255, 0, 0)),
    "RGBA": (Image.new("RGBA", (5, 4), (10, 20, 30, 255)), (10, 20, 30)),
    "glass": (Image.new("RGBA", (5, 4), (10, 20, 30, 0)), (255, 255, 255)),
    "half glass": (Image.new("RGBA", (5, 4), (0, 0, 0, 128)), (127, 127, 127)),
    "LA": (Image.new("LA", (5, 4), (40, 255)), (40, 40, 40)),
    "16 bit": (Image.fromarray(np.full((4, 5), 0x80FF, np.uint16)), (128, 128, 128)),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode):
    picture, expected = MODES[mode]
    file = io.BytesIO()
    picture.save(file, "PNG")
    out = read_image(file)
    assert out.shape == (3, 4, 5) and out.dtype == torch.uint8
    assert torch.equal(out, torch.tensor(expected, dtype=torch.uint8).view(3, 1, 1).expand(3, 4, 5))


def test_whole_numbers_below_256_are_black_and_floats_are_refused(tmp_path):
    Image.fromarray(np.full((4, 5), 255, np.int32)).save(tmp_path / "dark.tif")
    assert not read_image(tmp_path / "dark.tif").any()
    Image.new("F", (5, 4)).save(tmp_path / "floats.tif")
    with pytest.raises(ValueError, match=r"floats \(mode F\)"):
        read_image(tmp_path / "floats.tif")


def test_cmyk_and_a_turned_camera(tmp_path):
    Image.new("CMYK", (16, 8), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=95)
    r, g, b = read_image(tmp_path / "red.jpg").float().mean((1, 2))
    assert r > 240 and g < 30 and b < 30
    upright = pixels(1, side=8)[0][:, :4]  # 4 wide, 8 high
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, shown turned by a quarter
    lying = Image.fromarray(np.rot90(upright).copy())
    lying.save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(read_image(tmp_path / "turned.png"), torch.from_numpy(upright).permute(2, 0, 1))


def test_size_cuts_the_middle_square(tmp_path):
    bands = np.zeros((10, 30, 3), np.uint8)
    bands[:, 10:20] = 200
    Image.fromarray(bands).save(tmp_path / "wide.png")
    out = read_image(tmp_path / "wide.png", size=10)
    assert out.shape == (3, 10, 10) and (out == 200).all()
    assert read_image(tmp_path / "wide.png", size=4, channels=1).shape == (1, 4, 4)
    assert read_image(tmp_path / "wide.png", channels=1).shape == (1, 10, 30)


def test_a_picture_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*none.png"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match="is not an image .* it is a folder"):
        read_image(tmp_path)
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match="float.tiff .* floats"):
        read_image(tmp_path / "float.tiff")


# ---------------------------------------------------------------- sources


def test_resolve(monkeypatch, tmp_path):
    assert resolve_source() == DEFAULT_SOURCE == "uoft-cs/cifar10"
    monkeypatch.setenv("CONVMIXER_DATA", "digits")
    assert resolve_source() == "digits" and resolve_source(tmp_path) == str(tmp_path)
    monkeypatch.setenv("CONVMIXER_DATA", "")
    assert resolve_source() == DEFAULT_SOURCE


def test_digits():
    train, test = load_images("digits"), load_images("digits", "test")
    assert len(test) == 1797 // 5 and len(train) + len(test) == 1797
    assert train.images.shape[1:] == (1, 8, 8) and train.classes == tuple("0123456789")
    share = torch.bincount(load_images("digits", "test").labels) / torch.bincount(torch.cat([train.labels, test.labels]))
    assert (share - 0.2).abs().max() < 0.01
    assert train.images.max() == 255 and train.images.min() == 0
    original = {tuple(np.round(i * 255 / 16).astype(int).ravel()) for i in load_digits().images}
    assert {tuple(i.flatten().tolist()) for i in train.images} <= original
    assert load_images("digits").fingerprint == train.fingerprint
    assert load_images("digits", size=16).images.shape[1:] == (1, 16, 16)


def test_class_folders(tmp_path):
    kept = class_folders(tmp_path / "pets")
    for clutter in (".hidden", "Thumbs.db", ".DS_Store", "desktop.ini"):
        (tmp_path / "pets" / "train" / "cat" / clutter).write_text("x")
        (tmp_path / "pets" / "train" / clutter).write_text("x")
    (tmp_path / "pets" / "README.md").write_text("about")
    for split in ("train", "test"):
        s = load_images(tmp_path / "pets", split)
        expected = np.concatenate([kept[split, name] for name in s.classes])
        assert s.classes == ("cat", "dog", "owl") and torch.equal(s.images, to_chw(expected))
        assert torch.equal(s.labels, torch.arange(3).repeat_interleave(len(expected) // 3))


def test_parquet(tmp_path):
    first = parquet(tmp_path / "p", "train-00000-of-00002.parquet", seed=1)
    second = parquet(tmp_path / "p", "train-00001-of-00002.parquet", seed=2)
    parquet(tmp_path / "p", "test-00000-of-00001.parquet", n=6, seed=3)
    s = load_images(tmp_path / "p")
    assert torch.equal(s.images, to_chw(np.concatenate([first, second]))) and s.classes == ("a", "b", "c")
    assert s.labels.tolist() == [i % 3 for i in range(12)] * 2
    assert len(load_images(tmp_path / "p", "test")) == 6


@pytest.mark.parametrize("name", ["data/train-0.parquet", "plain_text/train/0000.parquet", "train.parquet"])
def test_parquet_layouts_and_column_names(tmp_path, name):
    pictures = parquet(tmp_path / "p", name, columns=("photo", "species"))
    assert torch.equal(load_images(tmp_path / "p").images, to_chw(pictures))


STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})
PLAIN = {  # columns without the Hub's note, the classes and the labels they must give
    "numbers": (lambda cells: {"image": pa.array(cells, STRUCT), "label": [3, 10, 3, 4]}, ("3", "4", "10"), [0, 2, 0, 1]),
    "words": (lambda cells: {"image": pa.array(cells, STRUCT), "label": ["dog", "cat", "dog", "cat"]}, ("cat", "dog"), [1, 0, 1, 0]),
    "bare bytes": (lambda cells: {"x": [c["bytes"] for c in cells], "y": [0, 1, 0, 1]}, ("0", "1"), [0, 1, 0, 1]),
    "large bytes": (lambda cells: {"x": pa.array([c["bytes"] for c in cells], pa.large_binary()), "y": [0, 1, 0, 1]}, ("0", "1"), [0, 1, 0, 1]),
    "pandas' categories": (lambda cells: {"x": pa.array(cells, STRUCT), "y": pa.array(["b", "a", "b", "a"]).dictionary_encode()}, ("a", "b"), [1, 0, 1, 0]),
}


def test_hidden_files_beside_a_table_are_left_alone(tmp_path):
    """A Mac leaves them on foreign drives, of the same name but for a dot and an underscore."""
    pictures = parquet(tmp_path)
    for name in ("._train-00000-of-00001.parquet", ".hidden/train.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    assert torch.equal(load_images(tmp_path).images, to_chw(pictures))


@pytest.mark.parametrize("kind", PLAIN)
def test_parquet_without_a_note(tmp_path, kind):
    columns, classes, labels = PLAIN[kind]
    pictures = pixels(4)
    write_table(tmp_path / "train.parquet", columns([{"bytes": png(p), "path": "a.png"} for p in pictures]))
    s = load_images(tmp_path)
    assert torch.equal(s.images, to_chw(pictures)) and s.classes == classes and s.labels.tolist() == labels


def test_classes_of_words_are_those_of_all_splits(tmp_path):
    for split, words in {"train": ["ape", "cat", "dog"], "test": ["dog", "cat", "dog"]}.items():
        write_table(tmp_path / f"{split}.parquet", {"image": list(map(png, pixels(3))), "label": words})
    train, test = load_images(tmp_path), load_images(tmp_path, "test")
    assert train.classes == test.classes == ("ape", "cat", "dog") and test.labels.tolist() == [2, 1, 2]


@pytest.mark.parametrize("names, chosen", [(("fine", "label"), "label"), (("fine", "labels"), "labels"), (("coarse", "fine"), "coarse")])
def test_of_two_label_columns_one_is_taken_and_said(tmp_path, capsys, names, chosen):
    columns = {"image": list(map(png, pixels(3))), **{n: [0, 1, 2] if n == chosen else [2, 2, 0] for n in names}}
    write_table(tmp_path / "train.parquet", columns)
    assert load_images(tmp_path).labels.tolist() == [0, 1, 2]
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and f"from column {chosen}, not from" in err


def test_only_two_columns_are_read_and_never_by_datasets(tmp_path):
    """In a process where `datasets` cannot be imported; the third column is damaged on the disk."""
    parquet(tmp_path / "p")
    file = tmp_path / "p" / "train-00000-of-00001.parquet"
    table = pq.read_table(file)
    mark = b"text that nobody reads " * 40
    table = table.append_column("note", pa.array([mark.decode()] * 12))
    pq.write_table(table, file, compression="none", use_dictionary=False)
    content = file.read_bytes()
    assert mark in content
    at = content.index(mark)
    file.write_bytes(content[:at - 4] + b"\xff" * 4 + content[at:])  # the length of the first text
    code = f"import sys; sys.modules['datasets'] = None; from convmixer_edu.data import load_images; print(len(load_images({str(file.parent)!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "12\n", done.stderr
    with pytest.raises(Exception, match=".*"):
        pq.read_table(file)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """huggingface_hub itself, with a server on this machine that has CIFAR-10's layout."""
    for seed, split in enumerate(("train", "test")):
        parquet(tmp_path / "served", f"plain_text/{split}-00000-of-00001.parquet", seed=seed)
    files = {p.relative_to(tmp_path / "served").as_posix(): p.read_bytes() for p in (tmp_path / "served").rglob("*.parquet")}
    with serve(monkeypatch, files, tmp_path / "hub") as server:
        monkeypatch.setattr(data, "_on_the_hub", ON_THE_HUB)
        monkeypatch.setattr(data, "_ask_the_hub", ASK_THE_HUB.__wrapped__)
        monkeypatch.setattr(data, "HfApi", functools.partial(HfApi, endpoint=server.endpoint))
        monkeypatch.setattr(data, "snapshot_download", functools.partial(snapshot_download, endpoint=server.endpoint, cache_dir=server.cache))
        yield server


def test_hub_pinned_split_by_split_and_only_once(hub, tmp_path):
    s = load_images()
    assert torch.equal(s.images, to_chw(pixels(12, seed=0))) and s.classes == ("a", "b", "c")
    commit = "0b2714987fa478483af9968de7c934580d0bb9a2"
    assert all(commit in path for path in hub.asked) and not any("test-" in path for path in hub.asked)
    hub.online = False
    assert load_images().fingerprint == s.fingerprint  # our own cache needs no network
    assert len(load_images(limit=6)) == 6
    for file in cache_files(tmp_path):
        file.unlink()
    assert load_images().fingerprint == s.fingerprint  # nor does the Hub's
    (tmp_path / f"hub/datasets--uoft-cs--cifar10/snapshots/{commit}").rename(tmp_path / "other")
    (tmp_path / "other").rename(tmp_path / f"hub/datasets--uoft-cs--cifar10/snapshots/{'2' * 40}")
    with pytest.raises(FileNotFoundError, match="cannot be reached"):  # another revision is not taken for it
        load_images(size=5)


@pytest.mark.parametrize("files", [["data/train-00000-of-00002.parquet"], ["fine/train.parquet", "coarse/train.parquet"]])
def test_a_dataset_on_the_hub_of_which_a_part_is_here_is_not_taken_for_whole(hub, files):
    content = hub.files["plain_text/train-00000-of-00001.parquet"]
    hub.files = dict.fromkeys(files, content)
    with pytest.raises(ValueError, match=f"has {len(files)} files here, expected all files of one table"):
        load_images("someone/something")


def test_of_a_dataset_of_other_files_the_hubs_own_parquet_copy_is_read(hub):
    hub.only = "refs%2Fconvert%2Fparquet"
    assert len(load_images("someone/zipped")) == 12


def test_hub_errors(hub):
    with pytest.raises(ValueError, match="has no split 'x', expected one of: test, train"):
        load_images("someone/something", "x")
    hub.online = False
    with pytest.raises(FileNotFoundError, match="cannot be reached: set CONVMIXER_DATA to a folder"):
        load_images("someone/else")
    hub.online, hub.plan[:] = True, [100] * 50  # a line that always breaks
    with pytest.raises(FileNotFoundError, match="the Hugging Face Hub cannot give it .*: set CONVMIXER_DATA to a folder") as told:
        load_images("someone/else")
    assert "\n" not in str(told.value)
    hub.online, hub.files = True, {}
    with pytest.raises(FileNotFoundError, match="neither a folder here nor a dataset"):
        load_images("someone/nothing")


def test_book_source(hub, monkeypatch, capsys, tmp_path):
    assert book_source() == DEFAULT_SOURCE and not capsys.readouterr().out
    hub.online = False
    assert book_source() == "digits" and "out of reach" in capsys.readouterr().out
    hub.online = True
    load_images(limit=3), load_images(split="test", limit=3)
    hub.online = False
    assert book_source() == DEFAULT_SOURCE and not capsys.readouterr().out  # kept here
    monkeypatch.setenv("CONVMIXER_DATA", "digits")
    assert book_source() == "digits" and "CONVMIXER_DATA says so" in capsys.readouterr().out
    monkeypatch.setenv("CONVMIXER_DATA", str(tmp_path))
    assert book_source() == str(tmp_path) and not capsys.readouterr().out


def test_only_an_answer_of_the_hub_is_remembered(hub, monkeypatch):
    monkeypatch.setattr(data, "_ask_the_hub", functools.cache(data._ask_the_hub))
    hub.online = False
    with pytest.raises(FileNotFoundError, match="cannot be reached"):
        load_images(limit=3)
    hub.online = True
    assert book_source() == DEFAULT_SOURCE and len(load_images(limit=3)) == 3  # in the same process
    hub.asked.clear()
    assert book_source() == DEFAULT_SOURCE and not hub.asked


def test_a_hub_that_never_answers_is_not_waited_for(monkeypatch, capsys):
    """The line is taken, and then nothing; where the network is switched off, nobody is called at all."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.setenv(name, "127.0.0.1")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(data, "_on_the_hub", ON_THE_HUB)
        monkeypatch.setattr(data, "_ask_the_hub", ASK_THE_HUB.__wrapped__)
        monkeypatch.setattr(data, "HfApi", functools.partial(HfApi, endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}"))
        assert book_source() == "digits" and "out of reach" in capsys.readouterr().out
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert book_source() == "digits"


# ---------------------------------------------------------------- limit and size


def test_limit_keeps_the_shares(tmp_path):
    class_folders(tmp_path / "pets", {"train": 10, "test": 2})
    cold = load_images(tmp_path / "pets", limit=6)
    assert torch.bincount(cold.labels).tolist() == [2, 2, 2]
    assert not cache_files(tmp_path)  # part of a split is not kept
    whole = load_images(tmp_path / "pets")
    warm = load_images(tmp_path / "pets", limit=6)
    assert warm.fingerprint == cold.fingerprint != whole.fingerprint
    assert len(load_images(tmp_path / "pets", limit=1000)) == 30


def test_only_the_limit_is_decoded(tmp_path, monkeypatch):
    parquet(tmp_path / "p", n=30)
    seen, original = [], data.read_image
    monkeypatch.setattr(data, "read_image", lambda *a, **k: seen.append(1) or original(*a, **k))
    load_images(tmp_path / "p", limit=6)
    assert len(seen) == 6


def test_sizes(tmp_path):
    class_folders(tmp_path / "pets")
    Image.new("RGB", (9, 7)).save(tmp_path / "pets" / "train" / "owl" / "odd.png")
    with pytest.raises(ValueError, match="odd.png is 9x7 where the first image is 6x6, expected one size: give size="):
        load_images(tmp_path / "pets")
    assert load_images(tmp_path / "pets", size=5).images.shape == (13, 3, 5, 5)


@pytest.mark.parametrize("option", [{"limit": 0}, {"limit": -3}, {"size": 0}, {"size": 2.5}, {"limit": "x"}])
def test_options_are_checked(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} is .*, expected a whole number from 1"):
        load_images("digits", **option)


# ---------------------------------------------------------------- what is wrong with a source


def pets(spoil=lambda pets: None, classes=("cat", "dog")):
    """Class folders with one thing wrong."""
    def make(root):
        class_folders(root, classes=classes)
        spoil(root)
    return make


BROKEN = {  # how to make the source, the words of its error
    "missing": (lambda root: None, ["there is no folder"]),
    "empty": (lambda root: root.mkdir(), ["is empty", "expected parquet files"]),
    "file": (lambda root: root.write_text("x"), ["is a file, expected a folder"]),
    "parquet that is none": (lambda root: (root.mkdir(), (root / "train.parquet").write_text("x")), ["train.parquet cannot be read as parquet"]),
    "no image column": (lambda root: write_table(root / "train.parquet", {"text": ["a"], "label": [0]}), ["no picture column", "text, label"]),
    "no label column": (lambda root: write_table(root / "train.parquet", {"image": [b""], "weight": [0.5]}), ["no label column", "image, weight"]),
    "no rows": (lambda root: parquet(root, n=0), ["split 'train' of", "has no images"]),
    "unlabelled": (lambda root: parquet(root, labels=[-1] * 12), ["labels run from -1", "published unlabelled"]),
    "no such split": (lambda root: parquet(root, "test-0.parquet"), ["has no split 'train'", "expected one of: test"]),
    "one class": (pets(classes=("cat",)), ["only the class cat", "at least two"]),
    "text": (pets(lambda root: (root / "train/cat/notes.txt").write_text("x")), ["notes.txt is not an image"]),
    "parquet among pictures": (pets(lambda root: (root / "train/cat/boxes.parquet").write_text("x")), ["boxes.parquet is not an image"]),
    "disguised text": (pets(lambda root: (root / "train/cat/notes.png").write_text("x")), ["notes.png is not an image"]),
    "stray file": (pets(lambda root: (root / "train/list.csv").write_text("x")), ["list.csv is a file", "only class folders"]),
    "folder in a class": (pets(lambda root: (root / "train/cat/more").mkdir()), ["more is not an image"]),
    "empty class": (pets(lambda root: (root / "train/ant").mkdir()), ["ant is empty", "at least one image"]),
    "classes differ": (pets(lambda root: (root / "test/dog").rename(root / "test/wolf")), ["classes of test and train differ", "dog, wolf"]),
    "no test": (pets(lambda root: shutil.rmtree(root / "test")), ["expected parquet files, or the folders train and test"]),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_one_clear_sentence(tmp_path, kind):
    make, words = BROKEN[kind]
    make(tmp_path / "pets")
    with pytest.raises(FileNotFoundError if kind == "missing" else ValueError) as caught:
        load_images(tmp_path / "pets")
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and not cache_files(tmp_path)


@pytest.mark.parametrize("source", ["nowhere", "./no/where", "~nobody-of-that-name/x/y"])
def test_no_such_source(source):
    with pytest.raises(FileNotFoundError, match="expected a folder, a Hub dataset written owner/name, or digits"):
        load_images(source)


@pytest.mark.parametrize("split", ["val", "validation"])
@pytest.mark.parametrize("source", ["digits", "pets"])
def test_test_is_never_taken_for_validation(tmp_path, monkeypatch, source, split):
    class_folders(tmp_path / "pets")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"has no split '{split}', expected one of: test, train"):
        load_images(source, split)


@pytest.mark.parametrize("other", ["val", "valid", "validation"])
@pytest.mark.parametrize("kind", ["folders", "parquet"])
def test_a_validation_split_stands_in_for_test_and_it_is_said(tmp_path, capsys, kind, other):
    if kind == "folders":
        class_folders(tmp_path / "d", {"train": 3, other: 2})
    else:
        parquet(tmp_path / "d", "train.parquet", n=9)
        parquet(tmp_path / "d", f"{other}.parquet", n=6)
    assert len(load_images(tmp_path / "d")) == 9 and not capsys.readouterr().err
    assert len(load_images(tmp_path / "d", "test")) == 6
    assert capsys.readouterr().err == f"{tmp_path / 'd'} has no test split: {other} is taken for it\n"
    assert len(load_images(tmp_path / "d", "validation")) == 6


@pytest.mark.parametrize("label, names, words", [
    ([b"cat"], None, "no label column"), ([b"cat"], ["cat", "dog"], "no label column"),
    (["cat"], ["cat", "dog"], "only the class cat"), ([0], 7, "only the class 0")])
def test_a_note_that_does_not_fit_the_labels(tmp_path, label, names, words):
    """Found by tools/fuzz.py."""
    write_table(tmp_path / "train.parquet", {"img": [b"x"], "label": label},
                {"img": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}})
    with pytest.raises(ValueError, match=words):
        load_images(tmp_path)


def test_parquet_files_whose_labels_are_of_two_kinds(tmp_path):
    """Read as the first file has them, or refused by name."""
    cells = list(map(png, pixels(2)))
    for name, labels in {"train-0": ["cat", "3"], "train-1": [3, 3]}.items():
        write_table(tmp_path / f"{name}.parquet", {"img": cells, "label": labels})
    assert load_images(tmp_path).classes == ("3", "cat") and load_images(tmp_path).labels.tolist() == [1, 0, 0, 0]
    write_table(tmp_path / "train-0.parquet", {"img": cells, "label": [7, 3]})
    assert load_images(tmp_path).classes == ("3", "7")
    write_table(tmp_path / "train-1.parquet", {"img": cells, "label": ["cat", "3"]})
    with pytest.raises(ValueError, match="train-1.parquet cannot be read as parquet: .*'cat'"):
        load_images(tmp_path)
    write_table(tmp_path / "train-1.parquet", {"img": cells, "species": [3, 3]})
    with pytest.raises(ValueError, match="train-1.parquet cannot be read as parquet: .*label"):
        load_images(tmp_path)


def test_linked_class_folders_are_read_and_watched(tmp_path):
    """A change behind a link is a change: key and reading walk the folder alike."""
    class_folders(tmp_path / "real")
    for split in ("train", "test"):
        (tmp_path / "d" / split).mkdir(parents=True)
        for name in ("cat", "dog", "owl"):
            (tmp_path / "d" / split / name).symlink_to(tmp_path / "real" / split / name)
    before = load_images(tmp_path / "d")
    Image.new("RGB", (6, 6), (1, 2, 3)).save(tmp_path / "real" / "train" / "cat" / "0.png")
    after = load_images(tmp_path / "d")
    assert after.images[0].flatten(1)[:, 0].tolist() == [1, 2, 3] and after.fingerprint != before.fingerprint


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    class_folders(tmp_path / "d")
    assert len(load_images("~/d")) == 12
    assert read_image("~/d/train/cat/0.png").shape == (3, 6, 6)


def test_without_a_home_nothing_is_kept_and_all_is_read(tmp_path, monkeypatch):
    """No HOME and a user without a name: a container, a service."""
    class_folders(tmp_path / "d")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("CONVMIXER_CACHE")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_images(tmp_path / "d")) == 12
    assert data.private_folder() == Path(data._temporary().name)  # which goes with the process


# ---------------------------------------------------------------- the cache


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A folder decoded once; returns it, its fingerprint, the cache file and a count of decoded images."""
    class_folders(tmp_path / "pets")
    original, seen = data.read_image, []
    monkeypatch.setattr(data, "read_image", lambda *a, **k: seen.append(1) or original(*a, **k))
    fingerprint = load_images(tmp_path / "pets").fingerprint
    file, = cache_files(tmp_path)
    assert len(seen) == 12
    seen.clear()
    return tmp_path / "pets", fingerprint, file, seen


def test_cache_is_used(kept):
    folder, fingerprint, _, seen = kept
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load_images(folder)
    assert again.fingerprint == fingerprint and not seen
    assert again.classes == ("cat", "dog", "owl")


def test_cache_is_the_same_however_the_folder_is_written(kept, monkeypatch):
    folder, fingerprint, _, seen = kept
    monkeypatch.chdir(folder.parent)
    assert load_images("pets").fingerprint == fingerprint and not seen
    assert load_images("./pets/../pets").fingerprint == fingerprint and not seen


def flip(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "a flipped pixel": lambda f: flip(f, f.stat().st_size // 2),
    "the last byte": lambda f: flip(f, -1),
    "the header": lambda f: flip(f, 20),
    "the header's length": lambda f: flip(f, 6),
    "truncated": lambda f: os.truncate(f, f.stat().st_size - 7),
    "cut short": lambda f: os.truncate(f, 5),
    "empty": lambda f: os.truncate(f, 0),
    "another file": lambda f: f.write_text("not a cache"),
    "other tensors": lambda f: save_file({"weight": torch.zeros(3)}, f),
    "other tensors with notes": lambda f: save_file({"weight": torch.zeros(3)}, f, notes(f)),
    "other pixels": lambda f: save_file({**load_file(f), "images": torch.zeros(12, 3, 6, 6, dtype=torch.uint8)}, f, notes(f)),
    "other classes": lambda f: save_file(load_file(f), f, notes(f, '["cat", "dog", "owl"]', '["x", "y", "z"]')),
    "fewer classes": lambda f: save_file(load_file(f), f, notes(f, '["cat", "dog", "owl"]', '["x"]')),
}


def notes(file, old="", new=""):
    """What the head of the file says beside the tensors, changed."""
    head = file.read_bytes()
    length, = struct.unpack("<Q", head[:8])
    found = json.loads(head[8: 8 + length])["__metadata__"]
    assert old in found["checkpoint"]
    return {"checkpoint": found["checkpoint"].replace(old, new)}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_noticed_and_mended(kept, damage):
    folder, fingerprint, file, seen = kept
    DAMAGE[damage](file)
    with pytest.warns(UserWarning, match="damaged.*computed again"):
        assert load_images(folder).fingerprint == fingerprint
    assert len(seen) == 12
    seen.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_images(folder).fingerprint == fingerprint and not seen


@pytest.mark.parametrize("change", ["touch", "replace", "add", "remove", "rename"])
def test_a_changed_source_is_decoded_anew(kept, change):
    folder, fingerprint, _, seen = kept
    file = folder / "train" / "cat" / "0.png"
    if change == "touch":
        os.utime(file, ns=(1, 1))
    elif change == "replace":
        Image.new("RGB", (6, 6), (1, 2, 3)).save(file)
    elif change == "add":
        shutil.copy(file, file.with_name("9.png"))
    elif change == "remove":
        file.unlink()
    else:
        file.rename(file.with_name("8.png"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load_images(folder)
    assert seen and (again.fingerprint == fingerprint) == (change == "touch")


def test_splits_and_sizes_have_their_own_files(kept, tmp_path):
    folder, *_ = kept
    load_images(folder, "test"), load_images(folder, size=4)
    assert len(cache_files(tmp_path)) == 3
    assert load_images(folder, size=4).images.shape[2:] == (4, 4)


@pytest.mark.parametrize("place", ["os.replace", "os.fsync", "Path.write_bytes"])
def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch, place):
    class_folders(tmp_path / "pets")

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(f"convmixer_edu.checkpoint.{place}", full)
    with pytest.warns(UserWarning, match="computed again next time: .* could not be written .no space left"):
        assert len(load_images(tmp_path / "pets")) == 12
    assert not cache_files(tmp_path)


def test_nobody_watches_so_there_is_no_bar(tmp_path, monkeypatch):
    class_folders(tmp_path / "pets")
    monkeypatch.delattr("convmixer_edu.data.track")  # before rich 15 a bar that is switched off leaves an empty line
    assert len(load_images(tmp_path / "pets")) == 12


def test_a_cache_folder_that_cannot_be_made(tmp_path, monkeypatch, capsys):
    class_folders(tmp_path / "pets")
    (tmp_path / "blocked").write_text("a file where the folder should be")
    monkeypatch.setenv("CONVMIXER_CACHE", str(tmp_path / "blocked" / "cache"))
    for _ in range(2):
        assert len(load_images(tmp_path / "pets")) == 12
    said = capsys.readouterr().err
    assert said.startswith(f"nothing is kept in {tmp_path}/blocked/cache (") and said.count("\n") == 1


# ---------------------------------------------------------------- the real thing


def test_cifar10_is_the_published_one(cifar10, monkeypatch):
    monkeypatch.delenv("CONVMIXER_CACHE")  # decoded once for all who test here
    train, test = load_images(cifar10), load_images(cifar10, "test")
    assert train.images.shape == (50_000, 3, 32, 32) and test.images.shape == (10_000, 3, 32, 32)
    assert torch.bincount(train.labels).tolist() == [5000] * 10 and torch.bincount(test.labels).tolist() == [1000] * 10
    assert train.classes[:3] == ("airplane", "automobile", "bird")
    for channel, mean, std in zip(train.images.unbind(1), CIFAR10["mean"], CIFAR10["std"]):
        values = channel.double() / 255
        assert abs(values.mean() - mean) < 5e-5 and abs(values.std() - std) < 5e-5
    rest, held = split_holdout(train)
    assert torch.bincount(held.labels).tolist() == [500] * 10 and len(rest) == 45_000


def test_no_picture_is_in_the_repository():
    """CIFAR-10 is for local use: nothing of it is committed."""
    found = [p for p in ROOT.rglob("*.parquet") if ".venv" not in p.parts]
    assert not found

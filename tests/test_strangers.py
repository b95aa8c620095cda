"""Files from strangers, machines with other users, writers that are killed: nothing is started, believed or left behind."""

import json
import os
import struct
import subprocess
import sys
import time
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, offline
from PIL import Image

from convmixer_edu import data, depthwise, machine, pretrained
from convmixer_edu.checkpoint import CheckpointError, write_atomically, written_aside
from convmixer_edu.data import load_images, picture_suffixes, read_image
from convmixer_edu.inference import find_pictures

SOMEBODY = 65534  # a user that is not us
root_only = pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root may give files away")
posix_only = pytest.mark.skipif(os.name != "posix", reason="pipes and users are POSIX's")


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """A folder and a cache of its own, no Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONVMIXER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "_on_the_hub", lambda source: None)
    data.tell.cache_clear()
    data._temporary.cache_clear()


# ---------------------------------------------------------------- pictures


def png_of(width, height, extra=b""):
    """A PNG that announces so many pixels and holds none."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def saved(kind, mode="RGB", size=(8, 8), **options):
    """A picture as some format has it."""
    file = BytesIO()
    Image.new(mode, size).save(file, kind, **options)
    return file.getvalue()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(evil) print\nshowpage\n"
FILES = {
    "EPS": EPS,
    "EPS with a DOS head": struct.pack("<IIIIIIIH", 0xC6D3D0C5, 32, len(EPS), 0, 0, 0, 0, 0) + b"\0\0" + EPS,
    "PDF": saved("PDF"), "WMF": b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<hhhhHI", 0, 0, 99, 99, 72, 0) + b"\0" * 40,
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "PSD": b"8BPS\0\1" + b"\0" * 60, "SGI": saved("SGI"), "TGA": saved("TGA"),
    "FITS": b"SIMPLE  =                    T" + b" " * 50 + b"END" + b" " * 2700, "XPM": b"/* XPM */ static char *x[] = {\"1 1 1 1\"",
    "DDS": saved("DDS"), "ICNS": b"icns\0\0\0\x10ic08\0\0\0\x08", "BLP": b"BLP1" + b"\0" * 200,
    "a bomb": png_of(20_000, 20_000), "a small bomb": png_of(10_000, 10_000), "a bomb that claims 2**31": png_of(2**31 - 1, 2**31 - 1),
    "a GIF bomb": b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\2D\1\0;",
    "a BMP bomb": b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
    "text that unpacks without end": png_of(8, 8, (lambda z: struct.pack(">I", len(z)) + z[:0] + b"zTXt" + z + struct.pack(
        ">I", zlib.crc32(b"zTXt" + z)))(b"a\0\0" + zlib.compress(b"x" * 80_000_000))),
    "no width": png_of(0, 8), "cut": saved("PNG")[:45], "empty": b"", "text": b"hello", "JPEG cut": saved("JPEG")[:200],
    "floats": saved("TIFF", "F"), "zip": b"PK\3\4" + b"\0" * 60, "html": b"<html><script>alert(1)</script>", "pickle": b"\x80\4}q\0.",
}


@pytest.fixture
def interpreters(tmp_path, monkeypatch):
    """Programs that Pillow could start; returns the file that says they were."""
    for name in ("gs", "gswin64c", "djpeg", "xv", "display"):
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f"#!/bin/sh\necho $0 >> {tmp_path}/started\nexit 1\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "started"


@pytest.mark.parametrize("kind", FILES)
def test_a_hostile_picture_is_one_sentence(kind, interpreters, recwarn):
    Path("photo.jpg").write_bytes(FILES[kind])
    for read in (read_image, lambda file: data.open_image(file, file, upright=False), lambda file: read_image(BytesIO(FILES[kind]), name=file)):
        with pytest.raises(ValueError, match="photo.jpg is not an image that can be read: ") as told:
            read("photo.jpg")
        assert "\n" not in str(told.value) and len(str(told.value)) < 300
    assert not interpreters.exists() and not recwarn.list


@posix_only
@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "folder", "link to a pipe", "link to nothing", "loop"])
def test_what_is_no_file_is_not_waited_for(kind, tmp_path):
    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / "d" / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "d" / split / name / "0.png")
    file = tmp_path / "d/train/a/1.png"
    os.mkfifo(tmp_path / "pipe")
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "socket":
        os.mknod(file, 0o140600)
    else:
        file.symlink_to({"device": "/dev/zero", "link to a pipe": tmp_path / "pipe", "loop": file}.get(kind, tmp_path / "none"))
    with pytest.raises(ValueError, match="1.png is not an image"):
        load_images(tmp_path / "d")
    error = FileNotFoundError if kind == "link to nothing" else ValueError
    with pytest.raises(error, match="1.png"):
        read_image(file)
    os.mkfifo(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="train.parquet cannot be read as parquet: it is a folder, a pipe or a device"):
        load_images(tmp_path)


@posix_only
def test_a_pipe_is_no_file_of_weights(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(CheckpointError, match="there is no file"):
        pretrained.read_weights(tmp_path / "pipe.pth")


def test_what_could_start_a_program_is_no_picture(tmp_path):
    """Neither in a class folder nor for `predict`."""
    assert {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".ppm", ".mpo", ".avif", ".jp2"} <= picture_suffixes()
    assert not {".eps", ".ps", ".pdf", ".wmf", ".emf", ".mpg", ".h5"} & picture_suffixes()
    Image.new("RGB", (8, 8)).save("a.png")
    Path("b.eps").write_bytes(EPS)
    assert find_pictures([tmp_path]) == [tmp_path / "a.png"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF"])
def test_the_usual_kinds_are_read(kind):
    content = saved(kind, **({"save_all": True, "append_images": [Image.new("RGB", (8, 8))]} if kind == "MPO" else {}))
    assert read_image(BytesIO(content), name=kind).shape == (3, 8, 8)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_brightness_in_little_memory(kind, tmp_path):
    """Read for prediction and for evaluation alike; at most a few bytes a pixel, and none of the eight of an int64."""
    import tracemalloc
    ramp = np.tile(np.arange(1000, dtype=np.uint16) * 64, (1000, 1))
    Image.fromarray(ramp).save(tmp_path / f"0.{kind.lower()}")
    tracemalloc.start()
    ours = read_image(tmp_path / f"0.{kind.lower()}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    theirs = np.asarray(data.open_image(tmp_path / f"0.{kind.lower()}", "x", upright=False))
    assert (ours[0].numpy() == ramp >> 8).all() and (theirs[..., 0] == ramp >> 8).all()
    assert peak < 10 * ramp.size


# ---------------------------------------------------------------- tables


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
GOOD = {"bytes": saved("PNG"), "path": None}


def noted(features):
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def secret(path="private.png"):
    return pa.array([GOOD, {"bytes": None, "path": path}], STRUCT)


IMAGE, LABEL = {"_type": "Image"}, {"_type": "ClassLabel", "names": ["a", "b"]}
TABLES = {  # columns, the note of `datasets`
    "a path": ({"image": secret(), "label": [0, 1]}, None),
    "an absolute path": ({"image": secret("ABSOLUTE"), "label": [0, 1]}, {"image": IMAGE, "label": LABEL}),
    "a path with ..": ({"image": secret("../private.png"), "label": [0, 1]}, None),
    "a URL": ({"image": secret("https://example.org/private.png"), "label": [0, 1]}, None),
    "a chained URL": ({"image": secret("zip://private.png::file:///tmp/x.zip"), "label": [0, 1]}, None),
    "a file URL": ({"image": secret("file:///private.png"), "label": [0, 1]}, None),
    "a device": ({"image": secret("/dev/zero"), "label": [0, 1]}, None),
    "a pipe": ({"image": secret("PIPE"), "label": [0, 1]}, None),
    "a path of many lines": ({"image": secret("a\nb\n" * 99), "label": [0, 1]}, None),
    "an endless path": ({"image": secret("x" * 10**6), "label": [0, 1]}, None),
    "only paths": ({"image": pa.array([{"path": "private.png"}] * 2, pa.struct([("path", pa.string())])), "label": [0, 1]},
                   {"image": IMAGE, "label": LABEL}),
    "text for bytes": ({"image": pa.array([{"bytes": "private.png"}] * 2, pa.struct([("bytes", pa.string())])), "label": [0, 1]}, None),
    "paths as text": ({"image": ["private.png"] * 2, "label": [0, 1]}, {"image": IMAGE, "label": LABEL}),
    "numbers for pictures": ({"image": [1, 2], "label": [0, 1]}, {"image": IMAGE, "label": LABEL}),
    "lists for pictures": ({"image": [[1], [2]], "label": [0, 1]}, {"image": IMAGE, "label": LABEL}),
    "nothing": ({"image": pa.array([GOOD, None], STRUCT), "label": [0, 1]}, None),
    "EPS": ({"image": pa.array([GOOD["bytes"], EPS]), "label": [0, 1]}, None),
    "a bomb": ({"image": pa.array([GOOD["bytes"], png_of(20_000, 20_000)]), "label": [0, 1]}, None),
    "empty bytes": ({"image": pa.array([GOOD["bytes"], b""]), "label": [0, 1]}, None),
    "other sizes": ({"image": pa.array([GOOD["bytes"], saved("PNG", size=(9, 9))]), "label": [0, 1]}, None),
    "labels beyond the names": ({"image": pa.array([GOOD] * 2, STRUCT), "label": [0, 7]}, {"image": IMAGE, "label": LABEL}),
    "labels beyond 64 bits": ({"image": pa.array([GOOD] * 2, STRUCT), "label": pa.array([0, 2**64 - 1], pa.uint64())},
                              {"image": IMAGE, "label": LABEL}),
    "no labels": ({"image": pa.array([GOOD] * 2, STRUCT), "label": pa.array([None, None], pa.int64())}, None),
    "lists for labels": ({"image": pa.array([GOOD] * 2, STRUCT), "label": [[0], [1]]}, {"image": IMAGE, "label": LABEL}),
    "two columns of one name": ([pa.array([GOOD] * 2, STRUCT), pa.array([GOOD] * 2, STRUCT), pa.array([0, 1])], ["image", "image", "label"]),
    "two label columns of one name": ([pa.array([GOOD] * 2, STRUCT), pa.array([0, 1]), pa.array([0, 1])], ["image", "label", "label"]),
    "no columns": ({}, None),
    "a note of one class": ({"image": pa.array([GOOD] * 2, STRUCT), "label": [0, 0]},
                            {"image": IMAGE, "label": {"_type": "ClassLabel", "names": ["a"]}}),
}
NOTES = {"a list": [], "a number": 3, "text": "x", "a list of features": {"info": {"features": [1]}}, "null": {"info": None},
         "features that are text": {"info": {"features": {"image": "Image", "label": "ClassLabel"}}},
         "names that are a number": {"info": {"features": {"image": IMAGE, "label": {"_type": "ClassLabel", "names": 2}}}},
         "names that are text": {"info": {"features": {"image": IMAGE, "label": {"_type": "ClassLabel", "names": "ab"}}}},
         "other columns": {"info": {"features": {"img": IMAGE, "y": LABEL}}}}


OPENED = []
sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" else None)  # cannot be taken away again


@posix_only
@pytest.mark.parametrize("kind", TABLES)
def test_a_hostile_table_is_one_sentence_and_opens_nothing(kind, tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    for place in (tmp_path, tmp_path / "d"):
        Image.new("RGB", (8, 8)).save(place / "private.png")
    os.mkfifo(tmp_path / "pipe")
    columns, note = TABLES[kind]
    if isinstance(columns, list):
        table = pa.table(columns, names=note)
    else:
        table = pa.table(columns)
        if kind in ("an absolute path", "a pipe"):
            path = tmp_path / ("pipe" if kind == "a pipe" else "private.png")
            table = pa.table({**columns, "image": secret(str(path))})
        table = table.replace_schema_metadata(noted(note)) if note else table
    pq.write_table(table, "d/train.parquet")
    OPENED.clear()
    with pytest.raises(ValueError) as told:
        load_images("d")
    assert "\n" not in str(told.value) and len(str(told.value)) < 500
    assert not [path for path in OPENED if "private" in path or "pipe" in path or path.startswith("/dev/")]
    assert any(path.endswith("train.parquet") for path in OPENED)


@pytest.mark.parametrize("kind", NOTES)
def test_a_note_of_nonsense_counts_as_none(kind):
    table = pa.table({"image": pa.array([GOOD] * 2, STRUCT), "label": [0, 1]})
    Path("d").mkdir()
    pq.write_table(table.replace_schema_metadata({b"huggingface": json.dumps(NOTES[kind]).encode()}), "d/train.parquet")
    assert load_images("d").classes == ("0", "1")


@pytest.mark.parametrize("name", ["a[b]", "[!x]", "a::b", "zip::c", "s3:", "*", "a b", "%41", "?x", "#", "file:"])
def test_folders_of_any_name_are_folders(name, tmp_path):
    folder = tmp_path / name / "d"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"image": pa.array([GOOD] * 2, STRUCT), "label": [0, 1]}), folder / "train[0].parquet")
    pq.write_table(pa.table({"image": pa.array([GOOD] * 2, STRUCT), "label": [0, 1]}), folder / "test-0.parquet")
    assert len(load_images(folder, "test")) == 2
    for split in ("train", "val"):
        for label in ("a[b]", "c::d"):
            (tmp_path / name / "pictures" / split / label).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / name / "pictures" / split / label / "[0]::1.png")
    assert load_images(tmp_path / name / "pictures").classes == ("a[b]", "c::d")


# ---------------------------------------------------------------- writers


WRITERS = """
import os, sys
from pathlib import Path
from convmixer_edu.checkpoint import write_atomically
os.getpid = lambda: 7
children = []
for k in range(20):
    if not (child := os.fork()):
        try:
            for _ in range(5):
                write_atomically(Path("speed.json"), bytes([65 + k])*(50_000 + 1000*k))
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    children.append(child)
sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))
"""


@posix_only
def test_writers_with_the_same_process_id_do_not_meet(tmp_path):
    """Two containers that share a folder often have the same process ids."""
    done = subprocess.run([sys.executable, "-c", WRITERS], env=offline(PYTHONPATH=ROOT), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = Path("speed.json").read_bytes()
    k = content[0] - 65
    assert content == bytes([65 + k]) * (50_000 + 1000 * k)
    assert os.listdir() == ["speed.json"]


KILLED = """
import os, sys, torch
from pathlib import Path
from convmixer_edu import data
images = torch.full((60, 3, 64, 64), int(sys.argv[1]), dtype=torch.uint8)
while True:
    data.write_cache(data.private_folder() / "x.safetensors", {"images": images}, {})
    print("ready", flush=True)
"""


def test_a_writer_that_is_killed_leaves_the_old_or_the_new_file(recwarn):
    for turn in range(3):
        writer = subprocess.Popen([sys.executable, "-c", KILLED, str(turn)], env=offline(PYTHONPATH=ROOT), stdout=subprocess.PIPE)
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(0.02 * turn)
        writer.kill()
        writer.wait()
        tensors, _ = data.read_cache(Path("cache/x.safetensors"))
        assert not tensors or len(tensors["images"].unique()) == 1
    assert tensors and not [w for w in recwarn.list if w.category is UserWarning]


def test_what_killed_writers_left_goes_after_a_day(tmp_path):
    with pytest.raises(KeyboardInterrupt), written_aside(tmp_path / "x") as young:
        (tmp_path / ".convmixer-0123.part").write_text("killed long ago")
        (tmp_path / ".convmixer-4567.part").write_text("killed just now, or alive")
        (tmp_path / ".hidden.part").write_text("somebody else's")
        os.utime(tmp_path / ".convmixer-0123.part", (time.time() - 90_000,) * 2)
        os.utime(tmp_path / ".hidden.part", (1, 1))
        raise KeyboardInterrupt
    assert not young.exists()
    write_atomically(tmp_path / "x", b"new")
    assert sorted(os.listdir()) == [".convmixer-4567.part", ".hidden.part", "x"]


@posix_only
def test_a_link_at_a_name_that_could_be_guessed_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    for name in (f".x.{os.getpid()}.part", f".x.{os.getpid()}", "x.tmp", ".x.part"):
        (tmp_path / name).symlink_to(tmp_path / "victim")
    write_atomically(tmp_path / "x", b"new")
    assert (tmp_path / "victim").read_text() == "precious" and (tmp_path / "x").read_bytes() == b"new"


@posix_only
def test_files_have_the_modes_that_the_user_asked_for(tmp_path):
    """Runs can be shared; the cache is one's own."""
    before = os.umask(0o022)
    try:
        write_atomically(tmp_path / "run.json", b"{}")
        data.make_private(tmp_path / "new/cache")
    finally:
        os.umask(before)
    assert (tmp_path / "run.json").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "new/cache").stat().st_mode & 0o777 == 0o700
    (tmp_path / "new").chmod(0o777)
    assert data.make_private(tmp_path / "new").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "pathlib.Path.touch"])
def test_no_message_shows_a_temporary_name(call, tmp_path, monkeypatch):
    from convmixer_edu import deploy

    def full(*names, **_):
        raise OSError(28, "No space left on device", *([str(names[0])] if names and not isinstance(names[0], int) else []))

    monkeypatch.setattr(call, full)
    messages = []
    for write in (lambda: write_atomically(tmp_path / "x", b"1"), lambda: deploy.export(torch.nn.ReLU(), (3, 4, 4), tmp_path / "x", "torch.export")):
        with pytest.raises(ValueError, match="x could not be written .No space left on device.: make room") as told:
            write()
        messages.append(str(told.value))
    with pytest.warns(UserWarning, match="x.safetensors could not be written .No space left on device") as heard:
        data.write_cache(tmp_path / "x.safetensors", {"a": torch.ones(3)}, {})
    with pytest.raises(CheckpointError) as told, written_aside(tmp_path / "x") as aside:
        aside.write_bytes(b"1")
    messages += [str(heard[0].message), str(told.value)]
    assert not [message for message in messages if ".part" in message or ".convmixer" in message]
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.part"))


# ---------------------------------------------------------------- other users


def pets(root):
    """A folder of six white pictures."""
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (8, 8), "white").save(root / split / name / f"{i}.png")
    return root


@root_only
def test_a_cache_file_that_another_user_put_there_is_not_believed(tmp_path):
    folder = pets(tmp_path / "pets")
    file = data._cache_file(folder, "train", None)
    file.parent.chmod(0o777)
    poison = {"images": torch.full((6, 3, 8, 8), 66, dtype=torch.uint8), "labels": torch.tensor([1, 1, 1, 0, 0, 0])}
    data.write_cache(file, poison, {"state": data.source_state(folder, data.list_files(folder, "train")), "classes": ["cat", "dog"]})
    assert load_images(folder).images.unique().tolist() == [66]  # while it is ours
    os.chown(file, SOMEBODY, SOMEBODY)
    with pytest.warns(UserWarning, match="another user put .* there"):
        assert load_images(folder).images.unique().tolist() == [255]
    assert file.stat().st_uid == 0 and file.parent.stat().st_mode & 0o077 == 0


@root_only
def test_a_folder_of_another_user_is_not_used_and_it_is_said_once(tmp_path, capsys):
    folder = pets(tmp_path / "pets")
    cache = tmp_path / "cache"
    cache.mkdir()
    os.chown(cache, SOMEBODY, SOMEBODY)
    for _ in range(2):
        assert load_images(folder).images.unique().tolist() == [255]
        machine.remember({"a question": "an answer"})
    said = capsys.readouterr().err
    assert said == f"nothing is kept in {cache} (it belongs to another user): set CONVMIXER_CACHE to a folder of your own\n"
    assert not os.listdir(cache)


@root_only
def test_settings_and_evaluations_of_another_user_are_not_believed(tmp_path):
    machine.remember({"a question": "an answer"})
    assert machine.read_answers() == {"a question": "an answer"}
    os.chown(tmp_path / "cache/speed.json", SOMEBODY, SOMEBODY)
    assert machine.read_answers() == {}
    note = data.private_folder("evaluations") / "x.safetensors"
    tally = pretrained.Tally(note)
    tally.add(torch.eye(3), torch.arange(3))
    tally.keep()
    assert len(pretrained.Tally(note).rows) == 3
    os.chown(note, SOMEBODY, SOMEBODY)
    with pytest.warns(UserWarning, match="another user put .* there.*computed again"):
        assert len(pretrained.Tally(note).rows) == 0


@pytest.fixture
def compilers(tmp_path, monkeypatch):
    """A /tmp of one's own, and no word on where compilers keep their code; returns it."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "x")  # to be put back at the end
        monkeypatch.delenv(name)
    data._temporary.cache_clear()
    yield tmp_path / "tmp"
    data._temporary.cache_clear()


def test_compiled_code_is_kept_below_our_own_cache(compilers, tmp_path, monkeypatch):
    import getpass
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compilers / f"torchinductor_{getpass.getuser()}"))  # as torch itself sets it
    depthwise.keep_compiled_code_private()
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        assert Path(os.environ[name]).parent == tmp_path / "cache/compiled"
    if os.name == "posix":
        assert (tmp_path / "cache/compiled").stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    depthwise.keep_compiled_code_private()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"


@root_only
@pytest.mark.parametrize("place", ["cache", "cache/compiled"])
def test_compiled_code_is_not_kept_with_another_user(compilers, tmp_path, place):
    (tmp_path / place).mkdir(parents=True)
    os.chown(tmp_path / place, SOMEBODY, SOMEBODY)
    depthwise.keep_compiled_code_private()
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parent.parent == compilers
    assert not list((tmp_path / place).iterdir())


@root_only
def test_headers_are_not_compiled_into_a_folder_of_another_user(compilers):
    import getpass

    from torch._inductor import config
    with config.patch(cpp_cache_precompile_headers=True):
        depthwise.keep_compiled_code_private()
        assert config.cpp_cache_precompile_headers
        os.chown(compilers / f"torchinductor_{getpass.getuser()}", SOMEBODY, SOMEBODY)
        depthwise.keep_compiled_code_private()
        assert not config.cpp_cache_precompile_headers

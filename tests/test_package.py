"""What is shipped: the wheel alone in an environment, what it asks of Colab, and one owner's name."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from email.parser import HeaderParser
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from conftest import HOUR, ROOT, offline, untracked
from first_cell import colab_links, reference
from nbdev.config import get_config
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CONFIG = get_config(path=ROOT)
DEVELOPMENT = ["nbdev", "fastcore", "execnb", "ipykernel", "jupyter_core", "sphinx", "pytest"]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel, built from the source distribution, built from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".*", "_build", "build", "dist", "runs", "data", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=left_out)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, folder / "source"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HOUR)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "would be ignored" not in done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def metadata(wheel):
    """The wheel's METADATA."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return HeaderParser().parsestr(archive.read(name).decode())


def asked_for(requirements):
    """Return the installed distributions that requirements lead to, directly or not."""
    waiting, seen, found = [Requirement(text) for text in requirements], set(), {}
    while waiting:
        wanted = waiting.pop()
        for extra in {"", *wanted.extras}:
            name = canonicalize_name(wanted.name)
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            found[name] = distribution(name)
            for text in found[name].requires or []:
                further = Requirement(text)
                if not further.marker or further.marker.evaluate({**default_environment(), "extra": extra}):
                    waiting.append(further)
    return found.values()


@pytest.fixture(scope="session")
def environment(wheel, metadata, tmp_path_factory):
    """A new virtual environment: links to what the wheel asks for, the wheel, and nothing else."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    plain = [text for text in metadata.get_all("Requires-Dist") if "extra ==" not in text]
    for package in asked_for(plain):
        for file in package.files:
            if ".." in file.parts or not (real := Path(package.locate_file(file))).exists():
                continue
            compiled = [*(real.parent / "__pycache__").glob(f"{real.stem}.*.pyc")] if real.suffix == ".py" else []
            for path in (real, *compiled):
                link = site / path.relative_to(package.locate_file(""))
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.exists():
                    link.symlink_to(path)
    install = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet",
               "--no-index", wheel]
    done = subprocess.run(install, capture_output=True, text=True, timeout=HOUR)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def use(environment, *command, folder):
    """Run a command of the environment away from the checkout; return what it printed."""
    clean = {name: value for name, value in offline().items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    clean["PATH"] = os.defpath
    done = subprocess.run([environment / "bin" / command[0], *command[1:]], cwd=folder, env=clean,
                          capture_output=True, text=True, timeout=HOUR)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_wheel_holds_the_package_and_its_results(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"convmixer_edu", f"convmixer_edu-{CONFIG.version}.dist-info"}
    results = [path for path in (ROOT / "results").rglob("*") if path.is_file()]
    wanted = {f"convmixer_edu/results/{path.relative_to(ROOT / 'results').as_posix()}" for path in results}
    wanted |= {f"convmixer_edu/{path.name}" for kind in ("*.py", "*.csv", "py.typed") for path in (ROOT / "convmixer_edu").glob(kind)}
    assert results and wanted <= names


def test_every_module_imports_without_the_development_tools(environment, tmp_path):
    modules = sorted(path.stem for path in (ROOT / "convmixer_edu").glob("[!_]*.py"))
    script = f"""
import importlib, importlib.util, json, sys
for name in {modules}: importlib.import_module("convmixer_edu." + name)
import convmixer_edu
visible = [name for name in {DEVELOPMENT} if importlib.util.find_spec(name)]
print(json.dumps([convmixer_edu.__file__, convmixer_edu.__version__, visible]))"""
    home, version, visible = json.loads(use(environment, "python", "-c", script, folder=tmp_path))
    assert Path(home).is_relative_to(environment)
    assert version == CONFIG.version
    assert visible == []


def test_console_script_works_from_the_wheel(environment, tmp_path):
    help_text = use(environment, "convmixer", "--help", folder=tmp_path)
    assert all(command in help_text for command in ("train", "evaluate", "predict", "info"))
    text = use(environment, "convmixer", "info", "--dim", "256", "--depth", "8", folder=tmp_path)
    assert re.search(r"\d[\d,]{5,}", text), text


def test_recorded_results_are_read_from_the_wheel(environment, tmp_path):
    script = "from convmixer_edu.ledger import list_records, results_folder; assert list_records(); print(results_folder())"
    place = Path(use(environment, "python", "-c", script, folder=tmp_path).strip())
    assert place.is_relative_to(environment)


def test_install_changes_nothing_on_colab(metadata):
    lines = (ROOT / "tests" / "colab_packages.txt").read_text("utf8").split("\n")
    there = dict(line.split("==") for line in lines if "==" in line)
    there = {canonicalize_name(name): version for name, version in there.items()}
    for text in metadata.get_all("Requires-Dist"):
        wanted = Requirement(text)
        if wanted.marker and "extra" in str(wanted.marker):
            continue
        version = there.get(canonicalize_name(wanted.name))
        assert version, f"Colab has no {wanted.name}"
        assert wanted.specifier.contains(version, prereleases=True), f"Colab has {wanted.name} {version}"


def test_settings_are_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]
    book = yaml.safe_load((ROOT / "_config.yml").read_text("utf8"))
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf8"))
    home = CONFIG.doc_host + CONFIG.doc_baseurl
    assert project["name"] == CONFIG.lib_name
    assert project["requires-python"] == f">={CONFIG.min_python}"
    assert project["keywords"] == CONFIG.keywords.split()
    assert project["urls"] == {"Homepage": home, "Source": CONFIG.git_url}
    assert project["authors"] == [{"name": CONFIG.author}] == citation["authors"]
    assert book["author"] == CONFIG.author
    assert book["title"] == CONFIG.title == citation["title"]
    assert book["copyright"] == CONFIG.copyright
    assert book["repository"] == {"url": CONFIG.git_url, "branch": reference(CONFIG)}
    assert book["html"]["baseurl"] == home == citation["url"]
    assert citation["repository-code"] == CONFIG.git_url
    assert citation["version"] == CONFIG.version
    heading = CONFIG.version.replace(".dev0", " (under way)")
    assert f"\n## {heading}\n" in (ROOT / "CHANGELOG.md").read_text("utf8")
    links = colab_links((ROOT / "README.md").read_text("utf8"))
    assert links and set(links) == {(f"{CONFIG.user}/{CONFIG.repo}", reference(CONFIG))}, "run python tools/first_cell.py"


def test_no_other_address_of_the_project():
    """An address of the project anywhere is the one that settings.ini makes."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    repository = rf"(?:github\.com|/github)/([\w.-]+)/{re.escape(CONFIG.repo)}\b"
    pages = rf"//([\w.-]+)\.github\.io/{re.escape(CONFIG.repo)}\b"
    owners = {}
    for name in listed.split():
        if (path := ROOT / name).suffix in {".md", ".yml", ".toml", ".cff", ".ipynb", ".py"} and path.exists():
            for owner in re.findall(f"{repository}|{pages}", path.read_text("utf8")):
                owners.setdefault("".join(owner), []).append(name)
    assert set(owners) == {CONFIG.user}, owners


def test_lock_names_no_host_and_has_a_hash_for_everything():
    text = (ROOT / "requirements.lock").read_text("utf8")
    assert "://" not in text and "--index" not in text
    entries = re.split(r"\n(?=\S)", text.strip())
    assert len(entries) > 100
    assert all("==" in entry.split("\n")[0] and "--hash=sha256:" in entry for entry in entries)


def test_lock_meets_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]
    lock = (ROOT / "requirements.lock").read_text("utf8")
    locked = {}
    for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", lock, re.M):
        locked.setdefault(canonicalize_name(name), []).append(version)
    for text in project["dependencies"] + project["optional-dependencies"]["dev"]:
        wanted = Requirement(text)
        versions = locked.get(canonicalize_name(wanted.name), [])
        assert versions, f"{wanted.name} is not locked"
        assert all(wanted.specifier.contains(version) for version in versions), f"{text}: locked {versions}"


def test_the_bound_on_pillow_is_still_needed():
    from timm.data.auto_augment import _posterize_level_to_arg
    assert _posterize_level_to_arg(0, {}) == (0,), "timm keeps a bit now: take <13 off pillow, and this test away"


def test_tests_leave_no_file_behind(request, wheel, environment):
    assert untracked() <= request.config.untracked_before

"""The chapters as their readers run them: other versions, nothing but the wheel, an empty folder, no network.

    make contract                             Colab's versions: tests/colab_packages.txt, Python 3.13
    python tools/contract.py --lower          the lower bounds of pyproject, its oldest Python
    python tools/contract.py --python PATH    the packages of an environment that is there already
    python tools/contract.py --keep FOLDER    made there, and used again by the next call
    python tools/contract.py --data FOLDER    with CIFAR-10 from there; else the digits
    python tools/contract.py --only 03_model W1_data

Makes a new environment (gigabytes: not part of make test), installs the wheel as the first cell of a chapter does, runs
every chapter, then some quick tests. A cell that fails, or writes to stderr, is a fault. Ends with 1 if there was one.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
RUNNER = ["ipykernel", "ipywidgets", "nbclient", "nbformat", "pytest", "tensorboard"]  # all on Colab
QUICK = ["test_model", "test_anatomy", "test_isotropic", "test_augment"]
SKIPPED = r"^#\|\s*(gpu|eval:\s*false)\s*$"  # as when the book is built
RUN = """
import json, re, sys
import nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
notebook.cells = [cell for cell in notebook.cells
                  if cell.cell_type != "code" or not re.search(sys.argv[2], cell.source, re.M)]
nbclient.NotebookClient(notebook, timeout=None, kernel_name="python3", allow_errors=True).execute()
faults = []
for number, cell in enumerate(notebook.cells):
    for output in cell.get("outputs", []):
        if output.output_type == "error":
            faults.append([number, output.ename + ": " + output.evalue])
        elif output.output_type == "stream" and output.name == "stderr":
            faults.append([number, "stderr: " + output.text])
print(json.dumps([faults, sum(cell.cell_type == "code" for cell in notebook.cells)]))
"""


def find_python(version):
    """Return a Python of this version: on the path, or pyenv's; None if there is none."""
    home = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    tried = [*sorted(home.glob(f"versions/{version}*/bin/python")), shutil.which(f"python{version}")]
    for python in filter(None, tried):
        ask = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        if subprocess.run(ask, capture_output=True, text=True).stdout.strip() == version:
            return str(python)
    return None


def on_colab():
    """Return the versions that Colab has, by name, without the mark of the CUDA they are built for."""
    lines = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "tests" / "colab_packages.txt").read_text("utf8"), re.M)
    return {canonicalize_name(name): version.split("+")[0] for name, version in lines
            if not name.startswith(("nvidia", "cuda", "triton", "setuptools"))}  # torch itself says which of these


def constraints(lower, dependencies):
    """Return `name==version` for all that is held: what Colab has, or the lower bounds and Colab's where there is none.

    What the dependencies want in turn is held with Colab's versions only; old versions have older wants.
    """
    held, wanted = on_colab(), [Requirement(text) for text in [*dependencies, *RUNNER]]
    if lower:
        names = [canonicalize_name(one.name) for one in wanted]
        held = {name: held[name] for name in names if name in held}
        for one in wanted:
            for bound in one.specifier:
                if bound.operator == ">=":
                    held[canonicalize_name(one.name)] = bound.version
    return [f"{name}=={version}" for name, version in sorted(held.items())]


def make_environment(folder, base, lower):
    """Make an environment with the versions wanted, or on top of another one; return its Python."""
    if (folder / "made").exists():
        return folder / "bin" / "python"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]
    version = project["requires-python"].removeprefix(">=") if lower else "3.13"
    start = base or find_python(version)
    if start is None:
        sys.exit(f"there is no Python {version}: install it, or name another environment with --python")
    subprocess.run([start, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if base:
        ask = [base, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        there = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "base.pth").write_text(there)
    else:
        (folder / "constraints.txt").write_text("\n".join(constraints(lower, project["dependencies"])) + "\n")
        install += ["-c", folder / "constraints.txt"]
    subprocess.run([*install, *RUNNER, *project["dependencies"]], check=True)
    (folder / "made").touch()
    return python


def build_wheel(folder):
    """Return the wheel of this checkout."""
    left_out = shutil.ignore_patterns(".*", "_build", "build", "dist", "runs", "data", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=left_out)  # no leftovers of earlier builds
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, folder / "source"]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    return wheel


def outside(folder, python, data="digits"):
    """Return an environment that knows nothing of the checkout and fetches nothing."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return {**clean, "PATH": f"{Path(python).parent}{os.pathsep}{os.defpath}", "CONVMIXER_DATA": data,
            "CONVMIXER_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
            "JUPYTER_PREFER_ENV_PATH": "1",
            "PYTHONWARNINGS": "ignore:Guards may run slower on Python 3.13.0"}  # torch of that patch release alone


def run_chapter(python, path, data):
    """Run a chapter in an empty folder; return its faults, as sentences, and how many cells ran."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        notebook = folder / path.name
        shutil.copy(path, notebook)
        done = subprocess.run([python, "-c", RUN, notebook, SKIPPED], cwd=folder, env=outside(folder, python, data),
                              capture_output=True, text=True)
    if done.returncode:
        return [f"{path.stem}: {done.stderr.strip()[-1000:]}"], 0
    faults, count = json.loads(done.stdout.strip().split("\n")[-1])
    return [f"{path.stem}, cell {number}: {text.strip()[:1000]}" for number, text in faults], count


def quick_tests(python):
    """Run the quick tests away from the checkout; return what failed, in a list."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("tests", "tools"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "pythonpath=tools", *(f"tests/{test}.py" for test in QUICK)]
        done = subprocess.run(command, cwd=folder, env=outside(folder, python), capture_output=True, text=True)
    print(done.stdout.strip().split("\n")[-1], flush=True)
    if done.returncode:
        print(done.stdout[-3000:] + done.stderr[-1000:])
    return ["the quick tests"] if done.returncode else []


def main():
    """Make the environment, run everything in it, and say what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lower", action="store_true", help="the lower bounds of pyproject")
    parser.add_argument("--python", help="the Python of an environment whose packages are used")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="make the environment there, once, and leave it")
    parser.add_argument("--data", default="digits", help="the images that the chapters get (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="CHAPTER", help="such as 03_model")
    args = parser.parse_args()
    chapters = sorted((ROOT / "nbs").glob("*.ipynb"))
    if unknown := sorted(set(args.only or []) - {path.stem for path in chapters}):
        parser.error(f"there is no chapter {unknown[0]}")
    faults, cells = [], 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build_wheel(folder)
        python = make_environment(args.keep or folder / "venv", args.python, args.lower)
        install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--force-reinstall", wheel]
        subprocess.run(install, check=True)
        for path in (folder / "source" / "nbs" / path.name for path in chapters):  # of when the wheel was built
            if args.only and path.stem not in args.only:
                continue
            found, count = run_chapter(python, path, args.data)
            print(f"{path.stem}: {count} cells, {len(found)} faults", *found, sep="\n  ", flush=True)
            faults, cells = faults + found, cells + count
        faults += [] if args.only else quick_tests(python)
    print(f"{cells} cells, {len(faults)} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()

"""What the tests share: where things are, the real data if there is any, and an order."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch loads, as the package does
ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".pytest_cache" / "compiled"))  # once for all tests
HOUR = 3600  # seconds: a guard against what hangs, out of reach of a machine that is only busy
PATIENCE = 300_000  # milliseconds: the same for what a page should come to show
COMPILER = bool(os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++"))
needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C++ compiler: the library is used, which other tests cover")
FIRST, LAST = ["test_notebooks"], ["test_chapters", "test_book", "test_package"]


def real_data():
    """Return CIFAR-10 as a data source, or None: $CONVMIXER_DATA, else a folder beside the checkout."""
    if source := os.environ.get("CONVMIXER_DATA"):
        return None if source == "digits" else source
    files = sorted(ROOT.parent.glob("*/cifar10/*.parquet"))
    return str(files[0].parent) if files else None


def environment(**more):
    """Return this process's environment, the commands beside its Python first, and some more."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, **{name: str(value) for name, value in more.items()}}


def offline(**more):
    """Return an environment in which nothing is fetched and the data are digits."""
    return environment(CONVMIXER_DATA="digits", HF_HUB_OFFLINE=1, HF_DATASETS_OFFLINE=1, **more)


def untracked():
    """Return the files that git neither tracks nor ignores."""
    command = ["git", "ls-files", "--others", "--exclude-standard"]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split("\n"))


@pytest.fixture(scope="session")
def cifar10():
    """CIFAR-10 as a data source; a test that needs it is skipped where there is none."""
    if not (source := real_data()):
        pytest.skip("no CIFAR-10: set CONVMIXER_DATA to a folder of its parquet files")
    return source


@pytest.fixture(scope="module")
def browser():
    """The machine's browser, headless."""
    from browser import chromium, find_browser
    if not find_browser():
        pytest.skip("no Chromium or Chrome is installed: no page was opened in a browser")
    from playwright.sync_api import expect
    expect.set_options(timeout=PATIENCE)
    with chromium() as browser:
        yield browser


@pytest.fixture
def tab(browser):
    """A fresh tab. Whatever a test does in it, its console stays clean and no other host is asked."""
    from browser import watch
    with browser.new_page(viewport={"width": 1280, "height": 800}) as tab:
        tab.set_default_timeout(PATIENCE)
        yield watch(tab)
        assert not tab.complaints
        assert {urlsplit(url).netloc for url in tab.asked} <= {"", urlsplit(tab.url).netloc}


def pytest_configure(config):
    """Remember what lay in the checkout before the tests."""
    config.untracked_before = untracked()


def pytest_collection_modifyitems(items):
    """Quick checks of the notebooks first, then the tests of the code, the slow ones last."""
    def place(item):
        name = item.path.stem
        return (name not in FIRST, LAST.index(name) + 1 if name in LAST else 0)

    items.sort(key=place)

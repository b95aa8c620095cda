"""The network in a browser, held against PyTorch, and what a page takes: python tools/record_browser.py, into results/browser.json.

Needs Chromium and the book from `make book`. A hundred test images (CIFAR-10 where $CONVMIXER_DATA or the network has it);
on an idle machine only.
"""

import base64
import contextlib
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from browser import broken_rules, chromium, count_bytes, serve, visit, watch

from convmixer_edu.augment import normalize
from convmixer_edu.checkpoint import write_json
from convmixer_edu.inference import load_run
from convmixer_edu.ledger import pretrained_run
from convmixer_edu.live import photograph, sample_pictures
from convmixer_edu.machine import device_name

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
LOADS = 5  # of the first page; of each page three
ASK = """async pixels => {
  const { network, answer } = await import("/live/network.js")
  const [run, weights] = await Promise.all([fetch("/live/run/config.json").then(r => r.json()),
    fetch("/live/run/model.safetensors").then(r => r.arrayBuffer())])
  const net = network(run, weights), all = Uint8ClampedArray.from(atob(pixels), c => c.charCodeAt(0)), found = []
  for (let at = 0; at < all.length; at += 4 * net.size * net.size) {
    const started = performance.now()
    const logits = answer(net, all.subarray(at, at + 4 * net.size * net.size))
    found.push({ logits, ms: performance.now() - started })
  }
  return found
}"""


@contextlib.contextmanager
def served(body=""):
    """Serve a page with the live network beside it; yield its address."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "assets" / "static" / "live", Path(folder) / "live")
        (Path(folder) / "live" / "run").mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(pretrained_run() / name, Path(folder) / "live" / "run" / name)
        (Path(folder) / "index.html").write_text(f"<!doctype html><meta charset=utf8><link rel=icon href=data:,>{body}", "utf8")
        with serve(folder) as address:
            yield address


def measure(images, tab):
    """What a browser's tab makes of images, uint8 (B, 3, 32, 32), beside what PyTorch does."""
    model, info = load_run(pretrained_run())
    with torch.no_grad():
        expected = model(normalize(images, info.stats.mean, info.stats.std))
    opaque = torch.full((len(images), 1, *images.shape[2:]), 255, dtype=torch.uint8)
    pixels = torch.cat([images, opaque], 1).permute(0, 2, 3, 1).contiguous().numpy().tobytes()
    with served() as address:
        tab.goto(address)
        found = tab.evaluate(ASK, base64.b64encode(pixels).decode())
    logits = torch.tensor([f["logits"] for f in found])
    return {"images": len(images), "difference": float((logits - expected).abs().max()),
            "same_class": int((logits.argmax(1) == expected.argmax(1)).sum()),
            "ms": statistics.median(f["ms"] for f in found[-20:]), "browser": f"Chrome/{tab.context.browser.version}",
            "device": device_name(torch.device("cpu"))}


def newcomer(tab, site):
    """Open the book, choose a picture of one's own, wait for the answer: clicks, and seconds without those of the choice."""
    tab.add_init_script("window.clicks = 0; addEventListener('click', event => { clicks += event.isTrusted }, true)")
    picture = {"name": "own.jpg", "mimeType": "image/jpeg", "buffer": base64.b64decode(photograph(1000).split(",")[1])}
    started = time.perf_counter()
    tab.goto(f"{site}nbs/index.html")
    with tab.expect_file_chooser() as chooser:
        tab.get_by_label("a picture of your own").click()
    chooser.value.set_files(picture)
    tab.get_by_text(re.compile("^your picture: .*Live,")).wait_for()
    return {"clicks": tab.evaluate("clicks"), "seconds": time.perf_counter() - started}


def weigh(browser, site, page):
    """What one page takes with nothing in the cache, and what is wrong with it in both themes and on a phone."""
    paints, broken = [], set()
    for theme in ("light", "dark", "light"):  # opened anew: colours that are under way have no contrast
        with browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme=theme) as tab:
            visit(watch(tab), f"{site}{page}")
            paints.append(tab.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
            if len(paints) < 3:
                broken.update((theme, rule) for rule in broken_rules(tab))
            found = {"bytes": count_bytes(tab, site, HTML), "requests": len(tab.asked), "first_paint_ms": statistics.median(paints),
                     "axe": len(broken)}
            tab.set_viewport_size({"width": 390, "height": 844})
            found["sideways"] = max(0, tab.evaluate("document.documentElement.scrollWidth") - 390)
    return found


def weigh_book(browser):
    """The newcomer's way, by the median of several, and every page."""
    with serve(HTML) as site:
        ways = []
        for _ in range(LOADS):
            with browser.new_page() as tab:
                ways.append(newcomer(tab, site))
        pages = sorted(path.relative_to(HTML).as_posix() for path in HTML.glob("nbs/**/*.html"))
        return {"newcomer": {"clicks": ways[0]["clicks"], "seconds": statistics.median(way["seconds"] for way in ways), "of": LOADS},
                "pages": {page: weigh(browser, site, page) for page in pages}}


def main():
    from convmixer_edu.data import book_source, load_images
    data = load_images(book_source(), "test", limit=100)
    images = data.images if data.images.shape[1] == 3 else sample_pictures()[0]
    with chromium() as browser:
        record = {"load": os.getloadavg()[0], "cores": os.cpu_count(), **measure(images, browser.new_page()), **weigh_book(browser)}
    write_json(ROOT / "results" / "browser.json", record)
    json.dump(record, sys.stdout, indent=1)


if __name__ == "__main__":
    main()

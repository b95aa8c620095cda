"""Pictures of the built book's first page and of five chapters, on a desktop and a phone, light and dark: python tools/screens.py [FOLDER]

With --readme instead: the picture of README.md, the first page with its network awake. Its photographs are then scikit-learn's:
CIFAR-10's are not ours to pass on. Needs Chromium, and the book from `make book`.
"""

import io
import os
import re
import sys
from pathlib import Path

from browser import chromium, serve, visit
from PIL import Image, PngImagePlugin

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
HOME = "nbs/index"
PAGES = (HOME, "nbs/00_start", "nbs/01_question", "nbs/03_model", "nbs/05_training", "nbs/08_related")
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
README = ROOT / "assets" / "static" / "first-page.png"
SHOWS = "[...document.querySelectorAll('article h1, .landing')].map(part => part.firstChild.textContent).join(' ')"


def take_all(browser, address, folder):
    """Take each page in each size and theme: PAGE-SIZE-THEME.png, what is seen before anybody scrolls."""
    folder.mkdir(parents=True, exist_ok=True)
    for size, (width, height) in SIZES.items():
        for theme in ("light", "dark"):
            with browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme) as tab:
                for page in PAGES:
                    visit(tab, f"{address}{page}.html")
                    tab.screenshot(path=folder / f"{Path(page).name}-{size}-{theme}.png")


def take_readme(browser, address):
    """Take the first page as a reader sees it who has woken the network; the file remembers the words it shows."""
    os.environ["CONVMIXER_DATA"] = "digits"  # as where CIFAR-10 is not at hand
    from convmixer_edu.inference import load_run
    from convmixer_edu.ledger import pretrained_run
    from convmixer_edu.live import live_html, sample_pictures
    ours = live_html(*load_run(pretrained_run()), *sample_pictures())
    page = (HTML / f"{HOME}.html").read_text("utf8")
    page, count = re.subn(r'(?s)<figure class="live">.*?</figure>', lambda found: ours, page)
    assert count == 1
    with browser.new_page(viewport={"width": 1280, "height": 800}, reduced_motion="reduce") as tab:
        tab.route(f"**/{HOME}.html", lambda route: route.fulfill(body=page, content_type="text/html"))
        visit(tab, f"{address}{HOME}.html")
        tab.get_by_role("button", name="Wake").click()
        tab.locator(".live-bars li").first.wait_for()
        tab.locator(".live-choices label").nth(3).click()  # a first answer is slow: the script is still being compiled
        tab.wait_for_function("() => document.querySelector('.live-status').textContent.startsWith(document.querySelector('.live-choices :checked').ariaLabel)")
        note = PngImagePlugin.PngInfo()
        note.add_text("shows", tab.evaluate(SHOWS))
        Image.open(io.BytesIO(tab.screenshot())).convert("RGB").quantize(256).save(README, optimize=True, pnginfo=note)


def main():
    with chromium() as browser, serve(HTML) as address:
        if sys.argv[1:] == ["--readme"]:
            take_readme(browser, address)
        else:
            take_all(browser, address, Path(sys.argv[1] if sys.argv[1:] else ROOT / "_build" / "screens"))


if __name__ == "__main__":
    main()

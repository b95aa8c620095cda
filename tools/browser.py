"""The machine's Chromium, driven by Playwright, and a server for what it opens."""

import contextlib
import functools
import gzip
import http.server
import shutil
import threading
from importlib.resources import files
from urllib.parse import unquote, urlsplit

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser():
    """Return the path of a Chromium or Chrome, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextlib.contextmanager
def chromium():
    """Start the machine's browser, yield it, and end it."""
    from playwright.sync_api import sync_playwright  # here: most tests run where it is not installed
    with sync_playwright() as driver, driver.chromium.launch(executable_path=find_browser()) as browser:
        yield browser


def watch(tab):
    """Let a tab remember what it asks for, in `tab.asked`, and what it complains of, in `tab.complaints`."""
    tab.asked, tab.complaints = [], []
    tab.on("request", lambda request: tab.asked.append(request.url))
    tab.on("response", lambda answer: answer.status >= 400 and tab.complaints.append(f"{answer.status} {answer.url}"))
    tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
    tab.on("console", lambda said: said.type in {"error", "warning", "assert"} and tab.complaints.append(f"{said.type}: {said.text}"))
    return tab


def visit(tab, address):
    """Open a page and wait until its formulas and letters are set, and what its scripts do by themselves is done."""
    tab.goto(address, timeout=300_000)  # a book in one file is a long page
    tab.evaluate("Promise.all([window.MathJax?.startup?.promise, document.fonts.ready]).then(() => true)")
    tab.wait_for_timeout(200)


def broken_rules(tab, part="document"):
    """Return the rules of accessibility that a page breaks, by axe-core, and where."""
    tab.evaluate(f'{files("axe_core_python").joinpath("axe.min.js").read_text("utf8")}; 1')
    return tab.evaluate(f"""axe.run({part}, {{resultTypes: ["violations"]}}).then(found => found.violations.map(
        rule => `${{rule.id}}: ${{rule.nodes[0].html.slice(0, 200)}}`))""")


def count_bytes(tab, site, folder):
    """Return what a tab's requests weigh by a server that compresses, each address once."""
    asked = {folder / unquote(urlsplit(url).path).lstrip("/") for url in tab.asked if url.startswith(site)}
    return sum(len(gzip.compress(file.read_bytes(), 6)) for file in asked)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server that prints nothing."""

    def log_message(self, *message):
        pass


@contextlib.contextmanager
def serve(folder):
    """Serve a folder on this machine; yield its address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()

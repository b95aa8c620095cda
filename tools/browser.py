"""A headless Chromium, driven over a pipe in its own protocol: no driver, no further package."""

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --remote-debugging-pipe"
).split()


def find_browser():
    """Return the path of a Chromium or Chrome, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab; `open` returns what a page asked for and what it complained of."""

    def __init__(self, process, to_browser, from_browser):
        self.process, self.out, self.inp = process, to_browser, from_browser
        self.buffer, self.number, self.session, self.events = b"", 0, None, []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method, **params):
        """Call `method` and return its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def receive(self, seconds=3600):
        """Return the browser's next message."""
        deadline = time.monotonic() + seconds
        while b"\0" not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.inp], [], [], left)[0]:
                raise TimeoutError(f"the browser said nothing for {seconds} s")
            if not (piece := os.read(self.inp, 1 << 20)):
                raise RuntimeError("the browser has closed its pipe")
            self.buffer += piece
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def look(self, width=1280, height=900, dark=False):
        """Set the window's size and the reader's preference for a light or a dark page."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 600)
        self.send("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def evaluate(self, script):
        """Return the value of a JavaScript expression, awaited if it is a promise."""
        answer = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        return answer["result"].get("value")

    def open(self, url):
        """Load `url`, wait until its formulas are set; return (addresses asked for, complaints)."""
        self.events.clear()
        self.send("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())
        self.evaluate("window.MathJax?.startup?.promise?.then(() => true)")
        self.evaluate("new Promise(done => setTimeout(done, 200))")
        asked, complaints = [], []
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if method == "Network.requestWillBeSent":
                asked.append(params["request"]["url"])
            elif method == "Network.responseReceived" and params["response"]["status"] >= 400:
                complaints.append(f"{params['response']['status']} {params['response']['url']}")
            elif method == "Network.loadingFailed" and not params.get("canceled"):
                complaints.append(f"{params['errorText']} {params['type']}")
            elif method == "Runtime.exceptionThrown":
                complaints.append(str(params["exceptionDetails"].get("exception", {}).get("description")))
            elif method == "Runtime.consoleAPICalled" and params["type"] in {"error", "warning", "assert"}:
                complaints.append(f"{params['type']}: {[arg.get('value') for arg in params['args']]}")
            elif method == "Log.entryAdded" and params["entry"]["level"] in {"error", "warning"}:
                complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        return asked, complaints


@contextlib.contextmanager
def browser_page():
    """Start a browser with an empty profile, yield its one page, and end it."""
    pipes = [os.pipe(), os.pipe()]
    # the browser reads at descriptor 3 and writes at 4: keep our own ends out of the way of both
    (read_in, write_in), (read_out, write_out) = [
        [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in pipe] for pipe in pipes
    ]
    for end in (*pipes[0], *pipes[1]):
        os.close(end)

    def plumb():
        os.dup2(read_in, 3)
        os.dup2(write_out, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [find_browser(), *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=plumb, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        os.close(read_in)
        os.close(write_out)
        try:
            yield Page(process, write_in, read_out)
        finally:
            process.terminate()
            process.wait(timeout=20)
            os.close(write_in)
            os.close(read_out)

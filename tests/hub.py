"""A Hub on this machine: as much of it as a repository of a few files needs. huggingface_hub itself asks it."""

import contextlib
import hashlib
import http.server
import json
import threading
from types import SimpleNamespace
from urllib.parse import unquote


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers from `hub`, see `serve`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        pass

    def send(self, content, code=200, **headers):
        self.send_response(code)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            cut = self.hub.plan.pop(0) if "/resolve/" in self.path and self.hub.plan else len(content)
            self.wfile.write(content[:cut])
            self.close_connection = cut < len(content)

    def do_GET(self):
        hub, path = self.hub, self.path.partition("?")[0]
        hub.asked.append(path)
        commit = next((part for part in path.split("/") if len(part) == 40), "1" * 40)
        name = unquote(path.partition("/resolve/")[2].partition("/")[2])
        if not hub.online or not hub.files:
            self.send(b"", 404 if hub.online else 503, **{"X_Error_Code": "RepoNotFound"} if hub.online else {})
        elif name and self.command == "HEAD":
            digest, size = hashlib.sha256(hub.files[name]).hexdigest(), len(hub.files[name])
            self.send(hub.files[name], X_Repo_Commit=commit, X_Linked_Size=size, X_Linked_Etag=f'"{digest}"')
        elif name:
            wanted, content = self.headers.get("Range"), hub.sent or hub.files[name]
            self.send(content[int(wanted[6:].split("-")[0]) if wanted else 0:], 206 if wanted else 200)
        elif "/tree/" in path:
            self.send(json.dumps([{"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for p, c in hub.files.items()]).encode())
        else:
            there = [{"rfilename": p} for p in hub.files if hub.only in path]
            self.send(json.dumps({"id": "x/y", "sha": commit, "siblings": there}).encode())

    do_HEAD = do_GET


@contextlib.contextmanager
def serve(monkeypatch, files, cache):
    """Yield the Hub: .files by path; .sent instead of any of them; .plan: after so many bytes the lines of the next downloads break;
    .online; .only: what a revision must hold to have files; .asked: the paths so far; .endpoint and .cache for the client."""
    hub = SimpleNamespace(files=files, sent=None, plan=[], online=True, only="", asked=[], cache=cache)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its trials
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    yield hub
    server.shutdown()

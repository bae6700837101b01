"""A stand-in for the Hugging Face Hub: the few requests that uploading and downloading a small model repository need."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_stand_in"
COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """Keeps repositories as ``{name: {path: bytes}}`` in ``server.repositories``, and notes requests in ``server.requests``."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    do_POST = do_HEAD = do_GET

    def _answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, hub = self.path.partition("?")[0], self.server
        hub.requests.append((self.command, path))
        if hub.broken and hub.broken in path:
            return self._send(500, {"error": "the stand-in is broken"})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and self.command == "POST":
            return self._send(401, {"error": "no token"})
        if path == "/api/repos/create":
            asked = json.loads(body)
            hub.created.append(asked)
            name = f"{asked['organization']}/{asked['name']}"
            if name in hub.repositories:
                return self._send(409, {"error": "there already", "url": f"{hub.address}/{name}"})
            hub.repositories[name] = {}
            if asked.get("private") or asked.get("visibility") == "private":
                hub.private.add(name)
            return self._send(200, {"url": f"{hub.address}/{name}", "name": name})
        if path == "/api/validate-yaml":
            hub.cards.append(json.loads(body)["content"])
            return self._send(200, {"errors": [], "warnings": []})
        owner, _, rest = path.removeprefix("/api/models").removeprefix("/").partition("/")
        name = f"{owner}/{rest.split('/')[0]}"
        files, action = hub.repositories.get(name), rest.partition("/")[2]
        if files is None:
            return self._send(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
        if action == "preupload/main":
            paths = [file["path"] for file in json.loads(body)["files"]]
            return self._send(200, {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        if action == "commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self._send(200, {"success": True, "commitOid": COMMIT, "commitUrl": f"{hub.address}/{name}/commit/{COMMIT}"})
        if path.startswith("/api/models") and action in ("", "revision/main", f"revision/{COMMIT}"):
            siblings = [{"rfilename": file} for file in files]
            return self._send(
                200, {"id": name, "sha": COMMIT, "siblings": siblings, "private": name in hub.private, "tags": []}
            )
        if path.startswith("/api/models") and action.startswith("tree/"):
            rows = [{"type": "file", "path": p, "size": len(content), "oid": "1"} for p, content in files.items()]
            return self._send(200, rows)
        if action.startswith("resolve/"):
            file = action.split("/", 2)[2]
            if file in files:
                etag = hashlib.sha256(files[file]).hexdigest()
                return self._send(200, files[file], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        return self._send(404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"})

    def _send(self, status, content, headers=None):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def stand_in(monkeypatch, cache):
    """Within the block ``huggingface_hub`` uses the stand-in, which is the value, with a token and an empty cache."""
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.repositories, server.requests, server.created, server.cards, server.broken = {}, [], [], [], ""
    server.private = set()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()

"""A small imitation of the model hub, on loopback.

serve(root) answers for root/models/ORG/NAME/... and root/datasets/ORG/NAME/...; a child process
finds it through HF_ENDPOINT. Not imitated: large-file redirects, authentication, gating.
"""

import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from pathlib import Path

COMMIT = "a" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path

    def log_message(self, *args):
        pass

    def answer(self, code, body=b"", content_type="application/json", **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if path == "/":
            self.answer(200)
        elif match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(.*))?", path):
            self.api(self.root / match[1] / match[2], match[3] or "", body)
        elif match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self.file(self.root / ("datasets" if match[1] else "models") / match[2], match[3])
        else:
            self.answer(404, {"error": "no such page"})

    do_HEAD = do_POST = do_GET

    def api(self, repo, rest, body):
        if not repo.is_dir():
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        files = {str(f.relative_to(repo)): f for f in sorted(repo.rglob("*")) if f.is_file()}

        def entry(name):
            oid = hashlib.sha1(name.encode()).hexdigest()
            return {"type": "file", "oid": oid, "size": files[name].stat().st_size, "path": name}

        if rest == "" or rest.startswith("revision/"):
            info = {"id": "/".join(repo.parts[-2:]), "sha": COMMIT, "private": False}
            info |= {"gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
            self.answer(200, info | {"siblings": [{"rfilename": name} for name in files]})
        elif rest.startswith("tree/"):
            below = "".join(rest.split("/", 2)[2:])
            entries = {name: entry(name) for name in files if name.startswith(below)}
            if "recursive=true" not in self.path:  # what lies deeper shows as its folder
                for name in list(entries):
                    parts = Path(name).relative_to(below).parts
                    if len(parts) > 1:
                        folder = str(Path(below, parts[0]))
                        entries[folder] = {"type": "directory", "oid": COMMIT, "size": 0}
                        entries[folder]["path"] = folder
                        del entries[name]
            if entries or not below:
                self.answer(200, list(entries.values()))
            else:
                self.answer(404, {"error": "not found"}, X_Error_Code="EntryNotFound")
        elif rest.startswith("paths-info/"):
            if body.startswith(b"{"):
                wanted = json.loads(body).get("paths", [])
            else:
                wanted = urllib.parse.parse_qs(body.decode()).get("paths", [])
            self.answer(200, [entry(name) for name in wanted if name in files])
        else:
            self.answer(404, {"error": "no such call"})

    def file(self, repo, name):
        if not repo.is_dir():
            return self.answer(404, {"error": "none"}, X_Error_Code="RepoNotFound")
        if not (repo / name).is_file():
            code = {"X_Error_Code": "EntryNotFound", "X_Repo_Commit": COMMIT}
            return self.answer(404, {"error": "none"}, **code)
        data = (repo / name).read_bytes()
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        headers = {"ETag": etag, "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not part:
            return self.answer(200, data, "application/octet-stream", **headers)
        low, high = int(part[1]), int(part[2] or len(data) - 1)
        headers["Content_Range"] = f"bytes {low}-{min(high, len(data) - 1)}/{len(data)}"
        return self.answer(206, data[low : high + 1], "application/octet-stream", **headers)


def serve(root):
    """Start serving root; return the server (server.url, server.shutdown())."""
    handler = type("HubOfRoot", (Hub,), {"root": Path(root)})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server

"""A stand-in for the Hugging Face hub, as far as uploading a model's small files goes."""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_tokenofthetests"


@contextmanager
def stand_in():
    """Yield (its address, repositories: a name to whether it is private and its files)."""
    repositories = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            if self.headers["Authorization"] != f"Bearer {TOKEN}":
                self.answer(401, {"error": "no token"})
            elif self.path == "/api/repos/create":
                name = f"{lines[0]['organization']}/{lines[0]['name']}"
                private = lines[0].get("private") or lines[0].get("visibility") == "private"
                repositories.setdefault(name, (private, {}))
                self.answer(200, {"url": f"{address}/{name}"})
            elif self.path == "/api/validate-yaml":
                self.answer(200, {"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in lines[0]["files"]
                ]
                self.answer(200, {"files": files})
            elif "/commit/" in self.path:
                name = self.path.removeprefix("/api/models/").split("/commit/")[0]
                files = repositories[name][1]
                for line in lines:
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    elif line["key"] == "deletedFile":
                        del files[line["value"]["path"]]
                self.answer(200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{address}/{name}/commit/0"})
            else:
                self.answer(404, {"error": self.path})

        def do_GET(self):
            name, _, rest = self.path.removeprefix("/api/models/").partition("/tree/")
            if name not in repositories:
                self.answer(404, {"error": self.path})
                return
            private, files = repositories[name]
            if rest:
                entries = [
                    {"type": "file", "path": path, "size": len(content), "oid": ""} for path, content in files.items()
                ]
                self.answer(200, entries)
            else:
                siblings = [{"rfilename": path} for path in files]
                self.answer(200, {"id": name, "private": private, "sha": "0" * 40, "siblings": siblings})

        def answer(self, status, content):
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield address, repositories
        server.shutdown()

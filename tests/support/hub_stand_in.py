"""A hub for the tests: the part of the HTTP API that uploading and downloading models uses."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "c0ffee" + "0" * 34


class Hub(ThreadingHTTPServer):
    """`repositories`: id → file name → content. `lying` serves other bytes than it lists."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.lying = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """A running stand-in that huggingface_hub's own client talks to, with an empty cache."""
    from huggingface_hub import constants, file_download

    with running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in ("HUGGINGFACE_CO_URL_TEMPLATE",):
            template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(constants, name, template)
            if hasattr(file_download, name):
                monkeypatch.setattr(file_download, name, template)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield server


def large(name: str) -> bool:
    return name.endswith(".safetensors")


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/models/"):
            self._info(path.removeprefix("/api/models/"))
        elif "/resolve/" in path:
            self._file(*path.removeprefix("/").split("/resolve/"))
        else:
            self._answer(404, {"error": f"the stand-in has no {path}"})

    do_HEAD = do_GET  # noqa: N815

    def do_PUT(self) -> None:
        self.server.objects[self.path.rpartition("/")[2]] = self._body()
        self._answer(200, {})

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self._body()
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.repositories.setdefault(name, {})
            self._answer(200, {"url": f"{self.server.address}/{name}", "id": name})
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif path.endswith("/objects/batch"):
            self._answer(
                200,
                {
                    "transfer": "basic",
                    "objects": [
                        {
                            "oid": entry["oid"],
                            "size": entry["size"],
                            "actions": {
                                "upload": {"href": f"{self.server.address}/objects/{entry['oid']}"}
                            },
                        }
                        for entry in json.loads(body)["objects"]
                    ],
                },
            )
        elif "/preupload/" in path:
            self._answer(
                200,
                {
                    "files": [
                        {
                            "path": f["path"],
                            "uploadMode": "lfs" if large(f["path"]) else "regular",
                            "shouldIgnore": False,
                        }
                        for f in json.loads(body)["files"]
                    ]
                },
            )
        elif "/commit/" in path:
            self._commit(path.removeprefix("/api/models/").split("/commit/")[0], body)
        else:
            self._answer(404, {"error": f"the stand-in has no {path}"})

    def _commit(self, repository: str, body: bytes) -> None:
        files = self.server.repositories[repository]
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                files[entry["value"]["path"]] = self.server.objects[entry["value"]["oid"]]
        url = f"{self.server.address}/{repository}/commit/{COMMIT}"
        self._answer(200, {"commitOid": COMMIT, "commitUrl": url, "success": True})

    def _info(self, rest: str) -> None:
        repository, _, tree = rest.split("/revision/", maxsplit=1)[0].partition("/tree/")
        files = self.server.repositories.get(repository)
        if files is None:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        siblings = []
        for name, content in files.items():
            entry = {"rfilename": name, "size": len(content), "blobId": blob_id(content)}
            if large(name):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": digest, "oid": digest, "size": len(content)}
                entry["lfs"]["pointerSize"] = 130
            siblings.append(entry)
        if tree:
            told = [{**e, "path": e["rfilename"], "oid": e["blobId"]} for e in siblings]
            self._answer(200, [{"type": "file", **entry} for entry in told])
            return
        self._answer(
            200,
            {
                "id": repository,
                "sha": COMMIT,
                "siblings": siblings,
                "tags": [],
                "private": False,
                "downloads": 0,
                "likes": 0,
            },
        )

    def _file(self, repository: str, rest: str) -> None:
        name = rest.partition("/")[2]
        content = self.server.repositories.get(repository, {}).get(name)
        if content is None:
            self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        etag = hashlib.sha256(content).hexdigest() if large(name) else blob_id(content)
        if self.server.lying:
            content = content[:-1] + bytes([content[-1] ^ 1])
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        self._send(200, content, headers | {"Content-Type": "application/octet-stream"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self._send(status, body, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

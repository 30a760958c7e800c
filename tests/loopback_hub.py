"""A Hub on 127.0.0.1: enough of its HTTP interface for the real clients to create repositories, push, list and download.

    with LoopbackHub() as hub:
        hub.fail("POST .*/commit/", 412)          # the next such request; or 401, 403, 404, 429, 500
        hub.fail("PUT /lfs/", "drop")             # half of the body is read, then the connection is closed; or "lose" the answer
        hub.fail(7, 500)                          # the seventh request from now on
        hub.fail("GET /api/", b"<html>")          # this, with status 200; or (429, {"Retry-After": "9"}): a status with headers
    hub.fail("POST .*/commit/", function)     # calls it first; what it returns is done, `None` for nothing

A commit is applied whole or not at all, as on the real Hub. Files are LFS or regular; Xet must be off in the client. A stored
file's etag is its sha256 or its git blob id. `hub.requests` holds `METHOD path` of everything asked for, `hub.unrouted` what the
server does not know: a test that finds something there has left the known sequence.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


TOKEN = "hf_" + "loopbackTOKENthatMustNeverBeSeen"
LFS = (".parquet", ".safetensors", ".bin", ".arrow", ".pt", ".pth")


class Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = ""):
        super().__init__(status, code, message or code)


class Repo:
    def __init__(self, private: bool):
        self.private, self.commits, self.heads, self.titles = private, {}, {}, {}
        self.heads["main"] = self.commit({}, "", "initial commit")

    def commit(self, files: dict[str, bytes], parent: str, title: str) -> str:
        listing = "".join(f"{path} {hashlib.sha1(data).hexdigest()}\n" for path, data in sorted(files.items()))
        sha = hashlib.sha1(f"{parent}\n{title}\n{listing}".encode()).hexdigest()
        self.commits[sha], self.titles[sha] = files, title
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        sha = self.heads.get(revision, revision)
        if sha not in self.commits:
            raise Refused(404, "RevisionNotFound")
        return sha, self.commits[sha]


def etag(path: str, data: bytes) -> str:
    if path.endswith(LFS):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class LoopbackHub:
    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.uploads: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.unrouted: list[str] = []
        self.faults: list[list] = []
        self.lock = threading.RLock()
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def fail(self, where: str | int, how, times: int = 1) -> None:
        """Answers with status `how`, or drops the connection, where a request matches, or at the `where`-th from now on."""
        where = where + len(self.requests) if isinstance(where, int) else re.compile(where)
        self.faults.append([where, how, times])

    def fault(self, request: str):
        self.requests.append(request)
        for fault in self.faults:
            where, how, times = fault
            hit = len(self.requests) >= where if isinstance(where, int) else where.match(request)
            if times and hit:
                fault[2] -= 1
                return how() if callable(how) else how
        return None

    def files(self, repo_id: str, kind: str = "datasets", revision: str = "main") -> dict[str, bytes]:
        return self.repos[kind, repo_id].at(revision)[1]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.handle_request()

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD

    def handle_request(self):
        parts = urlsplit(self.path)
        path, length = unquote(parts.path), int(self.headers.get("Content-Length") or 0)
        with self.hub.lock:
            how = self.hub.fault(f"{self.command} {path}")
        if how == "drop":
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        body = self.rfile.read(length)
        if how == "lose":
            self.send, self.close_connection, how = lambda *_: None, True, None
        try:
            if isinstance(how, bytes):
                return self.send(200, how, {"Content-Type": "text/html"})
            if isinstance(how, tuple):
                return self.send(how[0], {"error": "injected"}, how[1])
            if how is not None:
                raise Refused(how, {404: "EntryNotFound"}.get(how, ""), "injected")
            with self.hub.lock:
                self.route(path, body)
        except Refused as refused:
            status, code, message = refused.args
            headers = {"X-Error-Code": code, "X-Error-Message": message} if message else {}
            headers |= {"Retry-After": "0"} if status == 429 else {}
            self.send(status, {"error": message}, headers)

    def send(self, status: int, content=None, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def route(self, path: str, body: bytes):
        for pattern, handle in self.ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return handle(self, body, **match.groupdict())
        self.hub.unrouted.append(f"{self.command} {path}")
        raise Refused(404, "", "no such route")

    def signed_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repo(self, kind: str, name: str, write: bool = False) -> Repo:
        repo = self.hub.repos.get((kind, name))
        if write and not self.signed_in():
            raise Refused(401, "", "Invalid username or password.")
        if repo is None or (repo.private and not self.signed_in()):
            raise Refused(404 if self.signed_in() or repo is None else 401, "RepoNotFound", "Repository not found")
        return repo

    # ---- repositories ----

    def whoami(self, body):
        if not self.signed_in():
            raise Refused(401, "", "Invalid username or password.")
        self.send(200, {"type": "user", "name": "me", "auth": {}, "orgs": []})

    def create(self, body):
        asked = json.loads(body)
        kind, name = asked.get("type", "model") + "s", f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not self.signed_in():
            raise Refused(401, "", "Invalid username or password.")
        url = f"{self.hub.endpoint}/{'datasets/' if kind == 'datasets' else ''}{name}"
        if (kind, name) in self.hub.repos:
            return self.send(409, {"error": "You already created this repo", "url": url})
        self.hub.repos[kind, name] = Repo(asked.get("visibility") == "private")
        self.send(200, {"url": url, "name": name, "id": name})

    def info(self, body, kind, name, revision="main"):
        repo = self.repo(kind, name)
        sha, files = repo.at(revision)
        siblings = [{"rfilename": path} for path in files]
        card = re.match(rb"---\n(.*?)\n---", files.get("README.md", b""), re.DOTALL)
        card = yaml.safe_load(card[1]) if card else None
        self.send(
            200, {"id": name, "sha": sha, "private": repo.private, "siblings": siblings, "tags": [], "cardData": card}
        )

    def branch(self, body, kind, name, revision):
        repo = self.repo(kind, name, write=True)
        if revision in repo.heads:
            raise Refused(409, "", "Reference already exists")
        repo.heads[revision] = repo.heads["main"]
        self.send(200, {})

    # ---- reading ----

    def entry(self, path: str, data: bytes) -> dict:
        lfs = {"lfs": {"oid": etag(path, data), "size": len(data), "pointerSize": 100}} if path.endswith(LFS) else {}
        return {"type": "file", "path": path, "size": len(data), "oid": etag(path, data), **lfs}

    def tree(self, body, kind, name, revision, path=""):
        _, files = self.repo(kind, name).at(revision)
        inside = {p: data for p, data in files.items() if not path or p.startswith(path + "/")}
        if path and not inside:
            raise Refused(404, "EntryNotFound", f"{path} does not exist")
        entries, folders = [], set()
        recursive = "recursive=True" in self.path or "recursive=true" in self.path
        for p, data in inside.items():
            rest = p.removeprefix(path + "/" if path else "")
            folders |= {p[: len(p) - len(rest)] + rest.split("/", 1)[0]} if "/" in rest else set()
            if recursive or "/" not in rest:
                entries.append(self.entry(p, data))
        entries += [{"type": "directory", "path": folder, "size": 0, "oid": "0" * 40} for folder in sorted(folders)]
        self.send(200, entries)

    def paths_info(self, body, kind, name, revision):
        _, files = self.repo(kind, name).at(revision)
        asked = re.findall(r"paths=([^&]+)", unquote(body.decode())) or json.loads(body or b"{}").get("paths", [])
        self.send(200, [self.entry(path, files[path]) for path in asked if path in files])

    def resolve(self, body, name, revision, path, kind="models"):
        sha, files = self.repo(kind, name).at(revision)
        headers = {"X-Repo-Commit": sha}
        if path not in files:
            raise Refused(404, "EntryNotFound", f"{path} does not exist")
        data, status = files[path], 200
        headers |= {"ETag": f'"{etag(path, data)}"', "Accept-Ranges": "bytes"}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end, status = int(asked[1]), int(asked[2] or len(data) - 1), 206
            headers["Content-Range"] = f"bytes {start}-{min(end, len(data) - 1)}/{len(data)}"
            data = data[start : end + 1]
        self.send(status, data, headers)

    # ---- writing ----

    def validate(self, body):
        content = json.loads(body)["content"]
        errors = []
        try:
            metadata = yaml.safe_load(re.match(r"---\r?\n(.*?)\r?\n---", content, re.DOTALL)[1])
            if not isinstance(metadata, dict):
                errors.append({"message": "metadata must be a mapping"})
        except (TypeError, yaml.YAMLError) as error:
            errors.append({"message": str(error)})
        self.send(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, body, kind, name, revision):
        _, files = self.repo(kind, name, write=True).at(revision)
        answers = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            known = {"oid": etag(path, files[path])} if path in files else {}
            answers.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if path.endswith(LFS) else "regular",
                    "shouldIgnore": False,
                    **known,
                }
            )
        self.send(200, {"files": answers})

    def batch(self, body, name, kind="models"):
        self.repo(kind, name, write=True)
        asked, objects = json.loads(body), []
        for item in asked["objects"]:
            href = f"{self.hub.endpoint}/lfs/{item['oid']}"
            actions = {} if item["oid"] in self.hub.uploads else {"actions": {"upload": {"href": href}}}
            objects.append({**item, "authenticated": True, **actions})
        self.send(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def put(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "", "the content is not what was announced")
        self.hub.uploads[oid] = body
        self.send(200, {})

    def commit(self, body, kind, name, revision):
        repo = self.repo(kind, name, write=True)
        head, files = repo.at(revision)
        files, title = dict(files), ""
        for line in body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, head):
                    raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.uploads:
                    raise Refused(400, "", f"LFS object {value['oid']} is missing")
                files[value["path"]] = self.hub.uploads[value["oid"]]
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refused(404, "EntryNotFound", "A file with this name doesn't exist")
            else:
                files = {p: data for p, data in files.items() if not p.startswith(value["path"])}
        repo.heads[revision] = sha = repo.commit(files, head, title)
        self.send(200, {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    NAME, KIND = r"(?P<name>[^/]+/[^/]+)", r"(?P<kind>models|datasets)"
    API = f"/api/{KIND}/{NAME}"
    ROUTES = (
        ("GET /api/whoami-v2", whoami),
        ("POST /api/repos/create", create),
        ("POST /api/validate-yaml", validate),
        (f"GET {API}", info),
        (f"GET {API}/revision/(?P<revision>.+)", info),
        (f"GET {API}/tree/(?P<revision>[^/]+)/?(?P<path>.*)", tree),
        (f"POST {API}/paths-info/(?P<revision>.+)", paths_info),
        (f"POST {API}/preupload/(?P<revision>.+)", preupload),
        (f"POST {API}/commit/(?P<revision>.+)", commit),
        (f"POST {API}/branch/(?P<revision>.+)", branch),
        (f"POST /(?P<kind>datasets)/{NAME}.git/info/lfs/objects/batch", batch),
        (f"POST /{NAME}.git/info/lfs/objects/batch", batch),
        ("PUT /lfs/(?P<oid>[0-9a-f]{64})", put),
        (f"(GET|HEAD) /(?P<kind>datasets)/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
        (f"(GET|HEAD) /{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
    )

"""Calls, replies and the table that leads from a path to its endpoint."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote

from .access import HubError, User
from .store import Store


# Most rows that a listing returns at once.
PAGE_SIZE = 100
REPO_ID = r"(?P<repo_id>[^/]+/[^/]+)"
# Matched against the path as sent: the "/" of refs/pr/1 arrives as %2F and must not split the segment.
REVISION = r"(?P<revision>[^/]+)"


@dataclass(frozen=True)
class Call:
    """One request, read to its end; the path is as sent, percent-encoded, and the query decoded."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    user: User | None
    origin: str

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def first(self, key: str, default: str = "") -> str:
        return self.query.get(key, [default])[0]


@dataclass(frozen=True)
class Reply:
    """Status, body and headers of an answer; Content-Length is the body's unless a HEAD or fault says otherwise."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_json(cls, value: Any, status: int = 200, **headers: str) -> "Reply":
        # YAML knows dates and keys that JSON does not.
        body = json.dumps(value, default=str, skipkeys=True).encode()
        return cls(status, body, {"Content-Type": "application/json; charset=utf-8", **headers})

    @classmethod
    def of_error(cls, error: HubError) -> "Reply":
        # A message may quote what the client sent; a header holds one line of ASCII.
        line = " ".join(error.message.split()).encode("ascii", "replace").decode()
        headers = {"X-Error-Message": line, **error.headers}
        if error.code:
            headers["X-Error-Code"] = error.code
        return cls.of_json({"error": error.message}, error.status, **headers)


Endpoint = Callable[..., Reply]
ROUTES: list[tuple[str, re.Pattern[str], Endpoint]] = []


def route(method: str, pattern: str) -> Callable[[Endpoint], Endpoint]:
    """Register an endpoint; named groups of the pattern become its (decoded) keyword arguments."""

    def register(endpoint: Endpoint) -> Endpoint:
        ROUTES.append((method, re.compile(pattern), endpoint))
        return endpoint

    return register


def dispatch(store: Store, call: Call) -> Reply:
    """Answer a call by the first endpoint that matches its method and path."""
    method = "GET" if call.method == "HEAD" else call.method
    for expected, pattern, endpoint in ROUTES:
        match = pattern.fullmatch(call.path)
        if match and method == expected:
            return endpoint(store, call, **{key: unquote(text or "") for key, text in match.groupdict().items()})
    if call.path.startswith("/api/models/") or "/resolve/" in call.path:
        raise HubError(404, "Repository not found", "RepoNotFound")
    raise HubError(404, f"Sorry, we can't find {call.path}")


def paginate(rows: list[Any], call: Call) -> tuple[list[Any], dict[str, str]]:
    """The page that the call's cursor points at, and the Link header to the next one."""
    start = int(call.first("cursor", "0"))
    stop = start + min(int(call.first("limit", str(PAGE_SIZE))), PAGE_SIZE)
    if stop >= len(rows):
        return rows[start:], {}
    kept = [(key, value) for key, values in call.query.items() if key != "cursor" for value in values]
    query = "&".join(f"{key}={quote(value, safe='')}" for key, value in [*kept, ("cursor", str(stop))])
    return rows[start:stop], {"Link": f'<{call.origin}{call.path}?{query}>; rel="next"'}


def ranged(data: bytes, requested: str, headers: Mapping[str, str]) -> Reply:
    """The whole file, or the one range asked for (RFC 9110, section 14)."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", requested)
    if not match or match.group(0) == "bytes=-":
        return Reply(200, data, headers)
    first, last = match.groups()
    start = int(first) if first else max(0, len(data) - int(last))
    stop = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= stop:
        return Reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
    return Reply(206, data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})

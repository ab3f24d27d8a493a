"""What the server does besides what its client asks for: faults, ranges, a log, and nothing of the caller's."""

import http.client
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load

from .faults import Faults, safetensors_file
from .handler import Request
from .plain import ADAPTER, WEIGHTS, get
from .routing import ranged


@pytest.mark.parametrize(
    ("fault", "status", "body", "header"),
    [
        ({"status": 429, "headers": {"Retry-After": "1"}}, 429, None, ("Retry-After", "1")),
        ({"status": 403, "code": "GatedRepo"}, 403, None, ("X-Error-Code", "GatedRepo")),
        ({"body": b"fake"}, 200, b"fake", ("Content-Length", "4")),
        ({"wrong_bytes": 1}, 200, WEIGHTS[:-1] + bytes([255 - WEIGHTS[-1]]), ("Content-Length", str(len(WEIGHTS)))),
        ({"cut": True}, http.client.RemoteDisconnected, None, None),
        ({"cut_after": 5}, http.client.IncompleteRead, WEIGHTS[:5], None),
    ],
)
def test_what_a_fault_does_once(hub, fault, status, body, header):
    hub.seed("acme/adapter", ADAPTER)
    url = f"{hub.url}/acme/adapter/resolve/main/adapter_model.safetensors"
    hub.faults.add("GET /acme/adapter/resolve", **fault)
    if header is None:
        with pytest.raises(status) as raised:
            get(url)
        assert getattr(raised.value, "partial", None) == body
        assert [(request.status, request.sent) for request in hub.requests] == [(200, 5) if body else (0, 0)]
    else:
        found, content, headers = get(url)
        assert found == status and body in (None, content) and headers[header[0]] == header[1]
    assert get(url)[:2] == (200, WEIGHTS)


def test_fault_selection_and_exhaustion():
    faults = Faults()
    twice = faults.add("GET /a", times=2, status=500)
    always = faults.add("/a", times=None, status=404)
    taken = [faults.take("GET", "/a/b") for _ in range(3)]
    assert taken == [twice, twice, always]
    assert faults.take("POST", "/a") is always
    assert faults.take("GET", "/b").status is None
    faults.clear()
    assert faults.take("GET", "/a").status is None
    with pytest.raises(TypeError, match="statsu"):
        faults.add("GET", statsu=500)


def test_delay_and_slow_body(hub):
    hub.seed("acme/adapter", {"file.bin": bytes(1000)})
    url = f"{hub.url}/acme/adapter/resolve/main/file.bin"
    hub.faults.add("resolve", bytes_per_second=2000)
    hub.faults.add("resolve", delay=0.3)
    for least in (0.4, 0.3, 0.0):
        started = time.perf_counter()
        assert get(url)[1] == bytes(1000)
        assert least <= time.perf_counter() - started < least + 2


def test_down_and_up_again(hub):
    hub.seed("acme/adapter", ADAPTER)
    connection = http.client.HTTPConnection(urlsplit(hub.url).netloc)
    connection.request("GET", "/api/models/acme/adapter")
    assert connection.getresponse().read()
    url = hub.url
    with hub.down():
        with pytest.raises(urllib.error.URLError, match="refused"):
            get(f"{url}/api/models")
        with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
            connection.request("GET", "/api/models")
            connection.getresponse()
    assert get(f"{url}/api/models/acme/adapter")[0] == 200
    connection.close()


@given(data=st.binary(max_size=20), first=st.none() | st.integers(0, 25), last=st.none() | st.integers(0, 25))
def test_ranges_follow_rfc_9110(data, first, last):
    text = "-".join("" if bound is None else str(bound) for bound in (first, last))
    positions = range(len(data))
    if first is None and last is None:
        expected = None
    elif first is None:
        expected = bytes(data[i] for i in positions if i >= len(data) - last)
    else:
        expected = bytes(data[i] for i in positions if i >= first and (last is None or i <= last))
    reply = ranged(data, f"bytes={text}", {})
    if expected is None:
        assert (reply.status, reply.body) == (200, data)
    elif expected:
        start, stop = map(int, reply.headers["Content-Range"].removeprefix("bytes ").split("/")[0].split("-"))
        assert (reply.status, reply.body, data[start : stop + 1]) == (206, expected, expected)
    else:
        assert (reply.status, reply.body, reply.headers["Content-Range"]) == (416, b"", f"bytes */{len(data)}")


def test_headers_and_log_of_a_download(hub):
    sha = hub.seed("acme/adapter", ADAPTER)
    path = "/acme/adapter/resolve/main/adapter_model.safetensors"
    status, body, headers = get(hub.url + path, Range="bytes=0-7")
    assert (status, body) == (206, WEIGHTS[:8])
    assert headers["X-Repo-Commit"] == sha
    assert headers["X-Linked-Size"] == str(len(WEIGHTS))
    assert headers["ETag"] == headers["X-Linked-Etag"]
    assert hub.requests == [Request("GET", path, 206, 8, range="bytes=0-7")]
    assert hub.requests[0].repo_id == "acme/adapter"
    assert (hub.downloaded(), hub.downloaded("acme/other")) == (8, 0)
    hub.reset_log()
    assert hub.requests == []


def test_malformed_requests_are_refused_not_fatal(hub):
    request = urllib.request.Request(f"{hub.url}/api/validate-yaml", data=b"not json")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)
    assert get(f"{hub.url}/api/models")[0] == 200
    assert get(f"{hub.url}/nowhere")[0] == 404
    hub.seed("acme/a", {})
    assert get(f"{hub.url}/api/models/acme/a/revision/%E2%82%AC%0A")[2]["X-Error-Message"] == "Invalid rev id: ?"


def test_log_waits_for_requests_under_way(hub):
    hub.faults.add("GET /api/models", delay=0.3)
    connection = http.client.HTTPConnection(urlsplit(hub.url).netloc)
    connection.request("GET", "/api/models")
    time.sleep(0.1)
    assert [request.status for request in hub.requests] == [200]
    connection.close()


def test_safetensors_file_matches_the_library():
    header = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    numpy.testing.assert_array_equal(load(safetensors_file(header, numpy.float32([1, 2]).tobytes()))["w"], [1, 2])


def test_environment_leaves_nothing_of_the_caller(hub, monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN", "https_proxy"):
        monkeypatch.setenv(name, "of the caller")
    environment = hub.environment(tmp_path)
    assert "of the caller" not in environment.values()
    assert environment["HF_ENDPOINT"] == hub.url
    assert hub.environment(tmp_path, "hf_x")["HF_TOKEN"] == "hf_x"

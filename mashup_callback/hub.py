"""The Hub's HTTP within bounds: requests are counted, timed out and retried, and a Hub that is down is left alone."""

import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from .untrusted import quote


logger = logging.getLogger(__name__)

MAX_JSON_BYTES = 100_000_000
RETRY_SECONDS = (0.5, 1.0, 2.0)
RETRY_STATUS = (408, 429, 500, 502, 503, 504)
MAX_WAIT_SECONDS = 60.0
"""What all waiting for retries may add up to; after that, or for a longer `Retry-After`, a failure is final."""

MAX_FAILURES = 8
"""Requests in a row that fail for good before the Hub counts as down."""

GRACE_SECONDS = 20.0
MIN_BYTES_PER_SECOND = 4096
_TIMEOUT = httpx2.Timeout(10.0, connect=5.0)
_SIGN_IN = "sign in with `hf auth login` or set HF_TOKEN"


class HubError(Exception):
    """Why the Hub, or something on it, cannot be used, in one sentence."""


class Hub:
    """
    The connection of one run to the Hub: the user's endpoint, token and HTTP client, with bounds on everything.

    `huggingface_hub` itself waits for as long as a `Retry-After` says and has no timeout on most of its calls, which
    would let a Hub that is down or busy hold up training.

    Attributes:
        requests (`int`): Requests sent, redirects included.
        bytes (`int`): Bytes of replies received.
        seconds (`float`): Time in which at least one request was under way.
    """

    def __init__(self) -> None:
        self.requests, self.bytes, self.seconds = 0, 0, 0.0
        self._lock = threading.RLock()
        self._active, self._began = 0, 0.0
        self._clients: list[httpx2.Client] = []
        self._waited, self._failures = 0.0, 0
        self._down: str | None = None

    def __enter__(self) -> "Hub":
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends downloads that are still under way."""
        self.stop("it is not needed any more")

    @property
    def down(self) -> str | None:
        """Why no request is made any more; None while the Hub answers."""
        return "offline mode (HF_HUB_OFFLINE)" if constants.is_offline_mode() else self._down

    def stop(self, reason: str) -> None:
        """Makes every further request fail at once, and those that are under way soon."""
        self._down = self._down or reason

    def traffic(self) -> dict[str, float]:
        """Returns the requests, bytes and seconds so far, for the report."""
        return {"requests": self.requests, "bytes": self.bytes, "seconds": round(self.seconds, 4)}

    def get_json(self, path: str, *, method: str = "GET", **request: Any) -> tuple[Any, str | None]:
        """
        Returns what an endpoint of the Hub's interface replies, and the address of the next page if there is one.

        Args:
            path (`str`):
                Path below the endpoint, or a whole address.
            method (`str`, *optional*, defaults to `"GET"`):
                HTTP method.
            request (*optional*):
                `params`, `data` or `headers`, as for `httpx`.

        Raises:
            HubError: If the Hub cannot be reached or does not reply with JSON.
            HfHubHTTPError: If the Hub refuses.
        """
        data, headers = self._request(method, path, MAX_JSON_BYTES, **request)
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise HubError(f"the Hub's reply is no JSON: {quote(data[:80])}") from error
        return value, _next_page(headers)

    def get_range(self, path: str, start: int, stop: int) -> tuple[bytes, int]:
        """
        Returns a part of a file, and the size of the whole file as the server states it.

        Args:
            path (`str`):
                Path of the file below the endpoint.
            start (`int`):
                Position of the first byte.
            stop (`int`):
                Position after the last byte. What a server sends beyond it is not read.

        Raises:
            HubError: If the Hub cannot be reached or does not say how large the file is.
            HfHubHTTPError: If the Hub refuses.
        """
        # Identity: the size of a compressed reply says nothing about the file.
        wanted = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        data, headers = self._request("GET", path, stop - start, headers=wanted, truncate=True)
        size = headers.get("Content-Range", "").rpartition("/")[2] or headers.get("Content-Length", "")
        if not size.isascii() or not size.isdigit() or (start and "Content-Range" not in headers):
            raise HubError(f"the server does not say how large the file is (Content-Range {quote(size)!r})")
        return data, int(size)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Context in which requests of `huggingface_hub` are counted and bounded, in this and every other thread."""
        with self._lock:
            self._active += 1
            if self._active == 1:
                self._began = time.monotonic()
            self._attach(get_session())
        try:
            yield
        finally:
            with self._lock:
                self._active -= 1
                if self._active == 0:
                    self.seconds += time.monotonic() - self._began
                    self._detach()

    def _attach(self, client: httpx2.Client) -> None:
        if self._on_request not in client.event_hooks["request"]:
            client.event_hooks["request"].append(self._on_request)
            client.event_hooks["response"].append(self._on_response)
            self._clients.append(client)

    def _detach(self) -> None:
        for client in self._clients:
            client.event_hooks["request"].remove(self._on_request)
            client.event_hooks["response"].remove(self._on_response)
        self._clients.clear()

    def _on_request(self, request: httpx2.Request) -> None:
        self._check()
        with self._lock:
            self.requests += 1

    def _on_response(self, response: httpx2.Response) -> None:
        response.stream = _Paced(response.stream, self)
        if response.status_code in RETRY_STATUS:
            self._wait_allowed(_retry_after(response))

    def _check(self) -> None:
        if self.down:
            raise HubError(f"the Hub is not asked: {self.down}")

    def _request(self, method: str, path: str, limit: int, **request: Any) -> tuple[bytes, Mapping[str, str]]:
        for delay in (*RETRY_SECONDS, None):
            self._check()
            try:
                reply = self._send(method, path, limit, **request)
            except HfHubHTTPError as error:
                if error.response.status_code not in RETRY_STATUS:
                    self._failures = 0
                    raise
                self._give_up_unless(delay, error)
                delay = max(delay, _retry_after(error.response))
            except httpx2.TransportError as error:
                self._give_up_unless(delay, error)
            else:
                self._failures = 0
                return reply
            logger.info("The Hub did not answer %s %s; again in %.1f s.", method, path, delay)
            time.sleep(delay)
        raise AssertionError("the last attempt returns or raises")

    def _send(
        self, method: str, path: str, limit: int, *, headers: Mapping[str, str] | None = None, **options: Any
    ) -> tuple[bytes, Mapping[str, str]]:
        truncate = options.pop("truncate", False)
        url = path if path.startswith("http") else constants.ENDPOINT + path
        sent = {**build_hf_headers(), **(headers or {})}
        with (
            self.at_work(),
            get_session().stream(method, url, headers=sent, timeout=_TIMEOUT, **options) as response,
        ):
            if response.status_code >= 400:
                response.read()
                hf_raise_for_status(response)
            data = bytearray()
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > limit:
                    break
        if len(data) > limit and not truncate:
            raise HubError(f"the Hub's reply is larger than {limit:,} bytes")
        return bytes(data[:limit]), response.headers

    def _give_up_unless(self, delay: float | None, error: httpx2.TransportError | HfHubHTTPError) -> None:
        """Raises unless another attempt makes sense, and notices when the Hub is down."""
        unreachable = isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
        if delay is not None and delay < RETRY_SECONDS[1 if unreachable else -1] * 2 and not (
            unreachable and delay > RETRY_SECONDS[0]
        ):
            with self._lock:
                self._waited += delay
                if self._waited <= MAX_WAIT_SECONDS:
                    return
        with self._lock:
            self._failures += 1
            if unreachable or self._failures >= MAX_FAILURES:
                self.stop(f"it is down ({describe(error)})")
        raise error

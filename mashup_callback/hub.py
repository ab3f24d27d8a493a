"""The Hub's HTTP within bounds: requests are counted, timed out and retried, and a Hub that is down is left alone."""

import itertools
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from .errors import HubError
from .formats.files import quote
from .hub_errors import RETRY_STATUS, describe, is_transient, retry_after


logger = logging.getLogger(__name__)

MAX_JSON_BYTES = 100_000_000
RETRY_SECONDS = (0.5, 1.0, 2.0)
# What waiting for retries may add up to; after that, or for a longer `Retry-After`, a failure is final.
MAX_WAIT_SECONDS = 60.0
# Requests in a row that fail for good before the Hub counts as down.
MAX_FAILURES = 8
# A reply may take this long at any rate, and after that must not be slower.
GRACE_SECONDS = 20.0
MIN_BYTES_PER_SECOND = 32_768
_TIMEOUT = httpx2.Timeout(10.0, connect=5.0)
_UNREACHABLE = (httpx2.ConnectError, httpx2.TimeoutException)


class Hub:
    """
    The connection of one run to the Hub: the user's endpoint, token and HTTP client, with bounds on everything.

    `huggingface_hub` itself waits for as long as a `Retry-After` says and has no timeout on most of its calls, which
    would let a Hub that is down or busy hold up training.

    Args:
        asks (`bool`, *optional*, defaults to `True`):
            Whether this process may look things up. In a distributed run one process of each machine does, and the
            others, called after it, take what it has recorded and downloaded.

    Attributes:
        requests (`int`): Requests sent, redirects included.
        bytes (`int`): Bytes of replies received.
        seconds (`float`): Time in which at least one request was under way.
    """

    def __init__(self, asks: bool = True) -> None:
        self.asks = asks
        self.requests, self.bytes, self.seconds = 0, 0, 0.0
        self._lock = threading.RLock()
        self._active, self._began = 0, 0.0
        self._clients: list[httpx2.Client] = []
        self._of_thread = threading.local()
        self._waited, self._waiting_until = 0.0, 0.0
        self._failures = 0
        self._down: str | None = None

    @property
    def down(self) -> str | None:
        """Why no request is made (any more); None while the Hub answers."""
        if not self.asks:
            return "another process of this machine does that"
        return "offline mode (HF_HUB_OFFLINE)" if constants.is_offline_mode() else self._down

    def stop(self, reason: str) -> None:
        """Makes every further request fail at once, and those that are under way soon."""
        self._down = self._down or reason

    def traffic(self) -> dict[str, float]:
        """Returns the requests, bytes and seconds so far, for the report."""
        return {"requests": self.requests, "bytes": self.bytes, "seconds": round(self.seconds, 4)}

    def get_json(self, path: str, *, method: str = "GET", **request: Any) -> tuple[Any, str | None]:
        """
        Returns what an endpoint of the Hub's interface replies, and the path of the next page if there is one.

        Args:
            path (`str`):
                Path below the endpoint.
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
            raise HubError(f"the Hub's reply is not JSON: {quote(data[:80])}") from error
        following = httpx2.Response(200, headers={"Link": headers.get("Link", "")}).links.get("next", {}).get("url")
        # Only the path counts, so that neither a mirror nor a hostile reply leads to another host with the token.
        return value, httpx2.URL(following).raw_path.decode() if following else None

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
        data, headers = self._request("GET", path, stop - start, headers=wanted)
        # A server may ignore the range and send the whole file.
        size = headers.get("Content-Range", "").rpartition("/")[2] or headers.get("Content-Length", str(len(data)))
        if not size.isascii() or not size.isdigit() or len(size) > 18 or (start and "Content-Range" not in headers):
            raise HubError(f"the server does not say how large the file is, but {quote(size)!r}")
        return data[: stop - start], int(size)

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
        # huggingface_hub would wait as long as it is told to.
        wait = retry_after(response) if response.status_code in RETRY_STATUS else 0.0
        if wait and not self._may_wait(wait):
            self.stop(f"it asks to wait {wait:.0f} s")
            self._check()

    @property
    def bytes_of_thread(self) -> int:
        """Bytes of replies that the calling thread received."""
        return getattr(self._of_thread, "bytes", 0)

    def received(self, count: int) -> None:
        """Counts bytes of a reply, and ends the reply if the Hub is not needed any more."""
        self._check()
        self._of_thread.bytes = self.bytes_of_thread + count
        with self._lock:
            self.bytes += count

    def _check(self) -> None:
        if self.down:
            raise HubError(f"the Hub is not asked: {self.down}")

    def _request(self, method: str, path: str, limit: int, **request: Any) -> tuple[bytes, httpx2.Headers]:
        for attempt in itertools.count():
            self._check()
            try:
                reply = self._send(method, path, limit, **request)
            except (HfHubHTTPError, httpx2.TransportError) as error:
                delay = self._delay(error, attempt)
                if delay is None:
                    self._count_failure(error)
                    raise
                logger.info("%s %s failed (%s); again in %.1f s.", method, path, quote(error), delay)
                time.sleep(delay)
            else:
                self._failures = 0
                return reply
        raise AssertionError("unreachable: every attempt returns, raises or is followed by another")

    def _send(
        self, method: str, path: str, limit: int, *, headers: Mapping[str, str] | None = None, **request: Any
    ) -> tuple[bytes, httpx2.Headers]:
        request |= {"headers": {**build_hf_headers(), **(headers or {})}, "timeout": _TIMEOUT}
        request["follow_redirects"] = True
        data = bytearray()
        with self.at_work(), get_session().stream(method, constants.ENDPOINT + path, **request) as response:
            if response.status_code >= 400:
                response.read()
                hf_raise_for_status(response)
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > limit:
                    break
        return bytes(data), response.headers

    def _delay(self, error: HfHubHTTPError | httpx2.TransportError, attempt: int) -> float | None:
        """Returns how long to wait for another attempt, None if there should be none."""
        attempts = 1 if isinstance(error, _UNREACHABLE) else len(RETRY_SECONDS)
        if not is_transient(error) or attempt >= attempts:
            return None
        wait = retry_after(error.response) if isinstance(error, HfHubHTTPError) else 0.0
        if not wait and not self._may_wait(RETRY_SECONDS[attempt]):
            return None
        return max(wait, RETRY_SECONDS[attempt])

    def _may_wait(self, seconds: float) -> bool:
        """Takes a time from what may be waited in all; threads that wait at the same time share it."""
        now = time.monotonic()
        with self._lock:
            until = max(self._waiting_until, now + seconds)
            waited = self._waited + until - max(self._waiting_until, now)
            if waited > MAX_WAIT_SECONDS:
                return False
            self._waited, self._waiting_until = waited, until
        return True

    def _count_failure(self, error: HfHubHTTPError | httpx2.TransportError) -> None:
        with self._lock:
            self._failures = self._failures + 1 if is_transient(error) else 0
            if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout) or self._failures >= MAX_FAILURES:
                self.stop(f"it is down ({describe(error)})")
                logger.warning("The Hub %s is not asked any more: %s.", constants.ENDPOINT, self.down)


class _Paced(httpx2.SyncByteStream):
    """A reply's body that is counted, and ended when it only trickles in: no timeout of the client notices that."""

    def __init__(self, stream: httpx2.SyncByteStream, hub: Hub) -> None:
        self._stream, self._hub = stream, hub

    def __iter__(self) -> Iterator[bytes]:
        started, received = time.monotonic(), 0
        for chunk in self._stream:
            received += len(chunk)
            self._hub.received(len(chunk))
            seconds = time.monotonic() - started
            if seconds > GRACE_SECONDS and received < MIN_BYTES_PER_SECOND * seconds:
                raise HubError(f"the reply is too slow: {received} bytes in {seconds:.0f} s")
            yield chunk

    def close(self) -> None:
        self._stream.close()


def as_list(value: Any) -> list[Any]:
    """Returns a reply's list, or an empty one in the place of anything else."""
    return value if isinstance(value, list) else []

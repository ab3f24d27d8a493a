"""The connection to the Hub: calls of huggingface_hub that end within a deadline, and what their failures mean."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, parse_ratelimit_headers

from ..errors import HubError
from ..formats import quote


logger = logging.getLogger(__name__)

# The base of all errors of the HTTP client that huggingface_hub uses.
HTTP_ERROR = HfHubHTTPError.__bases__[0]
# What can go wrong with one repository or file, and must not stop the others.
RECOVERABLE = (HubError, HTTP_ERROR, OSError, ValueError)
RETRY_STATUS = (408, 429, 500, 502, 503, 504)
RETRY_SECONDS = (0.5, 1.0, 2.0)
# What waiting for retries may add up to over all threads; after that a failure is final.
MAX_WAIT_SECONDS = 120.0
# Calls in a row that fail for good before the Hub counts as down.
MAX_FAILURES = 8
# A call may take this long, and a download as much longer as this speed allows.
DEADLINE_SECONDS = 20.0
MIN_BYTES_PER_SECOND = 32_768
TIMEOUT_SECONDS = 10.0
_SIGN_IN = "sign in with `hf auth login` or set HF_TOKEN"

Result = TypeVar("Result")


class Hub:
    """
    The calls of one run to the Hub: each ends within a deadline, is retried, and is not made once the Hub is down.

    `huggingface_hub` itself has no timeout on some calls and waits for as long as a `Retry-After` says, which would
    let a Hub that is down or busy hold up training.
    """

    def __init__(self, asks: bool = True) -> None:
        # In a distributed run one process of each machine asks; the others, called after it, take what it downloaded.
        self.asks = asks
        # Calls made, retries included; bytes of files received; time in which at least one call was under way.
        self.requests, self.bytes, self.seconds = 0, 0, 0.0
        self._lock = threading.RLock()
        self._running, self._began = 0, 0.0
        self._waited, self._failures = 0.0, 0
        self._stopped: Future[str] = Future()

    @property
    def down(self) -> str | None:
        """Why no call is made (any more); None while the Hub answers."""
        if not self.asks:
            return "another process of this machine does that"
        if constants.is_offline_mode():
            return "offline mode (HF_HUB_OFFLINE)"
        return self._stopped.result() if self._stopped.done() else None

    def stop(self, reason: str) -> None:
        """Ends the calls that are under way, and makes every further one fail at once."""
        with self._lock:
            if not self._stopped.done():
                self._stopped.set_result(reason)

    def traffic(self) -> dict[str, float]:
        """Returns what a report says of the calls so far."""
        return {"requests": self.requests, "bytes": self.bytes, "seconds": round(self.seconds, 4)}

    def received(self, count: int) -> None:
        """Counts bytes of a file."""
        with self._lock:
            self.bytes += count

    def call(self, function: Callable[..., Result], *args: Any, size: int = 0, **kwargs: Any) -> Result:
        """Calls a function of huggingface_hub that receives about `size` bytes; raises one of `RECOVERABLE`."""
        seconds = DEADLINE_SECONDS + max(0, size) / MIN_BYTES_PER_SECOND
        attempt = 0
        while True:
            try:
                result = self._in_time(partial(function, *args, **kwargs), seconds)
                self._failures = 0
                return result
            except (HTTP_ERROR, TimeoutError) as error:
                delay = self._delay(error, attempt)
                if delay is None:
                    self._count_failure(error)
                    self._require_up()
                    raise
                logger.info("A call to the Hub failed (%s); again in %.1f s.", quote(error), delay)
                wait([self._stopped], timeout=delay)
                attempt += 1

    def read(self, url: str, start: int, stop: int) -> tuple[bytes, int]:
        """Returns a part of a file, and the size of the whole file as the server states it."""
        data, size = self.call(_read_range, url, start, stop)
        self.received(len(data))
        return data, size

    def _require_up(self) -> None:
        if self.down:
            raise HubError(f"the Hub is not asked: {self.down}")

    def _in_time(self, function: Callable[[], Result], seconds: float) -> Result:
        self._require_up()
        future: Future[Result] = Future()
        ends: tuple[Future[Any], ...] = (future, self._stopped)
        # A daemon, so that a call without end does not keep the interpreter from ending.
        thread = threading.Thread(target=_run, args=(function, future), daemon=True, name="mashup-hub-call")
        with self._counted():
            thread.start()
            wait(ends, timeout=seconds, return_when=FIRST_COMPLETED)
        if not future.done():
            self._require_up()
            raise TimeoutError(f"the Hub is too slow: the reply was not complete in {seconds:g} s")
        return future.result()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self.requests += 1
            self._running += 1
            if self._running == 1:
                self._began = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                if self._running == 0:
                    self.seconds += time.monotonic() - self._began

    def _delay(self, error: Exception, attempt: int) -> float | None:
        """Returns how long to wait for another attempt, None if there should be none."""
        if isinstance(error, TimeoutError) or not is_transient(error):
            return None
        unreachable = _cannot_connect(error) or "Timeout" in type(error).__name__
        if attempt >= (1 if unreachable else len(RETRY_SECONDS)):
            return None
        asked = retry_after(error.response) if isinstance(error, HfHubHTTPError) else 0.0
        delay = max(asked, RETRY_SECONDS[attempt])
        with self._lock:
            if self._waited + delay <= MAX_WAIT_SECONDS:
                self._waited += delay
                return delay
        if asked:
            self.stop(f"it asks to wait {asked:.0f} s")
        return None

    def _count_failure(self, error: Exception) -> None:
        with self._lock:
            self._failures = self._failures + 1 if is_transient(error) else 0
            if (_cannot_connect(error) or self._failures >= MAX_FAILURES) and not self.down:
                self.stop(f"it is down ({describe(error)})")
                logger.warning("The Hub %s is not asked any more: %s.", constants.ENDPOINT, self.down)


def _run(function: Callable[[], Result], future: "Future[Result]") -> None:
    try:
        future.set_result(function())
    except LocalEntryNotFoundError as error:
        # What hf_hub_download makes of a failed request.
        future.set_exception(error.__cause__ or error)
    except (HTTP_ERROR, HubError, OSError) as error:
        future.set_exception(error)
    except Exception as error:
        # huggingface_hub takes replies as they come: whatever is wrong with one can be any error.
        future.set_exception(HubError(f"the Hub's reply is not JSON of the expected form: {quote(repr(error))}"))


def _read_range(url: str, start: int, stop: int) -> tuple[bytes, int]:
    # Identity: the size of a compressed reply says nothing about the file.
    headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    data = bytearray()
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_SECONDS) as response:
        if response.status_code >= 400:
            response.read()
        hf_raise_for_status(response)
        for chunk in response.iter_bytes():
            data += chunk
            # A server may ignore the range and send the whole file.
            if len(data) > stop - start:
                break
    ranged = response.headers.get("Content-Range")
    size = ranged.rpartition("/")[2] if ranged else response.headers.get("Content-Length", str(len(data)))
    if not size.isascii() or not size.isdigit() or len(size) > 18 or (start and not ranged):
        raise HubError(f"the server does not say how large the file is, but {quote(size)!r}")
    return bytes(data[: stop - start]), int(size)


def describe(error: Exception, repo_id: str | None = None) -> str:
    """Returns what a failure on the Hub means for the user, and what to do about it, in one sentence."""
    if isinstance(error, GatedRepoError):
        return f"it is gated: ask for access at {constants.ENDPOINT}/{repo_id}, then {_SIGN_IN}"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no {repo_id} on the Hub, or it is private: check the name, or {_SIGN_IN}"
    if isinstance(error, RevisionNotFoundError):
        return "the Hub has no such revision of it"
    if isinstance(error, EntryNotFoundError):
        return "the Hub has no such file"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        advice = f": the token may be wrong, {_SIGN_IN}" if status in (401, 403) else ""
        return f"the Hub replied with HTTP status {status}{advice}"
    if isinstance(error, HTTP_ERROR):
        return f"the connection to the Hub failed: {type(error).__name__} {quote(error)}".rstrip()
    return quote(error, 300) or type(error).__name__


def is_transient(error: Exception) -> bool:
    """Whether another attempt may succeed."""
    return not isinstance(error, HfHubHTTPError) or error.response.status_code in RETRY_STATUS


def retry_after(response: Any) -> float:
    """Returns how many seconds a reply asks to wait, 0 if it does not say."""
    text = response.headers.get("Retry-After", "").strip()
    limits = parse_ratelimit_headers(response.headers) if response.status_code == 429 else None
    if limits is not None and limits.remaining == 0:
        return float(limits.reset_in_seconds)
    return float(text) if text.isascii() and text.isdigit() else 0.0


def _cannot_connect(error: Exception) -> bool:
    # By name, since huggingface_hub does not export its client's error classes.
    return isinstance(error, HTTP_ERROR) and type(error).__name__ in ("ConnectError", "ConnectTimeout")

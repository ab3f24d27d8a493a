"""What goes wrong on the Hub: which failures are worth another attempt, and what to tell the user."""

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers

from .errors import HubError
from .formats.files import quote


RETRY_STATUS = (408, 429, 500, 502, 503, 504)
_SIGN_IN = "sign in with `hf auth login` or set HF_TOKEN"


# What can go wrong with one repository or file, and must not stop the others.
TROUBLE = (HubError, httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError)


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
    if isinstance(error, httpx2.HTTPError):
        return f"the connection to the Hub failed: {type(error).__name__} {quote(error)}".rstrip()
    return quote(error, 300) or type(error).__name__


def is_transient(error: HfHubHTTPError | httpx2.TransportError) -> bool:
    """Whether another attempt may succeed."""
    return not isinstance(error, HfHubHTTPError) or error.response.status_code in RETRY_STATUS


def retry_after(response: httpx2.Response) -> float:
    """Returns how many seconds a reply asks to wait, 0 if it does not say."""
    text = response.headers.get("Retry-After", "").strip()
    limits = parse_ratelimit_headers(response.headers) if response.status_code == 429 else None
    if limits is not None and limits.remaining == 0:
        return float(limits.reset_in_seconds)
    return float(text) if text.isascii() and text.isdigit() else 0.0

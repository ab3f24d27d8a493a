"""Who a token belongs to, what it may do, and how the Hub refuses."""

from collections.abc import Mapping
from dataclasses import dataclass


class HubError(Exception):
    """A refusal that becomes an HTTP reply; the client picks the exception's class by `X-Error-Code`."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, dict(headers or {})


@dataclass(frozen=True)
class User:
    """Owner of a token: a login name, also a namespace, and further namespaces that it reads and writes."""

    name: str
    organizations: tuple[str, ...] = ()

    def belongs_to(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.organizations


def require_token(user: User | None) -> User:
    """The user, if signed in; raises a 401 otherwise."""
    if user is None:
        raise HubError(401, "Invalid username or password.")
    return user


def require_write(user: User | None, namespace: str) -> User:
    """The user, if allowed to write to the namespace; raises a 401 without a token, a 403 without the right."""
    user = require_token(user)
    if not user.belongs_to(namespace):
        raise HubError(403, f"You don't have the rights to write under the namespace {namespace}")
    return user

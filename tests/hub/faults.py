"""Ways for the loopback Hub to go wrong on purpose, and files that are wrong in themselves."""

import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


BROKEN_CARD = b"---\nbase_model: [unclosed\nlicense: : mit\n---\n# A model card whose metadata is not YAML\n"


@dataclass(frozen=True)
class Fault:
    """What goes wrong with the requests that match; everything left at its default goes right.

    Args:
        match (`str`): Regular expression searched in `"METHOD /path?query"`, path as sent (percent-encoded).
        times (`int`, *optional*, defaults to 1): Requests to spoil before the fault is used up; `None` for all.
        status (`int`, *optional*): Reply with this status in place of the real answer.
        code (`str`, *optional*): `X-Error-Code` of that reply, such as `"GatedRepo"` or `"EntryNotFound"`.
        message (`str`, defaults to `"injected fault"`): `X-Error-Message` of that reply.
        headers (`Mapping[str, str]`): Headers added to the reply, such as `{"Retry-After": "1"}`.
        body (`bytes`, *optional*): Body in place of the real one, under the real headers but its own length.
        wrong_bytes (`int`, defaults to 0): Invert this many bytes at the end of the body; its size stays.
        cut (`bool`, defaults to `False`): Close the connection before any reply. The request has no effect.
        cut_after (`int`, *optional*): Close the connection after this many bytes of the body.
        delay (`float`, defaults to 0.0): Seconds to wait before the reply.
        bytes_per_second (`float`, *optional*): Rate at which the body trickles.
    """

    match: str
    times: int | None = 1
    status: int | None = None
    code: str | None = None
    message: str = "injected fault"
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    wrong_bytes: int = 0
    cut: bool = False
    cut_after: int | None = None
    delay: float = 0.0
    bytes_per_second: float | None = None

    def spoil(self, body: bytes) -> bytes:
        """The body as this fault delivers it."""
        body = body if self.body is None else self.body
        keep = max(0, len(body) - self.wrong_bytes)
        return body[:keep] + bytes(byte ^ 0xFF for byte in body[keep:])


NO_FAULT = Fault(match="")


class Faults:
    """The faults in force, safe to change while requests run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._armed: list[tuple[Fault, int | None]] = []

    def add(self, match: str, **effects: Any) -> Fault:
        """Arm a fault, whose effects are the other fields of [`Fault`]; earlier ones take precedence."""
        re.compile(match)
        fault = Fault(match, **effects)
        with self._lock:
            self._armed.append((fault, fault.times))
        return fault

    def clear(self) -> None:
        """Disarm every fault."""
        with self._lock:
            self._armed.clear()

    def take(self, method: str, target: str) -> Fault:
        """The first armed fault that matches a request, counted as used; `NO_FAULT` where none does."""
        with self._lock:
            for position, (fault, left) in enumerate(self._armed):
                if re.search(fault.match, f"{method} {target}"):
                    self._use(position, fault, left)
                    return fault
        return NO_FAULT

    def _use(self, position: int, fault: Fault, left: int | None) -> None:
        if left == 1:
            del self._armed[position]
        elif left is not None:
            self._armed[position] = (fault, left - 1)


def safetensors_file(header: Any, data: bytes = b"", declared_size: int | None = None) -> bytes:
    """A file in the safetensors layout that claims whatever its header (JSON, or bytes as they are) and size say."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if declared_size is None else declared_size
    return size.to_bytes(8, "little") + text + data

"""This process's memory while something runs."""

import threading

import psutil


class Peak:
    """Samples this process's memory in a thread: the most bytes, those of mapped files apart."""

    def __enter__(self) -> "Peak":
        self.done, self.first = threading.Event(), resident()
        self.most = dict(self.first)
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.done.wait(0.001):
            self.most = {name: max(value, self.most[name]) for name, value in resident().items()}

    def added(self, kind: str) -> int:
        """The most bytes above those at the beginning."""
        return self.most[kind] - self.first[kind]


def resident() -> dict[str, int]:
    """Bytes of this process that are in memory: all, its own, and those of mapped files."""
    found = psutil.Process().memory_info()
    return {"all": found.rss, "own": found.rss - found.shared, "mapped": found.shared}

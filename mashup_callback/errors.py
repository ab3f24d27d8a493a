"""Every exception class of the package."""


class UsageError(ValueError):
    """A user's own mistake, found after construction; it is raised whatever `on_error` says."""


class AdapterError(ValueError):
    """The reason why an adapter cannot be used: what was found and what was expected, in one sentence."""


class CheckpointError(AdapterError):
    """The reason why a full checkpoint cannot be used."""


class HubError(Exception):
    """Why the Hub, or something on it, cannot be used, in one sentence."""


class OutOfStepError(Exception):
    """A process failed inside a forward pass that the others cannot finish without it: the run has to end."""


class NoCandidateError(RuntimeError):
    """Nothing was found to start from, or nothing of it is usable."""


class BypassedError(Exception):
    """Layers are computed without their forward, so that hooks on them change nothing: `layers` are their names."""

    def __init__(self, message: str, layers: frozenset[str] = frozenset()) -> None:
        super().__init__(message)
        self.layers = layers


def why(error: Exception) -> str:
    """Returns an error's message, with the name of its class where that is not one of the package."""
    own = type(error).__module__.partition(".")[0] == __name__.partition(".")[0]
    return str(error) if own else f"{type(error).__name__}: {error}"

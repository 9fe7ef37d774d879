"""What can go wrong, by who has to act. Each error carries one line for a person to read; nothing is hidden in the type."""


class TokaError(Exception):
    """Base of every error that toka raises on purpose."""


class RequestError(TokaError):
    """One request is wrong (HTTP 4xx); only it dies.

    param: the request field at fault, or None. status: the HTTP status. code: a short machine-readable word.
    """

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code


class CapacityError(TokaError):
    """The server is full or draining (HTTP 429 or 503); the client may retry after retry_after_s seconds."""

    def __init__(self, message: str, *, status: int = 429, retry_after_s: int = 1):
        super().__init__(message)
        self.message, self.status, self.retry_after_s = message, status, retry_after_s


class ConfigError(TokaError):
    """The server cannot start so: a flag, file or checkpoint is wrong. Printed as one line; exit status 2."""


class EngineDeadError(TokaError):
    """The engine process is gone: every request in it has ended (HTTP 503)."""


class InvariantError(TokaError):
    """A law of the engine was broken (a block freed twice, a row reused in flight): a bug in toka."""

"""The socket that the server listens on, how many connections it may have, and the certificate it shows."""

from __future__ import annotations

import resource
import socket
import ssl

from toka.config import Config
from toka.errors import ConfigError

_BACKLOG = 2048
_MAX_OPEN_FILES = 65536
_KEEP_ALIVE_IDLE_S = 60  # after which the kernel asks whether a silent client is still there


def listen(config: Config) -> socket.socket:
    """A listening socket at the configured host and port. ConfigError if it cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _end_dead_connections(listener, config.slow_reader_timeout_s)
    try:
        listener.bind((config.host, config.port))
        listener.listen(_BACKLOG)  # at once, for until then a second server could bind the same port
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {config.host}:{config.port}: {error.strerror or error}") from error
    return listener


def _end_dead_connections(listener: socket.socket, patience_s: float) -> None:
    """Have the kernel end connections whose other end reads nothing of what waits for it, or is gone without a word.

    Accepted sockets inherit these options. To the server both are then like a client that hung up.
    """
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):  # Linux
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEP_ALIVE_IDLE_S)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(int(1000 * patience_s), 1))


def allow_many_connections() -> None:
    """Raise this process's limit of open files, of which every connection is one, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def check_certificate(config: Config) -> None:
    """ConfigError unless the certificate and its key, if configured, can be used together."""
    if config.tls_cert is None or config.tls_key is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.tls_cert, config.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"tls_cert={config.tls_cert} tls_key={config.tls_key}: cannot be used: {error}") from None

"""`serve`: from a configuration to a process that answers until it is told to stop.

HTTP is up at once: while the engine warms up, /health and /ready say 503 and requests are refused with Retry-After. The first
SIGTERM or SIGINT drains: new requests get 503, running ones may end within drain_timeout_s. The second stops at once. If the
engine dies, what is open ends with an error, /health says 503, and the process exits with a status other than 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator

import uvicorn
import uvloop

from toka.config import Config, hub_offline
from toka.errors import CapacityError, ConfigError
from toka.log import set_up_logging
from toka.messages import EngineStats
from toka.metrics import kv_cache_usage
from toka.model_source import locate, read_hf_config
from toka.server.app import create_app
from toka.server.engine_client import RETRY_AFTER_S, EngineClient
from toka.server.engine_process import EngineProcess
from toka.server.serving import Serving
from toka.text.tokenizer import Tokenizer

logger = logging.getLogger("toka.server")

_REPLIES_LEAVE_S = 2.0  # for replies and error chunks on their way when the server stops
_ENGINE_LEAVES_S = 5.0  # for the engine to exit when asked
_LINGER_AFTER_DEATH_S = 1.0  # in which /health tells why, before the process exits
_KEEP_ALIVE_S = 75
_BACKLOG = 2048


def serve(config: Config, process: EngineProcess) -> int:
    """Serve until told to stop; returns the process's exit status.

    process: of this configuration, which is checked; it is ended here. Raises ConfigError if the port is taken, or the model, its
    tokenizer or its engine cannot be had as configured.
    """
    set_up_logging(config.log_level, config.uvicorn_log_level)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(_private_dir())
        stack.callback(process.stop, 0)
        listener = stack.enter_context(_listen(config))
        address_in, address_out = f"ipc://{directory}/in", f"ipc://{directory}/out"
        source = locate(config.model, config.tokenizer, config.cache_path(), offline=hub_offline())
        process.begin(source, address_in, address_out, directory)
        tokenizer = Tokenizer.load(source.tokenizer_path, read_hf_config(source)["eos_token_id"])
        model_id = config.served_model_name or source.name
        server = _ServerRun(config, model_id, tokenizer, process, address_in, address_out)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(server.run(listener))


@contextlib.contextmanager
def _private_dir() -> Iterator[str]:
    directory = tempfile.mkdtemp(prefix="toka-")  # mode 700: nobody else can speak to the engine
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _listen(config: Config) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        listener.listen(_BACKLOG)  # at once, for until then a second server could bind the same port
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {config.host}:{config.port}: {error.strerror or error}") from error
    return listener


class _HttpServer(uvicorn.Server):
    """uvicorn without its own signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _ServerRun:
    """One life of the server, from the first connection to the exit status."""

    def __init__(
        self,
        config: Config,
        model_id: str,
        tokenizer: Tokenizer,
        process: EngineProcess,
        address_in: str,
        address_out: str,
    ):
        self._config = config
        self._process = process
        self._engine = EngineClient(address_in, address_out)
        self._serving = Serving(config, model_id, tokenizer, self._engine)
        self._engine_status = 0
        self._stop_asked = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._stop_signal = 0

    async def run(self, listener: socket.socket) -> int:
        self._engine.start()
        self._watch_engine()
        self._handle_signals()
        http = _HttpServer(
            uvicorn.Config(
                create_app(self._serving),
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=self._config.uvicorn_log_level in ("info", "debug", "trace"),
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(_REPLIES_LEAVE_S),
            )
        )
        background = [
            asyncio.create_task(http.serve(sockets=[listener])),
            asyncio.create_task(self._announce_ready(listener)),
            asyncio.create_task(self._report_stats()),
        ]
        try:
            await _first_of(self._stop_asked.wait(), self._engine.gone.wait(), asyncio.wait({background[0]}))
            if not self._engine.gone.is_set():
                await self._drain()
            return await self._shut_down(http, background[0])
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            await self._serving.grammars.close()
            await self._engine.close()

    def _watch_engine(self) -> None:
        loop = asyncio.get_running_loop()

        def gone(status: int) -> None:
            self._engine_status = status
            self._engine.died(f"The engine process has ended (status {status}).")

        def on_exit(status: int) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: we have left before it
                loop.call_soon_threadsafe(gone, status)

        self._process.watch(on_exit)

    def _handle_signals(self) -> None:
        def on_signal(number: int) -> None:
            (self._stop_now if self._stop_asked.is_set() else self._stop_asked).set()
            self._stop_signal = number

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, on_signal, number)

    async def _drain(self) -> None:
        self._serving.draining = True
        if self._engine.num_open:
            logger.info(
                "Stopping: %d requests may end within %g s; a second signal stops at once.",
                self._engine.num_open,
                self._config.drain_timeout_s,
            )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.drain_timeout_s):
                await _first_of(self._engine.wait_idle(), self._stop_now.wait(), self._engine.gone.wait())

    async def _shut_down(self, http: uvicorn.Server, http_task: asyncio.Task[None]) -> int:
        died, fatal = self._engine.gone.is_set(), self._engine.fatal
        if died and not (fatal and fatal.config_error):
            logger.error("%s", self._engine.dead)
        if died and self._engine.ready is not None:
            await asyncio.sleep(_LINGER_AFTER_DEATH_S)
        shutting_down = CapacityError("The server is shutting down.", status=503, retry_after_s=RETRY_AFTER_S)
        self._engine.fail_all(shutting_down)
        self._engine.shutdown()
        http.should_exit = True
        http.force_exit = self._stop_now.is_set()
        await http_task
        hears_us = fatal is not None or self._engine.ready is not None  # in its warmup it does not
        patience_s = _ENGINE_LEAVES_S if hears_us and not self._stop_now.is_set() else 0.0
        await asyncio.to_thread(self._process.stop, patience_s)
        if fatal and fatal.config_error:
            raise ConfigError(fatal.message)
        if died:
            return self._engine_status if self._engine_status > 0 else 1
        return 128 + self._stop_signal if self._stop_now.is_set() else 0

    async def _announce_ready(self, listener: socket.socket) -> None:
        await self._engine.became_ready.wait()
        host, port = listener.getsockname()[:2]
        where = f"[{host}]" if ":" in host else host
        names = " and ".join(self._serving.model_names)
        logger.info("Ready: %s at http://%s:%d/v1", names, where, port)
        if self._engine.ready is not None:
            await self._serving.grammars.start(self._engine.ready.vocab_size)

    async def _report_stats(self) -> None:
        """Every stats_report_seconds in which something happened, one line."""
        interval_s = self._config.stats_report_seconds
        if not interval_s:
            return
        before, then = self._engine.stats, time.perf_counter()
        while True:
            await asyncio.sleep(interval_s)
            now, stats = time.perf_counter(), await self._engine.refresh_stats(interval_s)
            if stats.num_steps_total != before.num_steps_total:
                logger.info(_stats_line(before, stats, now - then))
            before, then = stats, now


def _stats_line(before: EngineStats, stats: EngineStats, seconds: float) -> str:
    prompt_tokens = stats.prompt_tokens_total - before.prompt_tokens_total
    cached_tokens = stats.cached_prompt_tokens_total - before.cached_prompt_tokens_total
    generated_tokens = stats.generation_tokens_total - before.generation_tokens_total
    return (
        f"{stats.num_running} running, {stats.num_waiting} waiting; {prompt_tokens / seconds:.1f} prompt tokens/s "
        f"({cached_tokens} of {prompt_tokens} cached), {generated_tokens / seconds:.1f} generated tokens/s; "
        f"KV cache {100 * kv_cache_usage(stats):.0f} % used"
    )


async def _first_of(*waits: object) -> None:
    """Return when the first of the coroutines does; cancel the others."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]  # type: ignore[call-overload]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

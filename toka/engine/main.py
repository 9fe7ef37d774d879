"""The engine process: builds the engine, says Ready, then turns messages into steps until told to stop (floor 7)."""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Callable

import zmq

from toka.config import Config
from toka.engine.build import build_engine
from toka.engine.core import EngineCore
from toka.errors import ConfigError, RequestError
from toka.log import set_up_logging
from toka.messages import Abort, Fatal, FromEngine, Ping, Pong, Rejected, Shutdown, Submit, decode_to_engine, encode
from toka.model_source import ModelSource

log = logging.getLogger(__name__)

EXIT_FAILED, EXIT_CONFIG = 1, 2

_Send = Callable[[FromEngine], None]


def run(config: Config, source: ModelSource, address_in: str, address_out: str) -> None:
    """Serve until Shutdown, in a process of its own that server/engine_process.py starts and ends with its parent.

    Exits with 0, 1 (a failure) or 2 (the configuration is wrong).
    address_in: ZeroMQ address to read ToEngine messages from; address_out: to write FromEngine messages to. The API process binds both.
    """
    set_up_logging(config.log_level)
    with zmq.Context() as context, context.socket(zmq.PULL) as inbox, context.socket(zmq.PUSH) as outbox:
        outbox.linger = 2000  # ms for the last words to leave
        inbox.connect(address_in)
        outbox.connect(address_out)

        def send(message: FromEngine) -> None:
            outbox.send(encode(message))

        try:
            engine, ready = build_engine(config, source)
            send(ready)
            if engine.constraints is not None:
                engine.constraints.prepare()
            _keep_what_is_there()
            try:
                _serve(engine, inbox, send)
            finally:
                engine.shutdown()  # a step that waits for masks would keep the process from ending
        except ConfigError as error:
            send(Fatal(message=str(error), config_error=True))
            status = EXIT_CONFIG
        except Exception as error:
            log.exception("the engine failed")
            send(Fatal(message=f"{type(error).__name__}: {error}"[:500], config_error=False))
            status = EXIT_FAILED
        else:
            status = 0
    sys.exit(status)


def _keep_what_is_there() -> None:
    """What the start made is never garbage: the collector, which was off until now, need not look at it again."""
    gc.collect()
    gc.freeze()
    gc.enable()


def _serve(engine: EngineCore, inbox: zmq.Socket[bytes], send: _Send) -> None:
    poller = zmq.Poller()
    poller.register(inbox, zmq.POLLIN)
    while True:
        if not engine.has_work:
            poller.poll()  # asleep until somebody wants something
        while poller.poll(0):
            message = decode_to_engine(inbox.recv())
            if isinstance(message, Shutdown):
                return
            _take(engine, message, send)
        for submit, error in engine.submit_compiled():
            send(_rejected(submit, error))
        for outputs in (engine.expire(time.perf_counter()), engine.step()):
            if outputs:
                send(outputs.pack(engine.stats()))


def _take(engine: EngineCore, message: Submit | Abort | Ping, send: _Send) -> None:
    if isinstance(message, Submit):
        try:
            engine.submit(message)
        except RequestError as error:
            send(_rejected(message, error))
    elif isinstance(message, Abort):
        engine.abort(message.request_ids)
    else:
        send(Pong(nonce=message.nonce, stats=engine.stats()))


def _rejected(submit: Submit, error: RequestError) -> Rejected:
    return Rejected(request_id=submit.request_id, message=error.message, param=error.param, status=error.status)

"""``osler serve``: models behind OpenAI's API, from the command to the last answer (uvicorn, extra ``serve``).

SIGTERM and Ctrl-C end it gracefully: it takes no new requests, lets those that run finish for ``drain_seconds``, and ends the
rest with an error. A second signal ends it at once. Nothing is kept on disk, so a killed server is simply started again.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from osler.checkpoint.folders import CONFIG_JSON
from osler.config.schema import decode
from osler.export.importing import open_folder
from osler.inference.load import LoadedModel, open_model
from osler.runtime import format as fmt
from osler.runtime.errors import UserError
from osler.runtime.stop import EXIT_STOPPED
from osler.serve.app import OWN_NAMES, Api
from osler.serve.config import ServeConfig
from osler.serve.errors import ApiError
from osler.serve.worker import Served, Worker

try:
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise UserError("uvicorn is not installed: pip install -e '.[serve]' in Osler's source tree") from error

logger = logging.getLogger(__name__)

KEY_VARIABLE = "OSLER_API_KEY"
HEAD_SECONDS = 20.0  # the longest time that a connection may be open without a whole request head
UNREAD_SECONDS = 60.0  # the server disconnects a client that reads nothing for this long


def run(models: Sequence[str], **settings: Any) -> int:
    """Serve models until a signal comes: the command ``serve``. Returns 0 when every request was answered, else 130."""
    config = decode(ServeConfig, settings, source="the command line")
    key = api_key(config)
    named = names_of(models)
    with listening(config) as listener:
        served = []
        for name, path in named.items():
            served.append(Served(name, opened(path, config), config))
            cache = fmt.size(served[-1].cache_bytes)
            logger.info(f"{name}: {served[-1].ready.describe()}; {config.max_rows} rows take up to {cache} of memory")
        host, port = listener.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        if key is None and config.host not in OWN_NAMES:
            logger.warning(f"{address} is open to whoever reaches this machine: set {KEY_VARIABLE}, or give --api-key-file.")
        logger.info(f"Serving at {address} (OpenAI's API: {address}/v1); Ctrl-C stops.")
        server = Server(Api(Worker(served, config), config, key))
        server.run([listener])
    return server.exit_code


def opened(path: str, config: ServeConfig) -> LoadedModel:
    """Load a run, a checkpoint, or a folder of Hugging Face's as `osler import` reads it."""
    if (Path(path) / CONFIG_JSON).is_file():
        return open_folder(path, device=config.device)
    return open_model(path, device=config.device, which=config.which)


def names_of(models: Sequence[str]) -> dict[str, str]:
    """Return the paths of models by name. A name is given as NAME=PATH; else it is the folder's, as RUN@STEP for a checkpoint."""
    found: dict[str, str] = {}
    for model in models:
        name, equals, path = model.partition("=")
        if not equals or os.sep in name:
            place = Path(model).resolve()
            is_step = place.parent.name == "checkpoints"
            name, path = f"{place.parent.parent.name}@{place.name}" if is_step else place.name, model
        if not name or name in found:
            raise UserError(f"Two models are called {name!r}, or one has no name: give names, as in `osler serve first={path}`.")
        found[name] = path
    return found


def api_key(config: ServeConfig) -> str | None:
    """Return the key that clients must send, from a file or the environment; None where there is none."""
    key, where = os.environ.get(KEY_VARIABLE), KEY_VARIABLE
    if config.api_key_file is not None:
        where = config.api_key_file
        try:
            key = Path(where).read_text(encoding="utf-8").partition("\n")[0]
        except (OSError, ValueError) as error:
            raise UserError(f"The file of the API key cannot be read: {error}.") from error
    key = key if key is None else key.strip()
    if key is not None and not (key and key.isascii() and key.isprintable()):
        what = "has characters that no header carries: take printable ASCII" if key else "is empty: write one there"
        raise UserError(f"The API key in {where} {what}, or leave it out to serve without a key.")
    return key


@contextlib.contextmanager
def listening(config: ServeConfig) -> Iterator[socket.socket]:
    """Open the port before models load, so that a port in use is found at once."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections inherit it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * UNREAD_SECONDS))
        try:
            listener.bind((config.host, config.port))
            listener.listen(2048)
        except OSError as error:
            place = f"{config.host}:{config.port}"
            raise UserError(f"{place} cannot be listened on ({error.strerror}): give another --host or --port.") from error
        yield listener
    finally:
        listener.close()


class Connection(H11Protocol):
    """A connection that is closed when it does not bring a whole request head in time."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer for a request head."""
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Read a part of a request."""
        super().data_received(data)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._patience is None and self.timeout_keep_alive_task is None:
            self._patience = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None


class Server(uvicorn.Server):
    """A web server that drains when it is asked to stop."""

    def __init__(self, api: Api) -> None:
        drain = api.config.drain_seconds
        super().__init__(
            uvicorn.Config(
                api.app(),
                http=Connection,
                ws="none",
                loop="asyncio",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=int(drain) + 5,
            )
        )
        self.api, self.exit_code = api, 0
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL + 1 if not logger.isEnabledFor(logging.DEBUG) else logging.INFO)
        api.worker.on_end = self._stop_after_failure

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal; stop at once at the second."""
        if self.should_exit:
            self.force_exit, self.exit_code = True, EXIT_STOPPED
            return
        name, count, seconds = signal.Signals(sig).name, len(self.api.worker.drawings), self.api.config.drain_seconds
        rest = f"{count} run, with {seconds:g} s to end. Once more to end at once." if count else "none is running."
        logger.info(f"{name}: no new requests; {rest}")
        self.should_exit = self.api.is_draining = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for running requests; after ``drain_seconds`` end the rest with an error."""
        self.api.is_draining = True
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self.api.config.drain_seconds, self._give_up)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
        logger.info("Stopped." if self.exit_code == 0 else "Stopped; some requests were not finished.")

    def _give_up(self) -> None:
        for drawing in list(self.api.worker.drawings):
            self.exit_code = EXIT_STOPPED
            drawing.fail(ApiError(503, "The server stopped before the answer was finished.", "stopped"))

    def _stop_after_failure(self) -> None:
        if not self.should_exit:
            logger.error("The thread that computes has ended; the server stops.")
            self.should_exit, self.exit_code = True, 1

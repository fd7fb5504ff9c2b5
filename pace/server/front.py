"""The front process from its beginning to its end: engines, HTTP, signals."""

import asyncio
import contextlib
import importlib.util
import logging
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

import uvicorn

from pace import host, isa
from pace.engine.tokenizer import Tokenizer
from pace.models import Checkpoint, images_of, max_positions, open_checkpoint
from pace.models.hub import resolve
from pace.numa import Place, allowed, topology
from pace.ops import OperatorConfig
from pace.partition import by_node, leftover, partition

from .admission import Admission
from .app import create_app
from .chat.formats import format_of, override
from .config import ServerConfig
from .connections import IDLE_SECONDS, Connection, allow_many
from .fleet import Fleet
from .log import Handler
from .metrics import Metrics
from .node import NodeSettings
from .service import Service

if TYPE_CHECKING:
    from pace.models.images import ImageProcessor

    from .tracing import Tracing

logger = logging.getLogger("pace")

CLOSING_SECONDS = 2  # for clients to take their leave: over TLS, one that reads nothing would keep the server for 30


def serve(config: ServerConfig) -> None:
    """Until a signal. What is wrong with the configuration, the model or the port is raised before there is an engine:
    ValueError, OSError.
    """
    OperatorConfig.parse(config.ops)
    allow_many()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # texts come one at a time, and processes are forked
    groups = places(config)
    _check_memory(config, sum(map(len, groups)))
    with _listening(config) as listener, asyncio.Runner(loop_factory=_event_loop) as runner:
        runner.run(_Front(config, groups, listener).run())


def places(config: ServerConfig) -> list[list[Place | None]]:
    """Of each engine, by node; and this process moves out of their way."""
    engines = None if config.engines == "auto" else int(config.engines)
    machine, mine = topology(), allowed()
    threads = config.threads or isa.asked_num_threads()
    found = partition(machine, mine, engines, config.cores, threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, leftover(machine, mine, found))
    return [list(group) for group in by_node(machine, found)]


def _check_memory(config: ServerConfig, engines: int) -> None:
    """The system may promise more than there is, and end an engine when it takes it."""
    memory, asked = host.describe().memory_bytes, config.kv_cache_bytes or 0
    if memory is not None and asked * engines > memory:
        raise ValueError(
            f"kv_cache_bytes is {asked} for each of {engines} engines; this machine has {memory} bytes: give less"
        )


def _listening(config: ServerConfig) -> socket.socket:
    """Taken at once, so that a port in use is known before a model is loaded."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise OSError(
            f"{config.host}:{config.port} can't be listened on ({error.strerror}): choose another --port or --host"
        ) from None
    return listener


def open_service(config: ServerConfig, groups: list[list[Place | None]]) -> Service:
    """All that the routes need, in a running event loop; the engines begin with `fleet.start()`. ValueError, OSError,
    ImportError for what is wrong with the configuration.
    """
    path = resolve(config.model)
    with open_checkpoint(path) as checkpoint:
        positions, images = max_positions(checkpoint), _images_of(checkpoint)
    tokenizer = Tokenizer.load(path)
    format = override(format_of(tokenizer), config.tool_parser, config.reasoning_parser)
    config.keys  # noqa: B018 (said now, if it can't be read)
    tracing = None if config.otlp_endpoint is None else _tracing(config.otlp_endpoint)
    admission = Admission(config.max_waiting, config.max_waiting_tokens)
    fleet = Fleet(_settings(config, groups), groups, _caches_prefixes(config), config.stall_seconds)
    metrics = Metrics(fleet.engines, admission)
    return Service(config, tokenizer, format, fleet, admission, metrics, positions, images, tracing)


def _images_of(checkpoint: Checkpoint) -> "ImageProcessor | None":
    images = images_of(checkpoint)
    if images is not None and importlib.util.find_spec("PIL") is None:
        logger.warning("images are refused, since they need Pillow: pip install 'pace[images]'")
        return None
    return images


def _tracing(endpoint: str) -> "Tracing":
    """What it needs is imported by those only who ask for it."""
    try:
        from .tracing import Tracing
    except ModuleNotFoundError as error:
        raise ImportError(f"--otlp-endpoint needs {error.name}: pip install 'pace[otel]'") from None
    return Tracing(endpoint)


def _caches_prefixes(config: ServerConfig) -> bool:
    given = config.prefix_caching
    return config.cache in ("SLAB_POOL", "PAGED") if given is None else given


def _settings(config: ServerConfig, groups: list[list[Place | None]]) -> NodeSettings:
    engine: dict[str, Any] = {
        "kv_cache_bytes": config.kv_cache_bytes,
        "cache": config.cache,
        "block_tokens": config.block_tokens,
        "prefix_caching": _caches_prefixes(config),
        **config.limits,
    }
    count = sum(map(len, groups))
    progress = sys.stderr.isatty()
    return NodeSettings(config.model, config.dtype, config.ops, None, engine, count, progress, config.speculative)


def _event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where it is installed, as the extra `serve` has it where it can be."""
    try:
        import uvloop
    except ModuleNotFoundError:  # as on Windows
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


class _Server(uvicorn.Server):
    """Signals are the front's to act on."""

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()


class _Front:
    def __init__(self, config: ServerConfig, groups: list[list[Place | None]], listener: socket.socket) -> None:
        self.config, self.groups, self.listener = config, groups, listener
        self._signals = 0

    async def run(self) -> None:
        service = open_service(self.config, self.groups)
        log_to(Handler(self.config.log_json, service.metrics.log_lines_lost.inc))
        server = self._server(service)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        self._stop = asyncio.Event()
        try:
            starting = asyncio.ensure_future(service.fleet.start())
            serving = asyncio.ensure_future(server.serve([self.listener]))
            stopping = asyncio.ensure_future(self._stop.wait())
            await asyncio.wait({starting, serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                self._announce(service)
                await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            starting.cancel()
            if not serving.done():
                await self._drain(service, server)
            await asyncio.wait({serving}, timeout=CLOSING_SECONDS)
            for connection in list(server.server_state.connections):
                connection.transport.abort()
            await serving
        finally:
            server.should_exit = server.force_exit = True
            await service.close()

    def _server(self, service: Service) -> uvicorn.Server:
        config = self.config
        server = _Server(
            uvicorn.Config(
                create_app(service),
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                http=Connection,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=1,  # of those that have been cut off, and still read nothing
                ssl_certfile=config.tls_cert,
                ssl_keyfile=config.tls_key,
            )
        )
        try:
            server.config.load()  # what is wrong with certificates is said before a model is loaded
        except OSError as error:
            names = f"{config.tls_cert} with {config.tls_key}"
            raise OSError(
                f"{names} can't be used as a certificate and its key ({error.strerror}): give PEM files"
            ) from None
        return server

    def _announce(self, service: Service) -> None:
        host, port = self.listener.getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        scheme = "https" if self.config.tls_cert else "http"
        engines = len(service.fleet.engines)
        logger.info(
            "%s on %s://%s:%d with %d engine%s", self.config.name, scheme, address, port, engines, "s" * (engines > 1)
        )

    def _signalled(self) -> None:
        """The first lets running requests end; the second ends them."""
        self._signals += 1
        self._stop.set()

    async def _drain(self, service: Service, server: uvicorn.Server) -> None:
        admission = service.admission
        admission.closed = True
        if admission.in_flight:
            logger.info("ends in at most %g s: %d requests run", self.config.drain_seconds, admission.in_flight)
        deadline = asyncio.get_running_loop().time() + self.config.drain_seconds
        while admission.in_flight and self._signals < 2 and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        if admission.in_flight:
            logger.warning("%d requests are cut off", admission.in_flight)
            await service.fleet.close()  # who waits gets an error
        server.should_exit = True


def log_to(handler: logging.Handler) -> None:
    """The server's own lines, and what its libraries warn of."""
    for name, level in (("pace", logging.INFO), ("uvicorn", logging.WARNING), ("opentelemetry", logging.WARNING)):
        named = logging.getLogger(name)
        named.handlers[:] = [handler]
        named.setLevel(level)
        named.propagate = False

"""`moe-jax serve`: a coordinator with its public services, and the workers of this machine.

It lives until a signal ends it, and then everything ends with it. Only before the first epoch a failure is final: a
model that no worker can load will not be loaded the next time either. After that what fails is started again.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from moe_jax.config import ModelConfig
from moe_jax.text import Tokenizer
from serving.access import Guard, Key, read_keys
from serving.admin import Admin
from serving.api import Inference
from serving.cluster import Cluster, make_cluster
from serving.coordinator import Coordinator, Watcher
from serving.environment import Platform, compilation_cache, engine_environment, host_labels
from serving.gateway import Gateway
from serving.journal import Journal
from serving.launcher import Launcher
from serving.logs import use_json
from serving.options import Options
from serving.protos import inference_pb2
from serving.protos import inference_pb2_grpc as rpc
from serving.recycling import recycle
from serving.tls import Tls
from serving.web import Web
from serving.worker import DISMISSED

_INFERENCE, _ADMIN = (s.full_name for s in inference_pb2.DESCRIPTOR.services_by_name.values())
if TYPE_CHECKING:
    from serving.tracing import Traces

log = logging.getLogger(__name__)

_STARTUP = 600.0  # seconds that an engine may take to join, to load and to compile
_LOOK = 0.05  # seconds
_QUEUE = 4  # times what all KV caches hold: tokens of requests that are accepted, unless told otherwise
_ATTEMPTS = 3  # ends of a rank's worker before the first epoch


class Launching(Protocol):
    """Who starts the workers of this machine: a Launcher, or the way to one in another process."""

    def dismissed(self, rank: int, pid: int) -> None: ...
    def hold(self, host: str) -> None: ...
    def release(self, host: str) -> None: ...
    async def close(self) -> None: ...


class Keeping(Launching, Protocol):
    """The process that keeps this one."""

    worker_ended: Callable[[int, int | None, str], None]  # to be set

    def listening(self, address: str) -> None: ...


def prepare(options: Options) -> tuple[Cluster, ModelConfig, Tokenizer]:
    """What `serve` needs, as far as it can be had before its time.

    Raises ValueError (CheckpointError, ConfigError) for a model or options that cannot be served.
    """
    labels = host_labels(options.hosts, options.ranks_per_host)
    if options.workers:
        for rank in range(len(labels)):
            engine_environment(rank, options.platform, os.environ)
    cache: Path | None = compilation_cache(options.platform, None, os.environ)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        log.warning("%s: compiled programs cannot be kept there (%s)", cache, e.strerror)
        cache = None
    cluster, model, _ = make_cluster(
        options.model,
        labels,
        options.platform,
        options.load_format,
        cache,
        _STARTUP,
        rebalance_above=options.rebalance_above,
        **options.engine,
    )
    limits, tokens = cluster.limits, options.max_queue_tokens
    if tokens is None:
        tokens = max(_QUEUE * len(labels) * limits.num_pages * limits.page_size, 2 * limits.max_model_len)
    cluster, tokenizer = (
        replace(cluster, max_tokens=tokens, max_wait=options.max_queue_seconds),
        Tokenizer.from_directory(options.model),
    )
    if options.workers:
        return cluster, model, tokenizer
    host = options.address.rpartition(":")[0]
    if host in ("", "0.0.0.0", "[::]"):
        raise ValueError(f"address: found host {host!r}, expected one that workers on other machines can reach")
    return replace(cluster, service_host=host), model, tokenizer


class Server:
    """Belongs to the running event loop."""

    def __init__(
        self,
        cluster: Cluster,
        journal: Journal,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        restart: bool = True,
        linger: float = 1.0,
        tls: Tls | None = None,
        keys: tuple[Key, ...] | None = None,
        token: str | None = None,
        **limits: Any,
    ) -> None:
        """vocab_size, eos_token_ids, linger, limits: as in Inference. tls: of all connections. keys: of clients;
        None: all are let in. token: of the workers; None: all are."""
        self.cluster, self.journal = cluster, journal
        self.watcher = Watcher(
            engine_failed=self._engine_failed,
            changed=self._changed,
            served=lambda epoch: self.admin.changed(),
            failed=self._journal_failed,
        )
        self.coordinator = Coordinator(cluster, journal, self.watcher, tls, guard := Guard(keys, token))
        self._guard, self._tls, self._token = guard, tls, token
        self.inference = Inference(self.coordinator, tokenizer, vocab_size, eos_token_ids, journal, linger, **limits)
        self.admin, self.health = Admin(self.coordinator), HealthServicer()
        self.web: Web | None = None
        self._faces: list[tuple[str, Callable[[grpc.aio.Server], None]]] = []  # beside our own
        self._changes: set[asyncio.Task[None]] = set()
        self.launcher: Launching | None = None
        self.serving = asyncio.Event()  # has begun, once
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # raises it
        self._restart = restart
        self._recycling: asyncio.Future[None] | None = None
        self._ends: dict[int, int] = {}  # of each rank's worker before the first epoch
        self._said: dict[int, str] = {}  # by its engine, the last time
        self.inference.adopt(journal.unfinished)  # before anything can come of them

    async def start(self, address: str) -> str:
        """Listen; returns "host:port". Raises OSError."""
        await self._say_health(False)
        return await self.coordinator.start(address, [self._add_services])

    def start_web(self, address: str) -> str:
        """Status page and metrics; returns "host:port". Raises OSError."""
        coordinator = self.coordinator
        self.web = Web(coordinator.observe, coordinator.metrics, self._guard, self._tls)
        return self.web.start(address)

    def add_kserve_face(self, name: str) -> None:
        """Before `start`: speak the Open Inference Protocol, too. name: the model's."""
        from serving import kserve_face
        from serving.protos import open_inference_pb2_grpc

        face = kserve_face.KServe(self.inference, name)
        add = open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server
        self._faces.append((kserve_face.NAME, lambda server: add(face, server)))

    def add_vllm_face(self, model: Path, name: str) -> None:
        """Before `start`: speak the protocol of vLLM's engines, too. Raises ImportError without smg-grpc-proto."""
        from smg_grpc_proto.generated import vllm_engine_pb2_grpc

        from serving.vllm_face import NAME, VllmEngine

        engine = VllmEngine(self.inference, model, name)
        self._faces.append((NAME, lambda server: vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(engine, server)))

    def _add_services(self, server: grpc.aio.Server) -> None:
        for _, add in self._faces:
            add(server)
        rpc.add_InferenceServicer_to_server(self.inference, server)
        rpc.add_AdminServicer_to_server(self.admin, server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        faces = [name for name, _ in self._faces]
        public = (_INFERENCE, _ADMIN, *faces, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(public, server)

    async def _say_health(self, serving: bool) -> None:
        """Inference: whether new requests are served. The others, and the server as a whole: that it lives."""
        status = health_pb2.HealthCheckResponse.ServingStatus
        for name in ("", _ADMIN):
            await self.health.set(name, status.SERVING)
        for name in (_INFERENCE, *(name for name, _ in self._faces)):
            await self.health.set(name, status.SERVING if serving else status.NOT_SERVING)

    def start_workers(self, platform: Platform, log_dir: Path | None = None) -> Launcher:
        """On this machine, as far as they belong to the cluster."""
        launcher = Launcher(
            self.coordinator.address,
            self.cluster.rules.hosts,
            platform,
            restart=self._restart,
            environ=self.cluster.environ,
            log_dir=log_dir,
            engine=self.cluster.engine,
            ended=self.worker_ended,
            tls=self._tls,
            token=self._token,
        )
        self.use(launcher)
        launcher.start()
        return launcher

    def use(self, launcher: Launching) -> None:
        """Its workers are this cluster's."""
        self.launcher = launcher
        self.watcher.dismissed, self.watcher.drained = launcher.dismissed, launcher.hold
        self.watcher.wanted = launcher.release if self._restart else None
        if self._restart:
            self._recycling = asyncio.ensure_future(recycle(self.coordinator))

    async def drain(self, grace: float) -> None:
        """Refuse new requests, and let those that are open finish, for `grace` seconds at most."""
        await self.health.enter_graceful_shutdown()
        self.inference.refuse()
        ledger, deadline = self.coordinator.router.ledger, time.monotonic() + grace
        if len(ledger):
            log.info("%d requests have %g s to finish", len(ledger), grace)
        while len(ledger) and time.monotonic() < deadline and not self.failure.done():
            await asyncio.sleep(_LOOK)

    async def close(self) -> None:
        """End everything, within seconds. Requests that have not ended stay in the journal."""
        if self._recycling is not None:
            self._recycling.cancel()
        await self.health.enter_graceful_shutdown()
        self.inference.close()
        self.admin.close()
        if self.web is not None:
            self.web.close()
        await self.coordinator.close()
        if self.launcher is not None:
            await self.launcher.close()
        self.journal.close()

    # What happens

    def _changed(self, state: str, reason: str) -> None:
        if state == "SERVING":
            self.serving.set()
        self.admin.changed()
        task = asyncio.ensure_future(self._say_health(self.serving.is_set() and state != "UNSERVABLE"))
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)

    def _engine_failed(self, rank: int, kind: str, text: str) -> None:
        self._said[rank] = text
        if self.launcher is not None and kind in ("CheckpointError", "ConfigError"):
            self._fail(ValueError(f"rank {rank}: {text}"))

    def worker_ended(self, rank: int, code: int | None, what: str) -> None:
        log.info("%s", what)
        if code != DISMISSED:
            self._ends[rank] = self._ends.get(rank, 0) + 1
            if self._ends[rank] >= _ATTEMPTS or not self._restart:
                self._fail(RuntimeError(self._said.get(rank, what)))

    def _fail(self, error: Exception) -> None:
        if not self.serving.is_set() and not self.failure.done():
            self.failure.set_exception(error)

    def _journal_failed(self, error: Exception) -> None:
        if not self.failure.done():
            self.failure.set_exception(RuntimeError(f"journal: {error}"))


def _traces(endpoint: str, server: Server) -> Traces:
    """Raises ValueError where what it takes is not installed."""
    try:
        from serving import tracing

        traces = tracing.Traces(tracing.exporter(endpoint))
    except ImportError as e:
        raise ValueError(f"otlp: found no {e.name}: pip install 'moe-jax[otel]'") from None
    server.coordinator.metrics.finished.append(traces.finished)
    return traces


async def serve(
    options: Options,
    cluster: Cluster,
    model: ModelConfig,
    tokenizer: Tokenizer,
    say: Callable[[str], None],
    keeper: Keeping | None = None,
    kept: asyncio.Event | None = None,
) -> None:
    """cluster, model, tokenizer: as `prepare` has made them of the options.

    Until SIGTERM or SIGINT, and then as long as accepted requests take, but no longer than options.grace. `say` gets
    one line, when requests are served for the first time. keeper: it has the local workers, if there are any; when it
    is gone `kept` is set, and then this ends at once.

    Raises ValueError for what a worker or a journal found wrong with the model or the options, RuntimeError for
    workers that do not start or a journal that cannot be written, OSError for an address or a directory that cannot be
    used.
    """
    signalled, loop = asyncio.Queue[None](), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled.put_nowait, None)
    for directory in (options.journal, options.log_dir):
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
    journal = Journal(None if options.journal is None else options.journal / "journal.sqlite")
    eos = tokenizer.eos_token_ids or model.eos_token_ids
    keys = None if options.api_keys is None else read_keys(options.api_keys)
    server = Server(
        cluster,
        journal,
        tokenizer,
        model.vocab_size,
        tuple(eos),
        options.restart,
        tls=options.tls,
        keys=keys,
        token=options.cluster_token,
        max_output_tokens=options.max_output_tokens,
        name=options.model.name,
    )
    traces = None if options.otlp is None else _traces(options.otlp, server)
    if options.log_json:
        use_json(lambda: server.coordinator.epoch)
    stop, serving = asyncio.create_task(signalled.get()), asyncio.create_task(server.serving.wait())
    gateway: Gateway | None = None
    gone = asyncio.create_task((kept or asyncio.Event()).wait())
    try:
        server.add_kserve_face(options.model.name)
        if importlib.util.find_spec("smg_grpc_proto") is not None:
            server.add_vllm_face(options.model.resolve(), options.model.name)
        address = await server.start(options.address)
        log.info("%s: waiting for %d workers", address, len(cluster.rules.hosts))
        if options.web is not None:
            log.info("status page and metrics at %s", server.start_web(options.web))
        if options.openai_port is not None and keeper is None:
            gateway = Gateway(address, options.openai_port, options.model)
        if keeper is not None:
            if options.workers:
                server.use(keeper)
                keeper.worker_ended = server.worker_ended
            keeper.listening(address)
        elif options.workers:
            server.start_workers(options.platform, options.log_dir)
        await asyncio.wait([stop, gone, serving, server.failure], return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            engines = [str(rank["pid"]) for rank in server.coordinator.status()["ranks"] if rank["pid"] is not None]
            say(f"serving at {address}: coordinator {os.getpid()}, engines {' '.join(engines)}")
        await asyncio.wait([stop, gone, server.failure], return_when=asyncio.FIRST_COMPLETED)
        if server.failure.done():
            server.failure.result()
        if serving.done():
            stop = asyncio.create_task(signalled.get())  # a second signal: at once
            draining = asyncio.create_task(server.drain(options.grace))
            await asyncio.wait([stop, gone, draining], return_when=asyncio.FIRST_COMPLETED)
            draining.cancel()
    finally:
        for task in (stop, gone, serving):
            task.cancel()
        if gateway is not None:
            await gateway.close()
        await server.close()
        if traces is not None:
            await asyncio.to_thread(traces.close)

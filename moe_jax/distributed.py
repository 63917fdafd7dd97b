"""JAX across processes: the coordination service, its clients, and every private JAX name that this project uses.

Private names and where they were seen: `jax._src.distributed.global_state`, `jax._src.lib._jax`,
`jax._src.xla_bridge.backends_are_initialized` and `get_backend`, `jax._src.compiler.get_compile_options`,
`Compiled._executable.xla_executable`, `jax._src.array.ArrayImpl` and `jax._src.lib.xla_client.batched_device_put`
(0.10.2, 0.11.2, 0.12.0).
"""

import contextlib
import ctypes
import os
import re
import socket
import struct
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
from jax import core
from jax._src import array, compiler, distributed, xla_bridge
from jax._src.lib import _jax, xla_client  # type: ignore[attr-defined]
from jax.experimental.compilation_cache import compilation_cache

# Same bits for every batch: products on one thread, so that their summation order does not depend on the machine; and
# sums in XLA's own loops, in order, where XLA would hand them to a library that chooses an order by shape.
_CPU_FLAGS = {"xla_cpu_multi_thread_eigen": "false", "xla_cpu_experimental_ynn_fusion_type": "individual_dot"}


def _missing_cpu_flags(flags: str) -> list[str]:
    return [f"--{name}={value}" for name, value in _CPU_FLAGS.items() if name not in flags]


def set_cpu_devices(count: int) -> None:
    """Before JAX is first used: `count` virtual devices if it runs on CPU, and the flags that deterministic mode needs.

    Afterwards nothing can be changed: warns if the flags are missing.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    missing = _missing_cpu_flags(flags)
    if xla_bridge.backends_are_initialized():
        if missing and jax.default_backend() == "cpu":
            warnings.warn(
                "JAX was used before moe_jax could set its flags, so a request's bits may depend on its batch. "
                f"Make the LLM first, or set XLA_FLAGS={' '.join(missing)!r}",
                stacklevel=2,
            )
        return
    os.environ["XLA_FLAGS"] = " ".join([flags, *missing]).strip()
    if count > 1:
        jax.config.update("jax_num_cpu_devices", count)


def default_platform() -> str:
    """The platform, "cpu" or "cuda", as JAX_PLATFORMS says; without it devices are looked for."""
    named = (jax.config.jax_platforms or "").split(",")[0]  # type: ignore[attr-defined]
    return named or jax.default_backend()


def pretend_gpus(count: int) -> None:
    """Before JAX is first used: one device for each of `count` processes, of which only this one's is real. Programs
    can be compiled for them, and not run."""
    jax.config.update("jax_mock_gpu_topology", f"1x{count}x1")


def start_service(address: str, num_nodes: int, heartbeat_s: int = 30) -> Any:
    """The JAX coordination service, in this process, at "host:port", for `num_nodes` ranks. Keep the result.

    The heartbeat timeout is long because detection is ours, and a short one aborts every worker when the service is
    merely stopped.
    """
    return _jax.get_distributed_runtime_service(
        address, num_nodes, heartbeat_timeout=heartbeat_s, shutdown_timeout=5, recoverable=True
    )


def connect(address: str, rank: int, num_nodes: int, init_timeout_s: int = 120, heartbeat_s: int = 30) -> Any:
    """Join the service as `rank`, before this process's first use of JAX devices. Returns the client."""
    if xla_bridge.backends_are_initialized():
        raise RuntimeError("distributed.connect: JAX devices are in use already, expected to be called before")
    set_cpu_devices(1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_recoverability", True)
    state = distributed.global_state
    state.process_id, state.num_processes, state.coordinator_address = rank, num_nodes, address
    client = _jax.get_distributed_runtime_client(
        address,
        rank,
        init_timeout=init_timeout_s,
        use_compression=True,
        heartbeat_timeout=heartbeat_s,
        shutdown_on_destruction=False,
    )
    client.connect()
    state.client = client
    return client


class Meetings:
    """Where ranks meet at the JAX service before an epoch, which is what tells XLA their incarnations. Thread-safe.

    JAX's barrier knows no name, only its nodes, and a call cannot be taken back: one that waits for a node that is lost
    is answered when that node's next process comes. So all meet at a barrier with a name first, to which nobody comes
    late; and a process that has a call waiting for the same nodes makes no other. That one would begin a meeting of its
    own if the first was answered in between, and nobody would ever come to it.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._calls: dict[tuple[int, ...], Future[list[int]]] = {}  # that have not been answered

    def live_nodes(self, name: str, nodes: Sequence[int], timeout_s: float, answer_s: float = 1.0) -> list[int]:
        """Those of `nodes` that live, once all of them have come; once an epoch, whose name no other has.

        Raises JaxRuntimeError when not all have come after timeout_s, TimeoutError when they have and the service has
        no answer for all of them answer_s later: meet again then, under another name.
        """
        key = tuple(sorted(nodes))
        waiting = self._calls.get(key)
        self._client.wait_at_barrier(name, int(1000 * timeout_s), list(key))
        with self._lock:
            call = waiting or self._calls.get(key)
            if call is None:
                call = self._calls[key] = Future()
                threading.Thread(target=self._ask, args=(key, call), name="live-nodes", daemon=True).start()
        try:
            return call.result(answer_s)
        except TimeoutError:
            raise TimeoutError(f"nodes {list(key)} met, and the JAX service gave no answer in {answer_s} s") from None

    def meet(self, name: str, nodes: Sequence[int], timeout_s: float) -> bool:
        """Whether all of `nodes` came in time; they are all told the same. The name is used once."""
        try:
            self._client.wait_at_barrier(name, int(1000 * timeout_s), sorted(nodes))
        except jax.errors.JaxRuntimeError:
            return False
        return True

    def _ask(self, key: tuple[int, ...], call: Future[list[int]]) -> None:
        try:
            answer, error = sorted(self._client.get_live_nodes(list(key))), None
        except Exception as e:
            answer, error = [], e
        with self._lock:
            del self._calls[key]
        if error is None:
            call.set_result(answer)
        else:
            call.set_exception(error)


# Programs

Loaded = Callable[[list[jax.Array]], list[list[jax.Array]]]
"""Takes the flat arguments, global arrays; gives of each flat result this process's shards, in mesh order."""


def program_flags(kind: str) -> tuple[str, ...]:
    """The XLA flags that may change what a program for this kind of device computes."""
    flags = os.environ.get("XLA_FLAGS", "")
    others = ("--xla_force_host_platform_device_count", "--xla_gpu_" if kind == "cpu" else "--xla_cpu_")
    names = {f for f in flags.split() if not f.startswith(others)}
    return tuple(sorted(names | set(_missing_cpu_flags(flags) if kind == "cpu" else ())))


_uncached = threading.Lock(), Counter[str]()  # programs that are being compiled, by any thread


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """JAX's own cache of compiled programs is off as long as anybody is inside."""
    lock, inside = _uncached
    with lock:
        if not inside["threads"]:
            inside["enabled"] = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
            jax.config.update("jax_enable_compilation_cache", False)
            compilation_cache.reset_cache()  # or what it was when it was first looked at would hold
        inside["threads"] += 1
    try:
        yield
    finally:
        with lock:
            inside["threads"] -= 1
            if not inside["threads"]:
                jax.config.update("jax_enable_compilation_cache", bool(inside["enabled"]))
                compilation_cache.reset_cache()


def serialize_program(
    lowered: jax.stages.Lowered, deterministic: bool, options: Mapping[str, str | bool] | None = None
) -> bytes:
    """Compile, as bytes; by several threads at once if they like. deterministic: without tuning, by which the same
    product may be computed in one way in this process and in another in the next. Never from JAX's own cache: on CPU a
    program from there has lost its code once serialised again (seen in 0.10.2)."""
    with _without_cache():
        options = {"xla_gpu_autotune_level": "0"} if deterministic else dict(options or {})
        executable = lowered.compile(options)._executable.xla_executable  # type: ignore[attr-defined]
    backend = xla_bridge.get_backend()
    if hasattr(backend, "serialize_executable"):
        return backend.serialize_executable(executable)
    return executable.serialize()


def load_program(program: bytes, devices: Sequence[jax.Device]) -> Loaded:
    """A serialised program on `devices`, in mesh order, as many as it was compiled for: another number would abort
    the process. Which devices it was compiled on does not matter."""
    ids = np.array([[d.id for d in devices]])
    options = compiler.get_compile_options(num_replicas=1, num_partitions=len(devices), device_assignment=ids)
    devices_list = _jax.DeviceList(tuple(devices))
    executable = xla_bridge.get_backend().deserialize_executable(program, devices_list, options)

    def run(arguments: list[jax.Array]) -> list[list[jax.Array]]:
        return executable.execute_sharded(arguments).disassemble_into_single_device_arrays()

    return run


# Arrays. A step makes a handful, and JAX's public functions take longer for each than a small model's layer.


def make_global(shape: tuple[int, ...], sharding: jax.sharding.Sharding, shards: list[jax.Array]) -> jax.Array:
    """As jax.make_array_from_single_device_arrays, unchecked: 3 us instead of 30 (0.10.2)."""
    aval = core.ShapedArray(shape, shards[0].dtype)
    return array.ArrayImpl(aval, sharding, shards, committed=True, _skip_checks=True)  # type: ignore[arg-type]


def put_global(
    shape: tuple[int, ...], sharding: jax.sharding.Sharding, arrays: list[np.ndarray], devices: list[jax.Device]
) -> jax.Array:
    """The global array of this process's shards, each sent to its device: 10 us instead of 180 (0.10.2)."""
    aval = core.ShapedArray(shape, arrays[0].dtype)
    return xla_client.batched_device_put(aval, sharding, arrays, devices, True)


# Collectives that wait for a lost rank

_HANG_UP = 100  # attempts; XLA's abort takes up to 0.9 s where processes share a GPU
_SO_ATTACH_FILTER = 26  # Linux; not in Python's socket module
_GENTLE = 10  # attempts at a cut that leave what is written alone
_ROOM = 1 << 20  # bytes that may be on their way to a peer
_HOLD = 1.0  # seconds that a socket which was cut stays open at least
_held: dict[str, tuple[float, socket.socket]] = {}  # those, by the kernel's name: since when
# Drops TCP segments with FIN or RST, takes all others: (code, jump if true, jump if false, constant) of classic BPF,
# which the kernel runs at the TCP header. Kept, for the kernel reads it from here.
_FILTER = [(0x30, 0, 0, 13), (0x45, 1, 0, 5), (0x06, 0, 0, 0xFFFFFFFF), (0x06, 0, 0, 0)]
_NO_GOODBYE = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *op) for op in _FILTER))


def open_sockets() -> dict[str, int]:
    """This process's sockets: the kernel's name for each, and its file descriptor."""
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            name = os.readlink(f"/proc/self/fd/{fd}")
            if name.startswith("socket:"):
                found[name] = int(fd)
    return found


def _sockets(spared: Collection[str] = (), only: Collection[str] | None = None) -> Iterator[socket.socket]:
    """This process's sockets but `spared`, or `only` these; each is closed again, and stays open where it is used.

    Other threads close sockets and open new ones meanwhile, so a descriptor may be another socket's by now: of the
    communicator that is being made, say, which would be rung in place of the one that is aborted.
    """
    for name, fd in open_sockets().items():
        if name in spared or (only is not None and name not in only):
            continue
        with contextlib.suppress(OSError):
            held = os.dup(fd)
            if os.readlink(f"/proc/self/fd/{held}") != name:
                os.close(held)
                continue
            with socket.socket(fileno=held) as s:
                yield s


def shield_collectives(service_address: str) -> None:
    """Keep Gloo from noticing by itself that a peer is gone: call it when communicators may be new, or now and then.

    Gloo forgets what it could not write when it closes a connection, and whoever waits for that to be sent waits for
    ever (gloo/transport/tcp/pair.cc, signalException: it goes through `tx_` without the unbound buffers; seen in
    jaxlib 0.10.2 and 0.11.2). So no write may fail: a peer's end is not heard of, and there is room for what would be
    sent to it. The end of these collectives is `cut_collectives`, which all ranks are told. What Gloo accepts has this
    from the socket that listens; what it connects, from the next call on.
    """
    if jax.default_backend() != "cpu":
        return
    _release()
    for s in _peers(service_address, listening=True):
        with contextlib.suppress(OSError):
            s.setsockopt(
                socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", len(_FILTER), ctypes.addressof(_NO_GOODBYE))
            )
            s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ROOM)


def cut_collectives(service_address: str, attempt: int = 0, spared: Collection[str] = ()) -> None:
    """End the collectives that this process is inside of, after a peer was fenced. From any thread; to be repeated
    until they have ended, with the number of the attempt.

    Gloo does not pass an abort on: a survivor that waits for another which has given up would wait for ever. So all
    TCP sockets but the one to the JAX service are shut down; first for reading only, see `shield_collectives`. They
    stay open for a while, though Gloo closes them, for a peer may not have shielded its end yet: without this, of four
    ranks that were cut while they connected, one never left in 5 of 2,880 times.

    NCCL is aborted by XLA, see `ring`. What XLA cannot abort is a communicator that is being made: NCCL waits in it for
    a lost rank to connect (seen with 0.11.2). So if it takes longer than an abort ever does, NCCL's connections end,
    which ends that wait with an error; `spared` are sockets, as `open_sockets` names them, of its other communicators.
    """
    if jax.default_backend() == "cpu":
        for s in _peers(service_address):
            with contextlib.suppress(OSError):
                _hold(s)
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RD if attempt < _GENTLE else socket.SHUT_RDWR)
    elif attempt >= _HANG_UP:
        for s in _peers(service_address, spared, listening=True):
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)


def _hold(s: socket.socket) -> None:
    """Until `_release` it is not closed, whoever closes it."""
    name = os.readlink(f"/proc/self/fd/{s.fileno()}")
    if name not in _held:
        _held[name] = time.monotonic(), s.dup()


def _release() -> None:
    for name, (since, s) in list(_held.items()):
        if time.monotonic() - since >= _HOLD and _held.pop(name, None):
            s.close()


def end_connecting(client: Any, devices: Sequence[jax.Device]) -> bool:
    """The same for a communicator of these devices, in mesh order, that is being made: whoever waits for a lost rank
    to connect has no socket that could be cut. So this process says on behalf of all others where they are, which is
    here, and connects to itself on behalf of each, as Gloo does. False: it has not begun to connect; try again.
    """
    if jax.default_backend() != "cpu":
        return True
    keys = [f"{_gloo_keys(devices)}{i}" for i in range(len(devices))]
    own = [i for i, d in enumerate(devices) if d.process_index == jax.process_index()][0]
    try:
        value = client.key_value_try_get_bytes(keys[own])
    except jax.errors.JaxRuntimeError:
        return False
    for key in keys:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # it has said so itself
            client.key_value_set_bytes(key, value)
    # The value: a host name and an address, each behind its length; then a number for each rank to connect with.
    name = 8 + struct.unpack_from("q", value)[0]
    address, numbers = value[name + 8 :], value[name + 8 + struct.unpack_from("q", value, name)[0] :]
    family, port = struct.unpack_from("=H", address)[0], struct.unpack_from("!H", address, 2)[0]
    packed = address[4:8] if family == socket.AF_INET else address[8:24]
    for (number,) in struct.iter_unpack("8s", numbers):
        with contextlib.suppress(OSError), socket.socket(family) as s:
            s.settimeout(0.2)
            s.connect((socket.inet_ntop(family, packed), port))
            s.send(number)
    return True


def forget_communicator(client: Any, devices: Sequence[jax.Device]) -> None:
    """Before these devices form one in this order: what an earlier process of this rank has said of its own. All ranks
    do it before any of them goes on, so that none finds another's old address."""
    if jax.default_backend() == "cpu":
        for i, device in enumerate(devices):
            if device.process_index == jax.process_index():
                client.key_value_delete(f"{_gloo_keys(devices)}{i}")


def _gloo_keys(devices: Sequence[jax.Device]) -> str:
    """Where the ranks of a communicator say to the JAX service how they are reached, by place in the mesh."""
    return f"cpu:gloo/{','.join(str(d.id) for d in devices)}/"


def _peers(service_address: str, spared: Collection[str] = (), listening: bool = False) -> Iterator[socket.socket]:
    """TCP sockets with a peer but these and the one to the JAX service, and those that wait for one if asked for."""
    port = int(re.sub(r".*:", "", service_address))
    for s in _sockets(spared):
        with contextlib.suppress(OSError):
            if s.type != socket.SOCK_STREAM or s.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            if s.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                if listening:
                    yield s
            elif s.getpeername()[1] != port:
                yield s


def ring(doomed: Collection[str]) -> bool:
    """Wake the threads of NCCL communicators that XLA is aborting; `doomed` are their sockets, as `open_sockets` names
    them. From any thread, again and again until the answer is False: none of them is left.

    ncclCommAbort joins NCCL's service threads, one after the other, and these sleep up to 0.5 s on a listening TCP
    socket and on an abstract Unix one (NCCL 2.28). XLA aborts in threads of its own: the step that was inside may have
    failed long before they are done, and a new communicator waits for them. One that is rung and not aborted hangs.
    """
    rung = False
    for s in _sockets(only=doomed):
        with contextlib.suppress(OSError):
            if s.family == socket.AF_UNIX and s.type == socket.SOCK_DGRAM and s.getsockname():
                rung = True
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as c:
                    c.setblocking(False)
                    c.sendto(bytes(64), s.getsockname())
            elif s.type == socket.SOCK_STREAM and s.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                rung = True
                with socket.socket(s.family, socket.SOCK_STREAM) as c:
                    c.settimeout(0.2)
                    c.connect(s.getsockname())
    return rung


def device_is_lost(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether it is one after which CUDA refuses everything else in this process, such as an illegal address."""
    named = re.search(r"CUDA_ERROR_(\w+)", str(error))
    return named is not None and named[1] not in ("OUT_OF_MEMORY", "NOT_READY")


# Fencing, in the process of the service

_TOPOLOGIES = ("cpu:global_topology/cpu", "cuda:global_topology/cuda")


def fence(address: str, node: int) -> Any:
    """Register a fresh, empty incarnation of a node: the service calls the old one stale, and what the others have in
    flight with it fails. Returns the client, to be kept: one that is destroyed would disconnect."""
    client = _jax.get_distributed_runtime_client(
        address, node, init_timeout=10, heartbeat_timeout=30, shutdown_on_destruction=False
    )
    client.connect()
    return client


def forget_topology(client: Any) -> None:
    """Before node 0 starts again: it writes the global topology, and finds it written. For no other node: that one
    would wait for it for ever."""
    for key in _TOPOLOGIES:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.key_value_delete(key)

"""Gates in programs: what is behind one that is closed does not happen, and nothing before it is harmed."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec, SingleDeviceSharding

from moe_jax import gate
from moe_jax.distributed import load_program, serialize_program
from moe_jax.mesh import ExpertMesh
from moe_jax.moe import AXIS, Dispatch

pytestmark = pytest.mark.skipif(gate._LIBRARY.load() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def opened() -> Iterator[None]:
    yield
    gate.close(False)


def test_a_program_is_passed_through_while_they_are_open() -> None:
    """A stored one, as an engine's are."""
    x, device = jnp.arange(5.0), jax.devices()[0]
    spec = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device))
    program = serialize_program(jax.jit(lambda x: gate.gate(x * 2) + 1).lower(spec), deterministic=True)
    run = load_program(program, [device])

    def found() -> np.ndarray:
        return np.asarray(run([jax.device_put(x, device)])[0][0])

    np.testing.assert_array_equal(found(), x * 2 + 1)
    gate.close(True)
    with pytest.raises(jax.errors.JaxRuntimeError, match="not wanted any more"):
        found()
    gate.close(False)
    np.testing.assert_array_equal(found(), x * 2 + 1)


def test_the_rest_of_a_loop_is_left_out() -> None:
    """The layers of a step are one; the gate's owner may close it between two of them."""
    passed = []

    def note(number: np.ndarray) -> None:
        passed.append(int(number))
        gate.close(number == 3)

    @jax.jit
    def f(x: jax.Array) -> jax.Array:
        def body(i: jax.Array, x: jax.Array) -> jax.Array:
            jax.debug.callback(note, i, ordered=True)
            return gate.gate(x + 1)

        return jax.lax.fori_loop(0, 10, body, x)

    with pytest.raises(Exception, match="not wanted any more"):
        jax.block_until_ready(f(jnp.zeros(4)))
    assert 3 in passed and 9 not in passed


def test_one_before_each_collective_and_no_copy() -> None:
    ranks = 2
    mesh = ExpertMesh(tuple(jax.devices()[:ranks])).mesh
    dispatch = Dispatch(ranks, gated=True)

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=PartitionSpec(AXIS), out_specs=PartitionSpec(AXIS), check_vma=False)
    def f(x: jax.Array) -> jax.Array:
        (everyone,) = dispatch.gather(x)
        return dispatch.reduce(everyone * 3)

    x = jnp.arange(24.0).reshape(12, 2)
    entry = (f.lower(x).compile().as_text() or "").partition("ENTRY")[2]
    assert entry.count('custom_call_target="moe_jax_gate"') == 2 and " copy(" not in entry
    np.testing.assert_array_equal(f(x), x * 6)

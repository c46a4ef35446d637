"""Probes of Horovod's API on two ranks, one small function for each row of the table in
docs/horovod.md.

A probe uses a part of Horovod as its documentation says. It raises nothing if the result is
right, which is almost always what one rank computes from the whole batch with the framework alone,
bit by bit the same on both ranks; an AssertionError if it is wrong and nothing has said so. Nothing
of our mends is imported here, so that the same probes judge plain Horovod.
"""

from horovod_build.probes import (
    keras_optimizer,
    keras_parts,
    launching,
    tensorflow_variables,
    torch_side,
)
from horovod_build.probes.common import Probe

# In the order of the table.
PROBES: dict[str, Probe] = {
    probe.name: probe
    for module in (keras_optimizer, keras_parts, tensorflow_variables, torch_side, launching)
    for probe in module.PROBES
}

__all__ = ["PROBES", "Probe"]

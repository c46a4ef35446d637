"""The doctor's checks: generators of findings.

No framework is imported here: those run in processes of their own, so that a broken one is a
finding and not the doctor's end. A check sees what was found before it.
"""

from horovod_lm.checks.finding import Check, Finding
from horovod_lm.checks.machine import (
    check_cores,
    check_gpus,
    check_polling,
    check_root,
    check_space,
)
from horovod_lm.checks.software import (
    check_compiler,
    check_frameworks,
    check_horovod,
    check_packages,
    check_python,
)
from horovod_lm.checks.two_ranks import check_mpi, check_steps

__all__ = ["CHECKS", "Check", "Finding"]

CHECKS: tuple[Check, ...] = (
    check_python, check_packages, check_compiler, check_frameworks, check_mpi, check_horovod,
    check_cores, check_polling, check_root, check_space, check_gpus, check_steps,
)  # fmt: skip

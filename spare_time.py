"""Processor time that a model on the processor leaves over.

Its threads wait for each other many times a layer. GNU's OpenMP, which torch brings on Linux, has them look
for work meanwhile, so that nothing else gets a turn; and a thread that took one would hold up all of them. So
they are to sleep soon, and who works beside them is to run only while they do.
"""

import os
import threading
from contextlib import suppress

SPIN = 30_000
"""Looks for work before a thread sleeps: a tenth of OpenMP's default. Far fewer slow the model down, for
waking takes long."""


SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""OpenMP reads them when torch is imported."""


def leave_spare_time() -> bool:
    """Call before torch is imported. What the user has set stays; whether something was set."""
    if any(name in os.environ for name in SETTINGS):
        return False
    os.environ["GOMP_SPINCOUNT"] = str(SPIN)
    return True


def use_spare_time() -> None:
    """From now on this thread runs while no other wants the processor, where the system can be told so."""
    if hasattr(os, "SCHED_IDLE"):
        with suppress(PermissionError):  # a sandbox may forbid it: then the thread takes its turns
            os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))

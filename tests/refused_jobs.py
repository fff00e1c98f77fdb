"""Functions that ``test_scaling_out_refusals`` launches: they leave in ways in which no function should."""

import os
import time


def leaves_without_a_word() -> int:
    """End with status 0 before anything is returned."""
    os._exit(0)


def sleeps_deaf() -> None:
    """Sleep, and show no stack when asked for one."""
    import signal

    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    time.sleep(600)


def gives_back(x: object) -> object:
    """What it is given."""
    return x


def one() -> int:
    """1."""
    return 1

"""The app as ``tests.own_tools:app``: the faster one, with tools that a learner might write."""

import builtins
import time
from pathlib import Path

import anthropic

from tests.faster import faster

app = faster()  # first, since it changes what is imported
from conversation import TOOLS  # noqa: E402


@anthropic.beta_tool
def bus_times(stop: str, how_many: int = 1) -> str:
    """When the next buses leave.

    Args:
        stop: the name of the stop.
        how_many: how many buses.
    """
    minutes = range(5, 5 * how_many + 1, 5)
    return f"From {stop}: " + ", ".join(f"in {number} minutes" for number in minutes)


@anthropic.beta_tool
def buses_in_town() -> int:
    """How many buses there are: a number, where Claude is sent words."""
    return 40


@anthropic.beta_tool
def fail(error: str) -> str:
    """Raise this."""
    raise getattr(builtins, error)("a secret")


@anthropic.beta_tool
def wait_for(file: str, seconds: float = 30.0) -> str:
    """Wait until this file is there."""
    until = time.monotonic() + seconds
    while not Path(file).exists():
        if time.monotonic() > until:
            return "nobody came"
        time.sleep(0.02)
    return "somebody came"


TOOLS += [bus_times, buses_in_town, fail, wait_for]

"""The app as most tests start it: ``tests.faster:patient()`` or ``tests.faster:faster()`` instead of ``app:app``.

This is the only place where the tests change the app, and all that they change is how long it waits. ``patient()``
has the patience of the real one. ``faster()`` divides that by ``SPEED``, too: a test may then have the pretend Claude
take ``20 / SPEED`` seconds, and sees what a caller would notice of 20.
"""

import importlib
import sys

from tests.stage import SPEED

# How long tokens pile up before they are read. Nobody hears a difference, but many tests would wait for it.
PILING_UP = {"conversation": ["BATCH"]}
# How long the app waits for Claude, for tools and for other processes. Modules take these times from those before them.
PATIENCE = {
    "store": ["SIGN_OF_LIFE"],
    "conversation": ["PATIENCE", "TIMEOUT", "STALLED", "TOOL_TIMEOUT", "NOTICED"],
}
PATIENCE_OF_EXTRAS = {
    "extras.after_call": ["LOOK", "LOOK", "SETTLE", "SETTLE"],  # twice: each of its many tests waits for both
    "extras.languages": ["TRY_AGAIN"],
    "extras.think_ahead": ["STABLE"],
}


def divide(times):
    for name, constants in times.items():
        module = importlib.import_module(name)
        for constant in constants:
            setattr(module, constant, getattr(module, constant) / SPEED)


def patient():
    divide(PILING_UP)
    return importlib.import_module("app").app


def faster():
    divide(PATIENCE)
    app = patient()
    divide({name: times for name, times in PATIENCE_OF_EXTRAS.items() if name in sys.modules})
    return app

"""The stage for the tests: one app under gunicorn, with the pretend Claude behind it and the pretend Twilio in front.

Tests that need other settings, or that kill the app, start one of their own. Those that mostly wait are marked with
``@meanwhile``: they begin together, in threads, before the first test, and are looked at when their turn comes. They
have a stage to themselves, so that what Claude is asked in them disturbs nobody who counts.
"""

import concurrent.futures
import functools
import time

import pytest

from tests.claude import KEY, Claude
from tests.phone import App, Phone

TOKEN = "12345"  # the auth token of Twilio's own example
PUBLIC_URL = "https://line.example.com"
PROXY = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "203.0.113.7"}

_waiting = {}  # name of a test that mostly waits: the function, and then its future


def meanwhile(test):
    """Run this test in a thread, from the start of the session on. It takes ``stage``, and nothing else."""
    _waiting[test.__name__] = test

    @functools.wraps(test)
    def look(stage):
        _waiting[test.__name__].result()

    return look


def wait_until(true, seconds=10.0):
    """What this returns, once it is true."""
    until = time.monotonic() + seconds
    while not (now := true()):
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.02)
    return now


class Stage:
    """What a test needs for a call.

    Attributes:
        claude: the pretend Claude.
        app: the app that these tests share.
    """

    def __init__(self, claude):
        self.claude, self.app = claude, None

    def settings(self, **more):
        """Environment variables for an app of one's own; None takes one away."""
        settings = {
            "ANTHROPIC_API_KEY": KEY, "ANTHROPIC_BASE_URL": self.claude.url, "TWILIO_AUTH_TOKEN": TOKEN, **more
        }
        return {name: value for name, value in settings.items() if value is not None}

    def other_app(self, arguments="", **more):
        """An app of one's own, as a context manager."""
        return App(self.settings(**more), arguments=arguments)

    def phone(self, app=None, **more):
        """A phone that calls the way Twilio does, through a proxy that ends the encryption."""
        return Phone((app or self.app).url, TOKEN, **{"public_url": PUBLIC_URL, "headers": PROXY, **more})


@pytest.fixture(scope="session")
def stage(request):
    # Of the tests that were asked for only: ``pytest -k greeting`` waits for nothing.
    chosen = {item.name for item in request.session.items}
    with Claude() as claude, Claude() as behind, concurrent.futures.ThreadPoolExecutor(64) as threads:
        stage, backstage = Stage(claude), Stage(behind)
        # Calls longer than the default's hundred turns are made as well.
        with stage.other_app(MAX_TURNS="500") as stage.app, backstage.other_app(MAX_TURNS="500") as backstage.app:
            for name, test in _waiting.items():
                if name in chosen:
                    _waiting[name] = threads.submit(test, backstage)
            yield stage
            for test in _waiting.values():
                if not callable(test):
                    concurrent.futures.wait([test])  # before their app is taken away


@pytest.fixture
def claude(stage):
    return stage.claude


@pytest.fixture
def phone(stage):
    """A phone, and after the test a look at what Twilio would have complained about."""
    phone = stage.phone()
    yield phone
    if not phone.ended:
        phone.hang_up()
    assert phone.warnings == []


def pytest_collection_modifyitems(items):
    """Those that have been waiting come last."""
    items.sort(key=lambda item: item.name in _waiting)

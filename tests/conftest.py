"""The stage for the tests: one app under gunicorn, with the pretend Claude behind it and the pretend Twilio in front.

Tests that need other settings, or that kill the app, start an app of their own.

Tests that mostly wait are marked with ``@meanwhile``. All of them begin together, in threads,
before the first test; when their turn comes only their end is waited for. They have a stage to
themselves, so that the other tests can count what Claude was asked.
"""

import concurrent.futures
import contextlib
import time

import pytest

from tests.claude import KEY, Claude
from tests.phone import App, Phone

TOKEN = "12345"  # the auth token of Twilio's own example
PUBLIC_URL = "https://line.example.com"
PROXY = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "203.0.113.7"}
# The proxy of these tests calls from loopback, and from there gunicorn itself believes an
# X-Forwarded-Proto. A platform's proxy calls from another machine, so only the app's ProxyFix
# believes it. Hence gunicorn is told to believe one machine only, which never calls.
PROXY_ELSEWHERE = "--forwarded-allow-ips=203.0.113.9"

meanwhile = pytest.mark.meanwhile  # for a test that takes ``stage`` and nothing else


def wait_until(true, seconds=60.0):
    """What this returns, once it is true. The patience is for a busy machine."""
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

    def shared_app(self):
        """The app that the tests share, as a context manager."""
        # Calls longer than the default's hundred turns are made as well.
        return self.other_app(PROXY_ELSEWHERE, MAX_TURNS="500")

    def phone(self, app=None, **more):
        """A phone that calls the way Twilio does, through a proxy that ends the encryption."""
        app = app or self.app
        return Phone(app.url, app.token, **{"public_url": PUBLIC_URL, "headers": PROXY, **more})


@pytest.fixture(scope="session")
def stage(request):
    with contextlib.ExitStack() as stack:
        stage, backstage = (Stage(stack.enter_context(Claude())) for _ in range(2))
        for one in (stage, backstage):
            one.app = stack.enter_context(one.shared_app())
        threads = stack.enter_context(concurrent.futures.ThreadPoolExecutor(64))
        for item in request.session.items:
            if item.get_closest_marker("meanwhile"):
                item.stash[BEGUN] = threads.submit(item.function, backstage)
        yield stage
        threads.shutdown(cancel_futures=True)  # waits for the tests that have begun
        for one in (stage, backstage):
            no_traceback_in(one.app.log())


BEGUN = pytest.StashKey()  # the future of a test that has begun in a thread


def pytest_pyfunc_call(pyfuncitem):
    """Where pytest would call a test: if the test has begun already, wait for its end instead."""
    if BEGUN in pyfuncitem.stash:
        pyfuncitem.stash[BEGUN].result()
        return True
    return None


def pytest_collection_modifyitems(items):
    """Put the tests that begin at the start last: nothing then waits for them."""
    items.sort(key=lambda item: item.get_closest_marker("meanwhile") is not None)


def pytest_configure(config):
    config.addinivalue_line("markers", "meanwhile: mostly waits, so it begins at the start")


def no_traceback_in(log):
    """The only look for a traceback in a shared log: if all looked, one traceback would fail all."""
    before, traceback, after = log.partition("Traceback")
    printed = f"{before[-300:]}{traceback}{after[:3000]}"
    assert not traceback, f"some test made the app that they share print this:\n{printed}"


@pytest.fixture
def claude(stage):
    return stage.claude


@pytest.fixture
def logged(stage):
    """A function that returns what the app has printed since this test began."""
    before = len(stage.app.log())
    return lambda: stage.app.log()[before:]


@pytest.fixture
def phone(stage):
    """A phone, and after the test a look at what Twilio would have complained about."""
    phone = stage.phone()
    yield phone
    if not phone.ended:
        phone.hang_up()
    assert phone.warnings == []

"""The stage for the tests: one app under gunicorn, with the pretend Claude behind it and the pretend Twilio in front.

Tests that need other settings, or that kill the app, start an app of their own.

Tests that mostly wait are marked with ``@meanwhile``. All of them begin together, in threads,
before the first test; when their turn comes only their end is waited for. They have a stage to
themselves, so that the other tests can count what Claude was asked.
"""

import concurrent.futures
import contextlib
import dataclasses
import importlib
import multiprocessing
import os
import shutil
import sqlite3
import threading
import time
import types

import pytest

from tests.claude import KEY, Claude
from tests.phone import ROOT, App, Phone

TOKEN = "12345"  # the auth token of Twilio's own example
PUBLIC_URL = "https://line.example.com"
PROXY = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "203.0.113.7"}
# The proxy of these tests calls from loopback, and from there gunicorn itself believes an
# X-Forwarded-Proto. A platform's proxy calls from another machine, so only the app's ProxyFix
# believes it. Hence gunicorn is told to believe one machine only, which never calls.
PROXY_ELSEWHERE = "--forwarded-allow-ips=203.0.113.9"

# What an owner can switch on for Claude to do, all of it.
OTHER_NUMBER = "+15557770000"  # where calls are handed over to
EVERYTHING = {
    "LANGUAGES": "en-US,de-DE",
    "VOICES": "Polly.Joanna,Polly.Vicki",
    "SPEECH_MODEL": "experimental_conversations",
    "WEB_SEARCHES": "2",
    "HAND_OVER_TO": OTHER_NUMBER,
    "ALLOWED_CALLERS": "+15551230001",
}
# Tools that a learner might write, in the place where the shipped ones are.
OWN_TOOLS = '''\
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
    import builtins
    raise getattr(builtins, error)("a secret")


@anthropic.beta_tool
def wait_for(file: str, seconds: float = 17.0) -> str:
    """Wait until this file is there."""
    from pathlib import Path
    until = time.monotonic() + seconds
    while not Path(file).exists():
        if time.monotonic() > until:
            return "nobody came"
        time.sleep(0.02)
    return "somebody came"


'''
# Processes that tests start are copied from one server, which has loaded before what takes long. A
# test run has only one such server, so what it loads is listed here for all files.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([
    "anthropic", "twilio.rest.api.v2010.account", "twilio.twiml.voice_response",
    "tests.test_connect", "tests.test_hard_to_kill", "tests.test_readme",
])

meanwhile = pytest.mark.meanwhile  # for a test that takes ``stage`` and nothing else


SETTINGS_OF_EXTRAS = ["pin", "memory", "languages", "hand_over", "web_search", "think_ahead", "commands"]


def kinds_of_settings():
    """The dataclasses of settings: the app's own, and those of the extras."""
    from app import Settings

    return [Settings, *(importlib.import_module(f"extras.{name}").Settings for name in SETTINGS_OF_EXTRAS)]


def names_of_settings():
    return [each.name.upper() for kind in kinds_of_settings() for each in dataclasses.fields(kind)]


def read(environ):
    """All settings, as these environment variables have them."""
    from app import read_settings

    found = [vars(read_settings(kind, environ)) for kind in kinds_of_settings()]
    return types.SimpleNamespace(**{name: value for each in found for name, value in each.items()})


def let_time_pass(app, seconds, call_sid=None):
    """Make a call, or all calls, older, as another process can that has the file."""
    with contextlib.closing(sqlite3.connect(app.database, isolation_level=None, timeout=20)) as database:
        # Or what is moved inside the file would leave its trace there.
        database.execute("PRAGMA secure_delete = ON")
        moments = {"calls": ["began", "ended", "forget_at"], "turns": ["spoke_at", "touched", "given_at"]}
        for table, columns in moments.items():
            changes = ", ".join(f"{column} = {column} - {seconds}" for column in columns)
            done = database.execute(f"UPDATE {table} SET {changes} WHERE call_sid = COALESCE(?, call_sid)", [call_sid])
            assert table == "turns" or done.rowcount


def in_thread(call):
    """Start this in a thread; returns a function that waits for its result."""
    result = []
    thread = threading.Thread(target=lambda: result.append(call()))
    thread.start()

    def wait():
        thread.join()
        return result[0]

    return wait


def wait_until(true, seconds=60.0):
    """What this returns, once it is true. The patience is for a busy machine."""
    until = time.monotonic() + seconds
    while not (now := true()):
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.02)
    return now


def is_part_of(words, heard):
    """Whether this is an earlier reply as Claude is sent it: what was heard of it, to its end or
    to where the caller cut in. Callers in tests speak at once, so they often do."""
    words, _, _ = words.partition(" [The caller cut in")
    return bool(words) and heard.startswith(words)


def cannot_run(why):
    """Skip a test for which this machine lacks something; where all tests have to run, fail it."""
    if os.environ.get("VOICE_CLAUDE_ALL_TESTS") == "1":
        pytest.fail(why)
    pytest.skip(why)


class Stage:
    """What a test needs for a call.

    Attributes:
        claude: the pretend Claude.
        app: the app that these tests share.
    """

    def __init__(self, claude):
        self.claude, self.app = claude, None
        self._shared, self._one_at_a_time = {}, threading.Lock()

    def shared(self, name, **more):
        """An app that tests share, by its name: the first of them starts it, and the stage ends it."""
        with self._one_at_a_time:
            if name not in self._shared:
                self._shared[name] = self.stack.enter_context(self.other_app(**more))
            return self._shared[name]

    def settings(self, **more):
        """Environment variables for an app of one's own; None takes one away."""
        settings = {
            "ANTHROPIC_API_KEY": KEY, "ANTHROPIC_BASE_URL": self.claude.url, "TWILIO_AUTH_TOKEN": TOKEN, **more
        }
        return {name: value for name, value in settings.items() if value is not None}

    def other_app(self, arguments="", within=(), **more):
        """An app of one's own, as a context manager."""
        return App(self.settings(**more), arguments=arguments, within=within)

    def shared_app(self):
        """The app that the tests share, as a context manager."""
        # Calls longer than the default's hundred turns are made as well.
        return self.other_app(PROXY_ELSEWHERE, MAX_TURNS="500")

    @contextlib.contextmanager
    def able_app(self, folder, arguments="", **more):
        """An app with everything switched on, and with tools that a learner has added to it."""
        for name in ("app.py", "conversation.py", "store.py"):
            shutil.copy(ROOT / name, folder)
        shutil.copytree(ROOT / "extras", folder / "extras")
        conversation = folder / "conversation.py"
        before, the_list, behind = conversation.read_text().partition("TOOLS: list = [hang_up, clock")
        own = ", bus_times, buses_in_town, fail, wait_for"
        conversation.write_text(f"{before}\n\n{OWN_TOOLS}{the_list}{own}{behind}")
        settings = self.settings(**{**EVERYTHING, **more})
        with App(settings, folder=folder, arguments=arguments) as app:
            yield app

    def phone(self, app=None, **more):
        """A phone that calls the way Twilio does, through a proxy that ends the encryption."""
        app = app or self.app
        return Phone(app.url, app.token, **{"public_url": PUBLIC_URL, "headers": PROXY, **more})


@pytest.fixture(scope="session")
def stage(request):
    with contextlib.ExitStack() as stack:
        stage, backstage = (Stage(stack.enter_context(Claude())) for _ in range(2))
        for one in (stage, backstage):
            one.app, one.stack = stack.enter_context(one.shared_app()), stack
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


@pytest.fixture(scope="session")
def able(stage, tmp_path_factory):
    """An app with everything switched on that Claude can do, and with tools of one's own."""
    with stage.able_app(tmp_path_factory.mktemp("able")) as app:
        yield app
        no_traceback_in(app.log())


@pytest.fixture(scope="session")
def other_process(able, stage):
    """Another process of that app, with the same database."""
    environ = {**able.environ, "DATABASE_URL": f"sqlite:///{able.database}"}
    with App(environ, folder=able.folder) as app:
        yield app
        no_traceback_in(app.log())


@pytest.fixture(scope="session")
def unlucky():
    """A stage of its own, where Claude can't search the web.

    The app has many languages, the first of which isn't English, and everybody may call. Claude
    translates nothing before a test has set ``translator`` to a function that does.
    """
    languages = "de-DE,fr-FR,it-IT,es-ES,pt-BR,nl-NL,sv-SE,da-DK"
    settings = {**EVERYTHING, "LANGUAGES": languages, "VOICES": None, "ALLOWED_CALLERS": None}
    with Claude() as claude:
        claude.searches = False
        stage = Stage(claude)
        stage.translator = None

        def translate(phrases, language):
            wait_until(lambda: stage.translator)
            return stage.translator(phrases, language)

        claude.translate = translate
        with stage.other_app(**settings, GREETING="Guten Tag!") as stage.app:
            yield stage
            no_traceback_in(stage.app.log())


@pytest.fixture
def able_phone(able, stage):
    """A phone that calls the app with everything, and afterwards a look at what was wrong."""
    phone, refused = stage.phone(able), len(stage.claude.refused)
    yield phone
    if not phone.ended:
        phone.hang_up()
    assert phone.warnings == []
    assert stage.claude.refused[refused:] == []


@pytest.fixture
def two_processes(able, other_process, able_phone):
    """Such a phone, whose requests go to two processes in turns."""

    def next_process(heard):
        able_phone.url = other_process.url if able_phone.url == able.url else able.url

    able_phone.on_hearing = next_process
    return able_phone

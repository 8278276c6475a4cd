"""What the tests have in common: the stage with its apps and phones, and helpers that more than one file uses.

Fixtures are in conftest.py. Test files import from here, and never from each other.
"""

import contextlib
import dataclasses
import http.server
import importlib
import os
import pathlib
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import types
import urllib.error
import urllib.request

from tests.claude import KEY
from tests.forked import Forked
from tests.phone import ROOT, App, Phone

TOKEN = "12345"  # the auth token of Twilio's own example
PUBLIC_URL = "https://line.example.com"
PROXY = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "203.0.113.7"}
# The proxy of these tests calls from loopback, and from there gunicorn itself believes an
# X-Forwarded-Proto. A platform's proxy calls from another machine, so only the app's ProxyFix
# believes it. Hence gunicorn is told to believe one machine only, which never calls.
PROXY_ELSEWHERE = "--forwarded-allow-ips=203.0.113.9"

HELLO = "Hello, this is Claude speaking!"
SORRY = "Sorry, something went wrong at my end. Could you say that again?"
STORY = "Once upon a time there was a line. It was called by many people every day. It never once hung up on them."
A_DAY = 24 * 60 * 60  # seconds
FASTER = "tests.faster:faster()"  # the module of an app that is less patient than the real one
SPEED = 5  # how many times faster the app in faster.py is: its times are divided by this
CODE = ["app.py", "conversation.py", "store.py", "gunicorn.conf.py", "Procfile"]


class ForkedApp(App):
    """The app, started in a tenth of the time; with a command around it, it takes its time."""

    def start_process(self, command, environ):
        if self.within or self.inherits is not None:
            return super().start_process(command, environ)
        command = [*command, "--chdir", self.folder]  # gunicorn's default is older than the copy of its process
        return Forked(command, cwd=self.folder, env=environ, log=self.log_path)

    def stop(self):
        if self.process:
            self.kill()  # nobody is on the phone any more, so nothing has to end gracefully
        super().stop()


class Stage:
    """What a test needs for a call.

    Attributes:
        claude: the pretend Claude.
        calls: of all stages, the phones that this test has used so far. Each comes with its app and the length that the
            app's log had before.
    """

    calls: list = []

    def __init__(self, claude):
        self.claude = claude
        self._shared, self._stack = {}, contextlib.ExitStack()

    @property
    def app(self):
        """The app that most tests share."""
        # Calls longer than the default's hundred turns are made as well.
        return self.shared("app", PROXY_ELSEWHERE, MAX_TURNS="500", MAX_TURNS_A_DAY="100000")

    @property
    def faster(self):
        """The same, and it waits for nothing as long as the real one does."""
        return self.shared("faster", module=FASTER, MAX_TURNS="500", MAX_TURNS_A_DAY="100000")

    @property
    def own_tools(self):
        """The same, with the tools in own_tools.py."""
        return self.shared("own tools", module="tests.own_tools:app", MAX_TURNS="500", MAX_TURNS_A_DAY="100000")

    def shared(self, name, *arguments, **more):
        """An app that tests share, by its name. The first of them starts it, and ``end`` ends it."""
        if name not in self._shared:
            self._shared[name] = self._stack.enter_context(self.other_app(*arguments, **more))
        return self._shared[name]

    def end(self):
        """End the shared apps."""
        logs = [(name, app.log()) for name, app in self._shared.items()]
        self._stack.close()
        for name, log in logs:
            before, traceback, after = log.partition("Traceback")
            printed = f"{before[-300:]}{traceback}{after[:3000]}"
            assert not traceback, f"some test made the shared app {name!r} print this:\n{printed}"

    def settings(self, **more):
        """Environment variables for an app of one's own; None takes one away."""
        settings = {
            "ANTHROPIC_API_KEY": KEY, "ANTHROPIC_BASE_URL": self.claude.url, "TWILIO_AUTH_TOKEN": TOKEN, **more
        }
        return {name: value for name, value in settings.items() if value is not None}

    def other_app(self, arguments="", *, folder=ROOT, within=(), module="tests.faster:patient()", real=False, **more):
        """An app of one's own, as a context manager.

        Args:
            arguments: more for gunicorn.
            folder: where its code is.
            within: a command that starts another one, like prlimit, with its options.
            module: FASTER for one that waits for nothing as long as the real one does.
            real: whether to start it as a platform does, which takes a second more.
            more: its settings.
        """
        kind = App if real else ForkedApp
        module = "app:app" if real else module
        return kind(self.settings(**more), folder=folder, arguments=arguments, within=within, module=module)

    def phone(self, app=None, **more):
        """A phone that calls the way Twilio does, through a proxy that ends the encryption."""
        app = app or self.app
        phone = Phone(app.url, app.token, **{"public_url": PUBLIC_URL, "headers": PROXY, **more})
        self.calls.append((phone, app, len(app.log())))
        return phone


def report_of_calls():
    """For the report of a test that failed: what was heard in its calls, and what the apps have logged meanwhile."""
    for phone, app, before in Stage.calls:
        lines = ["What was heard:", *phone.transcript]
        if phone.warnings:
            lines += ["Twilio's debugger:", *phone.warnings]
        with contextlib.suppress(OSError):  # an app that has ended has no log any more
            of_other_calls = re.compile(rf"call (?!{phone.call_sid})CA\w+")
            log = app.log()[before:].splitlines()
            lines += ["The log:", *(line for line in log if not of_other_calls.search(line))]
        yield f"call {phone.call_sid}", "\n".join(lines)


# --- Waiting --------------------------------------------------------------------------------------


def in_thread(call):
    """Start this in a thread; returns a function that waits for its result."""
    result = []

    def run():
        try:
            result.append((call(), None))
        except BaseException as error:
            result.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()

    def wait():
        thread.join()
        value, error = result[0]
        if error:
            raise error
        return value

    return wait


def wait_until(true, seconds=60.0):
    """What this returns, once it is true. The patience is for a busy machine."""
    until = time.monotonic() + seconds
    while not (now := true()):
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.005)
    return now


# --- The database, as another process sees it -----------------------------------------------------


@contextlib.contextmanager
def open_database(path):
    """The database file, as another process opens it."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=20, check_same_thread=False)) as database:
        # Or a change that a test makes would leave old words in the file.
        database.execute("PRAGMA secure_delete = ON")
        yield database


def turns_of(app, phone, columns="words, reply"):
    """The turns of a call as they are stored, in order: a tuple for each."""
    with open_database(app.database) as database:
        return database.execute(f"SELECT {columns} FROM turns WHERE call_sid = ? ORDER BY id", [phone.call_sid]).fetchall()


def everything_in(app):
    """All bytes of the database's files."""
    files = pathlib.Path(app.database).parent.glob(pathlib.Path(app.database).name + "*")
    return b"".join(path.read_bytes() for path in files)


def let_time_pass(app, seconds, call_sid=None):
    """Make a call, or all calls, older."""
    with open_database(app.database) as database:
        moments = {"calls": ["began", "ended", "forget_at"], "turns": ["spoke_at", "touched", "given_at"]}
        for table, columns in moments.items():
            changes = ", ".join(f"{column} = {column} - {seconds}" for column in columns)
            done = database.execute(f"UPDATE {table} SET {changes} WHERE call_sid = COALESCE(?, call_sid)", [call_sid])
            assert table == "turns" or done.rowcount


def lock(app):
    """Somebody else holds the database; returns a function that lets go of it."""
    # The thread that closes it may be another one.
    database = sqlite3.connect(app.database, isolation_level=None, check_same_thread=False)
    database.execute("BEGIN EXCLUSIVE")
    return database.close


# --- Requests and settings ------------------------------------------------------------------------


def get(app, path, method="GET"):
    """A request that nobody signed; returns status and body."""
    request = urllib.request.Request(app.url + path, method=method, headers=PROXY)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def healthz(app):
    """The status with which the app answers the platform's health check."""
    return get(app, "/healthz")[0]


def kinds_of_settings():
    """The dataclasses of settings: the app's own, and those of the extras."""
    from app import Settings

    # The others, like postgres.py, may need packages that aren't installed.
    extras = [path.stem for path in sorted((ROOT / "extras").glob("*.py")) if "class Settings" in path.read_text()]
    return [Settings, *(importlib.import_module(f"extras.{name}").Settings for name in extras)]


def names_of_settings():
    """The names of all environment variables that the app and its extras read."""
    return [each.name.upper() for kind in kinds_of_settings() for each in dataclasses.fields(kind)]


def read_all_settings(environ):
    """All settings, as these environment variables have them."""
    from app import read_settings

    found = [vars(read_settings(kind, environ)) for kind in kinds_of_settings()]
    return types.SimpleNamespace(**{name: value for each in found for name, value in each.items()})


def start_fails(app):
    """Start an app that can't start; returns the reason that is printed, which is one line."""
    try:
        with app:
            raise AssertionError("it has started")
    except RuntimeError as error:
        printed = str(error)
    assert "Traceback" not in printed, printed
    (why,) = re.findall("(?m)^Voice Claude can't start: (.*)$", printed)
    return why


def copy_code(folder, tests=False):
    """Copy the app into a folder: its code and its extras, or the whole project with its tests."""
    ignore = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*.db*", ".*_cache")
    if tests:
        return shutil.copytree(ROOT, folder, ignore=ignore, dirs_exist_ok=True)
    for name in CODE:
        shutil.copy(ROOT / name, folder)
    if (ROOT / "extras").exists():
        shutil.copytree(ROOT / "extras", folder / "extras", ignore=ignore)
    return folder


# --- Claude's words -------------------------------------------------------------------------------


def is_part_of(words, heard):
    """Whether this is an earlier reply as Claude is sent it: what was heard of it, to its end or
    to where the caller cut in. Callers in tests speak at once, so they often do."""
    words, _, was_cut = words.partition("[The caller cut in")
    return bool(words or was_cut) and heard.startswith(words.strip())


def tools_of(request):
    """The tools that Claude was offered, by name."""
    return {tool["name"]: tool for tool in request.body.get("tools", [])}


def tool_lines(app, phone):
    """What the log says of this call's tools, like "turn 1: tool clock 3 ms, ok"."""
    return re.findall(rf"call {phone.call_sid} (turn \d+: tool .*)", app.log())


def turn_is_logged(app, phone, turn=1):
    """Wait until the log says that a turn has been written to its end; returns that line."""
    line = rf"(?m)^.*call {phone.call_sid} turn {turn}: first sentence.*$"
    return wait_until(lambda: re.search(line, app.log()))[0]


# --- The programs in tests/, and a line that does as it is told -----------------------------------


def flask_command(*words, environ, folder=ROOT):
    """Type ``flask`` and these words in the app's folder; returns the exit status and all that is printed."""
    with tempfile.TemporaryDirectory() as scratch:
        printed = pathlib.Path(scratch, "printed")
        process = Forked(["flask", *words], cwd=folder, env=environ, log=printed)
        try:
            status = process.wait(120)
        finally:
            process.send_signal(signal.SIGKILL)
        return status, printed.read_text()


def flask_calls(app, *arguments):
    """What ``flask calls`` prints."""
    status, printed = flask_command("calls", *arguments, environ=app.environ)
    assert status == 0, printed
    return printed


def telephone(*arguments, settings=None, **more):
    """The telephone in a terminal, as a process, in a fresh machine's environment with settings."""
    basics = {name: os.environ.get(name, "/") for name in ("PATH", "HOME")}
    basics["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "tests.phone", *arguments]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    more = {"cwd": ROOT, "env": {**basics, **(settings or {})}, "text": True, **streams, **more}
    return subprocess.Popen(command, **more)


class Script(http.server.ThreadingHTTPServer):
    """A web server that answers each path with what it is given: (status, headers, body)."""

    daemon_threads = True

    def __init__(self, answers):
        self.answers, self.asked = answers, []

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self):
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                self.server.asked.append((self.command, self.path, body.decode(), self.headers))
                answer = self.server.answers[self.path.split("?")[0]]
                # A list is one answer after the other, and the last one for ever.
                if isinstance(answer, list):
                    answer = answer.pop(0) if len(answer) > 1 else answer[0]
                status, headers, body = answer
                if callable(body):
                    body = body()
                self.send_response(status)
                for name, value in {"Content-Type": "text/xml", "Content-Length": len(body.encode()), **headers}.items():
                    self.send_header(name, str(value))
                with contextlib.suppress(ConnectionError):  # the telephone may have given up
                    self.end_headers()
                    self.wfile.write(body.encode())

            do_GET = do_POST = do_PUT = answer

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self, Phone(f"http://127.0.0.1:{self.server_address[1]}")

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


def twiml(verbs, status=200, **headers):
    """An answer for a Script: a document with these verbs."""
    return status, headers, f"<Response>{verbs}</Response>"

"""Nobody without a signature can take the line down, and neither can a disk, a clock or a server."""

import concurrent.futures
import contextlib
import http.client
import pathlib
import re
import resource
import selectors
import shutil
import signal
import socket
import sqlite3
import threading
import time

import pytest

from app import Settings
from conversation import end_of_sentences, speakable
from tests.claude import Reply
from tests.conftest import cannot_run, meanwhile, wait_until
from tests.phone import ROOT, Phone
from tests.test_hard_to_kill import everything_in, healthz, in_thread, lock, spoil

HELLO = "Hello, this is Claude speaking!"
SORRY = "Sorry, something went wrong at my end. Could you say that again?"
FORM = "Content-Type: application/x-www-form-urlencoded\r\n"


# --- Strangers ------------------------------------------------------------------------------------


def exchange(app, request):
    """Everything that comes back for these bytes, until the app closes the connection."""
    with socket.create_connection(("127.0.0.1", app.port), timeout=20) as connection:
        connection.sendall(request)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while more := connection.recv(65536):
                answer += more
    return answer


def head(path, *headers, length=1000, method="POST"):
    """The beginning of a request, whose body is still to come."""
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Content-Length: {length}", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


class Trickle:
    """205 connections, while there are 200 threads, over which a byte comes every two seconds."""

    def __init__(self, app, begin):
        self.app, self.begin, self.done = app, begin, threading.Event()

    def __enter__(self):
        self.open = [self.connect() for _ in range(205)]
        self.thread = threading.Thread(target=self.go_on)
        self.thread.start()

    def connect(self):
        connection = socket.create_connection(("127.0.0.1", self.app.port))
        connection.sendall(self.begin)
        connection.setblocking(False)
        return connection

    def go_on(self):
        while not self.done.wait(2):
            for connection in self.open:
                with contextlib.suppress(OSError):
                    connection.send(b"x")

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()
        for connection in self.open:
            connection.close()


def cpu_seconds(pid):
    """Seconds of processor time that a process has used."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


@meanwhile
def test_strangers_cost_little_and_hold_nobody_up(stage):
    with stage.other_app(MAX_TURNS_A_DAY="100000") as app:
        trickled_bodies_hold_nobody_up(stage, app)
        big_forms_cost_little(stage, app)
        malformed_bodies_are_400(stage, app)
        a_403_says_little(stage, app)
        many_first_words_at_once(stage, app)
        looks_at_its_health_cost_little(stage, app)
        assert "Traceback" not in app.log()


def trickled_bodies_hold_nobody_up(stage, app):
    form = FORM.strip()
    chunked = head("/", form).replace(b"Content-Length: 1000", b"Transfer-Encoding: chunked")
    for each in [head("/talking", form), head("/nothing", "Content-Type: text/plain"),
                 head("/healthz", method="GET"), head("/", form, length=10**9), chunked + b"400\r\n"]:
        with Trickle(app, each):
            caller = stage.phone(app)
            assert caller.call() == HELLO, each
            assert caller.webhooks[0][2] < 14, each


def big_forms_cost_little(stage, app):
    body = "&".join(f"a{number}=" for number in range(4_000)).encode()  # 31 kB
    request = head("/talking", FORM + "X-Twilio-Signature: x", length=len(body)) + body
    assert len(body) < 32 * 1024
    (worker,) = app.workers()
    before = cpu_seconds(worker)
    for _ in range(50):
        assert exchange(app, request).startswith(b"HTTP/1.1 400")
    assert (cpu_seconds(worker) - before) / 50 < 0.015, "seconds for each"


def malformed_bodies_are_400(stage, app):
    logged = len(app.log())
    for body in ["zz\r\nabc\r\n0\r\n\r\n", "-5\r\nabc\r\n0\r\n\r\n", "5\r\nabc", "3\r\nabcX\r\n0\r\n\r\n",
                 "ffffffffffffffff\r\nabc", "3;" + "x" * 9000 + "\r\nabc\r\n0\r\n\r\n", "",
                 "0\r\nbad trailer\r\n\r\n", "\r\n", "3\r\nabc\r\n"]:
        for path in "/talking", "/healthz":
            request = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n{FORM}\r\n"
            with socket.create_connection(("127.0.0.1", app.port), timeout=20) as connection:
                connection.sendall(request.encode() + body.encode())
                connection.shutdown(socket.SHUT_WR)
                answer = b"".join(iter(lambda: connection.recv(65536), b""))
            # Some of them are odd and well-formed: those are unsigned, and nothing worse.
            status = answer.partition(b" ")[2][:3]
            assert status in (b"", b"400", b"403", b"405"), (body, answer)
            assert status in (b"", b"400") or body.startswith(("3;", "0")), (body, answer)
            assert b"<Response" not in answer, body
    assert "Traceback" not in app.log()[logged:]
    assert len(app.log()) - logged < 4_000


def a_403_says_little(stage, app):
    logged = len(app.log())
    request = f"POST /talking?{'x' * 3000} HTTP/1.1\r\nHost: {'y' * 7000}\r\n"
    request += f"X-Forwarded-Host: {'z' * 7000}\r\nContent-Length: 3\r\nConnection: close\r\n{FORM}\r\nx=y"
    assert exchange(app, request.encode()).startswith((b"HTTP/1.1 403", b"HTTP/1.1 400"))
    assert len(app.log()) - logged < 500


def many_first_words_at_once(stage, app):
    def talk(number):
        phone = stage.phone(app)
        phone.call()
        words = f"First words of caller {number}."
        heard = phone.say(words)
        return None if heard.endswith(f"You said: {words}") else (heard, phone.warnings)

    with concurrent.futures.ThreadPoolExecutor(300) as threads:
        assert [wrong for wrong in threads.map(talk, range(300)) if wrong] == []


def looks_at_its_health_cost_little(stage, app):
    done = threading.Event()

    def hammer():
        looks = 0
        while not done.is_set():
            looks += healthz(app) == 200
        return looks

    looks = [in_thread(hammer) for _ in range(20)]
    phone = stage.phone(app)
    phone.call()
    try:
        for turn in range(10):
            assert phone.say(f"Turn {turn}.") == f"You said: Turn {turn}."
    finally:
        done.set()
    assert sum(wait() for wait in looks)

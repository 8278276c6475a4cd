"""What callers notice when the app is replaced under them, again and again.

    python -m tests.deploy                    each way, 20 times; some 15 minutes
    python -m tests.deploy --times 5 reload   one way, 5 times
    python -m tests.deploy --database postgres://user:password@host/name heroku     with that: leaves its tables there

The ways, each with a database that the old and the new process share, SQLite if no other is named:

    restart   SIGTERM, and a new process at once, on the same port
    patient   SIGTERM, and a new process on the same port when the old one has ended
    reload    SIGHUP: gunicorn starts new workers, and ends the old ones
    beside    SIGTTIN: gunicorn starts a worker more; when that answers SIGTTOU: gunicorn ends the oldest
    socket    like "patient", but the listening socket belongs to who starts the processes (systemd)
    heroku    a router: SIGTERM and a new process at once, elsewhere; requests wait for that
    dokku     a router: the new process runs before it is used, and the old one for some time after

Four people talk with the line all the time, and say something 3 s after they were answered. Printed is how long each
replacement took, and what became of the turns: a turn is lost where the caller was asked to say it again. It asserts
nothing. Between two tries the pretend Twilio pauses for 0.1 s; how long Twilio does is nowhere said.
"""

import argparse
import collections
import contextlib
import os
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request

from tests.claude import KEY, Claude, Reply
from tests.phone import App, Phone

CALLERS = 4
EVERY = 3.0  # seconds from one turn of a caller to the next
SIDE_BY_SIDE = 6.0  # seconds; with Dokku it is a minute, which shows no more
STARTED = "INFO Voice Claude: model"  # what the app logs when it is loaded
PATIENCE = 60.0  # seconds for a process to start or to end


class Router(socketserver.ThreadingTCPServer):
    """What a platform has before the app.

    Attributes:
        target: (host, port) of the app; while that is None the requests wait.
        failures: so many of the next requests reach the app, and are answered with 502 all the same.
    """

    allow_reuse_address = daemon_threads = True
    request_queue_size = 100

    def __init__(self):
        super().__init__(("127.0.0.1", 0), None)
        self.target, self.failures = None, 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()

    def finish_request(self, caller, _):
        """One request and its answer; or 502, if whoever is asked doesn't answer."""
        request = b""
        while not (length := re.search(rb"(?i)\r\nContent-Length: (\d+)\r\n(?:.*\r\n)*\r\n", request)) or (
                len(request) < length.end() + int(length[1])):
            request += caller.recv(65536)
        while not self.target:
            time.sleep(0.05)
        answer = b""
        with contextlib.suppress(OSError), socket.create_connection(self.target) as app:
            head, _, body = request.partition(b"\r\n\r\n")
            app.sendall(head + b"\r\nConnection: close\r\n\r\n" + body)
            while more := app.recv(65536):
                answer += more
        if self.failures:
            self.failures, answer = self.failures - 1, b""
        caller.sendall(answer or b"HTTP/1.0 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")


class Callers:
    """People who talk with the line until they are told to stop."""

    def __init__(self, url, token, fragment):
        self.url, self.token, self.fragment = url, token, fragment
        self.waits, self.trouble, self.enough = [], collections.Counter(), threading.Event()
        self.threads = [threading.Thread(target=self.talk, args=[number]) for number in range(CALLERS)]
        for thread in self.threads:
            thread.start()

    def talk(self, number):
        phone = self.dial(number)
        turn = 0
        while not self.enough.wait(EVERY):
            if phone.ended:
                phone = self.dial(number)
                continue
            turn += 1
            words, began = f"This is turn {turn}.", time.monotonic()
            heard = phone.say(words)
            self.waits.append(time.monotonic() - began)
            if phone.ended:
                self.trouble["calls lost"] += 1
                self.trouble[re.sub(r"\S+://\S+", "the line", phone.ended)] += 1
            elif f"You said: {words}" not in heard:
                self.trouble["turns lost"] += 1
        phone.hang_up()

    def dial(self, number):
        time.sleep(EVERY * number / CALLERS)  # so that they don't speak in step
        phone = Phone(self.url, self.token, retries=self.fragment)
        phone.call()
        if phone.ended:
            self.trouble["dialled in vain"] += 1
        return phone

    def stop(self):
        self.enough.set()
        for thread in self.threads:
            thread.join()


def ended(process):
    """Wait until a process has ended; if it doesn't, end it and everything it has started."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def replace(app, way):
    """Replace the app once, on its port."""
    old = app.process
    if way == "reload":
        workers = app.workers()
        app.kill(signal.SIGHUP)
        until = time.monotonic() + PATIENCE
        while set(workers) & set(app.workers()) and time.monotonic() < until:
            time.sleep(0.1)
        return
    if way == "beside":
        before = app.log().count(STARTED)
        app.kill(signal.SIGTTIN)
        until = time.monotonic() + PATIENCE
        while app.log().count(STARTED) == before and time.monotonic() < until:
            time.sleep(0.1)
        app.kill(signal.SIGTTOU)
        return
    old.send_signal(signal.SIGTERM)
    if way != "restart":
        ended(old)
    app.start()
    ended(old)


def replace_elsewhere(app, router, way, stack, arguments):
    """Replace the app once, by one on another port. Returns that."""
    new = App({**app.environ}, arguments=arguments)
    stack.push(new)
    if way == "heroku":
        router.target = None
        app.process.send_signal(signal.SIGTERM)
    new.start()
    router.target = "127.0.0.1", new.port
    if way == "dokku":
        time.sleep(SIDE_BY_SIDE)
        app.process.send_signal(signal.SIGTERM)
    ended(app.process)
    return new


def measure(way, times, arguments, log, **settings):
    """Replace the app so often in this way, and print a row of what the callers noticed."""
    with contextlib.ExitStack() as stack:
        claude = stack.enter_context(Claude(default=lambda words: Reply(f"You said: {words}", first_token=0.6)))
        settings |= {"ANTHROPIC_API_KEY": KEY, "ANTHROPIC_BASE_URL": claude.url}
        app = App({**settings, "MAX_TURNS_A_DAY": "1000000"}, arguments=arguments)
        if way == "socket":
            held = stack.enter_context(socket.create_server(("127.0.0.1", app.port), backlog=100))
            app.inherits = held.fileno()
        stack.push(app)
        app.start()
        url, router = app.url, None
        if way in ("heroku", "dokku"):
            router = Router()
            stack.callback(router.close)
            router.target, url = ("127.0.0.1", app.port), router.url
        with urllib.request.urlopen(app.url) as page:  # where the owner copies the number's URLs from
            (retries,) = set(re.findall(r"#\S*", page.read().decode())) or [""]
        callers = Callers(url, app.token, retries)
        stack.callback(callers.stop)
        began, took = time.monotonic(), []
        try:
            for number in range(times):
                time.sleep(2 * EVERY + 0.37 * (number % 8))  # so that it happens at any point of a turn
                started = time.monotonic()
                if router:
                    app = replace_elsewhere(app, router, way, stack, arguments)
                else:
                    replace(app, way)
                took.append(time.monotonic() - started)
            time.sleep(EVERY)
        except RuntimeError as error:
            print(f"! {way}: {str(error).strip().splitlines()[-1]}")
        callers.stop()
        print(app.log() if log else "", end="")
        waits = sorted(callers.waits)
        slow = [wait for wait in waits if wait > 1.0]
        print(f"{way:8}{len(took):3} times in {time.monotonic() - began:3.0f} s, each in up to"
              f" {max(took, default=0):.1f} s: {len(waits)} turns, median"
              f" {waits[len(waits) // 2]:.2f} s, {len(slow)} over 1 s, longest {waits[-1]:.2f} s;",
              ", ".join(f"{what} {count}" for what, count in callers.trouble.items()) or "nothing lost",
              flush=True)


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.deploy", description="Replace the app under its callers.")
    ways = ["restart", "patient", "reload", "beside", "socket", "heroku", "dokku"]
    parser.add_argument("ways", nargs="*", metavar="way", help=f"one of {', '.join(ways)}; all without")
    parser.add_argument("--times", type=int, default=20, help="so often each (default: %(default)s)")
    parser.add_argument("--arguments", default="", help="more for gunicorn")
    parser.add_argument("--database", help="a DATABASE_URL for the app")
    parser.add_argument("--log", action="store_true", help="print what the app has logged")
    options = parser.parse_args()
    settings = {"DATABASE_URL": options.database} if options.database else {}
    for way in options.ways or ways:
        measure(way, options.times, options.arguments, options.log, **settings)


if __name__ == "__main__":
    sys.exit(main())

"""How gunicorn serves the line. No stranger can hold its threads. And on a machine with little room
it has fewer threads: a worker that asks for one more than there is dies, with its calls.

What is here uses gunicorn's hooks: https://gunicorn.org/reference/settings/#server-hooks
"""

import contextlib
import io
import pathlib
import resource
import socket
import threading
import time

# --- Who takes too long ---------------------------------------------------------------------------
LARGEST_BODY = 32 * 1024  # bytes; a minute of speech is 12 kB at most
MOST_FIELDS = 200  # of a form: Twilio's have some 40, and each costs time before its signature does
BODY_SECONDS = 5.0  # for all of a body: half-sent and trickled ones would hold all threads


def read_in_time(wsgi_app):
    """Read the body of each request before the app looks at it, within BODY_SECONDS."""
    being_read = {}  # the connections whose body is being read: when that has to be done

    def watch():
        """One thread for all of them: a timer for each costs as much as the rest of a request."""
        while True:
            time.sleep(BODY_SECONDS / 10)
            for connection, until in list(being_read.items()):
                if time.monotonic() > until:
                    stop_reading(connection)

    def reading(environ, start_response):
        connection, length = environ["gunicorn.socket"], int(environ.get("CONTENT_LENGTH") or 0)
        if not length and "HTTP_TRANSFER_ENCODING" not in environ:
            return wsgi_app(environ, start_response)
        body, being_read[connection] = b"", time.monotonic() + BODY_SECONDS
        try:
            if length <= LARGEST_BODY:
                body = environ["wsgi.input"].read(LARGEST_BODY + 1)
        finally:  # what is malformed is an exception, and gunicorn answers it with 400
            del being_read[connection]
        if not length <= len(body) <= LARGEST_BODY or body.count(b"&") >= MOST_FIELDS:
            stop_reading(connection)  # or gunicorn itself would wait for the rest
            start_response("400 Bad Request", [("Content-Length", "0"), ("Connection", "close")])
            return []
        environ |= {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
        environ.pop("HTTP_TRANSFER_ENCODING", None)
        return wsgi_app(environ, start_response)

    with contextlib.suppress(RuntimeError):  # no thread is left: rather no limit than no call
        threading.Thread(target=watch, daemon=True).start()
    return reading


def stop_reading(connection):
    """Let nothing more come from a client."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RD)


# --- A machine with little room -------------------------------------------------------------------
THREADS_OF_ITS_OWN = 5  # of a worker, beside those that answer and those that write replies


def on_starting(server):
    """Raise the limits that may be raised, and keep within the others. The workers inherit both."""
    for limit in resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC:
        most = resource.getrlimit(limit)[1]
        with contextlib.suppress(ValueError, OSError):  # a Mac doesn't give what it calls unlimited
            resource.setrlimit(limit, (most, most))
    # A caller who waits takes two threads: one waits, and one writes the reply.
    server.cfg.set("threads", max(1, min(server.cfg.threads, most_threads(server.cfg) // 2)))
    # A quarter of all files may be connections from Twilio: whoever calls then has to wait until
    # one of them is closed. gunicorn opens one more file for each new connection, connections to
    # Claude may take another quarter, and the rest is for the database and for what is always open.
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files != resource.RLIM_INFINITY:
        connections = min(server.cfg.worker_connections, files // 4)
        server.cfg.set("worker_connections", max(1, connections))
    server.log.error_log.addFilter(cut_short)


def cut_short(record):
    """Let no stranger fill the log: gunicorn quotes what is malformed, up to 8 kB of it."""
    record.msg = str(record.msg)[:300]
    return True


on_reload = on_starting  # at SIGHUP gunicorn has read its settings anew, and forgotten these


def most_threads(cfg):
    """How many threads a worker may have: all processes of this user, or in this container, share
    what there is."""
    limits = [resource.getrlimit(resource.RLIMIT_NPROC)[0]]
    for path in "pids.max", "pids/pids.max":  # of the second and the first version of cgroups
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max" is no number
            limits.append(int(pathlib.Path("/sys/fs/cgroup", path).read_text()))
    all_of_them = min((each for each in limits if each != resource.RLIM_INFINITY), default=10**6)
    return all_of_them // cfg.workers - THREADS_OF_ITS_OWN


def post_worker_init(worker):
    """Before the first request: read it in time. And where threads are few start all of them now:
    later there may be none left, and gunicorn wouldn't survive that. Elsewhere it starts only those
    that it needs, as a turn costs less where few threads share the work."""
    worker.wsgi = read_in_time(worker.wsgi)
    if most_threads(worker.cfg) < 4 * worker.cfg.threads:  # others may want threads too
        go_on = threading.Event()
        with contextlib.suppress(RuntimeError):
            for _ in range(worker.cfg.threads):
                worker.tpool.submit(go_on.wait)
        go_on.set()

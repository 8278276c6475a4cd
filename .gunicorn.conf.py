"""What gunicorn does on a machine that gives it little: fewer threads and connections than the
Procfile asks for, rather than a worker that dies with all its calls where it gets no more.

https://gunicorn.org/reference/settings/#server-hooks
"""

import contextlib
import pathlib
import resource
import threading

THREADS_OF_ITS_OWN = 5  # of a worker, beside those that answer and those that write replies


def on_starting(server):
    """Raise the limits that may be raised, and keep within the others. The workers inherit both."""
    for limit in resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC:
        most = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (most, most))
    # A caller who waits takes two threads: one waits, and one writes the reply.
    threads = most_threads() // server.cfg.workers - THREADS_OF_ITS_OWN
    server.cfg.set("threads", max(1, min(server.cfg.threads, threads // 2)))
    # And files: a connection from Twilio, one to Claude, and some for a moment. Whoever finds
    # half of all files taken by connections waits until one is closed.
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files != resource.RLIM_INFINITY:
        connections = min(server.cfg.worker_connections, 2 * files // 5)
        server.cfg.set("worker_connections", max(1, connections))


on_reload = on_starting


def most_threads():
    """How many threads all processes of this user, or in this container, may have."""
    limits = [resource.getrlimit(resource.RLIMIT_NPROC)[0]]
    for path in "pids.max", "pids/pids.max":  # of the second and the first version of cgroups
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max" is no number
            limits.append(int(pathlib.Path("/sys/fs/cgroup", path).read_text()))
    return min((limit for limit in limits if limit != resource.RLIM_INFINITY), default=1_000_000)


def post_worker_init(worker):
    """Start all threads now. Later there may be none left, and gunicorn wouldn't survive that."""
    go_on = threading.Event()
    with contextlib.suppress(RuntimeError):
        for _ in range(worker.cfg.threads):
            worker.tpool.submit(go_on.wait)
    go_on.set()

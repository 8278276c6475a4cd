"""Starts Python programs quickly: as copies of one process that has loaded the large libraries.

To import anthropic and twilio takes a second of processor time, and the tests start the app very often. ``Forked`` has
the methods of ``subprocess.Popen`` that the tests use.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import time

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([
    "anthropic", "anthropic.resources.messages", "docstring_parser", "flask.cli", "gunicorn.app.wsgiapp",
    "gunicorn.glogging", "gunicorn.workers.gthread", "httpcore2", "pytest", "requests", "sqlite3", "tests.forked",
    "twilio.request_validator", "twilio.rest.api.v2010.account.incoming_phone_number", "twilio.twiml.voice_response",
    "werkzeug.serving",
])


class Forked:
    """A process that runs a module as ``python -m`` does.

    Args:
        command: the module and its arguments.
        cwd: the folder to run it in.
        env: its environment variables.
        log: the path of a file. What the process prints is added to that.
    """

    def __init__(self, command, *, cwd, env, log):
        self.process = PROCESSES.Process(target=run, args=([*map(str, command)], str(cwd), env, str(log)))
        self.process.start()
        self.pid = self.process.pid

    def poll(self):
        return self.process.exitcode

    returncode = property(poll)

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("a forked process", timeout)
        return self.poll()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)


def run(command, cwd, env, log):
    """What the process does."""
    os.setsid()  # so that it and its children can be ended together
    printed = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    os.chdir(cwd)
    sys.argv = command[:]
    sys.path.insert(0, cwd)
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)

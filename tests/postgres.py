"""A Postgres server of the tests' own: a real one, in a temporary folder, on a free port of loopback.

It needs what Debian's package ``postgresql`` installs, and ``pip install 'psycopg[binary,pool]'``. Like those of the
platforms it speaks TLS, with a certificate of its own making.
"""

import contextlib
import glob
import os
import pathlib
import pwd
import shutil
import subprocess
import tempfile

import pytest

from tests.phone import Phone, free_port
from tests.stage import PROXY, PUBLIC_URL, Stage

PGBOUNCER = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")  # None: not installed


def what_is_missing():
    """What this machine would need for a server, in words; empty if nothing is missing."""
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "psycopg is not installed: pip install 'psycopg[binary,pool]'"
    return "" if programs() else "no Postgres server is installed: apt-get install postgresql"


def programs():
    """The folder with the programs of the newest Postgres; None if there is none."""
    found = glob.glob("/usr/lib/postgresql/*/bin/initdb") + glob.glob("/usr/local/pgsql/bin/initdb")
    if on_path := shutil.which("initdb"):
        found.append(on_path)
    return os.path.dirname(max(found, key=lambda path: [len(path), path])) if found else None


class Server:
    """Starts in a ``with``, which also ends it, and leaves nothing of it."""

    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix="voice-claude-postgres-")
        # The server refuses to run as root. Debian's package has made this user.
        self.user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
        if self.user:
            os.chown(self.folder, pwd.getpwnam("postgres").pw_uid, -1)
        self.port = free_port()
        self.names = 0

    def __enter__(self):
        if missing := what_is_missing():
            pytest.fail(missing)
        try:
            self._run("initdb", "--no-sync", "--auth=trust", "--username=claude", "--encoding=UTF8", "--locale=C")
            key = f"{self.folder}/key.pem"
            shutil.copy(pathlib.Path(__file__).with_name("certificate.pem"), key)
            os.chmod(key, 0o600)
            if self.user:
                os.chown(key, pwd.getpwnam("postgres").pw_uid, -1)
            # Nobody needs its words after a crash of this machine.
            settings = f"port={self.port}\nlisten_addresses='127.0.0.1'\nunix_socket_directories=''\nfsync=off\n"
            settings += f"ssl=on\nssl_cert_file='{key}'\nssl_key_file='{key}'\n"
            with open(f"{self.folder}/data/postgresql.conf", "a", encoding="utf-8") as configuration:
                configuration.write(settings)
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        with contextlib.suppress(subprocess.CalledProcessError, OSError):
            self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self):
        self._run("pg_ctl", "start", "--wait", f"--log={self.folder}/log")

    def stop(self, mode="immediate"):
        """Stop it: "immediate" is a crash; "fast" is what an owner does."""
        self._run("pg_ctl", "stop", "--wait", f"--mode={mode}")

    def database(self):
        """The URL of a new, empty database."""
        self.names += 1
        self.query(self.url("postgres"), f"CREATE DATABASE calls{self.names}")
        return self.url(f"calls{self.names}")

    @contextlib.contextmanager
    def pooler(self, url):
        """The URL of a PgBouncer before this database, in the mode in which most poolers are: it lends a connection
        for one transaction. (What Debian's package ``pgbouncer`` installs.)"""
        port = free_port()
        name, configuration = url.rpartition("/")[2], pathlib.Path(self.folder, "pgbouncer.ini")
        configuration.write_text(
            f"[databases]\n{name} = host=127.0.0.1 port={self.port} user=claude\n[pgbouncer]\nlisten_port = {port}\n"
            "listen_addr = 127.0.0.1\nunix_socket_dir =\nauth_type = any\npool_mode = transaction\n"
            "default_pool_size = 4\nignore_startup_parameters = extra_float_digits\n", encoding="utf-8")
        pooler = subprocess.Popen(
            [PGBOUNCER, configuration], cwd=self.folder,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **self.user)
        try:
            yield url.replace(str(self.port), str(port))
        finally:
            pooler.kill()
            pooler.wait()

    def url(self, name):
        return f"postgres://claude:secret@127.0.0.1:{self.port}/{name}"

    @staticmethod
    def query(url, sql, values=None):
        """The rows that a query gives, if it gives any."""
        import psycopg

        with contextlib.closing(psycopg.connect(url, autocommit=True)) as connection:
            cursor = connection.execute(sql, values)
            return cursor.fetchall() if cursor.description else []

    def _run(self, program, *arguments):
        command = [pathlib.Path(programs(), program), *arguments, f"--pgdata={self.folder}/data"]
        subprocess.run(
            command, check=True, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, timeout=120, **self.user)


# --- A stage with it ------------------------------------------------------------------------------


class StageWithPostgres(Stage):
    """A stage on which all apps keep their calls in a Postgres. The apps that tests share run on two machines each.

    Attributes:
        server: the Postgres.
        database: the URL of the database that all shared apps use.
    """

    def __init__(self, claude, server):
        super().__init__(claude)
        self.server, self.database, self.pairs = server, server.database(), {}

    def settings(self, **more):
        return super().settings(**{"DATABASE_URL": more.get("DATABASE_URL") or self.server.database(), **more})

    def shared(self, name, *arguments, **more):
        if name not in self.pairs:
            start, more = super().shared, {"DATABASE_URL": self.database, **more}
            self.pairs[name] = TwoMachines([start(f"{name} {number}", *arguments, **more) for number in (1, 2)])
        return self.pairs[name]

    def other_app(self, *arguments, **more):
        app = super().other_app(*arguments, **more)
        app.database = NoFile()
        return app

    def phone(self, app=None, **more):
        app = app or self.app
        if not isinstance(app, TwoMachines):
            return super().phone(app, **more)
        phone = PhoneOfTwo(app.machines, app.token, **{"public_url": PUBLIC_URL, "headers": PROXY, **more})
        self.calls.append((phone, app, len(app.log())))
        return phone

    def query(self, sql, *values):
        """The rows that a query of the shared database gives."""
        return self.server.query(self.database, sql, values)


class NoFile:
    """Stands for the path of the SQLite file. A test that looks into that file isn't for a Postgres."""

    def __fspath__(self):
        pytest.skip("looks into the SQLite file")

    __str__ = __fspath__


class TwoMachines:
    """What tests know of an app, for two apps with one database."""

    def __init__(self, machines):
        self.machines, self.environ, self.database = machines, machines[0].environ, machines[0].database
        self.url, self.port, self.token = machines[0].url, machines[0].port, machines[0].token
        self._log, self._read = "", [0, 0]

    def log(self):
        """What both have printed so far. As a log of one machine, it grows at its end only."""
        for number, machine in enumerate(self.machines):
            new = machine.log()[self._read[number]:]
            self._read[number] += len(new)
            self._log += new
        return self._log


class PhoneOfTwo(Phone):
    """Calls a line on two machines: each request goes to another machine than the one before."""

    def __init__(self, machines, *arguments, **more):
        self.urls, self.turns = [machine.url for machine in machines], []
        super().__init__("", *arguments, **more)

    @property
    def url(self):
        self.turns.append(len(self.turns) % len(self.urls))
        return self.urls[self.turns[-1]]

    @url.setter
    def url(self, url):
        if url:  # from now on the test decides
            self.urls = [url]

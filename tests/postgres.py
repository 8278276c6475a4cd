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

from tests.phone import free_port

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

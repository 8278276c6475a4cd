"""DATABASE_URL=postgres://...: the calls are in a Postgres, which several machines can share.

A process uses 8 connections at most, unless the URL says for example ``?pool_size=20``. This needs
``pip install 'psycopg[binary,pool]'``.
"""

import contextlib
import logging
import re
import threading
import time

from app import STORES
from store import LOCK_PATIENCE, SCHEMA, TWO_HOURS, VERSION, Store, StoreError

try:
    import psycopg
    from psycopg.rows import dict_row
    from psycopg_pool import ConnectionPool
except ImportError:
    raise ValueError("a Postgres in DATABASE_URL needs psycopg:"
                     " pip install 'psycopg[binary,pool]'") from None

log = logging.getLogger("voice-claude")
logging.getLogger("psycopg.pool").setLevel(logging.CRITICAL)  # it would quote the server's messages
POOL_SIZE = 8  # connections: the smallest plans have 20, and there may be two workers
ONE_AT_A_TIME, SWEEPING = 1, 2  # numbers of advisory locks
# A pooler knows no prepared statements. A server that is silent for 3 s counts as lost.
CONNECTION: dict = dict(prepare_threshold=None, connect_timeout=2, keepalives_idle=1,
                        keepalives_interval=1, tcp_user_timeout=3000)


def activate(line) -> None:
    STORES["postgres"] = STORES["postgresql"] = PostgresStore


class Database:
    """A connection that is used like one of sqlite3."""

    def __init__(self, connection):
        self.connection = connection

    def execute(self, sql: str, values=()):
        return self.connection.execute(sql.replace("?", "%s"), values)


class PostgresStore(Store):
    """All calls, in the Postgres at this URL."""

    def __init__(self, url: str):
        address, _, query = url.partition("?")
        options = dict(each.partition("=")[::2] for each in query.split("&") if each)
        size = options.pop("pool_size", str(POOL_SIZE))
        options.pop("pgbouncer", None)  # some platforms put it there, for another library
        rest = "&".join(f"{name}={value}" for name, value in options.items())
        self._url = f"{address}?{rest}" if rest else address
        try:
            self._size = int(size)
            where = psycopg.conninfo.conninfo_to_dict(self._url)
        except (ValueError, psycopg.Error):  # whose message may hold the password
            self._size, where = 0, {}
        host, port, name = (str(where.get(each, "")) for each in ("host", "port", "dbname"))
        # A part of an unescaped "/" or "@" in the password ends up in one of these.
        if not 1 <= self._size <= 9999 or not re.fullmatch(r"[^@]*\|\d*\|[^@]*",
                                                           f"{host}|{port}|{name}"):
            raise ValueError("DATABASE_URL takes postgres://user:password@host/name, which may end"
                             " with ?pool_size=20. Write special characters as in %40 for @")
        self._pool: ConnectionPool | None = None
        self._down_until = 0.0  # on the monotonic clock
        self._mine = threading.local()  # ``database``: of this thread's transaction
        super().__init__(url)
        # As the driver understood it: the URL itself holds the password.
        self.name = f"postgres://{host}/{name}"

    def _begin_afresh(self) -> None:
        """At the start: if the server isn't there yet, calls find out."""
        try:
            with psycopg.connect(self._url, **CONNECTION) as database:
                self._drop_old_tables(database)
        except psycopg.Error as error:
            log.error("the database failed: %s", explain(error))

    def _drop_old_tables(self, database) -> None:
        """Delete the tables of another version, unless they hold words that the owner keeps."""
        database.execute("SELECT pg_advisory_xact_lock(%s)", [ONE_AT_A_TIME])
        if self._version(database) in (None, VERSION):
            return
        with contextlib.suppress(psycopg.Error), database.transaction():
            if database.execute("SELECT 1 FROM turns WHERE words <> '' AND touched < %s",
                                [time.time() - TWO_HOURS]).fetchone():
                raise ValueError("the database in DATABASE_URL holds words that another version of"
                                 " this app keeps: use another one")
        for table in ("turns", "calls", "phrases", "voice_claude", *self.extra_tables):
            database.execute(f"DROP TABLE IF EXISTS {table} CASCADE")

    @staticmethod
    def _version(database) -> int | None:
        """The version of the tables; None if there are none. The first version kept no number."""
        if database.execute("SELECT to_regclass('voice_claude')").fetchone()[0]:
            return database.execute("SELECT version FROM voice_claude").fetchone()[0]
        return database.execute("SELECT 1 WHERE to_regclass('turns') IS NOT NULL").fetchone() and 1

    def _ready(self) -> ConnectionPool:
        """The pool of this process, made when it is first needed, with the tables."""
        if time.monotonic() < self._down_until:  # nobody waits for what has just failed
            raise psycopg.OperationalError
        if self._pool:
            return self._pool
        if not self._lock.acquire(timeout=LOCK_PATIENCE):
            raise psycopg.OperationalError
        try:
            if not self._pool:
                self._make_tables()
                self._pool = ConnectionPool(
                    self._url, min_size=0, max_size=self._size, timeout=LOCK_PATIENCE,
                    max_waiting=1000, reconnect_timeout=1, configure=self._configure, open=True,
                    kwargs={**CONNECTION, "autocommit": True, "row_factory": dict_row})
            return self._pool
        except psycopg.Error:
            self._down_until = time.monotonic() + 1.0
            raise
        finally:
            self._lock.release()

    def _make_tables(self) -> None:
        with psycopg.connect(self._url, **CONNECTION) as database:
            self._drop_old_tables(database)
            if not self._version(database):
                database.execute(SCHEMA.replace("INTEGER PRIMARY KEY AUTOINCREMENT",
                                                "BIGSERIAL PRIMARY KEY"))
                database.execute("CREATE TABLE voice_claude (version INTEGER NOT NULL)")
                database.execute("INSERT INTO voice_claude VALUES (%s)", [VERSION])
            for table, columns in self.extra_tables.items():
                exists = "SELECT 1 WHERE to_regclass(%s) IS NOT NULL"
                if not database.execute(exists, [table]).fetchone():
                    database.execute(f"CREATE TABLE {table} (call_sid TEXT NOT NULL"
                                     f" REFERENCES calls ON DELETE CASCADE, {columns})")

    @staticmethod
    def _configure(connection) -> None:
        # As with SQLite, only a crash of the server itself could lose what was just written.
        connection.execute("SET synchronous_commit = off; SET lock_timeout ="
                           f" {1000 * LOCK_PATIENCE:.0f};"
                           " SET idle_in_transaction_session_timeout = 5000")

    @contextlib.contextmanager
    def transaction(self):
        if database := getattr(self._mine, "database", None):
            yield database
            return
        try:
            with self._ready().connection() as connection, connection.transaction():
                self._mine.database = Database(connection)
                try:
                    yield self._mine.database
                finally:
                    self._mine.database = None
        except psycopg.Error as error:
            if isinstance(error, psycopg.errors.UndefinedTable):
                self._pool = None  # somebody has deleted the tables: make them again
            elif self._pool:
                self._pool.check()  # after a restart of the server no connection is any good
            raise StoreError(explain(error)) from None

    _lend = transaction  # type: ignore[assignment]

    def begin(self, call_sid: str):
        with self.transaction() as database:  # one request at a time for each call
            database.execute("SELECT pg_advisory_xact_lock(hashtextextended(?, 0))", [call_sid])
            return super().begin(call_sid)

    def turns_today(self) -> int:
        with self.transaction() as database:  # only one gets the last turn of the day
            database.execute("SELECT pg_advisory_xact_lock(?)", [ONE_AT_A_TIME])
            return super().turns_today()

    def sweep(self) -> None:
        over = set(self._over)
        try:
            with self.transaction() as database:  # two sweeps at once could deadlock
                database.execute("SELECT pg_advisory_xact_lock(?)", [SWEEPING])
                super().sweep()
        except StoreError:
            self._over |= over  # nothing of it is stored
            raise

    def check(self) -> None:
        with self.transaction() as database:
            database.execute("UPDATE voice_claude SET version = version")
            database.execute("SELECT COUNT(*) FROM turns").fetchone()

    def _empty_log(self) -> None:
        """How long deleted words stay somewhere is the server's business."""
        self.wal_holds_words = False


def explain(error: Exception) -> str:
    """An error without the server's words, which might hold the password or what was said."""
    state = getattr(error, "sqlstate", None)
    return f"{type(error).__name__} {state}" if state else type(error).__name__

"""The same line on two machines, which share nothing but a Postgres; and what only a Postgres does to a line.

The requests of a call land on the two machines by turns. This needs what tests/postgres.py names.
"""

import contextlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from store import LOCK_PATIENCE, NoTurnIsLeft, StoreError
from tests.claude import Claude, Reply, Tool
from tests.phone import ROOT
from tests.postgres import PGBOUNCER, PhoneOfTwo, Server, StageWithPostgres
from tests.stage import (
    HELLO,
    PROXY,
    PUBLIC_URL,
    SORRY,
    STORY,
    ForkedApp,
    Script,
    copy_code,
    healthz,
    in_thread,
    start_fails,
    wait_until,
)


@pytest.fixture(scope="module")
def server():
    with Server() as server:
        yield server


@pytest.fixture(scope="module")
def stage(server):
    with Claude() as claude:
        stage = StageWithPostgres(claude, server)
        yield stage
        stage.end()


# --- Calls ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "groups"),
    [("a_call", []), ("claude_trouble", []), ("tools", []), ("processes", ["--all"])],  # most of the last are slow
)
def test_calls_go_as_well_as_with_sqlite(name, groups):
    """Tests of the core once more, but for those that look into the SQLite file."""
    command = [sys.executable, "-m", "pytest", "--postgres", "-p", "no:cacheprovider", *groups]
    command.append(f"tests/core/test_{name}.py")
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", ran.stdout)[1]) >= 5, ran.stdout[-2000:]


# --- Two machines ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_delivery_to_both_machines_at_once_is_one_turn(stage):
    stage.claude.when("Say it once.", Reply(STORY, first_token=0.3, pace=200))
    for attempt in range(5):
        phones = [stage.phone(machine) for machine in stage.app.machines * 2]
        for phone in phones:
            phone.params["CallSid"] = phones[0].call_sid
            phone.call()
        waits = [in_thread(lambda phone=phone: phone.say("Say it once.", token="one")) for phone in phones]
        assert [wait() for wait in waits] == [STORY] * 4
        assert len(stage.claude.asked("Say it once.")) == attempt + 1


@pytest.mark.slow
def test_the_other_machine_has_the_rest_of_a_reply_while_it_is_written(stage):
    stage.claude.when("Tell it slowly.", Reply(STORY, pace=8))
    phone = stage.phone()
    phone.call()
    assert phone.say("Tell it slowly.") == STORY
    assert len(set(phone.turns[-3:])) == 2, "both machines had a part in it"
    (request,) = stage.claude.asked("Tell it slowly.")
    assert phone.said[1][1] < wait_until(lambda: request.finished)


@pytest.mark.slow
def test_a_caller_who_goes_on_at_the_other_machine_ends_the_reply_at_the_first(stage):
    stage.claude.when("Tell me all.", Reply("This is one of very many sentences. " * 200, pace=60))
    phone = stage.phone()
    phone.call()
    phone.request("POST", "/talking", {**phone.params, "SpeechResult": "Tell me all."})
    assert phone.say("No, that is enough.") == "You said: No, that is enough."
    (request,) = stage.claude.asked("Tell me all.")
    wait_until(lambda: request.closed_by_caller)
    assert stage.query("SELECT stop FROM turns WHERE call_sid = %s ORDER BY turn", phone.call_sid)[0] == ("overtaken",)


@pytest.mark.slow
def test_a_call_that_is_over_is_forgotten_on_both_machines(stage):
    phone = stage.phone()
    phone.call()
    phone.say("A marmalade sandwich.")
    assert stage.query("SELECT words FROM turns WHERE call_sid = %s", phone.call_sid) == [("A marmalade sandwich.",)]
    phone.hang_up()
    assert stage.query("SELECT words, reply FROM turns WHERE call_sid = %s", phone.call_sid) == [("", "")]
    for machine in stage.app.machines:
        late = stage.phone(machine, CallSid=phone.call_sid)
        late.call()
        assert late.say("Late marmalade.") == "" and late.ended == "hangup"
    assert not stage.claude.asked("Late marmalade.")


@pytest.mark.slow
def test_a_call_whose_end_was_never_reported_is_forgotten_after_two_hours(stage):
    phone = stage.phone()
    phone.call()
    phone.say("Old marmalade.")
    stage.query("UPDATE calls SET forget_at = forget_at - 7201 WHERE call_sid = %s", phone.call_sid)
    assert healthz(stage.app) == 200
    assert stage.query("SELECT words, reply FROM turns WHERE call_sid = %s", phone.call_sid) == [("", "")]


@pytest.mark.slow
def test_characters_that_a_postgres_cannot_store_are_left_out(stage):
    phone = stage.phone()
    phone.call()
    assert phone.say("Nothing\0 is missing.") == "You said: Nothing is missing."


@pytest.mark.slow
def test_two_workers_on_each_machine_and_a_preload(stage):
    with stage.other_app("--preload", WEB_CONCURRENCY="2") as app:
        phones = [stage.phone(app) for _ in range(8)]
        for phone in phones:
            phone.call()
        for turn in range(2):
            waits = [in_thread(lambda phone=phone: phone.say(f"Is it {turn}?")) for phone in phones]
            assert [wait() for wait in waits] == [f"You said: Is it {turn}?"] * 8


@pytest.mark.slow
def test_the_other_machine_goes_on_when_one_is_killed_in_mid_reply(stage):
    first = "Once upon a time there was a line."
    stage.claude.when("Tell me a tale.", Reply(f"{first} It was", ending="stall"))
    with stage.other_app(WEB_CONCURRENCY="2", DATABASE_URL=stage.database) as app:
        phone = stage.phone(app)
        phone.call()
        phone.say("My name is Ann.")

        def kill(text):  # as soon as the caller hears the first sentence
            app.kill(signal.SIGKILL)
            phone.url = stage.app.machines[0].url  # as the platform's router does

        phone.on_hearing = kill
        heard = phone.say("Tell me a tale.")
        phone.on_hearing = None
        assert heard.startswith(first) and heard.endswith(SORRY) and phone.warnings == []
        assert phone.say("Who am I?") == "You said: Who am I?"
        (request,) = stage.claude.asked("Who am I?")
        assert request.messages[0] == ("user", "My name is Ann.") and ("assistant", first) in request.messages


@pytest.mark.slow
def test_behind_a_pooler_that_lets_no_news_through(stage):
    if not PGBOUNCER:
        pytest.fail("there is no PgBouncer: apt-get install pgbouncer")
    stage.claude.when("Tell it to the pool.", Reply(STORY, pace=8))
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(stage.server.pooler(stage.server.database()))
        machines = [stack.enter_context(stage.other_app(DATABASE_URL=url)) for _ in range(2)]
        phone = PhoneOfTwo(machines, machines[0].token, public_url=PUBLIC_URL, headers=PROXY)
        phone.call()
        assert phone.say("Tell it to the pool.") == STORY
        assert len(set(phone.turns[-3:])) == 2, "both machines had a part in it"
        assert phone.say("And you?") == "You said: And you?"
        with ThreadPoolExecutor(20) as threads:
            assert set(threads.map(lambda _: healthz(machines[0]), range(40))) == {200}
        phone.hang_up()
        assert phone.warnings == [] and "Traceback" not in machines[0].log() + machines[1].log()


@pytest.mark.slow
def test_the_connections_are_encrypted(stage):
    phone = stage.phone()
    phone.call()
    phone.say("Is anybody listening?")
    encrypted = stage.query("SELECT ssl, count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)"
                            " WHERE datname = current_database() AND backend_type = 'client backend'"
                            " GROUP BY ssl")
    assert [ssl for ssl, _ in encrypted] == [True]


# --- The server fails -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_server_that_restarts_or_is_gone_for_five_seconds(stage):
    phone, early, late = stage.phone(), stage.phone(), stage.phone()
    for one in (phone, early):
        one.call()
        one.say("Hello?")
    stage.claude.when("Talk on.", Reply(STORY, pace=8))
    phone.on_hearing = lambda text: stop.pop()() if stop else None
    stop = [stage.server.stop]
    heard = in_thread(lambda: phone.say("Talk on."))
    wait_until(lambda: not stop)
    wait_until(lambda: healthz(stage.app) == 503)
    began = time.monotonic()
    assert early.say("Are you well?") == SORRY
    assert late.call() == HELLO, "the greeting needs no database"
    assert late.say("Are you well?") == SORRY
    time.sleep(max(0, began + 5 - time.monotonic()))
    stage.server.start()
    heard = heard()
    assert heard.startswith("Once upon a time") and heard.endswith(SORRY)
    for one in (phone, early, late):
        assert one.say("And now?") == "You said: And now?"
        assert one.warnings == [] and max(seconds for _, _, seconds, _ in one.webhooks) < 14
    for reply, ended in stage.query(
            "SELECT reply, stop FROM turns WHERE call_sid = %s ORDER BY turn", phone.call_sid):
        assert ended and reply.count("Once") <= 1, "nothing is kept twice, and no reply is left without an end"
    assert stage.query("SELECT count(*) FROM turns WHERE call_sid = %s", phone.call_sid) == [(3,)]
    stage.server.stop("fast")
    stage.server.start()
    assert [healthz(machine) for machine in stage.app.machines for _ in range(3)][-1] == 200
    assert phone.say("And at last?") == "You said: And at last?"
    log = stage.app.log()
    assert "ERROR the database failed: " in log and "secret" not in log
    assert "error connecting" not in log, "a message of the server may hold secrets"


def connections_to(server):
    """How many connections have come since the last look."""
    server.setblocking(False)
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            server.accept()[0].close()
            count += 1
    return count


@pytest.mark.slow
def test_a_call_does_not_wait_again_for_a_server_that_has_just_been_silent(stage):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://me@127.0.0.1:{silent.getsockname()[1]}/calls"
        with stage.other_app(DATABASE_URL=url) as app:
            wait_until(lambda: "the database failed: ConnectionTimeout" in app.log())  # already at the start
            time.sleep(1.1)  # until the app tries again
            assert connections_to(silent) == 1
            assert stage.phone(app).call() == HELLO
            assert connections_to(silent) == 1, "for two statements: one of them doesn't even try"


# --- The store, in several processes as it were ---------------------------------------------------


@pytest.fixture
def stores(server):
    """Eight stores on one new database, as eight processes have them."""
    from extras.postgres import PostgresStore

    url = server.database()
    stores = [PostgresStore(f"{url}?pool_size=3") for _ in range(8)]
    for store in stores:
        store.url, store.database = url, url.rpartition("/")[2]
    yield stores
    name = url.rpartition("/")[2]
    server.query(server.url("postgres"), f"DROP DATABASE {name} WITH (FORCE)")
    for store in stores:
        with pytest.raises(StoreError):  # and so it closes its connections
            store.check()


def together(jobs):
    """What these functions return, when all are called at the same moment."""
    barrier = threading.Barrier(len(jobs))

    def at_once(job):
        barrier.wait(60)
        return job()

    with ThreadPoolExecutor(len(jobs)) as threads:
        return list(threads.map(at_once, jobs))


@pytest.mark.slow
def test_eight_processes_at_once_on_a_new_database_and_one_delivery(stores):
    begun = together([lambda store=store: store.turn("CA1", "the same", "Hello?", 0.0, 100, 9) for store in stores])
    assert [turn for turn, _ in begun] == [1] * 8 and sum(row_id is not None for _, row_id in begun) == 1
    for turn in range(2, 12):  # and in a call that is on already
        begun = together([lambda store=store: store.turn("CA1", f"{turn}", "And?", 0.0, 100, 99) for store in stores])
        assert [number for number, _ in begun] == [turn] * 8
        assert sum(row_id is not None for _, row_id in begun) == 1


@pytest.mark.slow
def test_the_last_turns_of_a_day_are_given_once(stores):
    def begin(most, nth):
        try:
            return stores[nth % 8].turn(f"CA{most} {nth}", None, "Hello?", time.time(), 100, most)[0]
        except NoTurnIsLeft:
            return 0

    assert together([store.turns_today for store in stores]) == [0] * 8, "from now on all are connected"
    for most in range(5, 55, 5):
        begun = together([lambda most=most, nth=nth: begin(most, nth) for nth in range(16)])
        assert sorted(begun) == [0] * 11 + [1] * 5


@pytest.mark.slow
def test_two_hundred_threads_share_few_connections(server, stores):
    (store, *_), seen = stores, []
    _, row_id = store.turn("CA1", None, "Hello?", 0.0, 100, 9)
    look = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s"
    with ThreadPoolExecutor(200) as threads:
        grown = [threads.submit(store.grow, row_id, "a") for _ in range(600)]
        seen.append(server.query(server.url("postgres"), look, [store.database])[0][0])
        assert all(one.result() for one in grown)
    seen.append(server.query(server.url("postgres"), look, [store.database])[0][0])
    assert 1 <= max(seen) <= 3
    (row,) = store.turns("CA1")
    assert row["reply"] == "a" * 600


@pytest.mark.slow
def test_a_process_sees_soon_what_another_one_writes(stores):
    def until(store, heard):
        while len((row := store.wait("CA1", 1, heard))["reply"]) <= heard:
            pass
        return row

    here, there, *_ = stores
    _, row_id = here.turn("CA1", None, "Hello?", 0.0, 100, 9)
    waits = in_thread(lambda: until(there, 0))
    here.grow(row_id, "")
    here.grow(row_id, "Hello. ")
    assert waits()["reply"] == "Hello. "
    waits = in_thread(lambda: until(here, 7))
    there.grow(row_id, "And more. ")
    assert waits()["reply"] == "Hello. And more. "


@pytest.mark.slow
def test_a_lock_on_one_call_holds_up_nobody_for_long(server, stores):
    import psycopg

    stores[0].turn("CA1", None, "Hello?", 0.0, 100, 9)
    with contextlib.closing(psycopg.connect(stores[0].url)) as other:
        other.execute("SELECT * FROM turns FOR UPDATE")
        began = time.monotonic()
        with pytest.raises(StoreError, match="LockNotAvailable"):
            stores[0].turn("CA1", None, "And now?", 0.0, 100, 9)
        assert LOCK_PATIENCE / 2 < time.monotonic() - began < 30
        assert stores[0].turn("CA2", None, "Another call.", 0.0, 100, 9)[0] == 1
    assert stores[0].turn("CA1", None, "And now?", 0.0, 100, 9)[0] == 2


# --- Extras on a Postgres -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.needs("after_call", "errand", "commands")
def test_a_call_with_a_purpose_moves_to_another_machine_and_is_reported_once(stage):
    with Script({"/hook": (200, {}, "")}) as (server, receiver), contextlib.ExitStack() as stack:
        settings = dict(AFTER_CALL_URL=f"{receiver.url}/hook", AFTER_CALL_SUMMARY="no", DATABASE_URL=stage.server.database(),
                        ALLOWED_CALLERS="+15557654321")
        one, other = (stack.enter_context(stage.other_app(**settings)) for _ in range(2))
        called = {"To": "+15557654321", "From": "+15550009999", "Direction": "outbound-api"}
        purpose = {**called, "Purpose": "Tell them both.", "CallSid": "errand"}
        name = stage.phone(one).request("POST", "/errand", purpose).body.decode()
        wait_until(lambda: f"call {name} turn 1: " in one.log())
        phone = stage.phone(other, **called)
        assert phone.webhook(f"/?errand={name}").startswith("You said: [The owner of this phone line")
        phone.hang_up()
        wait_until(lambda: "report delivered" in one.log() + other.log())
        assert len([body for _, _, body, _ in server.asked if phone.call_sid in body]) == 1
        assert "Traceback" not in one.log() + other.log()


@pytest.mark.slow
@pytest.mark.needs("memory")
def test_a_caller_is_known_again_and_forgotten(stage):
    proved = {"StirVerstat": "TN-Validation-Passed-A"}
    forget = Reply("Well.", blocks=[Tool("forget_me")], then=Reply("Forgotten."))
    stage.claude.when("[The call of now begins.] Forget me.", forget)
    with stage.other_app(KEEP_DAYS="3", DATABASE_URL=stage.server.database()) as app:
        for words, before in ("I am Bo.", 0), ("Who am I then?", 2), ("Forget me.", 4), ("And who am I now?", 0):
            phone = stage.phone(app, **proved)
            phone.call()
            phone.say(words)
            phone.hang_up()
            sent = next(one for one in stage.claude.requests if one.words.endswith(words)).messages
            assert len(sent) == before + 1, words
            assert phone.warnings == []
        assert "Traceback" not in app.log()


@pytest.mark.slow
@pytest.mark.needs("languages")
def test_a_call_in_another_language(stage):
    settings = {"LANGUAGES": "de-DE", "GREETING": "Guten Tag!", "DATABASE_URL": stage.server.database()}
    with stage.other_app(**settings) as app:
        phone = stage.phone(app)
        phone.call()
        phone.stay_silent()
        wait_until(lambda: phone.webhook("/talking") == "de-DE: Are you still there?")
        assert "Traceback" not in app.log()


@pytest.mark.slow
@pytest.mark.needs("think_ahead")
def test_a_guess_comes_true_on_the_other_machine(stage):
    stage.claude.when("who is there at last", Reply(STORY, first_token=0.3, pace=40))
    url = stage.server.database()
    with contextlib.ExitStack() as stack:
        one, other = (stack.enter_context(stage.other_app(THINK_AHEAD="yes", DATABASE_URL=url)) for _ in range(2))
        phone = stage.phone(one)
        phone.call()
        phone.partial_result("who is there at last", 1)
        wait_until(lambda: stage.claude.asked("who is there at last"))
        phone.url = other.url
        assert phone.say("Who is there at last?") == STORY
        assert not stage.claude.asked("Who is there at last?")
        assert "Traceback" not in one.log() + other.log()


# --- The start ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tables_of_another_version_are_replaced_unless_they_hold_words_that_are_kept(stage):
    server, url = stage.server, stage.server.database()
    with stage.other_app(DATABASE_URL=url) as app:
        phone = stage.phone(app)
        phone.call()
        phone.say("Keep this for me.")
    server.query(url, "UPDATE voice_claude SET version = 1")
    server.query(url, "UPDATE turns SET touched = touched - 3 * 3600")
    why = start_fails(stage.other_app(DATABASE_URL=url))
    assert why == "the database in DATABASE_URL holds words that another version of this app keeps: use another one."
    assert server.query(url, "SELECT words FROM turns") == [("Keep this for me.",)]
    server.query(url, "UPDATE turns SET touched = touched + 3 * 3600")  # a call that is on
    with stage.other_app(DATABASE_URL=url) as app:
        phone = stage.phone(app)
        assert phone.call() == HELLO and phone.say("And now?") == "You said: And now?"
        assert server.query(url, "SELECT words FROM turns") == [("And now?",)]


def test_without_psycopg_the_start_says_how_to_install_it(tmp_path):
    (copy_code(tmp_path) / "psycopg.py").write_text("raise ImportError('no pq wrapper available')")
    app = ForkedApp({"DATABASE_URL": "postgres://claude:secret@127.0.0.1/calls"}, folder=tmp_path)
    why = start_fails(app)
    assert "pip install 'psycopg[binary,pool]'" in why and "secret" not in why


@pytest.mark.slow
def test_the_log_names_the_database_without_its_password(stage):
    assert f"database postgres://127.0.0.1/{stage.database.rpartition('/')[2]}, " in stage.app.log()
    assert "secret" not in stage.app.log()


@pytest.mark.slow
@pytest.mark.parametrize("url", [
    "postgres://h/d?pool_size=0", "postgres://h/d?pool_size=many", "postgres://app:s%zzsecret@h/d",
    "postgres://app:se/secret@h/d", "postgres://app:a@secret@h/d", "postgres://h:secret/d"])
def test_a_url_that_cannot_be_used_is_refused(stage, url):
    why = start_fails(stage.other_app(DATABASE_URL=url))
    assert why.startswith("DATABASE_URL takes postgres://") and "secret" not in why


@pytest.mark.slow
@pytest.mark.parametrize("password", ["se%40cret%25word", "se%2Fcret%3Fword"])
def test_a_password_is_never_logged(stage, password):
    with stage.other_app(DATABASE_URL=f"postgres://claude:{password}@127.0.0.1:1/calls") as app:
        assert "ERROR the database failed: OperationalError" in app.log(), "the owner reads it before the first call"
        phone = stage.phone(app)
        phone.call()
        assert phone.say("Hello?") == SORRY
        assert "database postgres://127.0.0.1/calls, " in app.log()
        assert "cret" not in app.log()


@pytest.mark.slow
@pytest.mark.parametrize("options", ["?pool_size=2&sslmode=require", "?sslmode=require&pgbouncer=true&pool_size=2"])
def test_options_may_stand_anywhere_in_the_url(stage, options):
    with stage.other_app(DATABASE_URL=stage.database + options) as app:
        phone = stage.phone(app)
        phone.call()
        assert phone.say("Is it encrypted?") == "You said: Is it encrypted?"

"""The database file: words are deleted in time, disks and other programs make trouble, and a day has a limit."""

import concurrent.futures
import contextlib
import pathlib
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
import time

import pytest

from store import CallIsOver, Store
from tests.claude import Reply
from tests.forked import PROCESSES
from tests.stage import (
    A_DAY,
    FASTER,
    HELLO,
    SORRY,
    STORY,
    everything_in,
    healthz,
    in_thread,
    let_time_pass,
    lock,
    open_database,
    start_fails,
    turns_of,
    wait_until,
)

FIRST_SENTENCE = "Once upon a time there was a line."


@pytest.fixture(scope="module")
def app(stage):
    """An app with a database of its own. The tests lock it, spoil it and replace it, and leave it in order."""
    with stage.other_app(MAX_TURNS="500") as app:
        yield app
        assert "Traceback" not in app.log()


def end_is_reported(phone, status="completed"):
    """Twilio reports how the call goes; returns the status of the app's answer."""
    return phone.request("POST", "/status_callback", {**phone.params, "CallStatus": status}).status


@contextlib.contextmanager
def locked(app):
    """Somebody else holds the database."""
    unlock = lock(app)
    try:
        yield
    finally:
        unlock()


@contextlib.contextmanager
def read_by_a_backup(app):
    """Somebody else reads the database in one long transaction."""
    with open_database(app.database) as backup:
        backup.execute("BEGIN")
        assert backup.execute("SELECT COUNT(*) FROM turns").fetchone()[0]
        yield


@contextlib.contextmanager
def refused(app, table, changes=("UPDATE", "DELETE"), when="TRUE", how="SELECT RAISE(ABORT, 'no');"):
    """The database refuses some changes of a table, as a disk may in the middle of it all; and it does so at once."""
    with open_database(app.database) as database:
        for change in changes:
            trigger = f"CREATE TRIGGER no_{change} BEFORE {change} ON {table} WHEN {when}"
            database.execute(f"{trigger} BEGIN {how} END")
        try:
            yield database
        finally:
            for change in changes:
                database.execute(f"DROP TRIGGER no_{change}")


# --- Words are deleted ----------------------------------------------------------------------------


def test_a_call_that_is_over_leaves_no_word_behind(stage, app):
    phone = stage.phone(app)
    phone.call()
    phone.say("A marmalade sandwich.")
    phone.say("With tarragon.")
    assert b"marmalade" in everything_in(app) and b"tarragon" in everything_in(app)
    phone.hang_up()
    assert b"marmalade" not in everything_in(app) and b"tarragon" not in everything_in(app)


def test_words_that_come_after_the_end_are_not_stored(stage, app):
    phone = stage.phone(app)
    phone.call()
    phone.say("Early cardamom.")
    phone.hang_up()
    late = stage.phone(app, CallSid=phone.call_sid)
    late.call()
    assert late.say("Late cardamom.") == "" and late.ended == "hangup"
    assert b"cardamom" not in everything_in(app) and not stage.claude.asked("Late cardamom.")


def test_the_end_of_a_call_may_come_before_its_first_words(stage, app):
    phone = stage.phone(app)
    phone.call()
    assert end_is_reported(phone) == 204
    assert phone.say("Words that Twilio delivers last.") == "" and phone.ended == "hangup"
    assert not stage.claude.asked("Words that Twilio delivers last.")


@pytest.mark.parametrize("status", ["queued", "initiated", "ringing", "in-progress"])
def test_a_status_that_is_not_the_end_forgets_nothing(phone, claude, status):
    phone.call()
    phone.say("Remember the chervil.")
    assert end_is_reported(phone, status) == 204
    assert phone.say(f"Do you still, {status}?") == f"You said: Do you still, {status}?"
    (request,) = claude.asked(f"Do you still, {status}?")
    assert request.messages[0] == ("user", "Remember the chervil.")


@pytest.mark.parametrize("status", ["completed", "busy", "failed", "no-answer", "canceled"])
def test_a_status_that_is_the_end_forgets_the_words(stage, phone, status):
    phone.call()
    phone.say("Forget the chervil.")
    phone.hang_up(status)
    assert turns_of(stage.app, phone) == [("", "")]


@pytest.mark.parametrize("occasion", ["another call comes in", "the platform looks"])
def test_a_call_whose_end_is_never_reported_is_forgotten_after_two_hours(stage, app, occasion):
    old, new = stage.phone(app), stage.phone(app)
    old.call()
    old.say("Old coriander.")
    let_time_pass(app, 2 * 3600 - 60, old.call_sid)
    new.call()
    new.say("New basil.")
    assert b"coriander" in everything_in(app)
    let_time_pass(app, 61, old.call_sid)
    if occasion == "another call comes in":
        stage.phone(app).call()
    else:
        assert healthz(app) == 200
    assert b"coriander" not in everything_in(app) and b"basil" in everything_in(app)
    old.say(f"What did I say before {occasion}?")
    (request,) = stage.claude.asked(f"What did I say before {occasion}?")
    assert len(request.messages) == 1, "the caller may go on, and Claude begins anew"
    new.say(f"What did I say when {occasion}?")
    (request,) = stage.claude.asked(f"What did I say when {occasion}?")
    assert request.messages[0] == ("user", "New basil.")


def test_a_call_may_last_longer_than_two_hours(stage, app):
    phone = stage.phone(app)
    phone.call()
    for turn in range(3):
        phone.say(f"Long turn {turn}.")
        let_time_pass(app, 1.5 * 3600, phone.call_sid)
    phone.say("How did this long call begin?")
    (request,) = stage.claude.asked("How did this long call begin?")
    assert request.messages[0] == ("user", "Long turn 0.")


def test_a_call_that_goes_on_after_two_hours_of_silence_is_forgotten_again(stage, app):
    phone = stage.phone(app)
    phone.call()
    phone.say("Before the silence.")
    let_time_pass(app, 2 * 3600 + 1, phone.call_sid)
    assert healthz(app) == 200
    phone.say("After the fenugreek.")
    phone.hang_up()
    assert turns_of(app, phone) == [("", ""), ("", "")]
    assert b"fenugreek" not in everything_in(app)


def test_a_day_later_nothing_is_left_of_a_call(stage, app):
    unended, ended = stage.phone(app), stage.phone(app)
    for phone in (unended, ended):
        phone.call()
        phone.say("A lavender cake.")
    ended.hang_up()
    assert b"lavender" in everything_in(app)
    let_time_pass(app, 2 * 3600 + 60)
    assert healthz(app) == 200
    assert b"lavender" not in everything_in(app)
    assert unended.call_sid.encode() in everything_in(app), "its turn still counts for the limit of a day"
    let_time_pass(app, A_DAY)
    for _ in range(2):  # nor do they come back
        assert healthz(app) == 200
    assert unended.call_sid.encode() not in everything_in(app)
    assert ended.call_sid.encode() not in everything_in(app), "or the file would grow for ever"


@pytest.mark.parametrize("table", ["calls", "turns"])
def test_the_end_of_a_call_is_stored_as_a_whole_or_not_at_all(stage, app, table):
    phone = stage.phone(app)
    phone.call()
    phone.say("A caraway roll, please.")
    with refused(app, table) as database:
        assert end_is_reported(phone) == 503
        both = "SELECT ended, words FROM calls JOIN turns USING (call_sid) WHERE call_sid = ?"
        assert database.execute(both, [phone.call_sid]).fetchall() == [(None, "A caraway roll, please.")]
    assert healthz(app) == 200  # the next request, whoever makes it
    assert b"caraway" not in everything_in(app)
    assert phone.say("Is it over?") == "" and phone.ended == "hangup"


@pytest.mark.slow
def test_the_next_request_deletes_words_if_the_file_was_locked_at_the_end_of_the_call(stage, app):
    phone = stage.phone(app)
    phone.call()
    phone.say("A fennel soup.")
    with locked(app):
        assert end_is_reported(phone) == 503  # Twilio reports it once more, or doesn't
        assert b"fennel" in everything_in(app)
    assert healthz(app) == 200
    assert b"fennel" not in everything_in(app)


def test_words_are_gone_although_a_backup_read_them_at_the_end_of_the_call(stage, app):
    phone, other = stage.phone(app), stage.phone(app)
    phone.call()
    phone.say("A saffron bun.")
    with read_by_a_backup(app):
        phone.hang_up()
        other.call()
        for _ in range(3):
            assert other.say("Am I held up?") == "You said: Am I held up?"
        assert min(seconds for *_, seconds, _ in other.webhooks) < 1, "nobody waits for the end of the backup"
        # Last of all: to close the files in this process releases the backup's locks.
        assert b"saffron" in everything_in(app)
    assert healthz(app) == 200
    assert b"saffron" not in everything_in(app)


@pytest.mark.slow
def test_words_are_gone_although_the_app_was_killed_while_a_backup_read_them(stage):
    with stage.other_app() as app:
        phone = stage.phone(app)
        phone.call()
        phone.say("A nutmeg biscuit.")
        with open_database(app.database) as backup:
            backup.execute("BEGIN")
            assert backup.execute("SELECT COUNT(*) FROM turns").fetchone()[0]
            phone.hang_up()
            app.kill()
            app.process.wait()
            app.start()
            assert healthz(app) == 200
            assert b"nutmeg" in everything_in(app)
            backup.execute("ROLLBACK")  # and the file stays open: to close it would delete them as well
            assert healthz(app) == 200
            assert b"nutmeg" not in everything_in(app)


# --- The disk fails -------------------------------------------------------------------------------


def forbid(app):
    """No file can be made there: a folder has its name, and so root is refused as well."""
    for file in pathlib.Path(app.scratch).glob("calls.db*"):
        file.unlink()
    pathlib.Path(app.database).mkdir()
    return pathlib.Path(app.database).rmdir


def fill(app):
    """No file can grow beyond a page, as on a full disk."""
    (worker,) = app.workers()
    before = resource.prlimit(worker, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    return lambda: resource.prlimit(worker, resource.RLIMIT_FSIZE, before)


def spoil(app):
    """The file is something else than a database."""
    for file in pathlib.Path(app.scratch).glob("calls.db*"):
        file.unlink()
    pathlib.Path(app.database).write_bytes(b"This is not a database. " * 4096)


def calls_go_on_after(stage, app, trouble):
    """Callers hear an apology while a disk is in trouble, and are understood again as soon as it works."""
    early, late = stage.phone(app), stage.phone(app)
    early.call()
    assert early.say("Hello?") == "You said: Hello?"
    assert healthz(app) == 200
    logged = len(app.log())
    mend = trouble(app)
    try:
        if trouble is forbid:
            assert healthz(app) == 503  # which is what notices that a file is gone
        assert early.say("Are you well?") == SORRY
        assert late.call() == HELLO, "the greeting needs no disk"
        assert late.say("Are you well?") == SORRY
        assert healthz(app) == 503
        if trouble is not fill:  # the log is a file as well
            log = app.log()[logged:]
            assert f": {app.database}" in log and "ERROR the database failed: " in log and "Traceback" not in log
    finally:
        mend()
    assert healthz(app) == 200
    for phone in (early, late):
        assert phone.say("And now?") == "You said: And now?"
        assert phone.warnings == [] and max(seconds for *_, seconds, _ in phone.webhooks) < 10


def test_calls_go_on_when_the_disk_works_again(stage, app):
    calls_go_on_after(stage, app, forbid)


@pytest.mark.slow
def test_calls_go_on_when_the_disk_has_room_again(stage):
    with stage.other_app() as app:
        calls_go_on_after(stage, app, fill)


@pytest.mark.slow
def test_calls_go_on_when_the_file_is_no_longer_locked(stage, app):
    calls_go_on_after(stage, app, lock)


@pytest.mark.slow
def test_the_caller_hears_an_apology_while_the_file_is_locked(stage, app):
    phone = stage.phone(app)
    phone.call()
    logged = len(app.log())
    with stage.other_app(DATABASE_URL=f"sqlite:///{app.database}") as other:
        assert healthz(other) == 200
        with locked(app):
            health = in_thread(lambda: healthz(other))
            assert phone.say("Is it locked?") == SORRY
            assert health() == 503, "to read would still work, so it writes as well"
    assert f"ERROR the database failed: database is locked: {app.database}" in app.log()[logged:]
    assert phone.say("And now?") == "You said: And now?"
    assert not stage.claude.asked("Is it locked?") and phone.warnings == []


@pytest.mark.slow
def test_nobody_waits_long_for_a_locked_file(stage, app):
    """Twilio's 15 seconds are for Claude."""
    phone = stage.phone(app)
    phone.call()
    phone.say("Hello?")
    answers = {
        "words": lambda: phone.say("How long is it locked?"),
        "the end": lambda: end_is_reported(phone),
        "health": lambda: healthz(app),
    }
    with locked(app):
        for name, answer in answers.items():
            began = time.monotonic()
            answer()
            assert time.monotonic() - began < 5, name
    assert healthz(app) == 200


@pytest.mark.slow
def test_words_wait_while_another_process_writes(stage, app):
    phone, other = stage.phone(app), stage.phone(app)
    for each in (phone, other):
        each.call()
        each.say("Hello?")
    other.hang_up()  # the app then empties SQLite's log, for which it doesn't wait
    with locked(app):
        heard = in_thread(lambda: phone.say("Will you wait a moment?"))
        time.sleep(0.4)  # seconds, in which the words come
    assert heard() == "You said: Will you wait a moment?"


def test_a_backup_that_reads_the_file_holds_nobody_up(stage, app):
    phone = stage.phone(app)
    phone.call()
    phone.say("Hello?")
    with read_by_a_backup(app):
        assert phone.say("Are you free?") == "You said: Are you free?"
        assert healthz(app) == 200


@pytest.mark.parametrize("whether", ["while the app runs", "before the app starts again"])
def test_a_corrupted_file_is_put_aside_and_silences_nobody(stage, whether):
    with stage.other_app() as app:
        early, late = stage.phone(app), stage.phone(app)
        early.call()
        early.say("Hello?")
        spoil(app)
        if whether == "before the app starts again":
            app.kill()
            app.process.wait()
            app.start()
        healthz(app)  # which notices that the file is another one
        assert late.call() == HELLO
        assert early.say("Are you well?") in (SORRY, "You said: Are you well?"), "the first may find out"
        for phone in (early, late):
            assert phone.say("And now?") == "You said: And now?"
            assert phone.warnings == []
        assert healthz(app) == 200
        aside = pathlib.Path(app.database + ".corrupted")
        assert aside.read_bytes().startswith(b"This is not a database."), "it can be mended"
        assert turns_of(app, late) == [("And now?", "You said: And now? ")], "in a new file"
        assert re.search("ERROR .*calls.db is corrupted", app.log()) and "Traceback" not in app.log()


@pytest.mark.parametrize("whose", ["nobody's", "an older copy"])
def test_a_file_that_somebody_takes_away_is_replaced(stage, app, whose):
    """As an owner may who deletes it by hand, or takes a backup back."""
    phone = stage.phone(app)
    phone.call()
    phone.say("Hello?")
    copy = pathlib.Path(app.scratch, "copy.db")
    with open_database(app.database) as database, open_database(copy) as to:
        database.backup(to)
    phone.say("Nobody copies this.")
    for file in pathlib.Path(app.scratch).glob("calls.db*"):
        file.unlink()
    if whose == "an older copy":
        copy.rename(app.database)
    assert healthz(app) == 200, "it notices that the file is another one"
    assert phone.say("And now?") == "You said: And now?"
    before = [("Hello?", "You said: Hello? ")] if whose == "an older copy" else []
    assert turns_of(app, phone) == [*before, ("And now?", "You said: And now? ")]
    copy.unlink(missing_ok=True)


def test_a_database_without_its_tables_gets_new_ones(stage, app):
    """As when somebody puts an empty database into its place."""
    phone = stage.phone(app)
    phone.call()
    phone.say("Hello?")
    with open_database(app.database) as database:
        names = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        for (name,) in names:
            if not name.startswith("sqlite_"):  # SQLite's own can't be dropped
                database.execute(f"DROP TABLE {name}")
        database.execute("PRAGMA user_version = 0")
    assert phone.say("Where are they?") in (SORRY, "You said: Where are they?"), "the first may find out"
    assert phone.say("And now?") == "You said: And now?"
    assert phone.warnings == []


def test_the_caller_hears_an_apology_for_a_row_that_makes_no_sense(stage):
    with stage.other_app() as app:
        phone = stage.phone(app)
        phone.call()
        phone.say("Hello?")
        with open_database(app.database) as database:
            database.execute("UPDATE turns SET reply = x'00ff', stop = NULL")
        assert phone.webhook("/talking?turn=1&heard=0") == SORRY
        wait_until(lambda: "ERROR" in app.log())
        other = stage.phone(app)
        other.call()
        assert other.say("And now?") == "You said: And now?"


def test_the_caller_hears_an_apology_for_a_turn_that_is_not_there(phone):
    phone.call()
    assert phone.webhook("/talking?turn=7&heard=0") == SORRY
    assert phone.say("And now?") == "You said: And now?"


def test_the_disk_fails_in_the_middle_of_a_reply(stage, app):
    stage.claude.when("Tell me of failing disks.", Reply(STORY, pace=60))
    phone = stage.phone(app)
    phone.call()
    with refused(app, "turns", ["UPDATE"], when="OLD.reply <> '' AND NEW.reply <> OLD.reply"):
        heard = phone.say("Tell me of failing disks.")
        assert heard == f"{FIRST_SENTENCE} {SORRY}"
    wait_until(lambda: re.search(rf"call {phone.call_sid} turn 1: .* out, IntegrityError, request", app.log()))
    assert phone.say("And now?") == "You said: And now?"


@pytest.mark.slow
def test_the_file_is_locked_in_the_middle_of_a_reply(stage, app):
    stage.claude.when("Tell me of locked disks.", Reply(STORY, pace=8))
    phone = stage.phone(app)
    phone.call()
    unlock = []

    def lock_once(text):  # as soon as the caller hears the first sentence
        if not unlock:
            unlock.append(lock(app))

    phone.on_hearing = lock_once
    heard = in_thread(lambda: phone.say("Tell me of locked disks."))
    wait_until(lambda: f"call {phone.call_sid} turn 1: " in app.log())
    unlock[0]()
    heard = heard()
    assert heard.startswith(FIRST_SENTENCE) and heard.endswith(SORRY)
    assert re.search(r"turn 1: .*OperationalError, and the database failed: database is locked", app.log())
    assert phone.say("And now?") == "You said: And now?"


@contextlib.contextmanager
def one_update_is_refused(app, when):
    """The database refuses one change of a turn; yields a function that says whether it has done so."""
    with open_database(app.database) as database:
        database.execute("CREATE TABLE refusals (number)")
        # Unlike ABORT, FAIL keeps what the trigger has done before it.
        once = "INSERT INTO refusals VALUES (1); SELECT RAISE(FAIL, 'no');"
        with refused(app, "turns", ["UPDATE"], f"{when} AND NOT EXISTS (SELECT * FROM refusals)", once):
            yield lambda: database.execute("SELECT COUNT(*) FROM refusals").fetchone() == (1,)
        database.execute("DROP TABLE refusals")


@pytest.mark.slow
def test_the_end_of_a_reply_is_stored_at_the_second_try(stage, app):
    stage.claude.when("Tell me a little.", Reply("Only this"))
    phone = stage.phone(app)
    phone.call()
    with one_update_is_refused(app, "NEW.stop = 'end_turn'") as done:
        assert phone.say("Tell me a little.") == "Only this"
        assert done()


@pytest.mark.slow
def test_signs_that_a_reply_is_written_go_on_after_one_that_could_not_be_stored(stage):
    stage.claude.when("Be silent in trouble.", Reply(ending="ping"))
    with stage.other_app(module=FASTER) as app:
        phone = stage.phone(app)
        phone.call()
        phone.say("Make the tables.")
        with one_update_is_refused(app, "NEW.reply = OLD.reply AND NEW.stop IS NULL") as done:
            heard = in_thread(lambda: phone.say("Be silent in trouble."))
            wait_until(done)
            (_, (before, _)) = turns_of(app, phone, "touched, stop")
            later = wait_until(lambda: [row for row in turns_of(app, phone, "touched, stop") if row[0] > before])
            assert later[0][1] is None, "it is still being written"
        stage.phone(app, CallSid=phone.call_sid).hang_up()
        heard()
        assert "Traceback" not in app.log()


@pytest.mark.slow
def test_the_end_of_a_reply_is_stored_when_the_file_is_no_longer_locked(stage, app):
    words = "Tell me a little, in spite of the lock."
    stage.claude.when(words, Reply("Only this", first_token=0.5))
    phone = stage.phone(app)
    phone.call()
    heard = in_thread(lambda: phone.say(words))
    wait_until(lambda: stage.claude.asked(words))
    with locked(app):
        time.sleep(3)  # seconds: the first try fails after two
    assert heard() == "Only this"


@pytest.mark.slow
def test_a_reply_whose_end_cannot_be_stored_is_given_up(stage, app):
    words = "Tell me nothing."
    stage.claude.when(words, Reply(status=400, first_token=1.0))
    phone = stage.phone(app)
    phone.call()
    heard = in_thread(lambda: phone.say(words, token="the same"))
    wait_until(lambda: stage.claude.asked(words))
    with locked(app):
        assert heard() == SORRY
        wait_until(lambda: re.search(f"{phone.call_sid} turn 1: .*, and the database failed", app.log()))
    # Twilio delivers the words again: nobody writes this reply any more, and that is soon noticed.
    began = time.monotonic()
    assert phone.say(words, token="the same").endswith(SORRY)
    assert time.monotonic() - began < 30
    assert len(stage.claude.asked(words)) == 1


# --- Where the file is, and how it is made --------------------------------------------------------


def test_the_folder_of_the_file_is_made(stage, tmp_path):
    path = tmp_path / "new folder" / "newer" / "calls.db"
    with stage.other_app(DATABASE_URL=f"sqlite:///{path}") as app:
        assert healthz(app) == 200
        assert path.exists()


def test_the_file_is_in_wal_mode(app):
    assert healthz(app) == 200
    with open_database(app.database) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert not list(pathlib.Path(app.scratch).glob("tmp*")), "what tried out the disk is gone"


@pytest.mark.slow
def test_a_process_may_start_while_the_file_is_in_use_in_another_mode(stage, app, tmp_path):
    phone = stage.phone(app)
    phone.call()
    phone.say("Make the tables.")  # or the first to need them would wait for the lock
    copy = tmp_path / "copy.db"
    with open_database(app.database) as database, open_database(copy) as in_use:
        database.backup(in_use)
        in_use.execute("PRAGMA journal_mode = DELETE")  # as a tool for backups may leave it
        with stage.other_app(DATABASE_URL=f"sqlite:///{copy}") as app:
            phone = stage.phone(app)
            phone.call()
            in_use.execute("BEGIN IMMEDIATE")
            heard = in_thread(lambda: phone.say("Are you there?"))
            time.sleep(0.4)  # seconds, in which the words come
            in_use.execute("ROLLBACK")
            assert heard() == "You said: Are you there?"
            assert "the database failed" not in app.log()


OLD_TABLES = (
    "CREATE TABLE calls (call_sid TEXT PRIMARY KEY, touched DOUBLE PRECISION);"
    "CREATE TABLE turns (call_sid TEXT NOT NULL, turn INTEGER NOT NULL, delivery TEXT, words TEXT NOT NULL,"
    " reply TEXT NOT NULL DEFAULT '', stop TEXT, touched REAL NOT NULL, PRIMARY KEY (call_sid, turn));"
    "PRAGMA user_version = 1; INSERT INTO turns VALUES ('CA1', 1, 'a', 'Hi, I am Bo.', 'Hi Bo! ', 'end_turn', {});")


def file_of_another_version(path, minutes):
    """A file as an older version has left it, with words that are so many minutes old."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(OLD_TABLES.format(time.time() - 60 * minutes))


def test_a_file_of_another_version_is_replaced(stage, tmp_path):
    path = tmp_path / "calls.db"
    file_of_another_version(path, minutes=110)
    with stage.other_app(DATABASE_URL=f"sqlite:///{path}") as app:
        phone = stage.phone(app, CallSid="CA1")
        phone.call()
        assert phone.say("And now?") == "You said: And now?"
        assert b"I am Bo" not in path.read_bytes()


def test_a_file_of_another_version_that_keeps_words_stops_the_start(stage, tmp_path):
    path = tmp_path / "calls.db"
    file_of_another_version(path, minutes=130)
    before = path.read_bytes()
    why = start_fails(stage.other_app(DATABASE_URL=f"sqlite:///{path}"))
    assert why.startswith(f"{path} holds words kept by another version of this app")
    assert path.read_bytes() == before


def test_a_restart_keeps_words_however_old_they_are(stage):
    with stage.other_app() as app:
        phone = stage.phone(app)
        phone.call()
        phone.say("My name is Gwen.")
        let_time_pass(app, 3 * 3600)
        with open_database(app.database) as database:
            database.execute("UPDATE calls SET forget_at = forget_at + 4 * 3600")
        app.kill()
        app.process.wait()
        app.start()
        phone.say("Who is calling after three hours?")
        (request,) = stage.claude.asked("Who is calling after three hours?")
        assert request.messages[0] == ("user", "My name is Gwen.")


# Disks that can't share memory, as WSL's /mnt/c: there SQLite's WAL mode seems to work, and then doesn't. With this,
# no file can be mapped into memory for writing that others see.
NO_SHARED_MEMORY = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/mman.h>

static void *map(const char *name, void *at, size_t size, int protection, int flags, int file, off_t offset) {
    void *(*real)(void *, size_t, int, int, int, off_t) = dlsym(RTLD_NEXT, name);
    if (file >= 0 && flags & MAP_SHARED && protection & PROT_WRITE) {
        errno = ENODEV;
        return MAP_FAILED;
    }
    return real(at, size, protection, flags, file, offset);
}
void *mmap(void *a, size_t b, int c, int d, int e, off_t f) { return map("mmap", a, b, c, d, e, f); }
void *mmap64(void *a, size_t b, int c, int d, int e, off_t f) { return map("mmap64", a, b, c, d, e, f); }
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_calls_are_carried_on_a_disk_without_shared_memory(stage, tmp_path, workers):
    compiler = shutil.which("cc")
    assert compiler and sys.platform == "linux", "this test needs Linux, and a compiler for C: install gcc"
    library = tmp_path / "no_shared_memory.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-xc", "-", "-o", library, "-ldl"], input=NO_SHARED_MEMORY,
                   text=True, check=True)
    with stage.other_app(real=True, LD_PRELOAD=str(library), WEB_CONCURRENCY=workers) as app:

        def call(number):
            phone = stage.phone(app)
            phone.call()
            for turn in range(3):
                assert phone.say(f"Turn {turn} of {number}.") == f"You said: Turn {turn} of {number}."
            phone.hang_up()
            return phone.warnings

        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            assert list(threads.map(call, range(4))) == [[]] * 4
        assert "the database failed" not in app.log() and "Traceback" not in app.log()
        with open_database(app.database) as database:
            assert database.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        assert not list(pathlib.Path(app.scratch).glob("tmp*"))


# --- What extras rely on --------------------------------------------------------------------------
# A Store keeps its connection and a thread for as long as its process lives. So these use a process of their own.


@pytest.fixture
def elsewhere(tmp_path):
    """A function that calls another one in a new process, with the URL of a new database."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=PROCESSES) as process:
        yield lambda function: process.submit(function, f"sqlite:///{tmp_path}/calls.db").result(60)


def turn(store, call_sid, words):
    """One turn of a call, whose reply repeats the words; returns the number of its row."""
    _, row_id = store.turn(call_sid, None, words, time.time(), 100, 1000)
    assert store.grow(row_id, f"{words} ", "end_turn")
    return row_id


class StoreWithNotes(Store):
    extra_tables = {"notes": "note TEXT NOT NULL"}


def keep_notes(url):
    store = StoreWithNotes(url)
    for call_sid in ("CA1", "CA2"):
        turn(store, call_sid, "Hello?")
        store.sql("INSERT INTO notes VALUES (?, ?)", call_sid, f"The turmeric of {call_sid}.")
    store.end("CA1")
    assert [row["note"] for row in store.sql("SELECT * FROM notes")] == ["The turmeric of CA2."]
    files = pathlib.Path(store.path).parent.glob("calls.db*")
    written = b"".join(file.read_bytes() for file in files)
    assert b"turmeric of CA1" not in written and b"turmeric of CA2" in written


def test_rows_of_an_extra_are_deleted_with_the_words_of_their_call(elsewhere):
    elsewhere(keep_notes)


def keep_words_after_the_end(url):
    store = Store(url)
    turn(store, "CA1", "A cumin seed.")
    _, unfinished = store.turn("CA1", None, "Two of them.", time.time(), 100, 1000)
    store.sql("UPDATE calls SET keep = 3600")
    store.end("CA1")
    assert [row["words"] for row in store.turns("CA1")] == ["A cumin seed.", "Two of them."]
    assert not store.grow(unfinished, "Nobody hears this."), "the caller has hung up"
    try:
        turn(store, "CA1", "Another one.")
    except CallIsOver:
        pass
    else:
        raise AssertionError("the call is over, although its words are kept")
    (call,) = store.sql("SELECT ended, forget_at FROM calls")
    assert 3599 < call["forget_at"] - call["ended"] < 3601
    store.sql("UPDATE calls SET ended = ended - 3590, forget_at = forget_at - 3590")
    store.end("CA1")  # Twilio may report it twice
    assert len(store.turns("CA1")) == 2
    store.sql("UPDATE calls SET ended = ended - 11, forget_at = forget_at - 11")
    store.sweep()
    assert store.turns("CA1") == []


def test_words_may_be_kept_for_some_time_after_the_end(elsewhere):
    elsewhere(keep_words_after_the_end)


def break_off(url):
    store = Store(url)
    turn(store, "CA1", "Hello?")
    with contextlib.suppress(ZeroDivisionError), store.transaction():
        store.sql("UPDATE turns SET words = 'Half of it.'")
        with store.transaction():  # a part of the other one
            store.sql("UPDATE turns SET reply = 'The other half.'")
        raise ZeroDivisionError
    assert [(row["words"], row["reply"]) for row in store.turns("CA1")] == [("Hello?", "Hello? ")]
    assert store.sql("UPDATE turns SET words = 'All of it.'") == 1, "and the next change is stored"
    assert Store(url).turns("CA1")[0]["words"] == "All of it."


def test_a_transaction_is_stored_as_a_whole_or_not_at_all(elsewhere):
    elsewhere(break_off)


def use_row_numbers(url):
    store = Store(url)
    gone = turn(store, "CA1", "Hello?")
    store.sql("DELETE FROM calls")
    assert store.turns("CA1") == [], "turns are deleted with their call"
    assert turn(store, "CA2", "Hello?") > gone
    assert not store.grow(gone, "A late sentence. ")


def test_the_number_of_a_deleted_row_never_comes_back(elsewhere):
    elsewhere(use_row_numbers)


def end_a_reply_twice(url):
    store = Store(url)
    _, row_id = store.turn("CA1", None, "Hello?", time.time(), 100, 1000)
    assert store.grow(row_id, "A sentence. ")
    assert store.grow(row_id, "Another. ", "end_turn", 30, 4)
    assert row_id not in store.growing
    assert not store.grow(row_id, "A third one. ", "stalled", 30, 4)
    (row,) = store.turns("CA1")
    assert (row["reply"], row["stop"]) == ("A sentence. Another. ", "end_turn")
    counts = store.end("CA1")
    assert (counts["turns"], counts["tokens_in"], counts["tokens_out"]) == (1, 30, 4)


def test_a_reply_that_has_ended_stays_as_it_is(elsewhere):
    elsewhere(end_a_reply_twice)


def wait_for_sentences(url):
    writer = Store(url)
    for reader in (writer, Store(url)):
        delays = []
        for _ in range(3):  # a busy machine may be slow, but not every time
            number, row_id = writer.turn("CA1", None, "Hello?", time.time(), 100, 1000)
            waiting = in_thread(lambda: (reader.wait("CA1", number, 0), time.monotonic()))
            time.sleep(0.1)  # seconds: now it waits
            written = time.monotonic()
            writer.grow(row_id, "A sentence. ", "end_turn")
            row, found = waiting()
            assert row["reply"] == "A sentence. "
            delays.append(found - written)
        assert min(delays) < 0.4, "without being woken, it would look again after a second"


@pytest.mark.slow
def test_a_sentence_is_found_as_soon_as_it_is_written(elsewhere):
    """By a thread of the same process, and by one of another."""
    elsewhere(wait_for_sentences)


# --- MAX_TURNS_A_DAY ------------------------------------------------------------------------------

TOMORROW = "This line has reached its limit for today. Please try again tomorrow. Goodbye!"
REACHED = "WARNING MAX_TURNS_A_DAY is reached: callers are told to try tomorrow"


def test_all_calls_together_have_so_many_turns_in_24_hours(stage):
    with stage.other_app(MAX_TURNS_A_DAY="3") as app:
        first, second = stage.phone(app), stage.phone(app)
        for phone in (first, second):
            assert phone.call() == HELLO
        for phone in (first, second):
            assert phone.say("One of three.") == "You said: One of three."
        assert REACHED not in app.log()
        assert first.say("The last one.") == "You said: The last one."
        assert app.log().count(REACHED) == 1
        for phone in (first, second):
            assert phone.say("One too many.") == TOMORROW and phone.ended == "hangup"
        late = stage.phone(app)
        assert late.call() == TOMORROW and late.ended == "hangup", "a new call is told at once"
        assert not stage.claude.asked("One too many.")
        assert app.log().count(REACHED) == 1, "nobody wants the same line for each call"


def test_turns_count_for_24_hours_whatever_becomes_of_their_call(stage):
    with stage.other_app(MAX_TURNS_A_DAY="2") as app:
        over, going_on = stage.phone(app), stage.phone(app)
        for phone in (over, going_on):
            phone.call()
            phone.say("One of two.")
        over.hang_up()
        assert stage.phone(app).call() == TOMORROW, "words that are forgotten still count"
        app.kill()
        app.process.wait()
        app.start()
        assert stage.phone(app).call() == TOMORROW, "a restart is no new day"
        let_time_pass(app, A_DAY - 600)
        assert healthz(app) == 200
        assert stage.phone(app).call() == TOMORROW
        assert app.log().count(REACHED) == 1
        let_time_pass(app, 601)
        phone = stage.phone(app)
        assert phone.call() == HELLO
        assert phone.say("Is it tomorrow?") == "You said: Is it tomorrow?"
        assert app.log().count(REACHED) == 1
        assert "Traceback" not in app.log()


def test_a_second_delivery_is_no_second_turn_of_the_day(stage):
    with stage.other_app(MAX_TURNS_A_DAY="2") as app:
        phone = stage.phone(app)
        phone.call()
        for words in ("Delivered twice.", "Delivered twice, too."):
            assert phone.say(words, token=words) == f"You said: {words}"
            assert phone.say(words, token=words) == f"You said: {words}"
        assert turns_of(app, phone, "turn") == [(1,), (2,)]
        assert phone.say("A new one.") == TOMORROW


def test_callers_who_speak_at_once_to_two_workers_have_no_turn_more(stage):
    with stage.other_app(WEB_CONCURRENCY="2", MAX_TURNS_A_DAY="6") as app:
        phones = [stage.phone(app) for _ in range(4)]
        for phone in phones:
            assert phone.call() == HELLO
        words = "Talk to four callers."

        def talk(phone):
            answers = []
            while not phone.ended:
                answers.append(phone.say(words))
            return answers

        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            answers = [answer for answers in threads.map(talk, phones) for answer in answers]
        assert sorted(answer == TOMORROW for answer in answers) == [False] * 6 + [True] * 4
        assert len(stage.claude.asked(words)) == 6
        assert app.log().count(REACHED) == 1

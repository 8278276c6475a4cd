"""Nobody without a signature can take the line down, nor can a disk, a clock or a server."""

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
import socket
import sqlite3
import threading
import time

import pytest

from conversation import end_of_sentences, speakable
from store import LOCK_PATIENCE
from tests.claude import Reply
from tests.conftest import (
    cannot_run, in_thread, let_time_pass, meanwhile, names_of_settings, read, wait_until)
from tests.test_hard_to_kill import everything_in, healthz, lock, spoil

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


@meanwhile
def test_strangers_hold_nobody_up(stage):
    with stage.other_app(MAX_TURNS_A_DAY="100000") as app:
        malformed_bodies_are_400(stage, app)
        a_403_says_little(stage, app)
        many_first_words_at_once(stage, app)
        looks_at_its_health_cost_little(stage, app)
        assert "Traceback" not in app.log()


def malformed_bodies_are_400(stage, app):
    logged = len(app.log())
    for body in ["zz\r\nabc\r\n0\r\n\r\n", "-5\r\nabc\r\n0\r\n\r\n", "5\r\nabc",
                 "3\r\nabcX\r\n0\r\n\r\n",
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
    request = f"POST /talking?{'x' * 3000} HTTP/1.1\r\nHost: {'y.' * 3500}\r\n"
    request += f"X-Forwarded-Host: {'z.' * 3500}\r\nContent-Length: 3\r\nConnection: close\r\n"
    assert exchange(app, f"{request}{FORM}\r\nx=y".encode()).startswith(b"HTTP/1.1 403")
    assert 0 < len(app.log()) - logged < 500
    logged = len(app.log())


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


# --- Many callers, and little room ----------------------------------------------------------------


def all_say_something(stage, app, callers, reply):
    """What these many callers hear who call at once, of a Claude that answers like this."""
    def talk(number):
        phone, words = stage.phone(app), f"Caller {number} of {callers} is here."
        stage.claude.when(words, dataclasses.replace(reply, text=f"You are caller {number}."))
        phone.call()
        phone.say(words)
        assert not phone.ended, phone.warnings
        return phone

    with concurrent.futures.ThreadPoolExecutor(callers) as threads:
        return list(threads.map(talk, range(callers)))


@meanwhile
def test_two_workers_with_few_files_answer_forty_callers_at_once(stage):
    if not shutil.which("prlimit"):
        cannot_run("needs prlimit")
    forty_callers_are_all_answered(stage, within=("prlimit", "--nofile=512:512"))  # 1,024 for both


@meanwhile
def test_two_workers_with_few_threads_answer_forty_callers_at_once(stage):
    if os.getuid() != 0 or not shutil.which("setpriv"):
        cannot_run("needs root, to become another user")
    # No such limit binds root, so another user has to run it; its files are root's, though.
    forty_callers_are_all_answered(stage, within=[
        "prlimit", "--nproc=256:256", "setpriv", "--reuid=65534", "--clear-groups",
        "--inh-caps=+dac_override", "--ambient-caps=+dac_override"])


def forty_callers_are_all_answered(stage, within):
    with stage.other_app(within=within, WEB_CONCURRENCY="2") as app:
        workers = app.workers()
        for number, phone in enumerate(all_say_something(stage, app, 40, Reply(first_token=4.0))):
            assert phone.said[-1][0].endswith(f"You are caller {number}.")
            assert phone.warnings == [] and max(phone.waits) < 15
        assert app.workers() == workers


# --- The disk -------------------------------------------------------------------------------------


@meanwhile
def test_the_end_of_a_call_and_of_a_reply_in_trouble(stage):
    with stage.other_app() as app:
        a_reply_whose_end_cannot_be_kept(stage, app)
        a_reply_whose_end_is_kept_at_last(stage, app)
        # In this order: after each of them a thread tries again, which would help the one before.
        what_is_swept_leaves_no_byte(stage, app)
        words_are_gone_although_somebody_read_them_at_the_end(stage, app)
        words_are_gone_although_the_file_was_locked_at_the_end(stage, app)
        assert "Traceback" not in app.log()


def a_reply_whose_end_cannot_be_kept(stage, app):
    words = "Tell me nothing."
    stage.claude.when(words, Reply(status=400, first_token=1.0))
    phone = stage.phone(app)
    phone.call()
    heard = in_thread(lambda: phone.say(words, token="the same"))
    wait_until(lambda: stage.claude.asked(words))
    unlock = lock(app)
    assert heard() == SORRY
    wait_until(lambda: "and the database failed" in app.log())
    unlock()
    # Twilio delivers the words again: nobody writes this reply any more, and that is soon noticed.
    began = time.monotonic()
    assert phone.say(words, token="the same").endswith(SORRY)
    assert time.monotonic() - began < 30
    assert len(stage.claude.asked(words)) == 1


def a_reply_whose_end_is_kept_at_last(stage, app):
    words = "Tell me a little."
    stage.claude.when(words, Reply("Only this", first_token=0.5))
    phone = stage.phone(app)
    phone.call()
    heard = in_thread(lambda: phone.say(words))
    wait_until(lambda: stage.claude.asked(words))
    unlock = lock(app)
    time.sleep(LOCK_PATIENCE + 1.0)  # seconds: the first try fails
    unlock()
    assert heard() == "Only this"


def words_are_gone_although_the_file_was_locked_at_the_end(stage, app):
    phone = stage.phone(app)
    phone.call()
    phone.say("Locked marmalade.")
    unlock = lock(app)
    phone.hang_up()  # Twilio reports that once, and nobody asks for anything afterwards
    assert b"marmalade" in everything_in(app)
    unlock()
    assert healthz(app) == 200  # the next request, whoever makes it
    assert b"marmalade" not in everything_in(app)


def words_are_gone_although_somebody_read_them_at_the_end(stage, app):
    for spice, others_call in (b"tarragon", False), (b"marjoram", True):
        phone, other = stage.phone(app), stage.phone(app)
        phone.call()
        phone.say(f"Read {spice.decode()}.")
        with contextlib.closing(sqlite3.connect(app.database, isolation_level=None)) as backup:
            backup.execute("BEGIN")
            assert backup.execute("SELECT count(*) FROM turns").fetchone()[0]
            phone.hang_up()
            assert spice in everything_in(app)
            if others_call:
                other.call()
                assert other.say("Am I held up?") == "You said: Am I held up?"
                assert max(seconds for _, _, seconds, _ in other.webhooks) < 6
        assert healthz(app) == 200  # the next request, whoever makes it
        assert spice not in everything_in(app)


def what_is_swept_leaves_no_byte(stage, app):
    phone = stage.phone(app)
    phone.call()
    phone.say("Swept coriander.")
    let_time_pass(app, 2 * 3600 + 1, phone.call_sid)
    stage.phone(app).call()
    wait_until(lambda: b"coriander" not in everything_in(app))


@meanwhile
def test_a_corrupted_file_silences_nobody_and_stays_beside_the_new_one(stage):
    with stage.other_app(KEEP_DAYS="7") as app:
        for start in "the app runs", "the app starts again":
            spoil(app)
            if start == "the app starts again":
                app.kill()
                app.process.wait()
                app.start()
            phone = stage.phone(app)
            healthz(app)  # which notices that the file is another one
            assert phone.call() == HELLO
            phone.say("The first may find out.")
            assert phone.say("And now?") == "You said: And now?"
            assert healthz(app) == 200
            aside = pathlib.Path(app.database + ".corrupted")
            assert aside.read_bytes().startswith(b"This is not a database."), "it can be mended"
            assert "calls.db is corrupted" in app.log()
            aside.unlink()
        assert "Traceback" not in app.log()


# --- Claude's side --------------------------------------------------------------------------------


@contextlib.contextmanager
def server(*begin, then, pause=0.0):
    """In place of Claude: sends these bytes, and then others over and over again. Yields the
    address, and a list of the moments at which the line has closed a connection."""
    closed, done = [], threading.Event()

    def answer(connection):
        with contextlib.closing(connection), contextlib.suppress(OSError):
            try:
                connection.recv(65536)
                connection.sendall(b"".join(begin))
                while not done.wait(pause):
                    connection.sendall(then)
            except OSError:
                closed.append(time.monotonic())

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=answer, args=[listener.accept()[0]], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", closed
        done.set()
        listener.shutdown(socket.SHUT_RDWR)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
START = (b'event: message_start\ndata: {"type": "message_start", "message": {"usage": {}}}\n\n'
         b'event: content_block_start\ndata: {"type": "content_block_start", "index": 0,'
         b' "content_block": {"type": "text", "text": ""}}\n\n')


def delta(text):
    return (b'event: content_block_delta\ndata: {"type": "content_block_delta", "index": 0,'
            b' "delta": {"type": "text_delta", "text": "%s"}}\n\n' % text)


@meanwhile
def test_no_thread_outlives_its_caller_for_long(stage):
    for then in b": a comment\n\n", b"x":  # the latter is the beginning of a line without an end
        with server(HEAD, START, then=then, pause=1.0) as (url, closed):
            with stage.other_app(ANTHROPIC_BASE_URL=url) as app:
                phone = stage.phone(app)
                phone.call()
                heard = in_thread(lambda: phone.say("Hello?"))
                wait_until(lambda: phone.said[1:])  # "One moment."
                stage.phone(app, CallSid=phone.call_sid).hang_up()
                began = time.monotonic()
                wait_until(lambda: closed)
                assert closed[0] < began + 30
                heard()
                app.kill(signal.SIGTERM)
                app.process.wait(20)  # seconds; gunicorn itself would end it after 30


@meanwhile
def test_a_server_that_never_ends_is_not_spoken_for_ever(stage):
    for words in b"This is one of very many sentences. ", "😀. ".encode(), b"***. \\n\\n":
        with server(HEAD, START, then=delta(words)) as (url, closed):
            with stage.other_app(ANTHROPIC_BASE_URL=url) as app:
                phone = stage.phone(app)
                phone.call()
                heard = phone.say("Hello?")
                assert heard.endswith(SORRY) and len(heard) < 30_000
                assert wait_until(lambda: closed)


@meanwhile
def test_a_server_that_never_begins_is_given_up(stage):
    with server(b"HTTP/1.1 200 OK\r\n", then=b"x", pause=1.0) as (url, _):
        with stage.other_app(ANTHROPIC_BASE_URL=url) as app:
            phone = stage.phone(app, speaking_rate=3)
            phone.call()
            began = time.monotonic()
            assert phone.say("Hello?").endswith(SORRY)
            assert time.monotonic() < began + 90 and not phone.warnings


@pytest.mark.parametrize("stop", ["\ud800", "x" * 1000, "", "hand_over: x"])
def test_ends_of_replies_that_nobody_knows_are_an_apology(claude, phone, stop):
    claude.when(f"End oddly {ascii(stop)[:9]}.", Reply("Very well, then.", stop=stop))
    phone.call()
    assert phone.say(f"End oddly {ascii(stop)[:9]}.") == f"Very well, then. {SORRY}"


# --- Patterns -------------------------------------------------------------------------------------


def seconds_for(call, text):
    """Seconds of processor time; the best of three, as other programs run too."""
    def once():
        began = time.thread_time()
        with contextlib.suppress(ValueError):
            call(text)
        return time.thread_time() - began
    return min(once() for _ in range(3))


@pytest.mark.parametrize("unit", [
    "[", "(", "<a ", " ", "[a](", "[](x", "![", "_a", "http://", "1  ", "|  ", "a\n", "# "])
def test_no_pattern_is_slow_for_what_claude_writes(unit):
    text = (unit * 65536)[:65536]
    for slow in (speakable, end_of_sentences):
        assert seconds_for(slow, text) < 0.1, "50 ms, and twice that on a busy machine"


@pytest.mark.parametrize("setting", names_of_settings())
def test_a_setting_that_cannot_be_used_is_refused_at_once(setting):
    numbers = ",".join(f"+1 (555) 123-{number:04}" for number in range(24)) + ",x"
    for value in numbers, "a" * 60000 + "!", "1" * 60000 + "!", "en-" * 20000, "(0)" * 20000 + "!":
        assert seconds_for(lambda value: read({setting: value}), value) < 0.05

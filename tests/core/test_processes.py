"""Processes die, restart and share calls; Twilio delivers twice; callers hang up; many call at once."""

import concurrent.futures
import contextlib
import dataclasses
import os
import shutil
import signal
import time
from urllib.parse import urldefrag
from xml.etree import ElementTree

import pytest

from store import Store
from tests.claude import Reply
from tests.deploy import Router
from tests.forked import PROCESSES
from tests.stage import (
    SORRY,
    STORY,
    everything_in,
    in_thread,
    is_part_of,
    lock,
    open_database,
    turn_is_logged,
    turns_of,
    wait_until,
)

FIRST_SENTENCE = "Once upon a time there was a line."


def shares(app):
    """The setting of another app that uses the same database."""
    return {"DATABASE_URL": f"sqlite:///{app.database}"}


# --- Processes that die ---------------------------------------------------------------------------


def test_kill_9_between_two_turns_loses_nothing(stage):
    with stage.other_app() as app:
        phone = stage.phone(app)
        phone.call()
        phone.say("My name is Ann.")
        app.kill(signal.SIGKILL)
        app.process.wait()
        app.start()
        assert phone.say("Who am I after that?") == "You said: Who am I after that?"
        (request,) = stage.claude.asked("Who am I after that?")
        assert [role for role, _ in request.messages] == ["user", "assistant", "user"]
        assert request.messages[0] == ("user", "My name is Ann.")
        assert turns_of(app, phone)[0] == ("My name is Ann.", "You said: My name is Ann. ")
        assert phone.warnings == []


@pytest.mark.slow
def test_a_restart_on_the_same_port_loses_nothing(stage):
    with stage.other_app() as app:
        phone = stage.phone(app)
        phone.call()
        phone.say("My name is Eve.")
        app.kill(signal.SIGTERM)
        assert app.process.wait(60) == 0
        app.start()
        assert phone.say("Who am I now, please?") == "You said: Who am I now, please?"
        assert phone.warnings == []
        (request,) = stage.claude.asked("Who am I now, please?")
        assert request.messages[0] == ("user", "My name is Eve.")


@pytest.mark.slow
def test_a_process_that_is_told_to_stop_writes_its_replies_to_their_end(stage):
    stage.claude.when("Tell me it all.", Reply(STORY, first_token=0.4, pace=40))
    with stage.other_app() as app, stage.other_app(**shares(app)) as successor:
        phone = stage.phone(app)
        phone.call()
        heard = in_thread(lambda: phone.say("Tell me it all."))
        (request,) = wait_until(lambda: stage.claude.asked("Tell me it all."))
        app.kill(signal.SIGTERM)
        phone.url = successor.url  # as the platform's router does
        assert app.process.wait(25) == 0, "within the platform's grace"
        assert heard() == STORY and phone.warnings == []
        assert request.tokens_sent * 4 >= len(STORY), "the reply was read to its end"
        phone.say("What was it all?")
        role, reply = stage.claude.asked("What was it all?")[0].messages[1]
        assert role == "assistant" and reply.startswith(FIRST_SENTENCE) and is_part_of(reply, STORY)


def test_a_reply_that_nobody_writes_any_more_is_given_up(stage):
    """As a killed process leaves it behind."""
    phone = stage.phone()
    phone.call()
    phone.say("Be left behind.", token="the same")
    with open_database(stage.app.database) as database:
        left_behind = "UPDATE turns SET stop = NULL, touched = touched - 11 WHERE call_sid = ?"
        database.execute(left_behind, [phone.call_sid])
    assert phone.say("Be left behind.", token="the same") == f"You said: Be left behind. {SORRY}"
    assert phone.say("And now?") == "You said: And now?"
    assert phone.warnings == []


def test_a_reply_shows_that_somebody_writes_it(stage):
    """By that, other processes know that its own is alive."""
    stage.claude.when("Be silent, and alive.", Reply(ending="ping"))
    phone = stage.phone(stage.faster)
    phone.call()
    heard = in_thread(lambda: phone.say("Be silent, and alive."))
    ((first, _),) = wait_until(lambda: turns_of(stage.faster, phone, "touched, stop"))
    later = wait_until(lambda: [row for row in turns_of(stage.faster, phone, "touched, stop") if row[0] > first])
    assert later[0][1] is None, "it is still being written"
    stage.phone(stage.faster, CallSid=phone.call_sid).hang_up()
    heard()


@pytest.mark.slow
def test_the_process_is_killed_before_the_first_word_of_a_reply(stage):
    stage.claude.when("Tell me slowly.", Reply(ending="stall"))
    with stage.other_app() as app:
        phone = stage.phone(app)
        phone.call()
        phone.say("My name is Bob.")
        heard = in_thread(lambda: phone.say("Tell me slowly."))
        wait_until(lambda: stage.claude.asked("Tell me slowly."))
        os.kill(*app.workers(), signal.SIGKILL)
        assert heard() == SORRY, "by way of Twilio's fallback"
        phone.say("Who am I, then?")
        (request,) = stage.claude.asked("Who am I, then?")
        assert request.messages[0] == ("user", "My name is Bob.")


@pytest.mark.slow
def test_the_process_is_killed_while_the_first_sentence_is_spoken(stage):
    begun = "This is the first sentence of a reply whose process will be killed while it is spoken."
    stage.claude.when("Be killed.", Reply(f"{begun} And it had", ending="stall"))
    with stage.other_app() as app:
        phone = stage.phone(app, speaking_rate=5)
        phone.call()
        phone.say("My name is Cid.")
        killed = []

        def kill(text):
            if not killed:  # before Twilio asks for the rest
                os.kill(*app.workers(), signal.SIGKILL)
                killed.append(time.monotonic())

        phone.on_hearing = kill
        heard = phone.say("Be killed.")
        assert heard.startswith(begun) and heard.endswith(SORRY) and phone.warnings == []
        assert time.monotonic() - killed[0] < 25, "10 s and the pieces around them; 40 s would be dead air"
        phone.say("And who am I now?")
        (request,) = stage.claude.asked("And who am I now?")
        assert request.messages[0] == ("user", "My name is Cid.")
        assert ("assistant", begun) in request.messages


@pytest.mark.slow
def test_a_new_worker_replaces_an_old_one_under_a_call(stage):
    """As docs/deploying.md says: the new worker is there before the old one goes, and both use one socket."""
    stage.claude.when("Are you new?", Reply("Perhaps I am.", first_token=0.3))
    with stage.other_app(MAX_TURNS="9999", MAX_TURNS_A_DAY="9999") as app:
        phone = stage.phone(app)
        phone.call()
        old = app.workers()
        app.kill(signal.SIGTTIN)

        def the_new_one_is_loaded():
            assert phone.say("Are you new?") == "Perhaps I am."
            return app.log().count("INFO Voice Claude: model") == 2

        wait_until(the_new_one_is_loaded, 120)
        app.kill(signal.SIGTTOU)

        def the_old_one_is_gone():
            assert phone.say("Are you new?") == "Perhaps I am."
            return not set(old) & set(app.workers())

        wait_until(the_old_one_is_gone, 120)
        assert phone.say("Are you new?") == "Perhaps I am."
        assert phone.warnings == []


@pytest.mark.slow
def test_twilio_tries_again_when_a_router_finds_nobody_for_a_moment(stage):
    """The URLs tell it to; and as the app was asked already, it is the same turn."""
    router = Router()
    with contextlib.closing(router):
        router.target = "127.0.0.1", stage.app.port
        phone = stage.phone()
        phone.url = router.url
        phone.call()
        router.failures = 4
        assert phone.say("Did you hear me once?") == "You said: Did you hear me once?"
        assert router.failures == 0 and phone.warnings == []
        assert len(stage.claude.asked("Did you hear me once?")) == 1


# --- Processes that share calls -------------------------------------------------------------------


@pytest.mark.slow
def test_two_workers_share_every_call(stage):
    stage.claude.when("Go on, workers.", Reply(STORY, first_token=0.1, pace=200))
    with stage.other_app("--preload", WEB_CONCURRENCY="2") as app:
        phones = [stage.phone(app) for _ in range(5)]
        for phone in phones:
            phone.call()
        for _ in range(2):
            waits = [in_thread(lambda phone=phone: phone.say("Go on, workers.")) for phone in phones]
            assert [wait() for wait in waits] == [STORY] * 5
        last = stage.claude.asked("Go on, workers.")[-5:]
        assert [len(request.messages) for request in last] == [3] * 5
        assert all(not phone.warnings for phone in phones)


HIDDEN_URL = "https://hidden.example.com/line"


@pytest.fixture(scope="module")
def here(stage):
    """An app that asks Claude."""
    with stage.other_app() as app:
        yield app


@pytest.fixture(scope="module")
def there(stage, here):
    """An app with the same database that can't ask Claude: what it says, another one has written."""
    with stage.other_app(**shares(here), PUBLIC_URL=HIDDEN_URL, ANTHROPIC_API_KEY=None) as app:
        app.database = here.database
        yield app


def delay_of_what_another_process_writes(stage, here, there):
    """Seconds from the end of Claude's answer to the moment when another process has all of it."""
    first = "This is the first sentence."
    stage.claude.when("Go on elsewhere.", Reply(f"{first} Here comes the second sentence.", pace=40))
    phone = stage.phone(here)
    other = stage.phone(there, public_url=HIDDEN_URL, CallSid=phone.call_sid)
    begun = phone.request("POST", "/talking", {**phone.params, "SpeechResult": "Go on elsewhere."})
    redirect = ElementTree.fromstring(begun.body).find("Redirect")
    assert first in begun.body.decode() and redirect is not None
    assert other.webhook(HIDDEN_URL + urldefrag(redirect.text).url) == "Here comes the second sentence."
    heard = time.monotonic()
    request = stage.claude.asked("Go on elsewhere.")[-1]
    return heard - wait_until(lambda: request.finished)


def test_a_process_finds_what_another_one_writes(stage, here, there):
    delay_of_what_another_process_writes(stage, here, there)


@pytest.mark.slow
def test_a_process_finds_at_once_what_another_one_writes(stage, here, there):
    delays = [delay_of_what_another_process_writes(stage, here, there) for _ in range(4)]
    # A busy machine may be slow, but not every time.
    assert min(delays) < 1.0, "half a second until it is written, and a moment until it is seen"


def test_a_process_ends_calls_of_another_one(stage, here, there):
    phone = stage.phone(here)
    phone.call()
    phone.say("A mustard seed.")
    stage.phone(there, public_url=HIDDEN_URL, CallSid=phone.call_sid).hang_up()
    assert b"mustard" not in everything_in(here)
    assert phone.say("Is it over?") == "" and phone.ended == "hangup"


def test_repeated_words_fit_into_what_twilio_takes(stage, there):
    words = "这是一个很长很长的句子还没有完" * 60  # not a single space: a piece has to end somewhere
    phone = stage.phone(there, public_url=HIDDEN_URL)
    phone.call()
    assert phone.say(words).replace(" ", "").endswith(words)
    assert phone.warnings == []


def begin_in_each(folder, databases, number, together):
    """Use one new database after the other, each at the same moment as other processes do."""
    for database in range(databases):
        store = Store(f"sqlite:///{folder}/new/{database}.db")
        together.wait(60)
        _, row_id = store.turn(f"CA{number}", None, "Hello?", 0.0, 100, 1000)
        assert store.grow(row_id, "Hello!", "end_turn")


# What goes wrong when eight processes meet goes wrong now and then only.
@pytest.mark.parametrize("databases", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_eight_processes_start_at_once_on_a_new_database(tmp_path, databases):
    together = PROCESSES.Barrier(8)
    processes = [
        PROCESSES.Process(target=begin_in_each, args=[tmp_path, databases, number, together], daemon=True)
        for number in range(8)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 8
    for database in range(databases):
        with open_database(tmp_path / "new" / f"{database}.db") as each:
            assert each.execute("SELECT COUNT(*) FROM turns WHERE reply = 'Hello!'").fetchone() == (8,)


# --- Duplicate deliveries -------------------------------------------------------------------------


@pytest.mark.slow
def test_the_same_delivery_three_times_at_once_and_once_more_later_is_one_turn(stage):
    stage.claude.when("Say it once.", Reply(STORY, first_token=0.3, pace=200))
    with stage.other_app() as app, stage.other_app(**shares(app)) as second:
        call_sid = stage.phone(app).call_sid
        phones = [stage.phone(each, CallSid=call_sid) for each in (app, second, app, second)]
        for number, phone in enumerate(phones):
            phone.call()
            phone.say(f"Before that, {number}.")
        unlock = lock(app)  # so that two processes look for the delivery at the same moment
        waits = [in_thread(lambda phone=phone: phone.say("Say it once.", token="one")) for phone in phones[:3]]
        time.sleep(0.4)  # seconds, in which the words come
        unlock()
        assert [wait() for wait in waits] == [STORY] * 3
        assert phones[3].say("Say it once.", token="one") == STORY
        assert len(stage.claude.asked("Say it once.")) == 1
        phones[0].say("And after that?")
        (request,) = stage.claude.asked("And after that?")
        said = [words for role, words in request.messages if role == "user"]
        assert said == [*(f"Before that, {number}." for number in range(4)), "Say it once.", "And after that?"]
        assert all(not phone.warnings for phone in phones)


def test_the_same_token_in_another_call_is_another_turn(stage, phone):
    other = stage.phone()
    for each in (phone, other):
        each.call()
        assert each.say("By chance the same.", token="the same") == "You said: By chance the same."
    assert len(stage.claude.asked("By chance the same.")) == 2


def test_without_a_token_every_delivery_is_a_new_turn(phone):
    phone.call()
    assert phone.say("The first.", token="") == "You said: The first."
    assert phone.say("The second.", token="") == "You said: The second."


# --- Callers who hang up --------------------------------------------------------------------------


def hangs_up_while_claude_writes(stage, app, words, reply):
    """Hang up before there is a sentence; the app then gives up its request to Claude."""
    stage.claude.when(words, reply)
    phone = stage.phone(app)
    phone.call()
    heard = in_thread(lambda: phone.say(words))
    (request,) = wait_until(lambda: stage.claude.asked(words))
    wait_until(lambda: request.tokens_sent)
    stage.phone(app, CallSid=phone.call_sid).hang_up()
    wait_until(lambda: request.closed_by_caller)
    heard()
    assert turns_of(app, phone) == [("", "")], "nothing of the reply is stored after the end"
    assert " out, CallerGone, " in turn_is_logged(app, phone), "that was the reason, and not that no sentence came"


@pytest.mark.slow
def test_claude_is_left_alone_when_the_caller_hangs_up_in_a_sentence_without_an_end(stage):
    breath = Reply("and on and on it goes " * 20, pace=4)
    hangs_up_while_claude_writes(stage, stage.faster, "Say it in one breath.", breath)


@pytest.mark.slow
def test_claude_is_left_alone_soon_when_the_caller_hangs_up(stage):
    breath = Reply("and on and on it goes " * 20, pace=4)
    hangs_up_while_claude_writes(stage, stage.app, "Say it in one real breath.", breath)


@pytest.mark.slow
def test_claude_is_left_alone_when_the_caller_hangs_up_while_it_has_nothing_to_say(stage):
    hangs_up_while_claude_writes(stage, stage.app, "Think long.", Reply("Hm", ending="ping"))


def test_claude_is_left_alone_when_the_caller_hangs_up_in_the_middle_of_a_reply(stage):
    words = "Talk for ever and ever."
    stage.claude.when(words, Reply("This is one of very many sentences. " * 200, pace=60))
    phone = stage.phone(stage.faster)
    phone.call()
    phone.on_hearing = lambda text: text.startswith("This is one") and phone.hang_up()
    assert "This is one of very many sentences." in phone.say(words)
    (request,) = stage.claude.asked(words)
    wait_until(lambda: request.closed_by_caller)
    assert request.tokens_sent < 1750, "it was not read to its end"
    assert b"very many" not in everything_in(stage.faster)


# --- Many callers at once -------------------------------------------------------------------------


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


@pytest.mark.slow
def test_twenty_callers_at_once_are_all_answered(stage):
    for number, phone in enumerate(all_say_something(stage, stage.app, 20, Reply(first_token=0.5))):
        assert phone.said[-1][0].endswith(f"You are caller {number}.")
        assert phone.warnings == []


def forty_callers_are_all_answered(stage, within):
    with stage.other_app(within=within, WEB_CONCURRENCY="2") as app:
        workers = app.workers()
        for number, phone in enumerate(all_say_something(stage, app, 40, Reply(first_token=4.0))):
            assert phone.said[-1][0].endswith(f"You are caller {number}.")
            assert phone.warnings == [] and max(phone.waits) < 15
        assert app.workers() == workers


@pytest.mark.slow
def test_two_workers_with_few_files_answer_forty_callers_at_once(stage):
    assert shutil.which("prlimit"), "this test needs prlimit: install util-linux"
    forty_callers_are_all_answered(stage, within=["prlimit", "--nofile=512:512"])  # 1,024 for both


@pytest.mark.slow
def test_two_workers_with_few_threads_answer_forty_callers_at_once(stage):
    assert shutil.which("prlimit") and shutil.which("setpriv"), "this test needs them: install util-linux"
    assert os.getuid() == 0, "this test needs root, to become another user"
    # No such limit binds root, so another user has to run it; its files are root's, though.
    forty_callers_are_all_answered(stage, within=[
        "prlimit", "--nproc=256:256", "setpriv", "--reuid=65534", "--clear-groups",
        "--inh-caps=+dac_override", "--ambient-caps=+dac_override"])

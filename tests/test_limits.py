"""Two limits: how much the line may cost in a day, and what a caller can really have heard."""

import concurrent.futures
import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time

from tests.claude import Reply
from tests.conftest import let_time_pass, meanwhile, wait_until
from tests.phone import ROOT

TOMORROW = "This line has talked so much today that it has to rest. Please try tomorrow. Goodbye!"
GREETING = "Hello, this is Claude speaking!"
A_DAY = 24 * 60 * 60  # seconds
SPEAKING_RATE = 2.75  # words a second

# --- MAX_TURNS_A_DAY ------------------------------------------------------------------------------


def lines_on_the_limit(*apps):
    return sum(app.log().count("WARNING MAX_TURNS_A_DAY is reached") for app in apps)


@meanwhile
def test_all_calls_together_have_so_many_turns_in_any_24_hours(stage):
    with stage.other_app("--workers 2", MAX_TURNS_A_DAY="6") as app:
        phones = [stage.phone(app, number=f"+1555123900{number}") for number in range(4)]
        for phone in phones:
            assert phone.call() == GREETING

        def talk(phone):
            while not phone.ended:
                answers.append(phone.say(f"Talk to {phone.call_sid}."))

        answers, threads = [], [threading.Thread(target=talk, args=[phone]) for phone in phones]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(answer == TOMORROW for answer in answers) == [False] * 6 + [True] * 4
        assert sum(len(stage.claude.asked(f"Talk to {phone.call_sid}.")) for phone in phones) == 6
        phones[0].hang_up()  # words that are forgotten still count

        late = stage.phone(app)
        assert late.call() == TOMORROW and late.ended == "hangup", "a new call is told at once"
        assert lines_on_the_limit(app) == 1, "nobody wants the same line for each call"

        before = app.workers()
        for worker in before:
            os.kill(worker, signal.SIGKILL)
        wait_until(lambda: len(set(app.workers()) - set(before)) == 2)
        wait_until(lambda: stage.phone(app).call() == TOMORROW)  # a restart is no new day
        assert lines_on_the_limit(app) == 1
        let_time_pass(app, A_DAY - 600)
        assert stage.phone(app).call() == TOMORROW
        assert lines_on_the_limit(app) == 1

        let_time_pass(app, 601)
        phone = stage.phone(app)
        assert phone.call() == GREETING
        assert phone.say("Is it tomorrow?") == "You said: Is it tomorrow?"
        assert phone.say("It is!", token="the same") == phone.say("It is!", token="the same")
        with contextlib.closing(sqlite3.connect(app.database, timeout=20)) as database:
            turns = database.execute(
                "SELECT COUNT(*) FROM turns WHERE call_sid = ?", [phone.call_sid]
            ).fetchone()
        assert turns == (2,), "a second delivery is no second turn"
        assert "Traceback" not in app.log()


# --- What was really heard ------------------------------------------------------------------------

CUT = " [The caller cut in here.]"


def story(name, words):
    """So many words, each another one, in sentences of ten."""
    numbered = [f"{name}{number}" for number in range(1, words + 1)]
    return " ".join(word + "." * (number % 10 == 0) for number, word in enumerate(numbered, 1))


def sent_back(stage, words):
    """The reply before these words of the caller, as Claude was sent it."""
    (request,) = stage.claude.asked(words)
    assert [role for role, _ in request.messages[-2:]] == ["assistant", "user"]
    return request.messages[-2][1]


def how_many(text):
    return len(re.findall(r"\w+", text.removesuffix(CUT)))


def listen(stage, app, name, words, first_part=False):
    """A caller who just begins to hear a reply of so many words; or has heard its first part."""
    phone = stage.phone(app, speaking_rate=SPEAKING_RATE if first_part else None)
    phone.call()
    stage.claude.when(f"Tell {name}.", Reply(story(name, words), pace=60 if first_part else None))
    if not first_part:
        phone.say(f"Tell {name}.", token="the same")
        phone.said.clear()  # another delivery finds all of it written, and gets it in one part
    assert phone.say(f"Tell {name}.", token="the same") == story(name, words)
    return phone


def at_once(*functions):
    """Do all of this at the same time; raises what one of them raises."""
    with concurrent.futures.ThreadPoolExecutor(len(functions)) as threads:
        for future in [threads.submit(function) for function in functions]:
            future.result()


def cut_in(stage, app, seconds, words=60, first_part=False):
    """Cut in so many seconds after the last part began; Claude is sent about that much."""
    name = f"c{seconds:.0f}x"
    phone = listen(stage, app, name, words, first_part)
    part = sum(
        how_many(text) for text, _, could_cut_in in phone.said if could_cut_in and name in text
    )
    assert (part < words) == first_part
    mine = f"Stop at {seconds} of {name}."
    phone.say(mine, after=seconds)
    heard = sent_back(stage, mine)
    assert heard.endswith(CUT) and story(name, words).startswith(heard.removesuffix(CUT))
    really = words - part + seconds * SPEAKING_RATE
    assert abs(how_many(heard) - really) <= max(5, part / 4), (
        f"{how_many(heard)} of {words}, really {really}"
    )
    phone.say("Go on, then.")
    (request,) = [
        one for one in stage.claude.asked("Go on, then.") if one.messages[0][1] == f"Tell {name}."
    ]
    assert request.messages[1] == ("assistant", heard), "what is sent grows at its end only"
    return phone, heard


@meanwhile
def test_a_reply_that_was_cut_in_on_is_sent_up_to_about_there(stage):
    at_once(
        *(
            lambda seconds=seconds: cut_in(stage, stage.app, seconds)
            for seconds in (2.0, 7.0, 13.0)
        ),
        lambda: cut_in(stage, stage.app, 5.0, first_part=True),
    )


@meanwhile
def test_a_cut_before_the_first_word_is_no_silence_of_claudes(stage):
    phone = listen(stage, stage.app, "early", 40)
    phone.say(
        "No, wait, listen to me for a moment please.", after=-2.5
    )  # while "Tell" was answered
    assert sent_back(stage, "No, wait, listen to me for a moment please.") == CUT.strip()


def hear_it_all(stage, app, name, words, mine, rate):
    phone = listen(stage, app, name, words)
    asked = (
        words / rate + 0.1 + len(mine.split()) / rate + 1.0
    )  # the caller speaks as fast as the voice
    phone.say(mine, after=asked - len(mine.split()) / SPEAKING_RATE - 1.0)
    assert sent_back(stage, mine) == story(name, words), f"at {rate} words a second"


@meanwhile
def test_a_reply_that_was_heard_to_its_end_is_sent_whole(stage):
    long = "I have listened to all of that and now I would like to say something myself about it, "
    at_once(
        lambda: hear_it_all(stage, stage.app, "slow", 40, "At two and a half words a second.", 2.5),
        lambda: hear_it_all(stage, stage.app, "fast", 40, "At three words a second.", 3.0),
        lambda: hear_it_all(stage, stage.app, "short", 3, "At three words a second, too.", 3.0),
        lambda: hear_it_all(stage, stage.app, "both", 30, f"{long * 3} if I may.", 3.0),
        lambda: after_silence(stage),
        lambda: by_key(stage),
    )


def after_silence(stage):
    phone = listen(stage, stage.app, "silence", 8)
    time.sleep(8 / SPEAKING_RATE)
    assert phone.stay_silent() == "Are you still there?"
    phone.say("Yes, silence it was.", after=0.3)
    assert sent_back(stage, "Yes, silence it was.") == story("silence", 8)


def by_key(stage):
    """A key takes no time, and no second passes before Twilio is sure of it."""
    phone = listen(stage, stage.app, "key", 40)
    time.sleep(3.0)
    phone.press("5")
    requests = [
        one
        for one in stage.claude.asked("[The caller pressed 5]")
        if one.messages[0][1] == "Tell key."
    ]
    heard = requests[0].messages[1][1]
    assert heard.endswith(CUT) and abs(how_many(heard) - 3.0 * SPEAKING_RATE) <= 10


@meanwhile
def test_a_cut_is_known_in_every_process_and_shows_in_the_transcript(stage):
    with stage.other_app("--workers 2") as app:
        phone, heard = cut_in(stage, app, 6.0, words=59)
        command = [sys.executable, "-m", "flask", "calls", phone.call_sid]
        written, parsed = (
            subprocess.run(
                [*command, *more],
                cwd=ROOT,
                env=app.environ,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for more in ([], ["--json"])
        )
        heard = heard.removesuffix(CUT)
        first, second, third = json.loads(parsed)
        assert (
            first["heard"].strip() == heard and how_many(heard) + how_many(first["not_heard"]) == 59
        )
        assert second["caller"].startswith("Stop at") and third["caller"] == "Go on, then."
        assert third["not_heard"] == "" and third["heard"].strip() == "You said: Go on, then."
        assert re.search(
            rf"Claude: {re.escape(heard)} ?\[cut in\] {re.escape(first['not_heard'].strip())}",
            written,
        )

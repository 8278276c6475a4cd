"""With THINK_AHEAD Claude is asked before Twilio is sure that the caller is done: what the caller
hears of that, and what must never come of a wrong guess."""

import os
import pathlib
import re
import signal
import sqlite3
import time

import contextlib
import pytest

from tests.claude import Reply, Tool
from tests.conftest import TOKEN, meanwhile, wait_until
from tests.test_hard_to_kill import healthz

STORY = "Here is the first sentence of it. Here comes the second one, too. And this is the third."
LONG = "This is one sentence of very many. " * 60
A_WHILE = 1.0  # seconds in which a guess would be made three times over


def line(stage):
    return stage.shared("ahead", THINK_AHEAD="yes")


def caller(stage, app=None, **more):
    phone = stage.phone(app or line(stage), **more)
    phone.call()
    return phone


def guessed(stage, words):
    """The request that a guess has made, once there is one."""
    return wait_until(lambda: stage.claude.asked(words))[0]


def written(stage, words):
    """The same, once its answer is over."""
    wait_until(lambda: guessed(stage, words).finished)
    time.sleep(0.7)  # and the line has read it
    return guessed(stage, words)


def kept(app, call_sid):
    """The rows of a call, and of nothing else."""
    with contextlib.closing(sqlite3.connect(app.database, timeout=20)) as database:
        database.row_factory = sqlite3.Row
        return database.execute("SELECT * FROM turns WHERE call_sid IN (?, ?) AND words <> '' ORDER BY id",
                                [call_sid, call_sid + "~"]).fetchall()


def logged(app, phone):
    return [text.partition(phone.call_sid)[2] for text in app.log().splitlines() if phone.call_sid in text]


def is_nowhere_in(app, *words):
    """Whether no file of this app holds any of these words, once it has swept."""
    time.sleep(0.2)
    healthz(app)
    files = b"".join(path.read_bytes() for path in pathlib.Path(app.scratch).iterdir())
    return not any(text.encode() in files for text in words)


# --- A guess that comes true ----------------------------------------------------------------------


@meanwhile
def test_the_answer_is_there_when_the_caller_stops_speaking(stage):
    stage.claude.when("what is new today", Reply(STORY, first_token=0.4, pace=200))
    phone = caller(stage)
    phone.speak("what is new today")
    stopped = time.monotonic()
    wait_until(lambda: any(row["reply"].endswith("third. ") for row in kept(line(stage), phone.call_sid)))
    assert phone.say(" What is  new, TODAY?") == STORY
    assert len(phone.documents) == 2, "all of it was there, so it came in one answer"
    assert guessed(stage, "what is new today").at < stopped
    phone.speak("and what is old now")
    phone.say("And what is old now?")
    first, reply, last = guessed(stage, "and what is old now").messages
    assert (first, last) == (("user", "What is  new, TODAY?"), ("user", "and what is old now"))
    assert reply[0] == "assistant"
    for words, final in ("what is new today", " What is  new, TODAY?"), ("and what is old now", "And what is old now?"):
        assert len(stage.claude.asked(words)) == 1
        assert not stage.claude.asked(final.strip())
    phone.hang_up()
    assert phone.warnings == []
    log = logged(line(stage), phone)
    # A guess in the middle of the words, as a busy machine makes it, takes a number of its own.
    assert sum(": begun " in text for text in log) == 2
    assert "turns 2, " in log[-1]
    assert not any(status not in (200, 204) for *_, status in phone.webhooks)
    partials = [seconds for url, _, seconds, _ in phone.webhooks if "/listening" in url]
    assert len(partials) == 9
    assert min(partials) < 0.2, "the answer doesn't wait for a guess"


@meanwhile
def test_a_reply_that_is_still_being_written_goes_on_after_the_final_words(stage):
    stage.claude.when("tell me slowly", Reply(STORY, first_token=0.2, pace=20))
    phone = caller(stage)
    phone.partial_result("tell me slowly", 1)
    guessed(stage, "tell me slowly")
    assert phone.say("Tell me slowly.", token="twice") == STORY
    before = len(phone.documents)
    assert phone.say("Tell me slowly.", token="twice") == STORY, "a second delivery is the same turn"
    assert len(phone.documents) == before + 1
    assert len(stage.claude.asked("tell me slowly")) == 1 and not stage.claude.asked("Tell me slowly.")
    assert [row["words"] for row in kept(line(stage), phone.call_sid)] == ["Tell me slowly."]
    log = logged(line(stage), phone)
    assert sum("turn 1: begun" in text for text in log) == 1
    assert sum("turn 1: first sentence" in text for text in log) == 1


@meanwhile
def test_a_tool_waits_for_the_final_words(stage):
    stage.claude.when("what time is it", Reply("Let me see.", blocks=[Tool("clock", {"time_zone": "Asia/Tokyo"})]))
    stage.claude.when("good bye then", Reply("Goodbye!", hang_up=True))
    phone = caller(stage)
    for words, tool in ("what time is it", "clock"), ("good bye then", "hang_up"):
        phone.partial_result(words)
        written(stage, words)
        time.sleep(A_WHILE)
        assert len(stage.claude.asked(words)) == 1 and not any(f"tool {tool}" in text for text in logged(line(stage), phone))
        heard = phone.say(words)
        if words.startswith("what"):
            assert heard.startswith("Let me see. The tools say: ") and "JST" in heard
            assert len(stage.claude.asked(words)) == 2, "once with the words, once with the time"
    assert heard == "Goodbye!" and phone.ended == "hangup"


# --- A guess that is wrong ------------------------------------------------------------------------


@meanwhile
def test_a_wrong_guess_leaves_nothing(stage):
    stage.claude.when("tell me about zebras", Reply(5 * LONG.replace("sentence", "stripe"), pace=20))
    phone = caller(stage)
    phone.speak("tell me about zebras", pause=0)
    request = guessed(stage, "tell me about zebras")
    wait_until(lambda: not is_nowhere_in(line(stage), "stripe"))
    assert phone.say("Tell me about zebras and lions.") == "You said: Tell me about zebras and lions."
    wait_until(lambda: request.closed_by_caller)
    wait_until(lambda: is_nowhere_in(line(stage), "stripe", "tell me about zebras", "tellmeaboutzebras"))
    assert [row["words"] for row in kept(line(stage), phone.call_sid)] == ["Tell me about zebras and lions."]
    phone.say("Thank you for the lions.")
    (request,) = stage.claude.asked("Thank you for the lions.")
    assert request.messages[0] == ("user", "Tell me about zebras and lions.") and len(request.messages) == 3
    phone.hang_up()
    log = logged(line(stage), phone)
    assert "turns 2, " in log[-1]
    assert sum(": first sentence" in text and "guess" not in text for text in log) == 2
    assert not any("begun" in text for text in log)


@meanwhile
def test_no_tool_is_run_for_a_wrong_guess(stage):
    stage.claude.when("what date have we", Reply("Let me look.", blocks=[Tool("clock")]))
    stage.claude.when("good bye for", Reply("Goodbye!", hang_up=True))
    phone = caller(stage)
    for words, final in ("what date have we", "What date have we to meet?"), ("good bye for", "Good bye for him means what?"):
        phone.partial_result(words)
        written(stage, words)
        time.sleep(A_WHILE)
        assert phone.say(final) == f"You said: {final}"
    assert not phone.ended
    assert len(stage.claude.asked("what date have we")) == 1
    assert not any("tool" in text for text in logged(line(stage), phone))


@meanwhile
def test_anything_but_case_punctuation_and_white_space_makes_a_guess_wrong(stage):
    phone = caller(stage)
    for guess, final in ("is it five or six", "Is it five or sixty?"), ("was it him there", "Was it them there?"), (
            "how much is x", "How much is x + x?"), ("do you know her", "Do you know her? No."):
        phone.partial_result(guess)
        guessed(stage, guess)
        assert phone.say(final) == f"You said: {final}"
    phone.partial_result("i press a key")
    guessed(stage, "i press a key")
    assert phone.press("5") == "You said: [The caller pressed 5]"


@meanwhile
def test_three_guesses_a_turn_and_one_at_a_time(stage):
    words = "i want to know whatever you say"
    guesses = [" ".join(words.split()[:number]) for number in (3, 4, 5, 6, 7)]
    for guess in guesses:
        stage.claude.when(guess, Reply(LONG, pace=20))
    phone = caller(stage)
    phone.partial_result("i", 1)
    time.sleep(A_WHILE)
    assert not stage.claude.asked("i"), "one word is too little"
    for number, guess in enumerate(guesses[:3], 2):
        phone.partial_result(guess, number)
        guessed(stage, guess)
    for earlier in guesses[:2]:
        wait_until(lambda earlier=earlier: stage.claude.asked(earlier)[0].closed_by_caller)
    for number, guess in enumerate(guesses[3:], 5):
        phone.partial_result(guess, number)
        time.sleep(A_WHILE)
        assert not stage.claude.asked(guess), "three are enough"
    stage.claude.when("I want to know whatever you say.", Reply(STORY))
    assert phone.say("I want to know whatever you say.") == STORY
    phone.partial_result("and now again", 1)
    assert guessed(stage, "and now again"), "another turn has guesses of its own"


@meanwhile
def test_what_changes_all_the_time_is_no_guess(stage):
    phone = caller(stage)
    for number, word in enumerate("wait a bit until i have made up my mind".split(), 1):
        phone.partial_result(f"please {word}", number)
        time.sleep(0.05)
    assert guessed(stage, "please mind")
    asked = [one.words for one in stage.claude.requests if one.words.startswith("please ")]
    assert len(asked) <= 3 and "please mind" in asked  # a busy machine may make pauses where there are none


@meanwhile
def test_when_claude_fails_for_a_guess_it_is_asked_again(stage):
    stage.claude.when("what went wrong here", Reply(status=400))
    phone = caller(stage)
    phone.partial_result("what went wrong here")
    written(stage, "what went wrong here")
    assert phone.say("What went wrong here?") == "You said: What went wrong here?"


@pytest.mark.parametrize("pace, jitter", [(0.15, 0.0), (0.45, 0.0), (0.3, 0.1), (0.35, 0.1)])
def test_no_guess_is_wasted_while_the_caller_speaks(stage, pace, jitter):
    words = f"please tell me at {pace} and {jitter} whatever you know"
    phone = caller(stage)
    phone.speak(words, pace, 0, jitter)
    guessed(stage, words)
    assert phone.say(words.capitalize() + "?") == f"You said: {words}"
    assert not stage.claude.asked(words.capitalize() + "?")
    log = logged(line(stage), phone)
    assert any(re.search(r"the last partial result came \d+ ms before Twilio asked", text) for text in log)
    assert words not in line(stage).log()


# --- Partial results that Twilio doesn't promise to send well ---------------------------------------


@meanwhile
def test_partial_results_of_every_kind_do_no_harm(stage):
    phone = caller(stage)
    of_the_first_turn = phone.partial_results_url()
    posted = [phone.partial_result("five comes late here", 5)]
    posted += [phone.partial_result("four comes later", 4), phone.partial_result("without a number it comes")]
    guessed(stage, "five comes late here")
    posted += [phone.partial_result("five comes late here", 5) for _ in range(3)]
    for words in "", "   ", "\U0001f600 \U0001f600", "?!", "x" * 9000, "a b " * 2000:
        posted += [phone.partial_result(words, number) for number in ("", "x", "-1", "9" * 40, "0")]
    posted.append(phone.request("POST", "/listening", {"CallSid": phone.call_sid}).status)
    posted.append(phone.request("POST", "/listening?after=x&turn=y", {**phone.params, "UnstableSpeechResult": "a b"}).status)
    assert phone.say("Five comes late here") == "You said: five comes late here" or stage.claude.asked("Five comes late here")
    posted += [phone.partial_result("five comes late here", 9, of_the_first_turn)]
    posted += [phone.partial_result("an earlier turn said this", 9, of_the_first_turn)]
    url = phone.partial_results_url()
    assert phone.say("Well, and now?") == "You said: Well, and now?"
    posted += [phone.partial_result("also an earlier turn", 9, url)]
    url = phone.partial_results_url()
    phone.hang_up()
    posted += [phone.partial_result("the call is over already", 9, url)]
    time.sleep(A_WHILE)
    for words in ("four comes later", "without a number it comes", "an earlier turn said this", "also an earlier turn",
                  "the call is over already"):
        assert not stage.claude.asked(words)
    assert len(stage.claude.asked("five comes late here")) == 1
    assert set(posted) == {204}
    assert kept(line(stage), phone.call_sid) == []


@meanwhile
def test_partial_results_without_numbers_are_taken_as_they_come(stage):
    phone = caller(stage)
    for words in "nobody numbers", "nobody numbers these":
        phone.partial_result(words)
    assert guessed(stage, "nobody numbers these")


@meanwhile
def test_after_a_noise_and_a_silence_the_numbers_begin_anew(stage):
    phone = caller(stage)
    for number in range(1, 9):
        phone.partial_result("hm", number)
    phone.stay_silent()
    phone.partial_result("now i speak", 1)
    assert guessed(stage, "now i speak")


@meanwhile
def test_only_twilio_is_listened_to(stage):
    phone = caller(stage)
    for token in None, "wrong":
        phone.token = token
        assert phone.partial_result("spend some money") == 403
    phone.token = TOKEN
    assert phone.request("POST", "/listening", {"CallSid": phone.call_sid}).status == 204
    assert not stage.claude.asked("spend some money")


# --- Who hangs up, cuts in, may not speak -----------------------------------------------------------


@meanwhile
def test_a_caller_who_hangs_up_in_the_middle_of_a_guess(stage):
    stage.claude.when("i wonder whether", Reply(5 * LONG.replace("sentence", "giraffe"), pace=20))
    phone = caller(stage)
    phone.partial_result("i wonder whether")
    request = guessed(stage, "i wonder whether")
    wait_until(lambda: not is_nowhere_in(line(stage), "giraffe"))
    phone.hang_up()
    wait_until(lambda: request.closed_by_caller)
    wait_until(lambda: is_nowhere_in(line(stage), "giraffe", "i wonder whether", "iwonderwhether"))
    assert "turns 0, " in next(text for text in logged(line(stage), phone) if "is over" in text)


@meanwhile
def test_the_first_partial_result_tells_when_the_caller_cut_in(stage):
    told = "Here you hear one sentence of a rather long tale. " * 8
    for final, guess in ("Stop it now, please.", "stop it now please"), ("Stop it there, I said.", "stop it there i"):
        question = f"Tell me a tale until I say {final}"
        stage.claude.when(question, Reply(told))
        phone = caller(stage)
        phone.say(question, token="twice")
        wait_until(lambda: kept(line(stage), phone.call_sid)[0]["stop"])
        phone.say(question, token="twice")  # now it is there, and comes in one piece
        at = phone.said[-1][1]
        time.sleep(max(0.0, at + 4.0 - time.monotonic()))  # ten words are heard in that time, of 80
        phone.partial_result(guess.split()[0], 1)
        late = time.monotonic() - at - 4.0  # this machine
        time.sleep(7)  # Twilio takes very long, so that much more would be heard
        phone.partial_result(guess, 2)
        guessed(stage, guess)
        phone.say(final)
        for request in stage.claude.asked(guess) + stage.claude.asked(final):
            role, words = request.messages[1]
            assert role == "assistant" and words.endswith("[The caller cut in here.]")
            assert 5 <= len(words.split()) - 5 <= 14 + 3 * late


@meanwhile
def test_who_may_not_speak_makes_no_guess(stage):
    proved = {"number": "+15551239876"}
    with stage.other_app(THINK_AHEAD="yes", PIN="123456", KEEP_DAYS="1", MAX_TURNS_A_DAY="2") as app:
        phone = caller(stage, app, **proved)
        assert not phone.partial_results_url()
        phone.partial_result("nobody knows me here", 1, "https://line.example.com/listening?after=0")
        phone.press("123456#")
        for number, words in enumerate(["i am a walrus", "i am well known"], 1):
            phone.partial_result(words, number)
            guessed(stage, words)
        other = caller(stage, app, **proved)
        other.press("123456#")
        assert other.say("Who am I in this call?") == "You said: Who am I in this call?", "a guess is no memory"
        assert phone.say("I am well known.") == "You said: i am well known"
        files = [path for path in pathlib.Path(app.scratch).iterdir() if path.name.startswith("calls.db")]
        wait_until(lambda: not any(b"walrus" in path.read_bytes() for path in files), 5)
        for one in phone, other:
            one.partial_result("what if there are none left", 9)
        time.sleep(A_WHILE)
        assert not stage.claude.asked("what if there are none left")
        assert not stage.claude.asked("nobody knows me here")
        assert "talked so much today" in phone.say("What if there are none left?")


# --- Off ------------------------------------------------------------------------------------------


@meanwhile
def test_off_it_asks_for_nothing_and_takes_nothing(stage):
    phone = stage.phone()
    phone.call()
    assert not phone.partial_results_url() and "after" not in phone.gather["action"]
    assert phone.partial_result("it is off here", 1, "https://line.example.com/listening?after=0") == 404
    time.sleep(A_WHILE)
    assert not stage.claude.asked("it is off here")
    with sqlite3.connect(stage.app.database) as database:
        assert not database.execute("SELECT 1 FROM calls WHERE call_sid = ?", [phone.call_sid]).fetchall()
    database.close()


def test_it_is_off_where_claude_may_search(stage):
    with stage.other_app(THINK_AHEAD="yes", WEB_SEARCHES="1") as app:
        phone = caller(stage, app)
        assert not phone.partial_results_url()
        assert "think_ahead (off, because of WEB_SEARCHES)" in app.log()


# --- Several processes ----------------------------------------------------------------------------


def another(stage):
    """Another process, with the same database."""
    return stage.shared("another", THINK_AHEAD="yes", DATABASE_URL=f"sqlite:///{line(stage).database}")


@meanwhile
def test_one_process_guesses_and_another_one_answers(stage):
    stage.claude.when("are you two by now", Reply(STORY, first_token=0.3, pace=40))
    stage.claude.when("are you three by", Reply(LONG, pace=20))
    phone = caller(stage)
    phone.partial_result("are you two by now", 1)
    guessed(stage, "are you two by now")
    phone.url = another(stage).url
    assert phone.say("Are you two by now?") == STORY
    assert not stage.claude.asked("Are you two by now?")
    phone.partial_result("are you three by", 1)
    request = guessed(stage, "are you three by")
    phone.url = line(stage).url
    assert phone.say("Are you three by now?") == "You said: Are you three by now?"
    wait_until(lambda: request.closed_by_caller)


@meanwhile
def test_kill_9_of_the_process_that_guesses(stage):
    stage.claude.when("will you die now", Reply(ending="stall"))
    stage.claude.when("will you die again", Reply(f"{STORY[:40]}", ending="stall"))
    with stage.other_app(THINK_AHEAD="yes") as app:
        phone = caller(stage, app)
        for words in "will you die now", "will you die again":
            phone.partial_result(words, 1)
            guessed(stage, words)
            time.sleep(0.1)
            os.kill(*app.workers(), signal.SIGKILL)
            time.sleep(1.2)  # the caller is silent, and Twilio waits
            final = words.capitalize() + "?"
            assert phone.say(final) == f"You said: {final}"
        assert [row["words"] for row in kept(app, phone.call_sid)] == ["Will you die now?", "Will you die again?"]

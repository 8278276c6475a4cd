"""Claude fails, in every way it can: the caller hears what there was and something honest, and the call goes on."""

import contextlib
import pathlib
import re
import sqlite3
import time

import pytest

from tests.claude import Reply
from tests.conftest import meanwhile, wait_until

SORRY = "Sorry, something went wrong at my end. Could you say that again?"
FIRST = "This is the first sentence."
BEGUN = f"{FIRST} And here the second beg"

# What Claude does, what the caller hears, and how the log calls it.
TROUBLE = {
    "bad request": (Reply(status=400), SORRY, r"BadRequestError 400 invalid_request_error, request req_pretend_\d+"),
    "bad key": (Reply(status=401), SORRY, r"AuthenticationError 401 authentication_error, request req_pretend_\d+"),
    "no such model": (Reply(status=404), SORRY, r"NotFoundError 404 not_found_error, request req_pretend_\d+"),
    "long limit": (Reply(status=429, retry_after="60"), SORRY, r"RateLimitError 429 rate_limit_error, request req_\w+"),
    "not JSON": (Reply(body=b"<html>502 Bad Gateway</html>"), SORRY, r"EOFError, request req_pretend_\d+"),
    "half an event": (Reply(body=b'event: message_start\ndata: {"type": \n\n'), SORRY, r"JSONDecodeError, request req_\w+"),
    "cut in mid-reply": (Reply(BEGUN, ending="cut"), f"{BEGUN} {SORRY}", r"(Read|RemoteProtocol)Error \(\w+\), request req_\w+"),
    "closed in mid-reply": (Reply(BEGUN, ending="close"), f"{BEGUN} {SORRY}", r"EOFError, request req_pretend_\d+"),
    "error in mid-reply": (
        Reply(BEGUN, error="overloaded_error"), f"{BEGUN} {SORRY}", r"APIStatusError 200 overloaded_error, request req_\w+"
    ),
    "refusal": (Reply(stop="refusal"), "I can't help with that. What else can I do for you?", r"refusal, request req_\w+"),
    "no text": (Reply(""), "I don't know what to say to that. Could you put it another way?", r"end_turn without words, request req_\w+"),
    "only white space": (Reply(" \n "), "I don't know what to say to that. Could you put it another way?", r"end_turn without words, req"),
    "cut off by max_tokens": (
        Reply(BEGUN, stop="max_tokens"),
        f"{BEGUN} There's more to say about that. Shall I go on?",
        r"max_tokens, request req_pretend_\d+",
    ),
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_trouble_is_heard_logged_and_over(stage, claude, phone, trouble):
    reply, heard, logged = TROUBLE[trouble]
    claude.when(f"Have {trouble}.", reply)
    claude.when("Go on after that.", Reply("Gladly, where were we?"))
    phone.call()
    assert phone.say("I am Ann.") == "You said: I am Ann."
    assert phone.say(f"Have {trouble}.") == heard
    wait_until(lambda: re.search(rf"call {phone.call_sid} turn 2: .*{logged}", stage.app.log()))
    assert phone.say("Go on after that.") == "Gladly, where were we?"
    said = claude.requests[-1].messages
    assert said[:2] == [("user", "I am Ann."), ("assistant", "You said: I am Ann.")]
    assert all("Sorry" not in words and "can't help" not in words for _, words in said)
    if trouble == "refusal":
        assert len(said) == 3, "what was refused isn't sent again: Claude would go on refusing"
    else:
        assert said[2] == ("user", f"Have {trouble}.")

@pytest.mark.parametrize("trouble", [
    Reply(status=429), Reply(status=529), Reply(status=500), Reply(error="overloaded_error"),
    Reply("Here I a", ending="cut"), Reply(status=429, retry_after="1"), Reply(status=429, retry_after="0"),
    Reply(status=429, retry_after="nan"), Reply(status=503, retry_after="later"),
], ids=["429", "529", "500", "overloaded", "cut", "in a second", "at once", "nan", "later"])
def test_passing_trouble_is_not_even_noticed(claude, phone, trouble):
    words = f"Try {trouble}."
    claude.when(words, trouble, Reply("Here I am again."))
    phone.call()
    assert phone.say(words) == "Here I am again."
    assert len(claude.asked(words)) == 2


@meanwhile
def test_lasting_trouble_ends_within_the_callers_patience(stage):
    stage.claude.when("Overload.", Reply(status=529))
    phone = stage.phone()
    phone.call()
    assert phone.say("Overload.") == SORRY
    assert 2 < len(stage.claude.asked("Overload.")) < 8
    assert phone.webhooks[-1][2] < 10


@meanwhile
def test_asking_again_is_never_a_flood(stage):
    stage.claude.when("Flood.", Reply(status=429, retry_after="0"))
    phone = stage.phone()
    phone.call()
    assert phone.say("Flood.") == SORRY
    assert len(stage.claude.asked("Flood.")) < 8


@meanwhile
def test_a_reply_that_only_pings_is_a_stall(stage):
    stage.claude.when("Ping.", Reply("Yes. And a half", ending="ping"))
    phone = stage.phone()
    phone.call()
    heard = phone.say("Ping.")
    assert "Yes. And a half" in heard and heard.endswith(SORRY)
    (request,) = stage.claude.asked("Ping.")
    wait_until(lambda: request.closed_by_caller)


@meanwhile
def test_a_stall_after_the_first_sentence(stage):
    stage.claude.when("Stall.", Reply(FIRST + " And", ending="stall"))
    phone = stage.phone()
    phone.call()
    heard = phone.say("Stall.")
    assert heard.startswith(FIRST) and heard.endswith(SORRY)
    assert max(seconds for _, _, seconds, _ in phone.webhooks) < 10
    assert phone.say("And now?") == "You said: And now?"


@meanwhile
def test_a_stall_that_hides_the_end_of_the_first_sentence(stage):
    stage.claude.when("Stall at once.", Reply(FIRST, ending="stall"))
    phone = stage.phone()
    phone.call()
    heard = phone.say("Stall at once.")
    assert FIRST in heard and heard.endswith(SORRY)


@meanwhile
def test_claude_is_not_there_at_all(stage):
    with stage.other_app(ANTHROPIC_BASE_URL="http://127.0.0.1:9") as app:
        phone = stage.phone(app)
        phone.call()
        assert phone.say("Anybody?") == SORRY
        wait_until(lambda: "APIConnectionError" in app.log())
        assert "Traceback" not in app.log()


@meanwhile
def test_without_a_key_the_line_says_so_and_repeats_what_it_hears(stage):
    with stage.other_app(ANTHROPIC_API_KEY=None) as app:
        phone = stage.phone(app)
        phone.call()
        for words in ("Hello there!", "<Say>a & b</Say>", "\x0b\x00odd\ufffe"):
            heard = phone.say(words)
            assert "no key" in heard
        assert "Hello there!" in phone.said[2][0] and "odd" in heard
        assert phone.warnings == [] and not phone.ended
        assert "ANTHROPIC_API_KEY is not set" in app.log()


@meanwhile
def test_model_effort_prompt_and_greeting_are_settings(stage):
    settings = dict(CLAUDE_MODEL="claude-haiku-4-5", CLAUDE_EFFORT="none", SYSTEM_PROMPT="Be a pirate.", GREETING="Ahoy!")
    settings.update(VOICES="Polly.Amy-Neural", LANGUAGES="en-GB", ALLOWED_CALLERS="+15551230001")
    with stage.other_app(**settings) as app:
        phone = stage.phone(app)
        assert phone.call() == "Ahoy!"
        assert phone.say("Which model?") == "You said: Which model?"
        body = stage.claude.asked("Which model?")[0].body
        assert (body["model"], body["system"]) == ("claude-haiku-4-5", "Be a pirate.")
        assert "output_config" not in body
        assert b'voice="Polly.Amy-Neural"' in phone.documents[-1]
        assert phone.documents[-1].count(b'language="en-GB"') == 2, "of <Gather> and of <Say>"
        assert stage.phone(app, number="+15551230002").call() == ""
        wait_until(lambda: "...002 is not in ALLOWED_CALLERS" in app.log())
        assert "5551230002" not in app.log()


def test_the_log_has_a_line_a_turn_and_no_word_of_it(stage, logged):
    phone = stage.phone(number="+15557654321")
    phone.call()
    phone.say("My secret is a marmalade sandwich.")
    phone.press("7")
    line = rf"INFO call {phone.call_sid} turn 1: first sentence \d+ ms, end \d+ ms, tokens \d+ in \d+ out, end_turn, request"
    wait_until(lambda: re.search(line, logged()))
    for secret in ("marmalade", "+15557654321", "5557654321", "12345\n", "sk-ant"):
        assert secret not in logged()


@pytest.mark.parametrize("status, retry_after", [(400, None), (401, None), (404, None), (429, "60"), (529, "60")])
def test_what_would_not_help_is_not_tried(phone, claude, status, retry_after):
    words = f"Refuse with {status} and {retry_after}."
    claude.when(words, Reply(status=status, retry_after=retry_after))
    phone.call()
    assert phone.say(words) == SORRY
    assert len(claude.asked(words)) == 1


@pytest.mark.parametrize("status", [429, 529])
def test_claude_is_asked_again_when_it_said(phone, claude, status):
    words = f"After {status}, wait."
    claude.when(words, Reply(status=status, retry_after="0.9"), Reply("Here I am again."))
    phone.call()
    assert phone.say(words) == "Here I am again."
    first, second = claude.asked(words)
    assert second.at - first.at >= 0.9


def test_a_reply_that_its_process_left_before_the_first_word_is_given_up(phone, stage):
    phone.call()
    phone.say("Hello?")
    with contextlib.closing(sqlite3.connect(stage.app.database, isolation_level=None)) as database:
        lost = "UPDATE turns SET reply = '', stop = NULL, touched = touched - 40 WHERE call_sid = ?"
        database.execute(lost, [phone.call_sid])
    began = time.monotonic()
    assert phone.webhook("/talking?turn=1&heard=0") == SORRY
    assert time.monotonic() - began < 5, "and not only when PATIENCE is over"


@meanwhile
def test_what_is_given_up_is_not_read_on(stage):
    stage.claude.when("Stall for good.", Reply("This is the first sentence. And", ending="stall"))
    phone = stage.phone()
    phone.call()
    phone.say("Stall for good.")
    (request,) = stage.claude.asked("Stall for good.")
    wait_until(lambda: request.closed_by_caller)
    wait_until(lambda: re.search(rf"call {phone.call_sid} turn 1: .*ReadTimeout", stage.app.log()))


def used_by(app):
    """How many threads the app's worker has, and how many bytes of memory."""
    (worker,) = app.workers()
    lines = pathlib.Path(f"/proc/{worker}/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return int(status["Threads"]), 1024 * int(status["VmRSS"].split()[0])


@meanwhile
def test_calls_that_are_over_leave_nothing_in_memory(stage):
    # With one arena what glibc keeps for later doesn't depend on which threads were busy.
    with stage.other_app(MALLOC_ARENA_MAX="1") as app:

        def calls(numbers):
            """Calls with names of 25,000 letters: what is left of a call can be seen."""
            for number in numbers:
                phone = stage.phone(app, CallSid=f"CA{number:025000}")
                assert phone.webhook("/talking", {"SpeechResult": "Hello?"}) == "You said: Hello?"
                phone.hang_up()

        calls(range(60))  # what is allocated once is allocated then
        threads, memory = used_by(app)
        calls(range(60, 260))
        # If only the name of each call were left, that would be 5 MB.
        wait_until(lambda: used_by(app)[0] < threads + 20)
        assert used_by(app)[1] < memory + 4_000_000


COUNTED = b"""\
event: message_start
data: {"type": "message_start", "message": {"usage": {"input_tokens": 1, "cache_creation_input_tokens": 20, \
"cache_read_input_tokens": 300, "output_tokens": 1}}}

event: content_block_start
data: {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}

event: content_block_delta
data: {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "I can."}}

event: message_delta
data: {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 4}}

"""


def test_tokens_of_the_cache_are_counted_too(stage, claude, phone):
    claude.when("Can you count?", Reply(body=COUNTED))
    phone.call()
    assert phone.say("Can you count?") == "I can."
    wait_until(lambda: f"call {phone.call_sid} turn 1: " in stage.app.log())
    assert "tokens 321 in 4 out" in stage.app.log()

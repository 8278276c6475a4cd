"""Claude or the network fails: the caller hears what there was, then something honest, and the call goes on."""

import concurrent.futures
import contextlib
import json
import pathlib
import re
import signal
import socket
import threading
import time

import pytest

from conversation import MOST_WAITS
from tests.claude import THOUGHTS, Reply, Thinking, Tool
from tests.stage import (
    FASTER,
    ROOT,
    SORRY,
    SPEED,
    everything_in,
    in_thread,
    is_part_of,
    open_database,
    turn_is_logged,
    turns_of,
    wait_until,
)

FIRST = "This is the first sentence."
BEGUN = f"{FIRST} And here the second beg"
NO_ANSWER = "I don't know what to say to that. Could you put it another way?"


# --- Streams, event by event ----------------------------------------------------------------------


def events(*events):
    """A stream with these events, as bytes."""
    return "".join(f"event: {name_of(event)}\ndata: {json.dumps(event)}\n\n" for event in events).encode()


def name_of(event):
    return event.get("type", "some") if isinstance(event, dict) else "some"


def usage(**counts):
    return {"type": "message_start", "message": {"id": "msg_1", "content": [], "usage": counts}}


def block(index, text=""):
    return {"type": "content_block_start", "index": index, "content_block": {"type": "text", "text": text}}


def tool_block(index, name):
    tool = {"type": "tool_use", "id": f"toolu_{index}", "name": name}
    return {"type": "content_block_start", "index": index, "content_block": tool}


def text(words, index=0):
    return {"type": "content_block_delta", "index": index, "delta": {"type": "text_delta", "text": words}}


def piece(index, json):
    return {"type": "content_block_delta", "index": index, "delta": {"type": "input_json_delta", "partial_json": json}}


def error(kind):
    return {"type": "error", "error": {"type": kind, "message": "no"}}


def end(stop="end_turn"):
    counts = {"output_tokens": 9, "input_tokens": None, "server_tool_use": None}
    return {"type": "message_delta", "delta": {"stop_reason": stop, "stop_sequence": None}, "usage": counts}


START = usage(input_tokens=1, output_tokens=1)


# --- Trouble that the caller hears ----------------------------------------------------------------

# What Claude does, what the caller hears, and what the log calls it.
TROUBLE = {
    "bad request": (Reply(status=400), SORRY, r"BadRequestError 400 invalid_request_error, request req_pretend_\d+"),
    "bad key": (Reply(status=401), SORRY, r"AuthenticationError 401 authentication_error, request req_pretend_\d+"),
    "no such model": (Reply(status=404), SORRY, r"NotFoundError 404 not_found_error, request req_pretend_\d+"),
    "long limit": (Reply(status=429, retry_after="60"), SORRY, r"RateLimitError 429 rate_limit_error, request req_\w+"),
    "cut in mid-reply": (
        Reply(BEGUN, ending="cut"), f"{BEGUN} {SORRY}", r"(Read|RemoteProtocol)Error \(\w+\), request req_\w+"
    ),
    "closed in mid-reply": (Reply(BEGUN, ending="close"), f"{BEGUN} {SORRY}", r"EOFError, request req_pretend_\d+"),
    "error in mid-reply": (
        Reply(BEGUN, error="overloaded_error"), f"{BEGUN} {SORRY}", r"APIStatusError 200 overloaded_error, request req_"
    ),
    "refusal": (Reply(stop="refusal"), "I can't help with that. What else can I do for you?", "refusal, request req_"),
    "no text": (Reply(""), NO_ANSWER, r"end_turn without words, request req_\w+"),
    "only white space": (Reply(" \n "), NO_ANSWER, r"end_turn without words, request req_\w+"),
    "cut off by max_tokens": (
        Reply(BEGUN, stop="max_tokens"),
        f"{BEGUN} There's more to say about that. Shall I go on?",
        r"max_tokens, request req_pretend_\d+",
    ),
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_trouble_is_heard_and_logged_and_the_call_goes_on(stage, claude, phone, trouble):
    reply, heard, logged = TROUBLE[trouble]
    claude.when(f"Have {trouble}.", reply)
    claude.when(f"Go on after {trouble}.", Reply("Gladly, where were we?"))
    phone.call()
    assert phone.say("I am Ann.") == "You said: I am Ann."
    assert phone.say(f"Have {trouble}.") == heard
    wait_until(lambda: re.search(rf"call {phone.call_sid} turn 2: .*{logged}", stage.app.log()))
    assert phone.say(f"Go on after {trouble}.") == "Gladly, where were we?"
    (request,) = claude.asked(f"Go on after {trouble}.")
    sent = request.messages
    assert sent[:2] == [("user", "I am Ann."), ("assistant", "You said: I am Ann.")]
    assert all("Sorry" not in words and "can't help" not in words for _, words in sent)
    if trouble == "refusal":
        assert len(sent) == 3, "what was refused isn't sent again: Claude would go on refusing"
    else:
        assert sent[2] == ("user", f"Have {trouble}.")


# Claude is asked again and again, but in vain.
LASTING_TROUBLE = {
    "overload": (Reply(status=529), r"\w+Error 529 overloaded_error"),
    "leave to ask again at once": (Reply(status=429, retry_after="0"), "RateLimitError 429 rate_limit_error"),
    "a page instead of events": (Reply(body=b"<html>502 Bad Gateway</html>"), "EOFError"),
    "half an event": (Reply(body=b'event: message_start\ndata: {"type": \n\n'), "JSONDecodeError"),
}


@pytest.mark.parametrize("trouble", [
    "overload",
    *(pytest.param(trouble, marks=pytest.mark.slow) for trouble in LASTING_TROUBLE if trouble != "overload"),
])
def test_lasting_trouble_ends_within_the_callers_patience(stage, claude, trouble):
    reply, logged = LASTING_TROUBLE[trouble]
    words = f"Have lasting trouble: {trouble}."
    claude.when(words, reply)
    phone = stage.phone(stage.faster)
    phone.call()
    assert phone.say(words).endswith(SORRY)
    line = turn_is_logged(stage.faster, phone)
    assert re.search(rf"{logged}, request req_pretend_\d+", line)
    ((_, stop),) = turns_of(stage.faster, phone, "reply, stop")
    assert re.fullmatch(logged, stop), "the reply ended by itself, and not because nothing came"
    assert len(claude.asked(words)) < 8, "asking again is never a flood"
    assert phone.say("And now?").endswith("You said: And now?")
    assert phone.warnings == []


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["overload", "leave to ask again at once"])
def test_claude_is_asked_a_few_times_while_the_caller_has_patience(phone, claude, trouble):
    words = f"Ask a few times: {trouble}."
    claude.when(words, LASTING_TROUBLE[trouble][0])
    phone.call()
    assert phone.say(words) == SORRY
    assert 2 < len(claude.asked(words)) < 8
    assert phone.webhooks[-1][2] < 10


@pytest.mark.parametrize("status, retry_after", [(400, None), (401, None), (404, None), (429, "60"), (529, "60")])
def test_claude_is_not_asked_again_if_that_would_not_help(phone, claude, status, retry_after):
    words = f"Refuse with {status} and {retry_after}."
    claude.when(words, Reply(status=status, retry_after=retry_after))
    phone.call()
    assert phone.say(words) == SORRY
    assert len(claude.asked(words)) == 1


@pytest.mark.parametrize("kind", ["invalid_request_error", "authentication_error"])
def test_claude_is_not_asked_again_if_an_event_says_that_the_request_is_at_fault(phone, claude, kind):
    words = f"Be at fault: {kind}."
    claude.when(words, Reply(error=kind))
    phone.call()
    assert phone.say(words) == SORRY
    assert len(claude.asked(words)) == 1


def test_nothing_said_after_a_tool_is_no_silence(phone, claude):
    claude.when("Look, and say nothing.", Reply("Let me look.", blocks=[Tool("clock")], then=Reply("")))
    phone.call()
    assert phone.say("Look, and say nothing.") == f"Let me look. {NO_ANSWER}"


def test_without_a_key_the_line_says_so_and_repeats_what_it_hears(stage):
    with stage.other_app(ANTHROPIC_API_KEY=None) as app:
        phone = stage.phone(app)
        phone.call()
        for words in "Hello there!", "<Say>a & b</Say>", "\x0b\x00odd\ufffe":
            heard = phone.say(words)
            assert "no key" in heard
        assert "Hello there!" in phone.said[2][0] and "odd" in heard
        assert phone.warnings == [] and not phone.ended
        assert "ANTHROPIC_API_KEY is not set" in app.log()


# --- Trouble that the caller doesn't notice -------------------------------------------------------

PASSING_TROUBLE = {
    "429": Reply(status=429),
    "529": Reply(status=529),
    "500": Reply(status=500),
    "408": Reply(status=408),
    "409": Reply(status=409),
    "429 for no time": Reply(status=429, retry_after="0"),
    "429 for nan": Reply(status=429, retry_after="nan"),
    "503 until later": Reply(status=503, retry_after="later"),
    "an overload in the stream": Reply(error="overloaded_error"),
    "an error in the stream": Reply(error="api_error"),
    "an error before the end of a sentence": Reply("Here I a", error="api_error"),
    "a timeout in the stream": Reply(body=events(error("timeout_error"))),
    "an internal error in the stream": Reply(body=events(error("internal_server_error"))),
    "an error that is only a word": Reply(body=(ROOT / "tests/sse/error-string-at-once.sse").read_bytes()),
    "a connection cut before the end of a sentence": Reply("Here I a", ending="cut"),
    "a connection cut before the reply": Reply(ending="reset"),
    "nothing": Reply(body=b""),
    "only a beginning": Reply(body=events(START)),
    "a page": Reply(body=b"<html>502 Bad Gateway</html>"),
    "JSON": Reply(body=b'{"type": "error", "error": {"type": "api_error", "message": "no"}}'),
    "half an event": Reply(body=b'event: message_start\ndata: {"type": \n\n'),
}


def all_hear(stage, all_words):
    """What callers hear who say these words at the same time, each in a call of their own."""
    phones = [stage.phone() for _ in all_words]

    def call(phone, words):
        phone.call()
        return words, phone.say(words)

    with concurrent.futures.ThreadPoolExecutor(len(phones)) as threads:
        return dict(threads.map(call, phones, all_words))


def test_the_caller_does_not_notice_passing_trouble(stage, claude):
    """The calls take place at once, because each of them waits for half a second."""
    all_words = {f"Try and have {kind}.": reply for kind, reply in PASSING_TROUBLE.items()}
    for words, reply in all_words.items():
        claude.when(words, reply, Reply("Here I am again."))
    assert all_hear(stage, all_words) == {words: "Here I am again." for words in all_words}
    assert {words: len(claude.asked(words)) for words in all_words} == {words: 2 for words in all_words}


@pytest.mark.slow
def test_claude_is_asked_again_when_it_said(stage, claude):
    all_words = [f"After {status}, wait." for status in (429, 529)]
    for words, status in zip(all_words, (429, 529)):
        claude.when(words, Reply(status=status, retry_after="0.9"), Reply("Here I am again."))
    assert all_hear(stage, all_words) == {words: "Here I am again." for words in all_words}
    for words in all_words:
        first, second = claude.asked(words)
        assert second.at - first.at >= 0.9


# --- Stalls ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["stall", "ping"])
def test_after_nine_fillers_in_a_row_nothing_more_is_waited_for(stage, claude, ending):
    words = f"Begin and then {ending} for ever."
    claude.when(words, Reply(f"{FIRST} And", ending=ending))
    phone = stage.phone(stage.faster)
    phone.call()
    # Twilio asks for the first part, and what it does with the answer doesn't matter here.
    phone.request("POST", "/talking", {**phone.params, "SpeechResult": words})
    reply = wait_until(lambda: turns_of(stage.faster, phone)[0][1])
    assert reply == f"{FIRST} "
    assert phone.webhook(f"/talking?turn=1&heard={len(reply)}&waited={MOST_WAITS}") == SORRY
    assert turns_of(stage.faster, phone, "stop") == [("stalled",)]
    assert phone.say("And now?").endswith("You said: And now?")


STALLS = {
    # The beginning of a reply, how it goes on, and what the log says.
    "after a sentence": (f"{FIRST} And", "stall", r"ReadTimeout \(\w+\)"),
    "before it is clear that a sentence has ended": (FIRST, "stall", r"ReadTimeout \(\w+\)"),
    "and only pings": (f"{FIRST} And a half", "ping", "TimeoutError"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", STALLS)
def test_a_stalled_reply_is_given_up_and_not_read_on(stage, claude, kind):
    text, ending, logged = STALLS[kind]
    words = f"Stall {kind}."
    claude.when(words, Reply(text, ending=ending))
    phone = stage.phone(stage.faster)
    phone.call()
    heard = phone.say(words)
    for filler in "One moment.", "I'm still thinking about that.", "This is taking a little longer.":
        heard = heard.replace(f"{filler} ", "")
    assert heard == f"{text} {SORRY}"
    assert re.search(f" {logged}, request", turn_is_logged(stage.faster, phone))
    (request,) = claude.asked(words)
    wait_until(lambda: request.closed_by_caller)
    assert phone.say("And now?").endswith("You said: And now?")


@pytest.mark.slow
def test_twilio_never_waits_long_during_a_stall(phone, claude):
    claude.when("Stall in real time.", Reply(f"{FIRST} And", ending="stall"))
    phone.call()
    heard = phone.say("Stall in real time.")
    assert heard.startswith(f"{FIRST} One moment.") and heard.endswith(SORRY)
    assert max(seconds for _, _, seconds, _ in phone.webhooks) < 10
    assert phone.say("And now?") == "You said: And now?"


@pytest.mark.slow
def test_a_reply_whose_process_died_before_the_first_word_is_given_up(phone, stage):
    phone.call()
    phone.say("Hello?")
    with open_database(stage.app.database) as database:
        lost = "UPDATE turns SET reply = '', stop = NULL, touched = touched - 40 WHERE call_sid = ?"
        database.execute(lost, [phone.call_sid])
    # At once, and without "One moment.", which would come first if the caller had to wait for PATIENCE.
    assert phone.webhook("/talking?turn=1&heard=0") == SORRY


# --- A server that never ends ---------------------------------------------------------------------


@contextlib.contextmanager
def endless_server(begin, then, pause=0.0):
    """In place of Claude: sends some bytes, and then others over and over again.

    Yields:
        The address, a list that grows with each request, and one that grows whenever the app closes a connection.
    """
    asked, closed, done = [], [], threading.Event()

    def answer(connection):
        with contextlib.closing(connection), contextlib.suppress(OSError):
            asked.append(connection.recv(65536))
            try:
                connection.sendall(begin)
                while not done.wait(pause):
                    connection.sendall(then)
            except OSError:
                closed.append(connection)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=answer, args=[listener.accept()[0]], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked, closed
        done.set()
        listener.shutdown(socket.SHUT_RDWR)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
HALF_A_HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize("then", [b": a comment\n\n", b"x"], ids=["comments", "a line without an end"])
@pytest.mark.slow
def test_no_thread_outlives_its_caller_for_long(stage, then):
    with (
        endless_server(HEAD + events(START, block(0)), then, pause=1.0 / SPEED) as (url, asked, closed),
        stage.other_app(ANTHROPIC_BASE_URL=url, module=FASTER) as app,
    ):
        phone = stage.phone(app)
        phone.call()
        heard = in_thread(lambda: phone.say("Hello?"))
        wait_until(lambda: asked)
        stage.phone(app, CallSid=phone.call_sid).hang_up()
        # An error of another kind would mean that the thread has only run out of time.
        assert "CallerGone" in wait_until(lambda: re.search(r"turn 1: first sentence.*", app.log()))[0]
        wait_until(lambda: closed)
        heard()
        app.kill(signal.SIGTERM)
        assert app.process.wait(20) == 0  # seconds; gunicorn itself would end it after 30


@pytest.mark.parametrize("words", [
    pytest.param("This is one of many sentences. ", id="sentences", marks=pytest.mark.slow),
    pytest.param(20 * "😀. ", id="emoji", marks=pytest.mark.slow),
    pytest.param(20 * "***. \n\n", id="stars"),
])
def test_a_server_that_never_ends_is_not_spoken_for_ever(stage, words):
    with (
        endless_server(HEAD + events(START, block(0)), events(text(words))) as (url, _, closed),
        stage.other_app(ANTHROPIC_BASE_URL=url, module=FASTER) as app,
    ):
        phone = stage.phone(app)
        phone.call()
        heard = phone.say("Hello?")
        assert heard.endswith(SORRY) and len(heard) < 30_000
        wait_until(lambda: closed)
        assert phone.warnings == []


@pytest.mark.slow
def test_a_server_that_never_begins_is_given_up(stage):
    with (
        endless_server(HALF_A_HEAD, b"x", pause=1.0 / SPEED) as (url, asked, _),
        stage.other_app(ANTHROPIC_BASE_URL=url, module=FASTER) as app,
    ):
        phone = stage.phone(app, speaking_rate=3 * SPEED)
        phone.call()
        began = time.monotonic()
        assert phone.say("Hello?").endswith(SORRY)
        assert asked and time.monotonic() < began + 90 and not phone.warnings


# --- Odd streams ----------------------------------------------------------------------------------

UNKNOWN = {
    "an event of another kind": {"type": "future_event", "index": 0, "delta": ["?"], "usage": 7},
    "a block of another kind": {"type": "content_block_start", "index": 1, "content_block": {"type": "future"}},
    "a delta of another kind": {"type": "content_block_delta", "index": 0, "delta": {"type": "future_delta", "x": "?"}},
    "an event with more in it": {**text(""), "future": {"text": "?"}},
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_the_caller_does_not_notice_what_claude_may_send_some_day(phone, claude, kind):
    words = f"Send {kind}."
    claude.when(words, Reply(body=events(START, block(0), text(FIRST), UNKNOWN[kind], text(" And another."), end())))
    phone.call()
    assert phone.say(words) == f"{FIRST} And another."


BROKEN = {
    "no delta": {"type": "content_block_delta", "index": 0},
    "a delta that is null": {"type": "content_block_delta", "index": 0, "delta": None},
    "text that is a number": text(7),
    "a list": ["content_block_delta"],
    "null": None,
    "a start without a message": {"type": "message_start"},
    "an error without a word": {"type": "error"},
    "an end without a reason": {"type": "message_delta", "usage": {"output_tokens": 1}},
}


@pytest.fixture(scope="module")
def app_with_tracebacks(stage):
    """An app that may log tracebacks: it does so when an event makes no sense."""
    with stage.other_app(module=FASTER, MAX_TURNS="500") as app:
        yield app


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("before", ["", FIRST], ids=["at once", "in mid-reply"])
def test_an_event_that_makes_no_sense_ends_the_reply_and_not_the_call(stage, claude, app_with_tracebacks, kind, before):
    words = f"Send {kind} after {before!r}."
    claude.when(words, Reply(body=events(START, block(0), text(f"{before} "), BROKEN[kind], text("Late."), end())))
    phone = stage.phone(app_with_tracebacks)
    phone.call()
    heard = phone.say(words)
    assert before in heard and heard.endswith(SORRY) and "Late." not in heard
    ((reply, stop),) = turns_of(app_with_tracebacks, phone, "reply, stop")
    assert reply.strip() == before and stop != "stalled", "nobody waits in vain"
    turn_is_logged(app_with_tracebacks, phone)
    assert phone.say("And now?").endswith("You said: And now?")
    assert phone.warnings == []


@pytest.mark.parametrize("stop", ["\ud800", "x" * 1000, "", "hand_over: x"])
def test_the_caller_hears_an_apology_if_a_reply_ends_in_an_unknown_way(stage, claude, stop):
    words = f"End oddly {ascii(stop)[:9]}."
    claude.when(words, Reply("Very well, then.", stop=stop))
    phone = stage.phone(stage.faster)
    phone.call()
    assert phone.say(words).endswith(f"Very well, then. {SORRY}")
    assert phone.warnings == []


def test_the_beginning_of_a_text_may_come_with_its_block(phone, claude):
    stream = events(START, block(0, "Here is the beginning"), text(" and here the end of it."), end())
    claude.when("Begin early.", Reply(body=stream))
    phone.call()
    assert phone.say("Begin early.") == "Here is the beginning and here the end of it."


def test_two_blocks_may_grow_in_turns(stage, claude):
    claude.when("When do they leave from two stops?", Reply(body=events(
        START, block(0, "I look at two stops."), tool_block(1, "bus_times"), tool_block(2, "bus_times"),
        piece(1, '{"stop": '), piece(2, '{"stop": "B"}'), piece(1, '"A"}'), end("tool_use"))))
    phone, refused = stage.phone(stage.own_tools), len(claude.refused)
    phone.call()
    heard = phone.say("When do they leave from two stops?")
    assert "I look at two stops." in heard
    assert heard.endswith("The tools say: From A: in 5 minutes From B: in 5 minutes")
    sent = claude.asked("When do they leave from two stops?")[-1].body["messages"]
    assert [used["input"] for used in sent[-2]["content"][1:]] == [{"stop": "A"}, {"stop": "B"}]
    assert [result["content"] for result in sent[-1]["content"]] == ["From A: in 5 minutes", "From B: in 5 minutes"]
    assert claude.refused[refused:] == [] and phone.warnings == []


def test_a_tool_without_an_input_has_an_empty_one(phone, claude):
    claude.when("Just hang up.", Reply(body=events(START, tool_block(0, "hang_up"), end("tool_use"))))
    phone.call()
    assert phone.say("Just hang up.") == "Goodbye!" and phone.ended == "hangup"


def test_what_claude_thinks_is_never_heard_kept_or_sent_again(phone, stage, claude):
    reply = Reply("I have thought.", thinking=True, blocks=[Thinking(), " And thought again."])
    claude.when("Think before you speak.", reply)
    phone.call()
    assert phone.say("Think before you speak.") == "I have thought. And thought again."
    phone.say("And what did you think?")
    thought = THOUGHTS.split(".")[0]
    (request,) = claude.asked("And what did you think?")
    assert is_part_of(request.messages[1][1], "I have thought. And thought again.")
    assert thought not in json.dumps(request.body)
    assert thought.encode() not in everything_in(stage.app)


@pytest.mark.parametrize(
    "behind", [[" One more thing."], [Tool("look_up", {"what": "a word"})]], ids=["text", "a tool"])
def test_the_call_ends_whatever_stands_behind_the_tool(phone, claude, behind):
    words = f"Good bye, {behind}."
    claude.when(words, Reply("It was nice.", blocks=[Tool("hang_up"), *behind], then=Reply("")))
    phone.call()
    assert phone.say(words) in ("It was nice.", "It was nice. One more thing.")
    assert phone.ended == "hangup"


def test_a_reply_may_be_long_but_not_endless(phone, claude):
    phone.call()
    phone.say("How long may that be?")
    (request,) = claude.asked("How long may that be?")
    assert 1000 <= request.body["max_tokens"] <= 4000, "thinking counts too; and ten minutes' talk is enough"


# --- Tokens ---------------------------------------------------------------------------------------


def test_tokens_of_the_cache_are_counted_too(stage, claude, phone):
    counts = usage(input_tokens=1, cache_creation_input_tokens=20, cache_read_input_tokens=300, output_tokens=1)
    stop = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 4}}
    claude.when("Can you count?", Reply(body=events(counts, block(0), text("I can."), stop)))
    phone.call()
    assert phone.say("Can you count?") == "I can."
    assert "tokens 321 in 4 out" in turn_is_logged(stage.app, phone)


def test_tokens_may_not_have_been_counted(phone, stage, claude):
    names = ["input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"]
    counts = usage(**dict.fromkeys(names), output_tokens=1)
    claude.when("Don't count.", Reply(body=events(counts, block(0), text(FIRST), end())))
    phone.call()
    assert phone.say("Don't count.") == FIRST
    assert "end_turn" in turn_is_logged(stage.app, phone)


# --- Connections and memory -----------------------------------------------------------------------


@pytest.mark.slow
def test_an_address_that_swallows_connections_is_given_up_in_time(stage):
    with contextlib.ExitStack() as stack:
        abyss = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1))
        for _ in range(8):  # nobody accepts them, so the queue is full, and the app gets no answer
            swallowed = stack.enter_context(socket.socket())
            swallowed.setblocking(False)
            swallowed.connect_ex(abyss.getsockname())
        with stage.other_app(ANTHROPIC_BASE_URL=f"http://127.0.0.1:{abyss.getsockname()[1]}") as app:
            phone = stage.phone(app)
            phone.call()
            began = time.monotonic()
            assert phone.say("Anybody?").endswith(SORRY)
            assert time.monotonic() - began < 20, "twice 5 s; without a limit of its own it would be 30"


@pytest.mark.parametrize("pause", [0.0, pytest.param(6.0, marks=pytest.mark.slow)])  # the HTTP client's own limit is 5
def test_two_turns_use_the_same_connection_to_claude(stage, claude, pause):
    """A new one would cost 100 ms, in every turn."""
    first_words, second_words = f"Keep the connection for {pause} seconds.", f"Use it after {pause} seconds."
    with stage.other_app() as app:
        phone = stage.phone(app)
        phone.call()
        phone.say(first_words)
        turn_is_logged(app, phone)  # by then the connection is free
        time.sleep(pause)
        phone.say(second_words)
    (first,), (second,) = claude.asked(first_words), claude.asked(second_words)
    assert first.connection == second.connection


def used_by(app):
    """How many threads the app's worker has, and how many bytes of memory."""
    (worker,) = app.workers()
    lines = pathlib.Path(f"/proc/{worker}/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return int(status["Threads"]), 1024 * int(status["VmRSS"].split()[0])


@pytest.mark.slow
def test_calls_that_are_over_leave_nothing_in_memory(stage):
    # With one arena what glibc keeps for later doesn't depend on which threads were busy.
    with stage.other_app(real=True, MALLOC_ARENA_MAX="1") as app:

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

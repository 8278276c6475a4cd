"""Gateways between the app and Claude, each with habits of its own: the caller hears none of them."""

import re
import time

import pytest

from tests.claude import KEY, Reply, Tool
from tests.conftest import wait_until
from tests.phone import ROOT, App

SORRY = "Sorry, something went wrong at my end. Could you say that again?"
NO_ANSWER = "I don't know what to say to that. Could you put it another way?"
SENTENCES = "The first sentence is here. And the second one ends it."
STREAMS = {path.stem: path.read_bytes() for path in sorted((ROOT / "tests/sse").glob("*.sse"))}
RETRIED = ["error-string-at-once"]


# --- What comes after, or between -----------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in STREAMS if name not in RETRIED])
def test_a_complete_reply_is_heard_whatever_is_around_it(phone, claude, stage, name):
    claude.when(f"Send me {name}.", Reply(body=STREAMS[name]))
    phone.call()
    assert phone.say(f"Send me {name}.") == SENTENCES
    wait_until(lambda: re.search(rf"call {phone.call_sid} turn 1: .* end_turn, request", stage.app.log()))
    assert len(claude.asked(f"Send me {name}.")) == 1


@pytest.mark.parametrize("after", ["error", "hold", "ping"])
@pytest.mark.parametrize("uses", ["no tool", "a tool", "hang_up"])
def test_a_reply_is_complete_when_claude_says_so(phone, claude, after, uses):
    words = f"Go on after it: {after}, with {uses}."
    reply = Reply(SENTENCES, after=after, hang_up=uses == "hang_up")
    if uses == "a tool":
        reply = Reply("Let me see.", blocks=[Tool("clock")], then=Reply(SENTENCES, after=after), after=after)
    claude.when(words, reply)
    phone.call()
    began = time.monotonic()
    assert phone.say(words) == ("Let me see. " if uses == "a tool" else "") + SENTENCES
    assert time.monotonic() - began < 15, "the connection stays open for 20 seconds"
    assert (phone.ended == "hangup") == (uses == "hang_up")


def frames(*events):
    return b"".join(f"event: {kind}\ndata: {data}\n\n".encode() for kind, data in events)


START = ("message_start", '{"type": "message_start", "message": {"usage": {"input_tokens": 1}}}')
STOP = ("message_delta", '{"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 1}}')


def block(index, text=""):
    return ("content_block_start", '{"type": "content_block_start", "index": %d, "content_block":'
            ' {"type": "text", "text": "%s"}}' % (index, text))


def delta(index, text):
    return ("content_block_delta", '{"type": "content_block_delta", "index": %d, "delta":'
            ' {"type": "text_delta", "text": "%s"}}' % (index, text))


def test_the_beginning_of_a_text_may_come_with_its_block(phone, claude):
    body = frames(START, block(0, "Here is the beginning"), delta(0, " and here the end of it."), STOP)
    claude.when("Begin early.", Reply(body=body))
    phone.call()
    assert phone.say("Begin early.") == "Here is the beginning and here the end of it."


def test_two_blocks_may_grow_in_turns(able_phone, claude):
    tool = ('{"type": "content_block_start", "index": %d, "content_block": {"type": "tool_use", "id": "toolu_%d",'
            ' "name": "bus_times"}}')
    piece = '{"type": "content_block_delta", "index": %d, "delta": {"type": "input_json_delta", "partial_json": "%s"}}'
    body = frames(START, block(0, "I look at two stops."), ("content_block_start", tool % (1, 1)),
                  ("content_block_start", tool % (2, 2)), ("content_block_delta", piece % (1, r'{\"stop\": ')),
                  ("content_block_delta", piece % (2, r'{\"stop\": \"B\"}')), ("content_block_delta", piece % (1, r'\"A\"}')),
                  ("message_delta", STOP[1].replace("end_turn", "tool_use")))
    claude.when("When do they leave?", Reply(body=body))
    able_phone.call()
    heard = able_phone.say("When do they leave?")
    assert heard == "I look at two stops. The tools say: From A: in 5 minutes From B: in 5 minutes"
    sent = claude.asked("When do they leave?")[-1].body["messages"]
    assert [used["input"] for used in sent[-2]["content"][1:]] == [{"stop": "A"}, {"stop": "B"}]
    assert [result["content"] for result in sent[-1]["content"]] == ["From A: in 5 minutes", "From B: in 5 minutes"]


def test_a_tool_without_an_input_has_an_empty_one(phone, claude):
    tool = ('{"type": "content_block_start", "index": 0, "content_block": {"type": "tool_use", "id": "toolu_1",'
            ' "name": "hang_up"}}')
    body = frames(START, ("content_block_start", tool), ("message_delta", STOP[1].replace("end_turn", "tool_use")))
    claude.when("Just hang up.", Reply(body=body))
    phone.call()
    assert phone.say("Just hang up.") == "Goodbye!" and phone.ended == "hangup"


# --- What fails before the first word -------------------------------------------------------------

BEFORE_THE_FIRST_WORD = {
    "nothing": b"",
    "only a beginning": frames(START),
    "a page": b"<html>502 Bad Gateway</html>",
    "JSON": b'{"type": "error", "error": {"type": "api_error", "message": "no"}}',
    "half an event": b'event: message_start\ndata: {"type": \n\n',
    "a word as the error": STREAMS["error-string-at-once"],
    "a timeout": frames(("error", '{"type": "error", "error": {"type": "timeout_error", "message": "no"}}')),
    "an internal error": frames(("error", '{"type": "error", "error": {"type": "internal_server_error", "message": "no"}}')),
}


@pytest.mark.parametrize("kind", BEFORE_THE_FIRST_WORD)
def test_what_fails_before_the_first_word_is_tried_again(phone, claude, kind):
    words = f"Fail with {kind}."
    claude.when(words, Reply(body=BEFORE_THE_FIRST_WORD[kind]), Reply("Here I am."))
    phone.call()
    assert phone.say(words) == "Here I am."
    assert len(claude.asked(words)) == 2


@pytest.mark.parametrize("kind", ["invalid_request_error", "authentication_error"])
def test_what_is_the_requests_own_fault_is_not_tried_again(phone, claude, kind):
    claude.when(f"Be at fault: {kind}.", Reply(error=kind))
    phone.call()
    assert phone.say(f"Be at fault: {kind}.") == SORRY
    assert len(claude.asked(f"Be at fault: {kind}.")) == 1


# --- What isn't speech ----------------------------------------------------------------------------


def test_nothing_said_after_a_tool_is_no_silence(phone, claude):
    claude.when("Look, and say nothing.", Reply("Let me look.", blocks=[Tool("clock")], then=Reply("")))
    phone.call()
    assert phone.say("Look, and say nothing.") == f"Let me look. {NO_ANSWER}"


@pytest.mark.parametrize("pace", [None, 100])
@pytest.mark.parametrize("number, markup", list(enumerate([
    '<function_calls>\n<invoke name="clock">\n<parameter name="time_zone">UTC. Really.</parameter>\n</invoke>\n</function_calls>',
    "<thinking>They want the time. I had better look. It is late!</thinking>",
    '<invoke name="clock">\nNow. Then.\n</invoke>',
    "<thinking>This has no end. " + "It goes on and on. " * 30,
])))
def test_markup_for_tools_and_thoughts_is_not_spoken(phone, claude, number, markup, pace):
    after = "" if "no end" in markup else " And here is the rest."
    claude.when(f"Stray {number} at {pace}.", Reply(f"Let me have a look. {markup}{after}", pace=pace))
    phone.call()
    assert phone.say(f"Stray {number} at {pace}.") == f"Let me have a look.{after}"


# --- The way there --------------------------------------------------------------------------------


def test_a_gateway_may_have_a_path_and_a_token_and_a_short_key(stage):
    words = "Is that you, gateway?"
    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"):
        settings = {"ANTHROPIC_API_KEY": None, name: KEY}
        with stage.other_app(**settings) as app:
            assert "ANTHROPIC_API_KEY is not set" not in app.log()
            phone = stage.phone(app)
            phone.call()
            assert phone.say(words) == f"You said: {words}"
            assert stage.claude.asked(words)[-1].headers["authorization"] == f"Bearer {KEY}"
    with stage.other_app(ANTHROPIC_API_KEY="sk-1234") as app:
        phone = stage.phone(app)
        phone.call()
        assert phone.say("Am I known here?") == SORRY
        wait_until(lambda: "AuthenticationError 401" in app.log())


@pytest.mark.parametrize("url, cause", [
    ("http://127.0.0.1:9", "ConnectionRefusedError"), ("http://no-such-host.invalid", "gaierror")])
def test_a_connection_that_fails_is_logged_with_its_cause(stage, url, cause):
    with stage.other_app(ANTHROPIC_BASE_URL=url) as app:
        phone = stage.phone(app)
        phone.call()
        assert phone.say("Anybody?") == SORRY
        wait_until(lambda: f"APIConnectionError ({cause})" in app.log())
        assert f"`APIConnectionError ({cause})`" in (ROOT / "README.md").read_text()


def test_a_certificate_that_nobody_trusts_is_logged_as_such(stage):
    import http.server
    import ssl
    import threading

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ROOT / "tests/certificate.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with stage.other_app(ANTHROPIC_BASE_URL=f"https://127.0.0.1:{server.server_address[1]}") as app:
            phone = stage.phone(app)
            phone.call()
            assert phone.say("Anybody?") == SORRY
            wait_until(lambda: "APIConnectionError (SSLCertVerificationError)" in app.log())
    finally:
        server.shutdown()
        server.server_close()


# --- What the HTTP client finds in the environment ------------------------------------------------


@pytest.mark.parametrize("name, value", [
    ("ALL_PROXY", "socks://me:secret@127.0.0.1:7890/"), ("all_proxy", "socks5://me:secret@127.0.0.1:7890"),
    ("HTTPS_PROXY", "ftp://me:secret@127.0.0.1"), ("NO_PROXY", "localhost,127.0.0.1,::1,[::1]"),
    ("NO_PROXY", "localhost,fd07:b51a:cc66:f0::/64"), ("SSL_CERT_FILE", "/opt/conda/ssl/secret.pem"),
])
def test_what_the_http_client_cannot_use_stops_the_start_with_one_line(name, value):
    with pytest.raises(RuntimeError) as did_not_start:
        App({"ANTHROPIC_API_KEY": KEY, name: value}).start()
    printed = str(did_not_start.value)
    (line,) = re.findall("(?m)^Voice Claude can't start: (.*)$", printed)
    assert name in line and "Traceback" not in printed and "secret" not in printed


def test_an_empty_address_is_the_default(stage):
    with stage.other_app(ANTHROPIC_BASE_URL="") as app:
        assert "can't start" not in app.log()
    with pytest.raises(RuntimeError, match="can't start: ANTHROPIC_BASE_URL takes an address"):
        stage.other_app(ANTHROPIC_BASE_URL="localhost:4000").start()

"""Only Twilio gets in, and only for those who may call."""

import contextlib
import http.client
import re
import socket
import urllib.parse

import pytest

from tests.conftest import PROXY, TOKEN, meanwhile, read, wait_until
from tests.phone import App, Phone, sign

VECTOR = {
    "CallSid": "CA1234567890ABCDE", "Caller": "+14158675310", "Digits": "1234", "From": "+14158675310", "To": "+18005551212"
}


def post(app, path, params, headers=(), method="POST"):
    """A request as anybody can make it. Returns status and body."""
    response = Phone(app.url, headers=dict(headers)).request(method, path, params)
    return response.status, response.body.decode()


def test_the_signature_is_twilios():
    url = "https://example.com/myapp.php?foo=1&bar=2"
    assert sign(TOKEN, url, VECTOR) == "L/OH5YylLD5NRKLltdqwSvS0BnU="


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_signed_requests_pass_behind_a_proxy(stage, method):
    phone = stage.phone(method=method)
    assert phone.call() == "Hello, this is Claude speaking!"


def test_signed_words_with_every_kind_of_character_pass_by_get(stage):
    phone = stage.phone()
    phone.call()
    words = "50% of ~/a+b & c=d; é/ü? #1"
    phone.gather["method"] = "GET"
    assert phone.say(words) == f"You said: {words}"


@meanwhile
def test_public_url_is_for_a_proxy_that_hides_the_address(stage):
    with stage.other_app(PUBLIC_URL="https://hidden.example.com/line/") as app:
        behind = {"Host": "10.0.0.7", "Via": "1.1 proxy"}
        hidden = stage.phone(app, public_url="https://hidden.example.com/line", headers=behind)
        assert hidden.call() == "Hello, this is Claude speaking!"
        assert hidden.say("Hello?") == "You said: Hello?"
        hidden.stay_silent()
        assert hidden.say("Still?") == "You said: Still?"
        assert {url.split("?")[0] for url, *_ in hidden.webhooks[1:]} == {"https://hidden.example.com/line/talking"}


@pytest.mark.parametrize("path", ["/", "/talking", "/talking?turn=1", "/status_callback"])
@pytest.mark.parametrize("signature", [None, "", "wrong", "L/OH5YylLD5NRKLltdqwSvS0BnU=", "é"])
def test_a_stranger_gets_403_and_touches_nothing(stage, claude, path, signature):
    asked = len(claude.requests)
    phone = stage.phone()
    phone.call()
    phone.say("Remember me.")
    headers = {**PROXY, **({} if signature is None else {"X-Twilio-Signature": signature.encode()})}
    params = {"CallSid": phone.call_sid, "SpeechResult": "Spend money!", "CallStatus": "completed"}
    assert post(stage.app, path, params, headers)[0] == 403
    assert phone.say("Do you?") == "You said: Do you?"
    assert claude.requests[-1].messages[0] == ("user", "Remember me.")
    assert len(claude.requests) == asked + 2


def test_a_signature_is_for_one_address_and_one_set_of_parameters(stage):
    url, params = "https://line.example.com/talking", {"CallSid": "CA1", "SpeechResult": "Hello."}
    headers = {**PROXY, "Host": "line.example.com", "X-Twilio-Signature": sign(TOKEN, url, params)}
    assert post(stage.app, "/talking", params, headers)[0] == 200
    for path, other in [
        ("/talking?turn=1", params), ("/talking", {**params, "SpeechResult": "Bye."}), ("/talking", {**params, "x": ""}),
        ("/", params),
    ]:
        assert post(stage.app, path, other, headers)[0] == 403


@pytest.fixture(scope="module")
def no_token():
    """An app without a token, as its owner has it who forgot to set one."""
    with App({"TWILIO_AUTH_TOKEN": ""}) as app:
        yield app


@pytest.mark.parametrize("token", [None, "", TOKEN], ids=["unsigned", "empty token", "signed"])
@pytest.mark.parametrize(
    "headers", [{}, PROXY, {"Host": "localhost"}], ids=["direct", "by a proxy", "localhost"]
)
def test_without_a_token_no_call_is_answered(no_token, token, headers):
    for path in ("/", "/talking", "/status_callback"):
        public_url = f"http://{headers['Host']}" if "Host" in headers else None
        caller = Phone(no_token.url, token, public_url=public_url, headers=headers)
        for method in ("POST", "GET"):
            params = {**caller.params, "SpeechResult": "Hi."}
            # A status callback is posted, and nothing else.
            status = 405 if (method, path) == ("GET", "/status_callback") else 403
            assert caller.request(method, path, params).status == status
    assert "set TWILIO_AUTH_TOKEN" in no_token.log()


def test_without_a_token_a_caller_hears_twilios_error(no_token):
    phone = Phone(no_token.url)
    assert phone.call() == "We are sorry, an application error has occurred. Goodbye."


def test_without_a_token_a_browser_and_the_platform_are_answered(no_token):
    status, page = post(no_token, "/", {}, method="GET")
    assert status == 200 and "TWILIO_AUTH_TOKEN is not set" in page
    assert post(no_token, "/healthz", {}, method="GET")[0] == 200


def test_what_is_not_there_is_404_without_a_word_in_the_log(stage, no_token):
    for app in (stage.app, no_token):
        before = len(app.log())
        assert post(app, "/wp-login.php", {"CallSid": "CA1"}, PROXY)[0] == 404
        assert post(app, "/static/app.py", {}, PROXY, "GET")[0] == 404
        assert post(app, "/talking", {"CallSid": "CA1"}, PROXY, "PUT")[0] == 405
        assert "wp-login" not in app.log()[before:]


def test_a_forged_protocol_or_host_is_no_traceback(stage):
    for forged in {"X-Forwarded-Proto": "http://["}, {"X-Forwarded-Host": "xn--a"}:
        for path in ("/", "/talking"):
            for method in ("GET", "POST"):
                headers = {**PROXY, **forged}
                status = post(stage.app, path, {"SpeechResult": "Hi."}, headers, method)[0]
                assert status == (200 if (path, method) == ("/", "GET") else 403)
    assert "Traceback" not in stage.app.log()


@meanwhile
def test_half_sent_bodies_do_not_hold_the_line(stage):
    with stage.other_app() as app, contextlib.ExitStack() as stack:
        head = b"POST /talking HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
        head += b"Content-Type: application/x-www-form-urlencoded"
        for _ in range(210):  # there are 200 threads
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", app.port)))
            connection.sendall(head + b"\r\n\r\nx=y")
        assert stage.phone(app).call() == "Hello, this is Claude speaking!"
        assert "Traceback" not in app.log()


def test_a_browser_gets_a_page_with_the_three_addresses(stage):
    status, page = post(stage.app, "/", {}, {**PROXY, "Host": "line.example.com"}, "GET")
    assert status == 200
    for address in ("https://line.example.com/", "https://line.example.com/talking", "https://line.example.com/status_callback"):
        assert address in page
    assert TOKEN not in page and "not set" not in page


@meanwhile
def test_only_allowed_callers_are_answered(stage):
    with stage.other_app(ALLOWED_CALLERS="+1 (555) 123-0001, +442071234567,") as app:
        friend = stage.phone(app, number="+15551230001")
        assert friend.call() == "Hello, this is Claude speaking!"
        for number in ("+15551230002", "anonymous", "unknown", "", "15551230001", "sip:+15551230001@x", "+266696687", "+"):
            stranger = stage.phone(app, number=number)
            assert stranger.call() == ""
            assert stranger.ended == "rejected"
            stranger = stage.phone(app, number=number)
            stranger.params["CallStatus"] = "in-progress"
            stranger.webhook("/talking", {"SpeechResult": "Let me in."})
            assert stranger.ended == "hangup" and stranger.said == []
            assert stranger.documents[-1].endswith(b"<Response><Hangup /></Response>")
        assert not stage.claude.asked("Let me in.")
        called = stage.phone(app, number="+15550009999", To="+442071234567", Direction="outbound-api")
        assert called.call() == "Hello, this is Claude speaking!"
        assert stage.phone(app, number="+442071234567", To="+15550009999", Direction="outbound-api").call() == ""


@pytest.mark.parametrize("setting, value, takes", [
    ("MAX_TURNS", "lots", "a whole number"), ("MAX_TURNS", "0", "a whole number"), ("MAX_TURNS", "-1", "a whole number"),
    ("DATABASE_URL", "sqlite://", "sqlite:///"),
    ("DATABASE_URL", "sqlite:///:memory:", "a file"), ("DATABASE_URL", "sqlite:///calls.db?mode=ro", "a file"),
    ("PUBLIC_URL", "https://[", "https://"), ("PUBLIC_URL", "https://me:secret@host", "https://"),
    ("ALLOWED_CALLERS", "+ ,", "+15551234567"), ("GREETING", "\U0001f44b", "words"),
    ("PUBLIC_URL", "my-line.example.com", "https://"), ("ALLOWED_CALLERS", "alice", "+15551234567"),
    ("ALLOWED_CALLERS", "15551234567", "+15551234567"), ("CLAUDE_EFFORT", "maximum", "low, medium"),
    ("CLAUDE_MODEL", "two words", "model"), ("ANTHROPIC_API_KEY", "sk ant secret", "key"),
    ("LANGUAGES", "english please", "en-GB"), ("VOICES", "<b>", "voice"),
])
def test_a_value_that_cannot_be_used_is_named_with_what_it_takes(setting, value, takes):
    with pytest.raises(ValueError, match=setting) as refused:
        read({setting: value})
    assert takes in str(refused.value) and "secret" not in str(refused.value)


@meanwhile
def test_such_a_value_stops_the_start_with_one_line(stage):
    with pytest.raises(RuntimeError) as did_not_start:
        stage.other_app(MAX_TURNS="lots").start()
    (line,) = [line for line in str(did_not_start.value).splitlines() if "MAX_TURNS" in line]
    assert line == "Voice Claude can't start: MAX_TURNS takes a whole number, 1 or more."
    assert "Traceback" not in str(did_not_start.value)
    with pytest.raises(RuntimeError, match="can't start: DATABASE_URL takes sqlite:///") as did_not_start:
        stage.other_app(DATABASE_URL="mysql://u:secret@h/d").start()
    assert "secret" not in str(did_not_start.value)


def test_an_empty_value_is_the_default():
    given = dict.fromkeys(["MAX_TURNS", "CLAUDE_MODEL", "GREETING", "DATABASE_URL", "ALLOWED_CALLERS", "CLAUDE_EFFORT"], "")
    settings, defaults = read(given), read({})
    assert vars(settings) == vars(defaults) and settings.claude_effort == "low"


def test_bodies_that_are_not_forms_or_huge_are_refused_early(stage):
    for content_type, status in [("application/json", 403), ("multipart/form-data; boundary=x", 403), ("text/plain", 403)]:
        connection = http.client.HTTPConnection("127.0.0.1", stage.app.port, timeout=10)
        connection.request("POST", "/talking", b'{"CallSid": "CA1"}', {"Content-Type": content_type})
        assert connection.getresponse().status == status
        connection.close()
    params = {"CallSid": "CA1", "SpeechResult": "x" * 40_000}
    response = stage.phone().request("POST", "/talking", params)
    assert response.status == 413


def test_what_is_refused_is_logged_without_what_was_said(stage, logged):
    query = urllib.parse.urlencode({"CallSid": "CA1", "From": "+15551239876", "SpeechResult": "tarragon"})
    assert post(stage.app, f"/talking?{query}", {}, PROXY, "GET")[0] == 403
    wait_until(lambda: re.search("403 for .*/talking: wrong signature", logged()))
    assert "tarragon" not in logged() and "5551239876" not in logged()


def test_nothing_on_the_way_may_keep_an_answer(stage):
    phone = stage.phone()
    assert phone.request("POST", "/", phone.params).headers["Cache-Control"] == "no-store"


def test_a_value_may_come_with_white_space_around_it():
    settings = read({"ANTHROPIC_API_KEY": "sk-ant-pretend\n", "GREETING": " Ahoy! ", "MAX_TURNS": "7 "})
    assert (settings.anthropic_api_key, settings.greeting, settings.max_turns) == ("sk-ant-pretend", "Ahoy!", 7)


def test_the_proxy_says_how_the_line_was_called(stage):
    headers = {"Host": "10.0.0.7:8000", "X-Forwarded-Host": "line.example.com", "X-Forwarded-Proto": "https"}
    phone = stage.phone(headers=headers)
    assert phone.call() == "Hello, this is Claude speaking!"
    assert phone.say("Who is there?") == "You said: Who is there?"

"""Only Twilio gets in, and only for callers who may call."""

import concurrent.futures
import contextlib
import http.client
import random
import socket
import threading
from urllib.parse import urlencode

import pytest

from tests.phone import Phone, parse, sign
from tests.stage import HELLO, PROXY, PUBLIC_URL, TOKEN, get, healthz, in_thread, turns_of

FORM = "Content-Type: application/x-www-form-urlencoded\r\n"


def ask_unsigned(app, path, params=(), headers=PROXY, method="POST"):
    """The status that anybody gets who knows the address but not the token."""
    return Phone(app.url, headers=headers).request(method, path, params).status


def exchange(app, request, done=False):
    """Everything that comes back for these bytes; ``done`` says that no more of them will follow."""
    with socket.create_connection(("127.0.0.1", app.port), timeout=20) as connection:
        connection.sendall(request)
        if done:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while more := connection.recv(65536):
                answer += more
    return answer


# --- Signatures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_a_signed_call_is_answered_behind_a_proxy(stage, method):
    assert stage.phone(method=method).call() == HELLO


def test_words_with_all_kinds_of_characters_may_come_by_get(stage):
    phone = stage.phone()
    phone.call()
    words = "50% of ~/a+b & c=d; é/ü? #1"
    phone.gather["method"] = "GET"
    assert phone.say(words) == f"You said: {words}"


def test_public_url_is_for_a_proxy_that_hides_the_address(stage):
    with stage.other_app(PUBLIC_URL="https://hidden.example.com/line/") as app:
        behind = {"Host": "10.0.0.7", "Via": "1.1 proxy"}
        phone = stage.phone(app, public_url="https://hidden.example.com/line", headers=behind)
        assert phone.call() == HELLO
        assert phone.say("Hello?") == "You said: Hello?"
        phone.stay_silent()
        assert phone.say("Still?") == "You said: Still?"
        assert {url.split("?")[0] for url, *_ in phone.webhooks[1:]} == {"https://hidden.example.com/line/talking"}


def test_the_proxy_tells_the_app_its_public_address(stage):
    headers = {"Host": "10.0.0.7:8000", "X-Forwarded-Host": "line.example.com", "X-Forwarded-Proto": "https"}
    phone = stage.phone(headers=headers)
    assert phone.call() == HELLO
    assert phone.say("Who is there?") == "You said: Who is there?"


def test_the_proxy_may_be_another_machine(stage):
    # gunicorn itself believes only a proxy on the same machine.
    params = {"CallSid": "CA1", "From": "+15551230001", "CallStatus": "ringing"}
    headers = {
        "Host": "10.0.0.7", "X-Forwarded-Host": "line.example.com", "X-Forwarded-Proto": "https",
        "X-Twilio-Signature": sign(TOKEN, f"{PUBLIC_URL}/", params),
        "Content-Type": "application/x-www-form-urlencoded",
    }
    connection = http.client.HTTPConnection(
        "127.0.0.1", stage.app.port, timeout=20, source_address=("127.0.0.2", 0)
    )
    with contextlib.closing(connection):
        connection.request("POST", "/", urlencode(params), headers)
        assert connection.getresponse().status == 200


@pytest.mark.parametrize("path", ["/", "/talking", "/talking?turn=1", "/status_callback"])
@pytest.mark.parametrize("signature", [None, "", "wrong", "L/OH5YylLD5NRKLltdqwSvS0BnU=", "é"])
def test_a_stranger_gets_403_and_changes_nothing(stage, claude, path, signature):
    phone = stage.phone()
    phone.call()
    phone.say("Remember me among strangers.")
    headers = PROXY if signature is None else {**PROXY, "X-Twilio-Signature": signature.encode()}
    params = {"CallSid": phone.call_sid, "SpeechResult": "Spend the owner's money!", "CallStatus": "completed"}
    assert ask_unsigned(stage.app, path, params, headers) == 403
    assert phone.say("Do you remember me?") == "You said: Do you remember me?"
    assert claude.asked("Do you remember me?")[-1].messages[0] == ("user", "Remember me among strangers.")
    assert turns_of(stage.app, phone, "words") == [("Remember me among strangers.",), ("Do you remember me?",)]
    assert not claude.asked("Spend the owner's money!")


def test_a_signature_is_for_one_address_and_one_set_of_parameters(stage):
    params = {"CallSid": "CAsigned", "SpeechResult": "Hello."}
    signature = sign(TOKEN, f"{PUBLIC_URL}/talking", params)
    headers = {**PROXY, "Host": "line.example.com", "X-Twilio-Signature": signature}
    assert ask_unsigned(stage.app, "/talking", params, headers) == 200
    for path, other in [
        ("/talking?turn=1", params), ("/talking", {**params, "SpeechResult": "Bye."}),
        ("/talking", {**params, "x": ""}), ("/", params),
    ]:
        assert ask_unsigned(stage.app, path, other, headers) == 403


def test_a_call_gets_no_reply_of_another_call(stage):
    mine, other = stage.phone(), stage.phone()
    mine.call()
    mine.say("A secret of mine.")
    other.call()
    for turn in ("1", "2", "01", "1.0"):
        assert "secret" not in other.webhook(f"/talking?turn={turn}&heard=0")
    assert mine.say("Still there?") == "You said: Still there?"


# --- Without a token ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def no_token(stage):
    """The app of an owner who forgot to set a token."""
    with stage.other_app(TWILIO_AUTH_TOKEN="") as app:
        yield app


@pytest.mark.parametrize("token", [None, "", TOKEN], ids=["unsigned", "empty token", "signed"])
@pytest.mark.parametrize("headers", [{}, PROXY, {"Host": "localhost"}], ids=["direct", "by a proxy", "localhost"])
def test_without_a_token_no_call_is_answered(no_token, token, headers):
    before = len(no_token.log())
    for path in ("/", "/talking", "/status_callback"):
        public_url = f"http://{headers['Host']}" if "Host" in headers else None
        caller = Phone(no_token.url, token, public_url=public_url, headers=headers)
        for method in ("POST", "GET"):
            params = {**caller.params, "SpeechResult": "Hi."}
            # A status callback is posted, and nothing else.
            status = 405 if (method, path) == ("GET", "/status_callback") else 403
            assert caller.request(method, path, params).status == status
    assert "set TWILIO_AUTH_TOKEN" in no_token.log()[before:]


def test_without_a_token_a_caller_hears_twilios_error(no_token):
    assert Phone(no_token.url).call() == "We are sorry, an application error has occurred. Goodbye."


def test_without_a_token_a_browser_and_the_platform_are_answered(no_token):
    status, page = get(no_token, "/")
    assert status == 200 and "TWILIO_AUTH_TOKEN is not set" in page
    assert healthz(no_token) == 200


# --- Allowed callers ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def closed(stage):
    """An app for two callers only."""
    with stage.other_app(ALLOWED_CALLERS="+1 (555) 123-0001, +442071234567,") as app:
        yield app


STRANGERS = ["+15551230002", "anonymous", "unknown", "", "15551230001", "sip:+15551230001@x", "+266696687", "+"]


def test_an_allowed_caller_is_answered(stage, closed):
    assert stage.phone(closed, number="+15551230001").call() == HELLO


@pytest.mark.parametrize("number", STRANGERS)
def test_the_call_of_anybody_else_is_rejected(stage, closed, number):
    stranger = stage.phone(closed, number=number)
    assert stranger.call() == "" and stranger.ended == "rejected"


@pytest.mark.parametrize("number", STRANGERS)
def test_nobody_else_gets_into_the_middle_of_a_call(stage, claude, closed, number):
    stranger = stage.phone(closed, number=number, CallStatus="in-progress")
    stranger.webhook("/talking", {"SpeechResult": "Let me in by the back door."})
    assert stranger.ended == "hangup" and stranger.said == []
    assert stranger.documents[-1].endswith(b"<Response><Hangup /></Response>")
    assert not claude.asked("Let me in by the back door.")


def test_in_a_call_that_the_app_makes_the_called_number_has_to_be_allowed(stage, closed):
    outbound = {"Direction": "outbound-api"}
    assert stage.phone(closed, number="+15550009999", To="+442071234567", **outbound).call() == HELLO
    assert stage.phone(closed, number="+442071234567", To="+15550009999", **outbound).call() == ""


# --- Odd requests ---------------------------------------------------------------------------------


def test_unknown_paths_are_404_and_not_in_the_log(stage, no_token):
    for app in (stage.app, no_token):
        before = len(app.log())
        assert ask_unsigned(app, "/wp-login.php", {"CallSid": "CA1"}) == 404
        assert ask_unsigned(app, "/static/app.py", method="GET") == 404
        assert ask_unsigned(app, "/talking", {"CallSid": "CA1"}, method="PUT") == 405
        assert "wp-login" not in app.log()[before:]


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("path", ["/", "/talking"])
@pytest.mark.parametrize("name, value", [("X-Forwarded-Proto", "http://["), ("X-Forwarded-Host", "xn--a")])
def test_a_forged_protocol_or_host_is_no_error(stage, logged, name, value, path, method):
    headers = {**PROXY, name: value}
    status = ask_unsigned(stage.app, path, {"SpeechResult": "Hi."}, headers, method)
    assert status == (200 if (path, method) == ("/", "GET") else 403)
    assert "Traceback" not in logged()


@pytest.mark.parametrize("content_type", ["application/json", "multipart/form-data; boundary=x", "text/plain"])
def test_a_body_that_is_no_form_is_refused(stage, content_type):
    connection = http.client.HTTPConnection("127.0.0.1", stage.app.port, timeout=20)
    with contextlib.closing(connection):
        connection.request("POST", "/talking", b'{"CallSid": "CA1"}', {"Content-Type": content_type})
        assert connection.getresponse().status == 403


def test_a_huge_body_is_refused(stage):
    params = {"CallSid": "CA1", "SpeechResult": "x" * 40_000}
    assert stage.phone().request("POST", "/talking", params).status == 413


def test_no_cache_may_keep_an_answer(stage):
    phone = stage.phone()
    assert phone.request("POST", "/", phone.params).headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("path", ["/talking", "/healthz"])
@pytest.mark.parametrize("body", [
    "zz\r\nabc\r\n0\r\n\r\n", "-5\r\nabc\r\n0\r\n\r\n", "5\r\nabc", "3\r\nabcX\r\n0\r\n\r\n",
    "ffffffffffffffff\r\nabc", "3;" + "x" * 9000 + "\r\nabc\r\n0\r\n\r\n", "", "0\r\nbad trailer\r\n\r\n",
    "\r\n", "3\r\nabc\r\n",
], ids=lambda body: repr(body[:20]))
def test_a_malformed_body_is_no_error(stage, logged, body, path):
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n{FORM}\r\n"
    answer = exchange(stage.app, head.encode() + body.encode(), done=True)
    status = answer.partition(b" ")[2][:3]
    # Some of them are odd and well-formed: those are unsigned, and nothing worse.
    odd = (b"403", b"405") if body.startswith(("3;", "0")) else ()
    assert status in (b"", b"400", *odd), answer
    assert b"<Response" not in answer
    assert "Traceback" not in logged() and len(logged()) < 1000


def test_a_403_is_one_short_line_in_the_log(stage):
    request = f"POST /talking?{'x' * 3000} HTTP/1.1\r\nHost: {'y.' * 3500}\r\n"
    request += f"X-Forwarded-Host: {'z.' * 3500}\r\nContent-Length: 3\r\nConnection: close\r\n"
    with stage.other_app() as app:
        before = len(app.log())
        assert exchange(app, f"{request}{FORM}\r\nx=y".encode()).startswith(b"HTTP/1.1 403")
        assert 0 < len(app.log()) - before < 500
        assert app.log()[before:].count("\n") == 1


NAMES = ["CallSid", "SpeechResult", "Digits", "turn", "heard", "silences", "waited", "ErrorCode", "CallStatus", "From",
         "Direction", "To", "x", "é", ""]
VALUES = ["", " ", "CA1", "7", "-1", "99999999999999999999999", "9" * 5000, "1e9", "0x10", "٣", "NaN", "\x00", "\x0b",
          "\ufffe", "é", "<Say>", "&amp;", "a" * 3000, "../../etc", "%s%n", "'; DROP TABLE turns;--", "completed",
          "\U0001f600"]
ROUTES = ["/", "/talking", "/status_callback", "/healthz", "/talking/", "//talking", "/nothing", "/static/x",
          "/%2e%2e/x"]
METHODS = ["GET", "POST", "POST", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "FOO"]


@pytest.fixture(scope="module")
def asked_oddly(stage):
    """An app of its own: random requests also end calls."""
    with stage.other_app(MAX_TURNS_A_DAY="100000") as app:
        yield app


@pytest.mark.parametrize("seed", range(5))
def test_signed_requests_at_random_never_get_a_5xx(stage, asked_oddly, seed):
    chance = random.Random(seed)
    phone = stage.phone(asked_oddly)
    for _ in range(100):
        method, path = chance.choice(METHODS), chance.choice(ROUTES)
        query = [(chance.choice(NAMES), chance.choice(VALUES)) for _ in range(chance.randrange(4))]
        form = {chance.choice(NAMES): chance.choice(VALUES) for _ in range(chance.randrange(4))}
        form.setdefault("CallSid", f"CA{chance.randrange(5)}")
        path += "?" + urlencode(query) if query else ""
        response = phone.request(method, path, form, token=str(chance.randrange(50)))
        assert response.status < 500, (method, path, form)
        assert response.status not in (301, 302, 303, 307, 308), (method, path, form)
        if response.status == 200 and response.headers.get_content_type() == "text/xml" and method != "HEAD":
            parse(response.body)
    assert "Traceback" not in asked_oddly.log()


# --- Many strangers -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("arguments, strangers", [("--threads 2", 3), ("", 210)], ids=["two threads", "all threads"])
def test_half_sent_bodies_do_not_hold_the_line(stage, arguments, strangers):
    """There are more of them than threads."""
    head = f"POST /talking HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n{FORM}\r\nx=y"
    with stage.other_app(arguments) as app, contextlib.ExitStack() as stack:
        for _ in range(strangers):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", app.port)))
            connection.sendall(head.encode())
        phone = stage.phone(app)
        assert phone.call() == HELLO and phone.warnings == []
        assert "Traceback" not in app.log()


@pytest.mark.parametrize("callers", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_many_callers_may_speak_their_first_words_at_once(stage, callers):
    def talk(number):
        phone = stage.phone(app)
        phone.call()
        words = f"First words of caller {number}."
        heard = phone.say(words)
        return None if heard.endswith(f"You said: {words}") else (heard, phone.warnings)

    with stage.other_app() as app, concurrent.futures.ThreadPoolExecutor(callers) as threads:
        assert [wrong for wrong in threads.map(talk, range(callers)) if wrong] == []
        assert "Traceback" not in app.log()


@pytest.mark.parametrize("watchers", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_looks_at_the_apps_health_do_not_hold_the_line(stage, watchers):
    done = threading.Event()

    def watch():
        looks = 0
        while not done.is_set():
            looks += healthz(app) == 200
        return looks

    with stage.other_app() as app:
        looks = [in_thread(watch) for _ in range(watchers)]
        try:
            phone = stage.phone(app)
            phone.call()
            for turn in range(watchers // 2):
                assert phone.say(f"Turn {turn}.").endswith(f"You said: Turn {turn}.")
        finally:
            done.set()
            seen = sum(wait() for wait in looks)
        assert seen and "Traceback" not in app.log()

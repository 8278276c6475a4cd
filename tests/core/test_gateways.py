"""Gateways and proxies between the app and Claude, each with habits of its own: the caller hears none of them."""

import contextlib
import http.server
import ssl
import threading
import time

import pytest

from tests.claude import KEY, Reply, Tool
from tests.stage import FASTER, ROOT, SORRY, start_fails, turn_is_logged, wait_until

SENTENCES = "The first sentence is here. And the second one ends it."
STREAMS = {path.stem: path.read_bytes() for path in sorted((ROOT / "tests/sse").glob("*.sse"))}
INCOMPLETE = ["error-string-at-once"]  # test_claude_trouble.py uses it


# --- What comes after a reply, or in between ------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in STREAMS if name not in INCOMPLETE])
def test_a_complete_reply_is_heard_whatever_is_around_it(phone, claude, stage, name):
    claude.when(f"Send me {name}.", Reply(body=STREAMS[name]))
    phone.call()
    assert phone.say(f"Send me {name}.") == SENTENCES
    assert " end_turn, request" in turn_is_logged(stage.app, phone)
    assert len(claude.asked(f"Send me {name}.")) == 1


@pytest.mark.parametrize("after", ["error", "hold", pytest.param("ping", marks=pytest.mark.slow)])
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


# --- The way there --------------------------------------------------------------------------------


def test_the_key_may_be_called_a_token(stage, claude):
    words = "Is that you, gateway?"
    with stage.other_app(ANTHROPIC_API_KEY=None, ANTHROPIC_AUTH_TOKEN=KEY) as app:
        assert "ANTHROPIC_API_KEY is not set" not in app.log()
        phone = stage.phone(app)
        phone.call()
        assert phone.say(words) == f"You said: {words}"
        (request,) = claude.asked(words)
        assert request.headers["authorization"] == f"Bearer {KEY}"


def test_a_gateways_key_may_be_short(stage):
    with stage.other_app(ANTHROPIC_API_KEY="sk-1234") as app:
        phone = stage.phone(app)
        phone.call()
        assert phone.say("Am I known here?") == SORRY
        assert "AuthenticationError 401" in turn_is_logged(app, phone)


def assert_that_it_is_logged(stage, cause, url):
    """Nobody answers at this URL, and the log says why, in words that docs/trouble.md explains."""
    # If there is no name server, the resolver would look for it for a long time.
    settings = {"ANTHROPIC_BASE_URL": url, "RES_OPTIONS": "attempts:1 timeout:1"}
    with stage.other_app(module=FASTER, **settings) as app:
        phone = stage.phone(app)
        phone.call()
        assert phone.say("Anybody?").endswith(SORRY)
        wait_until(lambda: f"APIConnectionError ({cause})" in app.log())
        assert "Traceback" not in app.log()
    assert f"`APIConnectionError ({cause})`" in (ROOT / "docs/trouble.md").read_text()


@pytest.mark.parametrize("url, cause", [
    ("http://127.0.0.1:9", "ConnectionRefusedError"),
    pytest.param("http://no-such-host.invalid", "gaierror", marks=pytest.mark.slow),
])
def test_a_connection_that_fails_is_logged_with_its_cause(stage, url, cause):
    assert_that_it_is_logged(stage, cause, url)


@contextlib.contextmanager
def server_with_its_own_certificate():
    """A server with a certificate that nobody trusts, by its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    server.handle_error = lambda *_: None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ROOT / "tests/certificate.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"https://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_a_certificate_that_nobody_trusts_is_logged_as_such(stage):
    with server_with_its_own_certificate() as url:
        assert_that_it_is_logged(stage, "SSLCertVerificationError", url)


# --- What the HTTP client finds in the environment ------------------------------------------------


@pytest.mark.parametrize("name, value", [
    ("ALL_PROXY", "socks://me:secret@127.0.0.1:7890/"), ("all_proxy", "socks5://me:secret@127.0.0.1:7890"),
    ("HTTPS_PROXY", "ftp://me:secret@127.0.0.1"), ("NO_PROXY", "localhost,127.0.0.1,::1,[::1]"),
    ("NO_PROXY", "localhost,fd07:b51a:cc66:f0::/64"), ("SSL_CERT_FILE", "/opt/conda/ssl/secret.pem"),
])
def test_the_start_fails_with_one_line_if_the_http_client_cannot_use_a_setting(stage, name, value):
    why = start_fails(stage.other_app(**{name: value, "ANTHROPIC_BASE_URL": None}))
    assert name in why and "secret" not in why


def test_an_empty_address_is_the_default(stage):
    with stage.other_app(ANTHROPIC_BASE_URL="") as app:
        assert "can't start" not in app.log()


def test_an_address_needs_a_scheme(stage):
    assert start_fails(stage.other_app(ANTHROPIC_BASE_URL="localhost:4000")).startswith(
        "ANTHROPIC_BASE_URL takes an address")

"""The owner at a terminal: ``flask connect`` points a number at the line, ``flask ring`` calls.

The commands are the real ones, and so are the lines that they ask. HTTPS_PROXY leads the commands
to a small internet on loopback. There, api.twilio.com is an account that notes what it has done.
"""

import base64
import http.client
import http.server
import json
import os
import pathlib
import re
import ssl
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from urllib.parse import parse_qsl, urlencode

import flask.cli
import pytest

from tests.conftest import PROCESSES
from tests.phone import ROOT, App, Phone

CERTIFICATE = str(pathlib.Path(__file__).with_name("certificate.pem"))  # for three hosts
SID = "AC" + "0123456789abcdef" * 2
TOKEN, ANOTHER_TOKEN, PASSWORD = "the-secret-token", "another-secret-token", "my-password"
MINE, ALSO_MINE, A_FRIEND = "+15550009999", "+15550008888", "+15557654321"
ADDRESS, OTHER = "https://my-line.example.com", "https://other.example.com"
CONNECT, RING = ("connect", ADDRESS), ("ring", A_FRIEND, ADDRESS)
RETRIES = "#rc=5&rp=5xx,ct,rt&rt=8000"  # for the time in which a new process starts
NUMBER = {
    "voice_url": f"{ADDRESS}/{RETRIES}",
    "voice_method": "POST",
    "voice_fallback_url": f"{ADDRESS}/talking{RETRIES}",
    "voice_fallback_method": "POST",
    "status_callback": f"{ADDRESS}/status_callback{RETRIES}",
    "status_callback_method": "POST",
}

both = pytest.mark.parametrize("command", [CONNECT, RING], ids=["connect", "ring"])


def test_connect_points_the_number_at_the_line_and_says_where_it_was(owner, lines):
    old = f"https://me:{PASSWORD}@old.example.com/@home"
    owner.buy(MINE, voice_url=old, voice_method="GET", status_callback=None)

    said = owner.types(*CONNECT)

    assert "+15550009999 is now connected" in said
    assert re.findall(r"(?m)^    (\S+): (\S+) \(before: (.+)\)$", said) == [
        ("voice_url", NUMBER["voice_url"], "https://old.example.com/@home"),
        ("voice_method", "POST", "GET"),
        ("voice_fallback_url", NUMBER["voice_fallback_url"], "nothing"),
        ("status_callback", NUMBER["status_callback"], "nothing"),
    ]
    assert owner.done == [("IncomingPhoneNumbers/PN0.json", NUMBER)]

    # Whoever calls the number now talks with the line.
    phone = Phone(lines[0].url, TOKEN, public_url=ADDRESS, headers={"X-Forwarded-Proto": "https"})
    phone.call()
    phone.say("Who is there?")
    phone.hang_up()
    assert [(url, status) for url, _, _, status in phone.webhooks] == [
        (f"{ADDRESS}/", 200),
        (f"{ADDRESS}/talking", 200),
        (f"{ADDRESS}/status_callback", 204),
    ]


def test_connecting_twice_changes_nothing_more(owner):
    owner.buy(MINE)
    owner.types(*CONNECT)

    assert "+15550009999 was already connected" in owner.types("connect", ADDRESS + "/")
    assert len(owner.done) == 1


def test_ring_makes_the_line_call_someone(owner):
    owner.buy(MINE)

    said = owner.types(*RING, ALLOWED_CALLERS=f"+15551230001, {A_FRIEND}")

    assert f"+15550009999 is calling +15557654321: CA{'c' * 32}" in said
    urls = {name.removeprefix("voice_"): url for name, url in NUMBER.items()}
    assert owner.done == [("Calls.json", {"from": MINE, "to": A_FRIEND, **urls})]


def test_ring_reads_a_number_as_the_settings_do(owner):
    owner.buy(MINE)
    owner.types("ring", "+1 (555)\u00a0765\u20114321", ADDRESS, ALLOWED_CALLERS=A_FRIEND)
    assert owner.done[0][1]["to"] == A_FRIEND


def test_ring_calls_nobody_the_line_would_hang_up_on(owner):
    owner.buy(MINE)

    said = owner.fails(*RING, ALLOWED_CALLERS="+15551230001")

    assert f"{A_FRIEND} is not in ALLOWED_CALLERS" in said
    assert owner.asked == []


@both
def test_one_of_several_numbers_is_chosen(owner, command):
    assert owner.fails(*command) == "Choose with --number one of: none"
    owner.buy(MINE)
    said = owner.fails(*command, "--number", ALSO_MINE)
    assert said == f"Choose with --number one of: {MINE}"
    owner.buy(ALSO_MINE)
    assert owner.fails(*command) == f"Choose with --number one of: {MINE}, {ALSO_MINE}"
    assert ALSO_MINE in owner.types(*command, "--number", ALSO_MINE)

    [(what, call)] = owner.done
    assert what == "IncomingPhoneNumbers/PN1.json" or call["from"] == ALSO_MINE


@pytest.mark.parametrize("what", ["trunk_sid", "voice_application_sid"])
def test_a_number_that_something_else_answers_is_left_alone(owner, what):
    owner.buy(MINE, **{what: "XX" + "1" * 32})

    assert "XX" + "1" * 32 in owner.fails(*CONNECT)
    assert MINE in owner.types(*RING)  # a call out brings its own URLs


# --- What answers at the address ------------------------------------------------------------------


@both
def test_an_address_that_is_not_this_app(owner, command):
    owner.buy(MINE)

    owner.hosts["other.example.com"] = owner.hosts["my-line.example.com"]
    nginx, gone, broken = (200, "Welcome to nginx!"), (404, "Not found"), (500, "<Response/>")
    for status, text in nginx, gone, broken, (301, f"{OTHER}/"):
        owner.hosts["my-line.example.com"] = lambda *_, answer=(status, text): answer
        assert f"Not this app: {ADDRESS}/ answers {status}, '{text}'" == owner.fails(*command)
    assert "other.example.com" not in owner.asked  # a redirect is not followed
    del owner.hosts["my-line.example.com"]
    assert "No answer of use: HTTPSConnectionPool(host='my-line" in owner.fails(*command)


@both
def test_an_address_that_twilio_could_not_use(owner, command):
    for address in "http://line.example.com", "line.example.com", f"https://me:{PASSWORD}@x.org":
        assert "ADDRESS takes an address like https://" in owner.fails(*command[:-1], address)
    assert owner.asked == []


@both
def test_a_line_that_would_refuse_calls(owner, command, lines):
    def says_what_to_set(*command):
        there = "TWILIO_AUTH_TOKEN to the token that is set here, and PUBLIC_URL to " + command[-1]
        reason = owner.fails(*command)
        return reason == f"The app at {command[-1]} refuses calls. Set there {there}"

    owner.buy(MINE)
    owner.hosts["other.example.com"] = owner.hosts["my-line.example.com"]
    assert says_what_to_set(*command[:-1], OTHER)  # its PUBLIC_URL is ADDRESS
    owner.token = ANOTHER_TOKEN
    assert says_what_to_set(*command)
    owner.token, owner.hosts["my-line.example.com"] = TOKEN, passed_on_to(lines[1])
    assert says_what_to_set(*command)  # it has no token


@both
def test_the_line_is_asked_like_this_in_the_name_of_someone_who_may_call(owner, command):
    asked = []
    owner.hosts["my-line.example.com"] = lambda *what: asked.append(what) or (200, "<Response/>")
    owner.buy(MINE)

    owner.types(*command, ALLOWED_CALLERS=A_FRIEND)

    [(method, path, _, form)] = asked
    assert (method, path, form["From"], form["CallStatus"]) == ("POST", "/", A_FRIEND, "ringing")


# --- What Twilio answers --------------------------------------------------------------------------


@both
def test_wrong_credentials(owner, command):
    owner.buy(MINE)

    for name, value in ("AUTH_TOKEN", ANOTHER_TOKEN), ("ACCOUNT_SID", "AC" + "f" * 32):
        for wrong in "", value:
            said = owner.fails(*command, **{f"TWILIO_{name}": wrong})
            assert "Set TWILIO_ACCOUNT_SID and TWILIO_AUTH_TOKEN as https://console." in said
    assert set(owner.asked) == {"api.twilio.com"}


@both
def test_what_twilio_does_not_do_is_said_in_its_words(owner, command):
    owner.buy(MINE)
    owner.allowed = False

    assert re.fullmatch("Twilio says no: .*: The number is unverified", owner.fails(*command))
    for text in "<h1>Please log in to this hotel</h1>", '{"sid": "AC", "status": "active"}':
        owner.hosts["api.twilio.com"] = lambda *_, text=text: (200, text)
        assert owner.fails(*command).startswith("No answer of use: ")
    del owner.hosts["api.twilio.com"]
    assert "No answer of use: HTTPSConnectionPool(host='api.twilio.com" in owner.fails(*command)


def test_silence_is_given_up_on(silent):
    for host, said in silent.items():
        assert re.match(rf"No answer of use: .*\b{host}\b.* timed out", said())


# --- The terminal, the internet and the account ---------------------------------------------------


class Owner(http.server.ThreadingHTTPServer):
    """Someone at a terminal, a Twilio account, and the internet: a proxy, in which all TLS ends."""

    daemon_threads, block_on_close = True, False

    def __init__(self, folder, **hosts):
        super().__init__(("127.0.0.1", 0), Connection)
        self.folder, self.over = folder, threading.Event()
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(CERTIFICATE)
        # By the name of each host, the function that answers for it with a status and a text.
        self.hosts = {"api.twilio.com": self.twilio, **hosts}
        self.asked = []  # the host of every request
        self.token, self.allowed, self.numbers, self.done = TOKEN, True, [], []

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,)).start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.shutdown()
        self.server_close()

    def types(self, *words, exits=0, **environ):
        """Type ``flask`` and these words; returns all that is printed."""
        environ = {
            **{name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ},
            "DATABASE_URL": f"sqlite:///{self.folder}/calls.db",
            "TWILIO_ACCOUNT_SID": SID,
            "TWILIO_AUTH_TOKEN": self.token,
            "HTTPS_PROXY": f"http://127.0.0.1:{self.server_port}",
            "REQUESTS_CA_BUNDLE": CERTIFICATE,
            **environ,
        }
        paper = self.folder / "printed"
        command = PROCESSES.Process(target=typed, args=(words, environ, paper), daemon=True)
        command.start()
        command.join(60)
        printed = paper.read_text()
        assert command.exitcode == exits, printed
        assert not [secret for secret in (TOKEN, ANOTHER_TOKEN, PASSWORD) if secret in printed]
        return printed

    def fails(self, *words, **environ):
        """Type what can't work; returns the reason that is given. Twilio has done nothing."""
        *_, reason = self.types(*words, exits=1, **environ).splitlines()
        assert self.done == []
        return reason

    def buy(self, number, **settings):
        """Have a number, as it is when it is new but for these settings."""
        new = {name: "POST" if name.endswith("method") else "" for name in NUMBER}
        sid = f"PN{len(self.numbers)}"
        self.numbers.append({"sid": sid, "phone_number": number, **new, **settings})

    def twilio(self, method, path, headers, form):
        """The REST API, as far as a line needs it: https://www.twilio.com/docs/usage/api"""
        known = base64.b64encode(f"{SID}:{self.token}".encode()).decode()
        if headers["Authorization"] != f"Basic {known}":
            return 401, json.dumps({"code": 20003, "message": "Authenticate"})
        what = path.partition("?")[0].removeprefix(f"/2010-04-01/Accounts/{SID}").strip("/")
        if method == "GET":
            numbers = {"incoming_phone_numbers": self.numbers}
            return 200, json.dumps({"sid": SID} if what == ".json" else numbers)
        if not self.allowed:
            return 400, json.dumps({"code": 21219, "message": "The number is unverified"})
        form = {re.sub("(?<!^)(?=[A-Z])", "_", name).lower(): form[name] for name in form}
        self.done.append((what, form))
        if what == "Calls.json":
            return 201, json.dumps({"sid": "CA" + "c" * 32})
        [number] = [number for number in self.numbers if number["sid"] in what]
        number.update(form)
        return 200, json.dumps(number)

    def handle_error(self, *_):
        """A visitor has gone away."""


class Connection(http.server.BaseHTTPRequestHandler):
    """One connection to the proxy, and through it to a host."""

    def do_CONNECT(self):
        self.host = self.path.removesuffix(":443")
        if self.host not in self.server.hosts:
            return self.send_error(502)
        self.send_response_only(200)
        self.end_headers()
        self.request = self.server.tls.wrap_socket(self.connection, server_side=True)
        self.setup()
        self.close_connection = False

    def do_GET(self):
        self.server.asked.append(self.host)
        form = dict(parse_qsl(self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()))
        answers = self.server.hosts[self.host]
        status, text = answers(self.command, self.path, self.headers, form)
        self.send_response(status)
        if status == 301:
            self.send_header("Location", text)
            text = ""
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    do_POST = do_GET

    def finish(self):
        super().finish()
        self.request.close()

    def log_message(self, *_):
        pass


def typed(words, environ, paper):
    """The command, in its process."""
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(ROOT)
    sys.argv = ["flask", *words]
    sys.stdout = sys.stderr = open(paper, "w")
    flask.cli.main()


def passed_on_to(app):
    """A host that is the app, behind a proxy of its own."""

    def answer(method, path, headers, form):
        passed = {**headers, "X-Forwarded-Proto": "https", "X-Forwarded-For": "203.0.113.7"}
        with closing(http.client.HTTPConnection("127.0.0.1", app.port)) as connection:
            connection.request(method, path, urlencode(form), passed)
            response = connection.getresponse()
            return response.status, response.read().decode()

    return answer


@pytest.fixture(scope="module", autouse=True)
def silent(tmp_path_factory):
    """Who is silent, and what is said of that after a while, during which the other tests run."""
    said = {}
    with ThreadPoolExecutor() as threads, ExitStack() as owners:
        for host in "api.twilio.com", "my-line.example.com":
            owner = owners.enter_context(Owner(tmp_path_factory.mktemp("silent")))
            owner.buy(MINE)
            owner.hosts[host] = lambda *_, over=owner.over: over.wait()
            said[host] = threads.submit(owner.fails, *CONNECT).result
        yield said


@pytest.fixture(scope="module")
def lines():
    """The real app: with the token, and without one."""
    with App({"TWILIO_AUTH_TOKEN": TOKEN, "PUBLIC_URL": ADDRESS}) as line, App() as without:
        yield line, without


@pytest.fixture
def owner(tmp_path, lines):
    with Owner(tmp_path, **{"my-line.example.com": passed_on_to(lines[0])}) as owner:
        yield owner

"""An owner at a terminal, with a pretend Twilio account: for the tests of flask commands.

HTTPS_PROXY leads the commands to a small internet on loopback. There, api.twilio.com is an account that notes what it
has done.
"""

import base64
import http.client
import http.server
import json
import os
import re
import ssl
import threading
from contextlib import closing
from urllib.parse import parse_qsl, urlencode

from tests.phone import ROOT
from tests.stage import PROXY, flask_command

CERTIFICATE = str(ROOT / "tests" / "certificate.pem")  # for three hosts
SID = "AC" + "0123456789abcdef" * 2
TOKEN, ANOTHER_TOKEN, PASSWORD = "the-secret-token", "another-secret-token", "my-password"
MINE, ALSO_MINE, A_FRIEND = "+15550009999", "+15550008888", "+15557654321"
ADDRESS, OTHER = "https://my-line.example.com", "https://other.example.com"
RETRIES = "#rc=5&rp=5xx,ct,rt&rt=8000"  # for the time in which a new process starts
NUMBER = {
    "voice_url": f"{ADDRESS}/{RETRIES}",
    "voice_method": "POST",
    "voice_fallback_url": f"{ADDRESS}/talking{RETRIES}",
    "voice_fallback_method": "POST",
    "status_callback": f"{ADDRESS}/status_callback{RETRIES}",
    "status_callback_method": "POST",
}


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
        status, printed = flask_command(*words, environ=environ)
        assert status == exits, printed
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


def passed_on_to(app):
    """A host that is the app, behind a proxy of its own."""

    def answer(method, path, headers, form):
        passed = {**headers, **PROXY}
        with closing(http.client.HTTPConnection("127.0.0.1", app.port)) as connection:
            connection.request(method, path, urlencode(form), passed)
            response = connection.getresponse()
            return response.status, response.read().decode()

    return answer

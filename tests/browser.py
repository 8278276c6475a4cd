"""The telephone in the browser: a page that speaks and hears, and shows what Twilio asks and gets.

    python -m tests.phone --browser

The page (browser.html, browser.css, browser.js) is the caller's side: the voice, the recogniser,
the field, the keys. Here, behind it, are Twilio's side, which is a Phone, and a small web server
between the two. What happens in a call goes to the page as a stream of events (server-sent events,
https://developer.mozilla.org/docs/Web/API/Server-sent_events); what the caller does comes back as
small POSTs.

A call can spend the owner's money. So the server answers this machine only, and nobody who doesn't
know the secret in its address; and it looks at Host and Origin, so that another page in the same
browser gets nowhere.
"""

import contextlib
import http.server
import json
import os
import pathlib
import secrets
import sys
import threading
import time
import traceback
import webbrowser
from urllib.parse import parse_qs, urljoin, urlsplit
from xml.etree import ElementTree

from tests.phone import KEYS, SPEAKING_RATE, Phone, TwilioError

HERE = pathlib.Path(__file__).parent
FILES = {
    "": ("browser.html", "text/html; charset=utf-8"),
    "browser.css": ("browser.css", "text/css; charset=utf-8"),
    "browser.js": ("browser.js", "text/javascript; charset=utf-8"),
}
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "same-origin",  # nobody else is to learn the secret
    "X-Content-Type-Options": "nosniff",
}
LARGEST_POST = 64 * 1024


class Events:
    """What happens in one call, in order. All of it is kept: a page may lose its connection."""

    def __init__(self):
        self._events, self._news, self._over = [], threading.Condition(), False

    def add(self, kind, **what):
        with self._news:
            self._events.append({"kind": kind, **what})
            self._over = self._over or kind == "over"
            self._news.notify_all()

    def after(self, number, seconds):
        """The events behind this number, waiting so long for one; and whether these are all."""
        with self._news:
            self._news.wait_for(lambda: len(self._events) > number or self._over, seconds)
            return self._events[number:], self._over


class BrowserPhone(Phone):
    """One call, whose caller sits before the page."""

    def __init__(self, *arguments, troubles=None, **more):
        super().__init__(*arguments, speaking_rate=SPEAKING_RATE, **more)
        self.events = Events()
        self.turn = 0  # goes up whenever the line listens anew
        self._troubles = troubles
        self._changed = threading.Condition()
        self._busy = self._hung_up = self._over = False
        self._said_to_the_end = set()
        self._waits_shown = self._partial_results = 0

    # What the page asks for

    def do(self, turn, what, *arguments):
        """Begin to do what the caller does. Returns False if the line doesn't listen in this turn.

        Args:
            turn: in which turn the caller does it; another one is over, or hasn't begun.
            what: a verb of the caller's.
        """
        with self._changed:
            if self._busy or self.ended or turn != self.turn:
                return False
            self._busy = True
        threading.Thread(target=self._do, args=(what, *arguments), daemon=True).start()
        return True

    def has_said(self, number):
        """The page has spoken this sentence to its end."""
        with self._changed:
            self._said_to_the_end.add(number)
            self._changed.notify_all()

    def said_so_far(self, turn, words):
        """The caller is still speaking. Twilio reports that if there is a partialResultCallback."""
        gather = self.gather
        if turn != self.turn or not gather or "partialResultCallback" not in gather:
            return
        url = urljoin(self._base, gather["partialResultCallback"])
        params = {"UnstableSpeechResult": words, "SequenceNumber": str(self._partial_results)}
        self._partial_results += 1
        with contextlib.suppress(TwilioError):  # Twilio takes no notice of the answer
            self._ask(url, gather.get("partialResultCallbackMethod", "POST"), params)

    def put_down(self):
        """Hang up, whatever is going on in the call."""
        with self._changed:
            self.ended = self.ended or "hung up by the caller"
            self._changed.notify_all()
        self._finish()

    # What happens, for the page to show

    def spoken(self, text, cut_in):
        number = len(self.said)
        self.said.append((text, time.monotonic(), cut_in))
        wait = self.waits[-1] if len(self.waits) > self._waits_shown else None
        self._waits_shown = len(self.waits)
        how = {"cutIn": cut_in, "wait": wait, "language": self.language}
        self.events.add("say", number=number, text=text, **how)
        if not cut_in:
            # The page says when it is done. If it has gone Twilio's side goes on without it, after
            # longer than the slowest voice takes (Chinese is about 4 characters a second).
            patience = 10 + len(text) / 2
            with self._changed:
                self._changed.wait_for(
                    lambda: self.ended or number in self._said_to_the_end, patience
                )

    def warned(self, text):
        super().warned(text)
        self.events.add("warning", text=text)

    def answered(self, method, url, params, seconds, response):
        # Of the parameters that every request has, only the status of the call ever changes.
        shown = {name: value for name, value in params.items() if name not in self.params}
        shown["CallStatus"] = params.get("CallStatus", "")
        address = urlsplit(url)
        self.events.add(
            "request",
            method=method,
            path=address.path + (f"?{address.query}" if address.query else ""),
            params=shown,
            milliseconds=round(seconds * 1000),
            status=response.status if response else None,
            body=indented(response.body) if response else "",
        )

    def _do(self, what, *arguments):
        try:
            what(*arguments)
        except Exception:  # whatever it is, the page must learn that nothing more will come
            if not self.ended:  # otherwise the caller hung up at this very moment
                traceback.print_exc()
                self.ended = "the telephone itself failed, see its terminal"
        with self._changed:
            self._busy = False
            self.turn += 1
        self.show_troubles()
        if self.ended:
            self._finish()
        else:
            self.events.add("listen", turn=self.turn, **self._listens())

    def _listens(self):
        """What the page has to know of the <Gather>."""
        keys = self.gather.get("numDigits")
        return {
            "speech": self.listens_to("speech"),
            "keys": self.listens_to("dtmf"),
            "timeout": int(self.gather.get("timeout", 5)),
            "language": self.gather.get("language"),
            "mostKeys": int(keys) if keys else None,
            "lastKey": self.gather.get("finishOnKey", "#"),
            "partialResults": "partialResultCallback" in self.gather,
        }

    def _finish(self):
        """Tell the app and the page, once, that the call has ended; and the page that this is all."""
        with self._changed:
            first, self._hung_up = not self._hung_up, True
        if first:
            self.events.add("ended", how=self.ended)
            self.hang_up()
        self.show_troubles()
        with self._changed:
            if not self._busy and not self._over:
                self._over = True
                self.events.add("over")

    def show_troubles(self):
        for line in self._troubles.news() if self._troubles else ():
            self.events.add("trouble", text=line)


def indented(body):
    """TwiML as one reads it; or the body as it is, where it isn't TwiML."""
    try:
        document = ElementTree.fromstring(body)
    except ElementTree.ParseError:
        return body.decode(errors="replace")
    ElementTree.indent(document)
    return ElementTree.tostring(document, encoding="unicode")


class Switchboard(http.server.ThreadingHTTPServer):
    """The web server between the page and its calls, of which one is on at a time.

    Args:
        begin: a function that returns a new BrowserPhone.

    Attributes:
        url: the page's address, with the secret.
    """

    daemon_threads = True

    def __init__(self, begin):
        super().__init__(("127.0.0.1", 0), Page)
        self.host = f"127.0.0.1:{self.server_address[1]}"
        self.origin = f"http://{self.host}"
        self.secret = secrets.token_urlsafe(24)
        self.url = f"{self.origin}/{self.secret}/"
        self.begin, self.phone = begin, None
        self._lock = threading.Lock()

    def call(self):
        """Begin a call; the one before ends."""
        with self._lock:
            self.put_down()
            self.phone = self.begin()
        self.phone.do(0, self.phone.call)
        return self.phone

    def put_down(self):
        if self.phone:
            self.phone.put_down()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.put_down()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # a page that was closed is no error
            super().handle_error(request, client_address)


class Page(http.server.BaseHTTPRequestHandler):
    """What the page may ask for."""

    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds for the next request of a connection

    def do_GET(self):
        if (path := self._path_behind_the_secret()) is None:
            return
        if path == "events":
            self._stream()
        elif path in FILES:
            name, content_type = FILES[path]
            self._send(200, (HERE / name).read_bytes(), content_type)
        else:
            self._send(404)

    def do_POST(self):
        if (path := self._path_behind_the_secret()) is None:
            return
        try:
            length = int(self.headers.get("Content-Length", ""))
            is_json = self.headers.get_content_type() == "application/json"
            if not 0 <= length <= LARGEST_POST or not is_json:
                raise ValueError
            asked = json.loads(self.rfile.read(length))
            answer = self._done(path, asked)
        except (ValueError, KeyError, TypeError):
            self.close_connection = True  # of its body there may be more
            return self._send(400)
        self._send(200 if answer else 409, json.dumps(answer).encode(), "application/json")

    def _done(self, path, asked):
        """Do what the page asks for; what is returned is false where it was too late for that."""
        if path == "call":
            return {"call": self.server.call().call_sid}
        phone = self.server.phone
        if not phone or asked["call"] != phone.call_sid:
            return False
        if path == "said":
            phone.has_said(asked["number"])
        elif path == "hang_up":
            phone.put_down()
        elif path == "partial":
            phone.said_so_far(asked["turn"], str(asked["words"]))
        elif path == "say" and str(asked["words"]).strip():
            return phone.do(asked["turn"], phone.say, str(asked["words"]))
        elif path == "press" and asked["keys"] and not asked["keys"].strip(KEYS):
            return phone.do(asked["turn"], phone.press, asked["keys"])
        elif path == "silence":
            return phone.do(asked["turn"], phone.stay_silent)
        else:
            raise ValueError(path)
        return True

    def _stream(self):
        """The events of a call as they come, from the one on that the page hasn't seen."""
        query = parse_qs(self.path.partition("?")[2])
        phone = self.server.phone
        if not phone or query.get("call") != [phone.call_sid]:
            return self._send(404)
        seen = self.headers.get("Last-Event-ID", "0")
        seen = int(seen) if seen.isdecimal() else 0
        self.close_connection = True  # how else should the page know where the stream ends?
        self._begin(200, "text/event-stream; charset=utf-8")
        over = False
        while not over:
            # A second: then it is time to look into the app's log, and whether the page is there.
            events, over = phone.events.after(seen, 1)
            for event in events:
                seen += 1
                self.wfile.write(f"id: {seen}\ndata: {json.dumps(event)}\n\n".encode())
            if not events:
                self.wfile.write(b":\n\n")
                phone.show_troubles()

    def _path_behind_the_secret(self):
        """The path, for who may ask; for anyone else an answer, and None."""
        server = self.server
        _, secret, path = (self.path.partition("?")[0].split("/", 2) + ["", ""])[:3]
        origin = self.headers.get("Origin")
        if self.headers.get("Host") != server.host:
            return self._refuse(403)  # a foreign name that was made to lead here
        if origin != server.origin and (origin is not None or self.command != "GET"):
            return self._refuse(403)  # a page of somebody else's
        if not secrets.compare_digest(secret.encode(), server.secret.encode()):
            return self._refuse(404)
        return path

    def _refuse(self, status):
        self.close_connection = True  # what else was sent isn't read
        self._send(status)

    def _send(self, status, body=b"", content_type="text/plain"):
        self._begin(status, content_type, {"Content-Length": len(body)})
        self.wfile.write(body)

    def _begin(self, status, content_type, more=()):
        self.send_response(status)
        for name, value in {"Content-Type": content_type, **HEADERS, **dict(more)}.items():
            self.send_header(name, str(value))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def log_message(self, *_):
        pass


def serve(url, token, *, number, troubles=None):
    """Let the page call this line, until Ctrl-C."""

    def begin():
        return BrowserPhone(url, token, number=number, troubles=troubles)

    with Switchboard(begin) as switchboard:
        print(f"\nThe telephone is at {switchboard.url}\nCtrl-C here ends it.", flush=True)
        if has_a_screen():
            webbrowser.open(switchboard.url)
        while True:  # a Ctrl-C that comes just before one of these waits is noticed after it
            time.sleep(1)


def has_a_screen():
    """Elsewhere a browser for text would take over this terminal."""
    named = map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))
    return sys.platform in ("darwin", "win32") or any(named)

"""flask connect, flask ring, flask calls: the owner at a terminal."""

import contextlib
import json
import os
import re
import sys
from dataclasses import dataclass
from datetime import datetime

import click
from twilio.base.exceptions import TwilioException, TwilioRestException
from twilio.request_validator import RequestValidator

from app import RETRIES, app, plain_number, read_settings, setting
from store import Store, what_was_heard


@dataclass(frozen=True)
class Settings:
    twilio_account_sid: str = setting("", r"AC[0-9a-fA-F]{32}", "AC and 32 hexadecimal digits")


own_number = click.option("--number", help="The app's own number, if the account has several.")


def activate(line) -> None:
    settings = line.settings
    read_settings(Settings, os.environ)  # a value that can't be used stops the start

    @app.cli.command("connect")
    @click.argument("address")
    @own_number
    def connect(address, number):
        """Point a Twilio number at the app that runs at ADDRESS."""
        with app_at(settings, address, number) as (_, own, urls):
            if other := own.trunk_sid or own.voice_application_sid:
                sys.exit(f"{own.phone_number} is answered by the trunk or TwiML app {other}. "
                         "Take that off the number in Twilio's console.")
            before = {name: getattr(own, name) for name in urls if getattr(own, name) != urls[name]}
            if before:
                own.update(**urls)
        click.echo(f"{own.phone_number} {'is now' if before else 'was already'} connected.")
        for name, old in before.items():
            old = re.sub("//[^/?#]*@", "//", old or "nothing")  # a URL can have a password in it
            click.echo(f"    {name}: {urls[name]} (before: {old})")

    @app.cli.command("ring")
    @click.argument("to")
    @click.argument("address")
    @own_number
    def ring(to, address, number):
        """Call the number TO from the app that runs at ADDRESS."""
        to = plain_number(to)
        if settings.allowed_callers and to not in settings.allowed_callers:
            sys.exit(f"{to} is not in ALLOWED_CALLERS: the app would hang up.")
        with app_at(settings, address, number) as (twilio, own, urls):
            place_call(twilio, own, to, urls)

    @app.cli.command("calls")
    @click.argument("call_sid", default="")
    @click.option("--json", "as_json", is_flag=True, help="For programs.")
    def calls(call_sid, as_json):
        """List the calls whose words are stored; or print one, by its CALL_SID, as a transcript."""
        found = transcript(call_sid) if call_sid else list_of_calls()
        if as_json:
            click.echo(json.dumps(found, indent=1, ensure_ascii=False, default=str))
            return
        for row in found:
            if call_sid:
                cut = f"[cut in] {row['not_heard']}" if row["not_heard"] else ""
                early = (f" [begun {row['seconds_ahead']:.1f} s early]"
                         if row["seconds_ahead"] else "")
                click.echo(f"{row['at']}  Caller: {row['caller']}")
                click.echo(f"{'':19}  Claude: {row['heard']}{cut}{early}")
            else:
                click.echo("{call_sid}  {began}  {seconds:5} s  {turns:3} turns  {number}".format(
                    **row) + ("  on" if row["on"] else ""))

    def list_of_calls() -> list[dict]:
        with line.store.transaction() as database:
            rows = database.execute(
                "SELECT calls.call_sid, began, ended, COUNT(*) AS turns, MAX(touched) AS touched"
                " FROM calls JOIN turns ON turns.call_sid = calls.call_sid WHERE words <> ''"
                " GROUP BY calls.call_sid, began, ended ORDER BY began").fetchall()
            numbers = {row["call_sid"]: row["number"] for row in database.execute(
                "SELECT call_sid, number FROM callers").fetchall()
            } if "callers" in Store.extra_tables else {}
        return [{"call_sid": row["call_sid"], "began": clock(row["began"]),
                 "seconds": round((row["ended"] or row["touched"]) - row["began"]),
                 "turns": row["turns"], "on": row["ended"] is None,
                 "number": f"...{numbers[row['call_sid']][-3:]}" if row["call_sid"] in numbers
                 else "withheld"} for row in rows]

    def transcript(call_sid: str) -> list[dict]:
        ahead = {}
        if "ahead" in Store.extra_tables:
            ahead = {row["turn"]: row["seconds"] for row in line.store.sql(
                "SELECT turn, seconds FROM ahead WHERE call_sid = ?", call_sid)}
        return [{"at": clock(turn["spoke_at"]), "caller": turn["words"], "heard": heard,
                 "not_heard": rest, "stop": turn["stop"], "seconds_ahead": ahead.get(turn["turn"])}
                for turn, heard, rest in what_was_heard(line.store.turns(call_sid))]


@contextlib.contextmanager
def app_at(settings, address, number):
    """Twilio's client, the app's own number, and the URLs of the app at this address. Whatever
    goes wrong, also later in the ``with``, is one sentence in the terminal."""
    from twilio.http.http_client import TwilioHttpClient  # 27 MB that no call needs
    from twilio.rest import Client

    address = address.rstrip("/")
    if not re.fullmatch(r"(?a)https://[a-z0-9.-]+(:\d+)?(/[\w./~-]*)?", address):
        sys.exit("ADDRESS takes an address like https://my-line.example.com")
    account_sid = read_settings(Settings, os.environ).twilio_account_sid
    http = TwilioHttpClient(timeout=10)  # seconds; by default it waits for ever
    twilio = Client(account_sid, settings.twilio_auth_token, http_client=http)
    try:
        twilio.api.account.fetch()  # says that the token is wrong, where a list only fails
        own = {one.phone_number: one for one in twilio.incoming_phone_numbers.list()}
        if len(own) == 1 and not number:
            (number,) = own
        if number not in own:
            sys.exit(f"Choose with --number one of: {', '.join(own) or 'none'}")
        make_sure_that_it_answers(settings, address)
        urls: dict[str, str] = {}
        for name, path in ("voice_url", "/"), ("voice_fallback_url", "/talking"), (
                "status_callback", "/status_callback"):
            urls |= {name: f"{address}{path}#{RETRIES}",
                     f"{name.removesuffix('_url')}_method": "POST"}
        yield twilio, own[number], urls
    except TwilioRestException as error:
        both = ("TWILIO_ACCOUNT_SID and TWILIO_AUTH_TOKEN as"
                " https://console.twilio.com shows them")
        sys.exit(f"Set {both}." if error.status == 401 else f"Twilio says no: {error.msg}")
    except (TwilioException, OSError, ValueError) as error:  # ValueError: it isn't JSON
        sys.exit(f"No answer of use: {error}")  # names the host that was asked


def place_call(twilio, own, to, urls):
    """Call a number from the app's own one, with these URLs of ``app_at``."""
    urls = {name.removeprefix("voice_"): url for name, url in urls.items()}
    call = twilio.calls.create(to=to, from_=own.phone_number, **urls)
    click.echo(f"{own.phone_number} is calling {to}: {call.sid}")


def make_sure_that_it_answers(settings, address):
    """Send a request as for an incoming call. The app only greets, so this costs nothing."""
    url, number = f"{address}/", min(settings.allowed_callers, default="+15551234567")
    call = {"CallSid": "CA" + "0" * 32, "From": number, "CallStatus": "ringing"}
    answer = post(settings, url, call)
    if answer.status_code == 403:
        sys.exit(f"The app at {address} refuses calls. Set there TWILIO_AUTH_TOKEN to the token"
                 f" that is set here, and PUBLIC_URL to {address}")
    if answer.status_code != 200 or "<Response" not in answer.text:
        seen = answer.headers.get("Location") or answer.text[:50]
        sys.exit(f"Not this app: {url} answers {answer.status_code}, {seen!a}")


def post(settings, url, params):
    """Send a request that is signed like Twilio's."""
    from twilio.http.http_client import TwilioHttpClient

    signature = RequestValidator(settings.twilio_auth_token).compute_signature(url, params)
    return TwilioHttpClient(timeout=10).request("POST", url, data=params,
                                                headers={"X-Twilio-Signature": signature})


def clock(moment: float) -> datetime:
    return datetime.fromtimestamp(int(moment))

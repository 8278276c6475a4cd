"""flask errand TO ADDRESS PURPOSE: the app calls this number, and Claude speaks first.

The purpose reaches the app in a signed request, before the call is placed. It is the first turn of
a call with a name of its own, so that Claude writes while the phone rings. When someone answers,
the turn becomes a part of the real call. If nobody does, it is deleted after ten minutes.
"""

import secrets
import sys
import time

import click
from flask import abort, request

import app
from conversation import Conversation
from extras.commands import app_at, place_call, post


def activate(line) -> None:
    allowed = line.settings.allowed_callers
    app.NOT_THE_CALLER.add("twilio.errand")

    @app.app.cli.command("errand")
    @click.argument("to")
    @click.argument("address")
    @click.argument("purpose")
    @click.option("--number", help="The app's own number, if the account has several.")
    def command(to, address, purpose, number):
        """Call the number TO from the app at ADDRESS. Claude speaks first, about PURPOSE."""
        to, address = app.plain_number(to), address.rstrip("/")
        if to not in allowed:
            sys.exit(f"{to} is not in ALLOWED_CALLERS. An artificial voice may call only people who"
                     " have agreed to that, so list their numbers there.")
        with app_at(line.settings, address, number) as (client, own, urls):
            call = {"To": to, "Purpose": purpose, "CallSid": "errand"}
            name = post(line.settings, f"{address}/errand", call).text
            if not name.startswith("errand-"):
                sys.exit("The app takes no errand: look at its log, and at its ALLOWED_CALLERS.")
            urls["voice_url"] = f"{address}/?errand={name}#{app.RETRIES}"
            place_call(client, own, to, urls)

    if not allowed:
        return

    @app.twilio.post("/errand")
    def errand():
        """The command brings a purpose. The answer is the name of the call that it begins."""
        if not line.claude or request.form["To"] not in allowed:
            abort(403)
        name = f"errand-{secrets.token_hex(16)}"
        Conversation(name, line).caller_said(
            "[The owner of this phone line has you call this person. Speak first. The purpose:"
            f" {request.form['Purpose']}]", None, time.time())
        # Ten minutes, in seconds: by then someone has answered, or nobody will.
        line.store.sql("UPDATE calls SET forget_at = began + 600 WHERE call_sid = ?", name)
        return name

    @app.twilio.url_defaults
    def carry_name(endpoint, values) -> None:
        """A PIN that is keyed in comes to another URL."""
        if endpoint == "twilio.call_comes_in" and "errand" in request.args:
            values.setdefault("errand", request.args["errand"])

    @app.twilio.before_request
    def speak_first():
        """Someone has answered. A reply that has no sentence yet is given up: nobody hears it."""
        name, sql = request.args.get("errand", ""), line.store.sql
        if request.endpoint == "twilio.call_comes_in" and name.startswith("errand-"):
            with line.store.transaction():
                call_sid = line.store.begin(request.values["CallSid"])["call_sid"]
                sql("UPDATE turns SET call_sid = ?, stop = CASE reply WHEN '' THEN 'overtaken' ELSE"
                    " stop END WHERE call_sid = ?", call_sid, name)
                sql("UPDATE calls SET forgotten = 0 WHERE call_sid = ?", call_sid)  # it has words
                sql("DELETE FROM calls WHERE call_sid = ?", name)
                rows = sql("SELECT reply FROM turns WHERE call_sid = ? AND turn = 1", call_sid)
            if rows and rows[0]["reply"]:  # otherwise the caller hears the greeting
                return app.say_and_come_back(1, 0, rows[0]["reply"][:app.LONGEST_ANSWER])

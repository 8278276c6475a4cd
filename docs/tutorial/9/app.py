import contextlib  # new
import logging  # new
import os
import sqlite3

import anthropic
from flask import Flask, request
from twilio.request_validator import RequestValidator
from twilio.twiml.voice_response import VoiceResponse
from werkzeug.middleware.proxy_fix import ProxyFix

app = Flask(__name__)
app.wsgi_app = ProxyFix(app.wsgi_app, x_for=0, x_proto=1, x_host=1)
validator = RequestValidator(os.environ["TWILIO_AUTH_TOKEN"])
claude = anthropic.Anthropic(timeout=12, max_retries=0)
SYSTEM_PROMPT = "You're on the phone. Say a sentence or two, no lists, no markdown."
ARE_YOU_THERE = ["Are you still there?", "I'm listening, whenever you're ready."]
SORRY = "Sorry, something went wrong at my end. Could you say that again?"  # new
NO_ANSWER = "I don't know what to say to that. Could you put it another way?"  # new

@app.before_request
def only_twilio():
    signature = request.headers.get("X-Twilio-Signature", "")
    if not validator.validate(request.url, request.form, signature):
        return "Only Twilio may ask.", 403

@app.post("/")
def call_comes_in():
    return say_and_listen("Hello, this is Claude speaking!")

@app.post("/talking")
def talking():
    call_sid, words = request.form["CallSid"], request.form.get("SpeechResult", "")
    if not words:
        return are_you_there(request.args.get("silences", 1, type=int))
    sql("INSERT INTO said VALUES (?, 'user', ?)", call_sid, words)  # new
    said = sql("SELECT role, content FROM said WHERE call_sid = ?", call_sid)  # new
    message = claude.messages.create(
        model="claude-haiku-5-5",
        max_tokens=2000, output_config={"effort": "low"}, system=SYSTEM_PROMPT,
        messages=[{"role": role, "content": content} for role, content in said],
    )
    reply = " ".join(block.text for block in message.content if block.type == "text")
    if reply:  # new
        sql("INSERT INTO said VALUES (?, 'assistant', ?)", call_sid, reply)  # new
    return say_and_listen(reply or NO_ANSWER)  # new

@app.errorhandler(Exception)  # new
def apologise(error):  # new
    logging.error("%r", error)  # new
    return say_and_listen(SORRY)  # new

def are_you_there(silences):
    if silences <= len(ARE_YOU_THERE):
        return say_and_listen(ARE_YOU_THERE[silences - 1], silences)
    response = VoiceResponse()
    response.say("I can't hear anyone, so I'll hang up now. Goodbye!")
    response.hangup()
    return str(response), {"Content-Type": "text/xml"}

def say_and_listen(text, silences=0):
    response = VoiceResponse()
    response.gather(input="speech", action="/talking", speech_timeout="auto").say(text)
    response.redirect(f"/talking?silences={silences + 1}")
    return str(response), {"Content-Type": "text/xml"}

def sql(statement, *values):  # new
    with contextlib.closing(sqlite3.connect("calls.db", isolation_level=None)) as database:  # new
        database.execute("CREATE TABLE IF NOT EXISTS said (call_sid, role, content)")
        return database.execute(statement, values).fetchall()  # new

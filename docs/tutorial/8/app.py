import os  # new
import sqlite3

import anthropic
from flask import Flask, request
from twilio.request_validator import RequestValidator  # new
from twilio.twiml.voice_response import VoiceResponse
from werkzeug.middleware.proxy_fix import ProxyFix  # new

app = Flask(__name__)
app.wsgi_app = ProxyFix(app.wsgi_app, x_for=0, x_proto=1, x_host=1)  # new
validator = RequestValidator(os.environ["TWILIO_AUTH_TOKEN"])  # new
claude = anthropic.Anthropic(timeout=12, max_retries=0)
SYSTEM_PROMPT = "You're on the phone. Say a sentence or two, no lists, no markdown."
ARE_YOU_THERE = ["Are you still there?", "I'm listening, whenever you're ready."]

@app.before_request  # new
def only_twilio():  # new
    signature = request.headers.get("X-Twilio-Signature", "")  # new
    if not validator.validate(request.url, request.form, signature):  # new
        return "Only Twilio may ask.", 403  # new

@app.post("/")
def call_comes_in():
    return say_and_listen("Hello, this is Claude speaking!")

@app.post("/talking")
def talking():
    call_sid, words = request.form["CallSid"], request.form.get("SpeechResult", "")
    if not words:
        return are_you_there(request.args.get("silences", 1, type=int))
    database = sqlite3.connect("calls.db", isolation_level=None)
    database.execute("CREATE TABLE IF NOT EXISTS said (call_sid, role, content)")
    database.execute("INSERT INTO said VALUES (?, 'user', ?)", [call_sid, words])
    said = database.execute("SELECT role, content FROM said WHERE call_sid = ?", [call_sid])
    message = claude.messages.create(
        model="claude-haiku-5-5",
        max_tokens=2000, output_config={"effort": "low"}, system=SYSTEM_PROMPT,
        messages=[{"role": role, "content": content} for role, content in said],
    )
    reply = " ".join(block.text for block in message.content if block.type == "text")
    database.execute("INSERT INTO said VALUES (?, 'assistant', ?)", [call_sid, reply])
    database.close()
    return say_and_listen(reply)

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

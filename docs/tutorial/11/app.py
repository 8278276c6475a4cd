import contextlib
import logging
import os
import sqlite3
import threading  # new
import time  # new

import anthropic
from flask import Flask, request
from twilio.request_validator import RequestValidator
from twilio.twiml.voice_response import VoiceResponse
from werkzeug.middleware.proxy_fix import ProxyFix

app = Flask(__name__)
app.wsgi_app = ProxyFix(app.wsgi_app, x_for=0, x_proto=1, x_host=1)
validator = RequestValidator(os.environ["TWILIO_AUTH_TOKEN"])
claude = anthropic.Anthropic(timeout=60, max_retries=0)  # new
SYSTEM_PROMPT = "You're on the phone. Say a sentence or two, no lists, no markdown."
ARE_YOU_THERE = ["Are you still there?", "I'm listening, whenever you're ready."]
SORRY = "Sorry, something went wrong at my end. Could you say that again?"
NO_ANSWER = "I don't know what to say to that. Could you put it another way?"

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
    turn = request.args.get("turn", type=int)  # new
    if not turn and not words:  # new
        return are_you_there(request.args.get("silences", 1, type=int))
    if not turn:  # new
        turn = begin(call_sid, words)
        threading.Thread(target=write, args=[call_sid, turn]).start()  # new
    reply, stop = wait(turn)  # new
    if not stop:  # new
        return say_and_come_back(turn)  # new
    return say_and_listen(reply or (SORRY if stop == "trouble" else NO_ANSWER))  # new

def write(call_sid, turn):  # new
    stop = "trouble"  # new
    try:  # new
        grow(turn, ask(call_sid))  # new
        stop = "end_turn"  # new
    except Exception as error:  # any error: a caller is waiting, so the reply must end  # new
        logging.error("%r", error)
    grow(turn, "", stop)  # new

def ask(call_sid):
    message = claude.messages.create(
        model="claude-haiku-5-5",
        max_tokens=2000, output_config={"effort": "low"}, system=SYSTEM_PROMPT,
        messages=as_messages(turns(call_sid)),
    )
    return " ".join(block.text for block in message.content if block.type == "text")

def as_messages(turns):
    messages = []
    for words, reply in turns:
        messages.append({"role": "user", "content": words})
        if reply:
            messages.append({"role": "assistant", "content": reply.strip()})
    return messages

@app.post("/status_callback")
def status_callback():
    sql("DELETE FROM turns WHERE call_sid = ?", request.form["CallSid"])
    return "", 204

@app.errorhandler(Exception)
def apologise(error):
    logging.error("%r", error)
    return say_and_listen(SORRY)

def say_and_come_back(turn):  # new
    response = VoiceResponse()
    response.say("One moment.")  # new
    response.redirect(f"/talking?turn={turn}")  # new
    return str(response), {"Content-Type": "text/xml"}

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

def begin(call_sid, words):
    insert = "INSERT INTO turns (call_sid, words) VALUES (?, ?) RETURNING turn"
    return sql(insert, call_sid, words)[0][0]

def grow(turn, text, stop=None):  # new
    sql("UPDATE turns SET reply = reply || ?, stop = ? WHERE turn = ?", text, stop, turn)  # new

def wait(turn):  # new
    for _ in range(60):  # 6 seconds, since Twilio waits only 15  # new
        ((reply, stop),) = sql("SELECT reply, stop FROM turns WHERE turn = ?", turn)  # new
        if stop:  # new
            break  # new
        time.sleep(0.1)  # new
    return reply, stop  # new

def turns(call_sid):
    return sql("SELECT words, reply FROM turns WHERE call_sid = ? ORDER BY turn", call_sid)

def sql(statement, *values):
    with contextlib.closing(sqlite3.connect("calls.db", isolation_level=None)) as database:
        database.execute("CREATE TABLE IF NOT EXISTS turns (turn INTEGER PRIMARY KEY,"
                         " call_sid, words, stop, reply DEFAULT '')")
        return database.execute(statement, values).fetchall()

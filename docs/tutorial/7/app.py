import sqlite3

import anthropic
from flask import Flask, request
from twilio.twiml.voice_response import VoiceResponse

app = Flask(__name__)
claude = anthropic.Anthropic(timeout=12, max_retries=0)
SYSTEM_PROMPT = "You're on the phone. Say a sentence or two, no lists, no markdown."
ARE_YOU_THERE = ["Are you still there?", "I'm listening, whenever you're ready."]  # new

@app.post("/")
def call_comes_in():
    return say_and_listen("Hello, this is Claude speaking!")

@app.post("/talking")
def talking():
    call_sid, words = request.form["CallSid"], request.form.get("SpeechResult", "")
    if not words:  # new
        return are_you_there(request.args.get("silences", 1, type=int))  # new
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

def are_you_there(silences):  # new
    if silences <= len(ARE_YOU_THERE):  # new
        return say_and_listen(ARE_YOU_THERE[silences - 1], silences)  # new
    response = VoiceResponse()
    response.say("I can't hear anyone, so I'll hang up now. Goodbye!")  # new
    response.hangup()  # new
    return str(response), {"Content-Type": "text/xml"}

def say_and_listen(text, silences=0):  # new
    response = VoiceResponse()
    response.gather(input="speech", action="/talking", speech_timeout="auto").say(text)
    response.redirect(f"/talking?silences={silences + 1}")  # new
    return str(response), {"Content-Type": "text/xml"}

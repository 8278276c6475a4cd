import sqlite3  # new

import anthropic
from flask import Flask, request
from twilio.twiml.voice_response import VoiceResponse

app = Flask(__name__)
claude = anthropic.Anthropic(timeout=12, max_retries=0)
SYSTEM_PROMPT = "You're on the phone. Say a sentence or two, no lists, no markdown."

@app.post("/")
def call_comes_in():
    return say_and_listen("Hello, this is Claude speaking!")

@app.post("/talking")
def talking():
    call_sid, words = request.form["CallSid"], request.form.get("SpeechResult", "")  # new
    database = sqlite3.connect("calls.db", isolation_level=None)  # new
    database.execute("CREATE TABLE IF NOT EXISTS said (call_sid, role, content)")  # new
    database.execute("INSERT INTO said VALUES (?, 'user', ?)", [call_sid, words])  # new
    said = database.execute("SELECT role, content FROM said WHERE call_sid = ?", [call_sid])  # new
    message = claude.messages.create(
        model="claude-haiku-5-5",
        max_tokens=2000, output_config={"effort": "low"}, system=SYSTEM_PROMPT,
        messages=[{"role": role, "content": content} for role, content in said],  # new
    )
    reply = " ".join(block.text for block in message.content if block.type == "text")
    database.execute("INSERT INTO said VALUES (?, 'assistant', ?)", [call_sid, reply])  # new
    database.close()  # new
    return say_and_listen(reply)

def say_and_listen(text):
    response = VoiceResponse()
    response.gather(input="speech", action="/talking", speech_timeout="auto").say(text)
    return str(response), {"Content-Type": "text/xml"}

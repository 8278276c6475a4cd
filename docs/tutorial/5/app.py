import anthropic
from flask import Flask, request
from twilio.twiml.voice_response import VoiceResponse

app = Flask(__name__)
claude = anthropic.Anthropic(timeout=12, max_retries=0)
SYSTEM_PROMPT = "You're on the phone. Say a sentence or two, no lists, no markdown."  # new

@app.post("/")
def call_comes_in():
    return say_and_listen("Hello, this is Claude speaking!")

@app.post("/talking")
def talking():
    words = request.form.get("SpeechResult", "")
    message = claude.messages.create(
        model="claude-haiku-5-5",
        max_tokens=2000, output_config={"effort": "low"}, system=SYSTEM_PROMPT,  # new
        messages=[{"role": "user", "content": words}],
    )
    reply = " ".join(block.text for block in message.content if block.type == "text")
    return say_and_listen(reply)

def say_and_listen(text):
    response = VoiceResponse()
    response.gather(input="speech", action="/talking", speech_timeout="auto").say(text)
    return str(response), {"Content-Type": "text/xml"}

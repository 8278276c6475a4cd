import logging
import re
import threading
import time

import anthropic

import store

claude = anthropic.Anthropic(timeout=60, max_retries=0)
PROMPT = "You're on the phone, and read aloud: a sentence or two, no lists, no markdown."

def caller_said(call_sid, words, delivery):  # new
    turn, is_new = store.begin(call_sid, words, delivery)  # new
    if is_new:  # new
        threading.Thread(target=write, args=[call_sid, turn]).start()  # new
    return turn

def reply(turn, heard):
    for _ in range(60):  # 6 seconds: Twilio waits for 15
        reply, stop = store.turn_so_far(turn)
        if stop or len(reply) > heard:
            break
        time.sleep(0.1)
    store.say_from(turn, heard)  # new
    return reply[heard:], stop

def forget(call_sid):
    store.forget(call_sid)

def write(call_sid, turn):
    stop = "failed"
    try:
        for sentence in ask(call_sid):
            if not store.grow(turn, sentence + " "):  # new
                return  # the caller has gone on, or hung up: nobody waits for this reply  # new
        stop = "end_turn"
    except Exception as error:  # any error: a caller is waiting, so the reply has to end
        logging.error("%r", error)
    store.grow(turn, "", stop)

def ask(call_sid):
    text = ""
    with claude.messages.stream(
        model="claude-haiku-5-5",
        max_tokens=2000, output_config={"effort": "low"}, system=PROMPT,
        messages=messages(call_sid),
    ) as stream:
        for piece in stream.text_stream:
            *sentences, text = re.split(r"(?<=[.!?])\s+", text + piece)
            yield from sentences
    if text:
        yield text

def messages(call_sid):
    said = []
    for words, reply in store.turns(call_sid):
        said.append({"role": "user", "content": words})
        if reply:
            said.append({"role": "assistant", "content": reply.strip()})
    return said

import logging
import threading
import time

import anthropic

import store  # new

claude = anthropic.Anthropic(timeout=60, max_retries=0)
PROMPT = "You're on the phone, and read aloud: a sentence or two, no lists, no markdown."

def caller_said(call_sid, words):  # new
    turn = store.begin(call_sid, words)  # new
    threading.Thread(target=write, args=[call_sid, turn]).start()
    return turn  # new

def reply(turn):  # new
    for _ in range(60):  # 6 seconds: Twilio waits for 15
        reply, stop = store.turn_so_far(turn)  # new
        if stop:
            break  # new
        time.sleep(0.1)
    return reply, stop  # new

def forget(call_sid):  # new
    store.forget(call_sid)  # new

def write(call_sid, turn):
    stop = "failed"
    try:
        store.grow(turn, ask(call_sid))  # new
        stop = "end_turn"
    except Exception as error:  # any error: a caller is waiting, so the reply has to end
        logging.error("%r", error)
    store.grow(turn, "", stop)  # new

def ask(call_sid):
    message = claude.messages.create(
        model="claude-haiku-5-5",
        max_tokens=2000, output_config={"effort": "low"}, system=PROMPT,
        messages=messages(call_sid),
    )
    return " ".join(block.text for block in message.content if block.type == "text")

def messages(call_sid):
    said = []
    for words, reply in store.turns(call_sid):  # new
        said.append({"role": "user", "content": words})
        if reply:
            said.append({"role": "assistant", "content": reply.strip()})
    return said

import logging
import threading
from dataclasses import dataclass  # new

import anthropic

import store  # new

claude = anthropic.Anthropic(timeout=60, max_retries=0)
SYSTEM_PROMPT = "You're on the phone. Say a sentence or two, no lists, no markdown."

@dataclass  # new
class Conversation:  # new
    call_sid: str  # new

    def caller_said(self, words):  # new
        turn = store.turn(self.call_sid, words)  # new
        threading.Thread(target=Writer(self.call_sid, turn).write).start()  # new
        return turn  # new

    def reply(self, turn):  # new
        return store.wait(turn)  # new

@dataclass  # new
class Writer:  # new
    call_sid: str  # new
    turn: int  # new

    def write(self):  # new
        stop = "trouble"
        try:
            self.answer()  # new
            stop = "end_turn"
        except Exception as error:  # any error: a caller is waiting, so the reply must end
            logging.error("%r", error)
        store.grow(self.turn, "", stop)  # new

    def answer(self):  # new
        message = claude.messages.create(
            model="claude-haiku-5-5",
            max_tokens=2000, output_config={"effort": "low"}, system=SYSTEM_PROMPT,
            messages=as_messages(store.turns(self.call_sid)),  # new
        )
        for block in message.content:  # new
            if block.type == "text":  # new
                store.grow(self.turn, block.text)  # new

def as_messages(turns):
    messages = []
    for words, reply in turns:
        messages.append({"role": "user", "content": words})
        if reply:
            messages.append({"role": "assistant", "content": reply.strip()})
    return messages

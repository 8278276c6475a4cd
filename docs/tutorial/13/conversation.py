import logging
import re  # new
import threading
from dataclasses import dataclass

import anthropic

import store

claude = anthropic.Anthropic(timeout=60, max_retries=0)
SYSTEM_PROMPT = "You're on the phone. Say a sentence or two, no lists, no markdown."

@dataclass
class Conversation:
    call_sid: str

    def caller_said(self, words):
        turn = store.turn(self.call_sid, words)
        threading.Thread(target=Writer(self.call_sid, turn).write).start()
        return turn

    def reply(self, turn, heard):  # new
        text, stop = store.wait(turn, heard)  # new
        return text[heard:], stop  # new

@dataclass
class Writer:
    call_sid: str
    turn: int
    unfinished: str = ""  # the beginning of a sentence  # new

    def write(self):
        stop = "trouble"
        try:
            self.answer()
            stop = "end_turn"
        except Exception as error:  # any error: a caller is waiting, so the reply must end
            logging.error("%r", error)
            self.unfinished = ""  # new
        store.grow(self.turn, self.unfinished, stop)  # new

    def answer(self):
        with claude.messages.stream(  # new
            model="claude-haiku-5-5",
            max_tokens=2000, output_config={"effort": "low"}, system=SYSTEM_PROMPT,
            messages=as_messages(store.turns(self.call_sid)),
        ) as stream:  # new
            for text in stream.text_stream:  # new
                self.add(text)  # new

    def add(self, text):  # new
        *sentences, self.unfinished = re.split(r"(?<=[.!?])\s+", self.unfinished + text)  # new
        for sentence in sentences:  # new
            self.keep(sentence)  # new

    def keep(self, text):  # new
        if text:  # new
            store.grow(self.turn, text + " ")  # new

def as_messages(turns):
    messages = []
    for words, reply in turns:
        messages.append({"role": "user", "content": words})
        if reply:
            messages.append({"role": "assistant", "content": reply.strip()})
    return messages

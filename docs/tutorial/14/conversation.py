import logging
import re
import threading
from dataclasses import dataclass

import anthropic

import store

claude = anthropic.Anthropic(timeout=60, max_retries=0)
SYSTEM_PROMPT = "You're on the phone. Say a sentence or two, no lists, no markdown."

@dataclass
class Conversation:
    call_sid: str

    def caller_said(self, words, delivery):  # new
        turn, row_id = store.turn(self.call_sid, delivery, words)  # new
        if row_id:  # new
            threading.Thread(target=Writer(self.call_sid, turn, row_id).write).start()  # new
        return turn

    def reply(self, turn, heard):
        text, stop = store.wait(self.call_sid, turn, heard)  # new
        return text[heard:], stop

class CallerGone(Exception):  # new
    """The caller has gone on or hung up: nobody waits for this reply."""  # new

@dataclass
class Writer:
    call_sid: str
    turn: int
    row_id: int  # new
    unfinished: str = ""  # the beginning of a sentence

    def write(self):
        stop = "trouble"
        try:
            self.answer()
            stop = "end_turn"
        except CallerGone:  # new
            return  # new
        except Exception as error:  # any error: a caller is waiting, so the reply must end
            logging.error("%r", error)
            self.unfinished = ""
        store.grow(self.row_id, self.unfinished, stop)  # new

    def answer(self):
        with claude.messages.stream(
            model="claude-haiku-5-5",
            max_tokens=2000, output_config={"effort": "low"}, system=SYSTEM_PROMPT,
            messages=as_messages(store.turns(self.call_sid)),
        ) as stream:
            for text in stream.text_stream:
                self.add(text)

    def add(self, text):
        *sentences, self.unfinished = re.split(r"(?<=[.!?])\s+", self.unfinished + text)
        for sentence in sentences:
            self.keep(sentence)

    def keep(self, text):
        if text and not store.grow(self.row_id, text + " "):  # new
            raise CallerGone  # new

def as_messages(turns):
    messages = []
    for words, reply in turns:
        messages.append({"role": "user", "content": words})
        if reply:
            messages.append({"role": "assistant", "content": reply.strip()})
    return messages

"""LANGUAGES, VOICES: the languages that calls are held in, and a voice of Twilio's for each.

A call begins in the first language. Claude can switch with a tool, also in the middle of a reply:
then ``writer.mark`` puts a character before the next sentence, U+E000 for the first language and so
on. The language of a call travels in the URLs that Twilio is given
(https://flask.palletsprojects.com/en/stable/patterns/urlprocessors/).

The app's own phrases are translated by Claude, once for each language. Until that is done they are
said in English, and no caller waits for it.
"""

import contextlib
import json
import logging
import os
import re
import threading
import time
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

import anthropic
from flask import g, request
from twilio.twiml.voice_response import Say

from app import BEFORE_LISTENING, PIECE, Phrase, read_settings, setting, twilio
from conversation import MAX_TOKENS, TOOLS, describe, running, speakable

log = logging.getLogger("voice-claude")

TRY_AGAIN = 300.0  # seconds until a translation that failed is asked for again
TAG = "[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})+"  # without a region Twilio hears nobody (error 13331)


@dataclass(frozen=True)
class Settings:
    languages: str = setting("", rf"{TAG}(\s*,\s*{TAG})*",
                             "a language and its region, like en-GB, or several: en-GB,de-DE")
    voices: str = setting("", r"[\w.-]+(\s*,\s*[\w.-]+)*",
                          "a voice of Twilio's for each language in LANGUAGES")


def activate(line) -> str:
    settings = read_settings(Settings, os.environ)
    languages = [language.strip() for language in settings.languages.split(",")]
    names = [voice.strip() for voice in settings.voices.split(",")] if settings.voices else []
    if names and len(names) != len(languages):
        raise ValueError("VOICES takes a voice of Twilio's for each language in LANGUAGES")
    voices = dict(zip(languages, names))
    translations = Translations(line)

    @twilio.url_value_preprocessor
    def find_language(endpoint, values) -> None:
        """The URL says it; in Twilio's fallback, the URL that failed."""
        g.language = languages[0]
        with contextlib.suppress(ValueError):  # nobody has checked the signature yet
            asked = urlsplit(request.values.get("ErrorUrl") or request.full_path)
            language = parse_qs(asked.query).get("language", [""])[0]
            g.language = language if language in languages else languages[0]

    @twilio.url_defaults
    def carry_language(endpoint, values) -> None:
        if g.get("language", languages[0]) != languages[0]:
            values.setdefault("language", g.language)

    def listen_in_it(gather) -> None:
        if g.language:
            gather.attrs["language"] = g.language

    def speak(*texts) -> list[Say]:
        """<Say>s in the language of the call, which a mark in a text changes from there on."""
        says = []
        for text in texts:
            for part in re.split("([\ue000-\uf8ff])", text):
                if len(part) == 1 and "\ue000" <= part <= "\uf8ff":
                    g.language = languages[(ord(part) - 0xE000) % len(languages)]
                    continue
                language, words = g.language, part
                if isinstance(text, Phrase) and language and not language.startswith("en"):
                    translated = translations.of(language)
                    words = translated.get(text, text)
                    language = language if translated else "en-US"
                says += [Say(piece, voice=voices.get(language), language=language or None)
                         for piece in PIECE.findall(words.strip())]
        return says

    @anthropic.beta_tool
    def switch_language(language: str) -> str:
        """Speak and listen in another language, from the words after this on. Use it when the
        caller asks for one, or speaks one.

        Args:
            language: its tag, like de-DE.
        """
        if language not in languages:
            raise ValueError(f"this line speaks only {', '.join(languages)}")
        running.writer.mark = chr(0xE000 + languages.index(language))
        return f"Go on in {language}."

    BEFORE_LISTENING.append(listen_in_it)
    line.speak = speak
    if len(languages) > 1:
        TOOLS.append(switch_language)
    return f"languages ({settings.languages or 'as in Twilio'})"


class Translations:
    """The app's own phrases in other languages, in memory and in a table of their own."""

    def __init__(self, line):
        self.line = line
        self.known: dict[str, dict[str, str]] = {}
        self.try_again: dict[str, float] = {}

    def of(self, language: str) -> dict[str, str]:
        """The phrases in a language, as {English: words}. Empty until Claude has translated them:
        the first request that needs them has that done in a thread."""
        words, now = self.known.get(language, {}), time.monotonic()
        # While it isn't known who calls, Claude must not be made to work.
        if not words and self.line.claude and not g.get("stranger") and (
                now >= self.try_again.get(language, 0.0)):
            self.try_again[language] = now + TRY_AGAIN
            threading.Thread(target=self.translate, args=[language], daemon=True).start()
        return words

    def translate(self, language: str) -> None:
        """Have Claude translate the phrases, unless they are stored already."""
        try:
            words = self.stored(language)
            if not words.keys() >= set(Phrase.all):
                words = self.ask_for(language)
                with self.line.store.transaction() as database:
                    database.execute("DELETE FROM phrases WHERE language = ?", [language])
                    for phrase in words:
                        database.execute("INSERT INTO phrases VALUES (?, ?, ?)",
                                         [language, phrase, words[phrase]])
            self.known[language] = words
        except Exception as error:  # whatever it is, the line goes on in English
            log.warning("no translation into %s: %s", language, describe(error))

    def stored(self, language: str) -> dict[str, str]:
        with self.line.store.transaction() as database:
            database.execute("CREATE TABLE IF NOT EXISTS phrases (language TEXT NOT NULL,"
                             " phrase TEXT NOT NULL, words TEXT NOT NULL,"
                             " PRIMARY KEY (language, phrase))")
            rows = database.execute("SELECT phrase, words FROM phrases WHERE language = ?",
                                    [language]).fetchall()
            return {row["phrase"]: row["words"] for row in rows}

    def ask_for(self, language: str) -> dict[str, str]:
        """Raises: ValueError if Claude didn't translate every phrase."""
        answer = self.line.claude.messages.create(
            model=self.line.settings.claude_model, max_tokens=2 * MAX_TOKENS,
            system="Translate what is said on the telephone, politely and naturally, into the "
            f"language with the tag {language}. You are sent a JSON object. Answer with the "
            "same object and nothing else: leave its keys, and translate its values.",
            messages=[{"role": "user", "content": json.dumps(dict(zip(Phrase.all, Phrase.all)))}])
        text = "".join(block.text for block in answer.content if block.type == "text")
        found = json.loads(text[text.find("{"):text.rfind("}") + 1])
        words = {str(phrase): speakable(found[phrase]) for phrase in Phrase.all}
        if not all(words.values()):
            raise ValueError("a phrase is missing")
        return words

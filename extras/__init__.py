"""Optional features, one file each. The core knows none of them.

Setting a variable of ``EXTRAS`` switches a feature on; "", "no" and "0" leave it off. ``app.py``
calls ``activate`` when it starts, which imports the active extras and calls ``activate(line)`` in
each. To remove a feature, delete its file and its line in ``EXTRAS``. To add one, write a file
with a function ``activate``, and list it. It may return a note for the startup line.

These are the seams, which is to say the places where an extra can join the core. Use Flask's own
means where there are any.

In app.py:
    twilio                  the Blueprint with Twilio's routes. Add routes and hooks to it.
                            ``before_request`` hooks run after the signature check, in the order of
                            EXTRAS; one that returns an answer ends the request (pin). With
                            ``url_defaults`` and ``url_value_preprocessor`` a call carries a value
                            through its URLs (languages); the latter runs before the signature
                            check, so it must never raise. Endpoints are "twilio.talking" etc.
    ENDINGS                 {how a reply ended: a function that answers Twilio}, given the text to
                            say, whether Claude said anything at all, and the number of the turn
                            (hand_over)
    Phrase                  a str that the app says in its own name, and that languages translates
    BEFORE_LISTENING        functions that may change a <Gather> before it is sent (think_ahead)
    NOT_THE_CALLER          endpoints of requests that don't come from the caller's phone. They skip
                            ALLOWED_CALLERS and the PIN (hand_over)
    setting, read_settings  an extra declares its settings in a dataclass of its own
    STORES                  {scheme of DATABASE_URL: a class like Store} (postgres)
    AT_START                functions to run once in each process that answers calls. Start a thread
                            there: one that is started at import is lost in a fork (after_call)
    say_and_come_back, goodbye, say_and_listen  answers to Twilio (pin, errand)
    app.cli                 commands for the terminal (commands, errand)
    g.spoke_at              when the caller began to speak, if an extra knows better (think_ahead)
    g.stranger              set until the caller has keyed in the PIN: spend no money (pin)
In conversation.py:
    TOOLS                   a list of tools. An entry may be a function that returns a tool for this
                            call, or None. It may look at ``flask.request`` (web_search). A running
                            tool finds its Writer in ``running.writer``
    Ending                  what a tool returns to end the reply (hand_over)
    Writer                  writes a reply; subclass it for another kind of reply (think_ahead).
                            ``writer.mark`` is one character from U+E000 to U+F8FF, put before the
                            next sentence. ``line.speak`` sees it; Claude never does (languages)
    line.speak              makes <Say>s of texts (languages)
    line.history            chooses, and may change, the turns that Claude is sent (memory)
    line.pause_after        says whether and when a failed request is made again (web_search)
    line.settings, .claude, .store, .extras  what all calls share; the store is set last
    line.locked             set it if strangers can't talk with Claude (pin)
In store.py:
    Store.extra_tables      tables whose rows belong to a call, and are deleted with its words
    store.sql, .transaction for SQL of your own. It is a part of the core's transaction if there is
                            one. For Postgres, too: ``?`` for values only, no ``%``, and columns
                            of a row by their names
    store.wal_holds_words   set it when you delete words, and ``sweep`` empties the log they are in
"""

import importlib
import logging
import os
import re

# The extras in the order in which their hooks run, and the settings that switch them on.
EXTRAS = {
    "postgres": ["DATABASE_URL"],
    "pin": ["PIN"],
    "memory": ["KEEP_DAYS"],
    "after_call": ["AFTER_CALL_URL"],
    "languages": ["LANGUAGES", "VOICES"],
    "hand_over": ["HAND_OVER_TO"],
    "web_search": ["WEB_SEARCHES"],
    "think_ahead": ["THINK_AHEAD"],
    "commands": [],
    "errand": [],
}
# Names of earlier versions. An operating system sets LANGUAGE, too, but never to a tag like en-GB.
OLD_NAMES = {"LANGUAGE": "LANGUAGES", "VOICE": "VOICES"}
ONLY_AN_OWNER = r"[a-z]{2,3}-[A-Z]{2}\b.*|(Polly|Google)\..*|man|woman"


def activate(line) -> None:
    """Activate the extras that the settings ask for.

    Raises: ValueError if one of them is missing, or a setting can't be used.
    """
    for name, settings in EXTRAS.items():
        asked_for = [setting for setting in settings if is_on(setting)]
        if settings and not asked_for:
            continue
        try:
            extra = importlib.import_module(f"extras.{name}")
        except ModuleNotFoundError as error:
            missing = str(error.name).replace(".", "/")
            if not missing.startswith("extras/"):
                raise
            if asked_for:
                raise ValueError(f"{asked_for[0]} needs {missing}.py, which is missing") from None
            continue  # without commands.py, there is no errand.py either
        note = extra.activate(line)
        if settings:
            line.extras.append(note or name)
    for old, new in OLD_NAMES.items():
        if re.fullmatch(ONLY_AN_OWNER, os.environ.get(old, "")):
            logging.getLogger("voice-claude").warning("%s is now called %s", old, new)


def is_on(setting: str) -> bool:
    """Whether the owner has set an environment variable that switches an extra on."""
    from app import OFF  # app.py imports this module, so it can't be imported at the top

    value = os.environ.get(setting, "").strip()
    return value not in OFF and not (setting == "DATABASE_URL" and value.startswith("sqlite:"))

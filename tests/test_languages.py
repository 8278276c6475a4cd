"""A call in more than one language: what Claude and the line say, and what is listened for."""

import collections
import contextlib
import itertools
import json
import sqlite3

import pytest

from tests.claude import Reply, Tool, translated
from tests.conftest import read, wait_until

SORRY = "Sorry, something went wrong at my end. Could you say that again?"
STILL_THERE = "Are you still there?"
ENGLISH, GERMAN = ("Polly.Joanna", "en-US"), ("Polly.Vicki", "de-DE")


def switches(to, before="Of course.", after="Ab jetzt auf Deutsch."):
    return Reply(before, blocks=[Tool("switch_language", {"language": to})], then=Reply(after))


def speaks_german(phone, claude):
    """Switch the call to German, and wait until the line has its own words in German."""
    claude.when("Sprechen Sie Deutsch?", switches("de-DE"))
    phone.say("Sprechen Sie Deutsch?")
    wait_until(lambda: is_translated(phone))
    phone.say("Ja, hallo.")


def is_translated(phone):
    """Have Twilio ask as for a silent caller: does the line have its own words in German?"""
    return phone.webhook("/talking?language=de-DE") != STILL_THERE


def test_a_call_begins_in_the_first_language(able_phone):
    able_phone.call()
    assert able_phone.voices == [("Hello, this is Claude speaking!", *ENGLISH)]
    assert able_phone.gather["language"] == "en-US"
    assert able_phone.stay_silent() == STILL_THERE
    assert able_phone.voices[-1] == (STILL_THERE, *ENGLISH)


@pytest.mark.parametrize("pace", [None, 60])
def test_claude_switches_in_the_middle_of_a_reply(two_processes, claude, pace):
    phone = two_processes
    greeting = "Guten Tag. Wie geht es Ihnen? Mir geht es gut."
    reply = switches("de-DE", "I speak German, too.", greeting)
    reply.pace = reply.then.pace = pace
    claude.when("Deutsch, bitte.", reply)
    phone.call()
    heard = phone.say("Deutsch, bitte.")
    assert heard == f"I speak German, too. {greeting}"
    english, *german = phone.voices[1:]
    assert english == ("I speak German, too.", *ENGLISH)
    assert german and {tuple(voice) for _, *voice in german} == {GERMAN}
    assert phone.gather["language"] == "de-DE"
    for _ in range(2):  # one turn for each process
        phone.say("Und noch etwas.")
        assert phone.voices[-1] == ("You said: Und noch etwas.", *GERMAN)
        assert phone.gather["language"] == "de-DE"
    request = claude.asked("Und noch etwas.")[-1]
    replies = [words for role, words in request.messages if role == "assistant"]
    assert replies[0].startswith("I speak German, too.")
    assert all(words.isprintable() for words in replies)


def test_claude_switches_without_a_word_before_and_back_again(two_processes, claude):
    phone = two_processes
    claude.when("Nur Deutsch.", switches("de-DE", "", "Gern."))
    claude.when("Only English.", switches("en-US", "Gut.", "Here I am."))
    phone.call()
    assert phone.say("Nur Deutsch.") == "Gern."
    assert phone.voices[-1] == ("Gern.", *GERMAN)
    assert phone.say("Only English.") == "Gut. Here I am."
    assert phone.voices[-2:] == [("Gut.", *GERMAN), ("Here I am.", *ENGLISH)]
    sent = claude.asked("Only English.")[0].messages
    assert sent[1] == ("assistant", "Gern."), "without any mark of the switch"
    assert phone.gather["language"] == "en-US"
    assert phone.stay_silent() == STILL_THERE
    assert phone.voices[-1] == (STILL_THERE, *ENGLISH)


def test_two_switches_in_one_reply(able_phone, claude):
    claude.when("Say it in both.", Reply(
        "This is English.",
        blocks=[Tool("switch_language", {"language": "de-DE"})],
        then=switches("en-US", "Das ist Deutsch.", "And this is English again."),
    ))
    able_phone.call()
    for _ in range(2):  # the second delivery finds the whole reply at once
        before = len(able_phone.voices)
        able_phone.say("Say it in both.", token="the same")
        assert able_phone.voices[before:] == [
            ("This is English.", *ENGLISH), ("Das ist Deutsch.", *GERMAN),
            ("And this is English again.", *ENGLISH),
        ]
    assert len(claude.asked("Say it in both.")) == 3


def test_a_switch_is_for_one_call_only(able, able_phone, stage, claude):
    other = stage.phone(able)
    other.call()
    able_phone.call()
    speaks_german(able_phone, claude)
    other.say("Hello to you.")
    assert other.voices[-1] == ("You said: Hello to you.", *ENGLISH)


@pytest.mark.parametrize("language", ["fr-FR", "German", "", "de-DE\x0f<x>"])
def test_a_language_that_is_not_listed_is_an_error_that_names_those_that_are(
    able_phone, claude, language
):
    claude.when("Another one, please.", switches(language, "I try.", "I can't speak that."))
    able_phone.call()
    assert able_phone.say("Another one, please.") == "I try. I can't speak that."
    ((words, failed),) = claude.asked("Another one, please.")[-1].results
    assert failed and "en-US" in words and "de-DE" in words
    assert able_phone.gather["language"] == "en-US"


def test_the_lines_own_words_are_spoken_in_the_calls_language(able, two_processes, claude):
    phone = two_processes
    phone.call()
    speaks_german(phone, claude)
    assert phone.stay_silent() == f"de-DE: {STILL_THERE}"
    assert phone.voices[-1] == (f"de-DE: {STILL_THERE}", *GERMAN)
    phone.stay_silent()
    claude.when("Das geht schief.", Reply(status=400))
    phone.say("Das geht schief.")
    assert phone.voices[-1] == (f"de-DE: {SORRY}", *GERMAN)
    claude.when("Tschau.", Reply("", hang_up=True))
    assert phone.say("Tschau.") == "de-DE: Goodbye!"
    assert phone.voices[-1][1:] == GERMAN and phone.ended == "hangup"


def test_they_are_asked_for_once_and_all_together_and_are_kept(
    able, other_process, able_phone, claude
):
    able_phone.call()
    speaks_german(able_phone, claude)
    able_phone.url = other_process.url
    wait_until(lambda: is_translated(able_phone))
    (request,) = [one for one in claude.translations if one.language == "de-DE"]
    assert {STILL_THERE, SORRY, "Goodbye!", "One moment."} <= set(request.phrases)
    with contextlib.closing(sqlite3.connect(able.database)) as database:
        kept = database.execute("SELECT language, phrase, words FROM phrases").fetchall()
    assert set(kept) == {
        ("de-DE", phrase, words) for phrase, words in translated(request.phrases, "de-DE").items()
    }


def test_the_fallback_after_an_error_is_in_the_calls_language(able_phone, claude):
    able_phone.call()
    speaks_german(able_phone, claude)
    asked = next(url for url, *_ in reversed(able_phone.webhooks) if "language=de-DE" in url)
    able_phone.webhook("/talking", {"ErrorCode": "11200", "ErrorUrl": asked})
    assert able_phone.voices[-1] == (f"de-DE: {SORRY}", *GERMAN)
    assert able_phone.gather["language"] == "de-DE"


def test_a_language_in_the_url_that_is_not_the_lines_is_ignored(able_phone):
    able_phone.call()
    able_phone.webhook("/talking?language=xx-XX")
    assert able_phone.voices[-1] == (STILL_THERE, *ENGLISH)
    assert able_phone.gather["language"] == "en-US"


def test_a_speech_model_has_a_second_of_silence(able_phone, phone):
    able_phone.call()
    assert able_phone.gather["speechModel"] == "experimental_conversations"
    assert able_phone.gather["speechTimeout"] == "1"
    phone.call()
    assert "speechModel" not in phone.gather and phone.gather["speechTimeout"] == "auto"


# What the pretend translator makes of the line's own words, for each language but the first.
BROKEN = {
    "fr-FR": lambda phrases: dict(itertools.islice(translated(phrases, "fr-FR").items(), 3)),
    "it-IT": lambda phrases: Reply("Certo! Ecco le traduzioni."),
    "es-ES": lambda phrases: {**translated(phrases, "es-ES"), SORRY: "", STILL_THERE: "\U0001f600"},
    "pt-BR": lambda phrases: {**translated(phrases, "pt-BR"), SORRY: 7},
    "nl-NL": lambda phrases: Reply(json.dumps(list(phrases))),
    "sv-SE": lambda phrases: Reply(status=400),
    "da-DK": lambda phrases: Reply(json.dumps(translated(phrases, "da-DK"))[:-40]),
}


def test_until_they_are_translated_well_they_are_english_said_as_english(unlucky):
    def translator(phrases, language):
        if language in BROKEN:
            return BROKEN[language](phrases)
        fenced = json.dumps(translated(phrases, language))  # as Claude likes to write JSON
        return Reply(f"Here they are:\n```json\n{fenced}\n```")

    claude, app = unlucky.claude, unlucky.app
    calls_before_the_translation_is_there(unlucky)
    unlucky.translator = translator
    phone = unlucky.phone()
    phone.call()
    wait_until(lambda: is_translated(phone))
    phone.say("Ja, hallo.")
    assert phone.stay_silent() == f"de-DE: {STILL_THERE}"
    assert phone.voices[-1][1:] == (None, "de-DE")
    broken_translations_are_not_said(unlucky)
    asked = collections.Counter(request.language for request in claude.translations)
    assert asked == dict.fromkeys(["de-DE", *BROKEN], 1), "not for each silence again"
    with contextlib.closing(sqlite3.connect(app.database)) as database:
        assert database.execute("SELECT DISTINCT language FROM phrases").fetchall() == [("de-DE",)]


def calls_before_the_translation_is_there(stage):
    """Two calls at once, in the first language; nobody waits, and there is one request."""
    for _ in range(2):
        phone = stage.phone()
        phone.call()
        assert phone.voices == [("Guten Tag!", None, "de-DE")]
        assert phone.stay_silent() == STILL_THERE
        assert phone.voices[-1] == (STILL_THERE, None, "en-US")
        assert phone.gather["language"] == "de-DE", "the caller is listened to in German"
    wait_until(lambda: stage.claude.translations)


def broken_translations_are_not_said(stage):
    phones = {}
    for language in BROKEN:
        phones[language] = phone = stage.phone()
        stage.claude.when(f"In {language}.", switches(language, "", "So sei es."))
        phone.call()
        phone.say(f"In {language}.")
        assert phone.voices[-1] == ("So sei es.", None, language)
        phone.stay_silent()
        assert phone.voices[-1] == (STILL_THERE, None, "en-US")
    for language, phone in phones.items():
        wait_until(lambda language=language: f"no translation into {language}" in stage.app.log())
        phone.say("Hallo.")
        phone.stay_silent()
        assert phone.voices[-1] == (STILL_THERE, None, "en-US")


@pytest.mark.parametrize("settings, named", [
    ({"LANGUAGES": "en-US,,de-DE"}, "LANGUAGES"),
    ({"LANGUAGES": "en-US de-DE"}, "LANGUAGES"),
    ({"LANGUAGES": "en"}, "LANGUAGES"),
    ({"LANGUAGES": "en-GB,de"}, "LANGUAGES"),
    ({"SPEECH_MODEL": "the best one"}, "SPEECH_MODEL"),
    ({"HAND_OVER_TO": "my office"}, "HAND_OVER_TO"),
    ({"HAND_OVER_TO": "+15557770000,+15557770001"}, "HAND_OVER_TO"),
    ({"WEB_SEARCHES": "many"}, "WEB_SEARCHES"),
    ({"WEB_SEARCHES": "-1"}, "WEB_SEARCHES"),
])
def test_what_cannot_be_used_is_named(settings, named):
    with pytest.raises(ValueError, match=f"^{named} takes ") as refused:
        read(settings)
    assert "\n" not in str(refused.value)


def test_several_languages_may_stand_there_with_spaces_and_without_voices():
    read({"LANGUAGES": "en-US , de-DE"})
    read({"LANGUAGES": "en-US, de-DE", "VOICES": "Polly.Joanna, Polly.Vicki"})
    read({"WEB_SEARCHES": "0", "HAND_OVER_TO": "+1 (555) 777-0000"})

"""With LANGUAGES a call can be held in several languages: what is said, in which voice, and what is listened for."""

import itertools
import json
import threading

import pytest

from tests.claude import Claude, Reply, Tool, translated
from tests.stage import (
    HELLO,
    SORRY,
    Stage,
    let_time_pass,
    open_database,
    read_all_settings,
    start_fails,
    tools_of,
    wait_until,
)

STILL_THERE = "Are you still there?"
ENGLISH, GERMAN = ("Polly.Joanna", "en-US"), ("Polly.Vicki", "de-DE")
SETTINGS = {
    "LANGUAGES": "en-US , de-DE", "VOICES": "Polly.Joanna, Polly.Vicki", "SPEECH_MODEL": "experimental_conversations"
}


@pytest.fixture(scope="module")
def app(stage):
    with stage.other_app(**SETTINGS) as app:
        yield app
        assert "Traceback" not in app.log()


@pytest.fixture(scope="module")
def other_process(app, stage):
    """Another process, with the same database."""
    with stage.other_app(**SETTINGS, DATABASE_URL=f"sqlite:///{app.database}") as other:
        yield other
        assert "Traceback" not in other.log()


@pytest.fixture
def phone(strict_phone):
    return strict_phone


def switches(to, before="Of course.", after="Ab jetzt auf Deutsch."):
    return Reply(before, blocks=[Tool("switch_language", {"language": to})], then=Reply(after))


def is_translated(phone):
    """Have Twilio ask as for a silent caller: does the line have its own words in German?"""
    return phone.webhook("/talking?language=de-DE") != STILL_THERE


def speaks_german(phone, claude):
    """Switch the call to German, and wait until the line has its own words in German."""
    claude.when("Sprechen Sie Deutsch?", switches("de-DE"))
    phone.say("Sprechen Sie Deutsch?")
    wait_until(lambda: is_translated(phone))
    phone.say("Ja, hallo.")


# --- What Claude says -----------------------------------------------------------------------------


def test_a_call_begins_in_the_first_language(phone):
    phone.call()
    assert phone.voices == [(HELLO, *ENGLISH)]
    assert phone.gather["language"] == "en-US"
    assert phone.stay_silent() == STILL_THERE
    assert phone.voices[-1] == (STILL_THERE, *ENGLISH)


@pytest.mark.parametrize("pace", [None, 60])
def test_claude_switches_in_the_middle_of_a_reply(app, two_processes, claude, pace):
    phone, words = two_processes, f"Deutsch, bitte, im Tempo {pace}."
    greeting = "Guten Tag. Wie geht es Ihnen? Mir geht es gut."
    reply = switches("de-DE", "I speak German, too.", greeting)
    reply.pace = reply.then.pace = pace
    claude.when(words, reply)
    phone.call()
    assert phone.say(words) == f"I speak German, too. {greeting}"
    english, *german = phone.voices[1:]
    assert english == ("I speak German, too.", *ENGLISH)
    assert german and {tuple(voice) for _, *voice in german} == {GERMAN}
    assert phone.gather["language"] == "de-DE"
    let_time_pass(app, 60, phone.call_sid)  # so that the caller has heard all of that
    for _ in range(2):  # one turn for each process
        phone.say("Und noch etwas.")
        assert phone.voices[-1] == ("You said: Und noch etwas.", *GERMAN)
        assert phone.gather["language"] == "de-DE"
    request = claude.asked("Und noch etwas.")[-1]
    assert request.messages[1] == ("assistant", f"I speak German, too. {greeting}"), "without the mark of a switch"


def test_claude_switches_without_a_word_before_and_back_again(two_processes, claude):
    phone = two_processes
    claude.when("Nur Deutsch.", switches("de-DE", "", "Gern."))
    claude.when("Only English.", switches("en-US", "Gut.", "Here I am."))
    phone.call()
    assert phone.say("Nur Deutsch.") == "Gern."
    assert phone.voices[-1] == ("Gern.", *GERMAN)
    assert phone.say("Only English.") == "Gut. Here I am."
    assert phone.voices[-2:] == [("Gut.", *GERMAN), ("Here I am.", *ENGLISH)]
    assert claude.asked("Only English.")[0].messages[1] == ("assistant", "Gern."), "without the mark of a switch"
    assert phone.gather["language"] == "en-US"
    assert phone.stay_silent() == STILL_THERE
    assert phone.voices[-1] == (STILL_THERE, *ENGLISH)


def test_two_switches_in_one_reply(phone, claude):
    claude.when("Say it in both.", Reply(
        "This is English.",
        blocks=[Tool("switch_language", {"language": "de-DE"})],
        then=switches("en-US", "Das ist Deutsch.", "And this is English again."),
    ))
    phone.call()
    for _ in range(2):  # the second delivery finds the whole reply at once
        before = len(phone.voices)
        phone.say("Say it in both.", token="the same")
        assert phone.voices[before:] == [
            ("This is English.", *ENGLISH), ("Das ist Deutsch.", *GERMAN), ("And this is English again.", *ENGLISH),
        ]
    assert len(claude.asked("Say it in both.")) == 3


def test_a_switch_is_for_one_call_only(app, phone, stage, claude):
    other = stage.phone(app)
    other.call()
    phone.call()
    speaks_german(phone, claude)
    other.say("Hello to you.")
    assert other.voices[-1] == ("You said: Hello to you.", *ENGLISH)
    other.hang_up()


@pytest.mark.parametrize("language", ["fr-FR", "German", "", "de-DE\x0f<x>"])
def test_an_unlisted_language_is_an_error_that_names_the_listed_ones(phone, claude, language):
    words = f"Another one, please: {language.encode()}."
    claude.when(words, switches(language, "I try.", "I can't speak that."))
    phone.call()
    assert phone.say(words) == "I try. I can't speak that."
    ((result, failed),) = claude.asked(words)[-1].results
    assert failed and "en-US" in result and "de-DE" in result
    assert phone.gather["language"] == "en-US"


def test_claude_is_offered_to_switch(phone, claude):
    phone.call()
    phone.say("Which languages do you speak?")
    tools = tools_of(claude.asked("Which languages do you speak?")[-1])
    assert set(tools) >= {"switch_language", "clock", "hang_up"}
    assert tools["switch_language"]["description"].strip()


def test_a_language_in_the_url_that_is_not_the_lines_is_ignored(phone):
    phone.call()
    phone.webhook("/talking?language=xx-XX")
    assert phone.voices[-1] == (STILL_THERE, *ENGLISH)
    assert phone.gather["language"] == "en-US"


# --- The line's own words -------------------------------------------------------------------------


def test_the_lines_own_words_are_spoken_in_the_calls_language(two_processes, claude):
    phone = two_processes
    phone.call()
    speaks_german(phone, claude)
    wait_until(lambda: is_translated(phone) and is_translated(phone))  # in both processes
    phone.say("Wie bitte?")
    assert phone.stay_silent() == f"de-DE: {STILL_THERE}"
    assert phone.voices[-1] == (f"de-DE: {STILL_THERE}", *GERMAN)
    claude.when("Das geht schief.", Reply(status=400))
    phone.say("Das geht schief.")
    assert phone.voices[-1] == (f"de-DE: {SORRY}", *GERMAN)
    claude.when("Tschau.", Reply("", hang_up=True))
    assert phone.say("Tschau.") == "de-DE: Goodbye!"
    assert phone.voices[-1][1:] == GERMAN and phone.ended == "hangup"


def test_the_fallback_after_an_error_is_in_the_calls_language(phone, claude):
    phone.call()
    speaks_german(phone, claude)
    asked = next(url for url, *_ in reversed(phone.webhooks) if "language=de-DE" in url)
    phone.webhook("/talking", {"ErrorCode": "11200", "ErrorUrl": asked})
    assert phone.voices[-1] == (f"de-DE: {SORRY}", *GERMAN)
    assert phone.gather["language"] == "de-DE"


def test_claude_translates_all_phrases_at_once_and_they_are_stored():
    with Claude() as claude:
        stage = Stage(claude)
        with stage.other_app(**SETTINGS) as app:
            with stage.other_app(**SETTINGS, DATABASE_URL=f"sqlite:///{app.database}") as other:
                for each in app, other:
                    phone = stage.phone(each)
                    phone.call()
                    wait_until(lambda phone=phone: is_translated(phone))
            with open_database(app.database) as database:
                stored = database.execute("SELECT language, phrase, words FROM phrases").fetchall()
        (request,) = claude.translations
        assert request.language == "de-DE"
        assert {STILL_THERE, SORRY, "Goodbye!", "One moment."} <= set(request.phrases)
        words = translated(request.phrases, "de-DE")
        assert set(stored) == {("de-DE", phrase, words[phrase]) for phrase in words}


def test_before_the_translation_is_there_nobody_waits_for_it():
    begun, may_go_on = threading.Event(), threading.Event()

    def translate(phrases, language):
        begun.set()
        assert may_go_on.wait(60)
        written = json.dumps(translated(phrases, language))  # as Claude likes to write JSON
        return Reply(f"Here they are:\n```json\n{written}\n```")

    with Claude() as claude:
        claude.translate = translate
        stage = Stage(claude)
        with stage.other_app(LANGUAGES="de-DE,en-US", GREETING="Guten Tag!") as app:
            for _ in range(2):
                phone = stage.phone(app)
                phone.call()
                assert phone.voices == [("Guten Tag!", None, "de-DE")]
                assert phone.stay_silent() == STILL_THERE
                assert phone.voices[-1] == (STILL_THERE, None, "en-US"), "English words are said as English"
                assert phone.gather["language"] == "de-DE", "the caller is listened to in German"
            assert begun.wait(60)
            may_go_on.set()
            wait_until(lambda: is_translated(phone))
            phone.say("Ja, hallo.")
            assert phone.stay_silent() == f"de-DE: {STILL_THERE}"
            assert phone.voices[-1][1:] == (None, "de-DE")
            assert phone.warnings == []
        assert len(claude.translations) == 1, "one request for both calls"


# What the pretend translator makes of the line's own words.
BROKEN = {
    "fr-FR": lambda phrases: dict(itertools.islice(translated(phrases, "fr-FR").items(), 3)),
    "it-IT": lambda phrases: Reply("Certo! Ecco le traduzioni."),
    "es-ES": lambda phrases: {**translated(phrases, "es-ES"), SORRY: "", STILL_THERE: "\U0001f600"},
    "pt-BR": lambda phrases: {**translated(phrases, "pt-BR"), SORRY: 7},
    "nl-NL": lambda phrases: Reply(json.dumps(list(phrases))),
    "sv-SE": lambda phrases: Reply(status=400),
    "da-DK": lambda phrases: Reply(json.dumps(translated(phrases, "da-DK"))[:-40]),
}


@pytest.fixture(scope="module")
def badly_translated():
    """A stage and an app with many languages. Claude translates into none of them well."""
    with Claude() as claude:
        claude.translate = lambda phrases, language: BROKEN[language](phrases)
        stage = Stage(claude)
        with stage.other_app(LANGUAGES=",".join(["en-US", *BROKEN])) as app:
            yield stage, app
            with open_database(app.database) as database:
                assert database.execute("SELECT * FROM phrases").fetchall() == []
            assert "Traceback" not in app.log()


@pytest.mark.parametrize("language", BROKEN)
def test_a_broken_translation_is_not_said_and_not_asked_for_again_soon(badly_translated, language):
    stage, app = badly_translated
    stage.claude.when(f"In {language}.", switches(language, "", "So sei es."))
    phone = stage.phone(app)
    phone.call()
    phone.say(f"In {language}.")
    assert phone.voices[-1] == ("So sei es.", None, language)
    phone.stay_silent()
    assert phone.voices[-1] == (STILL_THERE, None, "en-US")
    wait_until(lambda: f"no translation into {language}" in app.log())
    for _ in range(2):
        phone.say("Hallo.")
        phone.stay_silent()
        assert phone.voices[-1] == (STILL_THERE, None, "en-US")
    assert [request.language for request in stage.claude.translations].count(language) == 1
    assert phone.warnings == []


# --- Settings -------------------------------------------------------------------------------------


def test_with_one_language_there_is_a_voice_and_no_switch(stage, claude):
    with stage.other_app(LANGUAGES="en-GB", VOICES="Polly.Amy-Neural") as app:
        assert "extras: languages (en-GB)" in app.log()
        phone = stage.phone(app)
        phone.call()
        phone.say("Which voice is this?")
        assert b'voice="Polly.Amy-Neural"' in phone.documents[-1]
        assert phone.documents[-1].count(b'language="en-GB"') == 2, "of <Gather> and of <Say>"
        assert "switch_language" not in tools_of(claude.asked("Which voice is this?")[-1])
        assert phone.warnings == []


def test_a_voice_alone_leaves_the_language_to_twilio(stage):
    with stage.other_app(VOICES="Polly.Amy") as app:
        assert "extras: languages (as in Twilio)" in app.log()
        phone = stage.phone(app)
        phone.call()
        assert phone.voices == [(HELLO, "Polly.Amy", None)] and "language" not in phone.gather
        assert phone.say("Which language?") == "You said: Which language?"
        assert phone.stay_silent() == STILL_THERE and phone.warnings == []


def test_a_language_and_a_speech_model_go_together(phone):
    phone.call()
    assert phone.gather["speechModel"] == "experimental_conversations"
    assert phone.gather["speechTimeout"] == "1" and phone.gather["language"] == "en-US"


@pytest.mark.parametrize("settings, named", [
    ({"LANGUAGES": "en-US,,de-DE"}, "LANGUAGES"),
    ({"LANGUAGES": "en-US de-DE"}, "LANGUAGES"),
    ({"LANGUAGES": "en"}, "LANGUAGES"),
    ({"LANGUAGES": "en-GB,de"}, "LANGUAGES"),
    ({"LANGUAGES": "english please"}, "LANGUAGES"),
    ({"VOICES": "<b>"}, "VOICES"),
])
def test_a_value_that_cannot_be_used_is_named_with_what_it_takes(settings, named):
    with pytest.raises(ValueError, match=f"^{named} takes a (language|voice)") as refused:
        read_all_settings(settings)
    assert "\n" not in str(refused.value)


def test_each_language_needs_its_voice(stage):
    app = stage.other_app(LANGUAGES="en-US,de-DE", VOICES="Polly.Joanna")
    assert start_fails(app) == "VOICES takes a voice of Twilio's for each language in LANGUAGES."


def test_the_start_says_that_settings_have_new_names(stage):
    with stage.other_app(LANGUAGE="en-GB", VOICE="Polly.Amy") as app:
        assert "WARNING LANGUAGE is now called LANGUAGES" in app.log()
        assert "WARNING VOICE is now called VOICES" in app.log()


@pytest.mark.parametrize("language", ["en_GB:en", pytest.param("de", marks=pytest.mark.slow)])
def test_a_language_that_the_desktop_has_set_is_no_setting_of_the_lines(stage, language):
    with stage.other_app(LANGUAGE=language) as app:
        assert "LANGUAGES" not in app.log()


@pytest.mark.needs("pin")
def test_no_translation_is_asked_for_before_the_pin():
    """A stranger must not make Claude work."""
    with Claude() as claude:
        stage = Stage(claude)
        with stage.other_app(LANGUAGES="de-DE", PIN="135790") as app:
            phone = stage.phone(app)
            phone.call()
            phone.press("000000#")
            assert phone.voices[-1] == ("Please key in your PIN, and then the pound key.", None, "en-US")
            assert claude.translations == []
            phone.press("135790#")
            phone.stay_silent()
            wait_until(lambda: claude.translations)
            assert phone.warnings == []

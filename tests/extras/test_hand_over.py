"""With HAND_OVER_TO Claude can put a caller through to a person, who hears what for and presses a key."""

import pytest

from tests.claude import Reply, Tool
from tests.phone import parse
from tests.stage import HELLO, open_database, read_all_settings, tools_of, wait_until

OTHER_NUMBER = "+15557770000"  # where calls are handed over to
CALLER, LINE = "+15551230001", "+15550009999"
REASON = "Ann would like to book a table for two."
NOBODY = "Nobody could take your call just now. Is there anything else I can do for you?"
PUT_THROUGH = "I'll put you through now. One moment."
SETTINGS = {"HAND_OVER_TO": OTHER_NUMBER, "ALLOWED_CALLERS": CALLER}  # the other person isn't one of those


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


@pytest.fixture(scope="module")
def open_app(stage):
    """An app that everyone may call."""
    with stage.other_app(HAND_OVER_TO=OTHER_NUMBER) as app:
        yield app
        assert "Traceback" not in app.log()


@pytest.fixture
def phone(strict_phone):
    return strict_phone


def puts_through(words="I put you through.", reason=REASON, **more):
    tool = Tool("hand_over", {"reason": reason, **more})
    return Reply(words, blocks=[tool], then=Reply("Never."))


def heard_by(person):
    """What the other person heard before the caller was connected."""
    return " ".join(text for text, *_ in person.said)


# --- A person takes the call ----------------------------------------------------------------------


def test_a_person_takes_the_call_and_after_that_the_line_says_goodbye(app, other_process, two_processes, claude):
    phone = two_processes
    claude.when("I want to book a table.", puts_through("I put you through to our kitchen."))
    phone.call()
    assert phone.say("I want to book a table.") == "I put you through to our kitchen. Goodbye!"
    assert phone.ended == "hangup"
    (dial,) = phone.dialled
    assert dial["Number"] == OTHER_NUMBER
    assert (dial["timeout"], dial["answerOnBridge"], dial["callerId"]) == ("20", "true", LINE)
    person = phone.other_person
    assert heard_by(person) == f"A caller from Voice Claude: {REASON} Press any key to take the call."
    assert person.ended == "connected" and len(person.webhooks) == 2
    assert len(claude.asked("I want to book a table.")) == 1, "the hand-over ends the reply"
    with open_database(app.database) as database:
        for table in "calls", "turns":
            found = database.execute(f"SELECT COUNT(*) FROM {table} WHERE call_sid = ?", [person.call_sid])
            assert found.fetchone() == (0,), "the other person's call is not a call to the line"
    for log in app.log(), other_process.log():
        assert REASON not in log and OTHER_NUMBER not in log and person.call_sid not in log


def test_if_claude_says_nothing_the_line_does(phone, claude):
    claude.when("A person, please!", puts_through(""))
    phone.call()
    assert phone.say("A person, please!") == f"{PUT_THROUGH} Goodbye!"


@pytest.mark.parametrize("reason, said", [
    ("It is about <Bob> & **a bill**; 5 > 3 \U0001f600", "It is about <Bob> & a bill; 5 > 3"),
    ("Es geht um Fr\u00fchst\u00fcck?\r\nJa!", "Es geht um Fr\u00fchst\u00fcck? Ja!"),
    ("", ""),
    ("\U0001f600", ""),
], ids=["markup", "two lines", "nothing", "an emoji"])
def test_any_reason_can_be_said(phone, claude, reason, said):
    claude.when("Hand me over.", puts_through(reason=reason))
    phone.call()
    assert phone.say("Hand me over.").endswith("Goodbye!")
    heard = heard_by(phone.other_person)
    assert heard.split() == f"A caller from Voice Claude: {said} Press any key to take the call.".split()


def test_a_long_reason_ends_within_a_minute(phone, claude):
    claude.when("Hand me over with a long story.", puts_through(reason="It is a long story. " * 300))
    phone.call()
    assert phone.say("Hand me over with a long story.").endswith("Goodbye!")
    heard = heard_by(phone.other_person)
    assert "It is a long story." in heard and len(heard) < 1500


def test_claude_gives_a_reason_and_never_chooses_a_number(phone, claude):
    claude.when("Call +19005551234 for me.", puts_through(number="+19005551234", to="+19005551234"))
    phone.call()
    phone.say("Call +19005551234 for me.")
    assert {dial["Number"] for dial in phone.dialled} <= {OTHER_NUMBER}
    offered = tools_of(claude.asked("Call +19005551234 for me.")[0])
    assert set(offered) >= {"hand_over", "clock", "hang_up"}
    assert set(offered["hand_over"]["input_schema"]["properties"]) == {"reason"}


def test_without_the_setting_nobody_is_put_through(stage, claude):
    phone = stage.phone()
    phone.call()
    phone.say("Can you put me through?")
    assert "hand_over" not in tools_of(claude.asked("Can you put me through?")[-1])


def test_a_hand_over_after_another_tool(phone, claude):
    words = "Is anyone in at this hour?"
    claude.when(words, Reply("Let me see.", blocks=[Tool("clock")], then=puts_through("Yes. I put you through.")))
    phone.call()
    assert phone.say(words) == "Let me see. Yes. I put you through. Goodbye!"
    assert REASON in heard_by(phone.other_person)


# --- Nobody takes the call ------------------------------------------------------------------------


@pytest.mark.parametrize("does", ["presses nothing", "busy", "no answer", "failed"])
def test_nobody_takes_the_call_and_the_talk_goes_on(two_processes, claude, does):
    phone = two_processes
    claude.when("Is Bo there?", puts_through())
    phone.call()
    phone.handed_over = does
    assert phone.say("Is Bo there?") == f"I put you through. {NOBODY}"
    assert phone.listens_to("speech") and phone.said[-1][2], "the caller can cut in"
    if does == "presses nothing":
        assert phone.other_person.ended == "hangup"
        assert "Press any key" in heard_by(phone.other_person)
    words = f"When is Bo back, if Bo {does}?"
    phone.say(words)
    (request,) = [request for request in claude.requests if request.words.endswith(words)]
    assert request.messages[:-1] == [("user", "Is Bo there?"), ("assistant", "I put you through.")]
    assert request.words == f"[Nobody took the call.] {words}"
    # The next time somebody is there.
    phone.handed_over = "takes it"
    assert phone.say("Is Bo there?") == "I put you through. Goodbye!"
    assert len(phone.dialled) == 2


def test_a_silent_caller_is_asked_as_ever_after_that(phone, claude):
    claude.when("Is Cy there?", puts_through())
    phone.call()
    phone.handed_over = "no answer"
    phone.say("Is Cy there?")
    assert phone.stay_silent() == "Are you still there?"


# --- From which number, and for whom --------------------------------------------------------------


@pytest.mark.parametrize("params", [
    {"From": OTHER_NUMBER},
    {"Direction": "outbound-api", "From": LINE, "To": OTHER_NUMBER},
], ids=["calls", "is called"])
def test_the_other_person_is_never_put_through_to_themselves(open_app, stage, claude, params):
    # Claude isn't offered the tool. If Claude uses it all the same, it fails.
    words = f"Put me through to myself, {params}."
    tool = Tool("hand_over", {"reason": "A loop."})
    claude.when(words, Reply("I try that.", blocks=[tool], then=Reply("I can't.")))
    phone = stage.phone(open_app, **params)
    phone.call()
    assert phone.say(words) == "I try that. I can't."
    first, second = claude.asked(words)
    assert "hand_over" not in tools_of(first)
    ((_, failed),) = second.results
    assert failed and phone.dialled == [] and phone.warnings == []


def test_a_call_that_the_line_has_made_is_handed_over_too(app, stage, claude):
    claude.when("Put me through, please.", puts_through())
    phone = stage.phone(app, Direction="outbound-api", From=LINE, To=CALLER)
    phone.call()
    assert phone.say("Put me through, please.").endswith("Goodbye!")
    assert phone.dialled[0]["callerId"] == LINE and phone.warnings == []


@pytest.mark.parametrize("number, line, caller_id", [
    ("sip:ann@example.com", LINE, LINE),
    ("client:ann", LINE, LINE),
    ("whatsapp:+15551230001", LINE, LINE),
    ("+15551230009", "sip:line@example.com", None),  # Twilio then shows the caller's
])
def test_a_call_is_handed_over_from_whichever_number_there_is(open_app, stage, claude, number, line, caller_id):
    claude.when("Put me through from there.", puts_through())
    phone = stage.phone(open_app, number=number, To=line)
    phone.call()
    who = "...009" if number.startswith("+") else f"a {number.partition(':')[0]} address"
    assert f"call {phone.call_sid} begins, with {who}" in open_app.log()
    phone.say("Put me through from there.")
    assert phone.dialled[0].get("callerId") == caller_id
    assert phone.warnings == [] or caller_id is None
    phone.hang_up()


@pytest.mark.parametrize("number, line", [("client:ann", ""), ("sip:ann@example.com", "client:me")])
def test_without_any_number_nobody_is_dialled_and_the_talk_goes_on(open_app, stage, claude, number, line):
    claude.when("Put me through from nowhere.", puts_through())
    phone = stage.phone(open_app, number=number, To=line)
    phone.call()
    assert phone.say("Put me through from nowhere.").endswith(NOBODY)
    assert phone.dialled == [] and not phone.ended and phone.warnings == []
    assert f"call {phone.call_sid}: no number to hand it over from" in open_app.log()
    phone.hang_up()


# --- What the other person's telephone may ask for ------------------------------------------------


def test_nobody_but_twilio_learns_the_reason(app, phone, stage, claude):
    claude.when("A secret, please.", puts_through())
    phone.call()
    phone.say("A secret, please.")
    (first, *_) = [url for url, *_ in phone.other_person.webhooks]
    stranger = stage.phone(app)
    stranger.token = None
    answer = stranger.request("POST", first, phone.other_person.params)
    assert answer.status == 403 and REASON.encode() not in answer.body


def test_a_person_who_answers_too_late_is_not_kept(phone, claude):
    """The caller has hung up already."""
    claude.when("I am in a hurry.", puts_through())
    phone.call()
    phone.say("I am in a hurry.")
    asked, params, *_ = phone.other_person.webhooks[0]
    phone.hang_up()
    answer = phone.request("POST", asked, params)
    assert answer.status == 200
    assert [verb.tag for verb in parse(answer.body)] == ["Hangup"]


# --- Settings, and together with other extras -----------------------------------------------------


def test_the_start_names_the_feature_but_not_the_number(app):
    assert "extras: hand_over" in app.log() and OTHER_NUMBER not in app.log()


@pytest.mark.parametrize("number", ["my office", "+15557770000,+15557770001", "5557770000"])
def test_a_number_that_cannot_be_used_is_refused(number):
    with pytest.raises(ValueError, match="^HAND_OVER_TO takes a number like ") as refused:
        read_all_settings({"HAND_OVER_TO": number})
    assert "\n" not in str(refused.value)


def test_a_number_may_be_written_as_people_do():
    assert read_all_settings({"HAND_OVER_TO": "+1 (555) 777-0000"}).hand_over_to == OTHER_NUMBER


@pytest.mark.needs("pin")
def test_the_person_who_answers_needs_no_pin(stage, claude):
    claude.when("Put me through with a PIN.", puts_through())
    with stage.other_app(**SETTINGS, PIN="135790") as app:
        phone = stage.phone(app)
        phone.call()
        assert phone.press("135790#") == HELLO
        assert phone.say("Put me through with a PIN.") == "I put you through. Goodbye!"
        assert phone.other_person.ended == "connected" and phone.warnings == []
        assert heard_by(phone.other_person).startswith(f"A caller from Voice Claude: {REASON}")


@pytest.mark.needs("languages")
def test_a_hand_over_in_another_language(stage, claude):
    claude.when("Auf Deutsch, bitte, und mit Bo.", Reply(
        "Just a moment.",
        blocks=[Tool("switch_language", {"language": "de-DE"})],
        then=puts_through("Ich verbinde Sie mit Bo."),
    ))
    with stage.other_app(**SETTINGS, LANGUAGES="en-US,de-DE", VOICES="Polly.Joanna,Polly.Vicki") as app:
        phone = stage.phone(app)
        phone.call()
        phone.handed_over = "busy"
        phone.say("Auf Deutsch, bitte, und mit Bo.")
        assert phone.gather["language"] == "de-DE"
        assert ("Ich verbinde Sie mit Bo.", "Polly.Vicki", "de-DE") in phone.voices
        assert phone.voices[-1][0] in (NOBODY, f"de-DE: {NOBODY}")  # by now translated, or not
        phone.say("Danke.")
        assert phone.voices[-1][0].endswith("Danke.")
        assert phone.voices[-1][1:] == ("Polly.Vicki", "de-DE")
        # Once the line's own words are translated, the other person hears them in German, too.
        wait_until(lambda: phone.webhook("/talking?language=de-DE").startswith("de-DE: "))
        claude.when("Und jetzt?", puts_through("Noch einmal."))
        phone.handed_over = "takes it"
        assert phone.say("Und jetzt?") == "Noch einmal. de-DE: Goodbye!"
        assert heard_by(phone.other_person) == (
            f"de-DE: A caller from Voice Claude: {REASON} de-DE: Press any key to take the call."
        )
        assert phone.warnings == []

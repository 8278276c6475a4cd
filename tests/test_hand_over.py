"""Handing a call over: who answers is told what for, and takes the call by pressing a key."""

import contextlib
import sqlite3

import pytest

from tests.claude import Reply, Tool
from tests.conftest import OTHER_NUMBER
from tests.phone import parse

LINE = "+15550009999"  # the line's own number
REASON = "Ann would like to book a table for two."
NOBODY = "Nobody could take your call just now. Is there anything else I can do for you?"
PUT_THROUGH = "I'll put you through now. One moment."


def puts_through(words="I put you through to our kitchen.", reason=REASON, **more):
    tool = Tool("hand_over", {"reason": reason, **more})
    return Reply(words, blocks=[tool], then=Reply("Never."))


def heard_by(person):
    """What the other person heard before the caller was connected."""
    return " ".join(text for text, *_ in person.said)


def test_a_person_takes_the_call_and_after_that_it_is_goodbye(able, two_processes, claude):
    phone = two_processes
    claude.when("I want to book a table.", puts_through())
    phone.call()
    heard = phone.say("I want to book a table.")
    assert heard == "I put you through to our kitchen. Goodbye!"
    assert phone.ended == "hangup"
    (dial,) = phone.dialled
    assert dial["Number"] == OTHER_NUMBER
    assert (dial["timeout"], dial["answerOnBridge"], dial["callerId"]) == ("20", "true", LINE)
    person = phone.other_person
    assert heard_by(person) == (
        f"A caller from Voice Claude: {REASON} Press any key to take the call."
    )
    assert person.ended == "connected" and len(person.webhooks) == 2
    assert len(claude.asked("I want to book a table.")) == 1, "the hand-over ends the reply"
    with contextlib.closing(sqlite3.connect(able.database)) as database:
        for table in ("calls", "turns"):
            found = database.execute(
                f"SELECT COUNT(*) FROM {table} WHERE call_sid = ?", [person.call_sid]
            )
            assert found.fetchone() == (0,), "the second leg is no call of its own"
    log = able.log()
    assert REASON not in log and OTHER_NUMBER not in log and person.call_sid not in log


@pytest.mark.parametrize("does", ["presses nothing", "busy", "no answer", "failed"])
def test_nobody_takes_the_call_and_the_talk_goes_on(two_processes, claude, does):
    phone = two_processes
    claude.when("Is Bo there?", puts_through("I put you through to Bo."))
    phone.call()
    phone.handed_over = does
    assert phone.say("Is Bo there?") == f"I put you through to Bo. {NOBODY}"
    assert phone.listens_to("speech") and phone.said[-1][2], "the caller can cut in"
    if does == "presses nothing":
        assert phone.other_person.ended == "hangup"
        assert "Press any key" in heard_by(phone.other_person)
    phone.say(f"When is Bo back, if Bo {does}?")
    request = claude.requests[-1]
    assert request.messages[:-1] == [
        ("user", "Is Bo there?"), ("assistant", "I put you through to Bo.")
    ]
    note, _, words = request.words.partition("] ")
    assert note.startswith("[") and "nobody" in note.lower() and "took" in note
    assert words == f"When is Bo back, if Bo {does}?"
    # The next time somebody is there.
    phone.handed_over = "takes it"
    assert phone.say("Is Bo there?") == "I put you through to Bo. Goodbye!"
    assert len(phone.dialled) == 2


def test_a_caller_who_stays_silent_after_that_is_asked_as_ever(able_phone, claude):
    claude.when("Is Cy there?", puts_through())
    able_phone.call()
    able_phone.handed_over = "no answer"
    able_phone.say("Is Cy there?")
    assert able_phone.stay_silent() == "Are you still there?"


def test_without_words_of_claudes_the_line_has_its_own(able_phone, claude):
    claude.when("A person, please!", puts_through(""))
    able_phone.call()
    assert able_phone.say("A person, please!") == f"{PUT_THROUGH} Goodbye!"


@pytest.mark.parametrize("reason, said", [
    ("It is about <Bob> & **a bill**; 5 > 3 \U0001f600", "It is about <Bob> & a bill; 5 > 3"),
    ("Es geht um Fr\u00fchst\u00fcck?\r\nJa!", "Es geht um Fr\u00fchst\u00fcck? Ja!"),
    ("", ""), ("\U0001f600", ""), ("It is a long story. " * 300, None),
])
def test_any_reason_can_be_said(able_phone, claude, reason, said):
    claude.when("Hand me over.", puts_through(reason=reason))
    able_phone.call()
    assert able_phone.say("Hand me over.").endswith("Goodbye!")
    heard = heard_by(able_phone.other_person)
    if said is None:
        assert "It is a long story." in heard and len(heard) < 1500, "it ends within a minute or so"
    else:
        assert heard.split() == (
            f"A caller from Voice Claude: {said} Press any key to take the call.".split()
        )


def test_claude_gives_a_reason_and_never_chooses_a_number(able_phone, claude):
    claude.when("Call +19005551234 for me.", puts_through(number="+19005551234", to="+19005551234"))
    able_phone.call()
    able_phone.say("Call +19005551234 for me.")
    assert {dial["Number"] for dial in able_phone.dialled} <= {OTHER_NUMBER}
    (tool,) = [
        tool for tool in claude.asked("Call +19005551234 for me.")[0].body["tools"]
        if tool["name"] == "hand_over"
    ]
    assert set(tool["input_schema"]["properties"]) == {"reason"}


def test_a_hand_over_after_another_tool(able_phone, claude):
    claude.when("Is anyone in at this hour?", Reply(
        "Let me see.", blocks=[Tool("clock")], then=puts_through("Yes. I put you through.")
    ))
    able_phone.call()
    heard = able_phone.say("Is anyone in at this hour?")
    assert heard == "Let me see. Yes. I put you through. Goodbye!"
    assert REASON in heard_by(able_phone.other_person)


@pytest.mark.parametrize("params", [
    {"From": OTHER_NUMBER},
    {"Direction": "outbound-api", "From": LINE, "To": OTHER_NUMBER},
])
def test_a_call_of_that_person_is_never_handed_over(unlucky, params):
    # Claude isn't offered the tool; and if it uses the tool all the same, it hears of an error.
    unlucky.claude.when("Put me through.", Reply(
        "I try that.", blocks=[Tool("hand_over", {"reason": "A loop."})], then=Reply("I can't.")
    ))
    phone = unlucky.phone(**params)
    phone.call()
    assert phone.say("Put me through.") == "I try that. I can't."
    first, second = unlucky.claude.asked("Put me through.")[-2:]
    assert "hand_over" not in {tool["name"] for tool in first.body["tools"]}
    assert second.results[0][1] and phone.dialled == []


def test_a_call_that_the_line_has_made_is_handed_over_too(able, stage, claude):
    claude.when("Put me through, please.", puts_through())
    phone = stage.phone(able, Direction="outbound-api", From=LINE, To="+15551230001")
    phone.call()
    assert phone.say("Put me through, please.").endswith("Goodbye!")
    assert phone.dialled[0]["callerId"] == LINE and phone.warnings == []


@pytest.mark.parametrize("number, line, caller_id", [
    ("sip:ann@example.com", LINE, LINE), ("client:ann", LINE, LINE), ("whatsapp:+15551230001", LINE, LINE),
    ("+15551230009", "sip:line@example.com", None), ("client:ann", "", "nobody"), ("sip:ann@example.com", "client:me", "nobody")])
def test_a_caller_without_a_number_is_handed_over_from_ours(stage, claude, number, line, caller_id):
    claude.when("Put me through from there.", puts_through())
    with stage.other_app(HAND_OVER_TO=OTHER_NUMBER) as app:
        phone = stage.phone(app, number=number, To=line)
        phone.call()
        kind = number.partition(":")[0]
        assert f"begins, with {'...009' if number.startswith('+') else f'a {kind} address'}" in app.log()
        heard = phone.say("Put me through from there.")
        assert phone.warnings == [] or caller_id is None
        if caller_id == "nobody":
            assert heard.endswith(NOBODY) and phone.dialled == [] and not phone.ended
            assert "no number to hand it over from" in app.log()
        else:
            assert phone.dialled[0].get("callerId") == caller_id
        phone.hang_up()


def test_nobody_but_twilio_is_told_the_reason(able, able_phone, stage, claude):
    claude.when("A secret, please.", puts_through())
    able_phone.call()
    able_phone.say("A secret, please.")
    (first, *_) = [url for url, *_ in able_phone.other_person.webhooks]
    stranger = stage.phone(able)
    stranger.token = None
    answer = stranger.request("POST", first, able_phone.other_person.params)
    assert answer.status == 403 and REASON.encode() not in answer.body


def test_who_answers_after_the_caller_has_hung_up_is_not_kept(able, able_phone, claude):
    claude.when("I am in a hurry.", puts_through())
    able_phone.call()
    able_phone.say("I am in a hurry.")
    asked, params, *_ = able_phone.other_person.webhooks[0]
    able_phone.hang_up()
    answer = able_phone.request("POST", asked, params)
    assert answer.status == 200
    assert [verb.tag for verb in parse(answer.body)] == ["Hangup"]


def test_a_hand_over_in_another_language(able_phone, claude):
    claude.when("Auf Deutsch, bitte, und mit Bo.", Reply(
        "Just a moment.",
        blocks=[Tool("switch_language", {"language": "de-DE"})],
        then=puts_through("Ich verbinde Sie mit Bo."),
    ))
    able_phone.call()
    able_phone.handed_over = "busy"
    able_phone.say("Auf Deutsch, bitte, und mit Bo.")
    assert able_phone.gather["language"] == "de-DE"
    assert ("Ich verbinde Sie mit Bo.", "Polly.Vicki", "de-DE") in able_phone.voices
    assert able_phone.voices[-1][0] in (NOBODY, f"de-DE: {NOBODY}")  # by now translated, or not
    able_phone.say("Danke.")
    assert able_phone.voices[-1][0].endswith("Danke.")
    assert able_phone.voices[-1][1:] == ("Polly.Vicki", "de-DE")

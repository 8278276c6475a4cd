"""The owner at a terminal: ``flask connect`` and ``flask ring`` talk with Twilio, ``flask calls`` shows what was said.

The commands are the real ones, and so are the apps that they ask. Only the Twilio account is pretend (tests/account.py).
"""

import json
import re

import pytest

from tests.account import (
    A_FRIEND,
    ADDRESS,
    ALSO_MINE,
    ANOTHER_TOKEN,
    MINE,
    NUMBER,
    OTHER,
    PASSWORD,
    TOKEN,
    Owner,
    passed_on_to,
)
from tests.claude import Reply
from tests.phone import Phone
from tests.stage import FASTER, PROXY, flask_calls, let_time_pass, wait_until

CONNECT, RING = ("connect", ADDRESS), ("ring", A_FRIEND, ADDRESS)

both = pytest.mark.parametrize("command", [CONNECT, RING], ids=["connect", "ring"])
# Where both commands do the same, and a test types several of them.
both_slowly = pytest.mark.parametrize(
    "command", [CONNECT, pytest.param(RING, marks=pytest.mark.slow)], ids=["connect", "ring"])


# --- flask connect and flask ring -----------------------------------------------------------------


def test_connect_points_the_number_at_the_line_and_says_where_it_pointed_before(owner, lines):
    old = f"https://me:{PASSWORD}@old.example.com/@home"
    owner.buy(MINE, voice_url=old, voice_method="GET", status_callback=None)

    said = owner.types(*CONNECT)

    assert "+15550009999 is now connected" in said
    assert re.findall(r"(?m)^    (\S+): (\S+) \(before: (.+)\)$", said) == [
        ("voice_url", NUMBER["voice_url"], "https://old.example.com/@home"),
        ("voice_method", "POST", "GET"),
        ("voice_fallback_url", NUMBER["voice_fallback_url"], "nothing"),
        ("status_callback", NUMBER["status_callback"], "nothing"),
    ]
    assert owner.done == [("IncomingPhoneNumbers/PN0.json", NUMBER)]

    phone = Phone(lines[0].url, TOKEN, public_url=ADDRESS, headers=PROXY)
    phone.call()
    phone.say("Who is there?")
    phone.hang_up()
    assert [(url, status) for url, _, _, status in phone.webhooks] == [
        (f"{ADDRESS}/", 200),
        (f"{ADDRESS}/talking", 200),
        (f"{ADDRESS}/status_callback", 204),
    ]


def test_connecting_twice_changes_nothing_more(owner):
    owner.buy(MINE)
    owner.types(*CONNECT)

    assert "+15550009999 was already connected" in owner.types("connect", ADDRESS + "/")
    assert len(owner.done) == 1


def test_ring_makes_the_line_call_someone(owner):
    owner.buy(MINE)

    said = owner.types(*RING, ALLOWED_CALLERS=f"+15551230001, {A_FRIEND}")

    assert f"+15550009999 is calling +15557654321: CA{'c' * 32}" in said
    urls = {name.removeprefix("voice_"): url for name, url in NUMBER.items()}
    assert owner.done == [("Calls.json", {"from": MINE, "to": A_FRIEND, **urls})]


def test_ring_reads_a_number_as_the_settings_do(owner):
    owner.buy(MINE)
    owner.types("ring", "+1 (555)\u00a0765\u20114321", ADDRESS, ALLOWED_CALLERS=A_FRIEND)
    assert owner.done[0][1]["to"] == A_FRIEND


def test_ring_calls_nobody_who_is_not_in_allowed_callers(owner):
    owner.buy(MINE)

    said = owner.fails(*RING, ALLOWED_CALLERS="+15551230001")

    assert f"{A_FRIEND} is not in ALLOWED_CALLERS" in said
    assert owner.asked == []


@both
def test_one_of_several_numbers_is_chosen(owner, command):
    assert owner.fails(*command) == "Choose with --number one of: none"
    owner.buy(MINE)
    said = owner.fails(*command, "--number", ALSO_MINE)
    assert said == f"Choose with --number one of: {MINE}"
    owner.buy(ALSO_MINE)
    assert owner.fails(*command) == f"Choose with --number one of: {MINE}, {ALSO_MINE}"
    assert ALSO_MINE in owner.types(*command, "--number", ALSO_MINE)

    [(what, call)] = owner.done
    assert what == "IncomingPhoneNumbers/PN1.json" or call["from"] == ALSO_MINE


@pytest.mark.slow
@pytest.mark.parametrize("what", ["trunk_sid", "voice_application_sid"])
def test_connect_leaves_a_number_alone_that_something_else_answers(owner, what):
    owner.buy(MINE, **{what: "XX" + "1" * 32})

    assert "XX" + "1" * 32 in owner.fails(*CONNECT)
    assert MINE in owner.types(*RING)  # a call out brings its own URLs


# --- What answers at the address ------------------------------------------------------------------


@pytest.mark.slow
@both_slowly
def test_something_else_answers_at_the_address(owner, command):
    owner.buy(MINE)

    owner.hosts["other.example.com"] = owner.hosts["my-line.example.com"]
    nginx, gone, broken = (200, "Welcome to nginx!"), (404, "Not found"), (500, "<Response/>")
    for status, text in nginx, gone, broken, (301, f"{OTHER}/"):
        owner.hosts["my-line.example.com"] = lambda *_, answer=(status, text): answer
        assert f"Not this app: {ADDRESS}/ answers {status}, '{text}'" == owner.fails(*command)
    assert "other.example.com" not in owner.asked  # a redirect is not followed
    del owner.hosts["my-line.example.com"]
    assert "No answer of use: HTTPSConnectionPool(host='my-line" in owner.fails(*command)


@both
def test_an_address_that_twilio_cannot_use_is_refused(owner, command):
    for address in "http://line.example.com", "line.example.com", f"https://me:{PASSWORD}@x.org":
        assert "ADDRESS takes an address like https://" in owner.fails(*command[:-1], address)
    assert owner.asked == []


@both_slowly
def test_the_owner_is_told_what_to_set_if_the_line_refuses_calls(owner, command, lines):
    def says_what_to_set(*command):
        there = "TWILIO_AUTH_TOKEN to the token that is set here, and PUBLIC_URL to " + command[-1]
        reason = owner.fails(*command)
        return reason == f"The app at {command[-1]} refuses calls. Set there {there}"

    owner.buy(MINE)
    owner.hosts["other.example.com"] = owner.hosts["my-line.example.com"]
    assert says_what_to_set(*command[:-1], OTHER)  # its PUBLIC_URL is ADDRESS
    owner.token = ANOTHER_TOKEN
    assert says_what_to_set(*command)
    owner.token, owner.hosts["my-line.example.com"] = TOKEN, passed_on_to(lines[1])
    assert says_what_to_set(*command)  # it has no token


@both
def test_the_line_is_asked_in_the_name_of_an_allowed_caller(owner, command):
    asked = []
    owner.hosts["my-line.example.com"] = lambda *what: asked.append(what) or (200, "<Response/>")
    owner.buy(MINE)

    owner.types(*command, ALLOWED_CALLERS=A_FRIEND)

    [(method, path, _, form)] = asked
    assert (method, path, form["From"], form["CallStatus"]) == ("POST", "/", A_FRIEND, "ringing")


# --- What Twilio answers --------------------------------------------------------------------------


@both_slowly
def test_wrong_credentials(owner, command):
    owner.buy(MINE)

    for name, value in ("AUTH_TOKEN", ANOTHER_TOKEN), ("ACCOUNT_SID", "AC" + "f" * 32):
        for wrong in "", value:
            said = owner.fails(*command, **{f"TWILIO_{name}": wrong})
            assert "Set TWILIO_ACCOUNT_SID and TWILIO_AUTH_TOKEN as https://console." in said
    assert set(owner.asked) == {"api.twilio.com"}


@both_slowly
def test_the_owner_reads_why_twilio_refuses(owner, command):
    owner.buy(MINE)
    owner.allowed = False

    assert re.fullmatch("Twilio says no: .*: The number is unverified", owner.fails(*command))
    for text in "<h1>Please log in to this hotel</h1>", '{"sid": "AC", "status": "active"}':
        owner.hosts["api.twilio.com"] = lambda *_, text=text: (200, text)
        assert owner.fails(*command).startswith("No answer of use: ")
    del owner.hosts["api.twilio.com"]
    assert "No answer of use: HTTPSConnectionPool(host='api.twilio.com" in owner.fails(*command)


@pytest.mark.slow  # 10 s
@pytest.mark.parametrize("host", ["api.twilio.com", "my-line.example.com"])
def test_a_host_that_never_answers_is_given_up(owner, host):
    owner.buy(MINE)
    owner.hosts[host] = lambda *_: owner.over.wait()
    assert re.match(rf"No answer of use: .*\b{host}\b.* timed out", owner.fails(*CONNECT))


# --- The terminal, and the app at the address -----------------------------------------------------


@pytest.fixture(scope="module")
def lines(stage):
    """The app with the account's token, and without one."""
    with stage.other_app(TWILIO_AUTH_TOKEN=TOKEN, PUBLIC_URL=ADDRESS) as line:
        with stage.other_app(TWILIO_AUTH_TOKEN="") as without:
            yield line, without


@pytest.fixture
def owner(tmp_path, lines):
    with Owner(tmp_path, **{"my-line.example.com": passed_on_to(lines[0])}) as owner:
        yield owner


# --- flask calls ----------------------------------------------------------------------------------

AT = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


def listed(app):
    """The calls in the list for programs, by their CallSids."""
    return {call["call_sid"]: call for call in json.loads(flask_calls(app, "--json"))}


def test_the_owner_reads_a_call_that_is_on(stage, phone):
    phone.call()
    phone.say("I am still here.")
    transcript = rf"{AT}  Caller: I am still here\.\n +Claude: You said: I am still here\.\s*"
    assert re.fullmatch(transcript, flask_calls(stage.app, phone.call_sid))
    (turn,) = json.loads(flask_calls(stage.app, phone.call_sid, "--json"))
    assert re.fullmatch(AT, turn["at"])
    assert (turn["caller"], turn["heard"].strip()) == ("I am still here.", "You said: I am still here.")
    (line,) = [line for line in flask_calls(stage.app).splitlines() if phone.call_sid in line]
    assert re.fullmatch(rf"{phone.call_sid}  {AT} +\d+ s +1 turns +withheld  on", line)
    call = listed(stage.app)[phone.call_sid]
    assert (call["turns"], call["on"], call["number"]) == (1, True, "withheld")


def test_the_owner_finds_nothing_of_a_call_that_is_over(stage, phone):
    phone.call()
    phone.say("I am leaving now.")
    phone.hang_up()
    assert phone.call_sid not in flask_calls(stage.app)
    assert flask_calls(stage.app, phone.call_sid).strip() == ""


@pytest.mark.needs("memory")
def test_the_owner_lists_the_calls_whose_words_are_kept(stage):
    with stage.other_app(KEEP_DAYS="7") as app:
        phones = [stage.phone(app, number=number, StirVerstat="TN-Validation-Passed-A")
                  for number in ("+15551237017", "anonymous")]
        for phone in phones:
            phone.call()
            phone.say("Keep this.")
            phone.say("And this.")
            phone.hang_up()
        over, withheld = phones
        (line,) = [line for line in flask_calls(app).splitlines() if over.call_sid in line]
        assert re.fullmatch(rf"{over.call_sid}  {AT} +\d+ s +2 turns +\.\.\.017", line)
        found = listed(app)
        assert "5551237017" not in json.dumps(found)
        assert (found[over.call_sid]["turns"], found[over.call_sid]["on"]) == (2, False)
        assert found[withheld.call_sid]["number"] == "withheld"
        assert "Caller: And this." in flask_calls(app, over.call_sid)


@pytest.mark.slow
def test_the_transcript_shows_where_the_caller_cut_in(stage, claude):
    """One process has given the reply, and another one hears the caller cut in."""
    story = " ".join(f"told{number}" + "." * (number % 10 == 0) for number in range(1, 60))
    claude.when("Tell me what the owner reads.", Reply(story))
    with stage.other_app() as app, stage.other_app(DATABASE_URL=f"sqlite:///{app.database}") as other:
        phone = stage.phone(app)
        phone.call()
        phone.say("Tell me what the owner reads.", token="the same")
        # By now all of it is written, so that this delivery gets it in one part.
        wait_until(lambda: f"call {phone.call_sid} turn 1: first sentence" in app.log())
        assert phone.say("Tell me what the owner reads.", token="the same") == story
        let_time_pass(app, 9, phone.call_sid)
        phone.url = other.url
        phone.say("That will do for now.")
        phone.say("Go on, then, for the owner.")
        first, second, third = json.loads(flask_calls(app, phone.call_sid, "--json"))
        assert (first["heard"] + first["not_heard"]).strip() == story
        assert first["heard"] and first["not_heard"]
        assert claude.asked("That will do for now.")[0].messages[1] == (
            "assistant", first["heard"] + "[The caller cut in here.]")
        assert second["caller"] == "That will do for now."
        assert third["caller"] == "Go on, then, for the owner." and third["not_heard"] == ""
        assert third["heard"].strip() == "You said: Go on, then, for the owner."
        cut = rf"Claude: {re.escape(first['heard'])}\[cut in\] {re.escape(first['not_heard'].strip())}"
        assert re.search(cut, flask_calls(app, phone.call_sid))


@pytest.mark.needs("think_ahead")
def test_the_transcript_shows_which_replies_were_begun_early(stage, claude):
    with stage.other_app(module=FASTER, THINK_AHEAD="yes") as app:
        phone = stage.phone(app)
        phone.call()
        phone.partial_result("is it early", 1)
        wait_until(lambda: "first sentence" in app.log())  # of the guess
        phone.say("Is it early?")
        phone.say("And this?")
        first, second = json.loads(flask_calls(app, phone.call_sid, "--json"))
        assert first["seconds_ahead"] > 0 and second["seconds_ahead"] is None
        printed = flask_calls(app, phone.call_sid)
        assert re.search(r"Claude: You said: is it early *\[begun \d+\.\d s early\]", printed)
        assert printed.count("early]") == 1

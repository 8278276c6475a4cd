"""A call as the caller hears it, from the greeting to the goodbye."""

import pytest

from tests.claude import Reply
from tests.stage import HELLO, SORRY, SPEED, everything_in, in_thread, is_part_of, turn_is_logged, turns_of, wait_until

SENTENCES = "Here is the first sentence of it. Here comes the second one, too. And this is the third and last."
LIGHTHOUSE = (
    "There was once a lighthouse on a small island. Its keeper lit the lamp every evening. "
    "One night the lamp went out. So he sang until all the ships were safe."
)


def test_a_whole_call(stage, claude, logged):
    """This is what the app does, in one call."""
    # The words of a pretend Claude. Everything else it answers with "You said: ..."
    claude.when("My name is Ann, and I collect marbles.", Reply("Nice to meet you, Ann."))
    claude.when("Who am I?", Reply("You are Ann, and you collect marbles.", thinking=True))
    claude.when("Tell me about the lighthouse.", Reply(LIGHTHOUSE, pace=40))
    claude.when("That was all, thank you.", Reply("It was a pleasure. Goodbye, Ann!", hang_up=True))

    # The phone does what Twilio does: it asks the app what to do with a call, and obeys. At first
    # the app greets the caller and listens.
    phone = stage.phone()
    assert phone.call() == "Hello, this is Claude speaking!"
    assert phone.listens_to("speech") and phone.listens_to("dtmf")

    # Twilio turns what the caller says into text, and the app sends that to Claude.
    assert phone.say("My name is Ann, and I collect marbles.") == "Nice to meet you, Ann."

    # Claude remembers nothing by itself, so it is sent all that was said before in this call.
    assert phone.say("Who am I?") == "You are Ann, and you collect marbles."
    (request,) = claude.asked("Who am I?")
    assert request.messages == [
        ("user", "My name is Ann, and I collect marbles."),
        ("assistant", "Nice to meet you, Ann."),
        ("user", "Who am I?"),
    ]

    # Callers may press a key instead of speaking. Claude is told which one.
    assert phone.press("7") == "You said: [The caller pressed 7]"

    # If the caller says nothing, the app asks, and doesn't trouble Claude.
    requests = len(claude.requests)
    assert phone.stay_silent() == "Are you still there?"
    assert len(claude.requests) == requests

    # A long reply comes in parts: the caller hears its beginning while Claude still writes the rest.
    before = len(phone.said)
    assert phone.say("Tell me about the lighthouse.") == LIGHTHOUSE
    first, when, _ = phone.said[before]
    (request,) = claude.asked("Tell me about the lighthouse.")
    assert LIGHTHOUSE.startswith(first) and first != LIGHTHOUSE
    assert when < wait_until(lambda: request.finished)

    # Claude says goodbye and hangs up, with a tool that the app gives it.
    assert phone.say("That was all, thank you.") == "It was a pleasure. Goodbye, Ann!"
    assert phone.ended == "hangup"

    # Until now the words were in the app's database. When Twilio reports the end of the call, the
    # app deletes them. They were never in its log.
    assert b"marbles" in everything_in(stage.app)
    phone.hang_up()
    assert b"marbles" not in everything_in(stage.app)
    assert phone.call_sid in logged() and "marbles" not in logged()
    assert phone.warnings == [], "Twilio had nothing to complain of"


# --- Listening ------------------------------------------------------------------------------------


def test_the_caller_can_cut_in_on_the_greeting(phone):
    assert phone.call() == HELLO
    _, _, can_cut_in = phone.said[-1]
    assert can_cut_in


def test_every_field_of_gather_is_chosen(phone):
    phone.call()
    assert phone.gather == {
        "input": "speech dtmf",
        "action": "/talking#rc=5&rp=5xx,ct,rt&rt=8000",
        "method": "POST",
        "timeout": "5",
        "speechTimeout": "auto",
        "profanityFilter": "false",
        "numDigits": "1",
        "finishOnKey": "",
    }


@pytest.mark.parametrize("key", ["5", "*", "#"])
def test_every_key_reaches_claude(phone, claude, key):
    phone.call()
    phone.press(key)
    assert claude.requests[-1].words == f"[The caller pressed {key}]"


def test_words_and_a_key_reach_claude_together(phone, claude):
    phone.call()
    phone.webhook("/talking", {"SpeechResult": "My choice is", "Digits": "5"})
    assert claude.requests[-1].words == "My choice is [The caller pressed 5]"


# --- A reply in parts -----------------------------------------------------------------------------


def test_a_long_reply_is_heard_once_and_in_order(phone, claude):
    claude.when("Tell me three things.", Reply(SENTENCES, first_token=0.1, pace=40))
    phone.call()
    assert phone.say("Tell me three things.") == SENTENCES
    assert len(phone.documents) > 2, "the first part was there before the last"
    _, _, can_cut_in = phone.said[-1]
    assert can_cut_in, "in the last part"


def test_a_complete_reply_goes_out_in_one_answer(phone, claude):
    claude.when("Be quick.", Reply(SENTENCES))
    phone.call()
    phone.say("Be quick.", token="the same")
    before = len(phone.documents)
    assert phone.say("Be quick.", token="the same") == SENTENCES
    assert len(phone.documents) == before + 1
    _, _, can_cut_in = phone.said[-1]
    assert can_cut_in
    assert len(claude.asked("Be quick.")) == 1


@pytest.mark.slow
def test_what_claude_writes_during_the_first_sentence_comes_in_one_piece(stage, claude, phone):
    words, written = "How is the weather?", f"{SENTENCES} {SENTENCES}"
    claude.when(words, Reply(written, pace=100))
    phone.call()
    # Twilio takes so long to speak the first sentence that Claude is done by then.
    phone.on_hearing = lambda text: turn_is_logged(stage.app, phone)
    assert phone.say(words) == written
    (request,) = claude.asked(words)
    assert phone.said[1][1] < request.finished
    assert len(phone.webhooks) == 3, "the call, the words, and the rest of the reply"


def test_a_very_short_first_sentence_takes_the_next_one_with_it(phone, claude):
    # Claude goes on writing for a minute, so not even a busy machine says all of it at once.
    written = "Sure. I have looked it up this very morning. " + "It is true. " * 500
    claude.when("Are you sure?", Reply(written, pace=30))
    phone.call()
    phone.on_hearing = lambda text: phone.hang_up()
    assert phone.say("Are you sure?") == "Sure. I have looked it up this very morning."


@pytest.mark.slow
def test_a_reply_without_a_full_stop_is_heard_in_parts(phone, claude):
    claude.when("Ramble.", Reply("word and " * 111 + "end", pace=400))
    phone.call()
    assert phone.say("Ramble.") == "word and " * 111 + "end"
    (request,) = claude.asked("Ramble.")
    assert phone.said[1][1] < wait_until(lambda: request.finished), "the beginning was there before the end"
    assert {word for text, *_ in phone.said[1:] for word in text.split()} == {"word", "and", "end"}, "cut between words"


def test_a_caller_who_goes_on_ends_the_reply_before(stage, phone, claude):
    claude.when("Tell me all you know.", Reply("This is one of very many sentences. " * 200, pace=60))
    claude.when("No, something else.", Reply("Gladly, what is it?"))
    phone.call()
    # Twilio is answered with the first sentence, and then the caller gets a word in before it asks for the rest.
    phone.request("POST", "/talking", {**phone.params, "SpeechResult": "Tell me all you know."})
    assert phone.say("No, something else.") == "Gladly, what is it?"
    (request,) = claude.asked("Tell me all you know.")
    wait_until(lambda: request.closed_by_caller)
    assert request.tokens_sent < 1200, "of 1750"
    assert turns_of(stage.app, phone, "stop")[0] == ("overtaken",)


@pytest.mark.parametrize("hang_up", [True, False], ids=["and hangs up", "and listens"])
def test_nothing_is_added_to_a_reply_that_ends_in_white_space(phone, claude, hang_up):
    words = f"Say a word, hang up: {hang_up}."
    claude.when(words, Reply("It was a pleasure. " + " " * 16, hang_up=hang_up, pace=20))
    phone.call()
    assert phone.say(words) == "It was a pleasure."
    assert (phone.ended == "hangup") == hang_up


# --- Waiting for Claude ---------------------------------------------------------------------------


def test_an_answer_is_heard_as_soon_as_it_is_there(phone):
    phone.call()
    for number in range(5):  # a busy machine may be slow once, but not every time
        phone.say(f"Quickly, number {number}.")
    assert min(phone.waits[1:]) < 0.9, "less than the second after which a request looks again by itself"


def test_the_caller_hears_one_moment_while_claude_thinks(stage, claude):
    claude.when("What is the answer?", Reply("After long thought: forty-two.", first_token=7.5 / SPEED))
    phone = stage.phone(stage.faster)
    phone.call()
    heard = phone.say("What is the answer?")
    assert heard.startswith("One moment.") and heard.endswith("After long thought: forty-two.")
    assert phone.say("Thank you for the answer.").endswith("You said: Thank you for the answer.")
    assert phone.warnings == []


@pytest.mark.slow
def test_the_caller_hears_different_phrases_while_claude_thinks(stage, claude):
    words = "What is the hardest question?"
    claude.when(words, Reply("This one is.", first_token=15 / SPEED))
    phone = stage.phone(stage.faster)
    phone.call()
    said = in_thread(lambda: phone.request("POST", "/talking", {**phone.params, "SpeechResult": words}))
    wait_until(lambda: claude.asked(words))

    def wait(times):
        return phone.request("POST", f"/talking?turn=1&heard=0&waited={times}", phone.params).body.decode()

    # One request waits after the other. To save time, here they all wait together.
    waits = [in_thread(lambda times=times: wait(times)) for times in range(1, 5)]
    assert "One moment." in said().body.decode()
    still_thinking, taking_longer, *again = [answer() for answer in waits]
    assert "I'm still thinking about that." in still_thinking
    assert "This is taking a little longer." in taking_longer
    assert "One moment." in again[0] and "I'm still thinking about that." in again[1]
    phone.hang_up()


@pytest.mark.slow
def test_an_answer_that_takes_twenty_seconds_is_heard_in_full(stage, claude):
    claude.when("What takes twenty seconds?", Reply("After long thought: this does.", first_token=20))
    phone = stage.phone()
    phone.call()
    heard = phone.say("What takes twenty seconds?")
    assert heard == (
        "One moment. I'm still thinking about that. This is taking a little longer. After long thought: this does."
    )
    assert max(seconds for _, _, seconds, _ in phone.webhooks) < 10
    assert phone.say("Thank you for waiting.") == "You said: Thank you for waiting."


@pytest.mark.slow
def test_an_answer_that_never_comes_ends_in_an_apology(stage, claude):
    claude.when("Never mind.", Reply("Too late.", first_token=70))
    phone = stage.phone()
    phone.call()
    heard = phone.say("Never mind.")
    (request,) = claude.asked("Never mind.")
    assert not request.finished, "the app gave up before Claude did"
    assert heard.endswith(SORRY)
    assert "longer. One moment." in heard and "Too late" not in heard
    assert max(seconds for _, _, seconds, _ in phone.webhooks) < 10
    assert phone.say("Thank you all the same.") == "You said: Thank you all the same."
    (request,) = claude.asked("Thank you all the same.")
    assert request.messages[0] == ("user", "Never mind.")


@pytest.mark.slow
def test_a_sentence_that_never_ends_is_given_up(stage, claude):
    written = "one sentence without an end, in drops of four characters " * 9
    claude.when("Drip.", Reply(written, pace=2 * SPEED))
    phone = stage.phone(stage.faster)
    phone.call()
    heard = phone.say("Drip.")
    (request,) = claude.asked("Drip.")
    assert "one sentence without an end" in heard and heard.endswith(SORRY)
    wait_until(lambda: request.closed_by_caller)
    assert request.tokens_sent < len(written) / 4


@pytest.mark.slow
def test_a_slow_sentence_is_heard_in_full(stage, claude):
    slow = "Here is the first sentence. And here is one that takes its time until it ends."
    claude.when("Slowly, please.", Reply(slow, pace=1.8 * SPEED))
    phone = stage.phone(stage.faster)
    phone.call()
    heard = phone.say("Slowly, please.")
    assert "Here is the first sentence." in heard
    assert heard.endswith("And here is one that takes its time until it ends.")
    assert is_part_of(turns_of(stage.faster, phone)[0][1].strip(), slow)


@pytest.mark.slow
def test_a_reply_may_take_longer_than_any_sentence(stage, claude):
    """No sentence takes more than half a second, and all of them take longer than one may."""
    written = " ".join(f"This is sentence number {number}." for number in range(10, 30))
    claude.when("Tell me sentence by sentence.", Reply(written, pace=len(written) / 4 / 35 * SPEED))
    phone = stage.phone(stage.faster)
    phone.call()
    heard = phone.say("Tell me sentence by sentence.")
    assert heard.endswith("This is sentence number 29.") and SORRY not in heard
    assert turns_of(stage.faster, phone) == [("Tell me sentence by sentence.", f"{written} ")]


# --- Silence --------------------------------------------------------------------------------------


def test_a_silent_caller_is_asked_twice_and_then_hears_goodbye(phone, claude):
    phone.call()
    requests = len(claude.requests)
    first, second = phone.stay_silent(), phone.stay_silent()
    assert first.endswith("?") and second != first
    assert not phone.ended
    assert "Goodbye" in phone.stay_silent()
    assert phone.ended == "hangup"
    assert len(claude.requests) == requests


def test_the_caller_may_be_silent_again_after_speaking(phone):
    phone.call()
    first = phone.stay_silent()
    phone.stay_silent()
    assert phone.say("I am here.") == "You said: I am here."
    assert phone.stay_silent() == first
    assert not phone.ended


@pytest.mark.parametrize("nothing", ["", "   ", "\n\t"], ids=ascii)
def test_empty_words_are_silence(phone, claude, nothing):
    phone.call()
    requests = len(claude.requests)
    assert phone.say(nothing) == "Are you still there?"
    assert len(claude.requests) == requests


# --- Goodbye --------------------------------------------------------------------------------------


def test_claude_hangs_up_after_its_goodbye(phone, claude):
    claude.when("That was all.", Reply("It was a pleasure. Take care!", hang_up=True))
    phone.call()
    assert phone.say("That was all.") == "It was a pleasure. Take care!"
    assert phone.ended == "hangup"


def test_the_line_says_goodbye_if_claude_hangs_up_without_a_word(phone, claude):
    claude.when("Hang up now.", Reply("", hang_up=True))
    phone.call()
    assert phone.say("Hang up now.") == "Goodbye!"
    assert phone.ended == "hangup"


def test_an_endless_call_ends_with_a_goodbye(stage, claude):
    with stage.other_app(MAX_TURNS="2") as app:
        phone = stage.phone(app)
        phone.call()
        phone.say("Endless, one.")
        phone.say("Endless, two.")
        assert not phone.ended
        assert phone.say("Endless, three.").endswith("Goodbye!")
        assert phone.ended == "hangup"
        assert len(claude.asked("Endless, two.")) == 1 and not claude.asked("Endless, three.")

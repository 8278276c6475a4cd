"""A call as the caller hears it, and what Claude is sent."""

import contextlib
import re
import sqlite3
import time

import pytest

import conversation
from tests.claude import Reply
from tests.conftest import meanwhile, wait_until

SENTENCES = "Here is the first sentence of it. Here comes the second one, too. And this is the third and last."


def test_greets_and_listens(phone):
    assert phone.call() == "Hello, this is Claude speaking!"
    assert phone.listens_to("speech") and phone.listens_to("dtmf")
    assert phone.said[-1][2], "the caller can cut in on the greeting"


def test_a_conversation(phone, claude):
    claude.when("What is your name?", Reply("My name is Claude.", thinking=True))
    claude.when("And what is mine?", Reply("You didn't say."))
    phone.call()
    assert phone.say("What is your name?") == "My name is Claude."
    assert phone.say("And what is mine?") == "You didn't say."
    (request,) = claude.asked("And what is mine?")
    assert request.messages == [
        ("user", "What is your name?"), ("assistant", "My name is Claude."), ("user", "And what is mine?")
    ]
    assert "telephone" in request.body["system"]
    assert request.body["model"] == "claude-haiku-5-5"
    assert request.body["output_config"] == {"effort": "low"}


def test_two_calls_share_nothing(stage, claude):
    one, other = stage.phone(), stage.phone()
    one.call()
    other.call()
    one.say("The password is swordfish.")
    other.say("What is the password in this call?")
    (request,) = claude.asked("What is the password in this call?")
    assert request.messages == [("user", "What is the password in this call?")]


def test_every_field_of_gather_is_chosen(phone):
    phone.call()
    assert phone.gather == {
        "input": "speech dtmf", "action": "/talking#rc=5&rp=5xx,ct,rt&rt=8000", "method": "POST", "timeout": "5", "speechTimeout": "auto",
        "profanityFilter": "false", "numDigits": "1", "finishOnKey": "",
    }


@pytest.mark.parametrize("key", ["5", "*", "#"])
def test_a_key_reaches_claude_as_what_it_is(phone, claude, key):
    phone.call()
    phone.press(key)
    assert f"pressed {key}" in claude.requests[-1].words


def test_a_long_reply_is_heard_once_and_in_order(phone, claude):
    claude.when("Tell me three things.", Reply(SENTENCES, first_token=0.2, pace=60))
    phone.call()
    assert phone.say("Tell me three things.") == SENTENCES
    assert len(phone.documents) > 2, "the first part was there before the last"
    assert phone.said[-1][2], "the caller can cut in on the last part"


def test_a_reply_that_is_done_goes_out_in_one_answer(phone, claude):
    claude.when("Be quick.", Reply(SENTENCES))
    phone.call()
    phone.say("Be quick.", token="the same")
    before = len(phone.documents)
    assert phone.say("Be quick.", token="the same") == SENTENCES
    assert len(phone.documents) == before + 1 and phone.said[-1][2]
    assert len(claude.asked("Be quick.")) == 1


def test_a_very_short_first_sentence_takes_the_next_one_with_it(phone, claude):
    # Claude goes on writing for a minute: not even a busy machine says all of it at once.
    written = "Sure. I have looked it up this very morning. " + "It is true. " * 100
    claude.when("Are you sure?", Reply(written, pace=5))
    phone.call()
    phone.on_hearing = lambda text: phone.hang_up()
    assert phone.say("Are you sure?") == "Sure. I have looked it up this very morning."


@meanwhile
def test_the_first_word_comes_while_claude_writes_and_the_rest_in_one_piece(stage):
    stage.claude.when("How is the weather?", Reply(f"{SENTENCES} {SENTENCES}", first_token=0.5, pace=30))
    phone = stage.phone(speaking_rate=2.7)
    phone.call()
    assert phone.say("How is the weather?") == f"{SENTENCES} {SENTENCES}"
    (request,) = stage.claude.asked("How is the weather?")
    # How early it was is measured by the benchmark: here a busy machine must not matter.
    assert phone.said[1][1] < wait_until(lambda: request.finished)
    assert len(phone.webhooks) <= 4


@meanwhile
def test_an_answer_that_takes_twenty_seconds_is_heard_in_full(stage):
    stage.claude.when("What is the answer?", Reply("After long thought: forty-two.", first_token=20))
    phone = stage.phone()
    phone.call()
    heard = phone.say("What is the answer?")
    assert heard == "One moment. I'm still thinking about that. This is taking a little longer. After long thought: forty-two."
    assert max(seconds for _, _, seconds, _ in phone.webhooks) < 10
    assert phone.say("Thank you.") == "You said: Thank you."


@meanwhile
def test_an_answer_that_never_comes_ends_in_an_apology(stage):
    stage.claude.when("Never mind.", Reply("Too late.", first_token=70))
    phone = stage.phone()
    phone.call()
    began = time.monotonic()
    heard = phone.say("Never mind.")
    assert heard.endswith("Sorry, something went wrong at my end. Could you say that again?")
    assert "longer. One moment." in heard and "Too late" not in heard
    assert time.monotonic() - began < 60
    assert max(seconds for _, _, seconds, _ in phone.webhooks) < 10
    assert phone.say("Thank you all the same.") == "You said: Thank you all the same."
    (request,) = stage.claude.asked("Thank you all the same.")
    assert request.messages[0] == ("user", "Never mind.")


@meanwhile
def test_a_reply_that_drips_ends_too(stage):
    stage.claude.when("Drip.", Reply("one sentence without an end, in drops of four characters " * 9, pace=2))
    phone = stage.phone()
    phone.call()
    began = time.monotonic()
    heard = phone.say("Drip.")
    assert "one sentence without an end" in heard and heard.endswith("Could you say that again?")
    assert time.monotonic() - began < 60


def test_silence_is_asked_about_twice_and_then_it_is_goodbye(phone, claude):
    phone.call()
    asked = len(claude.requests)
    first, second = phone.stay_silent(), phone.stay_silent()
    assert first.endswith("?") and second != first
    assert "Goodbye" in phone.stay_silent()
    assert phone.ended == "hangup"
    assert len(claude.requests) == asked


def test_speaking_resets_the_silences(phone):
    phone.call()
    first = phone.stay_silent()
    phone.stay_silent()
    assert phone.say("I am here.") == "You said: I am here."
    assert phone.stay_silent() == first
    assert not phone.ended


@pytest.mark.parametrize("nothing", ["", "   ", "\n\t"])
def test_words_that_are_none_are_silence(phone, claude, nothing):
    phone.call()
    asked = len(claude.requests)
    assert phone.say(nothing) == "Are you still there?"
    assert len(claude.requests) == asked


def test_claude_hangs_up_after_its_goodbye(phone, claude):
    claude.when("That was all.", Reply("It was a pleasure. Take care!", hang_up=True))
    phone.call()
    assert phone.say("That was all.") == "It was a pleasure. Take care!"
    assert phone.ended == "hangup"


def test_claude_hangs_up_without_a_word_and_the_line_says_goodbye(phone, claude):
    claude.when("Hang up now.", Reply("", hang_up=True))
    phone.call()
    assert phone.say("Hang up now.") == "Goodbye!"
    assert phone.ended == "hangup"


@meanwhile
def test_an_endless_call_ends_with_a_goodbye(stage):
    with stage.other_app(MAX_TURNS="2") as app:
        phone = stage.phone(app)
        phone.call()
        phone.say("One.")
        phone.say("Two.")
        assert not phone.ended
        assert phone.say("Three.").endswith("Goodbye!")
        assert phone.ended == "hangup"
        assert not stage.claude.asked("Three.")


SPOKEN = {
    "**Bold** and _slanted_, `code` and ~~gone~~.": "Bold and slanted, code and gone.",
    "# A heading\n\nText under it.": "A heading. Text under it.",
    "- milk\n- eggs\n* bread\n": "milk. eggs. bread.",
    "1. First this\n2. Then that\n": "1. First this. 2. Then that.",
    "See [the manual](https://example.com/a_b?c=d) or https://www.example.org/x/y.html.": "See the manual or example.org.",
    "![a cat](cat.png) sleeps here": "a cat sleeps here",
    "```python\nprint(1)\n```\nThat prints one.": "print(1) That prints one.",
    "| Name | Age |\n|------|-----|\n| Ann | 30 |\n": "Name, Age. Ann, 30.",
    "> quoted\n\n---\n\nand on": "quoted. and on",
    "Great \U0001f600\U0001f44d\U0001f3fd work ❤️ here.": "Great work here.",
    "Family \U0001f468‍\U0001f469‍\U0001f467, flag \U0001f1e9\U0001f1ea, key 1️⃣.": "Family , flag , key 1.",
    "Line<br>break and <b>tag</b>.": "Line break and tag .",
    "a < b & c > d": "a < b & c > d",
    "control \x01\x0b\x1f\ufffe\uffff characters": "control characters",
    "lone \ud83d surrogate": "lone surrogate",
    "Größe, naïve café, 20 °C, 2 × 3": "Größe, naïve café, 20 °C, 2 × 3",
    "नमस्ते दुनिया और क्‍ष": "नमस्ते दुनिया और क्‍ष",
    "مرحبا بالعالم": "مرحبا بالعالم",
    "你好,世界。再见!": "你好,世界。再见!",
    "I ate 2 * 3 apples *quickly*": "I ate 2 × 3 apples quickly",
    "snake_case stays": "snake_case stays",
    "~~~\ncode\n~~~\nThat was code.": "code. That was code.",
    "One\n===\ntext\n***\nmore\n___\nend": "One. text. more. end",
    "• milk\n  - soy\n+ tea\n": "milk. soy. tea.",
    r"Not \*so\* \_so\_.": "Not so so.",
    r"1\. Take \#4 \(or 5\).": "1. Take #4 (or 5).",
    "Go → there ⤴ then ⬆ up.": "Go there then up.",
    "England \U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f wins.": "England wins.",
    "2**10 is 1024": "2 ^ 10 is 1024",
    "```git pull``` gets the rest.": "git pull gets the rest.",
    "[Python](https://en.wikipedia.org/wiki/Python_(language)) is it.": "Python is it.",
    "[Is it on? Yes it is.](https://example.com/faq) So there.": "Is it on? Yes it is. So there.",
    'Look <a href="https://x.example.com">here</a>.': "Look here .",
    "Type git commit <message> now.": "Type git commit <message> now.",
}


@pytest.mark.parametrize("number, written", list(enumerate(SPOKEN)), ids=lambda value: ascii(value)[:20])
@pytest.mark.parametrize("pace", [None, 400], ids=["at once", "token by token"])
def test_what_is_written_is_made_to_be_spoken(stage, claude, number, written, pace):
    words = f"Say number {number} at {pace}."
    claude.when(words, Reply(written, pace=pace))
    phone = stage.phone()
    phone.call()
    assert phone.say(words) == SPOKEN[written]
    assert phone.warnings == [] and not phone.ended


@pytest.mark.parametrize("letters", ["word ", "世界", "&<>'\" "], ids=ascii)
def test_a_reply_of_any_length_fits_into_what_twilio_takes(stage, claude, letters):
    written = "A" + letters * (9_000 // len(letters))
    claude.when(f"Go on about {letters}.", Reply(written))
    phone = stage.phone()
    phone.call()
    heard = phone.say(f"Go on about {letters}.")
    assert re.sub(r"\s", "", heard) == re.sub(r"\s", "", written)
    assert phone.warnings == [] and not phone.ended


def test_long_replies_are_cut_between_sentences(phone, claude):
    claude.when("A long one.", Reply("This is a sentence of some forty letters. " * 40))
    phone.call()
    phone.say("A long one.")
    pieces = [text for text, *_ in phone.said[1:]]
    assert len(pieces) > 1 and all(piece.endswith("letters.") for piece in pieces)


def test_who_talks_about_something_else_ends_the_reply_before(stage, claude):
    claude.when("Tell me all you know.", Reply("This is one of very many sentences. " * 200, pace=60))
    claude.when("No, something else.", Reply("Gladly, what is it?"))
    phone = stage.phone()
    phone.call()
    # Twilio is answered with the first sentence, and then the caller gets a word in before it asks for the rest.
    phone.request("POST", "/talking", {**phone.params, "SpeechResult": "Tell me all you know."})
    assert phone.say("No, something else.") == "Gladly, what is it?"
    (request,) = claude.asked("Tell me all you know.")
    wait_until(lambda: request.closed_by_caller)
    assert request.tokens_sent < 900, "of 1750"
    with contextlib.closing(sqlite3.connect(stage.app.database)) as database:
        row = database.execute("SELECT stop FROM turns WHERE call_sid = ? AND turn = 1", [phone.call_sid]).fetchone()
    assert row == ("overtaken",)


def test_an_answer_that_is_there_is_heard_at_once(phone):
    phone.call()
    for number in range(5):  # a busy machine may be slow once, but not every time
        phone.say(f"Quickly, number {number}.")
    assert min(phone.waits[1:]) < 0.9, "less than a PULSE: whoever waits is woken"


def test_who_writes_without_a_full_stop_is_heard_all_the_same(phone, claude):
    claude.when("Ramble.", Reply("word and " * 111 + "end", pace=200))
    phone.call()
    assert phone.say("Ramble.") == "word and " * 111 + "end"
    (request,) = claude.asked("Ramble.")
    assert phone.said[1][1] < wait_until(lambda: request.finished), "the beginning was there before the end"
    assert {word for text, *_ in phone.said[1:] for word in text.split()} == {"word", "and", "end"}, "cut between words"


@meanwhile
def test_a_sentence_that_takes_twelve_seconds_is_heard_in_full(stage):
    slow = "Here is the first sentence. And here is one that takes its time until it ends."
    stage.claude.when("Slowly, please.", Reply(slow, pace=1.3))
    phone = stage.phone()
    phone.call()
    heard = phone.say("Slowly, please.")
    assert heard.startswith("Here is the first sentence.") and heard.endswith("takes its time until it ends.")


@pytest.mark.parametrize("sentence", [
    "I have just met Mr. Jones in the street.", "I have just met Ms. Jones in the street.",
    "I have just met Mrs. Jones in the street.", "I have just met Dr. Jones in the street.",
    "They live in old St. Ives by the sea.", "Take some fruit, e.g. apples or pears.",
    "It is the last one, i.e. the third.", "The music is by J. S. Bach, I think.",
    "这是一个很长很长的句子,就是这样。", "क्या आप मुझे अभी सुन सकते हैं।", "هل تسمعني الآن يا صديقي؟",
    'He said to me: "I am here."', "Is that so, really?!", "A line that has no full stop\n",
], ids=ascii)
def test_where_a_sentence_ends(sentence):
    text = f"{sentence} And"
    assert max(end.end() for end in conversation.SENTENCE_END.finditer(text)) >= len(sentence)
    assert min(end.end() for end in conversation.SENTENCE_END.finditer(text)) >= len(sentence)


@pytest.mark.parametrize("hang_up", [True, False], ids=["and hangs up", "and listens"])
def test_when_all_has_been_heard_nothing_is_added(stage, claude, hang_up):
    words = f"Say a word, hang up: {hang_up}."
    claude.when(words, Reply("It was a pleasure. " + " " * 8, hang_up=hang_up, pace=8))
    phone = stage.phone()
    phone.call()
    assert phone.say(words) == "It was a pleasure."
    assert (phone.ended == "hangup") == hang_up
    assert phone.warnings == []


def test_claude_is_told_how_to_hang_up_and_what_to_keep(phone, claude):
    phone.call()
    phone.say("What can you do?")
    body = claude.asked("What can you do?")[0].body
    assert [tool["name"] for tool in body["tools"]] == ["hang_up", "clock"]
    assert body["cache_control"] == {"type": "ephemeral"}, "the prompt is paid for once"


def test_words_and_a_key_reach_claude_together(stage, claude):
    phone = stage.phone()
    phone.call()
    phone.webhook("/talking", {"SpeechResult": "My choice is", "Digits": "5"})
    assert claude.requests[-1].words == "My choice is [The caller pressed 5]"


def test_a_reply_that_grows_in_xml_fits_too(phone, claude):
    claude.when("Say a lot of ands.", Reply("And " + "&&&& " * 3400))
    phone.call()
    for _ in range(2):  # the second time all of it is there at once
        assert phone.say("Say a lot of ands.", token="the same").count("&") == 4 * 3400

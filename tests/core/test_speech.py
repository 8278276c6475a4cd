"""What Claude writes is made to be spoken, sentence by sentence, in pieces that Twilio takes."""

import json
import re
import time
from types import SimpleNamespace

import pytest

from conversation import SENTENCE_END, Writer, end_of_sentences, speakable
from tests.claude import Reply

CLOCKS = "\u231a \u231b \u23e9 \u23ea \u23f0 \u23f1 \u23f2 \u23f3 \u23f0\ufe0f \u23fa"

# --- Text that can be spoken ----------------------------------------------------------------------

SPOKEN = {
    "**Bold** and _slanted_, `code` and ~~gone~~.": "Bold and slanted, code and gone.",
    "# A heading\n\nText under it.": "A heading. Text under it.",
    "- milk\n- eggs\n* bread\n": "milk. eggs. bread.",
    "1. First this\n2. Then that\n": "1. First this. 2. Then that.",
    "See [the manual](https://example.com/a_b?c=d) or https://www.example.org/x/y.html.":
        "See the manual or example.org.",
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
    "Read [Hello there, world! And more](https://example.com/a) now.": "Read Hello there, world! And more now.",
    'Look <a href="https://x.example.com">here</a>.': "Look here .",
    "Type git commit <message> now.": "Type git commit <message> now.",
    f"It is {CLOCKS} nine o'clock.": "It is nine o'clock.",
}
# Claude should use its tools and think in blocks of their own, but now and then such markup strays into the text.
STRAY = [
    '<function_calls>\n<invoke name="clock">\n<parameter name="time_zone">UTC. Really.</parameter>\n</invoke>\n'
    "</function_calls>",
    "<thinking>They want the time. I had better look. It is late!</thinking>",
    '<invoke name="clock">\nNow. Then.\n</invoke>',
    "<thinking>This has no end. " + "It goes on and on. " * 30,
]


def kept(pieces):
    """What is kept of a reply that comes in these pieces, ready to be spoken."""
    reply = []

    def grow(row_id, text, *_):
        reply.append(text)
        return True

    writer = Writer(SimpleNamespace(store=SimpleNamespace(grow=grow)), "CA1", 1, 1)
    for piece in pieces:
        writer.add(piece)
    writer.keep(writer.unfinished, "end_turn")
    return "".join(reply).strip()


def short(value):
    return ascii(value)[:20]


@pytest.mark.parametrize("written", SPOKEN, ids=short)
def test_text_is_made_speakable(written):
    assert speakable(written) == SPOKEN[written]


@pytest.mark.parametrize("size", [1, 4, 15, 1000])
@pytest.mark.parametrize("written", SPOKEN, ids=short)
def test_text_is_made_speakable_token_by_token(written, size):
    pieces = [written[start : start + size] for start in range(0, len(written), size)]
    assert kept(pieces) == SPOKEN[written]


@pytest.mark.parametrize("size", [1, 4, 15, 1000])
@pytest.mark.parametrize("stray", STRAY, ids=short)
def test_markup_for_tools_and_thoughts_is_not_spoken(stray, size):
    after = "" if "no end" in stray else " And here is the rest."
    written = f"Let me have a look. {stray}{after}"
    pieces = [written[start : start + size] for start in range(0, len(written), size)]
    assert kept(pieces) == f"Let me have a look.{after}"


@pytest.mark.parametrize("pace", [None, 400], ids=["at once", "token by token"])
def test_the_caller_hears_only_what_can_be_spoken(phone, claude, pace):
    everything = "\n\n".join([
        "# A heading",
        "**Bold** and [a link](https://example.com/a_b).",
        f"{STRAY[0]} a < b & c > d, \"quoted\".",
        "Type git commit <message>, control \x01\x0b\x1f\ufffe\uffff characters, lone \ud83d surrogate.",
        "Größe \U0001f600, नमस्ते दुनिया और क्‍ष, مرحبا بالعالم, 你好,世界。",
        STRAY[-1],
    ])
    claude.when(f"Say everything at {pace}.", Reply(everything, pace=pace))
    phone.call()
    assert phone.say(f"Say everything at {pace}.") == (
        "A heading. Bold and a link. a < b & c > d, \"quoted\". "
        "Type git commit <message>, control characters, lone surrogate. "
        "Größe , नमस्ते दुनिया और क्‍ष, مرحبا بالعالم, 你好,世界。"
    )
    assert not phone.ended


# --- Where a sentence ends ------------------------------------------------------------------------


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
    ends = [end.end() for end in SENTENCE_END.finditer(text)]
    assert ends and min(ends) >= len(sentence)
    assert len(sentence) <= end_of_sentences(text) < len(text)


# --- Replies of any length ------------------------------------------------------------------------


def in_one_piece(text):
    """A Reply with this text, all of which is there at once: nothing has to be waited for."""
    events = [
        {"type": "message_start", "message": {"usage": {}}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}},
        {"type": "message_stop"},
    ]
    return Reply(body="".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events).encode())


@pytest.mark.parametrize("letters", ["word ", "世界", "&<>'\" "], ids=ascii)
def test_a_reply_of_any_length_fits_into_what_twilio_takes(phone, claude, letters):
    words, written = f"Go on about {letters}.", "A" + letters * (9_000 // len(letters))
    claude.when(words, in_one_piece(written))
    phone.call()
    assert re.sub(r"\s", "", phone.say(words)) == re.sub(r"\s", "", written)
    assert phone.warnings == [] and not phone.ended
    token_by_token = kept(written[start : start + 4] for start in range(0, len(written), 4))
    assert re.sub(r"\s", "", token_by_token) == re.sub(r"\s", "", written)


@pytest.mark.parametrize("sentence", [
    "这是一个很长很长的句子就是这样。",
    "这是一个很长很长的句子就是这样。 ",
    "这是一个很长很长的句子还没有完 ",
    "这是一个很长很长的句子还没有完",
], ids=["no spaces", "spaces", "spaces only", "neither"])
def test_long_chinese_replies_fit_into_what_twilio_takes(phone, claude, sentence):
    words = f"Speak Chinese like {sentence!r}."
    claude.when(words, Reply(sentence * 80))
    phone.call()
    phone.say(words, token="the same")
    heard = phone.say(words, token="the same")  # all is there by now, and comes in one answer
    assert heard.replace(" ", "") == (sentence * 80).replace(" ", "")
    assert phone.warnings == [], "Twilio complains of a <Say> that is too long"


def test_long_replies_are_cut_between_sentences(phone, claude):
    claude.when("A long one.", Reply("This is a sentence of some forty letters. " * 40))
    phone.call()
    phone.say("A long one.")
    pieces = [text for text, *_ in phone.said[1:]]
    assert len(pieces) > 1 and all(piece.endswith("letters.") for piece in pieces)


def test_a_reply_that_grows_in_xml_fits_too(phone, claude):
    claude.when("Say a lot of ands.", in_one_piece("And " + "&&&& " * 3400))
    phone.call()
    for _ in range(2):  # the second time all of it is there at once
        assert phone.say("Say a lot of ands.", token="the same").count("&") == 4 * 3400


# --- Patterns -------------------------------------------------------------------------------------


def seconds_for(function, text):
    """Seconds of processor time."""
    began = time.thread_time()
    function(text)
    return time.thread_time() - began


@pytest.mark.slow
@pytest.mark.parametrize("function", [speakable, end_of_sentences])
@pytest.mark.parametrize("unit", [
    "[", "(", "<a ", " ", "[a](", "[](x", "![", "_a", "http://", "1  ", "|  ", "a\n", "# "])
def test_no_pattern_is_slow_for_what_claude_writes(unit, function):
    """Eight times the text takes eight times as long, where a slow pattern would take up to 64 times as long."""
    little, much = ((unit * size)[:size] for size in (16 * 1024, 128 * 1024))

    def is_linear():
        return seconds_for(function, much) < 14 * min(seconds_for(function, little) for _ in range(3))

    assert any(is_linear() for _ in range(3)), "a busy machine may disturb it, but not every time"

// The caller's side of the telephone in the browser. browser.py has Twilio's side, and tells how
// the two talk.
"use strict";

const WORDS_A_SECOND = 2.7; // the pace of speech, as in phone.py
const CHARACTERS_A_SECOND = 4.5; // the same where words aren't separated, as in Chinese
const LONGEST_BAR = 5; // seconds: who waits longer hangs up
const LANGUAGE = "en-US"; // Twilio's own, where the line names none
const BY_THE_CALLER = "hung up by the caller"; // as phone.py says it
const Recognition = window.SpeechRecognition || window.webkitSpeechRecognition;

const element = (name) => document.getElementById(name);

let call = null; // the call that is on
let events = null; // the stream of what happens in it
let listening = null; // what the line listens for now; null while it doesn't
let keysPressed = ""; // of several keys for one <Gather>
let keysTimer, silenceTimer;
let silent = false; // the caller has said to stay silent, and the line still speaks
let microphoneOn = false, muted = false, voiceOn = true;

// --- What the caller does ------------------------------------------------------------------------

async function post(what, fields = {}) {
  try {
    const answer = await fetch(what, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ call, ...fields }),
    });
    return answer.ok && (await answer.json());
  } catch {
    notice("The telephone's program doesn't answer. Was it ended in its terminal?");
    return false;
  }
}

async function dial() {
  element("call").disabled = true;
  element("talk").replaceChildren();
  element("turns").replaceChildren();
  notice("");
  newTurn("You call");
  const answer = await post("call");
  if (!answer) return ended("no connection");
  call = answer.call;
  events = new EventSource(`events?call=${call}`);
  events.onmessage = (message) => happened(JSON.parse(message.data));
  const lost = "The connection to the telephone's program is lost. Trying again ...";
  events.onerror = () => call && notice(lost);
  events.onopen = () => element("notice").textContent === lost && notice("");
  for (const button of ["hang-up", "words", "say", "silence"]) element(button).disabled = false;
  for (const key of element("keys").children) key.disabled = false;
  element(microphoneOn ? "hang-up" : "words").focus();
  state("Calling ...");
}

/** Do something in the turn that the line listens in. What is spoken is cut off. */
async function act(what, fields, title, said) {
  const { turn } = listening;
  stopListening();
  voice.cutOff();
  if (said) addToTalk("you", said);
  else addToTalk("aside", title);
  newTurn(title);
  state("Twilio asks the app ...");
  const done = await post(what, { turn, ...fields });
  if (!done) notice("That came too late: the line was no longer listening.");
}

function say(words) {
  if (!listening) return notHeard();
  if (!listening.speech) return notice("The line doesn't listen to words now, only to keys.");
  element("words").value = "";
  notice("");
  act("say", { words }, `You say: ${words}`, words);
}

function press(key) {
  if (!listening) return notHeard();
  if (!listening.keys) return notice("The line doesn't listen to keys now.");
  notice("");
  voice.cutOff();
  stopSilence();
  keysPressed += key;
  const done = () => act("press", { keys: keysPressed }, `You press ${[...keysPressed].join(" ")}`);
  clearTimeout(keysTimer);
  if (keysPressed.length === listening.mostKeys || listening.lastKey.includes(key)) done();
  else keysTimer = setTimeout(done, listening.timeout * 1000);
}

function staySilent() {
  if (!listening) return notHeard();
  if (voice.speaks()) silent = true; // the line waits for an answer once it has spoken
  else act("silence", {}, "You stay silent");
}

function notHeard() {
  notice("The line isn't listening yet, so it wouldn't hear that.");
}

function hangUp() {
  voice.cutOff("you hung up");
  post("hang_up");
}

// --- What happens in the call --------------------------------------------------------------------

function happened(event) {
  switch (event.kind) {
    case "say":
      if (event.wait !== null) showWait(event.wait);
      voice.say(event);
      break;
    case "listen":
      listening = event;
      keysPressed = "";
      whenQuiet();
      listen();
      break;
    case "request":
      showRequest(event);
      break;
    case "warning":
      addToTurn("p", "error", event.text);
      break;
    case "trouble":
      addToTurn("p", "trouble", `The app: ${event.text}`);
      break;
    case "ended":
      ended(event.how);
      break;
    case "over":
      events.close();
  }
}

function ended(how) {
  const wasOn = element("call").disabled;
  call = null;
  stopListening();
  if (how === BY_THE_CALLER) voice.cutOff("you hung up");
  for (const button of ["hang-up", "words", "say", "silence"]) element(button).disabled = true;
  for (const key of element("keys").children) key.disabled = true;
  element("call").disabled = false;
  const endings = { hangup: "The line has hung up.", [BY_THE_CALLER]: "You have hung up." };
  const why = endings[how] || `The call has ended: ${how}.`;
  state(why);
  addToTalk("aside", why);
  newTurn("The call has ended", how.startsWith("Twilio error") ? how : "");
  if (wasOn) element("call").focus();
}

// --- What is heard -------------------------------------------------------------------------------

const voiceless = new Set(); // the languages of which the person has been told so

/** The line's voice. It speaks one sentence after the other. */
const voice = {
  queue: [],
  now: null,

  speaks() {
    return Boolean(this.now);
  },

  say(sentence) {
    this.queue.push(sentence);
    if (!this.now) this.next();
  },

  next() {
    const heardItself = this.now && this.now.aloud && recogniser && !recogniser.words;
    const sentence = (this.now = this.queue.shift());
    if (!sentence) {
      if (heardItself) listenAnew();
      return whenQuiet();
    }
    sentence.item = addToTalk("line", sentence.text);
    sentence.item.classList.add("speaking");
    state(sentence.cutIn ? "The line speaks. You can interrupt it." : "The line speaks.");
    const done = () => {
      if (this.now !== sentence) return; // it was cut off
      clearTimeout(sentence.timer);
      sentence.item.classList.remove("speaking");
      if (!sentence.cutIn && call) post("said", { number: sentence.number });
      this.next();
    };
    const language = sentence.language || LANGUAGE;
    const speaker = voiceOn && voiceFor(language);
    sentence.aloud = Boolean(speaker);
    if (voiceOn && !speaker && !voiceless.has(language)) {
      voiceless.add(language);
      notice(`This browser has no voice for ${language}: you only see what is said.`);
    }
    if (!speaker) {
      sentence.timer = setTimeout(done, secondsFor(sentence.text) * 1000);
      return;
    }
    const utterance = new SpeechSynthesisUtterance(sentence.text);
    utterance.lang = language;
    utterance.voice = speaker;
    utterance.onend = utterance.onerror = done;
    sentence.utterance = utterance; // Chromium forgets to report the end of one that nobody holds
    // Some voices never report their end; the slowest take less than three times the usual pace.
    sentence.timer = setTimeout(done, secondsFor(sentence.text) * 3000 + 3000);
    speechSynthesis.speak(utterance);
  },

  /** Say no more of what was to be said. */
  cutOff(why = "you cut in") {
    const sentence = this.now;
    this.queue = [];
    this.now = null;
    if (!sentence) return;
    clearTimeout(sentence.timer);
    sentence.item.classList.replace("speaking", "cut");
    sentence.item.append(make("span", "aside", ` (${why})`));
    if (sentence.aloud) speechSynthesis.cancel();
  },
};

function voiceFor(language) {
  const voices = window.speechSynthesis ? speechSynthesis.getVoices() : [];
  const tag = (one) => one.lang.replace("_", "-").toLowerCase();
  const wanted = language.toLowerCase();
  return (
    voices.find((one) => tag(one) === wanted) ||
    voices.find((one) => tag(one).split("-")[0] === wanted.split("-")[0])
  );
}

function secondsFor(text) {
  const words = text.split(/\s+/);
  const characters = text.match(/[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}]/gu) || [];
  return Math.max(words.length / WORDS_A_SECOND, characters.length / CHARACTERS_A_SECOND);
}

/** Once nothing is spoken any more Twilio begins to wait for the caller. */
function whenQuiet() {
  if (voice.speaks()) return;
  if (!listening) {
    if (call) state("Twilio waits for the app ...");
    return;
  }
  if (silent) return staySilent();
  state("The line is listening.");
  stopSilence();
  // Who types is given all the time in the world, and has a button for silence.
  const couldSpeak = microphoneOn && (muted || microphoneAllowed || !listening.speech);
  if (couldSpeak && !element("words").value && !keysPressed) {
    const silence = () => act("silence", {}, "You stay silent");
    silenceTimer = setTimeout(silence, listening.timeout * 1000);
  }
}

function stopSilence() {
  clearTimeout(silenceTimer);
}

// --- What is said --------------------------------------------------------------------------------

let recogniser = null;
let microphoneAllowed = false; // the browser may ask the person first, and that takes its time

function listen() {
  if (recogniser || !microphoneOn || muted || !listening || !listening.speech) return;
  const mine = (recogniser = new Recognition());
  mine.words = "";
  mine.lang = listening.language || LANGUAGE;
  mine.interimResults = true;
  mine.onstart = () => {
    if (microphoneAllowed) return;
    microphoneAllowed = true;
    whenQuiet();
  };
  mine.onresult = (event) => {
    if (recogniser !== mine) return;
    const results = [...event.results];
    const words = results.map((result) => result[0].transcript).join(" ").trim();
    if (!words || isEcho(words)) return;
    mine.words = words;
    stopSilence();
    voice.cutOff();
    if (results.every((result) => result.isFinal)) return say(words);
    state(`The line hears: ${words} ...`);
    if (listening.partialResults) post("partial", { turn: listening.turn, words });
  };
  mine.onerror = (event) => {
    if (recogniser !== mine || ["no-speech", "aborted"].includes(event.error)) return;
    const why = {
      "not-allowed": "this page may not use the microphone",
      "audio-capture": "there is no microphone",
      "network": "the browser can't reach its recogniser",
      "service-not-allowed": "the browser doesn't allow it",
      "language-not-supported": `the browser's recogniser doesn't know ${mine.lang}`,
    };
    setMicrophone(false);
    element("words").focus();
    notice(`Your voice can't be recognised: ${why[event.error] || event.error}. Please type.`);
  };
  mine.onend = () => {
    if (recogniser !== mine) return;
    recogniser = null;
    if (mine.words) say(mine.words); // it ended without calling any of its results final
    // Browsers stop after some seconds without speech, where Twilio listens on. The fifth of a
    // second is for those that stop at once, again and again.
    else setTimeout(listen, 200);
  };
  mine.start();
}

function stopListening() {
  listening = null;
  silent = false;
  clearTimeout(keysTimer);
  stopSilence();
  stopRecogniser();
}

function stopRecogniser() {
  const mine = recogniser;
  recogniser = null;
  if (mine) mine.abort();
}

/** Forget what the recogniser has heard so far: it was the line's own voice. */
function listenAnew() {
  stopRecogniser();
  listen();
}

/** Whether these words come from the loudspeaker: a telephone would have removed them. */
function isEcho(words) {
  if (!voice.now || !voice.now.aloud) return false;
  const plain = (text) => text.toLowerCase().match(/[\p{L}\p{N}]+/gu) || [];
  const spoken = new Set(plain(voice.now.text));
  return plain(words).every((word) => spoken.has(word));
}

function setMicrophone(on) {
  microphoneOn = on;
  element("microphone").setAttribute("aria-pressed", on);
  element("mute").disabled = !on;
  if (on) listen();
  else {
    stopRecogniser();
    stopSilence();
  }
  if (listening) whenQuiet();
}

function setMute(on) {
  muted = on;
  element("mute").setAttribute("aria-pressed", on);
  if (on) stopRecogniser();
  else listen();
}

function setVoice(on) {
  voiceOn = on;
  element("voice").setAttribute("aria-pressed", on);
}

// --- What is shown -------------------------------------------------------------------------------

function state(text) {
  element("state").textContent = text;
}

function notice(text) {
  element("notice").textContent = text;
}

function make(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function add(list, item) {
  list.append(item);
  list.scrollTop = list.scrollHeight;
  return item;
}

function addToTalk(who, text) {
  const item = make("li", who);
  const names = { you: "You: ", line: "Line: " };
  if (names[who]) item.append(make("span", "who", names[who]));
  item.append(make("span", "text", text));
  return add(element("talk"), item);
}

function newTurn(title, error) {
  const turn = make("li", "turn");
  turn.append(make("h3", "", title));
  if (error) turn.append(make("p", "error", error));
  add(element("turns"), turn);
}

function addToTurn(tag, className, text) {
  const made = make(tag, className, text);
  element("turns").lastElementChild.append(made);
  element("turns").scrollTop = element("turns").scrollHeight;
  return made;
}

function showWait(seconds) {
  const turn = element("turns").lastElementChild;
  const wait = make("div", "wait");
  const track = make("div", "track");
  const bar = make("div", "bar");
  bar.style.width = `${Math.max(1, Math.min(100, (100 * seconds) / LONGEST_BAR))}%`;
  track.append(bar);
  wait.append(track, make("span", "seconds", `${seconds.toFixed(2)} s to the first word`));
  turn.firstElementChild.after(wait);
}

function showRequest({ method, path, params, status, milliseconds, body }) {
  const request = addToTurn("details", "request");
  request.open = true;
  const summary = make("summary", "", `${method} ${path} `);
  const well = status !== null && status < 400;
  const shown = make("span", well ? "status" : "status failed", status ?? "no answer");
  summary.append(shown, ` ${milliseconds} ms`);
  const list = make("dl", "params");
  for (const [name, value] of Object.entries(params)) {
    list.append(make("dt", "", name), make("dd", "", value));
  }
  request.append(summary, list);
  if (body) request.append(make("pre", "", body));
  element("turns").scrollTop = element("turns").scrollHeight;
}

// --- The page ------------------------------------------------------------------------------------

element("call").onclick = dial;
element("hang-up").onclick = hangUp;
element("silence").onclick = staySilent;
element("microphone").onclick = () => setMicrophone(!microphoneOn);
element("mute").onclick = () => setMute(!muted);
element("voice").onclick = () => setVoice(!voiceOn);
element("words").oninput = stopSilence; // who types has begun to answer
element("words-form").onsubmit = (event) => {
  event.preventDefault();
  const words = element("words").value.trim();
  if (words) say(words);
};
element("keys").onclick = (event) => event.target.value && press(event.target.value);
// Who closes the page hangs up.
window.onpagehide = () => {
  const body = new Blob([JSON.stringify({ call })], { type: "application/json" });
  if (call) navigator.sendBeacon("hang_up", body);
};

if (Recognition) setMicrophone(true);
else {
  element("microphone").disabled = true;
  setMicrophone(false);
  notice("This browser can't recognise speech, so you type. Chrome, Edge and Safari can.");
}

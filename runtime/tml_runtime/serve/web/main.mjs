// The page: buttons, the session behind them, and what is shown of it.

import { SpeechOver } from "./barge_in.mjs";
import { Client } from "./client.mjs";
import { whyRefused } from "./explain.mjs";
import { Camera, CaptureClock, Microphone, Speaker } from "./media.mjs";
import { frameSize } from "./protocol.mjs";
import { Timeline } from "./timeline.mjs";

const PICTURE_TOKENS = 8; // at most: 120 x 80 at 40 pixels a patch, which a CPU has the time for
const FRAMES_PER_TICK = 2;
const POSITION_MS = 200;
const SOUND_MS = 2000; // to wait for a sound card
const DRAW_MS = 50; // the model may be on the same CPU
const SPEAKING = 0.003; // -50 dBFS: what is played can be spoken over
const THUMBNAIL_S = 1;
const MAX_SAID = 4000; // characters that are kept on the page
const MAX_NOTICES = 4;
const UNSHOWN = /[\p{C}\ufffd]/gu; // control characters, and bytes that are no text
const STATES = {
  connecting: "connecting ...", open: "live", lost: "connection lost, resuming ...",
  resuming: "resuming ...", ended: "ended", closed: "stopped",
};

const $ = (id) => document.getElementById(id);

function press(name, on) {
  $(name).setAttribute("aria-pressed", String(on));
}

function notice(message) {
  const item = document.createElement("li");
  item.textContent = message;
  $("notices").append(item);
  while ($("notices").children.length > MAX_NOTICES) $("notices").firstChild.remove();
}

function showState(state, message = "") {
  $("state").dataset.state = state;
  $("state").textContent = message || STATES[state];
}

/** One session from Start to Stop. */
class Session {
  static async start(token, onEnd) {
    const context = new AudioContext({ latencyHint: "interactive" });
    for (const name of ["capture_worklet.mjs", "player_worklet.mjs"]) {
      await context.audioWorklet.addModule(name);
    }
    await Promise.race([context.resume(), new Promise((done) => setTimeout(done, SOUND_MS))]);
    if (context.state !== "running") {
      notice("The browser plays no sound, and so hears none. The session goes on without.");
    }
    return new Session(context, token, onEnd);
  }

  constructor(context, token, onEnd) {
    this._context = context;
    this._token = token;
    this._onEnd = onEnd;
    this._over = new SpeechOver();
    this._speaking = false;
    this._tickMs = [];
    this._missed = 0;
    this._toldAt = 0;
    this._seenAt = -Infinity;
    this._ended = false;
    const url = new URL("v1/session", location.href);
    url.protocol = url.protocol.replace("http", "ws");
    this._client = new Client(url.href, { token, on: (event) => this._on(event) });
  }

  /** Seconds of the media clock. */
  get now() {
    return this._client.mediaNow / this._client.welcome.audio_out.sample_rate;
  }

  interrupt() {
    if (this._speaker === undefined) return;
    this._client.interrupt(this._speaker.stop());
    this._speaking = false;
    this._timeline.add("interrupts", this.now);
  }

  write(text) {
    this._client.sendText(text);
  }

  /** Switch "microphone" or "camera" on or off; false where there is none. */
  toggle(name) {
    const track = this[`_${name}`]?.track;
    if (track === undefined) return false;
    track.enabled = !track.enabled;
    this._timeline.notes[name === "camera" ? "sees" : "hears"] = track.enabled ? "" : "switched off";
    return track.enabled;
  }

  stop() {
    this._client.close();
  }

  _on(event) {
    switch (event.type) {
      case "state": return this._onState(event);
      case "welcome": return this._onWelcome(event);
      case "speech": return this._speaker.play(event.stamp, event.pcm);
      case "text": return this._onText(event);
      case "action": return this._timeline.add("decides", this._at(event.stamp), event.name);
      case "tick": return this._onTick(event);
      case "epoch": $("epoch").textContent = event.epoch; return;
      case "error": return notice(event.message);
    }
  }

  async _onState({ state, message, code }) {
    if (this._ended) return;
    showState(state, message);
    if (state === "lost") this._speaker?.stop();
    if (state !== "ended" && state !== "closed") return;
    this._close();
    this._onEnd(code); // before anything is waited for: what begins then is another session
    if (code === "unreachable" && this._client.welcome === null) {
      const why = await whyRefused(this._token);
      if (session === null) showState(state, why);
    }
  }

  _onWelcome(welcome) {
    $("epoch").textContent = welcome.epoch;
    $("text").placeholder = welcome.hint;
    if (this._speaker === undefined) this._open(welcome);
    this._speaker.setClock(this._client.mediaNow);
  }

  _open(welcome) {
    this._timeline = new Timeline($("timeline"), { periodMs: welcome.tick_ms });
    this._speaker = new Speaker(this._context, welcome.audio_out.sample_rate, (report) => this._onReport(report));
    this._clock = new CaptureClock(welcome.audio_in.sample_rate);
    this._devices = Promise.all([this._openMicrophone(welcome), this._openCamera(welcome)]);
    let drawnAt = 0;
    const draw = (now) => {
      if (this._ended) return;
      requestAnimationFrame(draw);
      if (now - drawnAt < DRAW_MS) return;
      drawnAt = now;
      this._timeline.draw(this.now);
    };
    requestAnimationFrame(draw);
    this._describing = setInterval(() => {
      $("timeline").setAttribute("aria-label", this._timeline.describe());
    }, 2000);
  }

  async _openMicrophone({ audio_in: { sample_rate: rate, frame_ms } }) {
    const size = (rate * frame_ms) / 1000;
    await this._device("microphone", "hears", () =>
      Microphone.open(this._context, { rate, size }, ({ payload, level }) => {
        this._client.sendAudio(payload, this._clock.take(size));
        this._timeline.add("hears", this.now, level);
        if (this._over.hear(level, this._speaking) && $("barge-in").checked) this.interrupt();
      }));
  }

  async _openCamera({ video, tick_ms }) {
    const options = {
      size: (aspect) => frameSize(aspect, video, PICTURE_TOKENS),
      everyMs: tick_ms / FRAMES_PER_TICK,
      clock: this._clock,
    };
    await this._device("camera", "sees", () =>
      Camera.open($("preview"), options, ({ payload, stamp, canvas }) => {
        this._client.sendJpeg(payload, stamp);
        this._timeline.notes.sees = `${canvas.width} x ${canvas.height}`;
        if (this.now - this._seenAt >= THUMBNAIL_S) this._thumbnail(canvas);
      }));
  }

  /** What is missing is said, and the session goes on without. */
  async _device(name, row, open) {
    try {
      const device = await open();
      if (this._ended) return device.close();
      this[`_${name}`] = device;
      device.track.onended = () => notice(`The ${name} was taken away.`);
      $(name).disabled = false;
      press(name, true);
    } catch (error) {
      this._timeline.notes[row] = `no ${name}`;
      notice(`No ${name}: ${error.message}. The session goes on without.`);
    }
  }

  _thumbnail(canvas) {
    const copy = document.createElement("canvas");
    Object.assign(copy, { width: canvas.width, height: canvas.height });
    copy.getContext("2d").drawImage(canvas, 0, 0);
    this._seenAt = this.now;
    this._timeline.add("sees", this._seenAt, copy);
  }

  _onText({ text, stamp }) {
    const shown = text.replace(UNSHOWN, "·");
    this._timeline.add("writes", this._at(stamp), shown);
    const said = $("said");
    said.textContent = (said.textContent + shown).slice(-MAX_SAID);
    said.scrollTop = said.scrollHeight;
  }

  _onTick({ stamp, ms, missed, skipped, ended }) {
    this._speaker.hearClock(ended);
    this._timeline.add("ticks", this._at(stamp), { ms, missed, skipped });
    this._missed += missed + skipped;
    this._tickMs = [...this._tickMs.slice(-99), ms];
    const sorted = this._tickMs.toSorted((a, b) => a - b);
    $("median").textContent = `${Math.round(sorted[sorted.length >> 1])} ms`;
    $("longest").textContent = `${Math.round(sorted.at(-1))} ms`;
    $("missed").textContent = this._missed;
  }

  _onReport({ played, level, waiting }) {
    this._speaking = level > SPEAKING || waiting > 0;
    this._timeline.add("speaks", this.now, level);
    if (played > 0 && performance.now() - this._toldAt >= POSITION_MS) {
      this._toldAt = performance.now();
      this._client.sendPosition(played);
    }
  }

  _at(stamp) {
    return stamp / this._client.welcome.audio_out.sample_rate;
  }

  _close() {
    this._ended = true;
    clearInterval(this._describing);
    for (const part of [this._microphone, this._camera, this._speaker]) part?.close();
    this._context.close();
  }
}

let session = null;
let token = "";

function setLive(live) {
  $("start").textContent = live ? "Stop" : "Start";
  for (const element of [$("interrupt"), ...$("write").elements]) element.disabled = !live;
  if (live) return $("interrupt").focus(); // so that Space does what it says, and does not stop
  session = null;
  for (const name of ["microphone", "camera"]) {
    $(name).disabled = true;
    press(name, false);
  }
  $("start").focus();
}

async function start() {
  $("start").disabled = true;
  $("notices").replaceChildren();
  try {
    session = await Session.start(token, onEnd);
    setLive(true);
  } catch (error) {
    showState("ended", `The browser cannot play sound here: ${error.message}`);
  } finally {
    $("start").disabled = false;
  }
}

function onEnd(code) {
  setLive(false);
  if (code === "unauthorized") $("token-dialog").showModal();
}

$("start").addEventListener("click", () => (session === null ? start() : session.stop()));
$("interrupt").addEventListener("click", () => session?.interrupt());
for (const name of ["microphone", "camera"]) {
  $(name).addEventListener("click", () => press(name, session?.toggle(name) ?? false));
}
$("write").addEventListener("submit", (event) => {
  event.preventDefault();
  if ($("text").value.trim() !== "") session?.write($("text").value);
  $("text").value = "";
});
$("token-dialog").addEventListener("close", () => {
  if ($("token-dialog").returnValue === "use") {
    token = $("token").value;
    start();
  }
  $("token").value = "";
});
addEventListener("pagehide", () => session?.stop()); // else it would hold its place for a while
document.addEventListener("keydown", (event) => {
  if (event.code !== "Space" || event.repeat || event.target.closest("button, input, dialog")) return;
  event.preventDefault();
  session?.interrupt();
});

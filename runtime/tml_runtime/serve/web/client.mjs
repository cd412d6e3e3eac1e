// A session of the service over one WebSocket after the other: tml_runtime.serve.client for a page.
//
// What comes is told to `on(event)`: { type: "state", state, message }, and the messages of the
// service that still count; a `tick` has `ended`, the media clock when it was over. A connection that
// breaks is resumed while the session's grace period lasts, and so is one on which nothing comes any
// more, though a tick is due all the time. Texts and interruptions that the service has not taken are
// sent again.

import { MediaClock } from "./clock.mjs";
import {
  EpochFence, KEPT, Kind, SUBPROTOCOL, VERSION, decodeControl, decodeSpeech, encodeMedia,
} from "./protocol.mjs";

const RETRY_MS = [50, 100, 200, 500, 1000]; // between attempts to resume; the last one goes on
const LOOK_MS = 1000; // whether something came meanwhile
const SILENT_LOOKS = 3; // more of them in a row, and the line is dead
const PATIENT_LOOKS = 10; // for a welcome, and for the first tick after a silence: no storm of attempts
const MAX_KEPT_TEXTS = 64;
const MAX_UNSENT_BYTES = 200_000; // in the browser: then media are left out, as on a line that loses

/** A session's end in words: by the service's error code, else its own message is shown. */
const WORDS = {
  unauthorized: "The service wants a token, or another one.",
  exhausted: "All sessions of the service are taken.",
  taken_over: "This session went on in another page.",
  unknown_session: "The session has ended meanwhile. Start a new one.",
  session_fault: "The model failed in this session. Start a new one.",
  loop_failed: "The model stopped: the service has to be started again.",
  draining: "The service is shutting down.",
  rate_limited: "This page sent more than the service takes.",
};

export class Client {
  /** WebSocketClass and now are for tests. */
  constructor(url, { token, options = {}, on, WebSocketClass = WebSocket, now = () => performance.now() }) {
    this._url = url;
    this._token = token;
    this._options = options;
    this._on = on;
    this._WebSocket = WebSocketClass;
    this._now = now;
    this._fence = new EpochFence();
    this._seq = { audio: 0, video: 0, text: 0 };
    this._texts = []; // [seq, text] that may have to be sent again
    this._attempt = 0;
    this._giveUpAt = null; // set while a session waits to be resumed
    this._fatal = null; // why the service ended it
    this._open = false; // between a welcome and the end of its connection
    this._closed = false;
    this._numSilent = 0; // looks since something came
    this._patience = SILENT_LOOKS;
    this.welcome = null;
    this.unsent = 0; // frames that were left out
    this._connect();
  }

  get epoch() {
    return this._fence.epoch;
  }

  /** The session's media clock in samples, as well as the welcome and the ticks since tell it. */
  get mediaNow() {
    return this._clock.now(this._now() / 1000);
  }

  sendAudio(payload, stamp) {
    this._sendMedia("audio", { kind: Kind.AUDIO, stamp, payload });
  }

  sendJpeg(payload, stamp) {
    this._sendMedia("video", { kind: Kind.JPEG, stamp, payload });
  }

  sendText(text) {
    const seq = this._seq.text++;
    this._texts.push([seq, text]);
    this._texts = this._texts.slice(-MAX_KEPT_TEXTS);
    this._say({ type: "text", seq, text });
  }

  /**
   * `played`: the last sample heard, or a promise of it. What is older is dropped from now on. If the
   * connection is broken, or breaks before the answer, it is asked for on the next one.
   */
  async interrupt(played) {
    if (this.welcome === null) return;
    const asked = {};
    this._fence.interrupt(asked);
    asked.message = { type: "interrupt", played: await played };
    if (this._fence.waitsFor(asked)) this._say(asked.message);
  }

  sendPosition(played) {
    this._say({ type: "position", played });
  }

  /** End the session. */
  close() {
    this._closed = true;
    this._say({ type: "bye" });
    clearTimeout(this._retry);
    this._drop(1000);
  }

  _connect() {
    const resume = this.welcome?.resume;
    this._tell(resume === undefined ? "connecting" : "resuming");
    const ws = new this._WebSocket(this._url + (resume === undefined ? "" : "?resume=1"), SUBPROTOCOL);
    ws.binaryType = "arraybuffer";
    let openedAt = 0;
    ws.onopen = () => {
      openedAt = this._now();
      const hello = { type: "hello", version: VERSION, resume, token: this._token || undefined };
      ws.send(JSON.stringify({ ...hello, ticks: true, options: this._options }));
    };
    ws.onmessage = ({ data }) => {
      if (ws !== this._ws) return;
      this._numSilent = 0;
      try {
        this._take(data, openedAt);
      } catch (error) {
        this._on({ type: "error", code: "bad_message", message: `not understood: ${error.message}` });
      }
    };
    ws.onclose = ({ code }) => {
      if (ws === this._ws) this._lost(code);
    };
    this._ws = ws;
    this._numSilent = 0;
  }

  /** Once a second. One that comes late, as in a page behind others or after a sleep, counts once. */
  _look() {
    if (this._ws === null) return; // between two attempts
    this._numSilent++;
    if (this._numSilent <= (this._open ? this._patience : PATIENT_LOOKS)) return;
    this._patience = PATIENT_LOOKS;
    this._drop(1006);
  }

  /** Give the connection up; what it still says does not matter. */
  _drop(code) {
    const ws = this._ws;
    this._ws = null;
    ws?.close(1000);
    this._lost(code);
  }

  _take(data, openedAt) {
    const message = typeof data === "string" ? decodeControl(data) : decodeSpeech(data);
    if (message === null) return;
    if (typeof data !== "string") message.type = "speech";
    if (message.type === "welcome") {
      this._begin(message, openedAt);
    } else if (message.type === "epoch") {
      this._fence.answered(message.epoch);
    } else if (message.type === "tick") {
      message.ended = message.stamp + (message.ms / 1000) * this.welcome.audio_out.sample_rate;
      this._clock.hear(message.ended, this._now() / 1000);
      this._patience = SILENT_LOOKS;
    } else if (message.type === "error" && message.fatal) {
      this._fatal = message;
      return;
    } else if (message.type === "bye") {
      this._fatal = { code: message.reason, message: message.message };
      return;
    } else if ("epoch" in message && !this._fence.accepts(message.epoch)) {
      return;
    }
    this._on(message);
  }

  _begin(welcome, openedAt) {
    this.welcome = welcome;
    this._clock ??= new MediaClock(welcome.audio_out.sample_rate);
    this._clock.set(welcome.media_now, (openedAt + this._now()) / 2000); // told since `hello`
    const asked = this._fence.welcome(welcome.epoch);
    this._attempt = 0;
    this._giveUpAt = null;
    this._watch ??= setInterval(() => this._look(), LOOK_MS);
    this._open = true;
    if (asked?.message !== undefined) this._say(asked.message);
    this._texts = this._texts.filter(([seq]) => seq > welcome.text_seq);
    for (const [seq, text] of this._texts) this._say({ type: "text", seq, text });
    this._tell("open");
  }

  _lost(code) {
    const fatal = this._fatal;
    this._ws = null;
    this._open = false;
    if (this._closed) {
      this._end("closed");
    } else if (fatal !== null && fatal.code !== "slow_consumer") {
      this._end("ended", WORDS[fatal.code] ?? fatal.message, fatal.code);
    } else if (this.welcome === null) {
      this._end("ended", "The service did not answer.", "unreachable");
    } else if (!KEPT.includes(code)) {
      this._end("ended", `The service closed the connection (${code}).`, "closed");
    } else {
      this._resume();
    }
  }

  _resume() {
    this._fatal = null;
    this._giveUpAt ??= this._now() + this.welcome.grace_s * 1000;
    if (this._now() > this._giveUpAt) {
      this._end("ended", "The connection broke, and the session has ended meanwhile.", "unreachable");
      return;
    }
    this._tell("lost");
    const wait = RETRY_MS[Math.min(this._attempt++, RETRY_MS.length - 1)];
    this._retry = setTimeout(() => this._connect(), wait);
  }

  _end(state, message, code) {
    clearInterval(this._watch);
    this._tell(state, message, code);
  }

  _tell(state, message = "", code = "") {
    this._on({ type: "state", state, message, code });
  }

  _sendMedia(counter, media) {
    const seq = this._seq[counter]++;
    if (!this._open || this._ws.bufferedAmount > MAX_UNSENT_BYTES) {
      this.unsent++;
      return;
    }
    this._ws.send(encodeMedia({ ...media, seq, epoch: this.epoch }));
  }

  _say(message) {
    if (!this._open || this._ws.readyState !== 1) return false;
    this._ws.send(JSON.stringify(message));
    return true;
  }
}

// The media clock as it is heard, and an hour of speech on a sound card whose clock is not it.

import assert from "node:assert/strict";
import test from "node:test";

import { MediaClock } from "../../runtime/tml_runtime/serve/web/clock.mjs";

const RATE = 1000; // of the speech
const CARD_RATE = 3000;
const PERIOD = 0.2 * RATE; // of a tick

test("what was quickest to come tells the clock", () => {
  const clock = new MediaClock(RATE);
  clock.set(500, 1); // a guess
  assert.equal(clock.now(1.25), 750);
  clock.hear(600, 1.5); // which one that was heard takes the place of
  assert.equal(clock.now(1.5), 600);
  clock.hear(850, 1.7);
  assert.equal(clock.now(1.7), 850);
  clock.hear(1000, 1.9); // held up for 50 ms
  clock.hear(NaN, 1.9); // nothing was heard
  assert.equal(clock.now(1.9), 1050);
});

test("only the last minute counts, so that it follows", () => {
  for (const drift of [-1e-3, 1e-3]) {
    const clock = new MediaClock(RATE);
    for (let tick = 1; tick < 3000; tick++) {
      const at = tick * 0.2 * (1 + drift);
      clock.hear(tick * 0.2 * RATE - (tick % 7), at); // up to 6 ms late
      assert.ok(Math.abs(clock.now(at) - tick * 0.2 * RATE) <= 62);
      assert.equal(clock.isSettled(at), at >= 60);
      assert.ok(clock._heard.length <= 301);
    }
    clock.set(0, 600);
    assert.equal(clock.now(600), 0);
    assert.ok(!clock.isSettled(659) && clock.isSettled(660));
  }
});

// The player, as the browser's audio thread runs it

let Player;
globalThis.AudioWorkletProcessor = class {
  constructor() {
    this.port = { postMessage: (message) => this.told(message) };
  }
};
globalThis.registerProcessor = (name, processor) => { Player = processor; };
globalThis.sampleRate = CARD_RATE;
globalThis.currentTime = 0;
await import("../../runtime/tml_runtime/serve/web/player_worklet.mjs");

/** Up to 20 ms, and always the same. */
const jitter = (tick) => ((tick * 7919) % 21) / 1000;

/**
 * Plays a model that never stops, for `seconds`, on a card that is `drift` fast; it is interrupted
 * every `stopS`. Returns how far behind the media clock it was each minute in seconds, and the
 * faintest and loudest sample of each.
 */
function listen(seconds, drift, stopS = Infinity) {
  const player = new Player({ processorOptions: { rate: RATE } });
  const minutes = [];
  let now = 0;
  let stopAt = stopS;
  player.told = ({ played, stopped }) => {
    if (stopped === undefined) minutes.at(-1).behind = now - played / RATE;
  };
  const hear = (data) => player.port.onmessage({ data });
  globalThis.currentTime = 0;
  hear({ clock: 0 });
  let tick = 1;
  const output = new Float32Array(128);
  for (let block = 0; ; block++) {
    globalThis.currentTime = (block * output.length) / CARD_RATE;
    now = globalThis.currentTime / (1 + drift);
    if (now > seconds) return minutes;
    for (; tick * 0.2 + 0.05 + jitter(tick) <= now; tick++) {
      hear({ heard: (tick * 0.2 + 0.03) * RATE });
      hear({ stamp: tick * PERIOD, pcm: new Int16Array(PERIOD).fill(16384) });
    }
    if (now > stopAt) {
      hear({ stop: 0 });
      stopAt += stopS;
    }
    const minute = (minutes[Math.floor(now / 60)] ??= { faintest: 1, loudest: 0 });
    player.process([], [[output]]);
    for (const x of output) {
      minute.faintest = Math.min(minute.faintest, x);
      minute.loudest = Math.max(minute.loudest, x);
    }
  }
}

test("a sound card whose clock is off neither delays speech more and more, nor tears it", () => {
  for (const drift of [-3e-4, 3e-4]) {
    const [first, ...minutes] = listen(2000, drift);
    assert.ok(first.behind > 0.05 && first.behind < 0.2, `${first.behind} s at first`);
    for (const { behind, faintest, loudest } of minutes) {
      assert.ok(Math.abs(behind - first.behind) < 0.03, `${behind} s, ${first.behind} at first`);
      assert.ok(faintest > 0.49 && loudest < 0.51, `from ${faintest} to ${loudest}`);
    }
  }
});

test("after an interruption speech is as close to the media clock as at first", () => {
  const [first, ...minutes] = listen(900, -3e-4, 47);
  for (const { behind } of minutes) assert.ok(behind < first.behind + 0.06, `${behind} s`);
});

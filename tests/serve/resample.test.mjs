// Pure tones through the resampler: what comes out at their frequency, and what beside it.

import assert from "node:assert/strict";
import test from "node:test";

import { Resampler } from "../../runtime/tml_runtime/serve/web/resample.mjs";

const RATES = [16000, 22050, 32000, 44100, 48000, 96000];
const WAYS = RATES.flatMap((rate) => [[rate, 16000], [16000, rate]]);

function tone(hz, rate, count) {
  return Float32Array.from({ length: count }, (_, i) => Math.sin((2 * Math.PI * hz * i) / rate));
}

/** All of `input` in pieces of 128, as an audio thread gets it. */
function convert(input, from, to, { speed = 1, ...options } = {}) {
  const resampler = new Resampler(from, to, options);
  resampler.speed = speed;
  const output = new Float32Array(resampler.most(input.length));
  let count = 0;
  for (let at = 0; at < input.length; at += 128) {
    count += resampler.process(input.subarray(at, at + 128), output, count);
  }
  return output.subarray(0, count);
}

/** Amplitude at `hz`, and the root mean square of all the rest, of what is settled. */
function measure(samples, hz, rate) {
  const settled = samples.subarray(Math.round(0.02 * rate));
  let [re, im] = [0, 0];
  const w = (2 * Math.PI * hz) / rate;
  // A whole number of periods, so that sine and cosine are orthogonal.
  const count = Math.round(Math.floor((settled.length * hz) / rate) * (rate / hz));
  for (let i = 0; i < count; i++) {
    re += (2 / count) * settled[i] * Math.cos(w * i);
    im += (2 / count) * settled[i] * Math.sin(w * i);
  }
  let rest = 0;
  for (let i = 0; i < count; i++) {
    rest += (settled[i] - re * Math.cos(w * i) - im * Math.sin(w * i)) ** 2 / count;
  }
  return { amplitude: Math.hypot(re, im), rest: Math.sqrt(rest) };
}

const db = (x) => 20 * Math.log10(x);

test("the passband is flat to 0.1 dB, and nothing is added to it", () => {
  for (const [from, to] of WAYS) {
    for (const hz of [100, 1000, 3000, 6000, 7000]) {
      const { amplitude, rest } = measure(convert(tone(hz, from, 0.2 * from), from, to), hz, to);
      assert.ok(Math.abs(db(amplitude)) < 0.1, `${from} to ${to}: ${hz} Hz at ${db(amplitude)} dB`);
      assert.ok(db(rest) < -70, `${from} to ${to}: ${hz} Hz with ${db(rest)} dB beside it`);
    }
  }
});

test("what the lower rate cannot hold is 75 dB down", () => {
  for (const from of [32000, 44100, 48000, 96000]) {
    for (const hz of [8000, 8500, 9000, 12000, 15000].filter((hz) => hz < from / 2)) {
      const output = convert(tone(hz, from, 0.2 * from), from, 16000).subarray(400);
      const rms = Math.sqrt(output.reduce((sum, x) => sum + x * x, 0) / output.length);
      assert.ok(db(rms) < -75, `${from}: ${hz} Hz at ${db(rms)} dB`);
    }
  }
});

test("a constant stays what it is", () => {
  for (const [from, to] of WAYS) {
    const output = convert(new Float32Array(from / 10).fill(0.5), from, to);
    for (const x of output.subarray(-10)) assert.ok(Math.abs(x - 0.5) < 1e-5);
  }
});

test("a tenth of a second gives as many samples as the rate says, whatever the pieces", () => {
  for (const [from, to] of WAYS) {
    const input = tone(440, from, from / 10);
    assert.equal(convert(input, from, to).length, to / 10);
    const [whole, single] = [new Resampler(from, to), new Resampler(from, to)];
    const [a, b] = [new Float32Array(to / 10), new Float32Array(to / 10)];
    whole.process(input, a);
    let count = 0;
    for (let i = 0; i < input.length; i++) {
      count += single.process(input.subarray(i, i + 1), b, count);
    }
    assert.deepEqual(a, b);
  }
});

test("as many samples are asked for as are needed, and no more", () => {
  for (const [from, to] of WAYS) {
    const resampler = new Resampler(from, to);
    const output = new Float32Array(4096);
    for (let i = 0; i < 200; i++) {
      const wanted = 1 + ((i * 37) % 128);
      const needed = resampler.needed(wanted);
      const before = resampler.process(new Float32Array(needed - 1), output);
      assert.ok(before < wanted);
      assert.ok(before + resampler.process(new Float32Array(1), output) >= wanted);
    }
    assert.equal(resampler.needed(0), 0);
  }
});

test("at another speed a tone is as clean, and its pitch no more than that higher", () => {
  for (const [from, to] of [[16000, 16000], [16000, 44100], [16000, 48000], [24000, 48000]]) {
    for (const speed of [0.999, 1.0003, 1.001]) {
      for (const [hz, most] of [[1000, -65], [4000, -53]]) {
        const output = convert(tone(hz, from, 0.4 * from), from, to, { speed, minPhases: 256 });
        assert.ok(Math.abs(output.length - (0.4 * to) / speed) <= 2);
        const { amplitude, rest } = measure(output, hz * speed, to);
        assert.ok(Math.abs(db(amplitude)) < 0.1);
        assert.ok(db(rest) < most, `${from} to ${to} at ${speed}: ${hz} Hz with ${db(rest)} dB`);
      }
    }
  }
});

test("with more phases nothing changes at the speed that is meant", () => {
  for (const [from, to] of WAYS) {
    const input = tone(440, from, from / 20);
    assert.deepEqual(convert(input, from, to, { minPhases: 256 }), convert(input, from, to));
  }
});

test("rates that no sound card has are refused", () => {
  for (const rates of [[0, 16000], [16000, -1], [44100.5, 16000], [47999, 16000], [NaN, 1]]) {
    assert.throws(() => new Resampler(...rates), RangeError);
  }
});

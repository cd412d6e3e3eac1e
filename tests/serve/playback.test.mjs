// What is heard when, sample by sample.

import assert from "node:assert/strict";
import test from "node:test";

import { SpeechOver } from "../../runtime/tml_runtime/serve/web/barge_in.mjs";
import { PlaybackQueue } from "../../runtime/tml_runtime/serve/web/playback.mjs";

const RATE = 1000; // one sample a millisecond: a margin of 60, and 600 ahead

/** Samples that tell their place on the media clock. */
const piece = (stamp, count) => Int16Array.from({ length: count }, (_, i) => stamp + i + 1);

function read(queue, count) {
  const output = new Float32Array(count);
  queue.read(output);
  return Array.from(output, (x) => Math.round(x * 32768));
}

test("before anything came there is silence", () => {
  const queue = new PlaybackQueue(RATE);
  assert.deepEqual(read(queue, 3), [0, 0, 0]);
  assert.equal(queue.played, 0);
  assert.equal(queue.waiting, 0);
});

test("a piece is heard when the media clock says, one margin later", () => {
  const queue = new PlaybackQueue(RATE);
  queue.push(100, piece(100, 5), 90); // due in 10 ms
  assert.equal(queue.waiting, 5);
  assert.deepEqual(read(queue, 70), Array(70).fill(0));
  assert.deepEqual(read(queue, 4), [101, 102, 103, 104]);
  assert.equal(queue.played, 104);
  assert.equal(queue.waiting, 1);
  assert.deepEqual(read(queue, 3), [105, 0, 0]);
  assert.equal(queue.played, 105);
});

test("pieces that follow one another leave no gap; a pause of the model stays one", () => {
  const queue = new PlaybackQueue(RATE);
  queue.push(0, piece(0, 100), 0);
  queue.push(100, piece(100, 100), 5);
  queue.push(250, piece(250, 10), 6);
  const heard = read(queue, 60 + 270).slice(60);
  assert.deepEqual(heard.slice(0, 200), Array.from({ length: 200 }, (_, i) => i + 1));
  assert.deepEqual(heard.slice(200, 250), Array(50).fill(0));
  assert.equal(heard[250], 251);
});

test("a late piece is heard whole, with a margin for the next", () => {
  const queue = new PlaybackQueue(RATE);
  queue.push(0, piece(0, 100), 0);
  read(queue, 60 + 150); // to 150
  queue.push(100, piece(100, 20), 210);
  const heard = read(queue, 80);
  assert.deepEqual(heard.slice(0, 60), Array(60).fill(0));
  assert.deepEqual(heard.slice(60), Array.from({ length: 20 }, (_, i) => 101 + i));
});

test("nothing is played twice", () => {
  const queue = new PlaybackQueue(RATE);
  queue.push(0, piece(0, 50), 0);
  read(queue, 60 + 50);
  queue.push(0, piece(0, 50), 0);
  queue.push(40, piece(40, 20), 0);
  assert.equal(queue.waiting, 10);
  assert.deepEqual(read(queue, 100).filter((x) => x !== 0), [51, 52, 53, 54, 55, 56, 57, 58, 59, 60]);
});

test("what a line held up is caught up with", () => {
  const queue = new PlaybackQueue(RATE);
  for (let at = 0; at < 2000; at += 100) queue.push(at, piece(at, 100), 0);
  assert.ok(queue.waiting <= 800);
  const heard = read(queue, 2000).filter((x) => x !== 0);
  assert.equal(heard.at(-1), 2000);
  assert.deepEqual(heard, [...new Set(heard)].sort((a, b) => a - b));
});

test("after a stop nothing of it is heard, and where it stopped is told", () => {
  const queue = new PlaybackQueue(RATE);
  queue.push(0, piece(0, 100), 0);
  read(queue, 60 + 30);
  assert.equal(queue.stop(), 30);
  assert.equal(queue.waiting, 0);
  assert.deepEqual(read(queue, 100), Array(100).fill(0));
  queue.push(200, piece(200, 5), 150);
  assert.deepEqual(read(queue, 115).filter((x) => x !== 0), [201, 202, 203, 204, 205]);
  assert.equal(queue.stop(), 205);
});

test("who speaks over speech is noticed once an utterance", () => {
  const over = new SpeechOver();
  const hear = (level, ms, speaking = true) => {
    let count = 0;
    for (let t = 0; t < ms; t += 20) count += over.hear(level, speaking);
    return count;
  };
  assert.equal(hear(0.001, 1000), 0); // noise
  assert.equal(hear(0.5, 100), 0); // a click
  assert.equal(hear(0.001, 400), 0);
  assert.equal(hear(0.1, 2000), 1);
  assert.equal(hear(0.001, 200), 0); // between two words
  assert.equal(hear(0.1, 2000), 0);
  assert.equal(hear(0.001, 400), 0);
  assert.equal(hear(0.1, 2000, false), 0); // there is nothing to speak over
  assert.equal(hear(0.1, 20), 1); // now there is
});

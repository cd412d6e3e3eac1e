// Bytes as docs/protocol.md has them.

import assert from "node:assert/strict";
import test from "node:test";

import {
  EpochFence, Kind, decodeControl, decodeSpeech, encodeMedia, frameSize, pcm16,
} from "../../runtime/tml_runtime/serve/web/protocol.mjs";

const hex = (bytes) => Buffer.from(bytes).toString("hex");

test("a binary message is its header and its payload, little-endian", () => {
  const payload = Uint8Array.of(1, 2, 3);
  const media = { kind: Kind.RGB, seq: 0x01020304, stamp: 2 ** 40 + 5, epoch: 7, payload };
  assert.equal(
    hex(encodeMedia({ ...media, width: 40, height: 80 })),
    "03000000" + "04030201" + "0500000000010000" + "07000000" + "2800" + "5000" + "010203",
  );
});

test("speech is read back; other kinds are none, and damage is named", () => {
  const payload = pcm16([0, 0.5, -1, 2]);
  const media = { kind: Kind.SPEECH, seq: 2 ** 32 - 1, stamp: 2 ** 53 - 1, epoch: 3, payload };
  const data = encodeMedia(media).buffer;
  const speech = decodeSpeech(data);
  assert.deepEqual([...speech.pcm], [0, 16384, -32768, 32767]);
  assert.deepEqual([speech.seq, speech.stamp, speech.epoch], [2 ** 32 - 1, 2 ** 53 - 1, 3]);
  assert.equal(decodeSpeech(encodeMedia({ ...media, kind: 99 }).buffer), null);
  for (const size of [0, 23, 25]) assert.throws(() => decodeSpeech(data.slice(0, size)), RangeError);
  for (const text of ["", "1", "null", "{}", '{"type":1}', "["]) {
    assert.throws(() => decodeControl(text), SyntaxError);
  }
});

test("a picture has whole patches, and no more tokens than it may", () => {
  for (const [patch, extra_columns] of [[40, 1], [40, 0], [16, 1]]) {
    for (const aspect of [0.3, 9 / 16, 1, 4 / 3, 16 / 9, 5]) {
      for (const tokens of [2, 4, 16, 100, 1000]) {
        const { width, height } = frameSize(aspect, { patch, extra_columns, max_tokens: 256 }, tokens);
        assert.equal(width % patch + height % patch, 0);
        const [rows, columns] = [height / patch, width / patch];
        assert.ok(rows >= 1 && columns >= 1);
        assert.ok(rows * (columns + extra_columns) <= Math.min(tokens, 256));
      }
    }
  }
  const video = { patch: 40, extra_columns: 1, max_tokens: 256 };
  assert.deepEqual(frameSize(4 / 3, video, 16), { width: 160, height: 120 });
});

test("after an interruption nothing old is accepted, however many there were", () => {
  const fence = new EpochFence();
  assert.ok(fence.accepts(0));
  fence.interrupt({});
  fence.interrupt({});
  assert.ok(!fence.accepts(0));
  fence.answered(1);
  assert.ok(!fence.accepts(1)); // the second one has no answer yet
  fence.answered(2);
  assert.ok(!fence.accepts(1) && fence.accepts(2) && fence.accepts(3));
});

test("of interruptions before a connection broke, the last that was not taken is asked for again", () => {
  const fence = new EpochFence();
  const [first, second, third] = [{}, {}, {}];
  for (const asked of [first, second, third]) fence.interrupt(asked);
  assert.equal(fence.welcome(1), third);
  assert.ok(!fence.waitsFor(first) && !fence.waitsFor(second) && fence.waitsFor(third));
  assert.ok(!fence.accepts(1));
  assert.equal(fence.welcome(2), undefined); // it was taken, and its answer lost
  assert.ok(!fence.accepts(1) && fence.accepts(2));
  assert.equal(fence.welcome(5), undefined);
});

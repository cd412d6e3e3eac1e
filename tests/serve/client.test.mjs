// A session over sockets that are made up.

import assert from "node:assert/strict";
import test from "node:test";

import { Client } from "../../runtime/tml_runtime/serve/web/client.mjs";
import { Kind, encodeMedia, pcm16 } from "../../runtime/tml_runtime/serve/web/protocol.mjs";

const WELCOME = {
  type: "welcome", version: 1, session: "s", resume: "r", resumed: false, grace_s: 30, epoch: 0,
  media_now: -160, next_seq: 0, text_seq: -1, tick_ms: 200,
  audio_in: { sample_rate: 16000, frame_ms: 20 }, audio_out: { sample_rate: 16000 },
};

class FakeSocket {
  static all = [];

  constructor(url, protocol) {
    Object.assign(this, { url, protocol, readyState: 0, bufferedAmount: 0, sent: [] });
    FakeSocket.all.push(this);
  }

  send(data) {
    this.sent.push(typeof data === "string" ? JSON.parse(data) : data);
  }

  close(code) {
    this.closed = code;
    this.readyState = 2;
  }

  open(welcome = {}) {
    this.readyState = 1;
    this.onopen();
    this.say({ ...WELCOME, ...welcome });
  }

  say(message) {
    this.onmessage({ data: JSON.stringify(message) });
  }

  speak(epoch, stamp = 0) {
    const payload = pcm16([0.5]);
    this.onmessage({ data: encodeMedia({ kind: Kind.SPEECH, seq: 0, stamp, epoch, payload }).buffer });
  }

  drop(code = 1006) {
    this.readyState = 3;
    this.onclose({ code });
  }
}

/** A client, its newest socket, what it told, and a clock of ours. */
function begin(t, options = {}) {
  t.mock.timers.enable({ apis: ["setTimeout", "setInterval"] });
  FakeSocket.all = [];
  const events = [];
  const clock = { now: 0 };
  const client = new Client("ws://here/v1/session", {
    on: (event) => events.push(event), WebSocketClass: FakeSocket, now: () => clock.now, ...options,
  });
  return {
    client, events, clock,
    socket: () => FakeSocket.all.at(-1),
    states: () => events.filter((event) => event.type === "state").map((event) => event.state),
    heard: () => events.filter((event) => event.type === "speech").map((event) => event.epoch),
  };
}

test("hello is first; the token is in it and in no URL", (t) => {
  const { client, socket, states, clock } = begin(t, { token: "a secret of sixteen" });
  client.sendAudio(new Uint8Array(640), 0);
  socket().open();
  assert.deepEqual(socket().sent, [
    { type: "hello", version: 1, token: "a secret of sixteen", ticks: true, options: {} },
  ]);
  assert.equal(socket().url, "ws://here/v1/session");
  assert.equal(socket().protocol, "tml.v1");
  assert.equal(client.unsent, 1);
  clock.now = 1000;
  assert.equal(client.mediaNow, 16000 - 160);
  assert.deepEqual(states(), ["connecting", "open"]);
});

test("the media clock is that of the welcome until ticks tell it", (t) => {
  const { client, socket, clock, events } = begin(t);
  socket().open();
  clock.now = 500;
  assert.equal(client.mediaNow, 8000 - 160);
  socket().say({ type: "tick", stamp: 6400, ms: 75, missed: false, skipped: 0 });
  assert.equal(client.mediaNow, 7600);
  assert.equal(events.at(-1).ended, 7600);
  clock.now = 720; // this one was held up
  socket().say({ type: "tick", stamp: 9600, ms: 75, missed: false, skipped: 0 });
  assert.equal(client.mediaNow, 7600 + 0.22 * 16000);
  socket().drop();
  t.mock.timers.tick(50);
  socket().open({ resumed: true, media_now: 99 });
  assert.equal(client.mediaNow, 99);
});

test("each medium is counted for itself", (t) => {
  const { client, socket } = begin(t);
  socket().open();
  client.sendAudio(new Uint8Array(2), 5);
  client.sendJpeg(new Uint8Array(2), 6);
  client.sendAudio(new Uint8Array(2), 6);
  const heads = socket().sent.slice(1).map((data) => [data[0], data[4], data[8]]);
  assert.deepEqual(heads, [[1, 0, 5], [2, 0, 6], [1, 1, 6]]);
  socket().bufferedAmount = 1e6;
  client.sendAudio(new Uint8Array(2), 7);
  assert.equal(socket().sent.length, 4);
  assert.equal(client.unsent, 1);
});

test("an interruption has the position, and drops what is older at once", async (t) => {
  const { client, socket, heard } = begin(t);
  socket().open();
  socket().speak(0);
  const told = client.interrupt(Promise.resolve(1234));
  socket().speak(0); // on its way before the service heard of it
  await told;
  assert.deepEqual(socket().sent.at(-1), { type: "interrupt", played: 1234 });
  socket().speak(0);
  socket().say({ type: "epoch", epoch: 1, next_seq: 4 });
  socket().speak(0);
  socket().speak(1);
  assert.deepEqual(heard(), [0, 1]);
  assert.equal(client.epoch, 1);
});

const interrupts = ({ sent }) => sent.filter(({ type }) => type === "interrupt").map(({ played }) => played);

test("an interruption outlives a connection that breaks before it is answered", async (t) => {
  for (const [taken, again] of [[0, [1234]], [1, []]]) {
    const { client, socket, heard } = begin(t);
    socket().open();
    await client.interrupt(1234);
    socket().drop();
    t.mock.timers.tick(50);
    socket().open({ resumed: true, epoch: taken });
    assert.deepEqual(interrupts(socket()), again);
    socket().speak(0);
    assert.deepEqual(heard(), []);
    if (taken === 0) socket().say({ type: "epoch", epoch: 1, next_seq: 0 });
    socket().speak(1);
    assert.deepEqual(heard(), [1]);
    t.mock.timers.reset();
  }
});

test("who interrupts while the connection is broken is heard on the next one", async (t) => {
  const { client, socket, heard } = begin(t);
  const told = client.interrupt(1); // there is nothing to interrupt yet
  socket().open();
  await told;
  const broken = socket();
  broken.drop();
  await client.interrupt(7);
  let stop;
  const late = client.interrupt(new Promise((done) => { stop = done; }));
  t.mock.timers.tick(50);
  socket().open({ resumed: true });
  assert.deepEqual(interrupts(socket()), []); // the last one stands for both
  socket().speak(0);
  stop(9);
  await late;
  assert.deepEqual(interrupts(socket()), [9]);
  assert.deepEqual(interrupts(broken), []);
  socket().say({ type: "epoch", epoch: 1, next_seq: 0 });
  socket().speak(0);
  socket().speak(1);
  assert.deepEqual(heard(), [1]);
});

test("a connection that breaks is resumed, and only the texts that were not taken go again", (t) => {
  const { client, socket, states, heard } = begin(t);
  socket().open();
  for (const text of ["a", "b", "c"]) client.sendText(text);
  const first = socket();
  first.drop();
  assert.deepEqual(states(), ["connecting", "open", "lost"]);
  t.mock.timers.tick(50);
  assert.equal(socket().url, "ws://here/v1/session?resume=1");
  socket().open({ resumed: true, text_seq: 0, epoch: 2 });
  first.speak(9); // of the old connection
  const [hello, ...texts] = socket().sent;
  assert.equal(hello.resume, "r");
  assert.deepEqual(texts.map(({ seq, text }) => [seq, text]), [[1, "b"], [2, "c"]]);
  assert.deepEqual(states().slice(3), ["resuming", "open"]);
  socket().speak(1);
  socket().speak(2);
  assert.deepEqual(heard(), [2]);
});

/** Time goes by: every second the page looks, and `each` happens before. */
function pass(t, clock, seconds, each = () => {}) {
  for (let i = 0; i < seconds; i++) {
    each();
    clock.now += 1000;
    t.mock.timers.tick(1000);
  }
}

const TICK = { type: "tick", stamp: 3200, ms: 60, missed: false, skipped: 0 };

test("a line on which nothing comes any more is given up, and the session goes on on another", (t) => {
  const { client, socket, clock, states, heard } = begin(t);
  socket().open();
  const dead = socket();
  pass(t, clock, 100, () => dead.say(TICK));
  pass(t, clock, 2, () => client.sendAudio(new Uint8Array(640), 0));
  assert.deepEqual(states(), ["connecting", "open"]);
  pass(t, clock, 2);
  assert.deepEqual(states().slice(2), ["lost", "resuming"]);
  assert.equal(dead.closed, 1000);
  assert.equal(socket().url, "ws://here/v1/session?resume=1");
  dead.say(TICK);
  dead.drop();
  client.sendText("meanwhile");
  socket().open({ resumed: true });
  assert.equal(socket().sent.at(-1).text, "meanwhile");
  pass(t, clock, 100, () => socket().speak(0)); // whatever comes
  assert.equal(heard().length, 100);
  assert.equal(states().at(-1), "open");
  assert.equal(FakeSocket.all.length, 2);
});

test("a service that is silent is asked again now and then, until ticks come", (t) => {
  const { socket, clock, client } = begin(t);
  socket().open();
  pass(t, clock, 60, () => {
    if (socket().readyState === 0) socket().open({ resumed: true });
  });
  assert.ok(FakeSocket.all.length >= 5 && FakeSocket.all.length <= 7);
  if (socket().readyState === 0) socket().open({ resumed: true });
  pass(t, clock, 60, () => socket().say(TICK));
  const count = FakeSocket.all.length;
  pass(t, clock, 5);
  assert.equal(FakeSocket.all.length, count + 1);
  client.close();
  pass(t, clock, 60);
  assert.equal(FakeSocket.all.length, count + 1);
});

test("a connection that is not made is tried again, while the session is there", (t) => {
  const { socket, clock, states } = begin(t);
  socket().open();
  socket().drop();
  pass(t, clock, 60);
  assert.ok(FakeSocket.all.length >= 3 && FakeSocket.all.length <= 5);
  assert.equal(states().at(-1), "ended");
  const count = FakeSocket.all.length;
  pass(t, clock, 60);
  assert.equal(FakeSocket.all.length, count);
});

test("who slept or was behind other pages is not taken for one whose line is dead", (t) => {
  const { socket, clock, states } = begin(t);
  socket().open();
  for (let i = 0; i < 20; i++) {
    clock.now += 3_600_000;
    t.mock.timers.tick(1000); // a look an hour
    socket().say(TICK); // what came meanwhile is told after it
  }
  assert.deepEqual(states(), ["connecting", "open"]);
});

test("resuming is given up when the grace period is over", (t) => {
  const { socket, clock, states, events } = begin(t);
  socket().open();
  socket().drop();
  for (let i = 0; i < 40; i++) {
    clock.now += 1000;
    t.mock.timers.tick(1000);
    if (socket().readyState === 0) socket().drop();
  }
  assert.equal(states().at(-1), "ended");
  assert.match(events.at(-1).message, /has ended meanwhile/);
  const count = FakeSocket.all.length;
  t.mock.timers.tick(100_000);
  assert.equal(FakeSocket.all.length, count);
});

test("what the service says is final is told in words and not tried again", (t) => {
  for (const [code, close, words] of [
    ["unauthorized", 4401, /token/], ["exhausted", 4503, /taken/], ["loop_failed", 4510, /started again/],
    ["taken_over", 4409, /another page/], ["something_new", 4999, /just so/],
  ]) {
    const { socket, events, states } = begin(t);
    socket().open();
    socket().say({ type: "error", code, message: "just so", fatal: true });
    socket().drop(close);
    assert.equal(states().at(-1), "ended");
    assert.match(events.at(-1).message, words);
    assert.equal(events.at(-1).code, code);
    t.mock.timers.tick(10_000);
    assert.equal(FakeSocket.all.length, 1);
    t.mock.timers.reset();
  }
});

test("a slow line is resumed, a service that shuts down is not", (t) => {
  const slow = begin(t);
  slow.socket().open();
  slow.socket().say({ type: "error", code: "slow_consumer", message: "", fatal: true });
  slow.socket().drop(4430);
  assert.equal(slow.states().at(-1), "lost");
  t.mock.timers.reset();
  const going = begin(t);
  going.socket().open();
  going.socket().say({ type: "bye", reason: "draining", message: "going away" });
  going.socket().drop(1001);
  assert.equal(going.states().at(-1), "ended");
});

test("who stops says bye and hears no more", (t) => {
  const { client, socket, states, events } = begin(t);
  socket().open();
  client.close();
  assert.deepEqual(socket().sent.at(-1), { type: "bye" });
  assert.equal(socket().closed, 1000);
  assert.equal(states().at(-1), "closed");
  const count = events.length;
  socket().speak(0);
  socket().drop(1000);
  t.mock.timers.tick(10_000);
  assert.equal(events.length, count);
  assert.equal(FakeSocket.all.length, 1);
});

test("a message that is not understood is told, and the session goes on", (t) => {
  const { socket, events, heard } = begin(t);
  socket().open();
  socket().onmessage({ data: "no json" });
  socket().onmessage({ data: new ArrayBuffer(3) });
  assert.deepEqual(events.slice(-2).map(({ code }) => code), ["bad_message", "bad_message"]);
  socket().say({ type: "of a later version" });
  socket().speak(0);
  assert.deepEqual(heard(), [0]);
});

// Messages of the service, to bytes and back: docs/protocol.md. No browser is needed here.

export const VERSION = 1;
export const SUBPROTOCOL = "tml.v1";
export const HEADER_BYTES = 24;
export const Kind = Object.freeze({ AUDIO: 1, JPEG: 2, RGB: 3, SPEECH: 17 });

// Close codes after which the session is still there.
export const KEPT = Object.freeze([1001, 1005, 1006, 4430]);

/** One binary message: `payload` is a Uint8Array, `stamp` a whole number of samples. */
export function encodeMedia({ kind, seq, stamp, epoch, payload, width = 0, height = 0 }) {
  const data = new Uint8Array(HEADER_BYTES + payload.byteLength);
  const view = new DataView(data.buffer);
  view.setUint8(0, kind);
  view.setUint32(4, seq, true);
  view.setBigInt64(8, BigInt(stamp), true);
  view.setUint32(16, epoch, true);
  view.setUint16(20, width, true);
  view.setUint16(22, height, true);
  data.set(payload, HEADER_BYTES);
  return data;
}

/** Speech of a binary message, or null for a kind that is not known here. Throws RangeError. */
export function decodeSpeech(buffer) {
  if (buffer.byteLength < HEADER_BYTES) {
    throw new RangeError(`${buffer.byteLength} bytes are shorter than a header`);
  }
  const view = new DataView(buffer);
  if (view.getUint8(0) !== Kind.SPEECH) return null;
  if ((buffer.byteLength - HEADER_BYTES) % 2) throw new RangeError("half a sample");
  return {
    seq: view.getUint32(4, true),
    stamp: Number(view.getBigInt64(8, true)),
    epoch: view.getUint32(16, true),
    pcm: pcmFromBytes(view, HEADER_BYTES),
  };
}

function pcmFromBytes(view, offset) {
  const pcm = new Int16Array((view.byteLength - offset) / 2);
  for (let i = 0; i < pcm.length; i++) pcm[i] = view.getInt16(offset + 2 * i, true);
  return pcm;
}

/** Float samples to PCM16, little-endian; what is beyond full scale is clipped. */
export function pcm16(samples) {
  const data = new Uint8Array(2 * samples.length);
  const view = new DataView(data.buffer);
  samples.forEach((x, i) => {
    view.setInt16(2 * i, Math.max(-32768, Math.min(32767, Math.round(x * 32768))), true);
  });
  return data;
}

/** A JSON message of the service. Throws SyntaxError. */
export function decodeControl(text) {
  const message = JSON.parse(text);
  if (message === null || typeof message !== "object" || typeof message.type !== "string") {
    throw new SyntaxError("no message with a type");
  }
  return message;
}

/**
 * Width and height of whole patches, near `aspect` (width / height), for at most `maxTokens` tokens.
 * video: of the welcome. A larger picture wins, then the better shape.
 */
export function frameSize(aspect, video, maxTokens) {
  const most = Math.min(maxTokens, video.max_tokens);
  let best = { width: video.patch, height: video.patch, cost: Infinity };
  for (let rows = 1; rows * (1 + video.extra_columns) <= most; rows++) {
    const columns = Math.min(
      Math.max(1, Math.round(rows * aspect)),
      Math.floor(most / rows) - video.extra_columns,
    );
    const cost = Math.abs(Math.log(columns / rows / aspect)) - Math.log(rows * columns);
    if (cost < best.cost) {
      best = { width: columns * video.patch, height: rows * video.patch, cost };
    }
  }
  return { width: best.width, height: best.height };
}

/** Which epochs count. After `interrupt`, nothing does until the service has answered. */
export class EpochFence {
  constructor() {
    this.epoch = 0;
    this._asked = []; // what has no answer yet
  }

  /** `asked`: an object of its own for each interruption. */
  interrupt(asked) {
    this._asked.push(asked);
  }

  /** The service's `epoch`. */
  answered(epoch) {
    this._asked.shift();
    this.epoch = Math.max(this.epoch, epoch);
  }

  /**
   * The service's `welcome` on another connection. Returns the interruption that has to be asked for
   * again: of those that the service did not take, the last one stands for all.
   */
  welcome(epoch) {
    const taken = Math.max(0, epoch - this.epoch);
    this._asked = this._asked.slice(taken).slice(-1);
    this.epoch = Math.max(this.epoch, epoch);
    return this._asked[0];
  }

  waitsFor(asked) {
    return this._asked.includes(asked);
  }

  accepts(epoch) {
    return this._asked.length === 0 && epoch >= this.epoch;
  }
}

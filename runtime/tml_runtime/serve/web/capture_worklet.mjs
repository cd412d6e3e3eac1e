// On the audio thread: the microphone, resampled and cut into pieces as the protocol wants them.

import { pcm16 } from "./protocol.mjs";
import { Resampler } from "./resample.mjs";

class Capture extends AudioWorkletProcessor {
  /** processorOptions: rate in Hz, and samples of a piece. */
  constructor({ processorOptions: { rate, size } }) {
    super();
    this._resampler = new Resampler(sampleRate, rate);
    this._samples = new Float32Array(size + this._resampler.most(1024));
    this._size = size;
    this._count = 0;
  }

  process([[input]]) {
    if (input === undefined) return true; // no source is connected yet
    this._count += this._resampler.process(input, this._samples, this._count);
    for (; this._count >= this._size; this._count -= this._size) {
      const piece = this._samples.slice(0, this._size);
      this._samples.copyWithin(0, this._size, this._count);
      const level = Math.sqrt(piece.reduce((sum, x) => sum + x * x, 0) / this._size);
      const payload = pcm16(piece);
      this.port.postMessage({ payload, level }, [payload.buffer]);
    }
    return true;
  }
}

registerProcessor("capture", Capture);

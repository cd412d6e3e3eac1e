// On the audio thread: speech as it comes, heard when the media clock says.
//
// In: { clock }, { heard }, { stamp, pcm }, { stop: id }. Out: { played, level } ten times a second,
// and { stopped: id, played } at once.

import { MediaClock } from "./clock.mjs";
import { PlaybackQueue } from "./playback.mjs";
import { Resampler } from "./resample.mjs";

const REPORTS_PER_S = 10;
const MIN_PHASES = 256; // at another speed a sample is up to 1/256 off its place

class Player extends AudioWorkletProcessor {
  /** processorOptions: rate of the speech in Hz. */
  constructor({ processorOptions: { rate } }) {
    super();
    this._queue = new PlaybackQueue(rate);
    this._clock = new MediaClock(rate);
    this._resampler = new Resampler(rate, sampleRate, { minPhases: MIN_PHASES });
    this._ready = new Float32Array(0); // resampled, not yet heard
    this._numReady = 0;
    this._reportAt = 0;
    this._energy = 0;
    this.port.onmessage = ({ data }) => this._take(data);
  }

  _take(message) {
    if ("clock" in message) {
      this._clock.set(message.clock, currentTime);
    } else if ("heard" in message) {
      this._clock.hear(message.heard, currentTime);
    } else if ("stop" in message) {
      this._numReady = 0;
      this.port.postMessage({ stopped: message.stop, played: this._queue.stop() });
    } else {
      this._queue.push(message.stamp, message.pcm, this._clock.now(currentTime));
    }
  }

  process(inputs, [[output]]) {
    const settled = this._clock.isSettled(currentTime);
    this._resampler.speed = settled ? this._queue.speed(this._clock.now(currentTime)) : 1;
    while (this._numReady < output.length) this._read(output.length - this._numReady);
    output.set(this._ready.subarray(0, output.length));
    this._ready.copyWithin(0, output.length, this._numReady);
    this._numReady -= output.length;
    this._report(output);
    return true;
  }

  _read(missing) {
    const speech = new Float32Array(this._resampler.needed(missing));
    this._queue.read(speech);
    this._room(this._numReady + this._resampler.most(speech.length));
    this._numReady += this._resampler.process(speech, this._ready, this._numReady);
  }

  _room(count) {
    if (this._ready.length >= count) return;
    const larger = new Float32Array(count);
    larger.set(this._ready);
    this._ready = larger;
  }

  _report(output) {
    for (const x of output) this._energy += x * x;
    if (currentTime < this._reportAt) return;
    const level = Math.sqrt((this._energy * REPORTS_PER_S) / sampleRate);
    this.port.postMessage({ played: this._queue.played, level, waiting: this._queue.waiting });
    this._reportAt = currentTime + 1 / REPORTS_PER_S;
    this._energy = 0;
  }
}

registerProcessor("player", Player);

// The media clock of a session by a clock of this machine, which is a little fast or slow.
//
// What is heard of the media clock has been on its way, so it shows at least that much. What was on
// its way the shortest tells it best; only the last minute counts, so that it follows.
//
// Worked example at 16 kHz: at 10.00 s it is heard to show 160,000, at 10.21 s to show 163,200. The
// second was 0.01 s longer on its way; by the first, the clock shows 164,800 at 10.30 s.

const WINDOW_S = 60;

export class MediaClock {
  /** rate: samples a second. */
  constructor(rate) {
    this._rate = rate;
    this.set(0, 0);
  }

  /** At `at`, in seconds of the machine's clock, it shows about `samples`: until more is heard. */
  set(samples, at) {
    this._heard = []; // { at, ahead } by time, each further ahead than all that came after it
    this._ahead = samples - at * this._rate; // of the machine's clock, in samples
    this._since = at;
  }

  /** At `at` it shows `samples` or more. */
  hear(samples, at) {
    const ahead = samples - at * this._rate;
    if (!Number.isFinite(ahead)) return;
    while (this._heard.at(-1)?.ahead <= ahead) this._heard.pop();
    this._heard.push({ at, ahead });
    while (this._heard[0].at < at - WINDOW_S) this._heard.shift();
    this._ahead = this._heard[0].ahead;
  }

  /** What it shows at `at`, in samples. */
  now(at) {
    return this._ahead + at * this._rate;
  }

  /** Whether a minute was heard: then it changes because the clocks differ, and not by what is learnt. */
  isSettled(at) {
    return at - this._since >= WINDOW_S;
  }
}

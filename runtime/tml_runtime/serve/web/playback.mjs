// What is heard when: pieces of speech on the media clock, read in real time by the sound card.
//
// The playhead runs a little behind the media clock. A piece that comes after it has passed moves it
// back, one that is too far ahead moves it on; nothing is played twice.
//
// Worked example at 16 kHz with a margin of 0.06 s (960 samples): the media clock is at 3000 when
// the first piece comes, for sample 3200: the playhead is set to 2040. The next one, for 4800, comes
// when the playhead is at 5000: it goes back to 3840, and 960 samples of silence are heard.
//
// The sound card's clock is not the media clock: at 100 ppm, an hour makes 0.36 s. So the playhead is
// read a little faster or slower, and stays as far behind the media clock as it was.

const MARGIN_S = 0.06; // a piece may be so much later than the one before
const MAX_AHEAD_S = 0.6; // what is further ahead was held up on the line, and is caught up with
const MEND_S = 10; // what the sound card lost in this time, or gained, is mended in the next
const MAX_CHANGE = 0.001; // of the speed: 2 cents, which nobody hears

export class PlaybackQueue {
  constructor(rate) {
    this._rate = rate;
    this._margin = Math.round(MARGIN_S * rate);
    this._maxAhead = Math.round(MAX_AHEAD_S * rate);
    this._pieces = []; // { stamp, pcm }, in order, none of it passed
    this._at = null; // the playhead; null until something came
    this._behind = null; // samples from there to the media clock, once asked for
    this.played = 0; // the media clock after the last sample of speech that was read
  }

  /** Queue int16 samples for sample `stamp`, while the media clock is at `now`. */
  push(stamp, pcm, now) {
    const last = this._pieces.at(-1);
    const end = Math.max(this.played, last === undefined ? 0 : last.stamp + last.pcm.length);
    const overlap = Math.max(0, end - stamp);
    if (overlap >= pcm.length) return;
    const first = stamp + overlap;
    this._pieces.push({ stamp: first, pcm: pcm.subarray(overlap) });
    if (this._at === null) this._move(Math.min(first, Math.round(now)) - this._margin);
    if (first < this._at || first - this._at > this._maxAhead) this._move(first - this._margin);
  }

  /** How fast to read, with the media clock at `now`, to stay as far behind it as before. */
  speed(now) {
    if (this._at === null) return 1;
    this._behind ??= now - this._at;
    const late = (now - this._at - this._behind) / this._rate;
    return 1 + Math.max(-MAX_CHANGE, Math.min(MAX_CHANGE, late / MEND_S));
  }

  /** Fill `output` (float) with what is heard next; silence where nothing is. */
  read(output) {
    output.fill(0);
    if (this._at === null) return;
    const end = this._at + output.length;
    for (const { stamp, pcm } of this._pieces) {
      if (stamp >= end) break;
      const from = Math.max(stamp, this._at);
      const to = Math.min(stamp + pcm.length, end);
      for (let t = from; t < to; t++) output[t - this._at] = pcm[t - stamp] / 32768;
      this.played = to;
    }
    this._at = end;
    this._dropPassed();
  }

  /** Drop what was not played; returns where it stopped. */
  stop() {
    this._pieces = [];
    this._at = null;
    return this.played;
  }

  /** Samples of speech that wait. */
  get waiting() {
    const left = ({ stamp, pcm }) => stamp + pcm.length - Math.max(stamp, this._at);
    return this._pieces.reduce((sum, piece) => sum + left(piece), 0);
  }

  _move(at) {
    this._at = at;
    this._behind = null;
    this._dropPassed();
  }

  _dropPassed() {
    while (this._pieces.length > 0) {
      const { stamp, pcm } = this._pieces[0];
      if (stamp + pcm.length > this._at) return;
      this._pieces.shift();
    }
  }
}

// Streaming sample-rate conversion between whole rates: a polyphase low-pass, windowed sinc. The speed
// may be changed a little on the way, and then each sample has the nearest of the phases.
//
// The passband ends at 7/8 of the lower rate's half, and from that half on everything is 80 dB down:
// to and from 16 kHz, flat to 7 kHz. Delay 2.5 ms there, whatever the other rate.

const ATTENUATION_DB = 80;
const TRANSITION = 1 / 8; // of half the lower rate
const MAX_PHASES = 1280; // a table of 2 MB at most; every rate of a sound card needs fewer

/** Modified Bessel function of the first kind, order 0. */
function besselI0(x) {
  let sum = 1;
  let term = 1;
  for (let k = 1; term > 1e-12 * sum; k++) {
    term *= (x / (2 * k)) ** 2;
    sum += term;
  }
  return sum;
}

function gcd(a, b) {
  return b === 0 ? a : gcd(b, a % b);
}

/** [phases * taps]: the filter at each fraction of an input sample. Each phase passes DC unchanged. */
function makeFilter(from, phases, taps, cutoff) {
  const beta = 0.1102 * (ATTENUATION_DB - 8.7);
  const half = taps / 2;
  const filter = new Float32Array(phases * taps);
  for (let phase = 0; phase < phases; phase++) {
    const row = filter.subarray(phase * taps, (phase + 1) * taps);
    let sum = 0;
    for (let i = 0; i < taps; i++) {
      const at = i + phase / phases - half; // input samples from the middle
      const x = (2 * Math.PI * cutoff * at) / from;
      const window = besselI0(beta * Math.sqrt(Math.max(0, 1 - (at / half) ** 2)));
      row[i] = (x === 0 ? 1 : Math.sin(x) / x) * window;
      sum += row[i];
    }
    for (let i = 0; i < taps; i++) row[i] /= sum;
  }
  return filter;
}

export class Resampler {
  /**
   * Rates in Hz, whole numbers. Throws RangeError for rates that no sound card has. minPhases: for a
   * speed other than 1.
   */
  constructor(from, to, { minPhases = 1 } = {}) {
    if (!Number.isInteger(from) || !Number.isInteger(to) || from <= 0 || to <= 0) {
      throw new RangeError(`${from} Hz to ${to} Hz: rates are whole numbers above 0`);
    }
    const common = gcd(from, to);
    this.phases = to / common;
    this.step = from / common; // phases between two output samples
    if (this.phases > MAX_PHASES) throw new RangeError(`${from} Hz to ${to} Hz: no common step`);
    const finer = Math.ceil(minPhases / this.phases);
    this.phases *= finer;
    this.step *= finer;
    this.speed = 1; // more: input is used up faster
    const half = Math.min(from, to) / 2;
    const width = half * TRANSITION;
    const seconds = (ATTENUATION_DB - 7.95) / (14.36 * width); // Kaiser's formula
    this.taps = Math.ceil(seconds * from);
    this._filter = makeFilter(from, this.phases, this.taps, half - width / 2);
    this._line = new Float32Array(2 * this.taps); // each sample twice, so that a window is in one piece
    this._at = 0;
    this._phase = 0;
  }

  /** As many output samples as `count` input samples can give, or one more. */
  most(count) {
    return Math.floor((count * this.phases) / (this.step * this.speed)) + 1;
  }

  /** The fewest input samples that give `count` output samples now; for a speed other than 1, about. */
  needed(count) {
    if (count === 0) return 0;
    return Math.floor(((count - 1) * this.step * this.speed + this._phase) / this.phases) + 1;
  }

  /** Float32Array in, written to `output` from `offset` on; returns how many samples. */
  process(input, output, offset = 0) {
    const { taps, phases, _filter: filter, _line: line } = this;
    const step = this.step * this.speed;
    let written = offset;
    for (const sample of input) {
      this._at = this._at === 0 ? taps - 1 : this._at - 1; // newest first
      line[this._at] = line[this._at + taps] = sample;
      for (; this._phase < phases; this._phase += step) {
        const row = Math.floor(this._phase) * taps;
        let sum = 0;
        for (let i = 0; i < taps; i++) sum += filter[row + i] * line[this._at + i];
        output[written++] = sum;
      }
      this._phase -= phases;
    }
    return written - offset;
  }
}

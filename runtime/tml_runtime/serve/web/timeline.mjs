// The last seconds on one time axis, the session's media clock: what the model hears, sees, says and
// decides, and how long each tick took of its period.

const SECONDS = 12;
const LABEL_WIDTH = 92;
const GAP = 14;
const LONGEST_LEVEL_S = 0.12; // of one measured level; a longer pause is drawn as one
const ROWS = [
  { name: "hears", height: 62 },
  { name: "sees", height: 50 },
  { name: "speaks", height: 62 },
  { name: "writes", height: 40 },
  { name: "decides", height: 26 },
  { name: "ticks", height: 110 },
];
const AXIS_HEIGHT = 20;
const FONT = "12px ui-sans-serif, system-ui, sans-serif";
const MONO = "12px ui-monospace, Menlo, Consolas, monospace";
const COLOURS = {
  ink: "#e8ecf2", dim: "#9aa7b8", line: "#2a3442", hears: "#6cb2ff", speaks: "#ffa35c",
  tick: "#7ec8a9", late: "#ff6b6b", delegate: "#c79bff", yield: "#7fe0a0", interrupt: "#ffd75e",
};

/** A filled rectangle on whole pixels, so that neighbours neither overlap nor leave a gap. */
function bar(context, left, top, right, bottom) {
  const [x, y] = [Math.round(left), Math.round(top)];
  context.fillRect(x, y, Math.max(1, Math.round(right) - x), Math.max(1, Math.round(bottom) - y));
}

export class Timeline {
  /** periodMs: of a tick. */
  constructor(canvas, { periodMs }) {
    this._canvas = canvas;
    this._periodMs = periodMs;
    this._points = { interrupts: [] };
    for (const { name } of ROWS) this._points[name] = [];
    this.notes = {}; // a few words under a row's name
  }

  /** row: a name of ROWS, or "interrupts". t: seconds of the media clock. */
  add(row, t, value) {
    const points = this._points[row];
    points.push({ t, value });
    while (points[0].t < t - SECONDS - 2) points.shift();
  }

  /** Draw with `now` at the right edge. */
  draw(now) {
    const context = this._fit();
    const width = this._canvas.clientWidth;
    const x = (t) => width - 8 + ((t - now) / SECONDS) * (width - 8 - LABEL_WIDTH);
    let top = 4;
    const area = { context, x, left: LABEL_WIDTH, right: width - 8, now };
    for (const { name, height } of ROWS) {
      this._frame(area, name, top, height);
      context.save();
      context.beginPath();
      context.rect(area.left, top - GAP / 2, area.right - area.left, height + GAP);
      context.clip();
      this[`_${name}`]({ ...area, top, height, points: this._points[name] });
      context.restore();
      if (name === "ticks") this._deadline(area, this._tickY(top, height, this._periodMs));
      top += height + GAP;
    }
    this._axis(area, top);
  }

  static get height() {
    return ROWS.reduce((sum, { height }) => sum + height + GAP, 4 + AXIS_HEIGHT);
  }

  /** For those who cannot see the picture. */
  describe() {
    const ms = this._points.ticks.map(({ value }) => value.ms).sort((a, b) => a - b);
    if (ms.length === 0) return "No tick yet.";
    const missed = this._points.ticks.filter(({ value }) => value.missed || value.skipped).length;
    return `The last ${ms.length} ticks: half took under ${Math.round(ms[ms.length >> 1])} ms, ` +
      `the longest ${Math.round(ms.at(-1))} of ${this._periodMs} ms; ${missed} were missed.`;
  }

  _fit() {
    const { clientWidth } = this._canvas;
    const scale = window.devicePixelRatio || 1;
    const [width, height] = [Math.round(clientWidth * scale), Math.round(Timeline.height * scale)];
    if (this._canvas.width !== width || this._canvas.height !== height) {
      Object.assign(this._canvas, { width, height });
    }
    const context = this._canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, clientWidth, Timeline.height);
    context.textBaseline = "middle";
    return context;
  }

  _frame({ context, left, right }, name, top, height) {
    context.textAlign = "right";
    context.fillStyle = COLOURS.ink;
    context.font = `600 ${FONT}`;
    context.fillText(name, left - 12, top + Math.min(14, height / 2));
    context.fillStyle = COLOURS.dim;
    context.font = FONT;
    context.fillText(this.notes[name] ?? "", left - 12, top + 30, left - 16);
    context.fillStyle = COLOURS.line;
    context.fillRect(left, top + height, right - left, 1);
  }

  _axis({ context, x, left, now }, top) {
    context.font = FONT;
    context.textAlign = "center";
    for (let t = Math.ceil(now - SECONDS); t <= now; t++) {
      if (t < 0 || x(t) < left) continue;
      context.fillStyle = COLOURS.line;
      context.fillRect(x(t), 0, 1, top - GAP / 2);
      context.fillStyle = COLOURS.dim;
      if (t % 2 === 0 && x(t) < this._canvas.clientWidth - 16) context.fillText(`${t} s`, x(t), top + 4);
    }
  }

  _hears(row) {
    this._levels(row, COLOURS.hears);
  }

  _speaks(row) {
    this._levels(row, COLOURS.speaks);
    const { context, x, top, height } = row;
    context.fillStyle = COLOURS.interrupt;
    for (const { t } of this._points.interrupts) context.fillRect(x(t), top, 2, height);
    this._labels(row, this._points.interrupts.map(({ t }) => ({ t, value: "interrupted" })), top + 6);
  }

  /** Each level fills the time since the one before. */
  _levels({ context, x, top, height, points }, colour) {
    context.fillStyle = colour;
    let from = -Infinity;
    for (const { t, value } of points) {
      from = Math.max(from, t - LONGEST_LEVEL_S);
      const half = Math.max(0.5, Math.min(1, 2.5 * Math.sqrt(value)) * (height / 2));
      bar(context, x(from), top + height / 2 - half, x(t), top + height / 2 + half);
      from = t;
    }
  }

  /** Words at their times, those left out that would cover the one before. */
  _labels({ context, x }, points, y) {
    context.font = FONT;
    context.textAlign = "left";
    let end = -Infinity;
    for (const { t, value } of points) {
      if (x(t) < end) continue;
      context.fillText(value, x(t) + 5, y);
      end = x(t) + context.measureText(value).width + 8;
    }
  }

  _sees({ context, x, top, height, points }) {
    for (const { t, value } of points) {
      context.drawImage(value, x(t), top, (height * value.width) / value.height, height);
    }
  }

  _writes({ context, x, top, points }) {
    context.font = MONO;
    context.textAlign = "left";
    context.fillStyle = COLOURS.ink;
    let end = [-Infinity, -Infinity]; // of each line
    for (const { t, value } of points) {
      const line = end[0] <= x(t) ? 0 : 1;
      const from = Math.max(x(t), end[line]);
      context.fillText(value, from, top + 10 + 18 * line);
      end[line] = from + context.measureText(value).width + 4;
    }
  }

  _decides(row) {
    for (const point of row.points) {
      row.context.fillStyle = COLOURS[point.value] ?? COLOURS.ink;
      row.context.fillRect(row.x(point.t), row.top, 2, 20);
    }
    row.context.fillStyle = COLOURS.ink;
    this._labels(row, row.points, row.top + 10);
  }

  _tickY(top, height, ms) {
    return top + height * (1 - Math.min(1, ms / (1.5 * this._periodMs)));
  }

  _ticks({ context, x, top, height, points }) {
    const y = (ms) => this._tickY(top, height, ms);
    const width = x(this._periodMs / 1000) - x(0);
    for (const { t, value } of points) {
      context.fillStyle = value.missed ? COLOURS.late : COLOURS.tick;
      bar(context, x(t), y(value.ms), x(t) + width - 1, top + height);
      if (value.skipped === 0) continue;
      context.fillStyle = COLOURS.late; // a tick that never ran is a block at the foot
      const from = x(t - (value.skipped * this._periodMs) / 1000);
      bar(context, from, top + height - 6, x(t) - 1, top + height);
    }
  }

  _deadline({ context, left, right }, y) {
    context.fillStyle = COLOURS.late;
    context.fillRect(left, y, right - left, 1.5);
    context.font = FONT;
    context.textAlign = "right";
    context.fillText(`${this._periodMs} ms`, left - 12, y);
  }
}

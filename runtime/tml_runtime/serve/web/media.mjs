// Microphone, camera and loudspeaker of the browser.

const FRAME_QUALITY = 0.8; // of a JPEG

const WORDS = {
  NotAllowedError: "the browser was not allowed to use it",
  NotFoundError: "there is none",
  NotReadableError: "another program is using it",
};

/** A track of `kind` ("audio" or "video"). Throws Error with a message for people. */
export async function openTrack(kind, constraints) {
  if (navigator.mediaDevices === undefined) {
    throw new Error("browsers give it to pages from https or localhost only");
  }
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ [kind]: constraints });
    return stream.getTracks()[0];
  } catch (error) {
    throw new Error(WORDS[error.name] ?? error.message, { cause: error });
  }
}

/** Pieces of the microphone: `onPiece({ payload, level })`, payload PCM16 at `rate`. */
export class Microphone {
  static async open(context, { rate, size }, onPiece) {
    const track = await openTrack("audio", {
      echoCancellation: true, // what is played is not heard again
      noiseSuppression: false, // the model hears what there is
      autoGainControl: false,
      channelCount: 1,
    });
    return new Microphone(context, track, { rate, size }, onPiece);
  }

  constructor(context, track, processorOptions, onPiece) {
    this.track = track;
    this._source = context.createMediaStreamSource(new MediaStream([track]));
    this._node = new AudioWorkletNode(context, "capture", { processorOptions });
    this._node.port.onmessage = ({ data }) => onPiece(data);
    this._source.connect(this._node).connect(context.destination); // silence: so that it runs
  }

  close() {
    this.track.stop();
    this._source.disconnect();
    this._node.disconnect();
    this._node.port.onmessage = null;
  }
}

/** The capture clock, which goes on when there is no microphone. */
export class CaptureClock {
  constructor(rate, now = () => performance.now()) {
    this._rate = rate;
    this._now = now;
    this._at = now();
    this._stamp = 0;
    this._heard = false;
  }

  /** Samples, now. */
  get now() {
    return this._stamp + Math.max(0, Math.round(((this._now() - this._at) / 1000) * this._rate));
  }

  /** The stamp of `count` samples of the microphone, which follow those before. */
  take(count) {
    const stamp = this._heard ? this._stamp : this.now;
    this._heard = true;
    this._stamp = stamp + count;
    this._at = this._now();
    return stamp;
  }
}

/** Pictures of the camera, one every `everyMs`: `onFrame({ payload, stamp, canvas })`, a JPEG. */
export class Camera {
  static async open(video, options, onFrame) {
    const track = await openTrack("video", { width: { ideal: 640 }, frameRate: { ideal: 30 } });
    video.srcObject = new MediaStream([track]);
    await video.play();
    return new Camera(video, track, options, onFrame);
  }

  /** size: gives { width, height } for an aspect. clock: the capture clock. */
  constructor(video, track, { size, everyMs, clock }, onFrame) {
    this.track = track;
    this._clock = clock;
    this._video = video;
    this._canvas = document.createElement("canvas");
    Object.assign(this._canvas, size(video.videoWidth / video.videoHeight || 4 / 3));
    this._onFrame = onFrame;
    this._busy = false;
    this._timer = setInterval(() => this._take(), everyMs);
  }

  close() {
    clearInterval(this._timer);
    this.track.stop();
    this._video.srcObject = null;
  }

  async _take() {
    if (this._busy || !this.track.enabled || this._video.readyState < 2) return;
    this._busy = true;
    try {
      this._draw();
      const stamp = this._clock.now;
      const blob = await new Promise((done) => {
        this._canvas.toBlob(done, "image/jpeg", FRAME_QUALITY);
      });
      if (blob === null) return;
      const payload = new Uint8Array(await blob.arrayBuffer());
      this._onFrame({ payload, stamp, canvas: this._canvas });
    } finally {
      this._busy = false;
    }
  }

  /** The middle of the picture, in the canvas's shape. */
  _draw() {
    const { videoWidth, videoHeight } = this._video;
    const { width, height } = this._canvas;
    const scale = Math.min(videoWidth / width, videoHeight / height);
    const [w, h] = [width * scale, height * scale];
    const context = this._canvas.getContext("2d", { alpha: false });
    context.drawImage(this._video, (videoWidth - w) / 2, (videoHeight - h) / 2, w, h, 0, 0, width, height);
  }
}

/** Plays speech on the media clock: `onReport({ played, level, waiting })` ten times a second. */
export class Speaker {
  constructor(context, rate, onReport) {
    this._context = context;
    this._rate = rate;
    this._stops = new Map(); // by number
    this._numStops = 0;
    this._node = new AudioWorkletNode(context, "player", {
      numberOfInputs: 0, outputChannelCount: [1], processorOptions: { rate },
    });
    this._node.port.onmessage = ({ data }) => {
      if (!("stopped" in data)) return onReport({ ...data, played: this._heard(data.played) });
      this._stops.get(data.stopped)?.(this._heard(data.played));
      this._stops.delete(data.stopped);
    };
    this._node.connect(context.destination);
  }

  /** The media clock in samples, now. */
  setClock(samples) {
    this._node.port.postMessage({ clock: samples });
  }

  /** It shows so many samples now, or more. */
  hearClock(samples) {
    this._node.port.postMessage({ heard: samples });
  }

  play(stamp, pcm) {
    this._node.port.postMessage({ stamp, pcm }, [pcm.buffer]);
  }

  /** Drop what was not played; resolves to the last sample heard, undefined if nothing runs. */
  stop() {
    if (this._context.state !== "running") return Promise.resolve(undefined);
    return new Promise((done) => {
      const id = this._numStops++;
      this._stops.set(id, done);
      this._node.port.postMessage({ stop: id });
    });
  }

  close() {
    this._node.disconnect();
    this._node.port.onmessage = null;
  }

  /** What has left the loudspeaker, of what was read for it. */
  _heard(played) {
    return Math.max(0, played - Math.round((this._context.outputLatency || 0) * this._rate));
  }
}

// Whether the user speaks over the speech that is heard. It serves playback alone: the model hears
// everything all the time, and nothing waits for this.

const LOUD = 0.02; // -34 dBFS, root mean square of a piece
const PIECE_MS = 20;
const SPEECH_MS = 160; // that long it is no click or cough
const QUIET_MS = 300; // the utterance is over

export class SpeechOver {
  constructor() {
    this._loudMs = 0;
    this._quietMs = 0;
    this._told = false;
  }

  /** The level of 20 ms, 0 to 1, and whether speech is heard meanwhile. True once an utterance. */
  hear(level, speaking) {
    if (level < LOUD) {
      this._quietMs += PIECE_MS;
      if (this._quietMs >= QUIET_MS) {
        this._loudMs = 0;
        this._told = false;
      }
      return false;
    }
    this._quietMs = 0;
    this._loudMs += PIECE_MS;
    if (this._told || !speaking || this._loudMs < SPEECH_MS) return false;
    this._told = true;
    return true;
  }
}

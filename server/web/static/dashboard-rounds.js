/**
 * Asks again and again: while the page is seen and not paused, later and later while nothing comes.
 */

const LONGEST_SECONDS = 30;
const TIMEOUT_MS = 10_000;

export class Rounds {
  /**
   * `ask(signal)` makes one round, and says whether an answer came. `onRest` is called when asking
   * ends, as the page is paused or not seen any more.
   */
  constructor(every, ask, onRest) {
    Object.assign(this, { every, ask, onRest, failures: 0, paused: false, next: null });
    document.addEventListener("visibilitychange", () => this.#turn());
  }

  /** Seconds until the next round, after one that failed. */
  get wait() {
    return Math.min(LONGEST_SECONDS, this.every * 2 ** this.failures);
  }

  setPaused(paused) {
    this.paused = paused;
    this.#turn();
  }

  /** A round at once, and from then on. */
  start() {
    this.#stop();
    this.failures = 0;
    this.#run();
  }

  #turn() {
    if (this.paused || document.hidden) {
      this.#stop();
      this.onRest();
    } else if (!this.next) this.start();
  }

  #stop() {
    clearTimeout(this.next?.timer);
    this.next?.controller.abort();
    this.next = null;
  }

  async #run() {
    const controller = new AbortController();
    const next = (this.next = { controller, timer: null });
    const timeout = setTimeout(() => controller.abort(new DOMException("", "TimeoutError")), TIMEOUT_MS);
    const begun = performance.now();
    const answered = await this.ask(controller.signal, () => this.next !== next);
    clearTimeout(timeout);
    if (this.next !== next) return; // another round has begun, or none is wanted
    this.failures = answered ? 0 : this.failures + 1;
    const spent = answered ? performance.now() - begun : 0;
    next.timer = setTimeout(() => this.#run(), Math.max(0, 1000 * this.wait - spent));
  }
}

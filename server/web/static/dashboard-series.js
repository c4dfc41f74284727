/** The values of a figure's lines at every sample, computed once for each. */
export class Series {
  constructor(figure) {
    this.lines = figure.lines;
    this.reset();
  }

  /** Another model or window was chosen. */
  reset() {
    this.values = this.lines.map(() => []);
    this.dropped = null;
  }

  update(history, view) {
    const gone = history.dropped - (this.dropped ?? history.dropped);
    this.dropped = history.dropped;
    this.lines.forEach(({ at }, i) => {
      const values = this.values[i];
      values.splice(0, gone);
      while (values.length < history.length) values.push(at(history, values.length, view));
    });
    return this.values;
  }
}

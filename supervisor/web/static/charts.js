// Small charts over the last hour: lines or stacked bars, a column a minute, the current minute last.
//
// A chart has no axis: its tile says what is measured, and its foot says the figures of a minute when one is pointed at. To a
// screen reader it is an image with a sentence. Where nothing is known there is a hole, not a zero.

import { draw, setAttribute } from "./elements.js";
import { minute } from "./words.js";

const WIDTH = 240;
const HEIGHT = 40;
const PAD = 2;

export class Chart {
  /** kind: `line`, each series by itself, or `bars`, one upon the other. names: the series, as CSS knows them (`data-series`). */
  constructor(svg, { kind, names, foot }) {
    this.svg = svg;
    this.kind = kind;
    this.foot = foot;
    this.columns = null;
    this.marker = draw("line", { class: "marker", y1: 0, y2: HEIGHT, visibility: "hidden" });
    this.paths = names.map((name) => draw("path", { "data-series": name, class: kind }));
    setAttribute(svg, "viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    setAttribute(svg, "preserveAspectRatio", "none");
    setAttribute(svg, "role", "img");
    svg.append(...this.paths, this.marker);
    svg.addEventListener("pointermove", (event) => this.point(event));
    svg.addEventListener("pointerleave", () => this.leave());
  }

  /** columns: {first, step_s, series: one list a name}; said: (index) → words for that minute; label: the sentence. */
  update({ first, step_s: step, series }, { said, label, top = null }) {
    this.columns = { first, step, count: series[0].length, said };
    const heights = this.kind === "bars" ? totals(series) : series.flat();
    const high = top ?? Math.max(...heights.filter((value) => value != null), 0);
    const scale = high > 0 ? (HEIGHT - 2 * PAD) / high : 0;
    const shapes = this.kind === "bars" ? bars(series, scale) : series.map((values) => line(values, scale));
    this.paths.forEach((path, index) => setAttribute(path, "d", shapes[index]));
    setAttribute(this.svg, "aria-label", label);
    if (this.at != null) this.tell(this.at);
  }

  point(event) {
    if (!this.columns) return;
    const box = this.svg.getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    this.tell(Math.min(this.columns.count - 1, Math.max(0, Math.floor(share * this.columns.count))));
  }

  tell(index) {
    const { first, step, count, said } = this.columns;
    const x = ((index + 0.5) * WIDTH) / count;
    this.at = index;
    setAttribute(this.marker, "x1", x);
    setAttribute(this.marker, "x2", x);
    setAttribute(this.marker, "visibility", "visible");
    this.foot.dataset.minute = `${minute(first + index * step)}  ${said(index)}`;
  }

  leave() {
    this.at = null;
    setAttribute(this.marker, "visibility", "hidden");
    delete this.foot.dataset.minute;
  }
}

function totals(series) {
  return series[0].map((_, index) => series.reduce((sum, values) => sum + (values[index] ?? 0), 0));
}

function line(values, scale) {
  const step = WIDTH / values.length;
  let path = "";
  let drawn = false;
  values.forEach((value, index) => {
    if (value == null) {
      drawn = false;
      return;
    }
    const x = ((index + 0.5) * step).toFixed(1);
    const y = (HEIGHT - PAD - value * scale).toFixed(1);
    const alone = !drawn && values[index + 1] == null;
    path += alone ? `M${(index * step).toFixed(1)} ${y}h${step.toFixed(1)}` : `${drawn ? "L" : "M"}${x} ${y}`;
    drawn = true;
  });
  return path;
}

function bars(series, scale) {
  const step = WIDTH / series[0].length;
  const base = new Array(series[0].length).fill(HEIGHT);
  return series.map((values) => {
    let path = "";
    values.forEach((value, index) => {
      if (!value) return;
      const height = Math.max(1, value * scale);
      base[index] -= height;
      const x = (index * step + step * 0.12).toFixed(1);
      path += `M${x} ${base[index].toFixed(1)}h${(step * 0.76).toFixed(1)}v${height.toFixed(1)}h-${(step * 0.76).toFixed(1)}z`;
    });
    return path;
  });
}

/** The last value that is known. */
export function latest(values) {
  for (let index = values.length - 1; index >= 0; index -= 1) if (values[index] != null) return values[index];
  return null;
}

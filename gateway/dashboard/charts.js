// Time series as SVG: stacked areas or lines over the last quarter of an hour.  The figure's text is its legend,
// which shows the newest values or those under the pointer, and its table.

import { h, mark, NONE, say, svg } from "./dom.js";

const LEFT = 40, RIGHT = 4, TOP = 8, BOTTOM = 20, HEIGHT = 168;

/** The next number above `most` that makes a good end of an axis. */
function roof(most, least) {
  const need = Math.max(most * 1.08, least);
  const power = 10 ** Math.floor(Math.log10(need));
  return [1, 1.2, 1.6, 2, 3, 4, 5, 6, 8, 10].find((step) => step * power >= need) * power;
}

/** The decades around these values. */
function decades(values) {
  const some = values.filter((value) => value > 0);
  if (!some.length) return [0.01, 1];
  const low = 10 ** Math.floor(Math.log10(Math.min(...some)) + 1e-9);
  return [low, Math.max(10 * low, 10 ** Math.ceil(Math.log10(Math.max(...some)) - 1e-9))];
}

const powers = (low, high) => Array.from({ length: Math.round(Math.log10(high / low)) + 1 }, (_, i) => low * 10 ** i);

export class Chart {
  /** `lines`: {name, label, class, values: columns → numbers or null}; `spec`: {stacked, top, least, format, note}. */
  constructor(figure, lines, spec, onmove) {
    Object.assign(this, { figure, lines, spec, columns: null, times: [], steps: 1, cursor: null });
    this.legend = h("ul", { class: "legend" });
    for (const line of lines) {
      line.shown = h("b", {}, NONE);
      const swatch = `swatch ${spec.stacked || line.class.includes("band") ? "" : "line"} ${line.class}`;
      this.legend.append(h("li", {}, h("i", { class: swatch, "aria-hidden": "true" }), line.label, line.shown));
    }
    this.plot = svg("svg", { class: "plot", role: "img" });
    this.body = h("tbody");
    this.table = h("details", { ontoggle: () => this.tabulate() }, h("summary", {}, "As a table"));
    this.table.append(h("div", { class: "tabled", tabindex: "0", role: "region", "aria-label": `${this.title}, table` },
      h("table", {}, h("caption", { class: "hidden" }, `${this.title}, minute by minute`),
        h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Minute"),
          ...lines.map((line) => h("th", { scope: "col", class: "n" }, line.label)))), this.body)));
    figure.append(this.legend, this.plot, this.table);
    this.plot.addEventListener("pointermove", (event) => onmove(this.at(event)));
    this.plot.addEventListener("pointerleave", () => onmove(null));
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  get title() {
    return this.figure.querySelector("figcaption").textContent;
  }

  /** `columns` by name, one number a step; `times`: when each step ended (Unix); `steps`: as many fit. */
  show(columns, times, steps) {
    Object.assign(this, { columns, times, steps });
    this.values = this.lines.map((line) => line.values(columns));
    this.draw();
    if (this.table.open) this.tabulate();
  }

  point(index) {
    this.cursor = index;
    if (this.columns) this.draw();
  }

  at(event) {
    const x = event.clientX - this.plot.getBoundingClientRect().left;
    const index = Math.round(((x - LEFT) / this.inner) * (this.steps - 1)) - (this.steps - this.times.length);
    return index >= 0 && index < this.times.length ? index : null;
  }

  draw() {
    const width = this.plot.clientWidth;
    if (!width || !this.columns) return;
    this.inner = width - LEFT - RIGHT;
    this.plot.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const stacks = this.spec.stacked ? this.stacked() : this.values;
    const most = Math.max(0, ...stacks.flat().filter((value) => value != null));
    const [bottom, top] = this.spec.log ? decades(stacks.flat()) : [0, this.spec.top ?? roof(most, this.spec.least)];
    const scale = this.spec.log ? (value) => Math.log(Math.max(value, bottom) / bottom) / Math.log(top / bottom) : (value) => value / top;
    const shift = this.steps - this.times.length;
    const x = (i) => LEFT + ((i + shift) / (this.steps - 1)) * this.inner;
    const y = (value) => TOP + (1 - Math.min(1, scale(value))) * (HEIGHT - TOP - BOTTOM);
    const parts = this.axes(width, this.spec.log ? powers(bottom, top) : [0, top / 2, top], y);
    if (this.spec.stacked) {
      for (let i = stacks.length - 1; i >= 0; i--) parts.push(area(stacks[i], null, this.lines[i], x, y, "area"));
    } else {
      for (const [i, line] of this.lines.entries()) {
        if (line.wash) parts.push(area(stacks[i], null, line, x, y, "wash"));
        if (line.band) parts.push(area(stacks[line.band], stacks[i], line, x, y, "wash"));
        if (!line.class.includes("band")) parts.push(svg("path", { class: `line ${line.class}`, d: trace(stacks[i], x, y) }));
      }
    }
    if (this.cursor != null && this.cursor < this.times.length)
      parts.push(svg("line", { class: "hair", x1: Math.round(x(this.cursor)), x2: Math.round(x(this.cursor)), y1: TOP, y2: HEIGHT - BOTTOM }));
    this.plot.replaceChildren(...parts);
    this.read();
  }

  axes(width, ticks, y) {
    const parts = [];
    for (const tick of ticks) {
      const at = Math.round(y(tick));
      parts.push(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: at, y2: at }));
      parts.push(svg("text", { x: LEFT - 7, y: at + 4, "text-anchor": "end" }, this.spec.axis(tick)));
    }
    for (const [share, text, anchor] of [[0, "−15 min", "start"], [1 / 3, "−10", "middle"], [2 / 3, "−5", "middle"], [1, "now", "end"]])
      parts.push(svg("text", { x: LEFT + share * this.inner, y: HEIGHT - 4, "text-anchor": anchor }, text));
    if (!this.values.flat().some((value) => value != null))
      parts.push(svg("text", { x: LEFT + this.inner / 2, y: HEIGHT / 2 - 16, "text-anchor": "middle" }, "Nothing yet"));
    return parts;
  }

  stacked() {
    let below = null;
    return this.values.map((values) => (below = values.map((value, i) => (value == null ? null : value + (below?.[i] ?? 0)))));
  }

  /** The legend: under the pointer, or the newest step. */
  read() {
    const index = this.cursor ?? this.times.length - 1;
    const said = this.lines.map((line, i) => {
      const value = this.spec.format(this.values[i][index]);
      say(line.shown, value);
      return `${line.label} ${value}`;
    });
    if (this.cursor == null) mark(this.plot, "aria-label", `${this.title}, now: ${said.join(", ")}.`);
  }

  tabulate() {
    if (!this.table.open || !this.columns) return;
    const rows = [];
    for (let i = this.times.length - 1; i >= 0 && rows.length < 15; i -= 12) {
      const cells = this.values.map((values) => h("td", { class: "n" }, this.spec.format(values[i])));
      rows.push(h("tr", {}, h("th", { scope: "row" }, rows.length ? `−${rows.length} min` : "now"), ...cells));
    }
    this.body.replaceChildren(...rows);
  }
}

/** Between `tops` and `floors` (or the axis), in as many pieces as there are gaps. */
function area(tops, floors, line, x, y, kind) {
  const runs = [];
  tops.forEach((value, i) => {
    if (value == null) return;
    if (i === 0 || tops[i - 1] == null) runs.push([]);
    runs.at(-1).push(i);
  });
  const at = (i, value) => `${x(i).toFixed(1)} ${y(value).toFixed(1)}`;
  const d = runs.map((run) => "M" + run.map((i) => at(i, tops[i])).join("L") +
    "L" + run.toReversed().map((i) => at(i, floors?.[i] ?? 0)).join("L") + "Z");
  return svg("path", { class: `${kind} ${line.class}`, d: d.join("") });
}

function trace(values, x, y) {
  return values.map((value, i) => value == null ? "" :
    `${i === 0 || values[i - 1] == null ? "M" : "L"}${x(i).toFixed(1)} ${y(value).toFixed(1)}${values[i - 1] == null && values[i + 1] == null ? "h0" : ""}`).join("");
}

/** Sums of each step and the `width - 1` before it. */
export function rolling(values, width) {
  let sum = 0;
  return values.map((value, i) => (sum += value - (i >= width ? values[i - width] : 0)));
}

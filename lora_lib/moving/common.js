// The parts that figures share: elements, controls, a chart. No library, no request.

// One meaning for each colour, that of lora_lib.plots.
const COLORS = {
  blue: "#0072B2", orange: "#E69F00", green: "#009E73", red: "#D55E00", purple: "#CC79A7",
  sky: "#56B4E9", frozen: "#B8C4CE", grey: "#777777",
};

// An element with attributes; a function as an attribute listens: on("input", ...) is oninput.
function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function shape(tag, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function filled(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// A slider over a list of values. `changed` is called with the value; so is `written`, for its text.
function slider(label, values, at, changed, written = String) {
  const text = element("output", { class: "value" }, written(values[at]));
  const input = element("input", {
    type: "range", min: 0, max: values.length - 1, step: 1, value: at,
    "aria-valuetext": written(values[at]),
    oninput: () => {
      const value = values[Number(input.value)];
      text.textContent = written(value);
      input.setAttribute("aria-valuetext", written(value));
      changed(value);
    },
  });
  return element("label", {}, label, input, text);
}

// A choice of names: {what is read: value}.
function choice(label, options, at, changed) {
  const names = Object.keys(options);
  const input = element("select", { onchange: () => changed(options[input.value]) },
    ...names.map((name) => element("option", name === at ? { selected: "" } : {}, name)));
  return element("label", {}, label, input);
}

// A whole number from `least` to `most`. What is no such number is not taken.
function number(label, value, least, most, changed) {
  const input = element("input", {
    type: "number", min: least, max: most, step: 1, value,
    oninput: () => { if (input.value !== "" && input.checkValidity()) changed(Number(input.value)); },
  });
  return element("label", {}, label, input);
}

function button(label, pressed) {
  return element("button", { type: "button", onclick: pressed }, label);
}

function controls(...parts) {
  return element("div", { class: "controls" }, ...parts);
}

// A sentence that is read out when it changes.
function note() {
  return element("p", { class: "note", "aria-live": "polite" });
}

function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

// The matrix that `packed` of lora_lib.moving packed, as rows.
function unpacked({ shape: [rows, columns], unit, bytes }) {
  const packed = Uint8Array.from(atob(bytes), (letter) => letter.charCodeAt(0));
  const Numbers = packed.length === rows * columns ? Int8Array : Int16Array;
  const numbers = new Numbers(packed.buffer);
  return Array.from({ length: rows }, (_, i) =>
    Array.from(numbers.subarray(i * columns, (i + 1) * columns), (number) => number * unit));
}

// Calls draw(width) now and whenever the width of `box` changes.
function fitted(box, draw) {
  let last = 0;
  const again = () => {
    const width = Math.round(box.clientWidth);
    if (width && width !== last) { last = width; draw(width); }
  };
  new ResizeObserver(() => requestAnimationFrame(again)).observe(box);
  again();
}

// A picture in a box, drawn anew at any width, so that its letters keep their size.
// `paint(width, ...state)` gives {height, parts}. Returns show(spoken, ...state), with words for
// those who do not see it.
function picture(box, paint) {
  const made = shape("svg", { role: "img" });
  let width = 0, state = null;
  box.append(made);
  const draw = () => {
    if (!width || !state) return;
    const { height, parts } = paint(width, ...state);
    const size = { viewBox: `0 0 ${width} ${height}`, width, height };
    for (const [name, value] of Object.entries(size)) made.setAttribute(name, value);
    made.replaceChildren(...parts);
  };
  fitted(box, (found) => { width = found; draw(); });
  return (spoken, ...next) => {
    state = next;
    made.setAttribute("aria-label", spoken);
    draw();
  };
}

// Letters at a place of a picture.
function letters(x, y, words, anchor, more) {
  return shape("text", { x, y, "text-anchor": anchor, ...more }, words);
}

// An image of 8 by 8 pixels, each from 0 to 1, in the colour of the letters around it.
function digit(pixels, more) {
  return shape("svg", { viewBox: "0 0 8 8", width: 44, height: 44, ...more },
    ...pixels.map((grey, i) => shape("rect", { x: i % 8, y: Math.floor(i / 8), width: 1.02,
      height: 1.02, fill: "currentColor", "fill-opacity": grey })));
}

// Round numbers that divide [low, high] into about `count` parts.
function ticks(low, high, count = 5) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const off = (times) => Math.abs(Math.log(times * power / rough));
  const step = power * [1, 2, 5, 10].reduce((one, other) => off(other) < off(one) ? other : one);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) {
    found.push(Number((i * step).toPrecision(12)));
  }
  return found;
}

// Round numbers of [low, high] on a logarithmic axis, at most `count` where that can be.
function logTicks(low, high, count = 7) {
  const within = (steps) => {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      found.push(...steps.map((step) => Number(`${step}e${power}`)));
    }
    return found.filter((value) => low <= value && value <= high);
  };
  return [[1, 2, 3, 5], [1, 2, 5], [1, 3]].map(within).find((found) => found.length <= count)
    ?? within([1]);
}

// A chart in a box, of lines over two axes.
//   x, y: {label, low, high, log?, ticks?, written?}
//   lines: [{name, color, points: [[x, y], ...], dash?, dots?, only?, faint?}], `only` for dots alone
//   marks: [{x?, y?, name?}], a dotted line across, or [{x, from, to, color}], an interval of x as a
//     bar above the axis; an end that is null is not known
// Returns a function that draws other lines and marks on the same axes.
function chart(box, { x, y, height = 260 }) {
  const show = picture(box, (width, lines, marks) => {
    const left = 52, right = 12, top = 22, bottom = 42;
    const place = (axis, from, to) => (value) => {
      const scale = axis.log ? Math.log : Number;
      return from + (to - from) * (scale(value) - scale(axis.low))
        / (scale(axis.high) - scale(axis.low));
    };
    const across = place(x, left, width - right), up = place(y, height - bottom, top);
    const inside = (v) => Math.min(height - bottom, Math.max(top, v));
    const parts = [];
    for (const value of y.ticks ?? ticks(y.low, y.high)) {
      parts.push(shape("line", { x1: left, x2: width - right, y1: up(value), y2: up(value),
        stroke: "currentColor", "stroke-opacity": 0.15 }));
      parts.push(letters(left - 6, up(value) + 4, (y.written ?? String)(value), "end"));
    }
    for (const value of x.ticks ?? ticks(x.low, x.high, Math.min(8, width / 70))) {
      parts.push(shape("text", { x: across(value), y: height - bottom + 16,
        "text-anchor": "middle" }, (x.written ?? String)(value)));
    }
    parts.push(shape("line", { x1: left, x2: width - right, y1: height - bottom,
      y2: height - bottom, stroke: "currentColor" }));
    parts.push(shape("text", { x: (left + width - right) / 2, y: height - 6,
      "text-anchor": "middle" }, x.label));
    parts.push(shape("text", { x: 4, y: 12 }, y.label));
    const bars = marks.filter((mark) => mark.from !== undefined);
    for (const [i, { x: middle, from, to, color }] of bars.entries()) {
      const level = height - bottom - 9 - 12 * i;
      const ends = [from === null ? left : across(from), to === null ? width - right : across(to)];
      parts.push(shape("line", { x1: ends[0], x2: ends[1], y1: level, y2: level, stroke: color,
        "stroke-width": 3, "stroke-dasharray": from === null || to === null ? "4 3" : null }));
      parts.push(shape("circle", { cx: across(middle), cy: level, r: 5, fill: color }));
    }
    for (const mark of marks.filter((mark) => mark.from === undefined)) {
      const line = mark.x === undefined
        ? { x1: left, x2: width - right, y1: inside(up(mark.y)), y2: inside(up(mark.y)) }
        : { x1: across(mark.x), x2: across(mark.x), y1: top, y2: height - bottom };
      parts.push(shape("line", { ...line, stroke: "currentColor", "stroke-dasharray": "2 4" }));
      if (mark.name) {
        parts.push(shape("text", { x: Math.min(line.x2, width - right) - 4, y: line.y1 - 5,
          "text-anchor": "end" }, mark.name));
      }
    }
    for (const { color, points, dash, dots, only, faint } of lines) {
      const placed = points.filter((point) => point[1] !== null)
        .map(([a, b]) => [across(a), inside(up(b))]);
      if (!only) {
        parts.push(shape("polyline", { points: placed.map((p) => p.join(",")).join(" "),
          fill: "none", stroke: color, "stroke-width": faint ? 1.4 : 2.2,
          "stroke-opacity": faint ? 0.6 : 1, "stroke-dasharray": dash ?? null }));
      }
      if (dots || only) {
        parts.push(...placed.map(([cx, cy]) => shape("circle", { cx, cy, r: 4, fill: color })));
      }
    }
    // The names stand in a row above the plot, in the colours of their lines.
    let at = width - right;
    for (const { name, color } of [...lines].filter((line) => line.name).reverse()) {
      parts.push(shape("text", { x: at, y: 12, "text-anchor": "end" }, name));
      at -= 7 * name.length + 10;
      parts.push(shape("circle", { cx: at, cy: 8, r: 5, fill: color }));
      at -= 16;
    }
    return { height, parts };
  });
  return (lines, spoken = "", marks = []) => show(spoken, lines, marks);
}

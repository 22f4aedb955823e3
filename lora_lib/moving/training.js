// A pretrained network with LoRA in its linear layers that learns digits in the page.
//   layers: [{weight, bias}], packed, first layer first
//   images: {train, test}, each {pixels, labels}: a string of 64 grey values, 0 to g of base 17,
//     for each upright digit, and a string of what they are
//   starts: {name: [a, b]}: A starts as a N(0, 1 / k), B as b N(0, 1 / r)
//   steps: how long a run is
// The first half is lora_lib.numpy on typed arrays, with the names of its classes and arrays.

// A matrix (rows, columns): its numbers stand in `values`, row after row.
function matrix(rows, columns, values = new Float64Array(rows * columns)) {
  return { rows, columns, values };
}

function fromRows(rows) {
  return matrix(rows.length, rows[0].length, Float64Array.from(rows.flat()));
}

function toRows({ rows, columns, values }) {
  return Array.from({ length: rows }, (_, i) =>
    Array.from(values.subarray(i * columns, (i + 1) * columns)));
}

function chosen(X, rows) {
  const found = matrix(rows.length, X.columns);
  rows.forEach((row, i) => found.values.set(
    X.values.subarray(row * X.columns, (row + 1) * X.columns), i * X.columns));
  return found;
}

// X @ Y. Four rows of Y are added in one pass, which takes half the time of one by one.
function times(X, Y) {
  const { rows, columns } = X, n = Y.columns, x = X.values, y = Y.values;
  const sum = new Float64Array(rows * n);
  for (let i = 0; i < rows; i++) {
    const at = i * n;
    let k = 0;
    for (; k + 4 <= columns; k += 4) {
      const from = i * columns + k, y0 = k * n, y1 = y0 + n, y2 = y1 + n, y3 = y2 + n;
      const x0 = x[from], x1 = x[from + 1], x2 = x[from + 2], x3 = x[from + 3];
      for (let j = 0; j < n; j++) {
        sum[at + j] += x0 * y[y0 + j] + x1 * y[y1 + j] + x2 * y[y2 + j] + x3 * y[y3 + j];
      }
    }
    for (; k < columns; k++) {
      for (let j = 0; j < n; j++) sum[at + j] += x[i * columns + k] * y[k * n + j];
    }
  }
  return matrix(rows, n, sum);
}

// X.T @ Y
function transposedTimes(X, Y) {
  return times(transposed(X), Y);
}

// X @ Y.T
function timesTransposed(X, Y) {
  return times(X, transposed(Y));
}

function transposed(X) {
  const turned = matrix(X.columns, X.rows);
  for (let i = 0; i < X.rows; i++) {
    for (let j = 0; j < X.columns; j++) {
      turned.values[j * X.rows + i] = X.values[i * X.columns + j];
    }
  }
  return turned;
}

function scaled(factor, X) {
  return matrix(X.rows, X.columns, X.values.map((value) => factor * value));
}

// X + Y, where Y may be one row, added to every row of X.
function plus(X, Y) {
  const size = Y.values.length;
  return matrix(X.rows, X.columns, X.values.map((value, i) => value + Y.values[i % size]));
}

class LoRALinear {
  constructor(weight, bias, A, B, scaling) {
    Object.assign(this, { weight, bias, A, B, scaling, trainable: ["A", "B"] });
  }

  forward(x) {
    this.x = x;
    const s = this.scaling;
    const h = plus(timesTransposed(x, this.weight),
      timesTransposed(scaled(s, timesTransposed(x, this.A)), this.B));
    return plus(h, this.bias);
  }

  backward(g) {
    const s = this.scaling, gB = scaled(s, times(g, this.B));
    this.B_grad = transposedTimes(g, scaled(s, timesTransposed(this.x, this.A)));
    this.A_grad = transposedTimes(gB, this.x);
    return plus(times(g, this.weight), times(gB, this.A));
  }

  deltaWeight() {
    return scaled(this.scaling, times(this.B, this.A));
  }
}

class ReLU {
  trainable = [];

  forward(x) {
    this.x = x;
    return matrix(x.rows, x.columns, x.values.map((value) => Math.max(value, 0)));
  }

  backward(g) {
    return matrix(g.rows, g.columns, g.values.map((value, i) => this.x.values[i] > 0 ? value : 0));
  }
}

class Network {
  constructor(layers) {
    this.layers = layers;
  }

  forward(x) {
    return this.layers.reduce((h, layer) => layer.forward(h), x);
  }

  backward(g) {
    return this.layers.reduceRight((grad, layer) => layer.backward(grad), g);
  }

  parameters() {
    return this.layers.flatMap((layer) => layer.trainable.map((name) => [layer, name]));
  }
}

// The mean of -log softmax(logits)[label], and its gradient with respect to the logits.
function softmaxCrossEntropy(logits, labels) {
  const { rows, columns } = logits, grad = matrix(rows, columns);
  let loss = 0;
  for (let i = 0; i < rows; i++) {
    const row = logits.values.subarray(i * columns, (i + 1) * columns);
    const most = row.reduce((one, other) => Math.max(one, other));
    const total = row.reduce((sum, value) => sum + Math.exp(value - most), 0);
    const logP = row.map((value) => value - most - Math.log(total));
    loss -= logP[labels[i]] / rows;
    logP.forEach((value, j) => {
      grad.values[i * columns + j] = (Math.exp(value) - (j === labels[i] ? 1 : 0)) / rows;
    });
  }
  return [loss, grad];
}

class Adam {
  constructor(parameters, lr, [beta1, beta2] = [0.9, 0.999], eps = 1e-8) {
    Object.assign(this, { parameters, lr, beta1, beta2, eps, t: 0 });
    this.m = parameters.map(([layer, name]) => new Float64Array(layer[name].values.length));
    this.v = this.m.map((m) => new Float64Array(m.length));
  }

  step() {
    this.t += 1;
    const { lr, beta1, beta2, eps, t } = this;
    this.parameters.forEach(([layer, name], k) => {
      const p = layer[name].values, g = layer[`${name}_grad`].values;
      const m = this.m[k], v = this.v[k];
      for (let i = 0; i < p.length; i++) {
        m[i] += (1 - beta1) * (g[i] - m[i]);
        v[i] += (1 - beta2) * (g[i] * g[i] - v[i]);
        p[i] -= lr * (m[i] / (1 - beta1 ** t)) / (Math.sqrt(v[i] / (1 - beta2 ** t)) + eps);
      }
    });
  }
}

// The largest output of each row: the network's answer.
function answers(logits) {
  return toRows(logits).map((row) => row.indexOf(Math.max(...row)));
}

// What follows makes runs of that network.

// Random numbers from a seed: uniform on [0, 1), and normal.
function generator(seed) {
  let state = seed >>> 0;
  const uniform = () => {                     // mulberry32
    state = (state + 0x6D2B79F5) >>> 0;
    let z = Math.imul(state ^ (state >>> 15), state | 1);
    z = (z + Math.imul(z ^ (z >>> 7), z | 61)) ^ z;
    return ((z ^ (z >>> 14)) >>> 0) / 2 ** 32;
  };
  const normal = () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
  return { uniform, normal };
}

function shuffled(count, { uniform }) {
  const order = [...Array(count).keys()];
  for (let i = count - 1; i > 0; i--) {
    const j = Math.floor(uniform() * (i + 1));
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}

// The images of a set as a matrix of grey values from 0 to 1, and their labels as numbers.
function digits({ pixels, labels }, turn) {
  const images = pixels.map((image) => [...image].map((letter) => parseInt(letter, 17) / 16));
  return { x: fromRows(turn ? images.map(turned) : images), labels: [...labels].map(Number) };
}

// An 8 x 8 image turned by 90 degrees, counter-clockwise.
function turned(image) {
  return image.map((_, at) => image[8 * (at % 8) + 7 - Math.floor(at / 8)]);
}

function filledWith(rows, columns, draw) {
  return matrix(rows, columns, new Float64Array(rows * columns).map(draw));
}

// The pretrained layers with new adapters, which share the frozen weights.
function inject(base, { rank, alpha, start: [a, b] }, random) {
  const adapted = base.map(({ weight, bias }) => new LoRALinear(weight, bias,
    filledWith(rank, weight.columns, () => a * random.normal() / Math.sqrt(weight.columns)),
    filledWith(weight.rows, rank, () => b * random.normal() / Math.sqrt(rank)), alpha / rank));
  return new Network(adapted.flatMap((layer, i) => i ? [new ReLU(), layer] : [layer]));
}

// A training that goes on step by step. settings: {rank, alpha, rate, start, seed}
class Run {
  constructor(base, set, settings) {
    this.network = inject(base, settings, generator(settings.seed));
    this.optimizer = new Adam(this.network.parameters(), settings.rate);
    // The batches are the same whatever the rank.
    Object.assign(this, { set, random: generator(~settings.seed), order: [], losses: [] });
  }

  // One step on the next digits of the shuffled set.
  step(count = 64) {
    const { x, labels } = this.set;
    if (this.order.length < count) this.order.push(...shuffled(x.rows, this.random));
    const batch = this.order.splice(0, count);
    const [loss, grad] = softmaxCrossEntropy(
      this.network.forward(chosen(x, batch)), batch.map((row) => labels[row]));
    if (!Number.isFinite(loss)) throw new Error(`the loss is ${loss}; lower the learning rate`);
    this.losses.push(loss);
    this.network.backward(grad);
    this.optimizer.step();
  }
}

// How a network does on a set.
function measured(network, { x, labels }) {
  const logits = network.forward(x), [loss] = softmaxCrossEntropy(logits, labels);
  return { loss, accuracy: mean(answers(logits).map((answer, i) => Number(answer === labels[i]))) };
}

function deviation({ values }) {
  const middle = mean(values);
  return Math.sqrt(mean(values.map((value) => (value - middle) ** 2)));
}

// The standard deviations of the first layer's A and B, and that of s B A in units of W's.
function sizes({ layers: [layer] }) {
  return { A: deviation(layer.A), B: deviation(layer.B),
    update: deviation(layer.deltaWeight()) / deviation(layer.weight) };
}

// What follows is seen.

const TASKS = { "turned digits (new)": "turned", "upright digits (known)": "upright" };
const RANKS = [1, 2, 3, 4, 6, 8, 10], ALPHAS = [1, 2, 4, 8, 16, 32, 64, 128];
const RATES = [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1];
const EARLIER = [COLORS.green, COLORS.purple, COLORS.sky, COLORS.red, COLORS.grey];

function percent(share) {
  return `${Math.round(100 * share)}\u00a0%`;
}

// What is said of a run: where it stands and how it does on the test digits.
function sentence({ settings: { task }, losses, results }) {
  const when = losses.length ? `After ${losses.length} steps:` : "Before training:";
  return `${when} loss ${results[task].loss.toFixed(2)} on ${task} test digits. The network reads `
    + `${percent(results.turned.accuracy)} of the turned ones and `
    + `${percent(results.upright.accuracy)} of the upright ones.`;
}

// A row of the table of runs.
function row({ settings: { start, rank, alpha, rate, task }, losses, results, color }) {
  const swatch = element("span", { class: "swatch", style: `background: ${color}` });
  const words = ` ${start}, rank ${rank}, alpha ${alpha}, rate ${rate}, ${task}`;
  const numbers = [losses.length, results[task].loss.toFixed(2),
    percent(results.turned.accuracy), percent(results.upright.accuracy)];
  return element("tr", {}, element("td", {}, swatch, words),
    ...numbers.map((number) => element("td", { class: "number" }, String(number))));
}

function table(runs) {
  const names = ["steps", "loss", "reads turned", "upright"];
  return element("table", { class: "small" },
    element("tr", {}, element("th", { scope: "col" }, "run"),
      ...names.map((name) => element("th", { class: "number", scope: "col" }, name))),
    ...runs.map(row));
}

// One image of each digit. Returns a function that writes what a network reads in them.
function tiles(box, { x, labels }) {
  const kinds = [...new Set(labels)].sort();
  const shown = chosen(x, kinds.map((digit) => labels.indexOf(digit)));
  const words = kinds.map(() => element("div"));
  box.replaceChildren(...toRows(shown).map((image, i) =>
    element("div", {}, digit([...image], { "aria-hidden": "true" }), words[i])));
  return (network) => answers(network.forward(shown)).forEach((answer, i) => {
    words[i].textContent = `${kinds[i]} read as ${answer} ${answer === kinds[i] ? "✓" : "✗"}`;
  });
}

// The two charts of a run: its loss beside those of earlier runs, and the sizes of A and B.
function charts(box, steps) {
  const boxes = [element("div"), element("div")];
  box.append(...boxes);
  const x = { label: "step", low: 0, high: steps, ticks: [0, steps / 3, 2 * steps / 3, steps] };
  const axis = (label, low, high, ticks) => ({ label, low, high, ticks, log: true });
  const loss = chart(boxes[0],
    { x, y: axis("loss on the batch", 0.001, 100, [0.001, 0.01, 0.1, 1, 10, 100]) });
  const size = chart(boxes[1],
    { x, y: axis("standard deviation", 0.0001, 10, [0.0001, 0.001, 0.01, 0.1, 1, 10]) });
  return (run, earlier) => {
    const now = run.losses.map((value, step) => [step, value]);
    loss([...earlier.map(({ losses, color }) => ({ color, faint: true,
      points: losses.map((value, step) => [step, value]) })), { color: run.color, points: now }],
    now.length ? `The loss goes from ${now[0][1].toFixed(2)} to ${now.at(-1)[1].toFixed(2)}.`
      : "No step has been made.");
    // Zero has no place on a logarithmic axis.
    const points = (name) => run.sizes.map((found, step) => [step, found[name] || null]);
    const last = run.sizes.at(-1), dots = run.sizes.length === 1;
    size([{ name: "A", color: COLORS.blue, points: points("A"), dots },
      { name: "B", color: COLORS.orange, points: points("B"), dots, dash: "6 3" }],
    `A has a standard deviation of ${last.A.toFixed(2)}, B of ${last.B.toFixed(2)}.`);
  };
}

function mount(root, { layers, images, starts, steps }) {
  const base = layers.map((layer) => ({
    weight: fromRows(unpacked(layer.weight)), bias: fromRows(unpacked(layer.bias)) }));
  const both = (turn) => ({ train: digits(images.train, turn), test: digits(images.test, turn) });
  const sets = { turned: both(true), upright: both(false) };
  const settings = { task: "turned", start: Object.keys(starts)[0], rank: 8, alpha: 16, rate: 0.003,
    seed: 0 };
  let run, read, earlier = [], count = 0, frame = null;  // frame: the next slice of a training

  const look = () => {
    run.sizes.push(sizes(run.network));
  };
  const measure = () => {
    run.results = { turned: measured(run.network, sets.turned.test),
      upright: measured(run.network, sets.upright.test) };
  };
  const begin = () => {
    if (frame !== null) stop();
    if (run?.losses.length) {
      run.color = EARLIER[count++ % EARLIER.length];
      earlier = [...earlier, run].slice(-EARLIER.length);
    }
    run = new Run(base, sets[settings.task].train, { ...settings, start: starts[settings.start] });
    Object.assign(run, { settings: { ...settings }, color: COLORS.orange, sizes: [] });
    read = tiles(digitsRead, sets[settings.task].test);
    look();
    stop();
  };
  const changed = (name) => (value) => { settings[name] = value; begin(); };

  // As many steps as fit between two pictures, so that the page stays alive.
  const slice = () => {
    const until = performance.now() + 20;
    do {
      run.step();
      look();
      if (run.losses.length % 10 === 0) measure();
    } while (run.losses.length < steps && performance.now() < until);
    if (run.losses.length === steps) stop();
    else go();
  };
  const go = () => {
    frame = requestAnimationFrame(slice);
    show();
  };
  const stop = () => {
    cancelAnimationFrame(frame);
    frame = null;
    measure();
    show();
    said.textContent = sentence(run);
  };
  const train = button("Train", () => {
    if (frame !== null) return stop();
    if (run.losses.length === steps) begin();
    go();
  });

  const said = note(), plots = element("div", { class: "columns" });
  const first = element("p", { class: "note" }), digitsRead = element("div", { class: "tiles" });
  const runs = element("div");
  const draw = charts(plots, steps);
  const show = () => {
    draw(run, earlier);
    const { A, B, update } = run.sizes.at(-1);
    first.textContent = `First layer: std of A ${A.toFixed(2)}, of B ${B.toFixed(2)}; that of `
      + `s B A is ${update.toFixed(1)} times that of W.`;
    read(run.network);
    runs.replaceChildren(table([run, ...[...earlier].reverse()]));
    train.textContent = frame === null ? "Train" : "Stop";
  };
  root.append(
    controls(choice("start", Object.fromEntries(Object.keys(starts).map((name) => [name, name])),
      settings.start, changed("start")),
    choice("train on", TASKS, Object.keys(TASKS)[0], changed("task")),
    slider("rank", RANKS, RANKS.indexOf(settings.rank), changed("rank")),
    slider("alpha", ALPHAS, ALPHAS.indexOf(settings.alpha), changed("alpha")),
    slider("learning rate", RATES, RATES.indexOf(settings.rate), changed("rate"))),
    controls(train, button("Start again", begin),
      button("Start again, drawn anew", () => { settings.seed++; begin(); })),
    said, plots, first, digitsRead, runs);
  begin();
}

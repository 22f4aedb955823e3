// Does my model fit? The memory of one training step, worked out from shapes alone.
//   {presets: {name: {shape, source}}, gpus: [{gb, name}], at: {model, rank, ...}}
// A shape, here `model`, has the fields of lora_lib.costs.ModelShape; `at` is a start other than
// START. What is counted, and the rule by which autograd keeps, are those of lora_lib.costs.memory.

const TARGETS = {
  "attention: q, v": ["q_proj", "v_proj"],
  "attention: q, k, v, o": ["q_proj", "k_proj", "v_proj", "o_proj"],
  "all linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
};
const PRECISIONS = {
  "32 bits": { weight_bytes: 4, activation_bytes: 4, quantized: false },
  "16 bits": { weight_bytes: 2, activation_bytes: 2, quantized: false },
  "NF4, 4 bits": { weight_bytes: 2, activation_bytes: 2, quantized: true },
};
const PARTS = { weights: COLORS.frozen, gradients: COLORS.green, optimizer: COLORS.purple,
  activations: COLORS.sky };
const START = { method: "LoRA", rank: 8, targets: "attention: q, v", batch: 1, sequence: 512,
  precision: "16 bits", checkpointing: false };
const OWN = "own dimensions";
const RANKS = [1, 2, 4, 8, 16, 32, 64, 128, 256], BATCHES = [1, 2, 4, 8, 16, 32, 64];
const LENGTHS = [128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768];

// ---- parameters ----

// [out_features, in_features] of each linear layer in one Transformer layer.
function linears({ hidden_size: h, intermediate_size: m, head_dim, num_heads, num_kv_heads }) {
  const q = head_dim * num_heads, kv = head_dim * num_kv_heads;
  return { q_proj: [q, h], k_proj: [kv, h], v_proj: [kv, h], o_proj: [h, q],
    gate_proj: [m, h], up_proj: [m, h], down_proj: [h, m] };
}

function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}

function linearParameters(model) {
  return model.num_layers * sum(Object.values(linears(model)).map(([d, k]) => d * k));
}

function parameters(model) {
  const { hidden_size: h, head_dim, num_heads, num_kv_heads, num_layers } = model;
  const biases = model.qkv_bias ? head_dim * (num_heads + 2 * num_kv_heads) : 0;
  const norms = 2 * h + (model.qk_norm ? 2 * head_dim : 0);
  const ends = (model.tied_embeddings ? 1 : 2) * model.vocab_size * h + h;
  return linearParameters(model) + num_layers * (biases + norms) + ends;
}

function adapterParameters(model, rank, targets) {
  const shapes = linears(model);
  return model.num_layers * sum(targets.map((name) => rank * (shapes[name][0] + shapes[name][1])));
}

// ---- bytes ----

// A weight in NF4: half a byte a number, and what its blocks of 64 keep.
function nf4Bytes(outFeatures, inFeatures, double) {
  const blocks = Math.ceil(outFeatures * inFeatures / 64), groups = Math.ceil(blocks / 256);
  return blocks * 32 + (double ? groups * (256 + 4) + 4 : 4 * blocks);
}

function frozenBytes(model, { weight_bytes, quantized, double }) {
  if (!quantized) return parameters(model) * weight_bytes;
  const stored = Object.values(linears(model)).map(([d, k]) => nf4Bytes(d, k, double));
  return (parameters(model) - linearParameters(model)) * weight_bytes
    + model.num_layers * sum(stored);
}

// What the forward pass keeps: a set of tensors for each layer, with what the layer was given, and
// one for the head and the loss.
function kept(model, { batch, sequence, rank, targets, casts }) {
  const tokens = batch * sequence, full = rank === null, shapes = linears(model);
  const tensor = (numel, needs, float32 = false) => ({ numel, needs, float32 });
  const tables = tensor(2 * sequence * model.head_dim, false);       // cosines and sines
  let keep = new Set();

  const norm = (x, rows = tokens) => {
    if (x.needs) keep.add(tensor(x.numel, true, true)).add(tensor(rows, true, true));
    if (full) keep.add(tensor(x.numel, true));
    return tensor(x.numel, x.needs || full);
  };
  const linear = (x, name) => {
    const [d, k] = name === "head" ? [model.vocab_size, model.hidden_size] : shapes[name];
    const adapted = !full && targets.includes(name);
    if (full || adapted) keep.add(x);
    if (adapted) keep.add(tensor(tokens * rank, true));
    if (adapted && casts) keep.add(tensor(d * rank, true));
    if (adapted && casts && x.needs) keep.add(tensor(rank * k, true));
    return tensor(tokens * d, x.needs || full || adapted);
  };
  const attention = (x) => {
    let [q, k, v] = ["q_proj", "k_proj", "v_proj"].map((name) => linear(x, name));
    if (model.qk_norm) {
      q = norm(q, tokens * model.num_heads);
      k = norm(k, tokens * model.num_kv_heads);
    }
    const out = tensor(q.numel, q.needs || k.needs || v.needs);
    if (out.needs) {
      keep.add(q).add(k).add(v).add(out).add(tensor(tokens * model.num_heads, true, true));
    }
    if (q.needs || k.needs) keep.add(tables);
    return linear(out, "o_proj");
  };
  const mlp = (x) => {
    const gate = linear(x, "gate_proj"), up = linear(x, "up_proj");
    if (gate.needs) keep.add(gate).add(up);
    if (up.needs) keep.add(tensor(gate.numel, gate.needs));
    return linear(tensor(up.numel, gate.needs || up.needs), "down_proj");
  };
  const plus = (x, y) => tensor(x.numel, x.needs || y.needs);

  let x = tensor(tokens * model.hidden_size, full);
  const layers = [];
  for (let i = 0; i < model.num_layers; i++) {
    const given = x;
    keep = new Set();
    x = plus(x, attention(norm(x)));
    x = plus(x, mlp(norm(x)));
    layers.push({ given, keep });
  }
  keep = new Set();
  linear(norm(x), "head");
  keep.add(tensor(tokens * model.vocab_size, true, true));
  return { layers, ends: keep };
}

function activationBytes(model, step) {
  const each = step.activation_bytes;
  const bytes = (tensors) => sum([...tensors].map(
    (one) => one.numel * (one.float32 ? Math.max(4, each) : each)));
  const { layers, ends } = kept(model, step);
  if (!step.checkpointing) {                     // the tables count once for all layers
    return bytes(new Set(layers.flatMap((layer) => [...layer.keep]))) + bytes(ends);
  }
  // A layer's first norm keeps the layer's input itself, unless it must make a float32 of it.
  const again = layers.map(({ given, keep }) =>
    bytes(keep) - (given.needs && each >= 4 ? bytes([given]) : 0));
  return bytes(layers.map((layer) => layer.given)) + Math.max(bytes(ends), ...again);
}

// Bytes by part. `step` has the arguments of lora_lib.costs.memory, its targets as names.
function memory(model, step) {
  const full = step.rank === null;
  const trained = full ? parameters(model) : adapterParameters(model, step.rank, step.targets);
  const casts = step.quantized && step.activation_bytes !== step.trainable_bytes;
  return {
    weights: (full ? 0 : frozenBytes(model, step)) + trained * step.trainable_bytes,
    gradients: trained * step.trainable_bytes,
    optimizer: trained * step.trainable_bytes * step.moments,
    activations: activationBytes(model, { ...step, casts }),
  };
}

// What the backward pass of the loss holds for a moment; `memory` leaves it out.
function lossBuffers(model, { batch, sequence }) {
  return 2 * 4 * batch * sequence * model.vocab_size;
}

// ---- the choice that the page offers ----

function stepOf(state) {
  return { batch: state.batch, sequence: state.sequence, checkpointing: state.checkpointing,
    rank: state.method === "LoRA" ? state.rank : null, targets: TARGETS[state.targets],
    ...PRECISIONS[state.precision], double: true, trainable_bytes: 4, moments: 2 };
}

// Why a choice cannot be, or nothing.
function problem(model, step) {
  if (model.num_heads % model.num_kv_heads) {
    return "The number of heads must be a multiple of the number of key and value heads.";
  }
  if (step.rank === null) {
    return step.quantized
      ? "A weight in NF4 cannot be trained. Choose LoRA, or 32 or 16 bits." : "";
  }
  const most = Math.min(...step.targets.flatMap((name) => linears(model)[name]));
  return step.rank > most ? `The rank can be ${most} at most: a layer is no wider.` : "";
}

// How a GPU of so many GB takes it: "yes", "hardly" if the loss's buffers do not fit too, or "no".
function fit(gb, total, buffers) {
  return total > gb * 1e9 ? "no" : total + buffers > gb * 1e9 ? "hardly" : "yes";
}

function gigabytes(bytes) {
  return `${(bytes / 1e9).toFixed(2)} GB`;
}

function megabytes(bytes) {
  return `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;
}

// ---- what is seen ----

// A bar of the parts, on a scale that ends at the size of a GPU.
function memoryBar(width, found, gpu) {
  const total = sum(Object.values(found)), end = gpu ? gpu.gb * 1e9 : total;
  const across = (bytes) => bytes / end * (width - 2), parts = [];
  let at = 1;
  for (const [name, bytes] of Object.entries(found)) {
    parts.push(shape("rect", { x: at, y: 24, width: across(bytes), height: 34,
      fill: PARTS[name] }));
    at += across(bytes);
  }
  parts.push(shape("rect", { x: 1, y: 24, width: width - 2, height: 34, fill: "none",
    stroke: "currentColor", "stroke-opacity": 0.5 }));
  const left = at < width - 170;
  parts.push(shape("text", { x: left ? at + 6 : 1, y: left ? 45 : 16, "font-weight": 600 },
    gigabytes(total)));
  parts.push(letters(width - 1, 16,
    gpu ? `${gpu.gb} GB: ${gpu.name}` : "more than any of these GPUs", "end"));
  return { height: 62, parts };
}

// With room above, which the book's theme would take away.
function paragraph() {
  return element("p", { style: "margin: .75rem 0" });
}

function swatch(color) {
  return element("span", { class: "swatch", style: `background:${color}` });
}

function cells(tag, ...texts) {
  return element("tr", {}, ...texts.map((text, i) =>
    element(tag, i === 1 ? { class: "number" } : {}, ...[text].flat())));
}

function partsTable(found) {
  const total = sum(Object.values(found));
  return element("table", {}, cells("th", "part", "memory"),
    ...Object.entries(found).map(([name, bytes]) =>
      cells("td", [swatch(PARTS[name]), ` ${name}`], gigabytes(bytes))),
    cells("th", "in all", gigabytes(total)));
}

function gpuTable(gpus, total, buffers) {
  const says = (gb) => {
    const left = gb * 1e9 - total, taken = fit(gb, total, buffers);
    return `${taken}, ${gigabytes(Math.abs(left))} ${left < 0 ? "short" : "left"}`;
  };
  return element("table", {}, cells("th", "a GPU", "has", "holds it?"),
    ...gpus.map(({ gb, name }) => cells("td", name, `${gb} GB`, says(gb))));
}

function mount(root, { presets, gpus, at }) {
  const state = { ...START, ...at };
  let dimensions = { ...presets[state.model].shape };
  const said = note(), out = element("div", { class: "columns" });
  const counted = paragraph(), left = paragraph();
  const bar = element("div"), draw = picture(bar, memoryBar);
  const update = () => {
    const step = stepOf(state), wrong = problem(dimensions, step);
    for (const box of [bar, counted, left]) box.hidden = Boolean(wrong);
    for (const label of onlyLora) label.querySelector("input, select").disabled = !step.rank;
    if (wrong) { said.textContent = wrong; out.replaceChildren(); return; }
    const found = memory(dimensions, step), total = sum(Object.values(found));
    const buffers = lossBuffers(dimensions, step), all = parameters(dimensions);
    const trained = step.rank === null ? all
      : adapterParameters(dimensions, step.rank, step.targets);
    const gpu = gpus.find(({ gb }) => fit(gb, total, buffers) === "yes");
    draw("the parts of the table below as a bar", found, gpu);
    said.textContent = `One training step takes ${gigabytes(total)}. ` + (gpu
      ? `The smallest of these GPUs that holds it has ${gpu.gb} GB.`
      : "None of these GPUs holds it alone.");
    counted.textContent = `${all.toLocaleString("en")} parameters, ` + (step.rank === null
      ? `all trained; the file to keep has ${gigabytes(4 * all)}.`
      : `${trained.toLocaleString("en")} trained beside them (${(100 * trained / all).toFixed(2)} `
        + `%); the adapter's file has ${megabytes(4 * trained)}.`);
    left.textContent = "Left out: what lives for a moment only. For the gradients of the loss that "
      + "is two numbers for every token and every word of the vocabulary, "
      + `${gigabytes(buffers)} here; where it does not fit too, the table says "hardly". The GPU's `
      + "driver and PyTorch's allocator take some more. 1 GB is a billion bytes.";
    out.replaceChildren(element("div", {}, partsTable(found)),
      element("div", {}, gpuTable(gpus, total, buffers)));
  };
  const set = (name) => (value) => { state[name] = value; update(); };
  const named = (options) => Object.fromEntries(options.map((name) => [name, name]));

  const fields = element("div", { class: "controls" }), source = element("p", {});
  const models = choice("model", named([...Object.keys(presets), OWN]), state.model, (name) => {
    state.model = name;
    if (name !== OWN) dimensions = { ...presets[name].shape };
    dimensionFields();
    update();
  });
  const changed = (name) => (value) => {
    dimensions[name] = value;
    state.model = models.querySelector("select").value = OWN;
    source.replaceChildren();
    update();
  };
  const dimensionFields = () => {
    const whole = { "vocabulary": ["vocab_size", 1e6], "width": ["hidden_size", 1e5],
      "MLP's inner width": ["intermediate_size", 1e6], "layers": ["num_layers", 1000],
      "heads": ["num_heads", 1000], "key and value heads": ["num_kv_heads", 1000],
      "numbers a head": ["head_dim", 10000] };
    const flags = { "head is the embedding": "tied_embeddings", "biases on q, k, v": "qkv_bias",
      "norms on q, k": "qk_norm" };
    fields.replaceChildren(
      ...Object.entries(whole).map(([label, [name, most]]) =>
        number(label, dimensions[name], 1, most, changed(name))),
      ...Object.entries(flags).map(([label, name]) => choice(label, { no: false, yes: true },
        dimensions[name] ? "yes" : "no", changed(name))));
    source.replaceChildren(...(state.model === OWN ? [] : ["Read in ",
      element("a", { href: presets[state.model].source }, "this configuration"), "."]));
  };
  dimensionFields();

  const onlyLora = [
    slider("rank", RANKS, RANKS.indexOf(state.rank), set("rank")),
    choice("adapters on", named(Object.keys(TARGETS)), state.targets, set("targets")),
  ];
  root.append(
    controls(models,
      choice("train", named(["LoRA", "full fine-tuning"]), state.method, set("method")),
      ...onlyLora,
      choice("precision", named(Object.keys(PRECISIONS)), state.precision, set("precision")),
      slider("batch", BATCHES, BATCHES.indexOf(state.batch), set("batch")),
      slider("tokens a row", LENGTHS, LENGTHS.indexOf(state.sequence), set("sequence")),
      choice("activations", { "kept": false, "computed again (checkpointing)": true },
        state.checkpointing ? "computed again (checkpointing)" : "kept", set("checkpointing"))),
    element("details", {}, element("summary", {}, "dimensions"), fields, source),
    said, bar, counted, out, left);
  update();
}

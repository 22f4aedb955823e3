// The change of full fine-tuning, cut to a rank, beside LoRA trained at that rank.
//   full: the accuracy of each network, fine-tuned fully
//   ranks: [{rank, numbers, energy, cut, lora, read: {cut, lora}}]
//     numbers: how many B and A have together, energy: the share that the cut keeps
//     cut, lora: the accuracy of each network; lora is null where it was not trained
//     read: the first network's answers to the images, a character each
//   images: {pixels, labels}: a string of 64 pixels for each, 0 to g of base 17; the true answers
//   whole: the change of one layer, packed, cut: {left, right}, whose product it is
//   lora: {rank: {left, right}}, LoRA's change of the same layer

// The sum of the first `rank` columns of left times the same rows of right.
function product(left, right, rank) {
  return left.map((row) => right[0].map((_, j) => {
    let sum = 0;
    for (let i = 0; i < rank; i++) sum += row[i] * right[i][j];
    return sum;
  }));
}

// How large a number has the full colour: three times the root of the mean square.
function strong(matrix) {
  return 3 * Math.sqrt(mean(matrix.flat().map((value) => value * value)));
}

function right(read, labels) {
  return [...read].filter((answer, i) => answer === labels[i]).length;
}

// What is said of a rank.
function sentence({ rank, numbers, energy, cut, lora }) {
  const part = (scores) => mean(scores).toFixed(2);
  return `Rank ${rank}, ${numbers.toLocaleString("en")} numbers in B and A of the three layers. Cut, `
    + `the change keeps ${Math.round(100 * energy)} % of the middle layer's energy and reaches an `
    + `accuracy of ${part(cut)}. LoRA `
    + (lora === null ? "was not trained at this rank." : `trained at this rank reaches ${part(lora)}.`);
}

// What is said of the answers.
function count({ read }, labels) {
  return `The first network's answers, right of ${labels.length}: cut ${right(read.cut, labels)}`
    + (read.lora === null ? "." : `, LoRA ${right(read.lora, labels)}.`);
}

// Two rows of dots on one axis of accuracy, a dot for each network.
function strip(box, full) {
  return picture(box, (width, rows) => {
    const left = 8, right = 16, top = 18, step = 52, bottom = top + 2 * step;
    const across = (value) => left + (width - left - right) * value;
    const line = (x1, y1, x2, y2, more) => shape("line", { x1, y1, x2, y2, stroke: "currentColor",
      ...more });
    const parts = [line(left, bottom, width - right, bottom)];
    for (const value of [0, 0.2, 0.4, 0.6, 0.8, 1]) {
      parts.push(line(across(value), top, across(value), bottom, { "stroke-opacity": 0.15 }),
        letters(across(value), bottom + 16, String(value), "middle"));
    }
    const whole = across(mean(full));
    parts.push(letters(across(0.5), bottom + 34, "accuracy on turned digits", "middle"),
      line(whole, top, whole, bottom, { "stroke-dasharray": "2 4" }),
      letters(whole, top - 5, "full fine-tuning", "end"));
    for (const [i, { name, color, scores }] of rows.entries()) {
      const y = top + i * step + 36;
      parts.push(letters(left, y - 18, name));
      if (!scores) continue;
      parts.push(...scores.map((score) => shape("circle", { cx: across(score), cy: y, r: 5,
        fill: color, "fill-opacity": 0.75 })));
      parts.push(line(across(mean(scores)), y - 10, across(mean(scores)), y + 10,
        { stroke: color, "stroke-width": 3 }));
    }
    return { height: bottom + 40, parts };
  });
}

// A matrix as a picture: the larger a number, plus or minus, the stronger the colour.
function painting(name) {
  const canvas = element("canvas", { role: "img" }), caption = element("div", { class: "small" });
  const show = (matrix, color, most, words) => {
    caption.textContent = words;
    canvas.setAttribute("aria-label", `${name}: ${words}`);
    if (matrix === null) return canvas.getContext("2d").reset();
    [canvas.height, canvas.width] = [matrix.length, matrix[0].length];
    const context = canvas.getContext("2d");
    const seen = context.createImageData(canvas.width, canvas.height);
    const levels = [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16));
    matrix.flat().forEach((value, i) => {
      seen.data.set([...levels, Math.min(255, 255 * Math.abs(value) / most)], 4 * i);
    });
    context.putImageData(seen, 0, 0);
  };
  return [element("div", {}, canvas, caption), show];
}

function mount(root, data) {
  const { full, ranks, images, lora } = data, { labels } = images;
  const pair = ({ left, right }) => [unpacked(left), unpacked(right)];
  const whole = unpacked(data.whole), most = strong(whole), parts = pair(data.cut);
  const box = element("div"), draw = strip(box, full), said = note();
  const [wholeBox, paintWhole] = painting("the change of the middle layer");
  const [cutBox, paintCut] = painting("the same, cut");
  const [loraBox, paintLora] = painting("LoRA's change of the same layer");
  paintWhole(whole, COLORS.blue, most, "the whole change");
  const marks = [...labels].map(() => [element("div"), element("div")]);
  const tiles = element("div", { class: "tiles" }, ...[...images.pixels].map((pixels, i) =>
    element("div", {}, digit([...pixels].map((level) => parseInt(level, 17) / 16),
      { role: "img", "aria-label": `a turned ${labels[i]}` }), ...marks[i])));
  const counted = note();

  const change = (at) => {
    const { rank, cut, read } = at, trained = at.lora;
    draw(`the accuracies of ${full.length} networks, cut and trained, as dots`, [
      { name: `full change, cut to rank ${rank}`, color: COLORS.blue, scores: cut },
      { name: `LoRA, ${trained ? "" : "not "}trained at rank ${rank}`, color: COLORS.orange,
        scores: trained }]);
    paintCut(product(...parts, rank), COLORS.blue, most, `cut to rank ${rank}`);
    const made = lora[rank] && product(...pair(lora[rank]), rank);
    paintLora(made ?? null, COLORS.orange, made && strong(made),
      made ? `LoRA, rank ${rank}` : "LoRA, not trained at this rank");
    marks.forEach((two, i) => [["cut", read.cut], ["LoRA", read.lora]].forEach(([name, all], j) => {
      two[j].textContent = all === null ? `${name} –`
        : `${name} ${all[i]} ${all[i] === labels[i] ? "✓" : "✗"}`;
    }));
    said.textContent = sentence(at);
    counted.textContent = count(at, labels);
  };
  root.append(
    controls(slider("rank", ranks, 0, change, ({ rank }) => String(rank))),
    said,
    element("div", { class: "columns" }, box,
      element("div", { class: "pictures" }, wholeBox, cutBox, loraBox)),
    counted, tiles);
  change(ranks[0]);
}

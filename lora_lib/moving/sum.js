// Two adapters in force at the same time, each with a weight, and what is left of both skills.
//   names: the two adapters, which are called as their tasks
//   weights: the weights that were tried, of either
//   right: right[i][j]: with weights[i] of the first and weights[j] of the second, the shares of
//     right answers, [[first task, second task], ...], a pair for each seed
//   together: such pairs for one adapter, trained on both tasks

// The shares of one task, by seed.
function shares(pairs, task) {
  return pairs.map((pair) => pair[task]);
}

// The mean over the seeds of the share on the worse task.
function worse(pairs) {
  return mean(pairs.map((pair) => Math.min(...pair)));
}

// What is said of two weights.
function sentence([one, other], names, pairs, together) {
  const part = (task) => `${names[task]} ${mean(shares(pairs, task)).toFixed(2)}`;
  return `${one} of ${names[0]} + ${other} of ${names[1]}: share of right answers, the mean of `
    + `${pairs.length} seeds, ${part(0)} and ${part(1)}; on the worse task ${worse(pairs).toFixed(2)}`
    + `. One adapter, trained on both, has ${worse(together).toFixed(2)} there.`;
}

// The map: the worse task's share for every pair of weights, the stronger the colour the larger.
function map(box, { names, weights, right }) {
  return picture(box, (width, chosen) => {
    const left = 64, top = 22, side = Math.min(56, (width - left - 4) / weights.length);
    const whole = side * weights.length, parts = [letters(0, 12, `weight of ${names[0]}`)];
    weights.forEach((one, i) => {
      const y = top + whole - (i + 1) * side;
      parts.push(letters(left - 8, y + side / 2 + 4, String(one), "end"),
        letters(left + (i + 0.5) * side, top + whole + 16, String(one), "middle"));
      weights.forEach((other, j) => {
        const x = left + j * side, here = chosen[0] === i && chosen[1] === j;
        const share = worse(right[i][j]);
        parts.push(shape("rect", { x: x + 2, y: y + 2, width: side - 4, height: side - 4,
          fill: COLORS.orange, "fill-opacity": 0.08 + 0.92 * share, stroke: "currentColor",
          "stroke-width": here ? 3 : 0 }),
        letters(x + side / 2, y + side / 2 + 4, share.toFixed(2), "middle"));
      });
    });
    parts.push(letters(left + whole / 2, top + whole + 36, `weight of ${names[1]}`, "middle"));
    return { height: top + whole + 42, parts };
  });
}

// A row of dots for each task, one for each seed, on one axis from 0 to 1.
function rows(box, names, together) {
  return picture(box, (width, pairs) => {
    const left = 8, right = 16, step = 64, bottom = 4 + step * names.length;
    const across = (share) => left + (width - left - right) * share;
    const parts = [];
    for (const share of [0, 0.25, 0.5, 0.75, 1]) {
      parts.push(shape("line", { x1: across(share), x2: across(share), y1: 4, y2: bottom,
        stroke: "currentColor", "stroke-opacity": 0.15 }),
      letters(across(share), bottom + 16, String(share), "middle"));
    }
    parts.push(letters(across(0.5), bottom + 36, "share of right answers, a dot for each seed",
      "middle"));
    names.forEach((name, task) => {
      const y = 4 + task * step;
      parts.push(letters(left, y + 14, `asked for ${name}`));
      const dots = (values, level, more) => values.forEach((share) => parts.push(
        shape("circle", { cx: across(share), cy: level, r: 5, ...more })));
      dots(shares(together, task), y + 28, { fill: "none", stroke: "currentColor" });
      dots(shares(pairs, task), y + 44, { fill: COLORS.orange, "fill-opacity": 0.8 });
    });
    return { height: bottom + 40, parts };
  });
}

function mount(root, data) {
  const { names, weights, right, together } = data, at = [weights.length - 1, 0];
  const said = note(), mapBox = element("div"), rowsBox = element("div");
  const paint = map(mapBox, data), dot = rows(rowsBox, names, together);
  const change = () => {
    const pairs = right[at[0]][at[1]];
    const words = sentence(at.map((i) => weights[i]), names, pairs, together);
    said.textContent = words;
    paint(`share of right answers on the worse task for every pair of weights; ${words}`, [...at]);
    dot(`shares of right answers on both tasks; ${words}`, pairs);
  };
  const weight = (task) => slider(`weight of ${names[task]}`, weights, at[task], (value) => {
    at[task] = weights.indexOf(value);
    change();
  });
  root.append(
    controls(weight(0), weight(1)), said,
    element("div", { class: "columns" }, mapBox, element("div", {}, rowsBox,
      element("p", { class: "small" },
        "Filled: the sum of both adapters. Rings: one adapter, trained on both tasks."))));
  change();
}

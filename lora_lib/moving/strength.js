// A model's answers against the strength of its adapter.
//   asked: [{request, expected}]
//   strengths: [{strength, loss, right, said: [{text, right}]}], weakest first; loss in nats per
//     token, right: the share of the test's answers that are right; said: an answer to each request
//   tested: how many answers the test wants

// What is said of a strength.
function sentence({ strength, loss, right }, tested) {
  const name = strength === 0 ? " (the base alone)" : strength === 1 ? " (as trained)" : "";
  return `Strength ${strength}${name}: a loss of ${loss.toFixed(2)} nats per token, `
    + `${Math.round(100 * right)} % of the ${tested} calls of the test are right.`;
}

// A request, and a function that puts an answer beside the expected one.
function exchange({ request, expected }) {
  const text = element("code"), mark = element("span");
  const box = element("div", { class: "exchange" },
    element("div", {}, "“", request, "”"),
    element("div", { class: "columns" },
      element("div", {}, element("div", { class: "small" }, "the model says ", mark), text),
      element("div", {}, element("div", { class: "small" }, "right would be"),
        element("code", {}, expected))));
  return [box, (said) => {
    text.textContent = said.text;
    mark.textContent = said.right ? "✓ right" : "✗ not right";
  }];
}

function mount(root, { asked, strengths, tested }) {
  const said = note(), box = element("div");
  const exchanges = asked.map(exchange);
  const draw = chart(box, {
    x: { label: "strength of the adapter", low: 0, high: strengths.at(-1).strength },
    y: { label: "loss (nats per token)", low: 0,
      high: 1.05 * Math.max(...strengths.map(({ loss }) => loss)) },
    height: 220,
  });
  const points = strengths.map(({ strength, loss }) => [strength, loss]);
  const change = (at) => {
    draw([{ color: COLORS.orange, points, dots: true },
      { color: COLORS.red, points: [[at.strength, at.loss]], only: true }],
    `loss against strength; ${sentence(at, tested)}`, [{ x: at.strength }]);
    said.textContent = sentence(at, tested);
    exchanges.forEach(([, show], i) => show(at.said[i]));
  };
  root.append(
    controls(slider("strength", strengths, 0, change, ({ strength }) => String(strength))),
    said, box, ...exchanges.map(([part]) => part));
  change(strengths[0]);
}

// Loss against learning rate: the valley of LoRA at a rank and a scaling beside that of full
// fine-tuning, or all ranks of a scaling as a map.
//   sets: [{name, runs}], a model each; the runs are of `runs` of lora_lib.moving.rates:
//   [{scheme, rank, factor, rates, losses, best, times, own}], "full" first
//     losses: a row for each seed, null at a rate where it was not run
//     best, times: [middle, low, high], the best rate and how many times it is that of "full"; an
//       end that is null the runs did not set
//     own: the mean loss of the seeds, each at its own rate

function find({ runs }, scheme, rank) {
  return runs.find((run) => run.scheme === scheme && run.rank === rank);
}

function schemes({ runs }) {
  return [...new Set(runs.slice(1).map((run) => run.scheme))];
}

function ranks({ runs }) {
  return [...new Set(runs.slice(1).map((run) => run.rank))];
}

// The losses at the rate of this place, of the seeds that were run there.
function seeds(run, place) {
  return run.losses.map((row) => row[place]).filter((loss) => loss !== null);
}

// [rate, mean loss of the seeds that were run there, whether all were].
function means(run) {
  return run.rates.map((rate, place) => {
    const found = seeds(run, place);
    return [rate, mean(found), found.length === run.losses.length];
  });
}

function short(value) {
  return String(Number(value.toPrecision(2)));
}

// An interval in words: "3.4 (2.6 to 4.7)".
function words([middle, low, high]) {
  if (low === null && high === null) return `${short(middle)} (the seeds leave it open)`;
  if (low === null) return `${short(middle)} (${short(high)} at most)`;
  if (high === null) return `${short(middle)} (${short(low)} at least)`;
  return `${short(middle)} (${short(low)} to ${short(high)})`;
}

// What is said of a choice.
function sentence({ scheme, rank, factor, best, times, own }, full) {
  return `Rank ${rank}, ${scheme}, a factor of ${short(factor)}: the best rate is ${words(best)}, `
    + `${words(times)} times that of full fine-tuning, which is ${words(full.best)}. `
    + `Test loss, each seed at its own rate: LoRA ${own.toFixed(3)}, full ${full.own.toFixed(3)}.`;
}

// The ends of the axes, the same for every choice, so that what moves is the valley.
function ends({ runs }) {
  const losses = runs.flatMap((run) => run.losses.flat()).filter((loss) => loss !== null);
  const rates = runs.flatMap((run) => run.rates);
  return { x: [Math.min(...rates) / 1.3, Math.max(...rates) * 1.3],
    y: [Math.min(...losses) / 1.6, Math.max(...losses) * 1.1] };
}

// A run as lines: its seeds as dots, their mean drawn through where all were run, dashed beyond.
function valley(name, color, run) {
  const all = means(run), whole = all.filter((point) => point[2]);
  const first = all.indexOf(whole[0]), last = all.indexOf(whole[whole.length - 1]);
  const beyond = { color, dash: "3 4" };
  return [
    { ...beyond, points: all.slice(0, first + 1) }, { ...beyond, points: all.slice(last) },
    { name, color, points: whole },
    { color, only: true,
      points: run.rates.flatMap((rate, i) => seeds(run, i).map((loss) => [rate, loss])) },
  ];
}

function valleys(box, set) {
  const { x, y } = ends(set), [full] = set.runs;
  const draw = chart(box, { height: 320,
    x: { label: "learning rate", low: x[0], high: x[1], log: true, ticks: logTicks(...x, 6) },
    y: { label: "test loss (nats per token)", low: y[0], high: y[1], log: true,
      ticks: logTicks(...y) } });
  return ({ scheme, rank }) => {
    const run = find(set, scheme, rank);
    const others = ranks(set).filter((other) => other !== rank).map((other) =>
      ({ color: COLORS.orange, faint: true,
        points: means(find(set, scheme, other)).filter((point) => point[2]) }));
    const bar = ({ best: [at, from, to] }, color) => ({ x: at, from, to, color });
    draw([...others, ...valley("full", COLORS.blue, full), ...valley("LoRA", COLORS.orange, run)],
      `Test loss against learning rate. ${sentence(run, full)}`,
      [bar(full, COLORS.blue), bar(run, COLORS.orange)]);
  };
}

// Cividis, from the lowest loss to `HIGH` times it: readers with any colour vision can order it.
const SHADES = ["#FEE838", "#C8B866", "#948E77", "#666970", "#35456C", "#00224E"], HIGH = 6;

// The colour of a loss, and that of letters on it.
function shade(loss, least) {
  const at = Math.min(1, Math.log(loss / least) / Math.log(HIGH)) * (SHADES.length - 1);
  const [one, other] = [Math.floor(at), Math.ceil(at)].map((i) =>
    [1, 3, 5].map((from) => parseInt(SHADES[i].slice(from, from + 2), 16)));
  const mixed = one.map((value, i) => Math.round(value + (other[i] - value) * (at % 1)));
  return [`rgb(${mixed})`, at < 2.7 ? "#000" : "#fff"];
}

// Rate across, rank up, the mean loss as colour and number; below it the best rate as a bar.
function map(box, set) {
  const { x } = ends(set), [full] = set.runs;
  const least = Math.min(...set.runs.flatMap((run) => means(run).map((point) => point[1])));
  const rowsOf = ({ scheme }) =>
    [full, ...ranks(set).reverse().map((rank) => find(set, scheme, rank))];
  const show = picture(box, (width, state) => {
    const rows = rowsOf(state);
    const left = 56, right = 4, step = 44, bottom = rows.length * step + 4;
    const [low, high] = [x[0] / 1.12, x[1] * 1.12].map(Math.log);
    const across = (rate) => left + (width - left - right) * (Math.log(rate) - low) / (high - low);
    const parts = [];
    for (const [i, run] of rows.entries()) {
      const top = 4 + i * step, here = run === find(set, state.scheme, state.rank);
      parts.push(letters(left - 8, top + 24, run.rank ? `rank ${run.rank}` : "full", "end",
        { style: here ? "font-weight: 700" : null }));
      for (const [rate, loss] of means(run)) {
        const [color, ink] = shade(loss, least), from = across(rate / 2 ** 0.5);
        parts.push(shape("rect", { x: from, y: top, height: step - 4, fill: color,
          width: across(rate * 2 ** 0.5) - from - 1 }));
        parts.push(letters(across(rate), top + 17, loss.toFixed(loss < 1 ? 2 : 1), "middle",
          { style: `fill: ${ink}` }));
      }
      const [middle, from, to] = run.best, level = top + 29;
      const line = { y1: level, y2: level, x1: across(from ?? run.rates[0] / 2 ** 0.5),
        x2: across(to ?? run.rates[run.rates.length - 1] * 2 ** 0.5) };
      parts.push(shape("line", { ...line, stroke: "#000", "stroke-width": 6 }),
        shape("line", { ...line, stroke: "#fff", "stroke-width": 3 }),
        shape("circle", { cx: across(middle), cy: level, r: 5, fill: "#fff", stroke: "#000" }));
      if (here) {
        parts.push(shape("rect", { x: left - 3, y: top - 2, width: width - left, height: step,
          fill: "none", stroke: "currentColor", "stroke-width": 2 }));
      }
    }
    for (const rate of logTicks(...x, 6)) {
      parts.push(letters(across(rate), bottom + 16, String(rate), "middle"));
    }
    parts.push(letters((left + width) / 2, bottom + 36, "learning rate", "middle"));
    return { height: bottom + 44, parts };
  });
  return (state) => show(rowsOf(state).map((run) =>
    `${run.rank ? `rank ${run.rank}` : "full"}: best rate ${words(run.best)}`).join("; "), state);
}

function mount(root, { sets }) {
  const models = Object.fromEntries(sets.map((set) => [set.name, set]));
  const views = { "a valley": valleys, "a map": map };
  const state = { set: sets[0], scheme: null, rank: null, view: valleys };
  const above = controls(), chosen = controls(), said = note(), box = element("div");
  let draw = null;
  const change = (next) => {
    Object.assign(state, next);
    draw(state);
    said.textContent = sentence(find(state.set, state.scheme, state.rank), state.set.runs[0]);
  };
  const look = (next) => {
    Object.assign(state, next);
    const inner = element("div");
    box.replaceChildren(inner);
    draw = state.view(inner, state.set);
    change({});
  };
  const take = (set) => {
    const kinds = schemes(set), all = ranks(set);
    const scheme = kinds.includes(state.scheme) ? state.scheme
      : kinds.includes("alpha = 2r") ? "alpha = 2r" : kinds[0];
    const rank = all.includes(state.rank) ? state.rank : all[0];
    chosen.replaceChildren(
      choice("scaling", Object.fromEntries(kinds.map((kind) => [kind, kind])), scheme,
        (kind) => change({ scheme: kind })),
      slider("rank", all, all.indexOf(rank), (value) => change({ rank: value })));
    look({ set, scheme, rank });
  };
  if (sets.length > 1) above.append(choice("model", models, sets[0].name, take));
  above.append(choice("as", views, "a valley", (view) => look({ view })));
  root.append(above, chosen, said, box);
  take(sets[0]);
}

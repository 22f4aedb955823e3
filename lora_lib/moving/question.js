// A question before its answer: choose, then read why. One way or the other it can be opened.
//   {question, answers: [{text, why, right?}]}

// What is said of an answer.
function verdict(answer) {
  return `${answer.right ? "Right." : "Not quite."} ${answer.why}`;
}

function mount(root, { question, answers }) {
  const said = note();
  const name = `${root.id}-answer`;
  const choices = answers.map((answer) => element("label", {},
    element("input", { type: "radio", name, onchange: () => { said.textContent = verdict(answer); } }),
    answer.text));
  root.append(element("fieldset", {},
    element("legend", {}, question), ...choices.map((one) => element("div", {}, one)), said));
}

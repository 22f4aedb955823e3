// A question before its answer: choose, ask, read why. The arrow keys move through the choices, so
// nothing is said before the button is pressed; then one can choose again.
//   {question, answers: [{text, why, right?}]}

// What is said of the answer that is chosen, if one is.
function verdict(answer) {
  if (!answer) return "Choose one first.";
  return `${answer.right ? "Right." : "No."} ${answer.why}`;
}

function mount(root, { question, answers }) {
  const said = note(), name = `${root.id}-answer`;
  const inputs = answers.map(() => element("input", { type: "radio", name,
    onchange: () => { said.textContent = ""; } }));
  const choices = inputs.map((input, i) =>
    element("div", {}, element("label", {}, input, element("span", {}, answers[i].text))));
  const look = button("Is it so?", () => {
    said.textContent = verdict(answers[inputs.findIndex((input) => input.checked)]);
  });
  root.append(element("fieldset", {}, element("legend", {}, question), ...choices, look, said));
}

"""The network that trains in the page is lora_lib.numpy's, and what its page shows is true."""

import re

import numpy as np
import pytest

from lora_lib import moving
from lora_lib.data import digits
from lora_lib.numpy import (Adam, LoRALinear, Network, ReLU, accuracy, inject, mlp,
                            softmax_cross_entropy)
from tests.moving import stored
from tests.moving.node import call

# A network of the adapters that are given, and what a test asks of it.
GIVEN = """
const built = (layers) => new Network(layers.flatMap(({ weight, bias, A, B, scaling }, i) => {
  const layer = new LoRALinear(...[weight, [bias], A, B].map(fromRows), scaling);
  return i ? [new ReLU(), layer] : [layer];
}));
const arrays = (network, suffix) => network.parameters().map(
  ([layer, name]) => toRows(layer[name + suffix]));
"""
STEPS = GIVEN + """
const network = built(layers), optimizer = new Adam(network.parameters(), lr), seen = [];
let first;
for (let step = 0; step < steps; step++) {
  const [loss, grad] = softmaxCrossEntropy(network.forward(fromRows(x)), labels);
  const x_grad = network.backward(grad);
  seen.push(loss);
  first ??= { grads: arrays(network, "_grad"), x: toRows(x_grad) };
  optimizer.step();
}
return { losses: seen, first, parameters: arrays(network, ""),
  deltas: network.layers.filter((layer) => layer.deltaWeight).map((l) => toRows(l.deltaWeight())),
  sizes: sizes(network), read: answers(network.forward(fromRows(x))) };
"""


def adapters(network):
    return [layer for layer in network.layers if isinstance(layer, LoRALinear)]


def adapted(rng, widths, rank, alpha, a, b):
    """A network of random weights and biases, A a N(0, 1 / k), B b N(0, 1 / r)."""
    network = inject(mlp(*widths, seed=int(rng.integers(1000))), rank, alpha)
    for layer in adapters(network):
        layer.bias = rng.normal(size=layer.bias.shape)
        layer.A = a * layer.A
        layer.B = b * rng.normal(0, rank**-0.5, layer.B.shape)
    return network


def given(network):
    return [{"weight": layer.weight.tolist(), "bias": layer.bias.tolist(), "A": layer.A.tolist(),
             "B": layer.B.tolist(), "scaling": layer.scaling} for layer in adapters(network)]


def near(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("widths", "rank", "alpha", "lr", "a", "b"), [
    ((64, 128, 128, 10), 8, 16.0, 3e-3, 1, 0),
    ((64, 128, 128, 10), 8, 16.0, 3e-3, 0, 1),
    ((64, 128, 128, 10), 10, 1.0, 1e-2, 1, 1),
    ((13, 9, 7, 5), 1, 4.0, 3e-2, 1, 0),
    ((13, 9, 7, 5), 3, 128.0, 1e-3, 1, 1),
    ((13, 9, 7, 5), 2, 8.0, 3e-2, 0, 0),
    ((6, 5), 5, 2.5, 1e-1, 0.01, 0.0625),
])
def test_gradients_and_twenty_steps_are_those_of_the_library(widths, rank, alpha, lr, a, b):
    rng = np.random.default_rng([rank, a != 0, b != 0])
    network = adapted(rng, widths, rank, alpha, a, b)
    x, y = rng.normal(size=(11, widths[0])), rng.integers(widths[-1], size=11)
    found = call("training", f"(layers, x, labels, lr, steps) => {{ {STEPS} }}",
                 given(network), x.tolist(), y.tolist(), lr, 20)

    optimizer, losses = Adam(network.parameters(), lr=lr), []
    for step in range(20):
        loss, grad = softmax_cross_entropy(network.forward(x), y)
        x_grad = network.backward(grad)
        losses.append(loss)
        if step == 0:
            near(found["first"]["x"], x_grad)
            for (layer, name), one in zip(network.parameters(), found["first"]["grads"]):
                near(one, getattr(layer, f"{name}_grad"))
        optimizer.step()
    near(found["losses"], losses)
    assert len(found["parameters"]) == len(network.parameters()) == 2 * (len(widths) - 1)
    for (layer, name), one in zip(network.parameters(), found["parameters"]):
        near(one, getattr(layer, name))
    for layer, one in zip(adapters(network), found["deltas"]):
        near(one, layer.delta_weight())
    layer = adapters(network)[0]
    near([found["sizes"][name] for name in ("A", "B", "update")],
         [layer.A.std(), layer.B.std(), layer.delta_weight().std() / layer.weight.std()])
    assert found["read"] == network.forward(x).argmax(axis=1).tolist()


def test_the_gradients_are_slopes_of_the_loss():
    rng = np.random.default_rng(0)
    network = adapted(rng, (7, 6, 4), 2, 3.0, 1, 1)
    x, y = rng.normal(size=(5, 7)).tolist(), rng.integers(4, size=5).tolist()
    slopes = call("training", "(layers, x, labels) => {" + GIVEN + """
      const network = built(layers);
      const loss = () => softmaxCrossEntropy(network.forward(fromRows(x)), labels)[0];
      network.backward(softmaxCrossEntropy(network.forward(fromRows(x)), labels)[1]);
      return network.parameters().map(([layer, name]) => {
        const p = layer[name].values;
        return [...p.keys()].map((i) => {
          const at = (value) => { p[i] = value; return loss(); }, old = p[i];
          const slope = (at(old + 1e-5) - at(old - 1e-5)) / 2e-5;
          p[i] = old;
          return [slope, layer[`${name}_grad`].values[i]];
        });
      });
    }""", given(network), x, y)
    for pairs in slopes:
        measured, computed = np.transpose(pairs)
        np.testing.assert_allclose(computed, measured, rtol=1e-6, atol=1e-9)
        assert np.abs(computed).max() > 1e-3


def test_two_bytes_a_number_come_back_to_half_a_step():
    matrix = np.random.default_rng(1).normal(size=(7, 5))
    found = call("training", "unpacked", moving.packed(matrix, 2))
    assert 0.3 < np.abs(found - matrix).max() / np.abs(matrix).max() * 32767 < 0.51


def test_the_generator_draws_what_it_says():
    draws = "const random = generator(3), many = [...Array(20000).keys()];"
    uniform, normal = call("training", f"""() => {{ {draws}
      return [many.map(random.uniform), many.map(random.normal)]; }}""")
    assert 0 <= min(uniform) and max(uniform) < 1
    assert np.mean(uniform) == pytest.approx(0.5, abs=0.01)
    assert np.var(uniform) == pytest.approx(1 / 12, abs=0.002)
    assert np.mean(normal) == pytest.approx(0, abs=0.03)
    assert np.mean(np.power(normal, [[2], [4]]), axis=1) == pytest.approx([1, 3], abs=0.15)
    assert abs(np.corrcoef(uniform[:-1], uniform[1:])[0, 1]) < 0.03
    order = call("training", "() => shuffled(50, generator(0))")
    assert sorted(order) == list(range(50)) != order


# The page.


@pytest.fixture(scope="module")
def page():
    """The data that the chapter gives to the figure, and the rows of the table above it."""
    return (stored.data("03_initialization", "code-19c"),
            stored.table("03_initialization", "code-19b"))


RUN = """
const base = layers.map(({ weight, bias }) => ({
  weight: fromRows(unpacked(weight)), bias: fromRows(unpacked(bias)) }));
"""


def test_the_page_stays_light(page):
    assert len(moving.html("training", page[0], label="")) < 250_000


@pytest.mark.parametrize("turn", [0, 90])
def test_the_digits_are_the_chapters(page, turn):
    data = digits(turn=turn)
    for name, x, y in (("train", data.x_train, data.y_train), ("test", data.x_test, data.y_test)):
        set_of = page[0]["images"][name]
        some = list(range(0, len(set_of["labels"]), 37))
        found = call("training", "(set, turn, some) => { const { x, labels } = digits(set, turn);"
                     "return [toRows(chosen(x, some)), labels]; }", set_of, bool(turn), some)
        assert np.array_equal(found[0], x[some])
        assert found[1] == y[:len(found[1])].tolist() and len(found[1]) >= 360


@pytest.mark.parametrize("name", ["B = 0", "both zero", "both random"])
def test_a_run_of_the_page_is_one_of_the_chapter(page, name):
    """Before training the numbers are the printed ones; after it, those that training reaches."""
    data, rows = page
    found = call("training", f"""({{ layers, images, starts, steps }}, name) => {{ {RUN}
      const run = new Run(base, digits(images.train, true),
        {{ rank: 8, alpha: 16, rate: 0.003, start: starts[name], seed: 0 }});
      const look = () => ({{ turned: measured(run.network, digits(images.test, true)),
        upright: measured(run.network, digits(images.test)), sizes: sizes(run.network) }});
      const before = look();
      for (let step = 0; step < steps; step++) run.step();
      return {{ before, after: look(), losses: run.losses }};
    }}""", data, name)
    before, after = found["before"], found["after"]
    if name in ("B = 0", "both zero"):
        assert [f"{before['turned']['loss']:.2f}"] == [row[1] for row in rows if row[0] == name]
    if name != "both random":
        assert before["upright"]["accuracy"] > 0.95 and before["sizes"]["update"] == 0
    else:
        assert before["upright"]["accuracy"] < 0.75 and before["sizes"]["update"] > 0.5
    if name == "both zero":
        assert after == before
    else:
        assert len(found["losses"]) == data["steps"]
        assert after["turned"]["accuracy"] > 0.87 and np.mean(found["losses"][-20:]) < 0.5


def test_the_base_in_the_page_answers_as_the_chapters_network(page):
    """Rounded to two bytes a weight, it is the same network to four digits."""
    weights = call("training", f"({{ layers }}) => {{ {RUN} return base.map("
                   "({ weight, bias }) => [toRows(weight), toRows(bias)[0]]); }", page[0])
    layers = mlp(64, 128, 128, 10).layers
    for layer, (weight, bias) in zip(layers[::2], weights):
        layer.weight, layer.bias = np.array(weight), np.array(bias)
    network, data = Network(layers), digits(turn=90)
    assert isinstance(layers[1], ReLU)
    loss, _ = softmax_cross_entropy(network(data.x_test), data.y_test)
    assert page[1][1][:2] == ["B = 0", f"{loss:.2f}"]
    assert accuracy(network, digits().x_test, digits().y_test) > 0.95


def test_a_run_that_diverges_says_so(page):
    said = call("training", f"""({{ layers, images, starts }}) => {{ {RUN}
      const run = new Run(base, digits(images.train, true),
        {{ rank: 8, alpha: 1e300, rate: 1e10, start: [1, 0], seed: 0 }});
      try {{ for (let step = 0; step < 10; step++) run.step(); }} catch ({{ message }}) {{
        return [message, run.losses.length]; }}
    }}""", page[0])
    assert re.fullmatch("the loss is (NaN|Infinity); lower the learning rate", said[0])
    assert said[1] > 0

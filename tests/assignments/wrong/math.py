"""Typical wrong submissions of assignment 2, and the test cells that each loses."""

WRONG = {
    # 2.1
    "A and B exchanged": ({"solution-2-1": """
def lora_forward(x, W, A, B, scaling):
    return x @ W.T + scaling * ((x @ B) @ A)
"""}, {"test-2-1", "hidden-2-1"}),

    "scaling missing": ({"solution-2-1": """
def lora_forward(x, W, A, B, scaling):
    return x @ W.T + (x @ A.T) @ B.T
"""}, {"test-2-1", "hidden-2-1"}),

    "printed instead of returned": ({"solution-2-1": """
def lora_forward(x, W, A, B, scaling):
    print(x @ W.T + scaling * ((x @ A.T) @ B.T))
"""}, {"test-2-1", "hidden-2-1"}),

    "the update added to W in place": ({"solution-2-1": """
def lora_forward(x, W, A, B, scaling):
    W += scaling * B @ A
    return x @ W.T
"""}, {"test-2-1", "hidden-2-1"}),

    "B A formed": ({"solution-2-1": """
def lora_forward(x, W, A, B, scaling):
    return x @ W.T + x @ (scaling * B @ A).T
"""}, {"test-2-1", "hidden-2-1"}),

    "equations of columns, .T on any number of dimensions": ({"solution-2-1": """
def lora_forward(x, W, A, B, scaling):
    return (W @ x.T + scaling * (B @ (A @ x.T))).T
"""}, {"hidden-2-1"}),

    "a loop over the rows of a matrix": ({"solution-2-1": """
def lora_forward(x, W, A, B, scaling):
    h = np.zeros((x.shape[0], W.shape[0]), dtype=x.dtype)
    for i in range(len(x)):
        h[i] = W @ x[i] + scaling * (B @ (A @ x[i]))
    return h
"""}, {"hidden-2-1"}),

    "float32 becomes float64": ({"solution-2-1": """
def lora_forward(x, W, A, B, scaling):
    return x @ W.T + np.float64(scaling) * ((x @ A.T) @ B.T)
"""}, {"hidden-2-1"}),

    "the notebook's alpha and rank instead of the argument": ({"solution-2-1": """
def lora_forward(x, W, A, B, scaling):
    return x @ W.T + alpha / rank * ((x @ A.T) @ B.T)
"""}, {"hidden-2-1"}),

    # 2.2
    "gradients without the scaling": ({"solution-2-2": """
def adapter_gradients(g, x, A, B, scaling):
    g, x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    return (g @ B).T @ x, g.T @ (x @ A.T)
"""}, {"test-2-2", "hidden-2-2"}),

    "scaling twice in the gradient of B": ({"solution-2-2": """
def adapter_gradients(g, x, A, B, scaling):
    g, x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    g = scaling * g
    return (g @ B).T @ x, g.T @ (scaling * (x @ A.T))
"""}, {"test-2-2", "hidden-2-2"}),

    "gradients averaged over the rows": ({"solution-2-2": """
def adapter_gradients(g, x, A, B, scaling):
    g, x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    return scaling * (g @ B).T @ x / len(x), scaling * g.T @ (x @ A.T) / len(x)
"""}, {"test-2-2", "hidden-2-2"}),

    "gradients transposed": ({"solution-2-2": """
def adapter_gradients(g, x, A, B, scaling):
    g, x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    return scaling * x.T @ (g @ B), scaling * (x @ A.T).T @ g
"""}, {"test-2-2", "hidden-2-2"}),

    "gradients in the wrong order": ({"solution-2-2": """
def adapter_gradients(g, x, A, B, scaling):
    g, x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    return scaling * g.T @ (x @ A.T), scaling * (g @ B).T @ x
"""}, {"test-2-2", "hidden-2-2"}),

    "the weight's gradient formed first": ({"solution-2-2": """
def adapter_gradients(g, x, A, B, scaling):
    g, x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    W_grad = g.T @ x
    return scaling * B.T @ W_grad, scaling * W_grad @ A.T
"""}, {"test-2-2", "hidden-2-2"}),

    "a missing pair of brackets forms g^T x": ({"solution-2-2": """
def adapter_gradients(g, x, A, B, scaling):
    g, x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    return scaling * (g @ B).T @ x, scaling * g.T @ x @ A.T
"""}, {"test-2-2", "hidden-2-2"}),

    "gradients of a batch of vectors alone": ({"solution-2-2": """
def adapter_gradients(g, x, A, B, scaling):
    return scaling * (g @ B).T @ x, scaling * g.T @ (x @ A.T)
"""}, {"hidden-2-2"}),

    # 2.3
    "the adapter's path missing in the input's gradient": ({"solution-2-3": """
def input_gradient(g, W, A, B, scaling):
    return g @ W
"""}, {"test-2-3", "hidden-2-3"}),

    "scaling twice in the input's gradient": ({"solution-2-3": """
def input_gradient(g, W, A, B, scaling):
    gB = scaling * (g @ B)
    return g @ W + scaling * (gB @ A)
"""}, {"test-2-3", "hidden-2-3"}),

    "B A formed for the input's gradient": ({"solution-2-3": """
def input_gradient(g, W, A, B, scaling):
    return g @ (W + scaling * (B @ A))
"""}, {"test-2-3", "hidden-2-3"}),

    "the columns' equation for the input's gradient, .T on g": ({"solution-2-3": """
def input_gradient(g, W, A, B, scaling):
    return (W.T @ g.T + scaling * (A.T @ (B.T @ g.T))).T
"""}, {"hidden-2-3"}),

    "the input's gradient in an array of float64": ({"solution-2-3": """
def input_gradient(g, W, A, B, scaling):
    x_grad = np.zeros((*g.shape[:-1], W.shape[1]))
    x_grad += g @ W
    x_grad += scaling * ((g @ B) @ A)
    return x_grad
"""}, {"hidden-2-3"}),

    # 2.4; 2.5 builds on it
    "differences to one side": ({"solution-2-4": """
def numerical_gradients(x, W, A, B, scaling, step):
    arrays = {name: np.array(array, dtype=np.float64)
              for name, array in dict(x=x, W=W, A=A, B=B).items()}
    here = loss(**arrays, scaling=scaling)
    gradients = []
    for name in ("A", "B", "x"):
        gradient = np.zeros(arrays[name].shape)
        for i in np.ndindex(gradient.shape):
            moved = arrays[name].copy()
            moved[i] += step
            gradient[i] = (loss(**{**arrays, name: moved}, scaling=scaling) - here) / step
        gradients.append(gradient)
    return tuple(gradients)
"""}, {"test-2-4", "hidden-2-4"}),

    "divided by the step instead of twice the step": ({"solution-2-4": """
def numerical_gradients(x, W, A, B, scaling, step):
    arrays = {name: np.array(array, dtype=np.float64)
              for name, array in dict(x=x, W=W, A=A, B=B).items()}
    gradients = []
    for name in ("A", "B", "x"):
        gradient = np.zeros(arrays[name].shape)
        for i in np.ndindex(gradient.shape):
            up, down = arrays[name].copy(), arrays[name].copy()
            up[i] += step
            down[i] -= step
            gradient[i] = (loss(**{**arrays, name: up}, scaling=scaling)
                           - loss(**{**arrays, name: down}, scaling=scaling)) / step
        gradients.append(gradient)
    return tuple(gradients)
"""}, {"test-2-4", "hidden-2-4", "test-2-5", "hidden-2-5"}),

    "formulas instead of differences": ({"solution-2-4": """
def numerical_gradients(x, W, A, B, scaling, step):
    x, W, A, B = (np.array(array, dtype=np.float64) for array in (x, W, A, B))
    g = (x @ (W + scaling * B @ A).T)**3
    rows, X = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    return (scaling * (rows @ B).T @ X, scaling * rows.T @ (X @ A.T),
            g @ (W + scaling * B @ A))
"""}, {"test-2-4", "hidden-2-4"}),

    "moved there and back in place, not to the last bit": ({"solution-2-4": """
def numerical_gradients(x, W, A, B, scaling, step):
    gradients = []
    for array in (A, B, x):
        gradient = np.zeros(array.shape)
        for i in np.ndindex(array.shape):
            array[i] += step
            above = loss(x, W, A, B, scaling)
            array[i] -= 2 * step
            below = loss(x, W, A, B, scaling)
            array[i] += step
            gradient[i] = (above - below) / (2 * step)
        gradients.append(gradient)
    return tuple(gradients)
"""}, {"test-2-4", "hidden-2-4", "test-2-5", "hidden-2-5"}),

    "a step in an array of integers": ({"solution-2-4": """
def numerical_gradients(x, W, A, B, scaling, step):
    arrays = dict(x=x, W=W, A=A, B=B)
    gradients = []
    for name in ("A", "B", "x"):
        gradient = np.zeros(arrays[name].shape)
        for i in np.ndindex(gradient.shape):
            up, down = arrays[name].copy(), arrays[name].copy()
            up[i] = up[i] + step
            down[i] = down[i] - step
            gradient[i] = (loss(**{**arrays, name: up}, scaling=scaling)
                           - loss(**{**arrays, name: down}, scaling=scaling)) / (2 * step)
        gradients.append(gradient)
    return tuple(gradients)
"""}, {"hidden-2-4"}),

    # 2.5
    "np.allclose with its defaults": ({"solution-2-5": """
def wrong_gradients(x, W, A, B, scaling, A_grad, B_grad, x_grad):
    true = numerical_gradients(x, W, A, B, scaling, step=1e-7)
    return [name for name, given, right in zip("ABx", (A_grad, B_grad, x_grad), true)
            if given.shape != right.shape or not np.allclose(given, right, rtol=1e-3)]
"""}, {"hidden-2-5"}),

    "a NaN is not greater than the tolerance": ({"solution-2-5": """
def wrong_gradients(x, W, A, B, scaling, A_grad, B_grad, x_grad):
    true = numerical_gradients(x, W, A, B, scaling, step=1e-7)
    wrong = []
    for name, given, right in zip("ABx", (A_grad, B_grad, x_grad), true):
        if given.shape != right.shape:
            wrong.append(name)
        elif np.abs(given - right).max() > 1e-3 * np.abs(right).max():
            wrong.append(name)
    return wrong
"""}, {"hidden-2-5"}),

    "shapes are not compared": ({"solution-2-5": """
def wrong_gradients(x, W, A, B, scaling, A_grad, B_grad, x_grad):
    true = numerical_gradients(x, W, A, B, scaling, step=1e-7)
    return [name for name, given, right in zip("ABx", (A_grad, B_grad, x_grad), true)
            if not np.all(np.abs(given - right) <= 1e-3 * np.abs(right).max())]
"""}, {"hidden-2-5"}),

    "the gradient of x alone is compared": ({"solution-2-5": """
def wrong_gradients(x, W, A, B, scaling, A_grad, B_grad, x_grad):
    _, _, right = numerical_gradients(x, W, A, B, scaling, step=1e-7)
    return [] if np.abs(x_grad - right).max() <= 1e-3 * np.abs(right).max() else ["x"]
"""}, {"test-2-5", "hidden-2-5"}),

    # 2.6
    "forming B A always pays at some number of rows": ({"solution-2-6": """
def break_even(d, k, rank):
    forming, saved = d * rank * k, rank * (d + k)
    return forming // (saved - d * k) + 1, forming // saved + 1
"""}, {"test-2-6", "hidden-2-6"}),

    "as many multiplications count as fewer": ({"solution-2-6": """
def break_even(d, k, rank):
    forming, saved = d * rank * k, rank * (d + k)
    formed = -(-forming // (saved - d * k)) if saved > d * k else None
    return formed, -(-forming // saved)
"""}, {"test-2-6", "hidden-2-6"}),

    "division of floats": ({"solution-2-6": """
def break_even(d, k, rank):
    forming, saved = d * rank * k, rank * (d + k)
    formed = int(forming / (saved - d * k)) + 1 if saved > d * k else None
    return formed, int(forming / saved) + 1
"""}, {"hidden-2-6"}),

    "the numbers of the visible test": ({"solution-2-6": """
def break_even(d, k, rank):
    return (None, 3) if rank == 1 else (6, 3)
"""}, {"hidden-2-6"}),
}

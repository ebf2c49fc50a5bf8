"""The pictures of the concepts page, drawn from the library's own numbers.

python docs/figures.py        writes docs/images/*.svg; needs matplotlib
"""

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from sm_flex import log_mass

REAL, PSEUDO, INK, PALE = "#1f6f8b", "#e08e45", "#333333", "#f1f1f1"
GAMMAS = ((0.0, "0", "#9bc4cf"), (2**-6, "2$^{-6}$", "#5c9fb1"), (2**-4, "2$^{-4}$", REAL), (2**-2, "2$^{-2}$", "#0d3644"))
FOLDER = Path(__file__).parent / "images"


def save(figure: Figure, name: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / name, metadata={"Date": None}, facecolor="white")
    plt.close(figure)
    print(FOLDER / name)


def mass() -> None:
    """One row: its real scores, its pseudo scores, and the one number that counts of those."""
    length, position, gamma = 12, 4, 0.1
    real = torch.tensor([1.1, -0.4, 0.6, -0.9, 0.8])
    pseudo = -gamma * torch.arange(position + 1, length)
    weights = torch.cat([real, pseudo]).softmax(0).tolist()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.3), layout="constrained", width_ratios=(2.3, 1))
    bars = left.bar(range(length), weights, color=[REAL] * (position + 1) + [PSEUDO] * (length - position - 1))
    for bar in bars[position + 1 :]:
        bar.set(hatch="///", edgecolor="white")
    left.axvline(position + 0.5, color=INK, lw=1, ls="--")
    left.text(position / 2, 0.36, "real scores q·k\nthey carry values", ha="center", color=REAL, weight="bold")
    left.text(8.1, 0.36, "pseudo scores $-j\\gamma$\nthey carry none", ha="center", color=PSEUDO, weight="bold")
    title = rf"the row at position p = {position}, N = {length}, $\gamma$ = {gamma}"
    left.set(xlabel="key j", ylabel="softmax", xticks=range(length), ylim=(0, 0.44), title=title)

    share = sum(weights[: position + 1])
    right.bar([0, 1], [share, 1 - share], color=[REAL, PSEUDO], width=0.6)
    right.text(0, share + 0.02, f"{share:.2f}", ha="center", color=INK)
    right.text(1, 1 - share + 0.02, f"{1 - share:.2f}", ha="center", color=INK)
    right.set(xticks=[0, 1], xlim=(-0.6, 1.6), ylim=(0, 1), title="what counts of them")
    right.set_xticklabels(["real share s", "pseudo share\nM / (e$^{lse}$ + M)"])
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    save(figure, "mass.svg")


def rows_and_positions() -> None:
    """Visibility goes by slot and mask, the mass by position: three calls in which the two differ."""
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.9), layout="constrained", width_ratios=(8, 8, 8))
    slot = torch.arange(8)
    causal = slot <= slot.unsqueeze(1)

    document = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    _grid(axes[0], causal & (document == document.unsqueeze(1)), [0, 1, 2, 0, 1, 2, 3, 4], "two packed documents")

    real = slot >= 3
    _grid(axes[1], causal & real, [0, 0, 0, 0, 1, 2, 3, 4], "three slots of left padding")

    cache = (torch.arange(8) <= torch.arange(5, 8).unsqueeze(1)) | torch.zeros(3, 8, dtype=torch.bool)
    _grid(axes[2], cache, [5, 6, 7], "a chunk of 3 against a cache")
    save(figure, "positions.svg")


def _grid(ax: Axes, visible: Tensor, positions: list[int], title: str) -> None:
    rows, columns = visible.shape
    for i in range(rows):
        for j in range(columns):
            color = REAL if visible[i, j] else PALE
            ax.add_patch(Rectangle((j, i), 1, 1, facecolor=color, edgecolor="white", lw=1.5))
        ax.text(columns + 0.75, i + 0.5, str(positions[i]), ha="center", va="center", color=PSEUDO, weight="bold")
    ax.text(columns + 0.75, -0.35, "position", ha="center", color=PSEUDO, fontsize=9)
    ax.set(xlim=(0, columns + 1.5), ylim=(rows, -0.9), aspect="equal", anchor="N", title=title, xlabel="key slot", ylabel="query")
    ax.set_xticks([j + 0.5 for j in range(columns)], [str(j) for j in range(columns)], fontsize=9)
    ax.set_yticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def log_m() -> None:
    """log M against the position, up to the training length and beyond it; and the real share where all scores are 0."""
    length, end = 64, 96
    positions = torch.arange(end)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for gamma, name, color in GAMMAS:
        m = log_mass(gamma, positions, length)[0]
        share = torch.sigmoid(torch.log(positions + 1.0) - m)
        label = rf"$\gamma$ = {name}"
        for rows in (slice(0, length - 1), slice(length, end)):
            left.plot(positions[rows], m[rows], color=color, lw=2, label=label if rows.start == 0 else None)
            right.plot(positions[rows], share[rows], color=color, lw=2)
    left.set(ylabel="log M", title="the mass of a row", ylim=(-25, 6))
    right.set(ylabel="real share s", title="all scores 0", ylim=(0, 1.03))
    left.legend(frameon=False, loc="lower left")
    for ax in (left, right):
        ax.axvline(length - 1, color=INK, lw=1, ls="--")
        ax.set(xlabel="position p")
        ax.spines[["top", "right"]].set_visible(False)
    left.text(length + 1, 3.2, "N $-$ 1: no mass;\none score from N on", fontsize=9, color=INK)
    save(figure, "log_mass.svg")


if __name__ == "__main__":
    mpl.rcParams.update({"svg.hashsalt": "sm_flex", "font.size": 10})
    mass()
    rows_and_positions()
    log_m()

"""The README's picture: an attention matrix with its pseudo scores, and the share of each row that is real.

python -m benchmarks.picture        writes benchmarks/results/stablemask.png
"""

import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from benchmarks import report
from sm_flex import log_mass
from sm_flex.testing import oracle

ROWS, GAMMA = 12, 0.25
REAL, PSEUDO, INK = "#1f6f8b", "#e08e45", "#333333"


def probabilities() -> tuple[np.ndarray, np.ndarray]:
    """Softmax of A * C + P for scores 0: the real part (lower triangle) and the pseudo part (upper)."""
    q = torch.zeros(1, 1, ROWS, 2)
    _, lse = oracle(q, q, q, gamma=GAMMA)
    i, j = torch.arange(ROWS).unsqueeze(1), torch.arange(ROWS)
    scores = torch.where(j <= i, 0.0, -j * GAMMA)
    p = torch.exp(scores - lse[0, 0].unsqueeze(1))
    return torch.where(j <= i, p, 0.0).numpy(), torch.where(j > i, p, 0.0).numpy()


def main() -> None:
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    real, pseudo = probabilities()
    image = np.ones((ROWS, ROWS, 3))
    for part, color in ((real, REAL), (pseudo, PSEUDO)):
        weight = np.clip(part / 0.45, 0, 1)[..., None] ** 0.6
        rgb = np.array(to_rgb(color))
        image = np.where(part[..., None] > 0, 1 - weight * (1 - rgb), image)
    left.imshow(image)
    head = rf"softmax of one head, scores 0, $\gamma$ = {GAMMA}"
    for k in range(ROWS):
        left.plot([k + 0.5, k + 0.5], [k - 0.5, k + 0.5], color=INK, lw=1)
        left.plot([k + 0.5, min(k + 1.5, ROWS - 0.5)], [k + 0.5, k + 0.5], color=INK, lw=1)
    left.text(2.3, 8.6, "real attention", color="white", fontsize=11, ha="center", weight="bold")
    left.text(8.4, 2.0, "pseudo attention\nsame softmax, no value", color=INK, fontsize=10, ha="center")
    left.set(xlim=(-0.5, ROWS - 0.5), xticks=[], yticks=[], xlabel="key j", ylabel="query i", title=head)

    length = 512
    rows = f"each row tells where it is (scores 0, N = {length})"
    positions = torch.arange(length)
    for gamma, shade in zip((0.5, 2**-4, 2**-6, 2**-8), np.linspace(1.0, 0.35, 4), strict=True):
        share = torch.sigmoid(torch.log(positions + 1.0) - log_mass(gamma, positions, length)[0])
        name = "0.5" if gamma == 0.5 else f"2$^{{{int(np.log2(gamma))}}}$"
        right.plot(positions + 1, share, color=(*to_rgb(REAL), shade), lw=2, label=rf"$\gamma$ = {name}")
    right.axhline(1.0, color=PSEUDO, lw=1, ls="--", label="causal attention")
    right.set_xscale("log")
    right.set(xlabel="tokens seen", ylabel="share of the row that is real", ylim=(0, 1.05), title=rows)
    right.legend(frameon=False, loc="lower right")
    right.spines[["top", "right"]].set_visible(False)
    target = report.ROOT / "benchmarks" / "results" / "stablemask.png"
    figure.savefig(target, dpi=150)
    print(target)


if __name__ == "__main__":
    main()

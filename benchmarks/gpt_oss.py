"""One attention layer of gpt-oss in training: its learned sinks on PyTorch's engines, against Transformers' own ways.

    python -m benchmarks.gpt_oss

GptOssAttention of Transformers, projections and rotary embedding included, with random weights, a full layer
and one with a window of 128, forward and backward. Transformers has no SDPA for models with sinks: eager is
what runs on a CPU. On a GPU also its flex_attention and the kernel of the hub that it names for gpt-oss. All
share one set of weights and take turns. Each is checked against eager attention in float64 before it is timed.
"""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm
from transformers import GptOssConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding

import sm_flex_transformers  # noqa: F401  (registers sm_flex)
from benchmarks import plot, report
from benchmarks.speed import timing
from benchmarks.speed.timing import free_memory

LENGTHS = (512, 1024, 2048, 4096, 8192)
HEADS, KEY_HEADS, DIM, WINDOW = 8, 1, 64, 128
LAYERS = {"full": 0, "window": 1}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OURS, EAGER, FLEX, HUB = "sm_flex", "eager", "flex_attention", "kernels-community/vllm-flash-attn3"
# Of the largest value of each gradient. bf16 itself, eager in bf16 against eager in float64, is 0.02 off.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.04}
# How many times as fast as eager at this length on a CPU.
TARGETS, TARGET_LENGTH = {"full": 4.0, "window": 10.0}, 4096
SHARE_OF_MEMORY = 0.7


class Case(NamedTuple):
    layer: str
    dtype: str
    length: int


class Layer:
    """One layer, called with any attention by its name."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype | None = None) -> None:
        torch.manual_seed(0)
        self.config = GptOssConfig(
            hidden_size=HEADS * DIM, num_hidden_layers=2, num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS,
            head_dim=DIM, sliding_window=WINDOW, layer_types=["full_attention", "sliding_attention"],
        )  # fmt: skip
        self.kind, dtype = case.layer, dtype or DTYPES[case.dtype]
        self.attention = GptOssAttention(self.config, LAYERS[case.layer])
        for parameter in self.attention.parameters():
            torch.nn.init.normal_(parameter, std=0.5 if parameter.dim() == 1 else (HEADS * DIM) ** -0.5)
        self.attention.to(device, dtype).train()
        self.positions = torch.arange(case.length, device=device).unsqueeze(0)
        hidden = torch.empty(1, case.length, HEADS * DIM, device=device, dtype=dtype)
        self.rotary = GptOssRotaryEmbedding(self.config).to(device)(hidden, self.positions)
        self.masks: dict[str, Any] = {}

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        return self.attention.sinks, self.attention.q_proj.weight

    def call(self, name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """(hidden, sinks, weight of the query projection) -> output. The last two are the layer's own."""

        def run(hidden: Tensor, *_: Tensor) -> Tensor:
            self.config._attn_implementation = name
            if name not in self.masks:  # Transformers makes a mask once a forward, for all layers
                make = create_causal_mask if self.kind == "full" else create_sliding_window_causal_mask
                self.masks[name] = make(self.config, hidden, None, None, position_ids=self.positions)
            return self.attention(hidden, self.rotary, self.masks[name], position_ids=self.positions)[0]

        return run


def inputs_of(layer: Layer, length: int) -> timing.Inputs:
    weight = layer.attention.q_proj.weight
    hidden, grad = torch.randn(2, 1, length, HEADS * DIM, device=weight.device, dtype=weight.dtype)
    return hidden.requires_grad_(), *layer.weights, grad


def error_of(case: Case, name: str, device: torch.device) -> float:
    """The largest difference in the output and the three gradients from eager attention in float64, over its largest value.

    Raises ValueError beyond TOLERANCE: a wrong layer's time is worth nothing.
    """
    ours, exact = Layer(case, device), Layer(case, device, torch.float64)
    exact.attention.load_state_dict(ours.attention.state_dict())
    exact.rotary = tuple(x.double() for x in ours.rotary)
    inputs = inputs_of(ours, case.length)
    wide = (inputs[0].detach().double().requires_grad_(), *exact.weights, inputs[3].double())
    worst = 0.0
    for found, wanted in zip(_pass(ours.call(name), inputs), _pass(exact.call(EAGER), wide), strict=True):
        error = float((found.double() - wanted).abs().max() / wanted.abs().max())
        if not error <= TOLERANCE[case.dtype]:
            raise ValueError(f"{name} is wrong, {case}: {error:.2e} of the largest value off eager attention in float64")
        worst = max(worst, error)
    return worst


def _pass(call: timing.Call, inputs: timing.Inputs) -> tuple[Tensor, ...]:
    out = call(*inputs[:3])
    return out.detach(), *torch.autograd.grad(out, inputs[:3], inputs[3])


def measure(lengths: tuple[int, ...], seconds: float, device: torch.device) -> list[dict[str, Any]]:
    """A row for each case and attention: milliseconds per round, peak bytes, or why there is none."""
    names = (EAGER, OURS, FLEX, HUB) if device.type == "cuda" else (EAGER, OURS)
    rows: list[dict[str, Any]] = []
    cases = [Case(layer, dtype, length) for layer in LAYERS for dtype in DTYPES for length in lengths]
    peaks: dict[tuple[str, str, str], int] = {}
    checked: dict[tuple[str, str, str], float] = {}
    for case in tqdm(cases, unit="case", dynamic_ncols=True):
        layer, errors = Layer(case, device), {}
        sets = [inputs_of(layer, case.length) for _ in range(2)]
        calls = {}
        for name in names:
            key = (name, case.layer, case.dtype)
            # What the shorter call held grows fourfold at most.
            if 4 * peaks.get(key, 0) > SHARE_OF_MEMORY * free_memory(device):
                errors[name] = f"not run: it would hold about {4 * peaks[key] / 2**30:.0f} GiB"
                continue
            try:
                if key not in checked:
                    checked[key] = error_of(case._replace(length=min(lengths)), name, device)
                peaks[key] = timing.training_peak(layer.call(name), sets[0], device)
                calls[name] = layer.call(name)
            except Exception as error:  # an error is a row of the result
                errors[name] = timing.one_line(error)
        times, failed = timing.rounds(calls, sets, device, seconds)
        for name in names:
            key, row = (name, case.layer, case.dtype), {**case._asdict(), "attention": name}
            if name in times:
                row |= {"ms": times[name], "peak": peaks[key], "error": checked[key]}
            else:
                row["why"] = errors.get(name) or failed[name]
            rows.append(row)
    return rows


def faster(rows: list[dict[str, Any]]) -> dict[Case, dict[str, float]]:
    """How many times as fast as eager ours is, forward and backward, round by round."""
    by_case: dict[Case, dict[str, Any]] = {}
    for row in rows:
        if "ms" in row:
            by_case.setdefault(Case(row["layer"], row["dtype"], row["length"]), {})[row["attention"]] = row["ms"]
    mode = "forward+backward"
    return {
        case: timing.ratio(found[EAGER][mode], found[OURS][mode])
        for case, found in by_case.items()
        if EAGER in found and OURS in found
    }


def verdicts(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    found = []
    for case, ratio in faster(rows).items():
        if case.length == TARGET_LENGTH:
            target = TARGETS[case.layer]
            met = "met" if ratio["median"] >= target else "**missed**"
            found.append((f"{case.layer}, {case.dtype}", f"{ratio['median']:.1f}", f"{target:g}", met))
    return found


def tables(rows: list[dict[str, Any]], device: torch.device) -> str:
    ratios, lines = faster(rows), []
    for row in rows:
        case = Case(row["layer"], row["dtype"], row["length"])
        ratio = ratios.get(case) if row["attention"] == OURS else None
        cells = ("", row.get("why", ""), "", "", "")
        if "ms" in row:
            ms = [f"{statistics.median(row['ms'][mode]):.1f}" for mode in timing.MODES]
            cells = (*ms, f"{row['peak'] / 2**20:.0f}", f"{row['error']:.0e}")
        faster_than = f"{ratio['median']:.1f} ({ratio['p20']:.1f} to {ratio['p80']:.1f})" if ratio else ""
        lines.append((case.layer, case.dtype, case.length, row["attention"], *cells, faster_than))
    columns = ("layer", "dtype", "S", "attention", *(f"{mode} ms" for mode in timing.MODES), "peak MiB", "error")
    text = report.markdown_table((*columns, "times as fast as eager (p20 to p80)"), lines)
    if device.type == "cpu" and verdicts(rows):
        head = (f"at S = {TARGET_LENGTH}, forward and backward", "times as fast as eager", "at least", "")
        text = report.markdown_table(head, verdicts(rows)) + "\n\n" + text
    return text


def draw(rows: list[dict[str, Any]]) -> Figure:
    figure = plot.figure(9, 3.8)
    time, memory = figure.subplots(1, 2)
    colors = {EAGER: "tab:gray", OURS: "tab:blue", FLEX: "tab:orange", HUB: "tab:green"}
    done = [row for row in rows if "ms" in row and row["dtype"] == "bf16"]
    for name in dict.fromkeys(row["attention"] for row in done):
        for layer, line in (("full", "-"), ("window", "--")):
            own = [row for row in done if row["attention"] == name and row["layer"] == layer]
            at = [row["length"] for row in own]
            label = f"{name}, {layer if layer == 'full' else f'window {WINDOW}'}"
            ms = [statistics.median(row["ms"]["forward+backward"]) for row in own]
            time.plot(at, ms, line, color=colors[name], marker="o", label=label)
            memory.plot(at, [row["peak"] / 2**20 for row in own], line, color=colors[name], marker="o", label=label)
    for axes, label in ((time, "ms, forward and backward"), (memory, "peak MiB")):
        axes.set(yscale="log", xlabel="sequence length (tokens)", ylabel=label)
        plot.log_axis(axes, sorted({row["length"] for row in done}), base=2)
    time.legend()
    figure.suptitle("An attention layer of gpt-oss in training, bf16")
    return figure


def main(argv: list[str] | None = None, lengths: tuple[int, ...] = LENGTHS) -> None:
    parser, device = report.Parser("gpt_oss", "An attention layer of gpt-oss, by attention and length."), report.pick_device()
    parser.number("--seconds", 8, "time for each case, at least five rounds", least=0)
    args = parser.parse(argv)
    with parser.refusing():
        result = report.Result(parser, args.out, "gpt_oss", device)
    rows = measure(lengths, args.seconds, device)
    notes = (
        f"{HEADS} query heads, {KEY_HEADS} key head, head_dim {DIM}, batch 1, no padding; window {WINDOW}. Medians; ratios are "
        "medians over rounds in which all take their turn. Peak: the most bytes that PyTorch's allocator held in a forward and a "
        "backward pass, inputs included, weights and the mask not. Error: the largest in the output and the gradients of input, "
        "sinks and the query projection, over the largest value, against eager attention in float64, at the shortest length. On "
        "a CPU the times themselves mean little, the ratios do."
    )
    found = {f"{case.layer} {case.dtype} {case.length}": ratio for case, ratio in faster(rows).items()}
    title = "An attention layer of gpt-oss in training"
    result.publish(title, tables(rows, device), notes, {"rows": rows}, {"": draw(rows)}, found)


if __name__ == "__main__":
    main()

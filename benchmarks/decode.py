"""Figure 5 of the paper: the time of one more token against the context, with a cache and from scratch.

    python -m benchmarks.decode

One LLaMA of Transformers with random weights, in turn, so that a busy machine slows all alike: plain causal
attention (sdpa) with a cache, StableMask with a cache, and StableMask that recomputes the whole context for
each token, which a mass that follows the length of the call would need. On a GPU the first two also compiled,
with a static cache; compiling is not timed. The figure to look at is the ratio of StableMask to causal.
"""

import inspect
import statistics
from collections.abc import Callable
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache, StaticCache

import sm_flex_transformers  # noqa: F401  (registers stablemask)
from benchmarks import plot, report

CONTEXTS = (128, 512, 2048)
# Four of the layers of a 1.4B model (Table 5): latency goes by the layer.
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
VOCABULARY, WARM_UP = 4096, 4
CAUSAL, STABLEMASK, SCRATCH = "causal, cache", "StableMask, cache", "StableMask, from scratch"
COMPILED = {CAUSAL: "causal, static cache, compiled", STABLEMASK: "StableMask, static cache, compiled"}
ATTENTION = {CAUSAL: "sdpa", STABLEMASK: "stablemask"}

Step = Callable[[torch.Tensor], Any]


def models(shape: dict[str, int], contexts: tuple[int, ...], device: torch.device) -> dict[str, LlamaForCausalLM]:
    """The same weights with either attention."""
    made = {}
    for name, attention in ATTENTION.items():
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=2 * max(contexts), **shape)  # pyright: ignore[reportArgumentType]
        config._attn_implementation = attention
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        made[name] = LlamaForCausalLM(config).to(device, dtype).eval()
    return made


def cache_name(model: LlamaForCausalLM) -> str:
    """The keyword that forward takes a cache under: "cache" from Transformers 5.24 on, "past_key_values" before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def cached_step(model: Any, cache: DynamicCache | StaticCache, ids: torch.Tensor) -> Step:
    """Fills the cache with ids and returns what decodes one more token, at one more position each time."""
    prefill = getattr(model, "_orig_mod", model)
    kept = {cache_name(prefill): cache}
    prefill(ids, **kept, logits_to_keep=1)
    position = torch.full((1, 1), ids.shape[1], device=ids.device)

    def step(token: torch.Tensor) -> None:
        model(token, **kept, position_ids=position.clone())
        position.add_(1)

    return step


def steps_of(made: dict[str, LlamaForCausalLM], compiled: dict[str, Any], ids: torch.Tensor, steps: int) -> dict[str, Step]:
    room = ids.shape[1] + WARM_UP + steps
    found = {name: cached_step(model, DynamicCache(config=model.config), ids) for name, model in made.items()}
    for name, model in compiled.items():
        found[COMPILED[name]] = cached_step(model, StaticCache(config=made[name].config, max_cache_len=room), ids)
    found[SCRATCH] = lambda token: made[STABLEMASK](torch.cat([ids, token], 1), use_cache=False, logits_to_keep=1)
    return found


@torch.no_grad()
def measure(
    shape: dict[str, int], contexts: tuple[int, ...], steps: int, device: torch.device
) -> dict[str, dict[int, list[float]]]:
    """Milliseconds of each step, by variant and context."""
    made = models(shape, contexts, device)
    compiled = {name: torch.compile(model, dynamic=False) for name, model in made.items()} if device.type == "cuda" else {}
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    times: dict[str, dict[int, list[float]]] = {}
    with tqdm(total=len(contexts) * (WARM_UP + steps), unit="step", dynamic_ncols=True) as bar:
        for context in contexts:
            torch._dynamo.reset()
            ids = torch.randint(VOCABULARY, (1, context), device=device)
            variants = steps_of(made, compiled, ids, steps)
            for i in range(WARM_UP + steps):
                for name, step in variants.items():
                    if name == SCRATCH and i % 8:  # slow, and its spread is small beside its size
                        continue
                    start = report.now(device)
                    step(token)
                    if i >= WARM_UP:
                        times.setdefault(name, {}).setdefault(context, []).append(1e3 * (report.now(device) - start))
                bar.set_postfix_str(f"context {context}", refresh=False)
                bar.update()
    return times


def ratios(times: dict[str, dict[int, list[float]]], context: int) -> dict[str, float]:
    """StableMask over causal, the median over steps that were taken one after the other."""
    pairs = {"cache": (STABLEMASK, CAUSAL), "static cache, compiled": (COMPILED[STABLEMASK], COMPILED[CAUSAL])}
    return {
        what: statistics.median(a / b for a, b in zip(times[ours][context], times[theirs][context], strict=True))
        for what, (ours, theirs) in pairs.items()
        if ours in times
    }


def table(times: dict[str, dict[int, list[float]]]) -> str:
    contexts = list(times[CAUSAL])
    rows: list[tuple[str, ...]] = []
    for name, by_context in times.items():
        found = [report.median_and_fifths(by_context[context]) for context in contexts]
        rows.append((name, *(f"{x['median']:.2f} ({x['p20']:.2f} to {x['p80']:.2f})" for x in found)))
    for what in ratios(times, contexts[0]):
        rows.append((f"*StableMask / causal, {what}*", *(f"*{ratios(times, context)[what]:.3f}*" for context in contexts)))
    return report.markdown_table(("ms per token, median (p20 to p80)", *(f"context {context}" for context in contexts)), rows)


def draw(times: dict[str, dict[int, list[float]]]) -> Figure:
    figure = plot.figure(6, 3.6)
    axes = figure.subplots()
    for name, by_context in times.items():
        color = "tab:orange" if name == SCRATCH else "tab:blue" if name.startswith("StableMask") else "tab:gray"
        line, marker = "--" if name.startswith("causal") else "-", "s" if "compiled" in name else "o"
        medians = [statistics.median(values) for values in by_context.values()]
        axes.plot(list(by_context), medians, line, color=color, marker=marker, label=name)
    axes.set(yscale="log", xlabel="context (tokens)", ylabel="ms per token")
    plot.log_axis(axes, list(times[CAUSAL]))
    axes.legend()
    return figure


def main(argv: list[str] | None = None, shape: dict[str, int] | None = None, contexts: tuple[int, ...] = CONTEXTS) -> None:
    shape, device = shape or SHAPE, report.pick_device()
    parser = report.Parser("decode", "The time of one more token, by attention and context.")
    parser.number("--steps", 40, "tokens at each context", least=16)
    args = parser.parse(argv)
    with parser.refusing():
        result = report.Result(parser, args.out, "decode", device)
    times = measure(shape, contexts, args.steps, device)
    found = {"ratios": {context: ratios(times, context) for context in contexts}, "shape": shape}
    notes = (
        f"Ratios are medians over adjacent steps. Batch 1, random weights, {report.listed(shape)} "
        "On a CPU the times themselves mean little, the ratios do."
    )
    title = "Latency of a decode step (Figure 5)"
    result.publish(title, table(times), notes, {"ms": times, **found}, {"": draw(times)}, summary=found)


if __name__ == "__main__":
    main()

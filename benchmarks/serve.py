"""What StableMask costs in vLLM, on a CPU: decode, prefill whole and in chunks, and a served load. Where vLLM is installed:

    python -m benchmarks.serve

One Llama with random weights is served, with StableMask and with vLLM's own causal attention in turn, in one engine: its
layers are told before each step which of the two they are, so that a busy machine slows both alike. Causal is vLLM's own code
to the bit (tests/integrations/vllm/test_other_models.py).

Decode: steps of a running batch, one of each in turn. Prefill: a prompt from its arrival to its first token. Load: requests
arrive at random times, the same for both; the latencies count from the arrival.
"""

# pyright: reportMissingImports=false
import importlib.metadata
import itertools
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import report, serve_tables
from benchmarks.serve_tables import CAUSAL, STABLEMASK, VARIANTS

ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
HOW = (
    "Decode: steps of a running batch, one of each in turn. Prefill: a prompt from its arrival to its first token. "
    "Load: requests of 32 to 512 tokens arrive at random times, the same for both, and write 16 to 64; the latencies "
    "count from the arrival."
)
WARM_UP = 4  # steps, or prompts
VOCABULARY = 16000
NAMES = itertools.count()
LOAD_PROMPT, LOAD_ANSWER = (32, 512), (16, 64)  # tokens of a request, drawn evenly


def main(argv: list[str] | None = None) -> None:
    parser = report.Parser("serve", "Decode, prefill and a served load in vLLM, with StableMask and with causal attention.")
    parser.number("--layers", 6, "of the model")
    parser.number("--width", 1024, "of the model, heads of 64, two query heads to a key head", least=128)
    parser.number("--length", 8192, "N, the training length")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="(default %(default)s)")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32], help="of decode (default %(default)s)")
    parser.add_argument("--contexts", type=int, nargs="*", default=[128, 1024, 4096], help="of decode (default %(default)s)")
    parser.add_argument("--prompts", type=int, nargs="*", default=[512, 1024, 2048, 4096], help="(default %(default)s)")
    parser.number("--chunk", 256, "tokens of a chunk")
    parser.number("--steps", 40, "decode steps of each", least=2)
    parser.number("--rounds", 7, "prompts of each", least=2)
    parser.number("--requests", 40, "of the load")
    parser.number("--loads", 3, "runs of the load of each")
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second (default %(default)s)")
    parser.number("--cache", 4, "GiB of the cache")
    parser.add_argument("--compile", action="store_true", help="the layers compiled by inductor, as vLLM does by default")
    args = parser.parse(argv)
    os.environ.update(ENVIRONMENT, VLLM_CPU_KVCACHE_SPACE=str(args.cache))
    with parser.refusing(ImportError):
        version = next((found for name in ("vllm-cpu", "vllm") if (found := _version(name))), None)
        if version is None:
            raise ImportError("vLLM is not installed here")
        if args.width % 128:
            raise ValueError(f"--width must be a multiple of 128, got {args.width}")
        what = f"serve-{args.dtype}" + ("-compiled" if args.compile else "")
        result = report.Result(parser, args.out, what, torch.device("cpu"), vllm=version)
    # A batch's first request goes on while the prompts of the others come.
    written = 2 * (args.steps + WARM_UP) + max(args.batches, default=0) + 8
    longest = max([*args.prompts, *args.contexts, sum(x[1] for x in (LOAD_PROMPT, LOAD_ANSWER))]) + written
    record: dict[str, Any] = {"decode": [], "prefill": [], "load": []}
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), args, longest)
        with engine(Path(folder), args, longest, longest) as llm:
            for batch in args.batches:
                for context in args.contexts:
                    record["decode"].append({"batch": batch, "context": context, **decode(llm, batch, context, args.steps)})
                    print(record["decode"][-1], flush=True)
            for prompt in args.prompts:
                record["prefill"].append({"prompt": prompt, "chunk": None, **prefill(llm, prompt, args.rounds)})
                print(record["prefill"][-1], flush=True)
        with engine(Path(folder), args, longest, args.chunk) as llm:
            for prompt in [prompt for prompt in args.prompts if prompt > args.chunk]:
                record["prefill"].append({"prompt": prompt, "chunk": args.chunk, **prefill(llm, prompt, args.rounds)})
                print(record["prefill"][-1], flush=True)
        with engine(Path(folder), args, longest, 2048) as llm:
            record["load"] = load(llm, args.requests, args.rate, args.loads)
    shape = f"Llama with {args.layers} layers of width {args.width}, {args.width // 64} heads, {args.dtype}, random weights; "
    notes = f"{shape}head-wise gamma, N = {args.length}. ms: median (p20 to p80). {HOW}"
    result.publish(
        "vLLM with StableMask and with causal attention",
        serve_tables.tables(record),
        notes,
        record,
        summary=serve_tables.summary(record),
    )


def _version(name: str) -> str | None:
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return None


def save_model(folder: Path, args: Any, longest: int) -> None:
    from transformers import LlamaConfig

    heads = args.width // 64
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.width,
        intermediate_size=args.width * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=64,
        max_position_embeddings=max(longest, args.length),
        architectures=["LlamaForCausalLM"],
    )
    config.stablemask = {"gamma": "headwise", "length": args.length}
    config.save_pretrained(folder)


@contextmanager
def engine(folder: Path, args: Any, longest: int, tokens: int) -> Iterator[Any]:
    """vLLM's engine in this process, which computes at most so many tokens in a step."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype=args.dtype,
        enforce_eager=not args.compile,
        max_model_len=longest,
        max_num_batched_tokens=tokens,
        max_num_seqs=max([8, *args.batches]),
        enable_prefix_caching=False,
    )
    for variant in VARIANTS:
        prefill_once(llm.llm_engine, variant, 64)
    yield llm.llm_engine
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()


def choose(engine: Any, variant: str) -> None:
    """Tells every attention layer of the engine which of the two it is."""
    engine.collective_rpc(_choose, args=(variant == STABLEMASK,))


def _choose(worker: Any, stablemask: bool) -> None:
    for layer in worker.vllm_config.compilation_config.static_forward_context.values():
        layer.impl.kept = getattr(layer.impl, "kept", layer.impl.stablemask)
        layer.impl.stablemask = layer.impl.kept if stablemask else None
    for group in worker.model_runner.attn_groups[0]:
        for builder in group.metadata_builders:
            builder.serves = stablemask


def ask(engine: Any, prompt: int, tokens: int) -> str:
    """Adds a request of random tokens."""
    from vllm import SamplingParams

    name = str(next(NAMES))
    ids = torch.randint(0, VOCABULARY, (prompt,)).tolist()
    engine.add_request(name, {"prompt_token_ids": ids}, SamplingParams(max_tokens=tokens, detokenize=False, ignore_eos=True))
    return name


def decode(engine: Any, batch: int, context: int, steps: int) -> dict[str, Any]:
    """Milliseconds of a step of each, in turn, over one running batch."""
    total = 2 * (steps + WARM_UP)
    waiting = {ask(engine, context - 1, total + batch + 4) for _ in range(batch)}
    choose(engine, CAUSAL)
    while waiting:  # the prompts; those that are through go on meanwhile
        waiting -= {output.request_id for output in engine.step() if output.outputs[0].token_ids}
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for i in range(total):
        variant = VARIANTS[(i + i // 2) % 2]  # causal, StableMask, StableMask, causal: the context grows
        choose(engine, variant)
        start = time.perf_counter()
        outputs = engine.step()
        if i >= 2 * WARM_UP:
            found[variant].append(1e3 * (time.perf_counter() - start))
        assert len(outputs) == batch
    finish(engine)
    return found


def finish(engine: Any) -> None:
    while engine.has_unfinished_requests():
        engine.step()


def prefill_once(engine: Any, variant: str, prompt: int) -> float:
    choose(engine, variant)
    start = time.perf_counter()
    ask(engine, prompt, 1)
    finish(engine)
    return 1e3 * (time.perf_counter() - start)


def prefill(engine: Any, prompt: int, rounds: int) -> dict[str, Any]:
    """Milliseconds from a prompt to its first token, of each in turn."""
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for i in range(rounds + 1):
        for variant in VARIANTS if i % 2 else reversed(VARIANTS):
            ms = prefill_once(engine, variant, prompt)
            if i:
                found[variant].append(ms)
    return found


def load(engine: Any, requests: int, rate: float, loads: int) -> list[dict[str, Any]]:
    draw = random.Random(0)
    moments, now = [], 0.0
    for _ in range(requests):
        now += draw.expovariate(rate)
        moments.append((now, draw.randint(*LOAD_PROMPT), draw.randint(*LOAD_ANSWER)))
    runs = []
    for i in range(loads):
        for variant in VARIANTS if i % 2 else reversed(VARIANTS):
            choose(engine, variant)
            runs.append({"attention": variant, **serve(engine, moments)})
            print({name: value for name, value in runs[-1].items() if not isinstance(value, list)}, flush=True)
    return runs


def serve(engine: Any, moments: Sequence[tuple[float, int, int]]) -> dict[str, Any]:
    """Tokens a second, and in ms, of each request: the wait for its first token, the mean time of one more, and the whole."""
    arrived: dict[str, float] = {}
    first: dict[str, float] = {}
    waits, each, whole, tokens = [], [], [], 0
    start, left = time.perf_counter(), list(moments)
    while left or engine.has_unfinished_requests():
        now = time.perf_counter() - start
        while left and left[0][0] <= now:
            moment, prompt, answer = left.pop(0)
            arrived[ask(engine, prompt, answer)] = moment
        if not engine.has_unfinished_requests():
            time.sleep(max(0.0, left[0][0] - now))
            continue
        for output in engine.step():
            name, now = output.request_id, time.perf_counter() - start
            written = len(output.outputs[0].token_ids)
            if written and name not in first:
                first[name] = now
                waits.append(1e3 * (now - arrived[name]))
            if output.finished:
                tokens += written
                each.append(1e3 * (now - first[name]) / max(1, written - 1))
                whole.append(1e3 * (now - arrived[name]))
    return {"tokens a second": tokens / (time.perf_counter() - start), "first": waits, "each": each, "whole": whole}


if __name__ == "__main__":
    main()

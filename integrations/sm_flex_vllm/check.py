"""Is a model served as it was trained? python -m sm_flex_vllm check MODEL

Loads the model in vLLM and in Transformers, there with StableMask and with plain causal attention, and compares the
log-probabilities of the same tokens: prompts of random tokens, and what vLLM writes after them. Exit code 0: vLLM serves
StableMask. 1: it does not. 2: bad input.
"""

# pyright: reportMissingImports=false

import argparse
import copy
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import entry_points
from typing import Any, NamedTuple, NoReturn

GROUP, NAME = "vllm.general_plugins", "sm_flex"
NEW_TOKENS = 8
DTYPES = ("float32", "bfloat16", "float16")
# Served where vLLM is nearer to StableMask than to causal attention by so much, over the mean of all tokens.
NEARER = 4


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)


class Text(NamedTuple):
    """Token ids, and vLLM's log-probability of each after the first."""

    ids: list[int]
    log_probs: list[float]


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m sm_flex_vllm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    check = commands.add_parser("check", help="compare vLLM's log-probabilities of a model with Transformers'")
    check.add_argument("model", metavar="MODEL", help="a folder, or a name on the Hugging Face hub")
    check.add_argument(
        "--dtype", default="float32", choices=DTYPES, help="of both (default %(default)s; FlashAttention needs bfloat16)"
    )
    check.add_argument("--tokens", type=int, default=256, help="the longest prompt (default %(default)s)")
    check.add_argument("--engine", type=_json_object, default={}, metavar="JSON", help="more arguments of vllm.LLM")
    args = parser.parse_args(argv)
    if args.tokens < 2:
        check.error(f"--tokens must be at least 2, got {args.tokens}")
    raise SystemExit(run(args.model, args.dtype, args.tokens, args.engine))


def _json_object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError
    return found


_json_object.__name__ = "JSON object"  # as argparse names it


def why_not_loaded() -> str | None:
    """Why vLLM would not load the plugin, or None."""
    found = [x for x in entry_points(group=GROUP) if x.name == NAME]
    if not found:
        return f"no installed distribution has the entry point {NAME} of {GROUP}: pip install sm-flex"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in allowed.split(","):
        return f"VLLM_PLUGINS={allowed!r} leaves out {NAME}"
    try:
        found[0].load()
    except Exception as error:  # what vLLM would log, and go on without
        return f"it cannot be imported: {type(error).__name__}: {error}"
    return None


def run(model: str, dtype: str, tokens: int, engine: dict[str, Any]) -> int:
    problem = why_not_loaded()
    if problem is not None:
        print(f"NOT SERVED: vLLM does not load the plugin: {problem}")
        return 1
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from sm_flex_transformers import settings

    config = _config(model, engine.get("hf_overrides"))
    if settings.of(config) is None and settings.of(config.get_text_config()) is None:
        print(
            f"{model} has no config.stablemask: vLLM serves its own attention, and there is nothing to compare", file=sys.stderr
        )
        return 2
    # In a process of its own, which gives its memory back and keeps to itself what vLLM changes in Transformers.
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            texts, layers = process.submit(_ask_vllm, model, dtype, tokens, engine).result()
    except Exception as error:  # whatever stops vLLM, a refusal of ours among it; its own log says where
        print(f"NOT SERVED: vLLM does not start with it: {' '.join(str(error).split())}")
        return 1
    served = [text.log_probs for text in texts]
    stablemask, causal = (_ask_transformers(model, config, dtype, name, texts) for name in ("stablemask", "sdpa"))
    near, far, apart = (_difference(*pair) for pair in ((served, stablemask), (served, causal), (stablemask, causal)))
    ours = sum(name.startswith("StableMask") for name in layers)
    print(f"attention layers with StableMask: {ours} of {len(layers)}")
    print(f"log-probabilities of {sum(map(len, served))} tokens, vLLM against Transformers: mean difference, largest")
    print(f"  with StableMask        {near.mean:.1e}  {near.largest:.1e}")
    print(f"  with causal attention  {far.mean:.1e}  {far.largest:.1e}")
    if ours == len(layers) and NEARER * near.mean <= far.mean:
        print("SERVED")
        return 0
    if ours == len(layers) and apart.mean < NEARER * near.mean:
        print("UNDECIDED: with its settings, on these tokens, StableMask is all but causal attention; try another --tokens")
    else:
        print("NOT SERVED: vLLM's log-probabilities are not those of the model with StableMask")
    return 1


class Difference(NamedTuple):
    mean: float
    largest: float


def _difference(ours: list[list[float]], theirs: list[list[float]]) -> Difference:
    pairs = zip(ours, theirs, strict=True)
    found = [abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True)]
    return Difference(sum(found) / len(found), max(found))


def _config(model: str, overrides: dict[str, Any] | None) -> Any:
    """The model's config, with the hf_overrides that vLLM is given, set as vLLM sets them."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        print(f"{model}: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error
    for name, value in (overrides or {}).items():
        part: Any = getattr(config, name, None)
        if hasattr(part, "to_dict"):
            part.update(value)
        else:
            setattr(config, name, value)
    return config


def _ask_vllm(model: str, dtype: str, tokens: int, engine: dict[str, Any]) -> tuple[list[Text], list[str]]:
    """The texts, and the name of the class that each attention layer runs."""
    import torch
    from vllm import LLM, SamplingParams

    settings = {"skip_tokenizer_init": True, "enforce_eager": True, "enable_prefix_caching": False, **engine}
    llm = LLM(model, dtype=dtype, **settings)
    config = llm.llm_engine.model_config
    longest = min(tokens, config.max_model_len - NEW_TOKENS)
    generator = torch.Generator().manual_seed(0)
    lengths = sorted({2, max(2, longest // 8), max(2, longest // 2), longest})
    prompts = [torch.randint(0, config.get_vocab_size(), (n,), generator=generator).tolist() for n in lengths]
    params = SamplingParams(
        max_tokens=NEW_TOKENS, temperature=0, logprobs=0, prompt_logprobs=0, detokenize=False, ignore_eos=True
    )
    texts = []
    for output in llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False):
        ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        steps = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        texts.append(Text(ids, [step[token].logprob for token, step in zip(ids[1:], steps, strict=True)]))
    layers = [name for names in llm.collective_rpc(_implementations) for name in names]
    llm.llm_engine.engine_core.shutdown()
    return texts, layers


def _implementations(worker: Any) -> list[str]:
    """In each worker: the class of every attention layer's implementation."""
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    return [type(layer.impl).__name__ for layer in layers if hasattr(layer, "impl")]


def _ask_transformers(model: str, config: Any, dtype: str, attention: str, texts: list[Text]) -> list[list[float]]:
    """The log-probability of each token after the first, one text at a time, in one pass."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    import sm_flex_transformers  # noqa: F401

    logging.set_verbosity_error()  # of the causal one: that it runs without StableMask
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model, config=copy.deepcopy(config), attn_implementation=attention, dtype=getattr(torch, dtype)
        )
    found = []
    for text in texts:
        ids = torch.tensor([text.ids], device=loaded.device)
        with torch.no_grad():
            logits = loaded(ids, use_cache=False).logits[0, :-1].float()
        found.append(logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].tolist())
    return found

"""Small models, vLLM engines in this process that serve them, and what Transformers says of the same tokens."""

# pyright: reportMissingImports=false

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

# vLLM reads these when it is imported. One process, one thread that does not spin, no network.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "passive",
    "VLLM_LOGGING_LEVEL": "INFO",
}
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 512
LENGTHS = (1, 2, 7, 33, 100, 127, 128, 129, 200, 300)
HEADS = 8
N = 128


def save(folder: Path, model_type: str = "llama", stablemask: Any = "default", **settings: Any) -> Path:
    """A model with random weights whose text depends on its attention: eight query heads, two key heads, three layers."""
    small: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    config = AutoConfig.for_model(model_type, **{**small, **settings})
    if stablemask is not None:
        config.stablemask = {"gamma": "headwise", "length": N} if stablemask == "default" else stablemask
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def numbers(*shape: int) -> Any:
    """Plain lists of numbers around 0."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).tolist()


def prompts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@contextmanager
def engine(folder: Path, **settings: Any) -> Iterator[Any]:
    """vllm.LLM in this process."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    small: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 400,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 8,
        "block_size": 32,
        "num_gpu_blocks_override": 128,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    }
    set_num_threads = torch.set_num_threads
    llm = LLM(str(folder), **{**small, **settings})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
        torch.set_num_threads = set_num_threads


@contextmanager
def backend_in_place_of_cpu_attn(path: str | None) -> Iterator[None]:
    """What vLLM finds under the name CPU_ATTN, the one backend that its CPU platform takes; None: its own, without the plugin."""
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    load_general_plugins()
    ours = AttentionBackendEnum.CPU_ATTN.get_path()
    if path is None:
        AttentionBackendEnum.CPU_ATTN.clear_override()
    else:
        register_backend(AttentionBackendEnum.CPU_ATTN, path)
    selector._cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        register_backend(AttentionBackendEnum.CPU_ATTN, ours)
        selector._cached_get_attn_backend.cache_clear()


class Answer(NamedTuple):
    tokens: list[int]
    log_probs: list[float]


def greedy(llm: Any, asked: Sequence[list[int]], tokens: int = 20, **settings: Any) -> list[Answer]:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=tokens, temperature=0, logprobs=0, detokenize=False, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked], params, use_tqdm=False, **settings)
    found = []
    for output in outputs:
        ids = list(output.outputs[0].token_ids)
        found.append(Answer(ids, [step[token].logprob for token, step in zip(ids, output.outputs[0].logprobs, strict=True)]))
    return found


def counted(llm: Any, name: str) -> int:
    """One of the engine's counters."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")


def greedy_in_a_process(
    folder: Path,
    asked: Sequence[list[int]],
    tokens: int = 20,
    environment: dict[str, str] | None = None,
    happened: Sequence[str] = (),
    **settings: Any,
) -> list[Answer]:
    """greedy() in a process of its own: for what vLLM runs in several, or leaves a mark on the one that it has run in.

    happened: counters of the engine that must not be 0 in the end.
    """
    task = json.dumps({"folder": str(folder), "asked": asked, "tokens": tokens, "happened": happened, "settings": settings})
    found = subprocess.run(
        [sys.executable, "-m", "tests.helpers.vllm_engines"],
        input=task,
        env={**os.environ, **(environment or {})},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-8000:]
    return [Answer(*answer) for answer in json.loads(found.stdout.splitlines()[-1])]


class Agreement(NamedTuple):
    """How many answers are the tokens that Transformers would choose, and the largest difference of a log-probability."""

    equal: int
    worst: float


def agreement(model: Any, asked: Sequence[list[int]], answers: Sequence[Answer]) -> Agreement:
    """One prompt at a time, the whole answer in one pass without a cache."""
    equal, worst = 0, 0.0
    for ids, answer in zip(asked, answers, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([ids + answer.tokens]), use_cache=False).logits[0, len(ids) - 1 : -1]
        expected = logits.float().log_softmax(-1)
        equal += expected.argmax(-1).tolist() == answer.tokens
        theirs = expected.gather(-1, torch.tensor(answer.tokens)[:, None])[:, 0]
        worst = max(worst, (theirs - torch.tensor(answer.log_probs)).abs().max().item())
    return Agreement(equal, worst)


# Two implementations of the same float32 layers; the log-probabilities of causal attention differ by as much.
CLOSE = 1e-4
WINDOW = 40
GEMMA2: dict[str, Any] = {
    "tie_word_embeddings": True,
    "sliding_window": WINDOW,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": None,
    "query_pre_attn_scalar": 32,
}

GPT_OSS: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": WINDOW,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 2.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 256,
        "rope_theta": 10000.0,
    },
}


def check(
    folder: Path, model: Any = None, *, count: int = 20, lengths: Sequence[int] = LENGTHS, close: float = CLOSE, **settings: Any
) -> list[Answer]:
    """An engine's greedy answers, which must be Transformers' to the token."""
    asked = prompts(lengths)
    with engine(folder, **settings) as llm:
        answers = greedy(llm, asked, count)
    found = agreement(model or transformers_model(folder), asked, answers)
    assert found.equal == len(asked), found
    assert found.worst < close, found
    return answers


def transformers_model(folder: Path, attention: str = "stablemask", **settings: Any) -> Any:
    import sm_flex_transformers  # noqa: F401

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32, **settings).eval()


def gpt_oss_with_mass(folder: Path) -> Any:
    """gpt-oss in Transformers, with log(e^sink + M) of each row in the place of its sinks: eq. 11 typed out in float64."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    from sm_flex import headwise_gamma, log_mass

    def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **kwargs: Any) -> Any:
        rows = query.shape[2]
        assert rows == key.shape[2]
        k, v = (x.repeat_interleave(query.shape[1] // x.shape[1], 1).double() for x in (key, value))
        scores = query.double() @ k.mT * scaling
        seen = torch.ones(rows, rows, dtype=torch.bool).tril()
        if attention_mask is not None:
            seen = seen & attention_mask
        mass = log_mass(headwise_gamma(query.shape[1]).double(), torch.arange(rows), N)
        mass = torch.logaddexp(mass, module.sinks.double()[:, None]).expand(query.shape[0], -1, -1)
        scores = torch.cat([scores.masked_fill(~seen, -torch.inf), mass.unsqueeze(-1)], -1)
        out = scores.softmax(-1)[..., :-1] @ v
        return out.to(query.dtype).transpose(1, 2).contiguous(), None

    AttentionInterface.register("eq_11_with_sinks", attention)
    AttentionMaskInterface.register("eq_11_with_sinks", sdpa_mask)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eq_11_with_sinks", dtype=torch.float32).eval()


if __name__ == "__main__":
    task = json.loads(sys.stdin.read())
    with engine(task["folder"], **task["settings"]) as llm:
        answers = greedy(llm, task["asked"], task["tokens"])
        for name in task["happened"]:
            assert counted(llm, name) > 0, name
    print(f"\n{json.dumps(answers)}", flush=True)

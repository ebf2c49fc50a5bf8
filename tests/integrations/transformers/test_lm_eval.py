"""Table 2's road: a saved StableMask model through lm-evaluation-harness, by the documented command."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.helpers import ROOT
from tests.helpers.transformers_models import COMMON

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to", "sea", "one", "two", "three"]
DOCUMENTS: list[dict[str, Any]] = [
    {"text": "the cat sat on", "choices": ["a mat", "the sea"], "gold": 0},
    {"text": "one", "choices": ["two three", "cat"], "gold": 1},
    {"text": "a dog ran to the sea and the cat sat on a mat and", "choices": ["one", "two"], "gold": 0},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A random model, its tokenizer, and two local tasks: one scored by loglikelihood and one by generation."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(**{**COMMON, "vocab_size": len(vocabulary), "stablemask": {"gamma": 0.05, "length": 40}})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    fast.save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)))
    common = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}\n"
        "test_split: test\ndoc_to_text: text\n"
    )
    (tmp_path / "choice.yaml").write_text(
        f"task: choice\noutput_type: multiple_choice\n{common}doc_to_choice: choices\ndoc_to_target: gold\n"
        "metric_list: [{metric: acc}]\n"
    )
    (tmp_path / "generate.yaml").write_text(
        f"task: generate\noutput_type: generate_until\n{common}doc_to_target: '{{{{choices[gold]}}}}'\n"
        "generation_kwargs: {until: [never], max_gen_toks: 12, do_sample: false}\nmetric_list: [{metric: exact_match}]\n"
    )
    return tmp_path


def harness(folder: Path, model_args: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "sm_flex_transformers.lm_eval", "run", "--model", "hf", "--device", "cpu",
        "--model_args", model_args, "--tasks", "choice,generate", "--include_path", str(folder), "--batch_size", "3",
        "--output_path", str(folder / "out"), "--log_samples",
    ]  # fmt: skip
    paths = os.pathsep.join([str(ROOT), str(ROOT / "integrations")])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "PYTHONPATH": paths}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def evaluate(folder: Path) -> dict[str, list]:
    """The loglikelihoods of the choices and the generated texts, read from what the harness logs."""
    done = harness(folder, f"pretrained={folder}/model,attn_implementation=stablemask,dtype=float32")
    assert done.returncode == 0, done.stderr[-2000:]
    out = folder / "out"
    found: dict[str, list] = {}
    for task in ("choice", "generate"):
        (samples,) = out.rglob(f"samples_{task}_*.jsonl")
        rows = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"])
        found[task] = [row["filtered_resps"] for row in rows]
    return found


def test_the_harness_scores_left_padded_batches_as_the_model_does_alone(folder: Path) -> None:
    samples = evaluate(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")

    def model(attention: str) -> Any:
        return LlamaForCausalLM.from_pretrained(folder / "model", attn_implementation=attention).eval()

    def tokens(text: str) -> Tensor:
        return torch.tensor([tokenizer(text)["input_ids"]])

    @torch.no_grad()
    def loglikelihood(attention: str, text: str, choice: str) -> float:
        logits = model(attention)(tokens(f"{text} {choice}")).logits[0].log_softmax(-1)
        targets = tokens(choice)[0]
        return logits[-len(targets) - 1 : -1].gather(1, targets[:, None]).sum().item()

    ours = model("stablemask")
    for document, scores, texts in zip(DOCUMENTS, samples["choice"], samples["generate"], strict=True):
        found = [float(score) for score, _ in scores]
        assert found == pytest.approx([loglikelihood("stablemask", document["text"], c) for c in document["choices"]], rel=1e-4)
        assert found != pytest.approx([loglikelihood("sdpa", document["text"], c) for c in document["choices"]], rel=1e-3)
        prompt = tokens(document["text"])
        alone = ours.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :]
        assert texts == [tokenizer.decode(alone, skip_special_tokens=True)]


def test_a_model_that_runs_another_attention_is_refused(folder: Path) -> None:
    done = harness(folder, f"pretrained={folder}/model")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        "error: the model runs sdpa, not stablemask or sm_flex: give attn_implementation=stablemask in --model_args"
    )

"""sm_flex_nanochat on a stand-in checkout: eq. 11 with windows, grouped heads and a cache; runs, checkpoints, refusals."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sm_flex.testing import oracle
from sm_flex_launcher.flags import BadInput, parse_flags
from sm_flex_nanochat import attention, launcher
from tests.helpers.launching import Checkout, checked_out, refusal

N, B, H, KV_HEADS, D = 17, 3, 4, 2, 5


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Checkout]:
    with checked_out("nanochat", tmp_path / "nanochat", monkeypatch) as made:
        yield made


def replaced(checkout: Checkout, gamma: str) -> tuple[ModuleType, attention.Functions]:
    gpt = checkout.module("nanochat.gpt")
    flags = parse_flags(["--attn=stablemask", f"--gamma={gamma}"])[0]
    return gpt, attention.replace(checkout.loaded("nanochat.flash_attention"), gpt, flags)


def functions_for(checkout: Checkout, gamma: str, length: int = N) -> attention.Functions:
    gpt, functions = replaced(checkout, gamma)
    functions.prepare(gpt.GPTConfig(sequence_len=length, n_head=H), torch.device("cpu"))
    return functions


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D, dtype=torch.float64, requires_grad=True)


def by_the_oracle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gamma: Any, window: int, **kwargs: Any) -> torch.Tensor:
    i, j = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
    visible = kwargs.pop("visible", j >= i - window if window >= 0 else None)
    q, k, v = [x.transpose(1, 2) for x in (q, k, v)]
    return oracle(q, k, v, gamma=gamma, length=N, visible=visible, **kwargs)[0].transpose(1, 2)


@pytest.mark.parametrize("window", [-1, 0, 4, 10, 11, N])
@pytest.mark.parametrize("gamma", ["headwise", "0.5", "0,0.1,2,inf"])
def test_training_is_equation_11_with_n_the_sequence_len(checkout: Checkout, gamma: str, window: int) -> None:
    functions = functions_for(checkout, gamma)
    q, k, v = rows(B, 11, H), rows(B, 11, KV_HEADS), rows(B, 11, KV_HEADS)
    ours = functions.flash_attn_func(q, k, v, causal=True, window_size=(window, 0))
    expected = by_the_oracle(q, k, v, functions.gamma, window)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("window", [-1, 3, N])
def test_prompt_chunk_and_decode_with_a_cache_are_the_full_pass(checkout: Checkout, window: int) -> None:
    functions = functions_for(checkout, "headwise", N)
    total = N + 3  # beyond the training length too
    q, k, v = rows(B, total, H), rows(B, total, KV_HEADS), rows(B, total, KV_HEADS)
    full = functions.flash_attn_func(q, k, v, causal=True, window_size=(window, 0))
    k_cache, v_cache = torch.full((2, B, 23, KV_HEADS, D), 99.0, dtype=torch.float64)
    parts, start = [], 0
    with torch.no_grad():
        for size in (7, 4, *[1] * (total - 11)):
            new = slice(start, start + size)
            seqlens = torch.full((B,), start, dtype=torch.int32)
            out = functions.flash_attn_with_kvcache(
                q[:, new], k_cache, v_cache, k=k[:, new], v=v[:, new],
                cache_seqlens=seqlens, causal=True, window_size=(window, 0),
            )  # fmt: skip
            parts.append(out)
            start += size
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-10, atol=1e-10)
    assert torch.equal(k_cache[:, :total], k)
    assert torch.equal(v_cache[:, :total], v)
    assert (k_cache[:, total:] == 99).all()


def test_each_row_of_a_batch_has_its_own_offset(checkout: Checkout) -> None:
    functions = functions_for(checkout, "0.5")
    q, k, v = rows(B, 2, H), rows(B, 2, KV_HEADS), rows(B, 2, KV_HEADS)
    k_cache, v_cache = torch.randn(2, B, 13, KV_HEADS, D, dtype=torch.float64)
    seqlens = torch.tensor([0, 5, 11], dtype=torch.int32)
    positions = seqlens[:, None].long() + torch.arange(2)
    with torch.no_grad():
        ours = functions.flash_attn_with_kvcache(q, k_cache, v_cache, k=k, v=v, cache_seqlens=seqlens, causal=True)
        for row, start in enumerate(seqlens.tolist()):
            assert torch.equal(k_cache[row, start : start + 2], k[row])
        visible = (torch.arange(13) <= positions[..., None])[:, None]
        expected = by_the_oracle(q, k_cache, v_cache, 0.5, -1, positions=positions, visible=visible)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_a_cache_can_be_read_without_new_keys(checkout: Checkout) -> None:
    functions = functions_for(checkout, "0.5")
    q, k_cache, v_cache = rows(B, 2, H), rows(B, 13, KV_HEADS), rows(B, 13, KV_HEADS)
    with torch.no_grad():
        ours = functions.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=torch.tensor([7] * B), causal=True)
        expected = by_the_oracle(q, k_cache[:, :7], v_cache[:, :7], 0.5, -1, positions=torch.tensor([5, 6]))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_into_one_graph(checkout: Checkout) -> None:
    gpt, _ = replaced(checkout, "headwise")
    model = gpt.GPT(gpt.GPTConfig())
    model.init_weights()
    idx = torch.randint(29, (2, 16))
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    loss, expected = compiled(idx, idx), model(idx, idx)
    torch.testing.assert_close(loss, expected)
    weights = list(model.parameters())
    for a, b in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_causal_is_the_script_untouched_and_infinite_gamma_equals_it(
    checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    before = checkout.hashes()
    checkout.plain("scripts.base_train", "--num-iterations=5")
    plain = capsys.readouterr().out
    meta = Path("out/meta_000005.json").read_text()
    checkout.run(launcher.main, "scripts.base_train", "--attn=causal", "--num-iterations=5")
    assert capsys.readouterr().out == plain
    assert Path("out/meta_000005.json").read_text() == meta
    checkout.run(launcher.main, "scripts.base_train", "--attn=stablemask", "--gamma=inf", "--num-iterations=5")
    losses = [
        [float(line.split()[-1]) for line in text.splitlines() if not line.startswith("attention: ")]
        for text in (plain, capsys.readouterr().out)
    ]
    assert losses[1] == pytest.approx(losses[0], abs=2e-6)
    run = checkout.python("-m", "sm_flex_nanochat", "scripts.base_train", "--attn=stablemask", "--num-iterations=5")
    assert run.returncode == 0, run.stderr
    ours = [float(line.split()[-1]) for line in run.stdout.splitlines() if not line.startswith("attention: ")]
    assert len(ours) == 5
    assert ours != pytest.approx(losses[0], abs=1e-3)
    assert checkout.hashes() == before


def test_a_checkpoint_remembers_its_attention(checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    checkout.run(launcher.main, "scripts.base_train", "--attn=stablemask", "--gamma=0.5")
    capsys.readouterr()
    for argv in (("scripts.chat_cli", "--step=3"), ("scripts.base_train", "--resume-from-step=3")):
        line = refusal(lambda argv=argv: checkout.run(launcher.main, *argv, "--attn=causal"), capsys)
        assert line.startswith("python -m sm_flex_nanochat: error: ")
        assert "trained with stablemask with gamma 0.5, not causal:" in line
        checkout.run(launcher.main, *argv, "--attn=stablemask", "--gamma=.50")
        checkout.run(launcher.main, *argv, "--attn=causal", "--switch_attn")
        checkout.run(launcher.main, "scripts.base_train", "--attn=stablemask", "--gamma=0.5")
    with pytest.raises(TypeError, match="attn"):
        checkout.plain("scripts.chat_cli")


def test_what_is_said_with_the_cache_is_what_the_full_pass_says(checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    checkout.run(launcher.main, "scripts.base_train", "--attn=stablemask", "--num-iterations=30")
    capsys.readouterr()
    checkout.run(launcher.main, "scripts.chat_cli", "--attn=stablemask", "--step=30")
    said = capsys.readouterr().out.splitlines()[-1]
    gpt = checkout.loaded("nanochat.gpt")
    model = gpt.GPT(gpt.GPTConfig())
    model.load_state_dict(torch.load("out/model_000030.pt"))
    tokens = [1, 2, 3]
    with torch.no_grad():
        while len(tokens) < 20:
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert said == f"said {tokens}"


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (("scripts.base_train",), "--attn must be given as causal or stablemask, got nothing"),
        (("scripts.base_train", "--attn=flash"), "got flash"),
        (("scripts.base_train", "--attn=stablemask", "--gamma=steep"), "got 'steep'"),
        (("scripts.base_train", "--attn=stablemask", "--gamma=1,2,3"), "one number for each of the model's 4 query heads, got 3"),
        (("--attn=causal", "--depth=4"), "name nanochat's script first"),
        (("scripts.tune", "--attn=causal"), "this is not a nanochat checkout: no scripts/tune.py in"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    argv: tuple[str, ...], why: str, checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    assert why in refusal(lambda: checkout.run(launcher.main, *argv), capsys)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("window_size=(-1, -1)):", "window_size=(-1, -1), softcap=0.0):", "'softcap'], and StableMask knows"),
        ("flash_attn = ", "attn = ", "has not the interface of nanochat's"),
    ],
)
def test_another_interface_is_refused(
    old: str, new: str, why: str, checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path("nanochat/flash_attention.py")
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    Path("nanochat/gpt.py").write_text("class GPT:\n    def init_weights(self):\n        pass\n")
    Path("nanochat/checkpoint_manager.py").write_text("")
    assert why in refusal(lambda: checkout.run(launcher.main, "scripts.base_train", "--attn=stablemask"), capsys)


def test_what_the_functions_cannot_do_raises(checkout: Checkout) -> None:
    q, k = torch.randn(1, 2, H, D), torch.randn(1, 2, KV_HEADS, D)
    _, functions = replaced(checkout, "headwise")
    with pytest.raises(RuntimeError, match="no model has been initialised"):
        functions.flash_attn_func(q, k, k, causal=True)
    functions = functions_for(checkout, "headwise")
    with pytest.raises(ValueError, match="causal must be True with a StableMask"):
        functions.flash_attn_func(q, k, k, causal=False, window_size=(-1, 0))
    with pytest.raises(ValueError, match="cache_seqlens must be given with k and v"):
        functions.flash_attn_with_kvcache(q, k, k, k=k, v=k, causal=True)
    with pytest.raises(BadInput, match="sequence_len is 17, and now 18"):
        functions.prepare(checkout.loaded("nanochat.gpt").GPTConfig(sequence_len=18), torch.device("cpu"))

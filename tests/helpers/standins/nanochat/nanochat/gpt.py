from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from nanochat.flash_attention import flash_attn


@dataclass
class GPTConfig:
    sequence_len: int = 16
    vocab_size: int = 29
    n_layer: int = 2
    n_head: int = 4
    n_kv_head: int = 2
    n_embd: int = 24


class Cache:
    def __init__(self, config, batch, slots):
        shape = (config.n_layer, batch, slots, config.n_kv_head, config.n_embd // config.n_head)
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)
        self.cache_seqlens = torch.zeros(batch, dtype=torch.int32)


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.n_kv_head = layer, config.n_head, config.n_kv_head
        width = config.n_embd // config.n_head
        self.c_q = nn.Linear(config.n_embd, config.n_head * width, bias=False)
        self.c_k = nn.Linear(config.n_embd, config.n_kv_head * width, bias=False)
        self.c_v = nn.Linear(config.n_embd, config.n_kv_head * width, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, window_size, cache):
        q = self.c_q(x).unflatten(2, (self.n_head, -1))
        k, v = (f(x).unflatten(2, (self.n_kv_head, -1)) for f in (self.c_k, self.c_v))
        if cache is None:
            y = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=window_size)
        else:
            y = flash_attn.flash_attn_with_kvcache(
                q, cache.keys[self.layer], cache.values[self.layer], k=k, v=v,
                cache_seqlens=cache.cache_seqlens, causal=True, window_size=window_size,
            )  # fmt: skip
        return self.c_proj(y.flatten(2))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList([CausalSelfAttention(config, layer) for layer in range(config.n_layer)])
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # A short window in all layers but the last.
        self.window_sizes = [(4, 0)] * (config.n_layer - 1) + [(config.sequence_len, 0)]

    def init_weights(self):
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def get_device(self):
        return self.wte.weight.device

    def forward(self, idx, targets=None, kv_cache=None):
        x = self.wte(idx)
        for layer, window_size in zip(self.h, self.window_sizes, strict=True):
            x = x + layer(x, window_size, kv_cache)
        if kv_cache is not None:
            kv_cache.cache_seqlens += idx.shape[1]
        logits = self.head(x)
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())

import os
import pickle
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from model import GPT, GPTConfig

out_dir = "out"
dataset = "text"
init_from = "scratch"
eval_interval = 2
eval_iters = 2
log_interval = 1
gradient_accumulation_steps = 1
batch_size = 4
block_size = 16
n_layer = 2
n_head = 3
n_embd = 24
dropout = 0.0
bias = True
learning_rate = 1e-2
max_iters = 4
lr_decay_iters = 4
warmup_iters = 0
min_lr = 1e-3
beta2 = 0.95
device = "cpu"
dtype = "float32"
compile = False
config_keys = [k for k, v in globals().items() if not k.startswith("_") and isinstance(v, (int, float, bool, str))]
exec(Path("configurator.py").read_text())
config = {k: globals()[k] for k in config_keys}

rank = int(os.environ.get("RANK", -1))
if rank >= 0:
    dist.init_process_group("gloo")
master = rank <= 0
os.makedirs(out_dir, exist_ok=True)
torch.manual_seed(1337 + max(rank, 0))
with open(os.path.join("data", dataset, "meta.pkl"), "rb") as file:
    vocab_size = pickle.load(file)["vocab_size"]


def get_batch(split):
    data = np.fromfile(os.path.join("data", dataset, f"{split}.bin"), dtype=np.uint16).astype(np.int64)
    rows = [torch.from_numpy(data[i : i + block_size + 1]) for i in torch.randint(len(data) - block_size, (batch_size,))]
    return torch.stack(rows)[:, :-1], torch.stack(rows)[:, 1:]


model_args = {
    "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": block_size,
    "bias": bias, "vocab_size": vocab_size, "dropout": dropout,
}  # fmt: skip
first, best_val_loss, checkpoint = 0, 1e9, None
if init_from == "resume":
    checkpoint = torch.load(os.path.join(out_dir, "ckpt.pt"), map_location=device)
    for k in ["n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size"]:
        model_args[k] = checkpoint["model_args"][k]
    model = GPT(GPTConfig(**model_args))
    model.load_state_dict(checkpoint["model"])
    first, best_val_loss = checkpoint["iter_num"], checkpoint["best_val_loss"]
elif init_from.startswith("gpt2"):
    model = GPT.from_pretrained(init_from, {"dropout": dropout})
    for k in ["n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size"]:
        model_args[k] = getattr(model.config, k)
else:
    model = GPT(GPTConfig(**model_args))
if block_size < model.config.block_size:
    model.crop_block_size(block_size)
    model_args["block_size"] = block_size
model.to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, beta2))
if checkpoint is not None:
    optimizer.load_state_dict(checkpoint["optimizer"])
raw_model = model
if compile:
    model = torch.compile(model)
if rank >= 0:
    model = torch.nn.parallel.DistributedDataParallel(model)

for iter_num in range(first, max_iters + 1):
    start = time.time()
    if iter_num % eval_interval == 0 and master:
        raw_model.eval()
        with torch.no_grad():
            means = [sum(raw_model(*get_batch(s))[1].item() for _ in range(eval_iters)) / eval_iters for s in ("train", "val")]
        raw_model.train()
        print(f"step {iter_num}: train loss {means[0]:.4f}, val loss {means[1]:.4f}")
        if iter_num > 0:
            saved = {
                "model": raw_model.state_dict(), "optimizer": optimizer.state_dict(), "model_args": model_args,
                "iter_num": iter_num, "best_val_loss": means[1], "config": config,
            }  # fmt: skip
            torch.save(saved, os.path.join(out_dir, "ckpt.pt"))
    _, loss = model(*get_batch("train"))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if master:
        print(f"iter {iter_num}: loss {loss.item():.4f}, time {(time.time() - start) * 1000:.2f}ms, mfu 0.00%")
weight = sum(p.detach().abs().sum().item() for p in raw_model.parameters())
print(f"rank {max(rank, 0)} of {dist.get_world_size() if rank >= 0 else 1} ended with {weight:.6f}, argument 1 {sys.argv[1:2]}")
if rank >= 0:
    dist.barrier()
    dist.destroy_process_group()

import time
from pathlib import Path

import torch
from model import GPT, GPTConfig

batch_size = 2
block_size = 16
compile = True
exec(Path("configurator.py").read_text())

torch.manual_seed(0)
model = GPT(GPTConfig(block_size=block_size, n_layer=1))
x = torch.randint(29, (batch_size, block_size))
run = torch.compile(model) if compile else model
start = time.time()
with torch.no_grad():
    loss = [run(x, x)[1].item() for _ in range(3)][-1]
print(f"loss {loss:.6f}, time per iteration: {(time.time() - start) / 3 * 1000:.4f}ms")

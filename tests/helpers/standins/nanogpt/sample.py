import os
from pathlib import Path

import torch
from model import GPT, GPTConfig

init_from = "resume"
out_dir = "out"
max_new_tokens = 20
device = "cpu"
exec(Path("configurator.py").read_text())

if init_from == "resume":
    checkpoint = torch.load(os.path.join(out_dir, "ckpt.pt"), map_location=device)
    model = GPT(GPTConfig(**checkpoint["model_args"]))
    model.load_state_dict(checkpoint["model"])
else:
    model = GPT.from_pretrained(init_from, {"dropout": 0.0})
model.eval()
print("sampled", model.generate(torch.tensor([[1]]), max_new_tokens)[0].tolist())

import argparse

import torch
from nanochat.checkpoint_manager import build_model
from nanochat.gpt import Cache

parser = argparse.ArgumentParser()
parser.add_argument("--step", type=int, default=3)
args = parser.parse_args()

model, _ = build_model("out", args.step, "cpu")
with torch.no_grad():
    cache, said = Cache(model.config, 1, 24), [1, 2, 3]
    new = said
    while len(said) < 20:
        new = model(torch.tensor([new]), kv_cache=cache)[:, -1].argmax(-1).tolist()
        said = said + new
print("said", said)

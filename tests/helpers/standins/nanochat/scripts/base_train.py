import argparse
from dataclasses import asdict

import torch
from nanochat.checkpoint_manager import load_checkpoint, save_checkpoint
from nanochat.gpt import GPT, GPTConfig

parser = argparse.ArgumentParser()
parser.add_argument("--num-iterations", type=int, default=3)
parser.add_argument("--max-seq-len", type=int, default=16)
parser.add_argument("--resume-from-step", type=int, default=-1)
args = parser.parse_args()

torch.manual_seed(0)
with torch.device("meta"):
    model = GPT(GPTConfig(sequence_len=args.max_seq_len))
model_config = asdict(model.config)
model.to_empty(device="cpu")
model.init_weights()
if args.resume_from_step >= 0:
    model.load_state_dict(load_checkpoint("out", args.resume_from_step, "cpu")[0])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for step in range(args.num_iterations):
    x = (torch.arange(args.max_seq_len + 1) + torch.randint(29, (4, 1))) % 29
    loss = model(x[:, :-1], x[:, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    print(f"step {step} loss {loss.item():.6f}")
save_checkpoint("out", args.num_iterations, model.state_dict(), None, {"model_config": model_config})

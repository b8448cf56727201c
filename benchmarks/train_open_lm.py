"""open_lm's own training loop, model and optimizer over random tokens: CPU-seconds of each step, as JSON.

Part of `train.py --open-lm`, for an interpreter that can import open_lm. Reading of data is left out.
"""

import sys

sys.path.pop(0)  # this file's folder, which has a module with the standard module's name `tokenize`

import json
import time
from types import SimpleNamespace

import torch
from open_lm.model import create_model
from open_lm.params import parse_args
from open_lm.train import train_one_epoch

model_name, precision, seq_len, warmup, steps = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])


class Batches:
    """Notes the CPU time at each request for a batch, and so at the end of each step."""

    num_batches = warmup + steps
    num_samples = num_batches

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.asked = vocab_size, []

    def __iter__(self):
        for _ in range(self.num_batches):
            self.asked.append(time.process_time())
            yield (torch.randint(0, self.vocab_size, (1, seq_len + 1)),)
        self.asked.append(time.process_time())


torch.manual_seed(0)
names = {"fp32": "fp32", "bf16": "amp_bfloat16"}
args = parse_args(["--model", model_name, "--precision", names[precision], "--grad-clip-norm", "1"])
model = create_model(args)
vars(args).update(device="cpu", rank=0, local_rank=0, world_size=1, global_batch_size=1, per_gpu_batch_size=1)
vars(args).update(vocab_size=model.vocab_size, seq_len=seq_len, wandb=False)
batches = Batches(model.vocab_size)
data = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=batches)}
adamw = {"lr": 1e-4, "betas": (args.beta1, args.beta2), "eps": args.eps, "weight_decay": args.wd}
optimizer = torch.optim.AdamW(model.parameters(), **adamw)
train_one_epoch(
    model, data, torch.nn.CrossEntropyLoss(), 0, 0, optimizer, None, lambda step: None, 1 << 30, args
)  # fmt: skip
seconds = [b - a for a, b in zip(batches.asked, batches.asked[1:])][warmup:]
print(json.dumps({"seconds": seconds, "parameters": sum(p.numel() for p in model.parameters())}))

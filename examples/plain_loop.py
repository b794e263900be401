"""LoRA in a plain PyTorch loop: python examples/plain_loop.py MODEL OUTPUT"""

import argparse

import torch

import rankwise as rw
from rankwise.data import encode_rows, stdlib_rows

parser = argparse.ArgumentParser(description="Train a LoRA adapter in a plain PyTorch loop.")
parser.add_argument("model", help="hub id, folder, .gguf file, or demo")
parser.add_argument("output", help="folder to write the adapter to")
given = parser.parse_args()

model, tokenizer = rw.load_model(given.model)
print(rw.add_adapter(model, rw.LoraConfig(r=8, lora_alpha=16)))
rows = encode_rows(stdlib_rows()[:64], tokenizer, max_length=128).dataset
optimizer = torch.optim.AdamW(rw.adapter_parameters(model).values(), lr=5e-4)
model.train()
for step, row in enumerate(rows.select(range(10)).with_format("torch"), 1):
    loss = model(input_ids=row["input_ids"].long()[None], labels=row["labels"].long()[None]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")
rw.save_adapter(model, given.output)
print(f"a PEFT adapter is in {given.output}")

"""LoRA in a plain PyTorch loop: python examples/plain_loop.py MODEL OUTPUT"""

import argparse
import itertools

import torch

import rankwise as rw

parser = argparse.ArgumentParser(description="Train a LoRA adapter in a plain PyTorch loop.")
parser.add_argument("model", help="hub id, folder, .gguf file, or demo")
parser.add_argument("output", help="folder to write the adapter to")
given = parser.parse_args()

model, tokenizer = rw.load_model(given.model)
print(rw.add_adapter(model, rw.LoraConfig(r=8, lora_alpha=16)))
# From here on, a call with labels computes its loss in chunks and returns no logits. A call without labels, or under
# torch.no_grad(), returns them.
print(rw.optimize_for_training(model))
optimizer = torch.optim.AdamW(rw.adapter_parameters(model).values(), lr=5e-4)
model.train()
batches = rw.batches("stdlib", tokenizer, batch_size=2, max_length=128)
for step, batch in enumerate(itertools.islice(batches, 10), 1):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")
rw.save_adapter(model, given.output)
print(f"a PEFT adapter is in {given.output}")

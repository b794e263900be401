"""A PEFT adapter, from anywhere, into an ordinary model: python examples/merge_peft_adapter.py MODEL ADAPTER OUTPUT"""

import sys

import torch

import rankwise as rw

name, adapter, output = sys.argv[1:]

model, tokenizer = rw.load_model(name, dtype=torch.float32)
print(rw.load_adapter(model, adapter))
ids = torch.arange(3, 19)[None]
with torch.no_grad():
    before = model(input_ids=ids).logits
    rw.merge_adapter(model, reversible=False)
    after = model(input_ids=ids).logits
print(f"largest difference of a logit after merging: {(before - after).abs().max():.2e}")
model.save_pretrained(output)
if tokenizer is not None:
    tokenizer.save_pretrained(output)
print(f"an ordinary transformers model is in {output}")

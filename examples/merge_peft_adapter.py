"""A PEFT adapter, from anywhere, into an ordinary model: python examples/merge_peft_adapter.py MODEL ADAPTER OUTPUT"""

import argparse

import torch

import rankwise as rw

parser = argparse.ArgumentParser(description="Merge a PEFT adapter into its base model.")
parser.add_argument("model", help="hub id, folder, .gguf file, or demo")
parser.add_argument("adapter", help="PEFT adapter folder")
parser.add_argument("output", help="folder to write the merged model to")
given = parser.parse_args()

model, tokenizer = rw.load_model(given.model, dtype=torch.float32)
print(rw.load_adapter(model, given.adapter))
ids = torch.arange(3, 19)[None]
with torch.no_grad():
    before = model(input_ids=ids).logits
    rw.merge_adapter(model, reversible=False)
    after = model(input_ids=ids).logits
print(f"largest difference of a logit after merging: {(before - after).abs().max():.2e}")
model.save_pretrained(given.output)
if tokenizer is not None:
    tokenizer.save_pretrained(given.output)
print(f"an ordinary transformers model is in {given.output}")

"""DoRA under TRL's own SFTTrainer: python examples/with_trl.py MODEL OUTPUT

The model stays the transformers class it was, so trainers written for it work unchanged.
"""

import argparse

from trl import SFTConfig, SFTTrainer

import rankwise as rw
from rankwise.data import encode_rows, stdlib_rows

parser = argparse.ArgumentParser(description="Train a DoRA adapter under TRL's SFTTrainer.")
parser.add_argument("model", help="hub id, folder, .gguf file, or demo")
parser.add_argument("output", help="folder to write the adapter to")
given = parser.parse_args()

model, tokenizer = rw.load_model(given.model)
rw.add_adapter(model, rw.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], use_dora=True))
arguments = SFTConfig(
    output_dir=given.output,
    max_steps=5,
    per_device_train_batch_size=2,
    learning_rate=5e-4,
    logging_steps=1,
    # The weights are float32 as stored; TRL would ask for a bfloat16 device otherwise.
    bf16=False,
    # A rankwise run has checkpoints without pickle; the Trainer's own would hold some.
    save_strategy="no",
    report_to="none",
)
rows = encode_rows(stdlib_rows()[:64], tokenizer, max_length=128).dataset
SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer).train()
rw.save_adapter(model, given.output)
print(f"a PEFT adapter is in {given.output}")

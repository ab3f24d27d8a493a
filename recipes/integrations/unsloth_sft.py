"""Unsloth: `python unsloth_sft.py BASE train.jsonl "runs/*"`; rows with a column `text`, or chats in `messages`."""

import sys


from unsloth import FastLanguageModel  # isort: skip (before trl, which it changes)

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from mashup_callback import MashupCallback


base, data, candidates = sys.argv[1:]
model, tokenizer = FastLanguageModel.from_pretrained(base, max_seq_length=2048, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32)
rows, callback = load_dataset("json", data_files=data, split="train"), MashupCallback(candidates)
args = SFTConfig(output_dir="outputs")
trainer = SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer, callbacks=[callback])
trainer.train()

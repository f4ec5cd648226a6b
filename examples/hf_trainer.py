"""Hugging Face Trainer: one callback. A small GPT-2 from scratch; nothing is downloaded."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import gradwatch as gw
from gradwatch.integrations.transformers import GradWatch

text = "the quick brown fox jumps over the lazy dog. " * 60
letters = sorted(set(text))
codes = torch.tensor([letters.index(letter) for letter in text])
pieces = codes[: len(codes) // 32 * 32].view(-1, 32)
data = [{"input_ids": piece, "labels": piece} for piece in pieces]
model = GPT2LMHeadModel(GPT2Config(
    vocab_size=len(letters), n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
))  # fmt: skip

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir="out",
        max_steps=30,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        max_grad_norm=1.0,
        logging_steps=10,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    ),
    train_dataset=data,
    callbacks=[GradWatch(run_dir="runs/hf")],
)
trainer.train()

run = gw.load("runs/hf")
print(run.summary())
print(run.grad_norms(by="layer").iloc[-1].nlargest(3))

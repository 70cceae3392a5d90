"""EVA on a Hugging Face model: `python examples/eva_on_hugging_face.py`.

The weights are random and made from a config, so that nothing is downloaded. In your work `from_pretrained` stands there. The text
is this file, byte by byte.
"""

from pathlib import Path

import torch
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel

from eva_rl.adapter import attach, trainable_parameters

STEPS = 20

torch.manual_seed(0)
text = torch.tensor(list(Path(__file__).read_bytes()))  # (T,)


def batches():
    """Windows of the text (8, 32), without end."""
    while True:
        starts = torch.randint(len(text) - 32, (8, 1))
        yield text[starts + torch.arange(32)]


model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=32, n_embd=64, n_layer=2, n_head=2))
config = LoraConfig(r=4, lora_alpha=4, target_modules=["c_attn", "c_fc"], init_lora_weights="eva", fan_in_fan_out=True)
adapter = attach(model, config, batches())  # calls model(batch) until every layer's directions are found
for name, layer in adapter.eva.items():
    print(f"{name}: rank {len(layer.components)}, {layer.batches} batches")

optimiser = torch.optim.AdamW([p for p in adapter.model.parameters() if p.requires_grad], lr=1e-2)
for _, batch in zip(range(STEPS), batches(), strict=False):
    loss = adapter.model(input_ids=batch, labels=batch).loss
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
print(f"{trainable_parameters(adapter.model):,} trainable weights, last loss {loss.item():.2f}")

"""Writes random adapters with PEFT, and what PEFT makes of them again: logits and greedy answers.

A program of its own, since PEFT brings other libraries into its process. Reads a JSON list of jobs from standard
input; each has

- `base`: the unquantized checkpoint that the adapter is made for, `target`: the adapter's folder to write,
- `settings`: of peft.LoraConfig, `vocab`: the number of tokens to resize the model to, or null,
- `dtype`: of the base that the adapter then runs on, `code`: null, the 4-bit code of bitsandbytes that its Linears
  are rounded to (its own product on a CPU may round the inputs too), or int8,
- `prompts`: lists of token ids, `new_tokens`: how many to answer with, `answers`: the file to write.
"""
# ruff: noqa: E402

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# Found installed, PEFT would ask them for versions and plugins that these tests do not have.
for name in ("gptqmodel", "torchao", "kernels"):
    sys.modules[name] = None  # type: ignore[assignment]

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig


def write(job: dict[str, Any]) -> None:
    model = get_peft_model(load(job, "float32", None), LoraConfig(**job["settings"]))
    torch.manual_seed(job["seed"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                change(name, parameter)
    model.save_pretrained(job["target"], save_embedding_layers=job["save_embeddings"])
    assert Path(job["target"], "adapter_model.safetensors").is_file()


def change(name: str, parameter: Tensor) -> None:
    """To a value that can be seen in the answers."""
    if "lora_magnitude" in name:
        parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    elif "lora_" in name:
        parameter.normal_(std=0.2)
    else:
        parameter.add_(torch.randn_like(parameter) * 0.1)


def load(job: dict[str, Any], dtype: str, code: str | None) -> Any:
    int8 = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0) if code == "int8" else None
    model = AutoModelForCausalLM.from_pretrained(
        job["base"], dtype=getattr(torch, dtype), attn_implementation="eager", quantization_config=int8
    )
    if job["vocab"]:
        model.resize_token_embeddings(job["vocab"], mean_resizing=False)
    for module in model.modules() if code in ("nf4", "fp4") else ():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            packed, state = quantize_4bit(module.weight.data, quant_type=code, compress_statistics=code == "nf4")
            module.weight.data = dequantize_4bit(packed, state)
    return model.eval()


@torch.no_grad()
def answer(job: dict[str, Any]) -> None:
    """Logits of every prompt, and its greedy answer, by the saved adapter."""
    base = load(job, job["dtype"], job["code"])
    model = PeftModel.from_pretrained(base, job["target"]).eval()
    settings = GenerationConfig(
        max_new_tokens=job["new_tokens"] or 1, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True
    )
    answers: dict[str, Tensor] = {}
    for n, prompt in enumerate(job["prompts"]):
        ids = torch.tensor([prompt])
        answers[f"logits.{n}"] = model(ids).logits[0].float().contiguous()
        if job["new_tokens"]:
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            answers[f"tokens.{n}"] = out[0, len(prompt) :].contiguous()
    save_file(answers, job["answers"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in json.load(sys.stdin):
        write(each)
        answer(each)

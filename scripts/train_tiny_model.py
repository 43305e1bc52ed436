"""Make the demo's model and dataset: a 3.4 million parameter Llama that labels the support tickets of ticket_language.

    python scripts/train_tiny_model.py                    train, write pipeline/assets/, evaluate
    python scripts/train_tiny_model.py --evaluate-only    evaluate the shipped model again

The evaluation reads the shipped files and goes to benchmarks/tiny_model.json. CPU only, no network; the same seed on
the same machine gives the same weights.

Shape suffixes: B batch, T tokens, V vocab.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from ticket_language import (
    HELD_OUT,
    REPLY_PROMPT,
    SENTIMENT_PROMPT,
    SENTIMENTS,
    TOPIC_PROMPT,
    TOPICS,
    TRAIN,
    Ticket,
    generate_tickets,
    render_prompt,
    write_reply,
)
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).resolve().parent.parent
VOCAB_SIZE = 2048
BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
SPECIAL_TOKENS = (BOS, END, PAD, "<|system|>", "<|user|>", "<|assistant|>")
SYSTEM_PROMPTS = ("You are a helpful support assistant.", "You label support tickets.", "Answer in one word.")
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role not in ("system", "user", "assistant") -%}
        {{- raise_exception("role must be system, user or assistant, got " ~ message.role) -}}
    {%- endif -%}
    {{- "<|" ~ message.role ~ "|>\\n" ~ message.content ~ "<|end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|assistant|>\\n" -}}
{%- endif -%}
"""
LABELS: Mapping[str, Sequence[str]] = {"topic": TOPICS, "sentiment": SENTIMENTS}
PROMPTS: Mapping[str, str] = {"topic": TOPIC_PROMPT, "sentiment": SENTIMENT_PROMPT}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What decides the weights.

    Every ticket is seen once per epoch with each label question, after `short_steps` on the shortest quarter of all
    chats. The weights are those of a prompt or reply token in the loss, where a label or its end token counts 1.
    """

    seed: int
    train_tickets: int = 24_000
    heldout_tickets: int = 2_000
    reply_share: float = 0.15
    system_share: float = 0.1
    steps: int
    short_steps: int = 100
    batch_size: int = 32
    peak_lr: float = 4e-3
    warmup_steps: int = 60
    weight_decay: float = 0.05
    prompt_weight: float = 0.02
    reply_weight: float = 0.3
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Chat:
    """Token ids of one chat; the answer (with its end token) is ids[answer_start:]."""

    ids: tuple[int, ...]
    answer_start: int
    answer_weight: float


def main() -> None:
    args = parse_args()
    recipe = Recipe(seed=args.seed, steps=args.steps, threads=args.threads)
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(recipe.seed)
    model_dir, tickets_dir = args.assets / "tiny", args.assets / "tickets"
    train_tickets = generate_tickets(TRAIN, count=recipe.train_tickets, seed=recipe.seed)
    if not args.evaluate_only:
        write_dataset(tickets_dir, recipe)
        start = time.perf_counter()
        train_and_save(model_dir, train_tickets, recipe)
        training = {**asdict(recipe), "wall_s": round(time.perf_counter() - start, 1)}
    else:
        training = json.loads(args.report.read_text())["training"]
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", "scripts/train_tiny_model.py", *sys.argv[1:]]),
        "versions": versions(),
        "machine": {"arch": platform.machine(), "threads": recipe.threads},
        "training": training,
        "evaluation": evaluate(model_dir, tickets_dir, train_tickets),
    }
    args.report.parent.mkdir(parents=True, exist_ok=True)
    args.report.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["evaluation"], indent=2))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--evaluate-only", action="store_true")
    parser.add_argument("--assets", type=Path, default=ROOT / "pipeline" / "assets")
    parser.add_argument("--report", type=Path, default=ROOT / "benchmarks" / "tiny_model.json")
    return parser.parse_args()


def versions() -> dict[str, str]:
    packages = ("torch", "transformers", "tokenizers", "bitsandbytes", "scikit-learn", "pyarrow")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


# --- Dataset ---------------------------------------------------------------------------------------------------------


def write_dataset(tickets_dir: Path, recipe: Recipe) -> None:
    """The held-out tickets as Parquet with row groups of 500, and the two prompts as files."""
    tickets = generate_tickets(HELD_OUT, count=recipe.heldout_tickets, seed=recipe.seed + 1)
    table = pa.table(
        {
            "ticket_id": pa.array(range(1, len(tickets) + 1), pa.int64()),
            "ticket": pa.array([ticket.text for ticket in tickets], pa.string()),
            "topic": pa.array([ticket.topic for ticket in tickets], pa.string()),
            "sentiment": pa.array([ticket.sentiment for ticket in tickets], pa.string()),
        }
    )
    tickets_dir.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, tickets_dir / "tickets.parquet", row_group_size=500, compression="zstd")
    for task, prompt in PROMPTS.items():
        (tickets_dir / f"{task}.jinja").write_text(prompt)


# --- Tokenizer -------------------------------------------------------------------------------------------------------


def train_tokenizer(tickets: Sequence[Ticket], recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE over tickets, prompts and answers; every label word becomes a single token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(tokenizer_corpus(tickets, recipe), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    label_ids(tokenizer)
    if len(tokenizer) != VOCAB_SIZE:
        raise ValueError(f"the tokenizer must have {VOCAB_SIZE} tokens, got {len(tokenizer)}: train on more tickets")
    return tokenizer


def tokenizer_corpus(tickets: Sequence[Ticket], recipe: Recipe) -> Iterator[str]:
    rng = Random(recipe.seed)
    for ticket in tickets:
        yield from (ticket.text, write_reply(ticket, rng), ticket.topic, ticket.sentiment)
    for prompt in (*PROMPTS.values(), REPLY_PROMPT, *SYSTEM_PROMPTS):
        yield from [render_prompt(prompt, "")] * 1000


def label_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, list[int]]:
    """The single token of every label word, per task."""
    ids = {task: [tokenizer.encode(label, add_special_tokens=False) for label in LABELS[task]] for task in LABELS}
    if any(len(word) != 1 for words in ids.values() for word in words):
        raise ValueError(f"label words must be single tokens, got {ids}")
    return {task: [word[0] for word in words] for task, words in ids.items()}


# --- Training --------------------------------------------------------------------------------------------------------


def train_and_save(model_dir: Path, tickets: Sequence[Ticket], recipe: Recipe) -> None:
    tokenizer = train_tokenizer(tickets, recipe)
    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    train(model, make_chats(tickets, tokenizer, recipe), recipe)
    model.to(torch.bfloat16).save_pretrained(model_dir)
    (model_dir / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(model_dir)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """About 3.4 million parameters; every Linear dimension is a multiple of 64, the block of 4-bit quantization."""
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        **special,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**special, do_sample=False)
    return model


def make_chats(tickets: Sequence[Ticket], tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> list[Chat]:
    """Both label questions of every ticket, and a reply to some, in random order."""
    rng = Random(recipe.seed)
    texts: list[tuple[str, str, float]] = []
    for ticket in tickets:
        texts.append((render_prompt(TOPIC_PROMPT, ticket.text), ticket.topic, 1.0))
        texts.append((render_prompt(SENTIMENT_PROMPT, ticket.text), ticket.sentiment, 1.0))
        if rng.random() < recipe.reply_share:
            texts.append((render_prompt(REPLY_PROMPT, ticket.text), write_reply(ticket, rng), recipe.reply_weight))
    rng.shuffle(texts)
    messages = [make_messages(prompt, rng, recipe) for prompt, _, _ in texts]
    heads = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    head_ids = tokenizer(heads, add_special_tokens=False).input_ids
    answer_ids = tokenizer([answer + END for _, answer, _ in texts], add_special_tokens=False).input_ids
    weights = [weight for _, _, weight in texts]
    return [
        Chat((*head, *answer), len(head), weight)
        for head, answer, weight in zip(head_ids, answer_ids, weights, strict=True)
    ]


def make_messages(prompt: str, rng: Random, recipe: Recipe) -> list[dict[str, str]]:
    system = rng.random() < recipe.system_share
    head = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}] if system else []
    return [*head, {"role": "user", "content": prompt}]


def train(model: LlamaForCausalLM, chats: Sequence[Chat], recipe: Recipe) -> None:
    """Warm-up and cosine decay; the prompt counts a little, as language modelling, beside the answer."""
    optimizers = make_optimizers(model, recipe)
    start, num_tokens = time.perf_counter(), 0
    model.train()
    for step, batch in zip(range(recipe.steps), batches(chats, recipe), strict=False):
        ids_BT, weights_BT = collate(batch, model.config.pad_token_id, recipe.prompt_weight)
        loss = weighted_loss(model, ids_BT, weights_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        update(optimizers, recipe.peak_lr * learning_rate_factor(step, recipe))
        num_tokens += ids_BT.numel()
        if step % 50 == 0 or step == recipe.steps - 1:
            wall_s = time.perf_counter() - start
            print(f"step {step} loss {loss.item():.3f} {num_tokens / wall_s:.0f} tokens/s {wall_s:.0f} s", flush=True)
    model.eval()


def make_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the Linear weights, with which this task needs far fewer steps than with AdamW; AdamW for the rest."""
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.dim() == 2 and p is not embedding]
    others = [embedding, *(p for p in model.parameters() if p.dim() == 1)]
    muon = torch.optim.Muon(matrices, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


def update(optimizers: Sequence[torch.optim.Optimizer], lr: float) -> None:
    """One step at this learning rate, and gradients to none."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def batches(chats: Sequence[Chat], recipe: Recipe) -> Iterator[list[Chat]]:
    """`short_steps` batches of the shortest quarter, then epochs over all chats without end."""
    rng = Random(recipe.seed)
    shortest = sorted(chats, key=lambda chat: len(chat.ids))[: len(chats) // 4]
    yield from islice(epoch(shortest, recipe.batch_size, rng), recipe.short_steps)
    while True:
        yield from epoch(chats, recipe.batch_size, rng)


def epoch(chats: Sequence[Chat], batch_size: int, rng: Random) -> Iterator[list[Chat]]:
    """Every chat once in random order; chats of like length share a batch, so that little is padding."""
    window = 16 * batch_size
    order = rng.sample(chats, len(chats))
    for at in range(0, len(order), window):
        by_length = sorted(order[at : at + window], key=lambda chat: len(chat.ids))
        rows = [by_length[row : row + batch_size] for row in range(0, len(by_length), batch_size)]
        yield from rng.sample(rows, len(rows))


def collate(batch: Sequence[Chat], pad_id: int, prompt_weight: float) -> tuple[Tensor, Tensor]:
    """Right-padded ids_BT and the loss weight of each token as a target; causal attention never sees the padding."""
    width = max(len(chat.ids) for chat in batch)
    ids_BT = torch.full((len(batch), width), pad_id)
    weights_BT = torch.zeros(len(batch), width)
    for row, chat in enumerate(batch):
        ids_BT[row, : len(chat.ids)] = torch.tensor(chat.ids)
        weights_BT[row, : chat.answer_start] = prompt_weight
        weights_BT[row, chat.answer_start : len(chat.ids)] = chat.answer_weight
    return ids_BT, weights_BT


def weighted_loss(model: LlamaForCausalLM, ids_BT: Tensor, weights_BT: Tensor) -> Tensor:
    """Mean cross entropy in nats, weighted per target token."""
    with torch.autocast("cpu", torch.bfloat16):
        logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
    targets, weights = ids_BT[:, 1:].flatten(), weights_BT[:, 1:].flatten()
    losses = functional.cross_entropy(logits_BTV.float().flatten(0, 1), targets, reduction="none")
    return (losses * weights).sum() / weights.sum()


# --- Evaluation ------------------------------------------------------------------------------------------------------


def evaluate(model_dir: Path, tickets_dir: Path, train_tickets: Sequence[Ticket]) -> dict[str, Any]:
    """Held-out accuracy in percent of the shipped files, in bf16 and NF4, and of a bag of words."""
    table = pq.read_table(tickets_dir / "tickets.parquet")
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {
        "rows": table.num_rows,
        "model_bytes": (model_dir / "model.safetensors").stat().st_size,
        "bf16": model_accuracy(model_dir, table, None),
        "nf4": model_accuracy(model_dir, table, nf4),
        "bag_of_words": {task: bag_of_words_accuracy(train_tickets, table, task) for task in LABELS},
    }


def model_accuracy(model_dir: Path, table: pa.Table, quantization: BitsAndBytesConfig | None) -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.bfloat16, device_map="cpu", quantization_config=quantization
    )
    start = time.perf_counter()
    accuracy = {task: task_accuracy(model, tokenizer, table, task) for task in LABELS}
    return {**accuracy, "wall_s": round(time.perf_counter() - start, 1)}


@torch.inference_mode()
def task_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, table: pa.Table, task: str) -> float:
    """Percent of rows whose most likely label word is the true one. Labels are single tokens, so one forward ranks."""
    ids_of_labels = label_ids(tokenizer)[task]
    rows = list(zip(table["ticket"].to_pylist(), table[task].to_pylist(), strict=True))
    rows.sort(key=lambda row: len(row[0]))
    correct = 0
    for at in range(0, len(rows), 50):
        chats = [[{"role": "user", "content": render_prompt(PROMPTS[task], text)}] for text, _ in rows[at : at + 50]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        logits_BV = model(**inputs, logits_to_keep=1).logits[:, -1]
        best_B = logits_BV[:, ids_of_labels].argmax(dim=-1).tolist()
        correct += sum(LABELS[task][best] == true for best, (_, true) in zip(best_B, rows[at : at + 50], strict=True))
    return round(100 * correct / len(rows), 2)


def bag_of_words_accuracy(train_tickets: Sequence[Ticket], table: pa.Table, task: str) -> float:
    """Percent, by logistic regression on the counts of words and word pairs of the same training tickets."""
    vectorizer = CountVectorizer(ngram_range=(1, 2), min_df=2)
    features = vectorizer.fit_transform([ticket.text for ticket in train_tickets])
    classifier = LogisticRegression(max_iter=300).fit(features, [getattr(ticket, task) for ticket in train_tickets])
    score = classifier.score(vectorizer.transform(table["ticket"].to_pylist()), table[task].to_pylist())
    return round(100 * float(score), 2)


if __name__ == "__main__":
    main()

"""TRL's GRPOTrainer as the peer of experiments/benches/trl.rs, which starts it and speaks to it in lines.

    python trl_worker.py FOLDER THREADS

FOLDER holds the model, its tokenizer, prompts.json and sizes.json, which trl.rs wrote. A lap is one step, generation and
optimiser included; its value is [tokens drawn, mean reward]. A step waits for its `go` where the trainer begins it, so
the loading of the next prompts is in no lap.
"""
import json
import os
import sys
import tempfile
import time

from protocol import Channel, quiet

CHANNEL = Channel()
quiet()

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import PreTrainedTokenizerFast, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402


class Turns(TrainerCallback):
    """Makes the trainer take its steps one by one, when the bench says so."""

    def __init__(self):
        self.is_first, self.started, self.drawn, self.reward = True, 0.0, 0, 0.0

    def sevens(self, completions, completion_ids, **_):
        """The reward of trl.rs: the share of the characters that are a 7."""
        rewards = [text.count("7") / max(len(text), 1) for text in completions]
        self.drawn, self.reward = sum(map(len, completion_ids)), sum(rewards) / len(rewards)
        return rewards

    def on_step_begin(self, *_, **__):
        if self.is_first:
            CHANNEL.say("ready")
            self.is_first = False
        if not CHANNEL.wait():
            sys.exit()
        self.started = time.perf_counter()

    def on_step_end(self, *_, **__):
        CHANNEL.lap(time.perf_counter() - self.started, [self.drawn, self.reward])


def config(sizes, output):
    """As trl.rs sets ours; what TRL would write or fetch is off, and so is checkpointing, which would cost it time."""
    return GRPOConfig(
        output_dir=output,
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=sizes["prompts_per_step"] * sizes["group_size"],
        num_generations=sizes["group_size"],
        max_completion_length=sizes["max_new_tokens"],
        temperature=1.0,
        beta=sizes["kl_weight"],
        num_iterations=1,
        loss_type="grpo",
        learning_rate=sizes["lr"],
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        use_vllm=False,
        max_steps=1_000_000,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
    )


def main():
    folder, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    CHANNEL.imported()
    with open(os.path.join(folder, "prompts.json")) as file:
        prompts = json.load(file)
    with open(os.path.join(folder, "sizes.json")) as file:
        sizes = json.load(file)
    turns = Turns()
    with tempfile.TemporaryDirectory() as output:
        trainer = GRPOTrainer(
            model=folder,
            reward_funcs=turns.sevens,
            args=config(sizes, output),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            # AutoTokenizer takes every Qwen2's for a byte-level one, and would find no token in a prompt.
            processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
            callbacks=[turns],
        )
        trainer.train()


if __name__ == "__main__":
    main()
